"""The layout of Hugging Face's LlamaForCausalLM (Llama 1 to 3, TinyLlama): its rows, and its config.json.

Rotary pairs are (i, i + H/2) there, so the heads of an interleaved model are reordered on the way out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm import config
from jaxlm.convert.family import Family, sizes
from jaxlm.convert.rows import Row, flat, matrix, pairs_to_halves
from jaxlm.convert.settings import Hf, Setting, always, biases, choice, key, nothing, refusal, says


def rows(cfg: config.Model) -> list[Row]:
    """Attention and SwiGLU under the names of Llama, which many families share."""
    return [*outer_rows(), *attention_rows(cfg), *mlp_rows()]


def outer_rows() -> list[Row]:
    """Embedding, norms and head."""
    ours, theirs = "layers.{i}", "model.layers.{i}"
    return [
        Row("embed.embedding", "model.embed_tokens.weight"),
        Row(f"{ours}.mixer_norm.scale", f"{theirs}.input_layernorm.weight"),
        Row(f"{ours}.ffn_norm.scale", f"{theirs}.post_attention_layernorm.weight"),
        Row("final_norm.scale", "model.norm.weight"),
        Row("head.kernel", "lm_head.weight", matrix),
    ]


def attention_rows(cfg: config.Model, theirs: str = "model.layers.{i}.self_attn") -> list[Row]:
    """The projections of attention, and the norms of queries and keys where there are any."""
    turn = (pairs_to_halves,) if cfg.rope_layout == "interleaved" else ()
    ours = "layers.{i}.mixer"
    return [
        Row(f"{ours}.q_proj.kernel", f"{theirs}.q_proj.weight", *turn, matrix),
        Row(f"{ours}.k_proj.kernel", f"{theirs}.k_proj.weight", *turn, matrix),
        Row(f"{ours}.v_proj.kernel", f"{theirs}.v_proj.weight", matrix),
        Row(f"{ours}.o_proj.kernel", f"{theirs}.o_proj.weight", matrix),
        Row(f"{ours}.q_proj.bias", f"{theirs}.q_proj.bias", *turn, flat),
        Row(f"{ours}.k_proj.bias", f"{theirs}.k_proj.bias", *turn, flat),
        Row(f"{ours}.v_proj.bias", f"{theirs}.v_proj.bias", flat),
        Row(f"{ours}.o_proj.bias", f"{theirs}.o_proj.bias"),
        Row(f"{ours}.q_norm.scale", f"{theirs}.q_norm.weight", *turn),
        Row(f"{ours}.k_norm.scale", f"{theirs}.k_norm.weight", *turn),
    ]


def mlp_rows(ours: str = "layers.{i}.ffn", theirs: str = "model.layers.{i}.mlp") -> list[Row]:
    """A SwiGLU."""
    return [
        Row(f"{ours}.{name}_proj.{kind}", f"{theirs}.{name}_proj.{stored}", *how)
        for name in ("gate", "up", "down")
        for kind, stored, how in (("kernel", "weight", (matrix,)), ("bias", "bias", ()))
    ]


LENGTH = "original_max_position_embeddings"


_SCALINGS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        LENGTH: "original_max_seq_len",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        LENGTH: "original_max_seq_len",
        "beta_slow": "beta_slow",
        "beta_fast": "beta_fast",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
    },
}
_DEFAULTS: Sequence[tuple[str, Any]] = (("attention_factor", 0.0), ("truncate", True))
"""What an absent key means."""
_NOT_ZERO = ("factor", "attention_factor")
"""0 stands for a default here, and for nothing at all there."""


def rope(theta: float = 10000.0, absent: Hf | None = None) -> Setting:
    """Base and scaling of the rotation: `rope_parameters` for transformers 5, two keys for transformers 4.

    Args:
        absent: the `rope_parameters` that a config.json without rotary keys means.
    """

    def back(hf: Hf) -> dict[str, Any]:
        given = absent is None or hf.get("rope_parameters") or hf.get("rope_scaling")
        return _rope_back(hf if given else {**hf, "rope_parameters": absent}, theta)

    return Setting(_rope_out, back, "rope_parameters")


def _rope_out(model: config.Model) -> dict[str, Any]:
    theta, scaling = model.rope_theta, model.rope_scaling
    names = _SCALINGS.get(scaling.kind, {})
    given = {theirs: getattr(scaling, ours) for theirs, ours in names.items()}
    given = {name: value for name, value in given.items() if (name, value) not in _DEFAULTS}
    if names and not scaling.factor:
        given["factor"] = model.max_seq_len / scaling.original_max_seq_len
    kind = scaling.kind if names else "default"
    return {
        "rope_theta": theta,  # transformers 4
        "rope_scaling": {"rope_type": kind, **given} if names else None,
        "rope_parameters": {"rope_type": kind, "rope_theta": theta, **given},  # transformers 5
    }


def _rope_back(hf: Hf, default_theta: float) -> dict[str, Any]:
    # transformers takes one section as a whole, and prefers a length outside of it to the one inside.
    sections, outside = (hf.get("rope_scaling"), hf.get("rope_parameters")), hf.get(LENGTH)
    section = next(filter(None, sections), {})
    if not isinstance(section, Mapping):
        raise ValueError("rope_parameters and rope_scaling are objects or null")
    given = {name: value for name, value in section.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    theta = given.pop("rope_theta", hf.get("rope_theta") or default_theta)
    if (share := given.pop("partial_rotary_factor", hf.get("partial_rotary_factor"))) not in (None, 1.0):
        raise refusal("partial_rotary_factor", share)
    given.pop("type", None)
    if kind not in _SCALINGS:
        raise refusal("rope_type", kind)
    names = _SCALINGS[kind]
    if wrong := [name for name in given if name not in names or (name in _NOT_ZERO and not given[name])]:
        raise refusal(f"rope_parameters.{wrong[0]}", given[wrong[0]])
    if LENGTH in names:
        given[LENGTH] = outside or given.get(LENGTH) or hf["max_position_embeddings"]
    options = {"rope_scaling.kind": kind} if names else {}
    return {"rope_theta": theta, **options, **{f"rope_scaling.{names[name]}": given[name] for name in given}}


SILU = choice("hidden_act", "activation", {"swiglu": ("silu", "swish")}, "silu")
HEAD_DIM = key("head_dim", "head_dim", lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
KV_HEADS = key("num_key_value_heads", "n_kv_heads", lambda hf: hf["num_attention_heads"])


def _multiple(hf: Hf) -> dict[str, Any]:
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    if width % heads:
        raise ValueError(f"hidden_size = {width} is no multiple of num_attention_heads = {heads}")
    return {}


MULTIPLE = Setting(nothing, _multiple, "hidden_size")
"""Transformers wants a width that is a multiple of the heads even when `head_dim` is given."""

DENSE: tuple[Setting, ...] = (
    *sizes(
        vocab_size="vocab_size",
        hidden_size="d_model",
        num_hidden_layers="n_layers",
        num_attention_heads="n_heads",
        intermediate_size="d_ff",
    ),
    KV_HEADS,
    key("initializer_range", "init_std", 0.02),
    SILU,
)
"""Settings of dense decoders under the names of Llama."""

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    rows=rows,
    settings=(
        *DENSE,
        HEAD_DIM,
        MULTIPLE,
        key("rms_norm_eps", "norm_eps", 1e-6),
        key("max_position_embeddings", "max_seq_len", 2048),
        key("tie_word_embeddings", "tie_embeddings", False),
        rope(),
        biases("attention_bias", ("qkv", "attention_out")),
        biases("mlp_bias", ("mlp",)),
        says("attention_dropout", 0.0),
        always("pattern", ["attention+mlp"]),
    ),
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)

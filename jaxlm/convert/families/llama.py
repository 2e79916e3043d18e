"""The layout of Hugging Face's LlamaForCausalLM (Llama 1 to 3, TinyLlama): its rows, and its config.json.

Rotary pairs are (i, i + H/2) there, so the heads of an interleaved model are reordered on the way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxlm import config
from jaxlm.convert.family import Family, sizes
from jaxlm.convert.rows import Row, flat, matrix, pairs_to_halves
from jaxlm.convert.settings import Always, Biases, Choice, Key, Says, Setting, refusal


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


class Rope:
    """Base and scaling of the rotation: `rope_parameters` for transformers 5, two keys for transformers 4."""

    SCALINGS: ClassVar[Mapping[str, Mapping[str, str]]] = {
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

    DEFAULTS: ClassVar[tuple[tuple[str, Any], ...]] = (("attention_factor", 0.0), ("truncate", True))
    """What an absent key means."""
    NOT_ZERO: ClassVar[tuple[str, ...]] = ("factor", "attention_factor")
    """0 stands for a default here, and for nothing at all there."""

    def __init__(self, theta: float = 10000.0) -> None:
        self.theta = theta

    def out(self, model: config.Model) -> dict[str, Any]:
        """See `Setting`."""
        theta, scaling = model.rope_theta, model.rope_scaling
        names = self.SCALINGS.get(scaling.kind, {})
        given = {theirs: getattr(scaling, ours) for theirs, ours in names.items()}
        given = {key: value for key, value in given.items() if (key, value) not in self.DEFAULTS}
        if names and not scaling.factor:
            given["factor"] = model.max_seq_len / scaling.original_max_seq_len
        kind = scaling.kind if names else "default"
        return {
            "rope_theta": theta,  # transformers 4
            "rope_scaling": {"rope_type": kind, **given} if names else None,
            "rope_parameters": {"rope_type": kind, "rope_theta": theta, **given},  # transformers 5
        }

    def back(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """See `Setting`."""
        # transformers takes one section as a whole, and prefers a length outside of it to the one inside.
        sections, outside = (hf.get("rope_scaling"), hf.get("rope_parameters")), hf.get(LENGTH)
        section = next(filter(None, sections), {})
        if not isinstance(section, Mapping):
            raise ValueError("rope_parameters and rope_scaling are objects or null")
        given = {key: value for key, value in section.items() if value is not None}
        kind = given.pop("rope_type", given.pop("type", "default"))
        theta = given.pop("rope_theta", hf.get("rope_theta") or self.theta)
        if (share := given.pop("partial_rotary_factor", hf.get("partial_rotary_factor"))) not in (None, 1.0):
            raise refusal("partial_rotary_factor", share)
        given.pop("type", None)
        if kind not in self.SCALINGS:
            raise refusal("rope_type", kind)
        names = self.SCALINGS[kind]
        if wrong := [key for key in given if key not in names or (key in self.NOT_ZERO and not given[key])]:
            raise refusal(f"rope_parameters.{wrong[0]}", given[wrong[0]])
        if LENGTH in names:
            given[LENGTH] = outside or given.get(LENGTH) or hf["max_position_embeddings"]
        options = {"rope_scaling.kind": kind} if names else {}
        return {"rope_theta": theta, **options, **{f"rope_scaling.{names[key]}": given[key] for key in given}}


SILU = Choice("hidden_act", "activation", {"swiglu": ("silu", "swish")}, "silu")
HEAD_DIM = Key("head_dim", "head_dim", lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
KV_HEADS = Key("num_key_value_heads", "n_kv_heads", lambda hf: hf["num_attention_heads"])


class Multiple:
    """Transformers wants a width that is a multiple of the heads even when `head_dim` is given."""

    def out(self, model: config.Model) -> dict[str, Any]:
        """See `Setting`."""
        return {}

    def back(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """See `Setting`."""
        width, heads = hf["hidden_size"], hf["num_attention_heads"]
        if width % heads:
            raise ValueError(f"hidden_size = {width} is no multiple of num_attention_heads = {heads}")
        return {}


DENSE: tuple[Setting, ...] = (
    *sizes(
        vocab_size="vocab_size",
        hidden_size="d_model",
        num_hidden_layers="n_layers",
        num_attention_heads="n_heads",
        intermediate_size="d_ff",
    ),
    KV_HEADS,
    Key("initializer_range", "init_std", 0.02),
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
        Multiple(),
        Key("rms_norm_eps", "norm_eps", 1e-6),
        Key("max_position_embeddings", "max_seq_len", 2048),
        Key("tie_word_embeddings", "tie_embeddings", False),
        Rope(),
        Biases("attention_bias", ("qkv", "attention_out")),
        Biases("mlp_bias", ("mlp",)),
        Says("attention_dropout", 0.0),
        Always("pattern", ["attention+mlp"]),
    ),
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)

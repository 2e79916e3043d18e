"""The layout of Hugging Face's LlamaForCausalLM: its rows, and its config.json.

Rotary pairs are (i, i + H/2) there, so the heads of an interleaved model are reordered on the way out. Dropout is not
part of the layout: it plays no role in what the weights compute.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm import config, config_file
from jaxlm.convert.rows import Row, flat, matrix, pairs_to_halves
from jaxlm.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Constants that old files carry; transformers ignores them too."""

# What a key of [model] must be, for the layout has nothing else.
ONLY = {
    "norm": "rmsnorm",
    "norm_position": "pre",
    "final_norm": True,
    "qk_norm": False,
    "positions": "rope",
    "activation": "swiglu",
    "rotary_fraction": 1.0,
    "rope_scaling": config.RopeScaling(),
    "window": 0,
    "sink_logits": False,
    "sink_tokens": 0,
    "softcap": 0.0,
}


def rows(cfg: config.Model) -> list[Row]:
    """The rows of a model; those of parameters that it does not have are left out by `rows.expand`."""
    turn = (pairs_to_halves,) if cfg.rope_layout == "interleaved" else ()
    ours, theirs = "layers.{i}", "model.layers.{i}"
    return [
        Row("embed.embedding", EMBEDDING),
        Row(f"{ours}.mixer_norm.scale", f"{theirs}.input_layernorm.weight"),
        Row(f"{ours}.mixer.q_proj.kernel", f"{theirs}.self_attn.q_proj.weight", *turn, matrix),
        Row(f"{ours}.mixer.k_proj.kernel", f"{theirs}.self_attn.k_proj.weight", *turn, matrix),
        Row(f"{ours}.mixer.v_proj.kernel", f"{theirs}.self_attn.v_proj.weight", matrix),
        Row(f"{ours}.mixer.o_proj.kernel", f"{theirs}.self_attn.o_proj.weight", matrix),
        Row(f"{ours}.mixer.q_proj.bias", f"{theirs}.self_attn.q_proj.bias", *turn, flat),
        Row(f"{ours}.mixer.k_proj.bias", f"{theirs}.self_attn.k_proj.bias", *turn, flat),
        Row(f"{ours}.mixer.v_proj.bias", f"{theirs}.self_attn.v_proj.bias", flat),
        Row(f"{ours}.mixer.o_proj.bias", f"{theirs}.self_attn.o_proj.bias"),
        Row(f"{ours}.ffn_norm.scale", f"{theirs}.post_attention_layernorm.weight"),
        Row(f"{ours}.ffn.gate_proj.kernel", f"{theirs}.mlp.gate_proj.weight", matrix),
        Row(f"{ours}.ffn.up_proj.kernel", f"{theirs}.mlp.up_proj.weight", matrix),
        Row(f"{ours}.ffn.down_proj.kernel", f"{theirs}.mlp.down_proj.weight", matrix),
        Row(f"{ours}.ffn.gate_proj.bias", f"{theirs}.mlp.gate_proj.bias"),
        Row(f"{ours}.ffn.up_proj.bias", f"{theirs}.mlp.up_proj.bias"),
        Row(f"{ours}.ffn.down_proj.bias", f"{theirs}.mlp.down_proj.bias"),
        Row("final_norm.scale", "model.norm.weight"),
        Row("head.kernel", HEAD, matrix),
    ]


def extras(tensors: Mapping[str, np.ndarray], cfg: config.Model) -> set[str]:
    """Stored tensors that say nothing: the constants of old files, and a second copy of the embedding of a tied model.

    Raises:
        UserError: a tied model has a head that is not the embedding.
    """
    found = {name for name in tensors if IGNORED.fullmatch(name)}
    if cfg.tie_embeddings and {HEAD, EMBEDDING} <= tensors.keys():
        if not np.array_equal(tensors[HEAD], tensors[EMBEDDING]):
            raise UserError(f"{HEAD} differs from {EMBEDDING}", "config.json says tie_word_embeddings: which is right?")
        found.add(HEAD)
    return found


def config_to_hf(cfg: config.Model, *, dtype: str, eos: int | None = None, pad: int | None = None) -> dict[str, Any]:
    """The config.json of a model, which transformers 4 and 5 read.

    Args:
        dtype: of the stored tensors, e.g. `bfloat16`.
        eos: id of end of text.
        pad: id of padding.

    Raises:
        UserError: a key of `[model]` says what the layout cannot express.
    """
    for key, value in ONLY.items():
        if getattr(cfg, key) != value:
            hint = "--to torch takes every model"
            if dataclasses.is_dataclass(value):
                _refuse(f"[model.{key}]", hint)
            _refuse(f"model.{key} = {getattr(cfg, key)!r}", f"it knows only {value!r}; {hint}")
    if set(cfg.pattern) != {"attention+mlp"}:
        _refuse(f"model.pattern = {list(cfg.pattern)}", 'it knows only ["attention+mlp"]')
    if "head" in cfg.biases:
        _refuse("'head' in model.biases", "its head has no bias")
    if ("qkv" in cfg.biases) != ("attention_out" in cfg.biases):
        _refuse(f"model.biases = {list(cfg.biases)}", "'qkv' and 'attention_out' come together or not at all")
    if cfg.d_model % cfg.n_heads:
        _refuse(
            f"model.n_heads = {cfg.n_heads} with model.d_model = {cfg.d_model}",
            "transformers wants a multiple even when head_dim is given",
        )
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_seq_len,
        "initializer_range": cfg.init_std,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},  # transformers 5
        "attention_bias": "qkv" in cfg.biases,
        "attention_dropout": 0.0,
        "mlp_bias": "mlp" in cfg.biases,
        "tie_word_embeddings": cfg.tie_embeddings,
        "bos_token_id": None,  # no token stands before a text: documents are separated by end of text
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": dtype,  # transformers 4
        "dtype": dtype,  # transformers 5
    }
    # Only a note for the way back, where it makes the round trip exact; transformers keeps and ignores it.
    return hf | ({"jaxlm_rope_layout": cfg.rope_layout} if cfg.rope_layout != "half" else {})


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> config.Model:
    """`[model]` of a config.json. Keys that are absent have the defaults of transformers' LlamaConfig.

    Raises:
        UserError: a size is missing, or a key says what jaxlm cannot express.
    """
    if missing := [key for key in _SIZES if key not in hf]:
        raise UserError(f"{where}: {missing[0]} is missing", "is this the config.json of a Llama model?")
    rope, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise UserError(f"{where}: rope_parameters and rope_scaling are objects or null")
    kinds = {
        "hidden_act": (hf.get("hidden_act", "silu"), ("silu", "swish")),
        "rope_parameters": (rope.get("rope_type", "default"), ("default",)),
        "rope_scaling": (scaling.get("rope_type", scaling.get("type", "default")), ("default",)),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)), (1.0,)),
        "quantization_config": (hf.get("quantization_config"), (None,)),
    }
    for key, (value, allowed) in kinds.items():
        if value not in allowed:
            raise UserError(f"{where}: {key} = {value!r} is something that jaxlm cannot express yet")
    model: dict[str, Any] = {ours: hf[theirs] for theirs, ours in _SIZES.items()}
    model |= {ours: hf[theirs] for theirs, ours in _OPTIONAL.items() if hf.get(theirs) is not None}
    model |= {
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "max_seq_len": hf.get("max_position_embeddings", 2048),
        "rope_theta": rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
        "rope_layout": hf.get("jaxlm_rope_layout", "half"),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "biases": ["qkv", "attention_out"] * bool(hf.get("attention_bias")) + ["mlp"] * bool(hf.get("mlp_bias")),
    }
    return config_file.from_dict({"model": model}, where).model


_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
}
_OPTIONAL = {"num_key_value_heads": "n_kv_heads", "head_dim": "head_dim", "initializer_range": "init_std"}


def _refuse(what: str, hint: str) -> None:
    raise UserError(f"the llama layout has no place for {what}", hint)

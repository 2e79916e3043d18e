"""Rows and settings that the families with experts share: which layers have experts, how many, and their windows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxlm import config
from jaxlm.convert.families.windows import windows
from jaxlm.convert.family import sizes
from jaxlm.convert.rows import Row, each, matrix
from jaxlm.convert.settings import REQUIRED, Hf, Setting, key, refusal, says, shortest_pattern


def expert_rows(theirs: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> list[Row]:
    """The experts, a tensor for each, by their names within `theirs`."""
    return [
        Row(f"layers.{{i}}.ffn.experts.{ours}.kernel", f"{theirs}.experts.{{e}}.{name}.weight", matrix, each)
        for ours, name in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
    ]


def of_experts(model: config.Model) -> config.Model:
    """`[model]` as the experts of its first block with experts see it."""
    halves = map(model.halves, model.pattern)
    return next((half.ffn for half in halves if half.ffn_name == "moe"), model)


routed = functools.partial(key, of=of_experts)
"""A `key` of the experts, which a block may have set for itself."""


def width(theirs: str, ours: str, default: Any = REQUIRED) -> Setting:
    """The width of one expert: `moe.d_ff`, or `d_ff` in its place."""

    def out(model: config.Model) -> dict[str, Any]:
        experts = of_experts(model)
        return {theirs: experts.moe.d_ff or experts.d_ff}

    return key(theirs, ours, default)._replace(out=out)


class PerLayer(NamedTuple):
    """Something that each layer has, in the keys of config.json."""

    out: Callable[[Sequence[Any]], dict[str, Any]]
    back: Callable[[Hf], Sequence[Any]]


def pattern(windows_of: PerLayer, ffns_of: PerLayer) -> Setting:
    """The pattern of attention blocks, from the window (0: none) and the kind of feed-forward of each layer."""

    def out(model: config.Model) -> dict[str, Any]:
        ffns = [model.halves(kind).ffn_name for kind in model.pattern] * model.repeats
        return windows_of.out(windows(model)) | ffns_of.out(ffns)

    def back(hf: Hf) -> dict[str, Any]:
        sizes, ffns = windows_of.back(hf), ffns_of.back(hf)
        if len(set(sizes)) == 1:
            return {"pattern": shortest_pattern([f"attention+{ffn}" for ffn in ffns]), "window": sizes[0]}
        mixers = [f"attention(window={size})" if size else "attention" for size in sizes]
        blocks = [f"{mixer}+{ffn}" for mixer, ffn in zip(mixers, ffns, strict=True)]
        return {"pattern": shortest_pattern(blocks)}

    return Setting(out, back, "layer_types")


def _window(hf: Hf, default: int | None = None) -> int:
    window = hf.get("sliding_window", default)
    if window is not None and (type(window) is not int or window < 1):
        raise refusal("sliding_window", window)
    return window or 0


ONE_WINDOW = PerLayer(
    lambda sizes: {"sliding_window": sizes[0] or None},
    lambda hf: [_window(hf)] * hf["num_hidden_layers"],
)
"""`sliding_window` of all layers, or null."""

SWITCHED_WINDOW = PerLayer(
    lambda sizes: {"use_sliding_window": sizes[0] > 0, "sliding_window": sizes[0] or None},
    lambda hf: [_window(hf, 4096) * bool(hf.get("use_sliding_window"))] * hf["num_hidden_layers"],
)
"""The same, but it only counts with `use_sliding_window`."""


def layer_types(default: Callable[[Hf], list[str]], window: int) -> PerLayer:
    """`sliding_window` of the layers whose entry in `layer_types` says so.

    Args:
        default: the entries where config.json has none.
        window: the width where config.json has none.
    """

    def out(sizes: Sequence[int]) -> dict[str, Any]:
        types = ["sliding_attention" if size else "full_attention" for size in sizes]
        return {"sliding_window": max(sizes) or None, "layer_types": types}

    def back(hf: Hf) -> list[int]:
        types, count = hf.get("layer_types") or default(hf), hf["num_hidden_layers"]
        if len(types) != count:
            raise ValueError(f"layer_types has {len(types)} entries for num_hidden_layers = {count}")
        if unknown := sorted(set(types) - {"sliding_attention", "full_attention"}):
            raise refusal("layer_types", unknown[0])
        width = _window(hf, window)
        if not width and "sliding_attention" in types:
            raise ValueError("layer_types has sliding_attention, but sliding_window is null")
        return [width if one == "sliding_attention" else 0 for one in types]

    return PerLayer(out, back)


ALL_EXPERTS = PerLayer(lambda ffns: {}, lambda hf: ["moe"] * hf["num_hidden_layers"])
"""Every layer has experts."""


def _every(step: int, count: int) -> list[str]:
    return ["mlp" if (i + 1) % step else "moe" for i in range(count)]


def _sparse_out(ffns: Sequence[str]) -> dict[str, Any]:
    step = next((step for step in range(1, len(ffns) + 1) if _every(step, len(ffns)) == ffns), 1)
    return {
        "decoder_sparse_step": step,
        "mlp_only_layers": [i for i, kind in enumerate(_every(step, len(ffns))) if kind == "moe" != ffns[i]],
    }


def _sparse_back(hf: Hf) -> list[str]:
    ffns = _every(hf.get("decoder_sparse_step") or 1, hf["num_hidden_layers"])
    return ["mlp" if i in (hf.get("mlp_only_layers") or ()) else kind for i, kind in enumerate(ffns)]


SPARSE_STEP = PerLayer(_sparse_out, _sparse_back)
"""Every `decoder_sparse_step`-th layer, without those of `mlp_only_layers`."""

FIRST_DENSE = PerLayer(
    lambda ffns: {"first_k_dense_replace": [*ffns, "moe"].index("moe")},
    lambda hf: ["mlp" if i < (hf.get("first_k_dense_replace") or 0) else "moe" for i in range(hf["num_hidden_layers"])],
)
"""All but the first `first_k_dense_replace`."""


def decoder_settings(*, kv_heads: int, max_seq_len: int, norm_eps: float) -> tuple[Setting, ...]:
    """Settings of all families with experts, with their defaults in transformers."""

    def heads(hf: Hf) -> int:
        return hf["num_attention_heads"] if "num_key_value_heads" in hf else kv_heads

    return (
        *sizes(vocab_size="vocab_size", hidden_size="d_model", num_hidden_layers="n_layers"),
        *sizes(num_attention_heads="n_heads"),
        key("num_key_value_heads", "n_kv_heads", heads),
        key("rms_norm_eps", "norm_eps", norm_eps),
        key("max_position_embeddings", "max_seq_len", max_seq_len),
        key("tie_word_embeddings", "tie_embeddings", False),
        key("initializer_range", "init_std", 0.02),
        says("attention_dropout", 0.0),
        # Their balancing loss is one over all layers and counts every choice of a token, ours is one for each layer.
        says("router_aux_loss_coef", 0.001),
        says("output_router_logits", False),
    )

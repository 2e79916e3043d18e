"""The usual culprits: what implementations of one architecture do differently, each as a change of a model.

A row of `CULPRITS` makes its tries for a given model, none where it does not apply. A try says in words what the other
implementation does, and gives the variant that does it too. Sources: `docs/parity.md`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxlm import config
from jaxlm.config.pattern import parse_block
from jaxlm.parity.diagnose import torch_patches
from jaxlm.parity.diagnose.ffn_hypotheses import activation, experts, mamba
from jaxlm.parity.diagnose.hypothesis import Try, attends, mixes, patching, rotates, shown, values, zeroed
from jaxlm.parity.diagnose.variant import Variant, blocks_with, rendered


class Culprit(NamedTuple):
    """A kind of difference."""

    name: str
    tries: Callable[[Variant], Iterator[Try]]


THETAS = (1e4, 1e5, 1.5e5, 2.5e5, 5e5, 1e6, 5e6, 1e7)
EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)
ROTARY_FRACTIONS = (1.0, 0.75, 0.5, 0.25)
SCALINGS: tuple[dict[str, Any], ...] = (
    *({"kind": kind, "factor": factor} for kind in ("linear", "ntk") for factor in (2.0, 4.0, 8.0)),
    *({"kind": "llama3", "factor": factor, "original_max_seq_len": 8192} for factor in (8.0, 32.0)),  # Llama 3.1, 3.2
    {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 32768},  # Qwen2.5 and Qwen3
    {"kind": "yarn", "factor": 32.0, "original_max_seq_len": 4096, "truncate": False},  # gpt-oss
)


def explain_config(theirs: config.Model) -> Culprit:
    """Every option in which the other side's own config differs from ours, one at a time, and all of them together."""

    def tries(v: Variant) -> Iterator[Try]:
        unlike = []
        for field in dataclasses.fields(config.Model):
            ours, other = getattr(v.model, field.name), getattr(theirs, field.name)
            if ours == other or field.name in IRRELEVANT:
                continue
            if dataclasses.is_dataclass(other):
                ours, other = (
                    {key: x for key, x in dataclasses.asdict(a).items() if x != getattr(b, key)}  # pyright: ignore
                    for a, b in ((ours, other), (other, ours))
                )
            what = f"{field.name} is {shown(other)} instead of {shown(ours)}, as its config says"
            unlike.append((field.name, getattr(theirs, field.name)))
            yield what, functools.partial(_replaced, v, dict(unlike[-1:]))
        if len(unlike) > 1:
            what = f"{' and '.join(name for name, _ in unlike)} are those of its config"
            yield what, functools.partial(_replaced, v, dict(unlike))

    return Culprit("its config", tries)


IRRELEVANT = ("dropout", "init_std", "attention_impl", "layer_loop", "remat", "vocab_size")
"""Options that change no output, or that both sides must share."""


def _replaced(v: Variant, options: dict[str, Any]) -> Variant:
    return dataclasses.replace(v, model=dataclasses.replace(v.model, **options))


# Rotary positions


def rope_layout(v: Variant) -> Iterator[Try]:
    if rotates(v):
        other = "interleaved" if v.model.rope_layout == "half" else "half"
        pairs = {"half": "(i, i + H/2)", "interleaved": "(2i, 2i + 1)"}
        what = f"rotary pairs are {pairs[other]} instead of {pairs[v.model.rope_layout]} (rope_layout = {other!r})"
        yield what, lambda: v.with_options(rope_layout=other)


def rope_theta(v: Variant) -> Iterator[Try]:
    if rotates(v):
        yield from values(v, "rope_theta", THETAS)
        # A base that other blocks of this model have is a likely mistake: the two were exchanged.
        own = {rope.theta for rope in v.model.ropes}
        if len(own) > 1:
            for theta in own - {v.model.rope_theta, *THETAS}:
                yield from values(v, "rope_theta", (theta,))


def rope_scaling(v: Variant) -> Iterator[Try]:
    if not rotates(v):
        return
    ours = v.model.resolved_scaling
    make = lambda options: lambda: v.with_options(rope_scaling=config.RopeScaling(**options))  # noqa: E731
    if ours.kind == "none":
        for options in SCALINGS:
            yield f"rotary frequencies are scaled: {_options(options)}", make(options)
        return
    # From likely to unlikely: the scaling was forgotten, one of its keys was, another kind was taken, another factor.
    own = dataclasses.asdict(ours)
    yield f"rope_scaling is missing: frequencies are not scaled by {ours.kind}", make({})
    if ours.kind == "yarn":
        yield "the attention temperature of YaRN is missing", make({**own, "attention_factor": 1.0})
        without = f"truncate = {shown(not ours.truncate)}"
        yield f"the ends of YaRN's ramp are rounded otherwise: {without}", make({**own, "truncate": not ours.truncate})
    for kind in ("linear", "ntk", "llama3", "yarn"):
        if kind != ours.kind:
            yield f"rope_scaling.kind is {kind} instead of {ours.kind}", make({**own, "kind": kind})
    plain = config.RopeScaling()
    for key in ("low_freq_factor", "high_freq_factor", "beta_slow", "beta_fast", "attention_factor"):
        if own[key] != getattr(plain, key):
            what = f"rope_scaling.{key} is the usual {shown(getattr(plain, key))} instead of {shown(own[key])}"
            yield what, make({**own, key: getattr(plain, key)})
    for factor in (2.0, 4.0, 8.0, 16.0, 32.0):
        if factor != ours.factor:
            yield f"rope_scaling.factor is {factor:g} instead of {ours.factor:g}", make({**own, "factor": factor})


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {shown(value)}" for key, value in options.items())


def rope_part(v: Variant) -> Iterator[Try]:
    if not rotates(v):
        return
    yield "queries and keys are not rotated", lambda: v.with_options(positions="none")
    yield patching(v, "the rotation goes in the other direction", torch_patches.other_direction)
    yield from values(v, "rotary_fraction", ROTARY_FRACTIONS)
    for dtype in ("float32", "bfloat16"):
        yield patching(v, f"rotary frequencies are rounded to {dtype}", torch_patches.frequencies_in(dtype))
        yield patching(v, f"rotary angles are computed in {dtype}", torch_patches.tables_in(dtype))
        both = torch_patches.frequencies_in(dtype), torch_patches.tables_in(dtype)
        yield patching(v, f"rotary frequencies and angles are computed in {dtype}", *both)


# Positions and documents


def positions(v: Variant) -> Iterator[Try]:
    if v.model.positions == "none" and not v.model.ropes:
        return
    places, real = v.rows["positions"], v.rows["segments"] != 0
    for step in (1, 2, -1):
        what = f"positions are off by {'one' if abs(step) == 1 else 'two'}: they begin at {max(step, 0)}"
        what = what if step > 0 else "positions are off by one: the second token is at 0"
        yield what, lambda step=step: v.with_rows(positions=np.maximum(places + step, 0))
    yield "positions do not restart at each document", lambda: v.with_rows(positions=_running(places))
    # Positions as transformers makes them of an attention mask: real tokens are counted, wherever they stand.
    counted = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    yield "positions do not restart at each document, padding not counted", lambda: v.with_rows(positions=counted)
    if v.model.positions == "learned":
        yield from zeroed(v, "learned positions are not added", "position_embed.weight")


def _running(places: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(places.shape[1]), places.shape)


def documents(v: Variant) -> Iterator[Try]:
    places, one = v.rows["positions"], (v.rows["segments"] != 0).astype(np.int32)
    if v.rows["segments"].max() > 1:
        joined = functools.partial(v.with_rows, segments=one)
        yield "the document mask is missing", joined
        indexed = lambda: joined().with_patch(torch_patches.documents_joined)  # noqa: E731
        yield "the document mask is missing, and order is that of the row", indexed
        yield "the document mask is missing, and positions do not restart", lambda: joined(positions=_running(places))
        if attends(v):
            yield patching(v, "the document mask is missing in attention", torch_patches.documents_joined)
        if mixes(v, "mamba", "mamba2"):
            # A state space has two memories, the scan and the convolution; an implementation may reset one and forget
            # the other.
            crossing = torch_patches.state_goes_on, torch_patches.convolution_goes_on
            yield patching(v, "state and convolution of Mamba run on into the next document", *crossing)
            yield patching(v, "the state of Mamba runs on into the next document", crossing[0])
            yield patching(v, "the convolution of Mamba reads the document before", crossing[1])
    if not one.all():
        ones = np.ones_like(one)
        what = "neither padding nor documents are masked: a row is one text"
        yield what, lambda: v.with_rows(segments=ones, positions=_running(places))
        yield "padding is not masked", lambda: v.with_rows(segments=np.where(one, v.rows["segments"], 1))
    if attends(v):
        yield patching(v, "the causal mask is missing", torch_patches.no_causal_mask)


# Norms


def eps(v: Variant) -> Iterator[Try]:
    yield from values(v, "norm_eps", EPSILONS)
    outside = torch_patches.rms_eps_outside, torch_patches.layer_eps_outside
    yield patching(v, "eps is added to the root instead of under it", *outside)


def norm_scale(v: Variant) -> Iterator[Try]:
    scales = {1.0: "norms multiply by (1 + w) instead of w", -1.0: "norms multiply by w instead of (1 + w)"}
    for add, what in scales.items():
        for where, left in (("", ()), (", those of queries and keys excepted", ("q_norm.weight", "k_norm.weight"))):
            if not left or any(name.endswith(left) for name in v.tensors):
                change = functools.partial(_plus, add, left)
                yield what + where, lambda change=change: v.with_tensors(change)
    yield from zeroed(v, "the scales of norms are left out", "norm.weight", fill=1.0)


def _plus(add: float, left: tuple[str, ...], name: str, x: np.ndarray) -> np.ndarray | None:
    return np.asarray(x, np.float64) + add if name.endswith("norm.weight") and not name.endswith(left or "\n") else None


def norm_kind(v: Variant) -> Iterator[Try]:
    if v.model.norm == "layernorm":
        yield patching(v, "LayerNorm does not subtract the mean: it is RMSNorm", torch_patches.not_centred)
        yield "LayerNorm is RMSNorm without mean and bias", lambda: v.with_options(norm="rmsnorm")
        yield patching(v, "the variance of LayerNorm is divided by D - 1 instead of D", torch_patches.unbiased)
        yield from zeroed(v, "the biases of LayerNorm are left out", "norm.bias")
    else:
        yield "RMSNorm subtracts the mean: it is LayerNorm", lambda: v.with_options(norm="layernorm")
    other = "post" if v.model.norm_position == "pre" else "pre"
    yield from values(v, "norm_position", (other,))
    if v.model.final_norm:
        yield "the final norm is missing", lambda: v.with_options(final_norm=False)


# Embedding and head


def embedding(v: Variant) -> Iterator[Try]:
    root = v.model.d_model**0.5
    table = np.asarray(v.tensors["embed.weight"], np.float64)
    head = np.asarray(v.tensors.get("head.weight", v.tensors["embed.weight"]), np.float64)
    # With a tied table the two factors could not differ, so it is untied first: the same function with two tensors.
    untied = v.with_options(tie_embeddings=False) if v.model.tie_embeddings else v

    def scaled(embed: float = 1.0, unembed: float = 1.0) -> Variant:
        return dataclasses.replace(
            untied, tensors={**v.tensors, "embed.weight": table * embed, "head.weight": head * unembed}
        )

    yield "embeddings are multiplied by sqrt(D)", lambda: scaled(root)
    yield "embeddings are not multiplied by sqrt(D), or divided by it", lambda: scaled(1 / root)
    yield "logits are divided by sqrt(D)", lambda: scaled(1.0, 1 / root)
    if not v.model.tie_embeddings:
        tied = tuple(name for name in v.model.biases if name != "head")
        yield (
            "the head is the embedding: tied, where ours has its own",
            lambda: v.with_options(tie_embeddings=True, biases=tied),
        )


# Attention


def windows(v: Variant) -> Iterator[Try]:
    blocks = [
        halves.mixer.window if halves.mixer_name == "attention" else 0
        for halves in map(v.model.halves, v.model.pattern)
    ]
    if not any(blocks):
        return
    yield "the sliding window is missing", lambda: v.with_options(window=0, keep_first=0)
    for step, what in ((1, "longer"), (-1, "shorter")):
        yield f"the sliding window is one token {what}", lambda step=step: _windows(v, [w and w + step for w in blocks])
    size = max(blocks)
    if not all(blocks):
        yield "all layers have the sliding window", lambda: v.with_options(window=size)
    for shift in range(1, len(blocks)):
        if blocks[shift:] + blocks[:shift] != blocks:
            yield "other layers have the sliding window", lambda s=shift: _windows(v, blocks[s:] + blocks[:s])
    if len(set(blocks)) == 1 and v.model.n_layers % 2 == 0 and len(blocks) == 1:
        for name, pair in (("first, third, ...", [size, 0]), ("second, fourth, ...", [0, size])):
            yield f"only the {name} layers have the sliding window", lambda pair=pair: _windows(v, pair)


def _windows(v: Variant, sizes: list[int]) -> Variant:
    """The pattern with these windows, one for each of its blocks; a pattern of one block is written out."""
    # Where the layers of one block differ, the pattern must be written out before each can have its window.
    kinds = v.model.pattern * (len(sizes) // len(v.model.pattern))
    attends = [parse_block(kind).mixer == "attention" for kind in kinds]
    pattern = [
        rendered(kind, {"window": size}, add=True) if attends[i] else kind
        for i, (kind, size) in enumerate(zip(kinds, sizes, strict=True))
    ]
    return dataclasses.replace(v, model=dataclasses.replace(v.model, pattern=tuple(pattern), window=0))


def sinks(v: Variant) -> Iterator[Try]:
    blocks = list(blocks_with(v.model, "attention"))
    if any(block.sink_logits for block in blocks):
        yield "the sinks are missing", lambda: v.with_options(sink_logits=False)
    if any(block.sink_tokens for block in blocks):
        yield "the sink tokens are missing", lambda: v.with_options(sink_tokens=0)
    if any(block.keep_first for block in blocks):
        yield "the first tokens do not stay visible", lambda: v.with_options(keep_first=0)
    if any(block.softcap for block in blocks):
        yield "the soft cap of attention is missing", lambda: v.with_options(softcap=0.0)
    elif blocks:
        for cap in (30.0, 50.0):
            yield f"attention logits are soft-capped at {cap:g}", lambda cap=cap: v.with_options(softcap=cap)


def scale(v: Variant) -> Iterator[Try]:
    block = next(blocks_with(v.model, "attention"), None)
    if block is None:
        return
    h, wide = block.head_dim, v.model.d_model / block.n_heads
    yield patching(v, "attention scores are not divided by sqrt(H)", torch_patches.scaled_scores(h**0.5))
    yield patching(v, "attention scores are divided by sqrt(H) twice", torch_patches.scaled_scores(h**-0.5))
    yield patching(
        v,
        "attention scores are divided by sqrt(D) instead of sqrt(H)",
        torch_patches.scaled_scores((h / v.model.d_model) ** 0.5),
    )
    if wide != h:
        what = "attention scores are divided by sqrt(D / N) instead of sqrt(H)"
        yield patching(v, what, torch_patches.scaled_scores((h / wide) ** 0.5))


def heads(v: Variant) -> Iterator[Try]:
    blocks = list(blocks_with(v.model, "attention"))
    if any(1 < block.n_kv_heads < block.n_heads for block in blocks):
        yield patching(
            v, "query n reads kv head n mod K instead of n K / N: kv heads are tiled", torch_patches.tiled_heads
        )
    if any(block.qk_norm for block in blocks):
        yield "QK-norm is missing", lambda: v.with_options(qk_norm=False)
        if rotates(v):
            yield patching(v, "QK-norm comes after the rotation", torch_patches.norm_after_rotation)
    elif blocks:
        yield "queries and keys are normalised", lambda: v.with_options(qk_norm=True)


def biases(v: Variant) -> Iterator[Try]:
    names = {
        "of queries, keys and values": ("q_proj.bias", "k_proj.bias", "v_proj.bias"),
        "of attention's output": ("o_proj.bias",),
        "of the feed-forward": ("up_proj.bias", "gate_proj.bias", "down_proj.bias"),
        "of the router": ("router.bias",),
        "of the head": ("head.bias",),
        "of the convolution": ("conv.bias",),
        "of Mamba's projections": ("in_proj.bias", "out_proj.bias"),
    }
    for where, endings in names.items():
        yield from zeroed(v, f"the biases {where} are left out", *endings)


# Precision


def precision(v: Variant) -> Iterator[Try]:
    for dtype in ("bfloat16", "float16", "float32"):
        change = lambda name, x, dtype=dtype: torch_patches.rounded(x, dtype)  # noqa: E731
        yield f"weights are rounded to {dtype}", lambda change=change: v.with_tensors(change)
    for dtype in ("bfloat16", "float32"):
        yield f"it computes in {dtype}", lambda dtype=dtype: dataclasses.replace(v, dtype=dtype)


CULPRITS: tuple[Culprit, ...] = (
    Culprit("RoPE layout", rope_layout),
    Culprit("RoPE theta", rope_theta),
    Culprit("RoPE scaling", rope_scaling),
    Culprit("rotated part, direction and precision", rope_part),
    Culprit("eps", eps),
    Culprit("norm scale", norm_scale),
    Culprit("kind and place of norms", norm_kind),
    Culprit("activation", activation),
    Culprit("documents and masks", documents),
    Culprit("positions", positions),
    Culprit("window", windows),
    Culprit("sinks and soft cap", sinks),
    Culprit("attention scale", scale),
    Culprit("heads and QK-norm", heads),
    Culprit("biases", biases),
    Culprit("embedding and head", embedding),
    Culprit("experts", experts),
    Culprit("Mamba", mamba),
    Culprit("precision", precision),
)
"""In the order in which they are tried; where several fit equally, the first is named."""

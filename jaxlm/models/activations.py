"""The activations of a training step on one device, estimated from the config: what the backward pass waits for, and
what one block needs while it is at work.

An element that is split by `tensor` counts by its part; the residual stream is whole. Softmax, norms and the scan's
state are float32 or wider, all else has the compute dtype.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.numerics import Policy


class Activations(NamedTuple):
    """Bytes of one device."""

    kept: int
    """What the forward pass leaves for the backward pass, of all blocks and one microbatch."""
    working: int
    """What one block needs besides while its gradient is computed, and the logits of one block of tokens."""


class Elements(NamedTuple):
    """Elements that one token leaves behind in one block: in the residual stream, and split by `tensor`."""

    stream: int | float
    inner: int | float

    def bytes(self, tensor: int, width: int) -> float:
        """Those of one device."""
        return (self.stream + self.inner / tensor) * width


def activations(cfg: config.Config, layout: Layout) -> Activations:
    """Estimate for one device of `layout`."""
    model, train, policy = cfg.model, cfg.train, Policy.from_config(cfg.numerics)
    split = layout.parts("batch") * layout.parts("seq")
    tokens = train.batch_size * cfg.data.seq_len // train.microbatches // split
    tensor, width = layout.parts("mlp"), policy.compute.itemsize
    kept = model.repeats * sum(kept_by(model, kind).bytes(tensor, width) for kind in model.pattern)
    whole = dataclasses.replace(model, remat="none")
    block = max(kept_by(whole, kind).bytes(tensor, width) for kind in model.pattern)
    block *= 1 if model.remat == "none" else 2  # its gradient, and itself where it is computed again
    logits = 2 * min(train.loss_block, tokens) * model.vocab_size // layout.parts("vocab") * max(4, width)
    hidden = 3 * tokens * model.d_model * width
    return Activations(int(tokens * kept), int(tokens * block + logits + hidden))


def kept_by(model: config.Model, kind: str) -> Elements:
    """What one block leaves behind, by the remat policy."""
    halves = model.halves(kind)
    mixer, ffn = _MIXERS[halves.mixer_name](halves.mixer), halves.ffn
    if model.remat == "full":
        return Elements(model.d_model, 0)
    stream = 4 * model.d_model if halves.ffn_name else 2 * model.d_model  # both norms and both residuals
    if model.remat == "dots":  # what projections put out, and the block's input
        stream //= 2
    return Elements(stream, mixer + (_ffn(ffn, halves.ffn_name) if halves.ffn_name else 0))


def _attention(model: config.Model) -> int | float:
    """Queries and keys, values, what is mixed, and the log-sum-exp of each head."""
    return (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim + 2 * model.n_heads


def _mamba(model: config.Model) -> int | float:
    """x and the gate, x convolved and activated, step size, output, gated output; one state a chunk; B and C."""
    part, channels = model.mamba, model.mamba.expand * model.d_model
    state = part.d_state or 16
    return channels * (7 + state / part.chunk) + 2 * state + (part.dt_rank or -(-model.d_model // 16))


def _mamba2(model: config.Model) -> int | float:
    """The same, with B and C convolved, and for each head the decays of a chunk."""
    part, channels = model.mamba, model.mamba.expand * model.d_model
    state = part.d_state or 128
    heads = channels // part.head_dim
    return channels * (6 + state / part.chunk) + 6 * part.n_groups * state + 2 * heads * part.chunk


_MIXERS = {"attention": _attention, "mamba": _mamba, "mamba2": _mamba2}


def _ffn(model: config.Model, name: str) -> int | float:
    """What the second matrix product needs, and for experts the tokens as they are sent."""
    moe, wide = model.moe, 3 if model.gated else 2
    if name == "mlp":
        return wide * model.d_ff
    return (moe.top_k + moe.n_shared) * wide * (moe.d_ff or model.d_ff) + 2 * moe.top_k * model.d_model + moe.n_experts

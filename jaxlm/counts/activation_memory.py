"""The activations of a training step on one device, estimated from the config: what the backward pass waits for, and
what one block needs while it is at work.

An element that is split by `tensor` counts by its part; the residual stream is whole. What norms and the scan keep is
float32 or wider, all else has the compute dtype.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.numerics import Policy, wide


class Activations(NamedTuple):
    """Bytes of one device."""

    kept: int
    """What the forward pass leaves for the backward pass, of all blocks and one microbatch."""
    hidden: int
    """The last hidden states, and their gradient."""
    working: int
    """What is needed besides at the worst moment: a block whose gradient is computed, or logits of some tokens."""


class Elements(NamedTuple):
    """Elements that one token leaves behind in one block: in the residual stream, and split by `tensor`."""

    stream: int | float
    inner: int | float
    wide_stream: int | float = 0
    wide_inner: int | float = 0
    """Those that are float32 or wider."""

    def bytes(self, tensor: int, policy: Policy) -> float:
        """Those of one device."""
        narrow, broad = policy.compute.itemsize, wide(policy.compute).itemsize
        return (self.stream + self.inner / tensor) * narrow + (self.wide_stream + self.wide_inner / tensor) * broad


class Moving(NamedTuple):
    """Where parameters move, and so how far the gradient goes back. Adapters in a block move it."""

    blocks: bool = True
    """In blocks: every product keeps its input for the gradient of its matrix."""
    before: bool = True
    """Before them: the gradient passes through the blocks even if none of them moves."""


EVERYTHING = Moving()


def activations(cfg: config.Config, layout: Layout, blocks: int = 1, moving: Moving = EVERYTHING) -> Activations:
    """Estimate for one device of `layout`.

    Args:
        blocks: how many times the logits of some tokens stand side by side.
    """
    model, train, policy = cfg.model, cfg.train, Policy.from_config(cfg.numerics)
    split = layout.parts("batch") * layout.parts("seq")
    tokens = train.batch_size * cfg.data.seq_len // train.microbatches // split
    tensor = layout.parts("mlp")
    kept = model.repeats * sum(kept_by(model, kind, moving).bytes(tensor, policy) for kind in model.pattern)
    whole = dataclasses.replace(model, remat="none")
    block = max(kept_by(whole, kind, moving).bytes(tensor, policy) * _at_work(model, kind) for kind in model.pattern)
    logits = blocks * min(train.loss_block, tokens) * model.outputs // layout.parts("vocab")
    hidden = 3 * tokens * model.d_model * policy.compute.itemsize
    return Activations(int(tokens * kept), hidden, int(max(tokens * block, logits * wide(policy.compute).itemsize)))


def _at_work(model: config.Model, kind: str) -> int:
    """What a block needs while its gradient is computed, as a multiple of what it leaves.

    The gradients of a dense block computed again take the places of what they use up; experts and state spaces do not.
    """
    return 1 if model.remat == "none" or not ("mamba" in kind or "moe" in kind) else 2


def kept_by(model: config.Model, kind: str, moving: Moving = EVERYTHING) -> Elements:
    """What one block leaves behind, by the remat policy; inputs of products only where their matrices move.

    The inputs inside of experts and state spaces are counted as if these moved.
    """
    if not any(moving):
        return Elements(0, 0)
    halves = model.halves(kind)
    if model.remat == "full":
        return Elements(model.d_model, 0)
    parts = [_MIXERS[halves.mixer_name](halves.mixer)]
    parts += [_ffn(halves.ffn, halves.ffn_name)] if halves.ffn_name else []
    inner, wide_inner = (sum(part[i] for part in parts) for i in range(2))
    if model.remat == "dots":  # what projections put out, and the input of each half
        return Elements(len(parts) * model.d_model, inner)
    inputs = len(parts) * model.d_model if moving.blocks else 0
    inner -= model.d_ff if not moving.blocks and halves.ffn_name == "mlp" else 0  # the input of the last product
    return Elements(inputs, inner, 2 * len(parts) * model.d_model, wide_inner)  # norms keep two


Kept = tuple[int | float, int | float]
"""Elements of one token in half a block: of the compute dtype, and wider ones."""


def _attention(model: config.Model) -> Kept:
    """Queries, keys and values, what is mixed, as it comes and as it is projected; the log-sum-exp of each head."""
    return (3 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim, model.n_heads


def _mamba(model: config.Model) -> Kept:
    """x and the gate, x convolved and activated, the output; step sizes and the scan's; one state a chunk; B and C."""
    part, channels = model.mamba, model.mamba.expand * model.d_model
    state = part.d_state or 16
    return 5 * channels + (part.dt_rank or -(-model.d_model // 16)), channels * (3 + state / part.chunk) + 2 * state


def _mamba2(model: config.Model) -> Kept:
    """The same, with B and C convolved, and for each head the decays of a chunk."""
    part, channels = model.mamba, model.mamba.expand * model.d_model
    state = part.d_state or 128
    heads = channels // part.head_dim
    return 4 * channels + 6 * part.n_groups * state, channels * (2 + state / part.chunk) + 2 * heads * part.chunk


_MIXERS = {"attention": _attention, "mamba": _mamba, "mamba2": _mamba2}


def _ffn(model: config.Model, name: str) -> Kept:
    """What the products put out and what the activation keeps; for experts the tokens as they are sent, too."""
    moe, projected = model.moe, 3 if model.gated else 4
    if name == "mlp":
        return projected * model.d_ff, 0
    experts, width = moe.top_k + moe.n_shared, moe.d_ff or model.d_ff
    return experts * projected * width + moe.top_k * model.d_model, experts * width + moe.top_k * model.d_model

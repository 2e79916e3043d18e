"""Which implementation of an op runs: one table, by the platform that is compiled for and by what the call needs.

The platform is that of the devices of the mesh, which need not be here: `jaxlm.mesh.platform`.

Attention, in the order in which `auto` takes the first that applies:

    splash      tpu   aligned rows, bfloat16 or float32
    cudnn       gpu   aligned rows of even length, bfloat16 or float16, head dim a multiple of 8 up to 128,
                      no soft cap, no sinks
    blockwise   all   aligned rows
    xla         all   everything

Aligned: queries and keys are the same tokens in the same order. `splash` and `cudnn` give no log-sum-exp, so neither
mixes keys that are then merged with others. Under `auto`, rows shorter than `SHORT` stay with `xla`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

SHORT = 256
"""Least row that `auto` gives to another attention than `xla`."""


class Attention(NamedTuple):
    """What decides about the kernel of one call of attention."""

    platform: str
    """`cpu`, `gpu` or `tpu`."""
    dtype: Any
    """Of queries, keys and values."""
    length: int
    """Queries of a row."""
    head_dim: int
    aligned: bool
    softcap: bool = False
    sinks: bool = False
    """A logit of each head takes part in the softmax."""
    merged: bool = False
    """What is mixed is to be merged with other keys, which takes the log-sum-exp."""


def _splash(call: Attention) -> bool:
    return call.aligned and not call.merged and call.dtype in (jnp.bfloat16, jnp.float32)


def _cudnn(call: Attention) -> bool:
    plain = call.aligned and not (call.merged or call.sinks or call.softcap)
    shapes = call.head_dim % 8 == 0 and call.head_dim <= 128 and call.length % 2 == 0
    return plain and shapes and call.dtype in (jnp.bfloat16, jnp.float16)


class Kernel(NamedTuple):
    """Where an implementation runs, and for which calls."""

    platforms: tuple[str, ...]
    applies: Callable[[Attention], bool]


ALL = ("cpu", "gpu", "tpu")
ATTENTION: Mapping[str, Kernel] = {
    "splash": Kernel(("tpu",), _splash),
    "cudnn": Kernel(("gpu",), _cudnn),
    "blockwise": Kernel(ALL, lambda call: call.aligned),
    "xla": Kernel(ALL, lambda call: True),
}


def attention(asked: str, call: Attention) -> str:
    """The kernel of a call: the one asked for where it applies, else the next of the table that does.

    Raises:
        ValueError: there is no implementation of this name.
    """
    if asked != "auto" and asked not in ATTENTION:
        raise ValueError(f"unknown attention implementation {asked!r}")
    if asked == "auto" and call.length < SHORT:
        return "xla"
    names = list(ATTENTION)
    rest = [(name, ATTENTION[name]) for name in names[0 if asked == "auto" else names.index(asked) :]]
    return next(name for name, kernel in rest if call.platform in kernel.platforms and kernel.applies(call))


def experts(asked: str, platform: str, dtype: Any) -> str:
    """The implementation of a mixture of experts: the one asked for where it applies, else `auto`.

    TPUs have the kernel `megablox`. XLA's own `ragged_dot` takes the gradient of the kernels as if every row passed
    every expert, and on GPUs and CPUs all products, so there the rows are computed in `blocks` (docs/experts.md).
    """
    fits = platform == "tpu" and dtype in (jnp.bfloat16, jnp.float32)
    if asked == "auto" or (asked == "megablox" and not fits):
        return "megablox" if fits else "blocks"
    return asked

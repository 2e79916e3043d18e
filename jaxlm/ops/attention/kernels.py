"""The kernels of attention: one table, by the platform that is compiled for and by what the call needs.

`auto` gives rows shorter than `SHORT` to `xla`, and others to the first that applies:

    splash      tpu   aligned rows, bfloat16 or float32
    cudnn       gpu   aligned rows of even length, bfloat16 or float16, head dim a multiple of 8 up to 128,
                      no soft cap, no sinks
    blockwise   all   aligned rows
    xla         all   everything

Aligned: queries and keys are the same tokens in the same order. `splash` and `cudnn` give no log-sum-exp, so neither
mixes keys that are then merged with others. A kernel that is asked for by name and does not apply is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.errors import UserError
from jaxlm.ops.attention.blockwise import folded
from jaxlm.ops.attention.cudnn import cudnn
from jaxlm.ops.attention.visible import Form, Mixed, Places
from jaxlm.ops.attention.xla import xla
from jaxlm.ops.site import Site

SHORT = 256
"""Least row that `auto` gives to another kernel than `xla`."""
ALL = ("cpu", "gpu", "tpu")


class Call(NamedTuple):
    """What decides about the kernel of one call."""

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


Part = Callable[[Array, Array, Array, Places, Places, Form], Mixed]
Whole = Callable[[Array, Array, Array, Places, Places, Form, Array | None, Site], Array]


class Kernel(NamedTuple):
    """One way to compute attention, and the calls that it is for: a row of `KERNELS`. Its name is a
    value of `model.attention_impl`.

    A query of segment 0 gets zero, the output has `form.dtype`, and a gradient reaches queries, keys and values.
    """

    platforms: tuple[str, ...]
    """Where it runs: of `cpu`, `gpu` and `tpu`."""
    refuses: Callable[[Call], str]
    """Why a call cannot be computed, empty where it can. It also names `merged` calls, if the kernel has no `part`."""
    part: Part | None = None
    """A kernel has `part` or `whole`. `part(q, k, v, q_places, k_places, form)`, with its log-sum-exp."""
    whole: Whole | None = None
    """`whole(q, k, v, q_places, k_places, form, sink_logits_N, site)`, for kernels that give no log-sum-exp."""
    splits: bool = False
    """Whether the kernel divides its call over a mesh by itself."""
    rings: bool = False
    """Whether it computes the blocks of `ring`; others get all keys of a split row, which are more than the
    queries of a device."""

    def objection(self, call: Call) -> str:
        """Why the kernel is not for this call, empty where it is."""
        if call.platform not in self.platforms:
            return f"it runs on {' and '.join(self.platforms)}, not on {call.platform}"
        return self.refuses(call)


def _splash_refuses(call: Call) -> str:
    if not call.aligned:
        return "queries and keys are not the same tokens"
    if call.merged:
        return "it gives no log-sum-exp, which sink tokens and retained first tokens need"
    return "" if call.dtype in (jnp.bfloat16, jnp.float32) else "it computes in bfloat16 or float32"


def _cudnn_refuses(call: Call) -> str:
    if not call.aligned:
        return "queries and keys are not the same tokens"
    if call.merged or call.sinks or call.softcap:
        return "it has no sinks and no soft cap"
    if call.head_dim % 8 or call.head_dim > 128:
        return f"model.head_dim = {call.head_dim} is no multiple of 8 up to 128"
    if call.length % 2:
        return f"rows of {call.length} tokens are odd"
    return "" if call.dtype in (jnp.bfloat16, jnp.float16) else "it computes in bfloat16 or float16"


def _blockwise_refuses(call: Call) -> str:
    return "" if call.aligned else "queries and keys are not the same tokens"


def _xla_refuses(call: Call) -> str:
    return ""


def _splash(
    q: Array, k: Array, v: Array, q_places: Places, _: Places, form: Form, sink_logits_N: Array | None, site: Site
) -> Array:
    from jaxlm.ops.attention.splash import splash  # loads Pallas, which only TPUs need

    segments, window, softcap = q_places.segments, form.window, form.softcap
    return splash(q, k, v, segments, window=window, softcap=softcap, sink_logits_N=sink_logits_N, site=site)


def _cudnn(q: Array, k: Array, v: Array, q_places: Places, k_places: Places, form: Form, *_: Any) -> Array:
    return cudnn(q, k, v, q_places, k_places, form.window, aligned=q.shape[1] == k.shape[1])


KERNELS: dict[str, Kernel] = {  # `auto` goes by this order; `config.Model.attention_impl` lists the same names
    "splash": Kernel(("tpu",), _splash_refuses, whole=_splash, splits=True),
    "cudnn": Kernel(("gpu",), _cudnn_refuses, whole=_cudnn),
    "blockwise": Kernel(ALL, _blockwise_refuses, folded, rings=True),
    "xla": Kernel(ALL, _xla_refuses, xla),
}


def choose(asked: str, call: Call) -> str:
    """The kernel of a call: the one asked for, or under `auto` the first of the table that applies.

    Raises:
        ValueError: there is no kernel of this name.
        UserError: the one asked for is not for this call.
    """
    if asked == "auto":
        names = ["xla"] if call.length < SHORT else list(KERNELS)
        return next(name for name in names if not KERNELS[name].objection(call))
    if asked not in KERNELS:
        raise ValueError(f"unknown attention implementation {asked!r}")
    if objection := KERNELS[asked].objection(call):
        raise UserError(f"model.attention_impl = {asked!r} does not apply here: {objection}", "`auto` takes what does")
    return asked

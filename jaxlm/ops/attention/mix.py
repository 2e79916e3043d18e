"""Attention of queries to everything that they see: one softmax over several kinds of keys.

    Own      the tokens of the call themselves, in their order
    Cached   slots of a cache, in any order
    Rows     slots of rows, each at its position
    First    the first tokens of each document, once they have left the window
    Sinks    learned keys and values that stand nowhere

Which kernel computes `Own` is the table's choice (`kernels`). Alone, it may be one that gives no log-sum-exp; beside
other keys each part gives one, and `merge` makes one softmax of the parts.

Shapes: B batch, T query length, S slots, R rows, N heads, K kv heads, H head dim, F retained first tokens, M sinks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.numerics import wide
from jaxlm.ops.attention import ring
from jaxlm.ops.attention.attend import attend_first, attend_sinks, cached, cached_attend, call_of
from jaxlm.ops.attention.kernels import KERNELS, Kernel, choose
from jaxlm.ops.attention.slots import attend_slots
from jaxlm.ops.attention.visible import Form, Mixed, Places, merge, visible
from jaxlm.ops.site import Site


class How(NamedTuple):
    """The options of a layer that decide what is seen and how it is computed."""

    impl: str = "auto"
    """A name of `kernels.KERNELS`, or `auto`."""
    window: int = 0
    """Tokens that a query sees, itself included; 0: all before it."""
    softcap: float = 0.0
    """Scores are bounded, `cap tanh(score / cap)`; 0: they are not."""


class Own(NamedTuple):
    """Keys and values of the queries' own tokens."""

    k: Float[Array, "b t k h"]
    v: Float[Array, "b t k h"]


class Cached(NamedTuple):
    """Slots of a cache and which tokens they hold."""

    keys: Float[Array, "b k h s"]
    values: Float[Array, "b k s h"]
    places: Places


class Rows(NamedTuple):
    """Slots by position, of B rows from `row` on."""

    keys: Float[Array, "r k h s"]
    values: Float[Array, "r k s h"]
    row: Int[Array, ""]


class First(NamedTuple):
    """The first tokens of each document, with queries that stand as near to them as a cache without gaps puts them."""

    q: Float[Array, "b t n h"]
    keys: Own | Cached
    keep_first: int


class Sinks(NamedTuple):
    """M keys and values that every token sees, and queries that were not rotated."""

    q: Float[Array, "b t n h"]
    k: Float[Array, "m k h"]
    v: Float[Array, "m k h"]


Seen = Own | Cached | Rows | First | Sinks


def mix(
    q_BTNH: Float[Array, "b t n h"],
    places: Places,
    seen: Sequence[Seen],
    how: How,
    sink_logits_N: Float[Array, " n"] | None,
    site: Site,
) -> Float[Array, "b t n h"]:
    """The values that queries take from all keys they see, in the dtype of the queries.

    Args:
        places: of the queries; padding, segment 0, sees nothing and gets zero.
        sink_logits_N: a score of each head that takes part in the softmax and has no value (gpt-oss).

    Raises:
        UserError: the kernel that `how` names is not for this call.
    """
    alone, sinks, form = len(seen) == 1, sink_logits_N is not None, Form(how.window, how.softcap, q_BTNH.dtype)
    if alone and isinstance(seen[0], Own):
        kernel = _kernel(q_BTNH, how, site, sinks=sinks)
        if kernel.whole is not None:
            return _whole(kernel, q_BTNH, seen[0], places, form, sink_logits_N, site)
    if alone and not sinks:
        return _part(q_BTNH, places, seen[0], how, form, site).out
    # Parts that become one softmax keep their width until then.
    form = form._replace(dtype=jnp.dtype(wide(q_BTNH.dtype)))
    parts = [_part(q_BTNH, places, one, how, form, site) for one in seen]
    return merge(parts, sink_logits_N, q_BTNH.dtype)


def _kernel(q_BTNH: Array, how: How, site: Site, **needs: bool) -> Kernel:
    return KERNELS[choose(how.impl, call_of(site, q_BTNH, True, softcap=bool(how.softcap), **needs))]


def _whole(
    kernel: Kernel, q_BTNH: Array, own: Own, places: Places, form: Form, sink_logits_N: Array | None, site: Site
) -> Array:
    """The tokens' own keys alone, by a kernel that gives no log-sum-exp."""
    assert kernel.whole is not None
    if site.over_sequence is None or kernel.splits:
        return kernel.whole(q_BTNH, *own, places, places, form, sink_logits_N, site)
    return site.over_sequence(functools.partial(ring.whole, kernel=kernel, form=form), False, q_BTNH, *own, places)


def _part(q_BTNH: Array, places: Places, one: Seen, how: How, form: Form, site: Site) -> Mixed:
    """One kind of keys, with the log-sum-exp of its scores."""
    match one:
        case Own():
            kernel = _kernel(q_BTNH, how, site, merged=True)
            assert kernel.part is not None
            if site.over_sequence is None:
                return kernel.part(q_BTNH, *one, places, places, form)
            return site.over_sequence(
                functools.partial(ring.part, kernel=kernel, form=form), True, q_BTNH, *one, places
            )
        case Cached():
            return cached(q_BTNH, *one[:2], visible(places, one.places, how.window), how.softcap, form.dtype)
        case Rows():
            mixed = attend_slots(q_BTNH, *one[:2], places, one.row, softcap=how.softcap)
            return mixed._replace(out=mixed.out.astype(form.dtype))
        case First():
            return _first(places, one, how, site)
        case Sinks():
            return attend_sinks(*one, places.segments, softcap=how.softcap)


def _first(places: Places, one: First, how: How, site: Site) -> Mixed:
    """What stands beyond the window among the first tokens."""
    if isinstance(one.keys, Cached):
        keys, values, k_places = one.keys
        return cached_attend(one.q, keys, values, places, k_places, beyond=how.window, softcap=how.softcap)
    first, window, softcap = one.keep_first, how.window, how.softcap
    if site.over_sequence is None:
        return attend_first(one.q, *one.keys, places, keep_first=first, window=window, softcap=softcap)
    op = functools.partial(ring.attend_first, keep_first=first, window=window, softcap=softcap)
    return site.over_sequence(op, True, one.q, *one.keys, places)

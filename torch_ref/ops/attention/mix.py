"""Attention of queries to everything that they see: one softmax over several kinds of keys.

    Own      the tokens of the call themselves, in their order
    Cached   slots of a cache, in any order
    First    the first tokens of each document, once they have left the window
    Sinks    learned keys and values that stand nowhere

Shapes: B batch, T query length, S slots, N heads, K kv heads, H head dim, M sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from torch_ref.ops.attention.attend import (
    Mixed,
    Places,
    attend,
    attend_first,
    attend_sinks,
    attention,
    cached_attend,
    cached_attention,
    merge,
)


class How(NamedTuple):
    """The options of a layer that decide what is seen and how it is computed."""

    impl: str = "auto"
    """A name of jaxlm's kernels, or `auto`."""
    window: int = 0
    """Tokens that a query sees, itself included; 0: all before it."""
    softcap: float = 0.0
    """Scores are bounded, `cap tanh(score / cap)`; 0: they are not."""


class Own(NamedTuple):
    """Keys and values of the queries' own tokens."""

    k: Float[Tensor, "b t k h"]
    v: Float[Tensor, "b t k h"]


class Cached(NamedTuple):
    """Slots of a cache and which tokens they hold."""

    keys: Float[Tensor, "b k h s"]
    values: Float[Tensor, "b k s h"]
    places: Places


class First(NamedTuple):
    """The first tokens of each document, with queries that stand as near to them as a cache without gaps puts them."""

    q: Float[Tensor, "b t n h"]
    keys: Own | Cached
    keep_first: int


class Sinks(NamedTuple):
    """M keys and values that every token sees, and queries that were not rotated."""

    q: Float[Tensor, "b t n h"]
    k: Float[Tensor, "m k h"]
    v: Float[Tensor, "m k h"]


Seen = Own | Cached | First | Sinks


def mix(
    q_BTNH: Float[Tensor, "b t n h"],
    places: Places,
    seen: Sequence[Seen],
    how: How,
    sink_logits_N: Float[Tensor, " n"] | None,
) -> Float[Tensor, "b t n h"]:
    """The values that queries take from all keys they see, in the dtype of the queries.

    Args:
        places: of the queries; padding, segment 0, sees nothing and gets zero.
        sink_logits_N: a score of each head that takes part in the softmax and has no value (gpt-oss).
    """
    if len(seen) == 1 and sink_logits_N is None:
        return _alone(q_BTNH, places, seen[0], how)
    parts = [_part(q_BTNH, places, one, how) for one in seen]
    return merge(parts, sink_logits_N, q_BTNH.dtype)


def _alone(q_BTNH: Tensor, places: Places, one: Seen, how: How) -> Tensor:
    """Keys of one kind: nothing is merged, so PyTorch's own kernel may compute it."""
    impl, window, softcap = how
    match one:
        case Own():
            return attention(q_BTNH, *one, places, places, impl=impl, aligned=True, window=window, softcap=softcap)
        case Cached():
            return cached_attention(q_BTNH, *one[:2], places, one.places, window=window, softcap=softcap)
        case _:
            return _part(q_BTNH, places, one, how).out.to(q_BTNH.dtype)


def _part(q_BTNH: Tensor, places: Places, one: Seen, how: How) -> Mixed:
    """One kind of keys, with the log-sum-exp of its scores."""
    impl, window, softcap = how
    match one:
        case Own():
            return attend(q_BTNH, *one, places, places, impl=impl, aligned=True, window=window, softcap=softcap)
        case Cached():
            return cached_attend(q_BTNH, *one[:2], places, one.places, window=window, softcap=softcap)
        case First():
            return _first(places, one, how)
        case Sinks():
            return attend_sinks(*one, places.segments, softcap=softcap)


def _first(places: Places, one: First, how: How) -> Mixed:
    """What stands beyond the window among the first tokens."""
    if isinstance(one.keys, Cached):
        keys, values, held = one.keys
        return cached_attend(one.q, keys, values, places, held, beyond=how.window, softcap=how.softcap)
    return attend_first(one.q, *one.keys, places, keep_first=one.keep_first, window=how.window, softcap=how.softcap)

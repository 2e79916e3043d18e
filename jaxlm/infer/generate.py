"""Decoding: one compiled program reads prompts of different lengths, and draws the new tokens in a loop.

    new = generate(decoder, params, [[5, 8, 2], [7]], GREEDY, max_new_tokens=64, eos_id=0)

Prompts are padded on the right to a bucket, so that few shapes compile. All rows write to the same slots of the cache,
each with its own positions; a row's tokens do not depend on its neighbours, but for experts with a capacity.

Shapes: P prompts, B rows (samples of the prompts), T prompt bucket, N new tokens, S = T + N slots, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.models.decoder import Cache, Decoder, Params, init_cache, unrolled, unstack_layers
from jaxlm.numerics import wide
from jaxlm.ops.sampling import over_temperature, sample
from jaxlm.text.completion import check_prompts, right_padded
from jaxlm.text.sampling import Sampling, uniforms

MAX_UNROLLED = 48
"""Deeper models stay scanned: an unrolled loop body would take minutes to compile."""


class State(NamedTuple):
    """What the loop carries. The last token drawn has not been through the model yet."""

    step: Int[Array, ""]
    """Tokens drawn in each row."""
    token: Int[Array, " b"]
    position: Int[Array, " b"]
    ended: Bool[Array, " b"]
    new: Int[Array, "b n"]
    seen: Bool[Array, "b v"] | None
    counts: Int[Array, "b v"] | None
    cache: Cache
    logps: Float[Array, "b n"] | None = None
    """Log-probability of each new token at the temperature of sampling, where it is asked for."""


class Draws(NamedTuple):
    """Samples of prompts."""

    ids: list[list[int]]
    """New ids of each row, up to the end id (included) or the length asked for."""
    logps: list[np.ndarray]
    """Of each row the log-probability of its ids under the distribution that they were drawn from, float32 or wider."""


def generate(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    pad_id: int = 0,
    seed: int = 0,
) -> list[list[int]]:
    """Complete prompts of ids; returns the new ids of each row, up to `eos_id` (included) or `max_new_tokens`.

    Raises:
        UserError: see `check_prompts`.
    """
    options = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id, "seed": seed}
    return _completed(decoder, params, prompts, sampling, **options, samples=1, scored=False)[0]


def draws(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    *,
    max_new_tokens: int,
    samples: int = 1,
    eos_id: int | None = None,
    pad_id: int = 0,
    seed: int = 0,
) -> Draws:
    """Sample from the whole distribution at a temperature above 0, with log-probabilities: the ids of `generate`.

    Args:
        samples: of each prompt, side by side: rows as if each prompt stood there so many times, but the model reads it
            once.

    Raises:
        UserError: see `check_prompts`.
    """
    options = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id, "seed": seed, "samples": samples}
    ids, logps_BN = _completed(decoder, params, prompts, Sampling(temperature=temperature), **options, scored=True)
    return Draws(ids, [logps_N[: len(row)] for row, logps_N in zip(ids, np.asarray(logps_BN), strict=True)])


def _completed(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int | None,
    pad_id: int,
    seed: int,
    samples: int,
    scored: bool,
) -> tuple[list[list[int]], Float[Array, "b n"] | None]:
    """The new ids of each row, its end id included, and the log-probabilities of all places, if they are asked for."""
    decoder.config.require_language_model("generation")
    check_prompts(decoder.config, prompts, max_new_tokens)
    decoder, params = unrolled_for_decoding(decoder, params)
    rows = right_padded(prompts, bucket(max(map(len, prompts))), pad_id)
    uniforms_BN = jnp.asarray(uniforms(seed, samples * len(prompts), max_new_tokens))
    ends = jnp.asarray([-1 if eos_id is None else eos_id, pad_id], jnp.int32)
    new_BN, logps_BN = _complete(decoder, sampling, params, *rows, uniforms_BN, ends, samples=samples, scored=scored)
    new = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in np.asarray(new_BN).tolist()]
    return new, logps_BN


def bucket(length: int) -> int:
    """The width to which prompts are padded: a power of two from 16 to 128, then a multiple of 128."""
    return max(16, 1 << (length - 1).bit_length()) if length <= 128 else -(-length // 128) * 128


def unrolled_for_decoding(decoder: Decoder, params: Params) -> tuple[Decoder, Params]:
    """The decoder with a cache of its own for each layer, which a step updates in place; do it once for many calls."""
    if not decoder.config.scanned or decoder.config.n_layers > MAX_UNROLLED:
        return decoder, params
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}  # a program would copy them too
    return unrolled(decoder), rest | _unstack({"layers": params["layers"]}, decoder.config)


_unstack = jax.jit(unstack_layers, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("samples", "scored"))
def _complete(
    decoder: Decoder,
    sampling: Sampling,
    params: Params,
    tokens_PT: Int[Array, "p t"],
    positions_PT: Int[Array, "p t"],
    segments_PT: Int[Array, "p t"],
    lengths_P: Int[Array, " p"],
    uniforms_BN: Float[Array, "b n"],
    ends: Int[Array, "2"],
    *,
    samples: int,
    scored: bool,
) -> tuple[Int[Array, "b n"], Float[Array, "b n"] | None]:
    """Prompts and new tokens in one program: draw until all rows have ended or are full."""
    rows = tokens_PT, positions_PT, segments_PT, lengths_P
    state = _prefill(decoder, sampling, params, *rows, uniforms_BN, ends, samples=samples, scored=scored)

    def body(state: State) -> State:
        token_B1, position_B1 = state.token[:, None], state.position[:, None]
        hidden_B1D, cache = _hidden(decoder, params, token_B1, position_B1, jnp.ones_like(token_B1), state.cache)
        return _draw(decoder, sampling, params, state._replace(cache=cache), hidden_B1D, uniforms_BN, ends)

    n = uniforms_BN.shape[1]
    state = jax.lax.while_loop(lambda state: (state.step < n) & ~state.ended.all(), body, state)
    return state.new, state.logps


def _prefill(
    decoder: Decoder,
    sampling: Sampling,
    params: Params,
    tokens_PT: Int[Array, "p t"],
    positions_PT: Int[Array, "p t"],
    segments_PT: Int[Array, "p t"],
    lengths_P: Int[Array, " p"],
    uniforms_BN: Float[Array, "b n"],
    ends: Int[Array, "2"],
    *,
    samples: int,
    scored: bool,
) -> State:
    """Run the prompts and draw the first token of each row, from the logits of its last token alone."""
    (p, t), (b, n) = tokens_PT.shape, uniforms_BN.shape
    hidden_PTD, cache = _hidden(decoder, params, tokens_PT, positions_PT, segments_PT, init_cache(decoder, p, t + n))
    last_P1D = jnp.take_along_axis(hidden_PTD, lengths_P[:, None, None] - 1, axis=1)

    # Each prompt was read once; from here on every sample of it is a row with a cache of its own.
    spread = functools.partial(jnp.repeat, repeats=samples, axis=0)
    cache = jax.tree.map(functools.partial(_spread_cache, decoder, samples), cache)
    seen_BV = None
    if sampling.repetition_penalty != 1:
        rows, real_PT = jnp.arange(p)[:, None], segments_PT != 0
        seen_BV = spread(jnp.zeros((p, decoder.config.vocab_size), bool).at[rows, tokens_PT].max(real_PT))
    state = State(
        step=jnp.int32(0),
        token=jnp.zeros(b, jnp.int32),
        position=spread(lengths_P) - 1,
        ended=jnp.zeros(b, bool),
        new=jnp.full((b, n), ends[1]),
        seen=seen_BV,
        counts=jnp.zeros((b, decoder.config.vocab_size), jnp.int32) if sampling.counts else None,
        cache=cache,
        logps=jnp.zeros((b, n), wide(hidden_PTD.dtype)) if scored else None,
    )
    return _draw(decoder, sampling, params, state, spread(last_P1D), uniforms_BN, ends)


def _spread_cache(decoder: Decoder, samples: int, leaf: Array) -> Array:
    """A leaf of a cache with each row so many times; stacked layers stand before the rows, a count has none."""
    axis = 1 if decoder.config.scanned else 0
    return jnp.repeat(leaf, samples, axis=axis) if leaf.ndim > axis else leaf


def _hidden(decoder: Decoder, params: Params, *inputs: Any) -> tuple[Array, Cache]:
    returned: Any = decoder.apply({"params": params}, *inputs, method="hidden")
    return returned


def _draw(
    decoder: Decoder,
    sampling: Sampling,
    params: Params,
    state: State,
    hidden_B1D: Float[Array, "b 1 d"],
    uniforms_BN: Float[Array, "b n"],
    ends: Int[Array, "2"],
) -> State:
    """Draw one token of each row; a row that has ended draws padding."""
    logits_B1V: Any = decoder.apply({"params": params}, hidden_B1D, method="unembed")
    uniform_B = jax.lax.dynamic_index_in_dim(uniforms_BN, state.step, axis=1, keepdims=False)
    token_B = sample(logits_B1V[:, 0], uniform_B, state.seen, state.counts, **dataclasses.asdict(sampling))
    logps_BN = state.logps
    if logps_BN is not None:
        cold_BV = over_temperature(logits_B1V[:, 0], sampling.temperature)
        logp_B1 = jax.nn.log_softmax(cold_BV)[jnp.arange(token_B.shape[0]), token_B][:, None]
        logps_BN = jax.lax.dynamic_update_slice_in_dim(logps_BN, logp_B1.astype(logps_BN.dtype), state.step, axis=1)
    eos_id, pad_id = ends
    token_B = jnp.where(state.ended, pad_id, token_B)
    seen_BV = state.seen
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
    counts_BV = state.counts
    if counts_BV is not None:
        counts_BV = counts_BV.at[jnp.arange(token_B.shape[0]), token_B].add(1)
    return State(
        step=state.step + 1,
        token=token_B,
        position=state.position + 1,
        ended=state.ended | (token_B == eos_id),
        new=jax.lax.dynamic_update_slice_in_dim(state.new, token_B[:, None], state.step, axis=1),
        seen=seen_BV,
        counts=counts_BV,
        cache=state.cache,
        logps=logps_BN,
    )

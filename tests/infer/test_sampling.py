"""Each filter against a few lines of numpy, and the draw against the distribution it should have."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.ops import sampling as ops
from jaxlm.text.sampling import Sampling, preset

B, V = 3, 23
OPTIONS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.1, "temperature": 1.3, "repetition_penalty": 0.8},
    {"typical_p": 0.6},
    {"frequency_penalty": 0.7},
    {"presence_penalty": 1.1, "frequency_penalty": -0.2},
    {"top_k": 12, "typical_p": 0.9, "top_p": 0.7, "min_p": 0.05, "temperature": 1.2, "presence_penalty": 0.5},
    {"top_p": 1e-9},
    {"top_k": 1},
    {"min_p": 1.0},
]


NEUTRAL = {"temperature": 1.0, "top_k": 0, "typical_p": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
NEUTRAL |= {"frequency_penalty": 0.0, "presence_penalty": 0.0}


def expected(logits: np.ndarray, seen: np.ndarray, counts: np.ndarray, options: dict[str, float]) -> np.ndarray:
    """Probabilities [V] of one row, token by token and by sorting."""
    logits = logits.copy()
    if (penalty := options.get("repetition_penalty")) is not None:
        for token in np.flatnonzero(seen):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    logits -= counts * options.get("frequency_penalty", 0) + (counts > 0) * options.get("presence_penalty", 0)
    weights = np.exp(logits / options.get("temperature", 1.0))
    order = np.lexsort((np.arange(len(logits)), -logits))
    kept = order[: int(options.get("top_k", 0)) or len(order)]
    if "typical_p" in options:
        share = weights[kept] / weights[kept].sum()
        far = np.abs(-np.log(share) + (share * np.log(share)).sum())
        nearest = kept[np.lexsort((kept, far))]
        kept = np.array(
            sorted(until(nearest, weights, options["typical_p"]), key=lambda token: (-logits[token], token))
        )
    kept = np.array(until(kept, weights, options.get("top_p", 1.0)))
    kept = kept[weights[kept] >= options.get("min_p", 0.0) * weights[kept].max()]
    probabilities = np.zeros_like(weights)
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


def until(order: np.ndarray, weights: np.ndarray, share: float) -> list[int]:
    """The first of these tokens, until their weights reach the share of all of them."""
    kept, mass, whole = [], 0.0, weights[order].sum()
    for token in order:
        if not kept or mass < share * whole:
            kept.append(int(token))
            mass += weights[token]
    return kept


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_draw_has_the_distribution(options: dict[str, Any], rng: np.random.Generator) -> None:
    """Evenly spread uniforms fall on each token as often as its probability says, to one part in their number."""
    logits, seen, counts = 2 * rng.standard_normal((B, V)), rng.random((B, V)) < 0.3, rng.integers(0, 3, (B, V))
    count = 2000
    spread = jnp.asarray((np.arange(count) + 0.5) / count, jnp.float32)
    arrays = jnp.asarray(seen), jnp.asarray(counts, jnp.int32)
    logits_BV = jnp.asarray(logits, jnp.float32)
    drawn = np.asarray(jax.vmap(lambda u: ops.sample(logits_BV, jnp.full(B, u), *arrays, **options))(spread))
    knobs = ops.Knobs(*(jnp.full(B, options.get(name, neutral)) for name, neutral in NEUTRAL.items()))
    kept_BV = ops.filtered_rows(ops.penalised_rows(logits_BV, *arrays, knobs), knobs)
    by_rows = np.asarray(jax.nn.softmax(kept_BV))
    for row in range(B):
        frequency = np.bincount(drawn[:, row], minlength=V) / count
        probabilities = expected(logits[row], seen[row], counts[row], options)
        np.testing.assert_allclose(frequency, probabilities, atol=2 / count)
        assert not frequency[probabilities == 0].any()
        np.testing.assert_allclose(by_rows[row], probabilities, atol=1e-6)


def test_presets() -> None:
    names = ["greedy", "balanced", "creative", "precise", "natural", "fim"]
    assert [preset(name).temperature for name in names] == [0.0, 0.8, 1.0, 0.6, 0.9, 0.7]
    assert preset("fim") == Sampling(
        temperature=0.7, top_k=40, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.15
    )
    with pytest.raises(UserError, match=r"fimm.*fim"):
        preset("fimm")


def test_ties_go_to_the_lower_token() -> None:
    logits = jnp.asarray([[1.0, 3.0, 3.0, 3.0, 0.0]])
    assert ops.greedy(logits).tolist() == [1]
    assert np.flatnonzero(jnp.isfinite(ops.keep_top_k(logits, 2)[0])).tolist() == [1, 2]
    draws = [int(ops.sample(logits, jnp.asarray([u]), top_k=2)[0]) for u in np.linspace(0, 0.999, 7)]
    assert set(draws) == {1, 2}


def test_top_p_keeps_the_token_that_crosses() -> None:
    probabilities = jnp.asarray([[0.5, 0.3, 0.2]])
    for p, kept in ((0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3)):
        assert int(jnp.isfinite(ops.keep_top_p(jnp.log(probabilities), p)).sum()) == kept, p


ROWS = {
    "flat": lambda rng, v: np.zeros(v),
    "two values": lambda rng, v: rng.integers(0, 2, v).astype(float),
    "spiked": lambda rng, v: np.where(np.arange(v) == v // 3, 40.0, 0.0),
    "rounded": lambda rng, v: np.round(3 * rng.standard_normal(v)),
    "zeros of both signs": lambda rng, v: np.where(np.arange(v) % 2, 0.0, -0.0),
    "most are dropped": lambda rng, v: np.where(rng.random(v) < 0.9, -np.inf, np.round(rng.standard_normal(v))),
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_kept_set_is_that_of_sorting(kind: str, rng: np.random.Generator) -> None:
    """Equal logits on the border above all: what is kept has the lower ids."""
    v = 5003
    logits = ROWS[kind](rng, v)
    order = np.lexsort((np.arange(v), -logits))
    weights = np.exp(logits - logits.max())
    with jax.enable_x64(True):  # sums in float32 differ from the border by rounding
        logits_1V = jnp.asarray(logits[None])
        for amount in (1e-6, 0.1, 0.5, 0.9, 0.999999):
            kept = np.flatnonzero(jnp.isfinite(ops.keep_top_p(logits_1V, amount)[0]))
            expected_set = sorted(until(order, weights, amount))
            assert kept.tolist() == [token for token in expected_set if np.isfinite(logits[token])]
    finite = int(np.isfinite(logits).sum())
    for k in (1, 7, v // 20, v - 1):
        kept = np.flatnonzero(jnp.isfinite(ops.keep_top_k(jnp.asarray(logits[None], jnp.float32), k)[0]))
        assert kept.tolist() == sorted(order[: min(k, finite)].tolist())


def test_greedy_does_no_sampling_work() -> None:
    options = {"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}
    text = str(jax.make_jaxpr(lambda x: ops.sample(x, **options))(jnp.zeros((B, V))))
    assert "reduce_max" in text and "cumsum" not in text
    assert not {"exp", "sort", "top_k", "cumsum"} & set(text.split())


def test_a_token_without_mass_is_never_drawn(rng: np.random.Generator) -> None:
    """A parallel cumulative sum in float32 also rises where nothing is added, so aim at just these places."""
    logits = np.full(20_000, -np.inf, np.float32)
    logits[rng.choice(len(logits), 2_000, replace=False)] = rng.standard_normal(2_000)
    mass = np.exp(logits) / np.exp(logits).sum()
    reached = np.asarray(jnp.cumsum(jnp.asarray(mass)))
    rises = 1 + np.flatnonzero((mass[1:] == 0) & (np.diff(reached) > 0))
    uniform = np.clip([*(1 - reached[rises] / reached.max()), 0, 1], 0, np.nextafter(np.float32(1), np.float32(0)))
    drawn = ops.draw(jnp.broadcast_to(logits, (len(uniform), len(logits))), jnp.asarray(uniform, jnp.float32))
    assert np.isfinite(logits[np.asarray(drawn)]).all()
    assert [int(drawn[-2]), int(drawn[-1])] == [np.flatnonzero(mass)[-1], np.flatnonzero(mass)[0]]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)

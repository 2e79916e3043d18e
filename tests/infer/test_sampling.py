"""Each filter against a few lines of numpy, and the draw against the distribution it should have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.ops import sampling as ops
from jaxlm.text.sampling import Sampling

B, V = 3, 23
OPTIONS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.1, "temperature": 1.3, "repetition_penalty": 0.8},
    {"top_p": 1e-9},
    {"top_k": 1},
    {"min_p": 1.0},
]


def expected(logits: np.ndarray, seen: np.ndarray, options: dict[str, float]) -> np.ndarray:
    """Probabilities [V] of one row, token by token."""
    logits = logits.copy()
    if (penalty := options.get("repetition_penalty")) is not None:
        for token in np.flatnonzero(seen):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    weights = np.exp(logits / options.get("temperature", 1.0))
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: int(options.get("top_k", V))]
    kept, mass, whole = [], 0.0, sum(weights[order])
    for token in order:
        if not kept or mass < options.get("top_p", 1.0) * whole:
            kept.append(token)
            mass += weights[token]
    kept = [token for token in kept if weights[token] >= options.get("min_p", 0.0) * weights[order[0]]]
    probabilities = np.zeros_like(weights)
    probabilities[kept] = weights[kept] / sum(weights[kept])
    return probabilities


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_draw_has_the_distribution(options: dict[str, float], rng: np.random.Generator) -> None:
    """Evenly spread uniforms fall on each token as often as its probability says, to one part in their number."""
    logits, seen = 2 * rng.standard_normal((B, V)), rng.random((B, V)) < 0.3
    count = 2000
    spread = jnp.asarray((np.arange(count) + 0.5) / count, jnp.float32)
    logits_BV, seen_BV = jnp.asarray(logits, jnp.float32), jnp.asarray(seen)
    drawn = np.asarray(jax.vmap(lambda u: ops.sample(logits_BV, jnp.full(B, u), seen_BV, **options))(spread))
    for row in range(B):
        frequency = np.bincount(drawn[:, row], minlength=V) / count
        probabilities = expected(logits[row], seen[row], options)
        np.testing.assert_allclose(frequency, probabilities, atol=2 / count)
        assert not frequency[probabilities == 0].any()


def test_ties_go_to_the_lower_token() -> None:
    logits = jnp.asarray([[1.0, 3.0, 3.0, 3.0, 0.0]])
    assert ops.greedy(logits).tolist() == [1]
    assert ops.largest(logits, 2)[1].tolist() == [[1, 2]]
    draws = [int(ops.sample(logits, jnp.asarray([u]), top_k=2)[0]) for u in np.linspace(0, 0.999, 7)]
    assert set(draws) == {1, 2}


def test_top_p_keeps_the_token_that_crosses() -> None:
    probabilities = jnp.asarray([[0.5, 0.3, 0.2]])
    for p, kept in ((0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3)):
        assert int(jnp.isfinite(ops.keep_top_p(jnp.log(probabilities), p)).sum()) == kept, p


def test_greedy_does_no_sampling_work() -> None:
    options = {"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}
    text = str(jax.make_jaxpr(lambda x: ops.sample(x, **options))(jnp.zeros((B, V))))
    assert "argmax" in text
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
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)

"""The same logits and the same uniform numbers draw the same tokens in both frameworks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm.ops import sampling as jax_ops
from torch_ref.ops import sampling as torch_ops

B, V = 64, 301
OPTIONS = [
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {},
    {"temperature": 0.7},
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"typical_p": 0.7},
    {"frequency_penalty": 0.3, "presence_penalty": -0.5},
    {"temperature": 1.4, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
    {"top_k": 90, "typical_p": 0.9, "top_p": 0.8, "min_p": 0.02, "presence_penalty": 1.0},
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_tokens(options: dict[str, float], ties: bool, rng: np.random.Generator) -> None:
    logits, seen, uniform = 2 * rng.standard_normal((B, V)), rng.random((B, V)) < 0.2, rng.random(B)
    counts = rng.integers(0, 3, (B, V), dtype=np.int32)
    if ties:  # many equal logits, also on both sides of the top-k boundary
        logits = np.round(logits)
    arrays = logits, uniform, seen, counts
    ours = jax_ops.sample(*map(jnp.asarray, arrays), **options)
    theirs = torch_ops.sample(*map(torch.tensor, arrays), **options)
    assert np.asarray(ours).tolist() == theirs.tolist()


def test_rows_with_options_of_their_own(rng: np.random.Generator) -> None:
    """All options at once as arrays: each row draws what `sample` draws with its options."""
    logits, uniform = 2 * rng.standard_normal((len(OPTIONS), V)), rng.random(len(OPTIONS))
    seen, counts = rng.random(logits.shape) < 0.2, rng.integers(0, 3, logits.shape, dtype=np.int32)
    neutral = {name: 0.0 if "penalty" in name and "rep" not in name else 1.0 for name in jax_ops.Knobs._fields}
    neutral |= {"top_k": 0, "min_p": 0.0}
    values = [np.array([row.get(name, value) for row in OPTIONS]) for name, value in neutral.items()]
    drawn = []
    for ops, array in ((jax_ops, jnp.asarray), (torch_ops, torch.tensor)):
        knobs = ops.Knobs(*(array(value) for value in values))
        arrays = [array(x) for x in (logits, seen, counts)]
        drawn.append(np.asarray(ops.draw(ops.filtered_rows(ops.penalised_rows(*arrays, knobs), knobs), array(uniform))))
    alone = [
        int(jax_ops.sample(*(jnp.asarray(x[i : i + 1]) for x in (logits, uniform, seen, counts)), **row)[0])
        for i, row in enumerate(OPTIONS)
    ]
    assert drawn[0].tolist() == drawn[1].tolist() == alone


@pytest.mark.parametrize("temperature", [1e-9, 1e-45, 1e-300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_small_temperature_is_greedy(temperature: float, dtype: str, rng: np.random.Generator) -> None:
    """However small, with every filter, alone and as a row among others; nothing becomes NaN."""
    logits = (30 * rng.permuted(np.linspace(-1, 1, V)[None].repeat(B, 0), axis=1)).astype(dtype)
    logits[1] += 1000
    logits[2, ::3] = -np.inf
    uniform, expected = rng.random(B), logits.argmax(axis=-1).tolist()
    options = {"temperature": temperature, "typical_p": 0.9, "top_p": 0.9, "min_p": 0.1}
    values = [[value] * B for value in (temperature, 0, 0.9, 0.9, 0.1, 1.0, 0.0, 0.0)]
    for ops, array in ((jax_ops, jnp.asarray), (torch_ops, torch.tensor)):
        knobs = ops.Knobs(*(array(np.array(value)) for value in values))
        assert np.asarray(ops.sample(array(logits), array(uniform), temperature=temperature)).tolist() == expected
        assert np.asarray(ops.sample(array(logits), array(uniform), **options)).tolist() == expected
        kept = ops.filtered_rows(array(logits), knobs)
        assert np.asarray(ops.draw(kept, array(uniform))).tolist() == expected
        assert not np.isnan(np.asarray(kept)).any()


def test_a_row_without_any_token_stays_one() -> None:
    """All of it is forbidden: a small temperature does not make it even."""
    logits = np.array([[-np.inf] * 4, [0.0, 1.0, -np.inf, 2.0]])
    for ops, array in ((jax_ops, jnp.asarray), (torch_ops, torch.tensor)):
        cold = np.asarray(ops.over_temperature(array(logits), 2.0**-30))
        assert (cold[0] == -np.inf).all() and cold[1].tolist() == [-(2.0**31), -(2.0**30), -np.inf, 0.0]


def test_the_order_of_ties() -> None:
    """The values are too few to sort apart: only the rule of the lower token makes both orders the same."""
    logits = np.random.default_rng(0).integers(0, 3, (B, V)).astype(np.float64)
    ours, theirs = jax_ops.keep_top_k(jnp.asarray(logits), 40), torch_ops.keep_top_k(torch.tensor(logits), 40)
    np.testing.assert_array_equal(ours, theirs.numpy())
    np.testing.assert_array_equal(torch_ops.greedy(torch.tensor(logits)).numpy(), logits.argmax(axis=-1))

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
    {"temperature": 1.4, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_tokens(options: dict[str, float], ties: bool, rng: np.random.Generator) -> None:
    logits, seen, uniform = 2 * rng.standard_normal((B, V)), rng.random((B, V)) < 0.2, rng.random(B)
    if ties:  # many equal logits, also on both sides of the top-k boundary
        logits = np.round(logits)
    ours = jax_ops.sample(jnp.asarray(logits), jnp.asarray(uniform), jnp.asarray(seen), **options)
    theirs = torch_ops.sample(torch.tensor(logits), torch.tensor(uniform), torch.tensor(seen), **options)
    assert np.asarray(ours).tolist() == theirs.tolist()


def test_the_order_of_ties() -> None:
    """The values are too few to sort apart: only the rule of the lower token makes both orders the same."""
    logits = np.random.default_rng(0).integers(0, 3, (B, V)).astype(np.float64)
    ours, theirs = jax_ops.largest(jnp.asarray(logits), 40), torch_ops.largest(torch.tensor(logits), 40)
    np.testing.assert_array_equal(ours[1], theirs[1].numpy())
    np.testing.assert_array_equal(ours[1][:, 0], logits.argmax(axis=-1))
    np.testing.assert_array_equal(torch_ops.greedy(torch.tensor(logits)).numpy(), logits.argmax(axis=-1))

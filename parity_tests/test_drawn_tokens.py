"""The loss of a policy looks at the tokens that a sample can have drawn: it is the loss of whole rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm import config
from jaxlm.recipes import forward as jax_forward
from jaxlm.recipes import grpo
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64
from torch_ref.recipes import forward as torch_forward

B, T, D = 4, 9, 5
DRAWN = (slice(2, 5), slice(7, 9), slice(0, 0), slice(0, 3))
"""Columns with a weight: a whole sample, one at the end of the row, a sample without a grade, no prompt."""


def rows(rng: np.random.Generator) -> dict[str, Any]:
    weights = np.zeros((B, T))
    for row, drawn in enumerate(DRAWN):
        weights[row, drawn] = 1
    ids = {name: rng.integers(0, 20, (B, T), dtype=np.int32) for name in ("tokens", "targets")}
    places = {"positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)), "segments": np.ones((B, T), np.int32)}
    floats = {name: rng.standard_normal((B, T)) for name in ("advantages", "sampler_logps")}
    return {**ids, **places, **floats, "weights": weights, "reward": np.asarray(2.0)}


def test_both_pick_the_same(rng: np.random.Generator) -> None:
    batch, hidden_BTD = rows(rng), rng.standard_normal((B, T, D))
    ours, ours_batch = jax_forward.drawn_tokens(jnp.asarray(hidden_BTD), jax.tree.map(jnp.asarray, batch), 3)
    theirs, theirs_batch = torch_forward.drawn_tokens(torch.tensor(hidden_BTD), pairs.tensors(batch), 3)
    np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())
    for name in batch:
        np.testing.assert_array_equal(np.asarray(ours_batch[name]), theirs_batch[name].numpy())
    for row, drawn in enumerate(DRAWN):
        count = drawn.stop - drawn.start
        np.testing.assert_array_equal(np.asarray(ours)[row, :count], hidden_BTD[row, drawn])
        np.testing.assert_array_equal(np.asarray(ours_batch["targets"])[row, :count], batch["targets"][row, drawn])
        assert ours_batch["weights"][row].sum() == count


def test_places_that_are_not_asked_for_may_be_infinite(rng: np.random.Generator) -> None:
    batch, hidden_BTD = rows(rng), rng.standard_normal((B, T, D))
    hidden_BTD[0, 6] = np.inf
    batch |= {"labels": np.zeros((B, 2))}  # [B, M]: none of its columns are tokens
    ours, ours_batch = jax_forward.drawn_tokens(jnp.asarray(hidden_BTD), jax.tree.map(jnp.asarray, batch), 3)
    theirs, theirs_batch = torch_forward.drawn_tokens(torch.tensor(hidden_BTD), pairs.tensors(batch), 3)
    assert np.isfinite(ours).all() and torch.isfinite(theirs).all()
    assert ours_batch["labels"].shape == tuple(theirs_batch["labels"].shape) == (B, 2)


@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("divisor", ["sequence", "token", "constant"])
def test_the_loss_is_that_of_whole_rows(divisor: Any, gap: bool, rng: np.random.Generator) -> None:
    model = pairs.model(vocab_size=20, n_layers=1, d_model=8, n_heads=2, n_kv_heads=1, d_ff=12, max_seq_len=T)
    pair = pairs.pair(model, pairs.random_params(model, rng))
    cfg = config.Config(model=model, rl=config.RL(rewards=("exact_text",), divisor=divisor, max_new_tokens=3))
    batch = rows(rng)
    batch["weights"][:, 3] *= not gap  # the token between others of the first sample
    batch = jax.tree.map(jnp.asarray, batch)

    def found(longest: int) -> Any:
        rl = dataclasses.replace(cfg.rl, max_new_tokens=longest)
        loss = grpo.objective({"model": pair.jax}, dataclasses.replace(cfg, rl=rl))
        return jax.grad(lambda params: loss(params, {}, batch, None), has_aux=True)(pair.params)

    (gradient, sums), (whole, whole_sums) = found(3), found(T)
    if divisor == "constant":
        assert whole_sums.pop("weight") == T / 3 * sums.pop("weight")
        whole_sums["reward"] = sums["reward"]
    for name, value in whole_sums.items():
        FLOAT64.check(pairs.error(np.asarray(value), np.asarray(sums[name])), name)
    for ours, theirs in zip(*map(jax.tree.leaves, (gradient, whole)), strict=True):
        FLOAT64.check(pairs.error(np.asarray(theirs), np.asarray(ours)), "gradient")

"""Preference losses at points that are known on paper, and the traps of the literature that a property can see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives.kto import kto_divergence, kto_loss
from jaxlm.objectives.preference import NO_REFERENCE, preference_loss
from jaxlm.objectives.reward import Moments, add_moments, reward_loss, shape_rewards

COUNTS = [[3.0, 5.0, 2.0, 2.0], [4.0, 1.0, 0.0, 0.0]]
KINDS = ["dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo"]


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def sums() -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(3)
    return jnp.asarray(-random.exponential(1.0, (2, 4)) * np.array(COUNTS)), jnp.asarray(COUNTS)


@pytest.mark.parametrize("kind", ["dpo", "cdpo", "robust"])
def test_at_the_start_the_loss_is_ln_2_and_the_margin_0(kind) -> None:
    """Trap 11: policy and reference are the same function, so nothing is left of a pair."""
    logps, counts = sums()
    result = preference_loss(logps, counts, logps, kind=kind, label_noise=0.1)
    np.testing.assert_allclose(result.loss / result.weight, np.log(2), rtol=1e-12)
    assert (result.weight, result.chosen_reward, result.rejected_reward, result.correct) == (3, 0, 0, 0)


def test_the_start_of_the_others() -> None:
    logps, counts = sums()
    assert preference_loss(logps, counts, logps, kind="hinge").loss == 3
    np.testing.assert_allclose(preference_loss(logps, counts, logps, kind="ipo", beta=0.25).loss, 3 * 4, rtol=1e-12)


@pytest.mark.parametrize("kind", ["ipo", "simpo", "orpo"])
def test_length_means_do_not_move_when_every_completion_is_doubled(kind) -> None:
    """Trap 12."""
    logps, counts = sums()
    reference = None if kind in NO_REFERENCE else logps * 1.1
    twice = None if reference is None else 2 * reference
    once, doubled = (
        preference_loss(logps, counts, reference, kind=kind),
        preference_loss(2 * logps, 2 * counts, twice, kind=kind),
    )
    np.testing.assert_allclose(once.loss, doubled.loss, rtol=1e-13)
    plain = preference_loss(2 * logps, 2 * counts, twice if twice is not None else 2 * logps - 1, kind="dpo")
    assert abs(plain.loss - preference_loss(logps, counts, reference, kind="dpo").loss) > 1e-3 or kind in NO_REFERENCE


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_rises_and_the_rejected_falls(kind) -> None:
    """The gradient by every present completion has the right sign; by an absent pair it is 0, not NaN."""
    logps, counts = sums()
    reference = None if kind in NO_REFERENCE else logps + 0.01
    slope = jax.grad(lambda x: preference_loss(x, counts, reference, kind=kind).loss)(logps)
    np.testing.assert_array_equal(np.sign(slope), [[-1, 1, -1, 1], [-1, 1, 0, 0]])


def test_the_reference_has_no_gradient() -> None:
    logps, counts = sums()
    assert not jax.grad(lambda x: preference_loss(logps, counts, x).loss)(logps - 1).any()
    labels, z = jnp.asarray([[1, -1], [1, 0]], jnp.int32), jnp.asarray(0.1)
    assert not jax.grad(lambda x: kto_loss(logps, x, labels, z).loss)(logps - 1).any()


def test_kto_by_hand() -> None:
    """Two examples; the divergence of mismatched pairs is a mean over the batch, never below 0, without a gradient."""
    logps, reference = jnp.asarray([[-2.0, -3.0, -5.0, -1.0]]), jnp.asarray([[-3.0, -3.5, -4.0, -1.1]])
    counts = jnp.asarray([[2.0, 2.0, 3.0, 1.0]])
    divergence = kto_divergence(logps, counts, reference)
    np.testing.assert_allclose(divergence.value, (0.5 + 0.1) / 2, rtol=1e-12)
    assert kto_divergence(reference, counts, logps).value == 0
    assert not jax.grad(lambda x: kto_divergence(x, counts, reference).value)(logps).any()
    labels = jnp.asarray([[1, -1]], jnp.int32)
    result = kto_loss(logps, reference, labels, divergence.value, beta=0.5, undesirable_weight=2.0)
    s = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    np.testing.assert_allclose(result.loss, 1 - s(0.5 * (1 - 0.3)) + 2 * (1 - s(0.5 * (0.3 + 1))), rtol=1e-12)
    assert (result.weight, result.desirable, result.desirable_reward, result.undesirable_reward) == (2, 1, 0.5, -0.5)


def test_reward_loss_by_hand() -> None:
    scores, present = jnp.asarray([[1.0, 0.0, 2.0, 2.0]]), jnp.ones((1, 4), bool)
    result = reward_loss(scores, present, jnp.asarray([[0.5, 9.0]]), jnp.asarray([[False, True]]), centring=0.1)
    wanted = np.log1p(np.exp(-0.5)) + np.log(2) + 0.1 * (1 + 16)
    np.testing.assert_allclose(result.loss, wanted, rtol=1e-12)
    assert (result.correct, result.weight, result.chosen, result.rejected) == (1.5, 2, 3, 2)
    hinge = reward_loss(scores, present, jnp.asarray([[2.5, 0.0]]), kind="hinge")
    assert hinge.loss == 1.5


def test_running_moments_are_those_of_all_rewards_and_shaping_keeps_the_order() -> None:
    random = np.random.default_rng(0)
    rewards, valid = random.standard_normal((3, 8)) * 5 + 2, random.random((3, 8)) > 0.3
    moments = Moments(*jnp.zeros(3))
    for some, ok in zip(rewards, valid, strict=True):
        moments = add_moments(moments, jnp.asarray(np.where(ok, some, np.nan)), jnp.asarray(ok))
    every = rewards[valid]
    np.testing.assert_allclose((moments.samples, moments.mean), (len(every), every.mean()), rtol=1e-12)
    np.testing.assert_allclose(moments.squares / (moments.samples - 1), every.var(ddof=1), rtol=1e-12)
    shaped = shape_rewards(jnp.asarray(rewards[0]), jnp.zeros(8), moments, clip=10.0)
    np.testing.assert_array_equal(np.argsort(shaped), np.argsort(rewards[0]))
    longer = shape_rewards(jnp.ones(2), jnp.asarray([0.0, 10.0]), length_weight=0.01)
    assert longer.tolist() == [1, 0.9]

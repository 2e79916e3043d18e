"""Advantages, the clipped losses and the KL estimators at points that are known on paper."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives.advantages import adapt_kl_weight, advantages, gae, token_rewards, whiten
from jaxlm.objectives.policy import correction_weights, kl_estimate, mismatch, policy_loss
from jaxlm.objectives.value import value_loss


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("scaling", ["group", "batch", "none", "rloo"])
def test_equal_rewards_give_exactly_nothing_and_a_lost_one_has_no_part(scaling) -> None:
    """Trap 22."""
    rewards = jnp.asarray([[0.1] * 6, [1, 0, np.nan, 1, 0, 0]], jnp.float64)
    valid = jnp.asarray(~np.isnan(rewards))
    result = np.asarray(advantages(rewards, valid, scaling=scaling))
    assert not result[0].any()
    assert result[1, 2] == 0
    left = np.array([1, 0, 1, 0, 0.0])
    every = np.concatenate([np.full(6, 0.1), left])
    wanted = {
        "group": (left - left.mean()) / (left.std(ddof=1) + 1e-4),
        "batch": (left - left.mean()) / (every.std(ddof=1) + 1e-4),
        "none": left - left.mean(),
        "rloo": [x - (left.sum() - x) / 4 for x in left],
    }
    np.testing.assert_allclose(np.delete(result[1], 2), wanted[scaling], rtol=1e-12)


def test_one_sample_left_of_a_group_teaches_nothing() -> None:
    for scaling in ("group", "batch", "none", "rloo"):
        rewards, valid = jnp.asarray([[3.0, 1.0]]), jnp.asarray([[True, False]])
        assert not advantages(rewards, valid, scaling=scaling).any()


def test_gae_worked_by_hand() -> None:
    """Trap 14: five tokens, of which the second was not drawn by the policy; one sample ended, the other was cut."""
    values = jnp.asarray([[0.5, 99.0, 0.2, 0.1, 77.0]] * 2)
    weights = jnp.asarray([[1.0, 0, 1, 1, 0]] * 2)
    rewards = token_rewards(values, None, jnp.asarray([1.0, 1.0]), weights)
    assert rewards.tolist() == [[0, 0, 0, 1, 0]] * 2
    result = gae(rewards, values, weights, jnp.asarray([0.0, 0.3]), discount=0.9, lam=0.8)
    for row, after in enumerate((0.0, 0.3)):
        d4 = 1 + 0.9 * after - 0.1
        d3 = 0.9 * 0.1 - 0.2
        d1 = 0.9 * 0.2 - 0.5
        a3 = d3 + 0.72 * d4
        wanted = [d1 + 0.72 * a3, 0, a3, d4, 0]
        np.testing.assert_allclose(result.advantages[row], wanted, rtol=1e-12)
        returns = np.where(weights[row], np.array(wanted) + values[row], 0)
        np.testing.assert_allclose(result.returns[row], returns, rtol=1e-12)


def test_whitening() -> None:
    x, weights = jnp.asarray([[1.0, 50.0, 3.0, 8.0]]), jnp.asarray([[1.0, 0, 1, 1]])
    wanted = (np.array([1, 3, 8]) - 4) / np.std([1, 3, 8], ddof=1)
    np.testing.assert_allclose(np.delete(whiten(x, weights), 1), wanted, rtol=1e-8)
    assert not whiten(x, jnp.asarray([[0.0, 1, 0, 0]])).any()


def test_kl_in_the_reward_and_its_weight() -> None:
    old, reference = jnp.asarray([[-1.0, -2.0, -9.0]]), jnp.asarray([[-1.5, -1.0, 9.0]])
    rewards = token_rewards(old, reference, jnp.asarray([2.0]), jnp.asarray([[1.0, 1, 0]]), kl_weight=0.1)
    np.testing.assert_allclose(rewards, [[-0.05, 2.1, 0]], rtol=1e-12)
    np.testing.assert_allclose(adapt_kl_weight(0.2, 9.0, target=6.0, samples=100, horizon=1000), 0.2 * 1.02)
    np.testing.assert_allclose(adapt_kl_weight(0.2, 5.4, target=6.0, samples=100, horizon=1000), 0.2 * 0.99)


def test_the_expected_gradient_of_each_kl_estimator() -> None:
    """Trap 21, by summing over a vocabulary of 3: the divergence that each estimator teaches, in loss and reward."""
    logits, reference = jnp.asarray([0.3, -1.0, 0.8]), jax.nn.log_softmax(jnp.asarray([1.0, 0.2, -0.5]))
    probabilities = jax.nn.softmax(logits)

    def expected(kind, logits):
        """E over the policy that draws, held fixed, of the estimator as a term of the loss."""
        logps = jax.nn.log_softmax(logits)[None]
        old = jnp.log(probabilities)[None]
        return jnp.sum(probabilities * kl_estimate(logps, reference[None], kind=kind, old_BT=old)[0])

    def forward(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (logp - reference))

    def backward(logits):
        return jnp.sum(jnp.exp(reference) * (reference - jax.nn.log_softmax(logits)))

    def in_reward(logits):
        """The policy gradient of a reward of -k1: the estimator times the log-probability."""
        logp = jax.nn.log_softmax(logits)
        k1 = kl_estimate(jnp.log(probabilities)[None], reference[None], kind="k1")[0]
        return jnp.sum(probabilities * k1 * logp)

    slope = {kind: jax.grad(lambda x, kind=kind: expected(kind, x))(logits) for kind in ("k1", "k2", "k3", "unbiased")}
    right, other = jax.grad(forward)(logits), jax.grad(backward)(logits)
    np.testing.assert_allclose(slope["k1"], 0, atol=1e-12)
    np.testing.assert_allclose(slope["k2"], right, atol=1e-12)
    np.testing.assert_allclose(slope["unbiased"], right, atol=1e-12)
    np.testing.assert_allclose(jax.grad(in_reward)(logits), right, atol=1e-12)
    np.testing.assert_allclose(slope["k3"], other, atol=1e-12)
    assert np.abs(np.asarray(right - other)).max() > 0.05


def test_value_clip_by_finite_differences() -> None:
    """Trap 15: on both sides of the clip, and inside it, the gradient is the slope of the function."""
    old, returns, weights = jnp.zeros((1, 6)), jnp.asarray([[1.0, 1, 1, -1, -1, -1]]), jnp.ones((1, 6))
    values = jnp.asarray([[-0.5, 0.1, 0.6, -0.6, 0.05, 0.5]])

    def loss(x):
        return value_loss(x, old, returns, weights, clip=0.2).loss

    slope, step = jax.grad(loss)(values)[0], 1e-6
    for token in range(6):
        shift = jnp.zeros((1, 6)).at[0, token].set(step)
        np.testing.assert_allclose(slope[token], (loss(values + shift) - loss(values - shift)) / (2 * step), atol=1e-8)
    assert slope[0] != 0 and slope[2] == 0 and slope[3] == 0 and slope[5] != 0
    result = value_loss(values, old, returns, weights, clip=0.2)
    assert result.clipped == 2
    np.testing.assert_allclose(result.explained_variance, 1 - np.var(np.asarray(returns - values)) / 1, rtol=1e-12)


def test_values_within_the_clip_are_not_counted(rng: np.random.Generator) -> None:
    """V^o + (V - V^o) is V but for rounding, which is no clip."""
    values, old, returns = 0.02 * rng.standard_normal((3, 1, 1000))
    assert np.any((old + (values - old) - returns) ** 2 > (values - returns) ** 2), "a naive count would not be 0"
    assert np.abs(values - old).max() < 0.2
    assert value_loss(*map(jnp.asarray, (values, old, returns, np.ones((1, 1000)))), clip=0.2).clipped == 0


def test_with_one_update_the_ratio_is_one_and_the_gradient_is_the_policy_gradient() -> None:
    logps, weights = jnp.asarray([[-1.0, -2.0, -3.0]]), jnp.asarray([[1.0, 1, 0]])
    gains = jnp.asarray([[2.0, -1.0, 5.0]])
    loss, slope = jax.value_and_grad(lambda x: policy_loss(x, None, gains, weights).loss)(logps)
    assert loss == -1 and slope.tolist() == [[-2, 1, 0]]
    result = policy_loss(logps, None, gains, weights)
    assert (result.clipped, result.kl_old, result.weight, result.tokens) == (0, 0, 2, 2)


def test_what_each_clip_takes_away() -> None:
    """Ratios of 0.5, 1.1, 2 and 4, for advantages of both signs: where a gradient is left, and how steep it is."""
    rho = np.array([0.5, 1.1, 2.0, 4.0])
    logps, old, weights = jnp.log(jnp.asarray([rho])), jnp.zeros((1, 4)), jnp.ones((1, 4))

    def slope(sign, **options):
        gains = jnp.full((1, 4), float(sign))
        return jax.grad(lambda x: policy_loss(x, old, gains, weights, **options).loss)(logps)[0]

    np.testing.assert_allclose(slope(1), -rho * [1, 1, 0, 0])
    np.testing.assert_allclose(slope(-1), rho * [0, 1, 1, 1])
    np.testing.assert_allclose(slope(1, high=1.5), -rho * [1, 1, 1, 0])
    np.testing.assert_allclose(slope(-1, dual=3.0), rho * [0, 1, 1, 0])
    np.testing.assert_allclose(slope(1, clipping="cispo", low=1.0, high=1.0), -np.minimum(rho, 2))
    counted = policy_loss(logps, old, -weights, weights, dual=3.0).clipped
    assert counted == 2


def test_the_three_divisors_weigh_lengths_differently() -> None:
    """Trap 23: a long and a short sample, of 4 tokens and 1."""
    logps, weights = jnp.zeros((3, 4)), jnp.asarray([[1.0] * 4, [1.0, 0, 0, 0], [0.0] * 4])
    gains = jnp.asarray([[1.0] * 4, [-1.0] * 4, [9.0] * 4])
    for divisor, wanted in {"sequence": (0, 2), "token": (-3, 5), "constant": (-3, 16)}.items():
        result = policy_loss(logps, None, gains, weights, divisor=divisor, longest=8)
        assert (result.loss, result.weight) == wanted


def test_sampler_corrections() -> None:
    trainer, sampler = jnp.log(jnp.asarray([[1.0, 2.0, 8.0]])), jnp.zeros((1, 3))
    weights = jnp.asarray([[1.0, 1, 1]])

    def factors(correction, level="token", cap=3.0):
        result = correction_weights(trainer, sampler, weights, correction=correction, level=level, cap=cap)
        return np.round(np.asarray(result[0]), 12).tolist()

    assert factors("none") == [1, 1, 1]
    assert factors("truncate") == [1, 2, 3]
    assert factors("mask") == [1, 2, 0]
    assert factors("mask", "sequence", 20.0) == [16, 16, 16]
    assert factors("mask", "sequence") == [0, 0, 0]


def test_the_mismatch_of_two_programs() -> None:
    """log 2 and 0 nats apart at the tokens that count; the divergence of a ratio of 2 is 2 - 1 - log 2."""
    trainer, sampler = jnp.log(jnp.asarray([[2.0, 1.0, 9.0]])), jnp.zeros((1, 3))
    distance, divergence = mismatch(trainer, sampler, jnp.asarray([[1.0, 1, 0]]))
    assert np.isclose(distance, np.log(2)) and np.isclose(divergence, 1 - np.log(2))


def test_garbage_at_untrained_tokens_reaches_nothing() -> None:
    """Trap 24: every output and gradient is the same, bit for bit, whatever stands after the end."""
    random = np.random.default_rng(0)
    policy, old, reference, gains = (jnp.asarray(random.standard_normal((2, 5))) for _ in range(4))
    weights = jnp.asarray([[0.0, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    options = itertools.product(("token", "sequence"), ("k3", "unbiased"))
    for ratio, kind in options:

        def run(garbage, ratio=ratio, kind=kind):
            arrays = [jnp.where(weights == 0, garbage, x) for x in (policy, old, reference)]

            def loss(x):
                result = policy_loss(x, arrays[1], gains, weights, arrays[2], ratio=ratio, kl_kind=kind, kl_weight=0.1)
                return result.loss, result

            return jax.grad(loss, has_aux=True)(arrays[0])

        for a, b in zip(jax.tree.leaves(run(0.0)), jax.tree.leaves(run(-1e6)), strict=True):
            np.testing.assert_array_equal(a, b)

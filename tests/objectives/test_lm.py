"""The blockwise loss against the plain formula, forward and backward, in float64; and what it never stores.

Shapes: B batch, T length, D width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives.lm import LMLoss, lm_loss

B, T, D, V = 2, 12, 5, 7


def inputs(dtype=None) -> tuple[jax.Array, ...]:
    random = np.random.default_rng(0)
    hidden, kernel, bias = (jnp.asarray(random.standard_normal(shape), dtype) for shape in ((B, T, D), (D, V), (V,)))
    targets = jnp.asarray(random.integers(0, V, (B, T)), jnp.int32).at[0, 0].set(V - 1)
    weights = jnp.asarray(random.random((B, T)), dtype).at[0, :4].set(0).at[1, -1].set(0)
    return hidden, kernel, bias, targets, weights


def plain(hidden, kernel, bias, targets, weights, z_loss=0.0, label_smoothing=0.0) -> LMLoss:
    """The formula of the docstring, with every logit at once."""
    logits = hidden @ kernel + (0 if bias is None else bias)
    partition = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    smooth = partition - logits.mean(-1)
    loss = (1 - label_smoothing) * (partition - picked) + label_smoothing * smooth + z_loss * partition**2
    terms = (loss, partition - picked, logits.argmax(-1) == targets, jnp.ones_like(loss))
    return LMLoss(*(jnp.sum(term * weights) for term in terms))


@pytest.mark.parametrize("block", [1, 2, 5, 8, 24, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 0.1}, {"label_smoothing": 0.2}, {"z_loss": 0.1, "label_smoothing": 0.2}]
)
def test_the_loss_is_the_formula(block: int, with_bias: bool, options: dict[str, float]) -> None:
    with jax.enable_x64(True):
        hidden, kernel, bias, targets, weights = inputs()
        learned = (hidden, kernel, bias if with_bias else None)
        got = lm_loss(*learned, targets, weights, block=block, **options)
        expected = plain(*learned, targets, weights, **options)
        np.testing.assert_allclose(got, expected, rtol=1e-12)

        def gradient(loss, **more):
            return jax.grad(lambda args: 3 * loss(*args, targets, weights, **options, **more).loss)(learned)

        for got, expected in zip(
            jax.tree.leaves(gradient(lm_loss, block=block)), jax.tree.leaves(gradient(plain)), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_no_weight_means_no_loss_and_no_gradient() -> None:
    hidden, kernel, bias, targets, weights = inputs()
    loss, gradients = jax.value_and_grad(
        lambda *args: lm_loss(*args, targets, 0 * weights, block=8).loss, argnums=(0, 1, 2)
    )(hidden, kernel, bias)
    assert loss == 0
    assert all(not np.any(gradient) for gradient in gradients)


def test_the_likeliest_token_counts_as_correct() -> None:
    hidden, kernel, bias, targets, weights = inputs()
    targets = jnp.argmax(hidden @ kernel + bias, axis=-1).astype(jnp.int32)
    loss = lm_loss(hidden, kernel, bias, targets, weights, block=8)
    np.testing.assert_allclose(loss.correct, loss.weight)


@pytest.mark.parametrize(("block", "stored"), [(8, False), (B * T, True)])
def test_full_logits_never_exist(block: int, stored: bool) -> None:
    """The compiled gradient holds no array of B T V numbers; with one block it does, so the search can find one."""
    *learned, targets, weights = inputs(jnp.bfloat16)
    step = jax.grad(lambda *args: lm_loss(*args, targets, weights, block=block).loss, argnums=(0, 1, 2))
    text = jax.jit(step).lower(*learned).compile().as_text()
    wanted = {f"[{B},{T},{V}]", f"[{B * T},{V}]", f"[1,{B},{T},{V}]", f"[1,{B * T},{V}]"}
    assert any(shape in text for shape in wanted) == stored

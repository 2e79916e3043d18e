"""Token log-probabilities against the plain formula, what is never stored, and sums that neighbours do not move.

Shapes: B batch, T length, D width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives.logprobs import segment_sums, token_logps

B, T, D, V = 2, 12, 5, 7


def inputs(dtype=None, vocabulary: int = V) -> tuple[jax.Array, ...]:
    random = np.random.default_rng(0)
    shapes = (B, T, D), (D, vocabulary), (vocabulary,)
    hidden, kernel, bias = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    return hidden, kernel, bias, jnp.asarray(random.integers(0, vocabulary, (B, T)), jnp.int32)


def plain(hidden, kernel, bias, targets, temperature):
    """The formula of the docstring, with every logit at once."""
    logp = jax.nn.log_softmax((hidden @ kernel + (0 if bias is None else bias)) / temperature)
    return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0], -jnp.sum(jnp.exp(logp) * logp, axis=-1)


@pytest.mark.parametrize(("block", "temperature", "with_bias"), [(1, 1.0, True), (8, 0.6, True), (1000, 1.7, False)])
def test_the_formula(block: int, temperature: float, with_bias: bool) -> None:
    with jax.enable_x64(True):
        hidden, kernel, bias, targets = inputs()
        learned = (hidden, kernel, bias if with_bias else None)
        slopes = np.random.default_rng(1).standard_normal((2, B, T))

        def whole(function, **options):
            def scalar(learned):
                outputs = function(*learned, targets, temperature=temperature, **options)
                return sum(jnp.sum(x * slope) for x, slope in zip(outputs, slopes, strict=True)), tuple(outputs)

            return jax.tree.leaves(jax.jit(jax.grad(scalar, has_aux=True))(learned))

        for ours, formula in zip(whole(token_logps, block=block), whole(plain), strict=True):
            np.testing.assert_allclose(ours, formula, rtol=1e-11, atol=1e-12)


def test_less_memory_than_the_logits() -> None:
    """At a real vocabulary both passes need less than one array of [B, T, V]; with one block they need more."""
    shape = jax.ShapeDtypeStruct
    b, t, d, v = 4, 512, 32, 49152
    hidden, kernel, targets = shape((b, t, d), "float32"), shape((d, v), "float32"), shape((b, t), "int32")

    def temporary(block: int) -> int:
        def loss(hidden, kernel, targets):
            return sum(x.sum() for x in token_logps(hidden, kernel, None, targets, block=block))

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(block=128) < 4 * b * t * v / 4
    assert temporary(block=b * t) > 4 * b * t * v


def test_sums_of_a_segment_do_not_depend_on_its_neighbours() -> None:
    """Bit for bit, even when the neighbours hold infinities; and a segment that is not there sums to 0."""
    random = np.random.default_rng(0)
    x, weights = random.standard_normal((1, 40)).astype(np.float32), random.random((1, 40)).astype(np.float32)
    segments = np.repeat([[0, 1, 2, 4, 0]], 8, axis=1).astype(np.int32)
    sums = np.asarray(segment_sums(jnp.asarray(x), jnp.asarray(weights), jnp.asarray(segments), 4))
    assert sums[0, 2] == 0
    np.testing.assert_allclose(sums[0, 1], np.sum((x * weights)[segments == 2]), rtol=1e-6)
    weights[segments != 2] = 0
    x[segments != 2] = -np.inf
    again = np.asarray(segment_sums(jnp.asarray(x), jnp.asarray(weights), jnp.asarray(segments), 4))
    assert again[0].tolist() == [0, sums[0, 1], 0, 0]


def test_prompts_get_no_gradient_and_both_sides_of_a_pair_do() -> None:
    """Trap 9: only tokens with a weight move a sum, of chosen and rejected alike."""
    weights = np.array([[0, 0, 1, 1, 0, 0, 1, 0]], np.float32)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2]], np.int32)

    def margin(x):
        chosen, rejected = segment_sums(x, jnp.asarray(weights), jnp.asarray(segments), 2)[0]
        return chosen - rejected

    assert jax.grad(margin)(jnp.ones((1, 8))).tolist() == [[0, 0, 1, 1, 0, 0, -1, 0]]

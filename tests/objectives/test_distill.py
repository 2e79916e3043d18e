"""Distillation: blocks against the whole formula, the limits, and a teacher that is kept as its likeliest tokens.

Shapes: B batch, T length, D width of the student, E of the teacher, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives.distill import States, distill_loss, hidden_loss, states_loss
from jaxlm.objectives.teacher import LikeliestTokens, Teacher, divergence, likeliest_tokens

B, T, D, E, V = 2, 12, 5, 4, 9


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def inputs(dtype=None):
    random = np.random.default_rng(0)
    shapes = (B, T, D), (D, V), (V,), (B, T, E), (E, V), (V,)
    *student, hidden, kernel, bias = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    targets = jnp.asarray(random.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(random.random((B, T)), dtype).at[0, :4].set(0)
    return tuple(student), Teacher(hidden, kernel, bias), targets, weights


def plain(student, teacher, targets, weights, beta, hard_weight, temperature):
    """The formula of the docstring, with every logit at once."""
    hidden, kernel, bias = student
    logits = hidden @ kernel + bias
    p = jax.nn.softmax(logits / temperature)
    q = jax.nn.softmax((teacher.hidden_BTE @ teacher.kernel_EV + teacher.bias_V) / temperature)
    m = beta * q + (1 - beta) * p
    kl = lambda a, b: jnp.sum(a * jnp.log(a / b), axis=-1)  # noqa: E731
    d = kl(q, p) if beta == 0 else kl(p, q) if beta == 1 else beta * kl(q, m) + (1 - beta) * kl(p, m)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.sum((hard_weight * nll + (1 - hard_weight) * temperature**2 * d) * weights)


@pytest.mark.parametrize(("beta", "block"), [(0.0, 8), (1.0, 1000), (0.4, 2)])
def test_the_formula(beta: float, block: int) -> None:
    student, teacher, targets, weights = inputs()
    options = {"beta": beta, "hard_weight": 0.3, "temperature": 1.6}
    ours = jax.value_and_grad(lambda x: 3 * distill_loss(*x, teacher, targets, weights, block=block, **options).loss)
    formula = jax.value_and_grad(lambda x: 3 * plain(x, teacher, targets, weights, **options))
    for a, b in zip(*(jax.tree.leaves(jax.jit(f)(student)) for f in (ours, formula)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_a_student_that_is_its_teacher_learns_nothing_and_a_shift_is_seen() -> None:
    """Trap 29."""
    student, _, targets, weights = inputs()
    same = Teacher(*student)
    for beta in (0.0, 0.5, 1.0):

        def loss(x, teacher, beta=beta):
            return distill_loss(*x, teacher, targets, weights, beta=beta, hard_weight=0.0, block=8).loss

        assert abs(loss(student, same)) < 1e-13
        for slope in jax.tree.leaves(jax.jit(jax.grad(loss))(student, same)):
            np.testing.assert_allclose(slope, 0, atol=1e-14)
        assert loss(student, same._replace(hidden_BTE=jnp.roll(student[0], 1, axis=1))) > 0.1


def test_the_likeliest_tokens() -> None:
    """All V of them give the full loss and gradient to 1e-12; fewer give less, and ever less."""
    student, teacher, targets, weights = inputs()
    options = {"beta": 0.4, "hard_weight": 0.3, "temperature": 1.6, "block": 8}

    @jax.jit
    def run(teacher):
        return jax.value_and_grad(lambda x: distill_loss(*x, teacher, targets, weights, **options).loss)(student)

    keep = jax.jit(likeliest_tokens, static_argnames=("k", "temperature", "block"))
    kept = {k: keep(teacher, k, temperature=1.6, block=6) for k in (1, 4, V)}
    assert isinstance(kept[4], LikeliestTokens) and kept[4].ids_BTK.shape == (B, T, 4)
    total = jnp.exp(kept[4].logps_BTK).sum(-1) + jnp.exp(kept[4].rest_BT)
    np.testing.assert_allclose(total, 1, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(run(teacher)), jax.tree.leaves(run(kept[V])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert run(kept[1])[0] < run(kept[4])[0] < run(teacher)[0]


def test_no_gradient_reaches_the_teacher_and_full_logits_never_exist() -> None:
    student, teacher, targets, weights = inputs()
    slopes = jax.grad(lambda x: distill_loss(*student, x, targets, weights, block=8).loss)(teacher)
    assert not any(slope.any() for slope in jax.tree.leaves(slopes))
    for block, stored in ((8, False), (B * T, True)):
        step = jax.grad(lambda x, block=block: distill_loss(*x, teacher, targets, weights, block=block).loss)
        text = jax.jit(step).lower(student).compile().as_text()
        assert any(f"[{shape},{V}]" in text for shape in (f"{B},{T}", f"{B * T}", f"1,{B},{T}")) == stored


def test_the_middle_divergence_is_symmetric_and_bounded() -> None:
    random = np.random.default_rng(1)
    p, q = (jax.nn.log_softmax(jnp.asarray(5 * random.standard_normal((1, 30, V)))) for _ in range(2))
    middle = divergence(p, q, 0.5)
    np.testing.assert_allclose(middle, divergence(q, p, 0.5), rtol=1e-12)
    assert middle.max() <= np.log(2)


def test_hidden_states() -> None:
    student, teacher, _, weights = inputs()
    projection = jnp.asarray(np.random.default_rng(2).standard_normal((D, E)))
    distance = np.mean((np.asarray(student[0]) @ np.asarray(projection) - np.asarray(teacher.hidden_BTE)) ** 2, -1)
    result = hidden_loss(student[0], teacher.hidden_BTE, projection, weights)
    np.testing.assert_allclose(result, np.sum(distance * weights), rtol=1e-12)


def test_pairs_of_hidden_states_beside_the_target() -> None:
    """a * nll + (1 - a) * the mean over pairs, and its gradient by the student and both projections."""
    student, teacher, targets, weights = inputs()
    random = np.random.default_rng(3)
    maps = tuple(jnp.asarray(random.standard_normal((D, E))) for _ in range(2))
    goals = teacher.hidden_BTE, jnp.asarray(random.standard_normal((B, T, E)))

    def ours(student, maps):
        states = [States(student[0], goal, one) for goal, one in zip(goals, maps, strict=True)]
        return states_loss(*student, states, targets, weights, hard_weight=0.3, block=8).loss

    def formula(student, maps):
        logp = jax.nn.log_softmax(student[0] @ student[1] + student[2])
        nll = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        apart = [jnp.mean((student[0] @ one - goal) ** 2, -1) for goal, one in zip(goals, maps, strict=True)]
        return jnp.sum((0.3 * nll + 0.7 * (apart[0] + apart[1]) / 2) * weights)

    both = (jax.tree.leaves(jax.value_and_grad(f, (0, 1))(student, maps)) for f in (ours, formula))
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)

"""Routing and the experts: every implementation against the readable one, cases worked out by hand, properties.

Shapes: T tokens, D width, F width of one expert, E experts, K experts of one token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import ffn
from jaxlm.ops.moe import experts as moe
from jaxlm.ops.moe import router
from jaxlm.ops.moe.experts import Experts

T, D, F, E, K = 200, 9, 7, 5, 2


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def experts(rng: np.random.Generator, activation: str, dtype: str = "float64") -> Experts:
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    gated = activation.startswith("swiglu")
    gate, gate_bias = (make(E, D, F), make(E, F)) if gated else (None, None)
    return Experts(gate, make(E, D, F), make(E, F, D), gate_bias, make(E, F), make(E, D))


CHOICES = {
    "random": lambda rng: np.argsort(rng.standard_normal((T, E)), axis=1)[:, :K],
    "skewed": lambda rng: np.argsort(rng.standard_normal((T, E)) - 2 * np.arange(E), axis=1)[:, :K],
    "one for all": lambda rng: np.tile([3, 1], (T, 1)),
    "none": lambda rng: np.full((T, K), E),
    "some not carried out": lambda rng: np.where(
        rng.random((T, K)) < 0.3, E, np.argsort(rng.standard_normal((T, E)), axis=1)[:, :K]
    ),
}


def forward_backward(impl: str, activation: str, x, weights, chosen, parameters, dy):
    def run(x, weights, parameters):
        return moe.moe(x, weights, chosen, parameters, activation=activation, impl=impl)

    y, pull = jax.jit(lambda *inputs: jax.vjp(run, *inputs))(x, weights, parameters)
    return y, jax.jit(pull)(dy)


@pytest.mark.parametrize("impl", ["blocks", "ragged"])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_implementation_is_the_naive_one(impl: str, choice: str, rng: np.random.Generator) -> None:
    """Output and all gradients, with experts that nobody chose and with more rows than one large block."""
    activation = "gelu" if choice == "skewed" else "swiglu_clamped"
    parameters = experts(rng, activation)
    x, dy = jnp.asarray(rng.standard_normal((2, T, D)))
    weights, chosen = jnp.asarray(rng.random((T, K))), jnp.asarray(CHOICES[choice](rng))
    assert choice != "one for all" or moe._sizes(T * K, E)[0] < T
    expected = forward_backward("naive", activation, x, weights, chosen, parameters, dy)
    found = forward_backward(impl, activation, x, weights, chosen, parameters, dy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)
    assert choice != "none" or not found[0].any()


@pytest.mark.parametrize("impl", ["naive", "blocks", "ragged"])
def test_bfloat16_sums_are_wide(impl: str, rng: np.random.Generator) -> None:
    """The error against float64 of every tensor is that of rounding to bfloat16, not of adding in it."""
    wide, (x, dy) = experts(rng, "swiglu"), jnp.asarray(rng.standard_normal((2, T, D)))
    weights, chosen = jnp.asarray(rng.random((T, K))), jnp.asarray(CHOICES["one for all"](rng))
    narrow = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)  # noqa: E731
    x, dy, wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), narrow((x, dy, wide)))
    expected = forward_backward("naive", "swiglu", x, weights, chosen, wide, dy)
    args = narrow(x), weights.astype(jnp.float32), chosen, narrow(wide), narrow(dy)
    for a, b in zip(jax.tree.leaves(forward_backward(impl, "swiglu", *args)), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= 0.01 * np.linalg.norm(b)


def test_the_blocks_of_an_expert_waste_little() -> None:
    for rows, n_experts in itertools.product((1, 16, 1000, 8192, 10**6), (2, 8, 64)):
        large, small = moe._sizes(rows, n_experts)
        assert large == 4 * small and 8 <= small <= 128
        assert small == 8 or small * n_experts <= rows / 8


def test_an_unknown_implementation_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="unknown implementation 'loop'"):
        forward_backward(
            "loop", "silu", jnp.ones((1, D)), jnp.ones((1, K)), jnp.zeros((1, K), int), experts(rng, "silu"), None
        )


def test_ties_go_to_the_lower_index() -> None:
    logits = jnp.array([[0.0, 1, 1, 1, 0], [2, 2, 2, 2, 2]])
    assert router.route(logits, top_k=2).experts.tolist() == [[1, 2], [0, 1]]
    grouped = router.route(jnp.zeros((1, 8)), top_k=3, n_groups=4, top_groups=2)
    assert grouped.experts.tolist() == [[0, 1, 2]]


def test_scores_by_hand() -> None:
    logits = jnp.log(jnp.array([[1.0, 2, 5, 2]]))
    softmax = router.route(logits, top_k=2, renormalize=False, scale=3.0)
    np.testing.assert_allclose(softmax.weights, [[1.5, 0.6]])
    np.testing.assert_allclose(router.route(logits, top_k=2).weights, [[5 / 7, 2 / 7]])
    sigmoid = router.route(logits, jnp.array([0.5, 0, 0, 0]), top_k=2, router="sigmoid", renormalize=False)
    assert sigmoid.experts.tolist() == [[0, 2]]  # by 1/2 + 0.5 and 5/6
    np.testing.assert_allclose(sigmoid.weights, [[1 / 2, 5 / 6]])  # without the bias


def test_the_selection_bias_has_no_gradient_and_the_noise_has(rng: np.random.Generator) -> None:
    logits, noise, normal = jnp.asarray(rng.standard_normal((3, T, E)))

    def total(logits: jax.Array, bias: jax.Array, noise: jax.Array) -> jax.Array:
        noisy = router.add_noise(logits, noise, normal)
        return jnp.sum(router.route(noisy, bias, top_k=K, renormalize=False).weights ** 2)

    dlogits, dbias, dnoise = jax.grad(total, argnums=(0, 1, 2))(logits, jnp.zeros(E), noise)
    assert not dbias.any() and dlogits.any() and dnoise.any()


def test_every_set_of_allowed_groups_leaves_a_choice(rng: np.random.Generator) -> None:
    """Groups of 2, 2 of them kept, 3 experts: all C(4, 2) C(4, 3) sets occur, not one for each pair of groups."""
    routing = router.route(jnp.asarray(rng.standard_normal((4000, 8))), top_k=3, n_groups=4, top_groups=2)
    sets = {tuple(sorted(row)) for row in np.asarray(routing.experts).tolist()}
    assert len(sets) == 6 * 4
    assert all(len({expert // 2 for expert in chosen}) == 2 for chosen in sets)


def test_the_groups_are_those_with_the_two_best_scores(rng: np.random.Generator) -> None:
    logits, bias = rng.standard_normal((50, 12)), rng.standard_normal(12)
    found = router.route(jnp.asarray(logits), jnp.asarray(bias), top_k=4, router="sigmoid", n_groups=3, top_groups=2)
    biased = 1 / (1 + np.exp(-logits)) + bias
    for row, chosen in zip(biased, np.asarray(found.experts), strict=True):
        groups = np.sort(row.reshape(3, 4), axis=1)[:, -2:].sum(axis=1)
        row = np.where(np.repeat(groups > groups.min(), 4), row, -np.inf)
        assert chosen.tolist() == np.argsort(-row)[:4].tolist()


def routed(logits: jax.Array, real: jax.Array, factor: float = 0.0) -> router.Balance:
    chosen = router.mask_padding(router.route(logits, top_k=K), real)
    kept = router.drop_overflow(chosen, factor) if factor else chosen
    return router.balance(logits, chosen, kept, real)


def test_uniform_use_is_the_minimum_of_the_losses() -> None:
    """Each token loves two neighbours, all pairs of neighbours equally often."""
    tokens = jnp.arange(10 * E) % E
    logits = 3.0 * (jax.nn.one_hot(tokens, E) + jax.nn.one_hot((tokens + 1) % E, E))
    terms = routed(logits, jnp.ones(10 * E, bool))
    assert terms.load.tolist() == [20] * E
    np.testing.assert_allclose(terms.balance, 1)
    np.testing.assert_allclose(terms.importance, 0, atol=1e-15)
    skewed = routed(logits + jnp.arange(E), jnp.ones(10 * E, bool))
    assert skewed.balance > 1.2 and skewed.importance > 0.1
    np.testing.assert_allclose(routed(jnp.zeros((4, E)), jnp.ones(4, bool)).entropy, np.log(E))


def test_scores_of_zero_have_no_entropy_in_bfloat16() -> None:
    """x log x of 0 is 0 and not NaN: the smallest number is that of the dtype."""
    logits = jnp.asarray([[0.0, -1e4], [0.0, -1e4]], "bfloat16")
    routing = router.route(logits, top_k=1)
    assert router.balance(logits, routing, routing, jnp.ones(2, bool)).entropy == 0


@pytest.mark.parametrize("term", ["balance", "importance", "z", "entropy"])
def test_the_terms_train_the_router_that_is_used(term: str, rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.standard_normal((T, E)) + np.arange(E))
    slope = jax.grad(lambda logits: getattr(routed(logits, jnp.ones(T, bool)), term))(logits)
    step = 1.0 if term == "entropy" else -1.0
    after = logits + step * 1e-3 * slope / jnp.linalg.norm(slope)
    change = getattr(routed(after, jnp.ones(T, bool)), term) - getattr(routed(logits, jnp.ones(T, bool)), term)
    assert step * change > 0


def test_padding_counts_nowhere(rng: np.random.Generator) -> None:
    logits, real = jnp.asarray(rng.standard_normal((T, E))), jnp.arange(T) % 3 != 0
    alone = routed(logits[real], jnp.ones(int(real.sum()), bool))
    padded = routed(jnp.where(real[:, None], logits, 100.0), real)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), padded, alone)
    assert padded.load.sum() == K * real.sum()
    nobody = routed(logits, jnp.zeros(T, bool))
    assert not nobody.load.any() and all(np.isfinite(term) for term in nobody[2:])


def test_drops_are_the_last_in_the_order_of_the_tokens(rng: np.random.Generator) -> None:
    """Capacity 1.0 x 12 tokens x 2 / 4 experts = 6 places; padding takes none."""
    chosen = np.array([[0, t % 3 + 1] for t in range(12)])
    routing = router.Routing(jnp.ones((12, 2)), jnp.asarray(chosen), *[jnp.ones((12, 4))] * 2)
    routing = router.mask_padding(routing, jnp.arange(12) != 2)
    kept = np.asarray(router.drop_overflow(routing, 1.0).experts)
    assert kept[:, 0].tolist() == [0, 0, 4, 0, 0, 0, 0, 4, 4, 4, 4, 4]
    assert kept[:, 1].tolist() == [1, 2, 4, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    terms = router.balance(jnp.zeros((12, 4)), routing, router.drop_overflow(routing, 1.0), jnp.arange(12) != 2)
    assert terms.dropped == 5 and terms.load.tolist() == [11, 4, 4, 3]
    assert router.drop_overflow(routing, 100.0).experts.tolist() == routing.experts.tolist()


def test_the_clamp_by_hand() -> None:
    gate, up = jnp.array([1.0, 9, 9, -9]), jnp.array([2.0, 9, -9, 0.5])
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    expected = [3 * sigmoid(1.702), 56 * sigmoid(11.914), -42 * sigmoid(11.914), -13.5 * sigmoid(-15.318)]
    np.testing.assert_allclose(ffn.swiglu_clamped(gate, up), expected)
    slopes = jax.grad(lambda gate, up: ffn.swiglu_clamped(gate, up).sum(), argnums=(0, 1))(gate, up)
    assert [bool(slope) for slope in slopes[0]] == [True, False, False, True]
    assert [bool(slope) for slope in slopes[1]] == [True, False, False, True]

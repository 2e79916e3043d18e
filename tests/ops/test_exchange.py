"""The exchange of tokens among 8 devices against one device, and what it moves.

Shapes: T tokens, D width, F width of one expert, E experts, K experts of one token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxlm.ops.moe import exchange
from jaxlm.ops.moe import experts as moe
from jaxlm.plan.hlo.collectives import collectives
from jaxlm.plan.hlo.program import parse

T, D, F, E, K = 8 * 48, 5, 3, 16, 2
LOCAL = E // 8


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def chosen(rng: np.random.Generator, slope: float = 0.0) -> np.ndarray:
    """K different experts of each token, the first ones preferred by `slope`."""
    return np.argsort(rng.gumbel(size=(T, E)) - slope * np.arange(E), axis=1)[:, :K]


def even(rng: np.random.Generator) -> np.ndarray:
    """Every device sends every device equally many."""
    return (np.arange(T)[:, None] + E // K * np.arange(K)) % E


CHOICES = {
    "even": even,
    "random": chosen,
    "skewed": lambda rng: np.where(rng.random((T, 1)) < 0.1, E, chosen(rng, 1.0)),
    "one device for all": lambda rng: np.tile([7, 6], (T, 1)),
    "none": lambda rng: np.full((T, K), E),
}


def rounds(experts: np.ndarray) -> int:
    """Further rounds that a choice needs, counted by hand."""
    pairs = [np.bincount(part[part < E] // LOCAL, minlength=8).max() for part in experts.reshape(8, -1)]
    first, further = exchange.sizes(T // 8, K, devices=8, n_local=LOCAL)
    return max(0, -(-(max(pairs) - first) // further))


def forward_backward(run: Any) -> Any:
    """Output and gradients, as a jitted function of the arguments of `run` and the gradient of its output."""

    def both(x: Any, weights: Any, experts: Any, parameters: moe.Experts, dy: Any) -> Any:
        y, pull = jax.vjp(lambda x, weights, parameters: run(x, weights, experts, parameters), x, weights, parameters)
        return y, pull(dy)

    return jax.jit(both)


@functools.cache
def alone() -> Any:
    """`moe.moe` on one device."""
    return forward_backward(functools.partial(moe.moe, activation="swiglu", impl="ragged"))


def sent(kind: str) -> Any:
    """`moe.moe` on 8 devices that hold 2 experts each."""
    compute = functools.partial(moe.moe, activation="swiglu", impl="ragged")
    send: Any = functools.partial(getattr(exchange, kind), compute, n_local=LOCAL, axis="expert")
    if kind == "all_to_all":
        send = functools.partial(send, together=("expert",))
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("expert")
    return jax.shard_map(send, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)


def differences(run: Any, choice: str, rng: np.random.Generator) -> float:
    """The largest difference between 8 devices and one, of the output and of any gradient, over its norm."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
    biases = normal(E, F), normal(E, F), normal(E, D)
    parameters = moe.Experts(normal(E, D, F), normal(E, D, F), normal(E, F, D), *biases)
    experts = jnp.asarray(CHOICES[choice](rng), jnp.int32)
    arguments = normal(T, D), jnp.asarray(rng.random((T, K))), experts, parameters, normal(T, D)
    pairs = zip(jax.tree.leaves(run(*arguments)), jax.tree.leaves(alone()(*arguments)), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1)) for a, b in pairs)


def test_devices_that_exchange_tokens_compute_what_one_does(rng: np.random.Generator) -> None:
    run = forward_backward(sent("all_to_all"))
    needed = {choice: rounds(CHOICES[choice](rng)) for choice in CHOICES}
    assert needed["even"] == needed["none"] == 0 and needed["random"] and needed["skewed"] > 3
    for choice in CHOICES:
        assert differences(run, choice, rng) < 1e-12, choice


def test_devices_that_gather_tokens_compute_what_one_does(rng: np.random.Generator) -> None:
    assert differences(forward_backward(sent("gather")), "skewed", rng) < 1e-12


def unfinished(original: Any) -> Any:
    return lambda send, where, start, body: start


def overlapping(original: Any) -> Any:
    return lambda send, begin, *rest: original(send, jnp.maximum(begin - 1, 0), *rest)


@pytest.mark.parametrize(("name", "fault"), [("_further", unfinished), ("_round", overlapping)])
def test_a_fault_in_the_exchange_is_seen(
    name: str, fault: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds left out, and rows sent twice."""
    monkeypatch.setattr(exchange, name, fault(getattr(exchange, name)))
    assert differences(forward_backward(sent("all_to_all")), "skewed", rng) > 1e-3


def test_the_rounds_have_room_for_all_and_no_more() -> None:
    """1.25 of the mean and a quarter of it, in eights; of 3 tokens no device gets more than 3."""
    assert exchange.sizes(4096, 2, devices=8, n_local=4) == (1280, 256)
    assert exchange.sizes(100, 2, devices=8, n_local=4) == (32, 8)
    assert exchange.sizes(3, 2, devices=8, n_local=1) == (3, 3)


def moved(kind: str, tokens: int, width: int, top_k: int) -> tuple[int, int]:
    """Bytes that one device sends, forward and backward: in the first round, and in a further one."""
    compute = lambda x, weights, experts, own: x * jnp.sum(weights, axis=1, keepdims=True) * own  # noqa: E731
    send: Any = functools.partial(getattr(exchange, kind), compute, n_local=LOCAL, axis="expert")
    if kind == "all_to_all":
        send = functools.partial(send, together=("expert",))
    mesh, split = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,)), PartitionSpec("expert")
    run = jax.shard_map(send, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
    arguments = shape(tokens, width), shape(tokens, top_k), shape(tokens, top_k, dtype=jnp.int32), shape(8)
    step = jax.jit(jax.grad(lambda *arguments: jnp.sum(run(*arguments) ** 2), argnums=(0, 1, 3)))
    found = collectives(parse(step.lower(*arguments).compile().as_text()), {"expert": 8})
    assert not any(one.times > 1 for one in found)
    further = sum(one.moved for one in found if "while" in one.op_name)
    return sum(one.moved for one in found) - further, further


@pytest.mark.parametrize("top_k", [1, 4])
def test_all_to_all_moves_the_share_of_the_tokens_that_a_device_computes(top_k: int) -> None:
    """1.25 K / P of what gathering moves: rows of 256 numbers, beside which weights and indices are small."""
    (first, further), (gathered, _) = (moved(kind, 8 * 256, 256, top_k) for kind in ("all_to_all", "gather"))
    assert first / gathered == pytest.approx(1.25 * top_k / 8, rel=0.03)
    assert further / gathered == pytest.approx(5 / 4 * 0.25 * top_k / 8, rel=0.03)  # x is sent again for the gradient

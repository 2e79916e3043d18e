"""The grouped matrix products against a loop over the groups, forward and backward.

Pallas interprets the TPU's kernel here; `tests/aot` compiles it. Shapes: R rows, G groups, D inputs, F outputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.moe import experts as moe
from jaxlm.ops.moe import grouped_matmul

R, G, D, F = 100, 4, 9, 7
SIZES = {"uneven": [3, 0, 70, 20], "full": [25, 25, 25, 25], "first alone": [40, 0, 0, 0], "none": [0, 0, 0, 0]}


def by_hand(x: np.ndarray, kernels: np.ndarray, sizes: list[int], dy: np.ndarray) -> tuple[np.ndarray, ...]:
    """Product, gradient of the rows, gradient of the kernels: float64."""
    y, dx, dkernels = np.zeros((R, F)), np.zeros((R, D)), np.zeros((G, D, F))
    ends = np.cumsum(sizes)
    for g, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        rows = slice(start, end)
        y[rows], dx[rows], dkernels[g] = x[rows] @ kernels[g], dy[rows] @ kernels[g].T, x[rows].T @ dy[rows]
    return y, dx, dkernels


def errors(impl: str, dtype: str, rng: np.random.Generator) -> dict[str, float]:
    """For each split, the largest error of the product and its gradients over their norm."""
    cut = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), dtype).astype("float32"), float)  # noqa: E731
    x, kernels, dy = cut(R, D), cut(G, D, F), cut(R, F)

    @jax.jit
    def run(x: Any, kernels: Any, sizes: Any, dy: Any) -> Any:
        product = lambda x, kernels: grouped_matmul.grouped_dot(x, kernels, sizes, impl=impl, dtype=jnp.float32)  # noqa: E731
        y, pull = jax.vjp(product, x, kernels)
        return y, *pull(dy)

    found = {}
    for name, sizes in SIZES.items():
        got = run(jnp.asarray(x, dtype), jnp.asarray(kernels, dtype), jnp.asarray(sizes), jnp.asarray(dy, jnp.float32))
        assert [one.dtype for one in got] == [jnp.float32, dtype, dtype]
        pairs = zip(got, by_hand(x, kernels, sizes, dy), strict=True)
        found[name] = max(np.linalg.norm(np.asarray(a, float) - b) / max(np.linalg.norm(b), 1) for a, b in pairs)
    return found


@pytest.mark.parametrize("impl", grouped_matmul.GROUPED)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_the_product_of_each_group(
    impl: str, dtype: str, bound: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several tiles along every side, none of which comes out even; bfloat16 is rounded once."""
    monkeypatch.setattr(grouped_matmul, "tiles", lambda *sizes: (32, 8, 4))
    assert max(errors(impl, dtype, rng).values()) < bound


def test_tiles_are_as_large_as_the_product_needs() -> None:
    assert grouped_matmul.tiles(16384, 2048, 1408, 2) == (512, 1024, 1024)
    assert grouped_matmul.tiles(16384, 2048, 1408, 4) == (512, 512, 512)
    assert grouped_matmul.tiles(100, 200, 7, 2) == (128, 256, 128)


def test_experts_by_the_kernel_of_the_tpu(rng: np.random.Generator) -> None:
    """A mixture with biases, of which some assignments are not carried out: the error is that of the naive sum."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    biases = normal(G, F), normal(G, F), normal(G, D)
    parameters = moe.Experts(normal(G, D, F), normal(G, D, F), normal(G, F, D), *biases)
    chosen = np.where(rng.random((R, 2)) < 0.3, G, np.argsort(rng.random((R, G)), axis=1)[:, :2])
    arguments = normal(R, D), jnp.asarray(rng.random((R, 2)), jnp.float32), parameters
    dy, leaves = normal(R, D), {}
    for impl, wide in (("megablox", False), ("naive", False), ("naive", True)):
        with jax.enable_x64(wide):
            kind = jnp.float64 if wide else jnp.float32
            inputs, dy_kind = jax.tree.map(lambda a, kind=kind: a.astype(kind), (arguments, dy))
            op = functools.partial(moe._grouped, impl) if impl == "megablox" else functools.partial(moe.moe, impl=impl)
            run = lambda x, w, p, op=op: op(x, w, jnp.asarray(chosen), p, activation="swiglu")  # noqa: E731
            y, pull = jax.vjp(jax.jit(run), *inputs)
            leaves[impl, wide] = [np.asarray(leaf, float) for leaf in jax.tree.leaves((y, pull(dy_kind)))]
    golden = leaves.pop(("naive", True))
    ours, naive = ([np.linalg.norm(a - b) for a, b in zip(one, golden, strict=True)] for one in leaves.values())
    assert all(a <= 2 * b for a, b in zip(ours, naive, strict=True))

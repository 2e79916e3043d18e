"""Rung 1, options of attention: both frameworks, forward and backward, in float64; each planted fault is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm import config
from jaxlm.models import cache as jax_cache
from jaxlm.ops import rope as jax_rope
from jaxlm.ops.attention import attend as jax_ops
from jaxlm.ops.attention import visible as jax_visible
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64
from torch_ref.models import cache as torch_cache
from torch_ref.ops import rope as torch_rope
from torch_ref.ops.attention import attend as torch_ops

B, T, N, K, H, M = 2, 200, 4, 2, 6, 3
QKV = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
OPTIONS = [{"window": 2}, {"window": 17}, {"window": 500}, {"softcap": 1.5}, {"window": 17, "softcap": 1.5}]


def both(jax_op: Callable, torch_op: Callable, shapes: list[tuple[int, ...]], rng: np.random.Generator) -> None:
    """Both ops on the same random inputs and cotangents: outputs and gradients of the inputs."""
    all_of(jax_op, {"": torch_op}, shapes, rng)


def all_of(
    jax_op: Callable, torch_ops: dict[str, Callable], shapes: list[tuple[int, ...]], rng: np.random.Generator
) -> None:
    """`both` for each op of torch."""
    arrays = [rng.standard_normal(shape) for shape in shapes]

    def flat(out: Any) -> tuple:
        return tuple(out) if isinstance(out, tuple) else (out,)

    cotangents: list[np.ndarray] = []

    @jax.jit
    def run(cotangents: Any, *arrays: jax.Array) -> tuple:
        out, pull = jax.vjp(lambda *x: flat(jax_op(*x)), *arrays)
        return *out, *pull(tuple(cotangents))

    for told, torch_op in torch_ops.items():
        inputs = [torch.tensor(x, requires_grad=True) for x in arrays]
        ours = flat(torch_op(*inputs))
        cotangents = cotangents or [rng.standard_normal(x.shape) for x in ours]
        gradients = torch.autograd.grad(ours, inputs, [torch.tensor(x) for x in cotangents])
        names = [f"{told}output {i}" for i in range(len(ours))] + [f"{told}gradient {i}" for i in range(len(inputs))]
        for name, a, b in zip(names, (*ours, *gradients), run(cotangents, *arrays), strict=True):
            FLOAT64.check(pairs.error(a.detach().numpy(), np.asarray(b)), name)


def places(rng: np.random.Generator) -> tuple[Any, Any]:
    """Packed documents with padding on both sides, as places of each framework."""
    batch = pairs.packed_batch(pairs.model(), rng, T)
    keys = batch["positions"], batch["segments"]
    return jax_visible.Places(*map(jnp.asarray, keys)), torch_ops.Places(*map(torch.tensor, keys))


def finite(mixed: Any, where: Callable) -> tuple:
    """Log-sum-exp of -inf, where nothing is seen, has no difference to another; zero has."""
    return mixed.out, where(mixed.lse > -1e300, mixed.lse, 0.0)


@pytest.mark.parametrize("impl", ["xla", "blockwise"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention(impl: str, options: dict[str, Any], rng: np.random.Generator) -> None:
    """Each kernel of jaxlm that runs on the CPU against each of torch."""
    ours, theirs = places(rng)
    mirrors = {
        f"{to} ": lambda *x, to=to: torch_ops.attention(*x, theirs, theirs, impl=to, aligned=True, **options)
        for to in ("xla", "blockwise", "cudnn", "auto")
    }
    all_of(lambda *x: jax_ops.attention(*x, ours, ours, impl=impl, aligned=True, **options), mirrors, QKV, rng)


@pytest.mark.parametrize("impl", ["xla", "blockwise"])
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
def test_attend(impl: str, options: dict[str, Any], rng: np.random.Generator) -> None:
    ours, theirs = places(rng)
    both(
        lambda *x: finite(jax_ops.attend(*x, ours, ours, impl=impl, aligned=True, **options), jnp.where),
        lambda *x: finite(torch_ops.attend(*x, theirs, theirs, impl=impl, aligned=True, **options), torch.where),
        QKV,
        rng,
    )


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_attend_first(softcap: float, rng: np.random.Generator) -> None:
    (ours, theirs), options = places(rng), {"keep_first": 3, "window": 17, "softcap": softcap}
    both(
        lambda *x: finite(jax_ops.attend_first(*x, ours, **options), jnp.where),
        lambda *x: finite(torch_ops.attend_first(*x, theirs, **options), torch.where),
        QKV,
        rng,
    )


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_all_sinks_merged(softcap: float, rng: np.random.Generator) -> None:
    """Every part and the sink logits, and a row that sees nothing is zero."""
    ours, theirs = places(rng)

    def mix(ops: Any, held: Any, q: Any, k: Any, v: Any, k_M: Any, v_M: Any, logits: Any, dtype: Any) -> Any:
        parts = [
            ops.attend(q, k, v, held, held, window=17, softcap=softcap, aligned=True),
            ops.attend_first(q, k, v, held, keep_first=3, window=17, softcap=softcap),
            ops.attend_sinks(q, k_M, v_M, held.segments, softcap=softcap),
        ]
        return (jax_visible if ops is jax_ops else ops).merge(parts, logits, dtype)

    both(
        lambda *x: mix(jax_ops, ours, *x, jnp.float64),
        lambda *x: mix(torch_ops, theirs, *x, torch.float64),
        [*QKV, (M, K, H), (M, K, H), (N,)],
        rng,
    )
    x = [torch.tensor(rng.standard_normal(shape)) for shape in (*QKV, (M, K, H), (M, K, H), (N,))]
    assert (mix(torch_ops, theirs, *x, torch.float64)[theirs.segments == 0] == 0).all()


@pytest.mark.parametrize("options", [{"window": 17}, {"beyond": 17}, {"window": 50, "beyond": 9, "softcap": 1.5}])
def test_cached_attend(options: dict[str, Any], rng: np.random.Generator) -> None:
    """Fewer queries than keys, and keys whose order is not that of their positions."""
    jax_keys, torch_keys = places(rng)
    order, ask = rng.permutation(T), [3, 40, 199, 100, 12]
    jax_queries = jax_visible.Places(*(x[:, np.array(ask)] for x in jax_keys))
    torch_queries = torch_ops.Places(*(x[:, ask] for x in torch_keys))
    jax_keys = jax_visible.Places(*(x[:, order] for x in jax_keys))
    torch_keys = torch_ops.Places(*(x[:, order] for x in torch_keys))
    both(
        lambda *x: finite(jax_ops.cached_attend(*x, jax_queries, jax_keys, **options), jnp.where),
        lambda *x: finite(torch_ops.cached_attend(*x, torch_queries, torch_keys, **options), torch.where),
        [(B, len(ask), N, H), (B, K, H, T), (B, K, T, H)],
        rng,
    )


SCALINGS = [
    {"kind": "linear", "factor": 3.0},
    {"kind": "ntk", "factor": 3.0},
    {"kind": "llama3", "factor": 3.0, "original_max_seq_len": 64},
    {"kind": "yarn", "factor": 3.0, "original_max_seq_len": 64},
    {"kind": "yarn", "factor": 3.0, "original_max_seq_len": 64, "truncate": False, "attention_factor": 1.3},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("dim", [2, 8, 64])
def test_rotations(scaling: dict[str, Any], dim: int, rng: np.random.Generator) -> None:
    """Bit for bit the same frequencies; tables, and heads that are rotated in part."""
    rope = config.Model(head_dim=dim, rope_theta=5e3, rope_scaling=config.RopeScaling(**scaling)).rope  # pyright: ignore[reportArgumentType]
    assert rope is not None
    np.testing.assert_array_equal(torch_rope.rope_frequencies(*rope), jax_rope.rope_frequencies(*rope))
    jax_places, torch_places = places(rng)
    jax_table = jax_rope.rope_table_of(jax_places.positions, rope, jnp.float64)
    torch_table = torch_rope.rope_table_of(torch_places.positions, rope, torch.float64)
    for a, b in zip(torch_table, jax_table, strict=True):
        FLOAT64.check(pairs.error(a.numpy(), np.asarray(b)), "table")
    for layout in ("half", "interleaved"):
        both(
            lambda x, layout=layout: jax_rope.apply_rope(x, *jax_table, layout=layout),
            lambda x, layout=layout: torch_rope.apply_rope(x, *torch_table, layout=layout),
            [(B, T, N, dim + 5)],
            rng,
        )


def test_a_window_cache_keeps_the_same_in_both(rng: np.random.Generator) -> None:
    """Prefill longer than the window with padding on either side, steps, steps of padding, more tokens at once."""
    ours = torch_cache.WindowCache.empty(3, 4, 2, K, H, torch.float64)
    theirs = jax_cache.WindowCache.empty(3, 4, 2, K, H, jnp.float64)
    steps = [
        ([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0]], [[1] * 6, [0, 0, 1, 1, 1, 0], [0] * 6]),
        ([[6], [3], [0]], [[1], [1], [1]]),
        ([[0], [0], [1]], [[0], [0], [1]]),
        ([[7], [4], [2]], [[1], [1], [1]]),
        ([[8, 9, 0], [5, 6, 7], [0, 3, 4]], [[1, 1, 0], [1, 1, 1], [0, 1, 1]]),
    ]
    for positions, segments in steps:
        where = [np.array(x, np.int32) for x in (positions, segments)]
        k, v = rng.standard_normal((2, 3, where[0].shape[1], K, H))
        seen, ours = ours.extend(torch.tensor(k), torch.tensor(v), torch_ops.Places(*map(torch.tensor, where)))
        other, theirs = theirs.extend(jnp.asarray(k), jnp.asarray(v), jax_visible.Places(*map(jnp.asarray, where)))
        for a, b in zip((*seen, *ours.window, *ours.first), (*other, *theirs.window, *theirs.first), strict=True):
            np.testing.assert_array_equal(a.numpy(), np.asarray(b))
    assert [sorted(row) for row in ours.window.positions.tolist()] == [[6, 7, 8, 9], [4, 5, 6, 7], [1, 2, 3, 4]]
    assert ours.first.positions.tolist() == [[0, 1], [0, 1], [0, 1]]


# Planted faults: what torch is told.
def attend_torch(**options: Any) -> Callable:
    def op(held: Any, *x: torch.Tensor) -> Any:
        wrong = {"window": 17, "softcap": 1.5} | options
        return torch_ops.attention(*x, held, held, **wrong)

    return op


def sinks_rotated(held: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    table = torch_rope.rope_table(held.positions, torch_rope.rope_frequencies(H, 1e4), torch.float64)
    rotated = torch_rope.apply_rope(q, *table, layout="half")
    return torch_ops.attend_sinks(rotated, k[0, :M], v[0, :M], held.segments).out


def sink_with_a_value(held: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """The logit joins the denominator of one kernel and is forgotten: the sink is dropped."""
    return torch_ops.merge([torch_ops.attend(q, k, v, held, held)], None, torch.float64)


FAULTS: dict[str, tuple[Callable, Callable]] = {
    "window of one token more": (
        lambda held, *x: jax_ops.attention(*x, held, held, window=17, softcap=1.5),
        attend_torch(window=18),
    ),
    "no window": (
        lambda held, *x: jax_ops.attention(*x, held, held, window=17, softcap=1.5),
        attend_torch(window=0),
    ),
    "another soft cap": (
        lambda held, *x: jax_ops.attention(*x, held, held, window=17, softcap=1.5),
        attend_torch(softcap=1.5001),
    ),
    "sink tokens with positions": (
        lambda held, q, k, v: jax_ops.attend_sinks(q, k[0, :M], v[0, :M], held.segments).out,
        sinks_rotated,
    ),
    "sink logits dropped": (
        lambda held, *x: jax_visible.merge([jax_ops.attend(*x, held, held)], jnp.zeros(N), jnp.float64),
        sink_with_a_value,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, rng: np.random.Generator) -> None:
    (ours, theirs), (jax_op, torch_op) = places(rng), FAULTS[fault]
    with pytest.raises(AssertionError, match="output 0: error"):
        both(lambda *x: jax_op(ours, *x), lambda *x: torch_op(theirs, *x), QKV, rng)

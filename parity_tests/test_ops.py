"""Rung 1: every op of both frameworks, forward and backward, in float64; each planted fault is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm.models import cache as jax_cache
from jaxlm.objectives import lm as jax_lm
from jaxlm.ops import ffn as jax_ffn
from jaxlm.ops import norm as jax_norm
from jaxlm.ops import rope as jax_rope
from jaxlm.ops.attention import attend as jax_attention
from jaxlm.ops.attention import visible as jax_visible
from parity_tests import pairs, tolerances
from parity_tests.tolerances import ATTENTION_KERNELS, FLOAT64, Bound
from torch_ref.models import cache as torch_cache
from torch_ref.objectives import lm as torch_lm
from torch_ref.ops import ffn as torch_ffn
from torch_ref.ops import norm as torch_norm
from torch_ref.ops import rope as torch_rope
from torch_ref.ops.attention import attend as torch_attention

CFG = pairs.model()
B, T, N, K, H = 2, 200, 4, 2, 6


def forward_backward(op: Callable, arrays: list[np.ndarray], cotangent: np.ndarray) -> list[np.ndarray]:
    """Output and gradients of a jaxlm op."""

    @jax.jit
    def run(cotangent: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(op, *arrays)
        return out, *pull(cotangent)

    return [np.asarray(x) for x in run(cotangent, *arrays)]


def forward_backward_torch(op: Callable, arrays: list[np.ndarray], cotangent: np.ndarray) -> list[np.ndarray]:
    """Output and gradients of a torch_ref op."""
    inputs = [torch.tensor(x, requires_grad=True) for x in arrays]
    out = op(*inputs)
    gradients = torch.autograd.grad(out, inputs, torch.tensor(cotangent))
    return [x.detach().numpy() for x in (out, *gradients)]


def compare(a: list[np.ndarray], b: list[np.ndarray], bound: Bound = FLOAT64) -> None:
    """Output and each gradient within the bound."""
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        bound.check(pairs.error(x, y), f"gradient {i - 1}" if i else "output")


def op_parity(jax_op: Callable, torch_op: Callable, shapes: list[tuple[int, ...]], rng: np.random.Generator) -> None:
    """Both ops on the same random inputs and cotangent; the output has the shape of the first input."""
    arrays = [rng.standard_normal(shape) for shape in shapes]
    cotangent = rng.standard_normal(shapes[0])
    compare(forward_backward_torch(torch_op, arrays, cotangent), forward_backward(jax_op, arrays, cotangent))


def places(rng: np.random.Generator) -> tuple[Any, Any]:
    """Packed documents with padding on both sides, as places of each framework."""
    batch = pairs.packed_batch(CFG, rng, T)
    keys = batch["positions"], batch["segments"]
    return jax_visible.Places(*map(jnp.asarray, keys)), torch_attention.Places(*map(torch.tensor, keys))


def test_bounds_hold_what_was_measured() -> None:
    entries = [e for x in vars(tolerances).values() for e in (x.values() if isinstance(x, dict) else [x])]
    bounds = [entry for entry in entries if isinstance(entry, Bound)]
    assert len(bounds) >= 10
    assert all(0 <= bound.measured < bound.allowed and bound.reason for bound in bounds)


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.1])
def test_norms(eps: float, rng: np.random.Generator) -> None:
    shapes = [(3, 5, 17), (17,), (17,)]
    op_parity(
        lambda x, s: jax_norm.rms_norm(x, s, eps=eps), lambda x, s: torch_norm.rms_norm(x, s, eps=eps), shapes[:2], rng
    )
    op_parity(lambda *x: jax_norm.layer_norm(*x, eps=eps), lambda *x: torch_norm.layer_norm(*x, eps=eps), shapes, rng)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rope(layout: str, rng: np.random.Generator) -> None:
    jax_places, torch_places = places(rng)
    frequencies = jax_rope.rope_frequencies(H, 5e5)
    np.testing.assert_array_equal(torch_rope.rope_frequencies(H, 5e5), frequencies)
    jax_table = jax_rope.rope_table(jax_places.positions, frequencies, jnp.float64)
    torch_table = torch_rope.rope_table(torch_places.positions, frequencies, torch.float64)
    for a, b in zip(torch_table, jax_table, strict=True):
        FLOAT64.check(pairs.error(a.numpy(), np.asarray(b)), "table")
    op_parity(
        lambda x: jax_rope.apply_rope(x, *jax_table, layout=layout),
        lambda x: torch_rope.apply_rope(x, *torch_table, layout=layout),
        [(B, T, N, H)],
        rng,
    )


@pytest.mark.parametrize("width", [8, 9])
def test_sinusoidal_table(width: int) -> None:
    table = jax_rope.sinusoidal_table(33, width)
    assert table.shape == (33, width)
    np.testing.assert_array_equal(torch_rope.sinusoidal_table(33, width), table)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations(name: str, rng: np.random.Generator) -> None:
    op_parity(lambda x: jax_ffn.activate(name, 4 * x), lambda x: torch_ffn.activate(name, 4 * x), [(7, 33)], rng)


def test_swiglu(rng: np.random.Generator) -> None:
    op_parity(jax_ffn.swiglu, torch_ffn.swiglu, [(7, 33), (7, 33)], rng)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_attention(n_kv_heads: int, rng: np.random.Generator) -> None:
    """Each kernel of torch against each kernel of jaxlm that runs on the CPU."""
    jax_places, torch_places = places(rng)
    shapes = [(B, T, N, H), (B, T, n_kv_heads, H), (B, T, n_kv_heads, H)]
    arrays = [rng.standard_normal(shape) for shape in shapes]
    cotangent = rng.standard_normal(shapes[0])
    results = []
    for impl in ("xla", "blockwise"):

        def op(*x: jax.Array, impl: str = impl) -> jax.Array:
            return jax_attention.attention(*x, jax_places, jax_places, impl=impl, aligned=True)

        results.append(forward_backward(op, arrays, cotangent))
    for impl in ("xla", "blockwise", "cudnn", "auto"):

        def torch_op(*x: torch.Tensor, impl: str = impl) -> torch.Tensor:
            return torch_attention.attention(*x, torch_places, torch_places, impl=impl, aligned=True)

        for result in results:
            compare(forward_backward_torch(torch_op, arrays, cotangent), result)


@pytest.mark.parametrize("torch_impl", ["xla", "blockwise"])
def test_attention_to_other_tokens(torch_impl: str, rng: np.random.Generator) -> None:
    """Queries of a cache: fewer than the keys, whose order is not that of their positions."""
    jax_keys, torch_keys = places(rng)
    order, ask = rng.permutation(T), [3, 40, 199, 100, 12]
    jax_queries = jax_visible.Places(*(x[:, np.array(ask)] for x in jax_keys))
    torch_queries = torch_attention.Places(*(x[:, ask] for x in torch_keys))
    jax_keys = jax_visible.Places(*(x[:, order] for x in jax_keys))
    torch_keys = torch_attention.Places(*(x[:, order] for x in torch_keys))
    op_parity(
        lambda *x: jax_attention.attention(*x, jax_queries, jax_keys),
        lambda *x: torch_attention.attention(*x, torch_queries, torch_keys, impl=torch_impl),
        [(B, len(ask), N, H), (B, T, K, H), (B, T, K, H)],
        rng,
    )


def test_a_query_that_sees_nothing_gets_zero_and_gives_no_gradient(rng: np.random.Generator) -> None:
    _, torch_places = places(rng)
    padding = torch_places.segments == 0
    for impl in ("xla", "blockwise"):
        x = [torch.tensor(rng.standard_normal((B, T, N, H)), requires_grad=True) for _ in range(3)]
        out = torch_attention.attention(*x, torch_places, torch_places, impl=impl)
        gradients = torch.autograd.grad(out.sum(), x)
        assert (out[padding] == 0).all() and (gradients[0][padding] == 0).all()
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fast_attention_is_as_exact_as_the_reference(dtype: str, rng: np.random.Generator) -> None:
    """Both kernels against float64, forward and backward."""
    _, torch_places = places(rng)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in [(B, T, N, H), (B, T, K, H), (B, T, K, H)]]
    arrays = [torch.tensor(x).to(getattr(torch, dtype)).double().numpy() for x in arrays]
    cotangent = torch.tensor(rng.standard_normal((B, T, N, H))).bfloat16().double().numpy()

    def run(impl: str, to: torch.dtype) -> list[np.ndarray]:
        def op(*x: torch.Tensor) -> torch.Tensor:
            low = (y.to(to) for y in x)
            return torch_attention.attention(*low, torch_places, torch_places, impl=impl).double()

        return forward_backward_torch(op, arrays, cotangent)

    golden = run("xla", torch.float64)
    reference, fast = run("xla", getattr(torch, dtype)), run("auto", getattr(torch, dtype))
    for exact, ours, theirs in zip(golden, reference, fast, strict=True):
        ATTENTION_KERNELS.check(pairs.error(theirs, exact) / pairs.error(ours, exact), "ratio of errors")


@pytest.mark.parametrize(
    ("z_loss", "label_smoothing", "bias", "block"),
    [(0.0, 0.0, False, 1024), (0.0, 0.0, True, 100), (1e-2, 0.0, False, 7), (0.0, 0.1, True, 1), (1e-2, 0.1, True, 64)],
)
def test_lm_loss(z_loss: float, label_smoothing: float, bias: bool, block: int, rng: np.random.Generator) -> None:
    batch = pairs.packed_batch(CFG, rng, T)
    options = {"z_loss": z_loss, "label_smoothing": label_smoothing, "block": block}
    arrays = [rng.standard_normal(shape) for shape in [(B, T, 16), (16, 97), (97,)][: 3 if bias else 2]]
    rest, none = (batch["targets"], batch["weights"]), () if bias else (None,)

    def jax_op(*x: jax.Array) -> jax.Array:
        return jax_lm.lm_loss(*x, *none, *map(jnp.asarray, rest), **options).loss

    def torch_op(*x: torch.Tensor) -> torch.Tensor:
        return torch_lm.lm_loss(*x, *none, *map(torch.tensor, rest), **options).loss

    def dense(*x: torch.Tensor) -> torch.Tensor:
        """The docstring's equations on the full logits, for autograd to differentiate."""
        logits = x[0] @ x[1] + (x[2] if bias else 0)
        logs, z = logits.log_softmax(-1), logits.logsumexp(-1)
        nll = -logs.gather(-1, torch.tensor(rest[0]).long()[..., None])[..., 0]
        loss = (1 - label_smoothing) * nll - label_smoothing * logs.mean(-1) + z_loss * z**2
        return (loss * torch.tensor(rest[1])).sum()

    cotangent = np.array(0.7)
    result = forward_backward_torch(torch_op, arrays, cotangent)
    compare(result, forward_backward(jax_op, arrays, cotangent))
    compare(result, forward_backward_torch(dense, arrays, cotangent))

    ours = torch_lm.lm_loss(*map(torch.tensor, arrays), *none, *map(torch.tensor, rest), **options)
    theirs = jax_lm.lm_loss(*map(jnp.asarray, arrays), *none, *map(jnp.asarray, rest), **options)
    for name in theirs._fields:
        FLOAT64.check(pairs.error(getattr(ours, name).numpy(), np.asarray(getattr(theirs, name))), name)


def test_cached_attention(rng: np.random.Generator) -> None:
    """Fewer queries than keys, and keys whose order is not that of their positions."""
    jax_keys, torch_keys = places(rng)
    order, ask = rng.permutation(T), [3, 40, 199, 100, 12]
    jax_queries = jax_visible.Places(*(x[:, np.array(ask)] for x in jax_keys))
    torch_queries = torch_attention.Places(*(x[:, ask] for x in torch_keys))
    jax_keys = jax_visible.Places(*(x[:, order] for x in jax_keys))
    torch_keys = torch_attention.Places(*(x[:, order] for x in torch_keys))
    op_parity(
        lambda *x: jax_attention.cached_attention(*x, jax_queries, jax_keys),
        lambda *x: torch_attention.cached_attention(*x, torch_queries, torch_keys),
        [(B, len(ask), N, H), (B, K, H, T), (B, K, T, H)],
        rng,
    )


def test_cache_append(rng: np.random.Generator) -> None:
    """Prefill with padding on either side, a step, a step of padding, and a ring that comes round."""
    ours = torch_cache.KVCache.empty(3, 6, K, H, torch.float64)
    theirs = jax_cache.KVCache.empty(3, 6, K, H, jnp.float64)
    steps = [
        ([[0, 1, 2, 0], [0, 0, 0, 1], [0, 0, 0, 0]], [[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]),
        ([[3], [2], [0]], [[1], [1], [1]]),
        ([[4], [0], [1]], [[1], [0], [1]]),
        ([[5], [3], [2]], [[1], [1], [1]]),
    ]
    for positions, segments in steps:
        where = [np.array(x, np.int32) for x in (positions, segments)]
        k, v = rng.standard_normal((2, 3, where[0].shape[1], K, H))
        ours = ours.append(torch.tensor(k), torch.tensor(v), torch_attention.Places(*map(torch.tensor, where)))
        theirs = theirs.append(jnp.asarray(k), jnp.asarray(v), jax_visible.Places(*map(jnp.asarray, where)))
        for a, b in zip(
            (*ours, *torch_cache.Slots(*ours[:3]).places), (*theirs, *jax_cache.Slots(*theirs[:3]).places), strict=True
        ):
            np.testing.assert_array_equal(a.numpy(), np.asarray(b))


def rope_of(layout: str, shift: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    table = torch_rope.rope_table(
        torch.arange(T).expand(B, T) + shift, torch_rope.rope_frequencies(H, 1e4), torch.float64
    )
    return lambda x: torch_rope.apply_rope(x, *table, layout=layout)


def attention_of(segments: torch.Tensor, shift: int = 0) -> Callable[..., torch.Tensor]:
    keys = torch_attention.Places(torch.arange(T).expand(B, T), segments)
    queries = torch_attention.Places(keys.positions + shift, segments)
    return lambda q, k, v: torch_attention.attention(q, k, v, queries, keys)


def tables() -> tuple[Any, Any]:
    return jax_rope.rope_table(jnp.arange(T)[None].repeat(B, 0), jax_rope.rope_frequencies(H, 1e4), jnp.float64)


def two_documents() -> Any:
    segments = jnp.asarray(1 + (np.arange(T) >= 90))[None].repeat(B, 0)
    return jax_visible.Places(jnp.arange(T)[None].repeat(B, 0), segments)


SEGMENTS = 1 + (torch.arange(T) >= 90).long().expand(B, T)
HEADS, ACTIVATIONS, NORMS = [(B, T, N, H)], [(7, 33), (7, 33)], [(7, 33), (33,)]
FAULTS: dict[str, tuple[Callable, Callable, list[tuple[int, ...]]]] = {
    "rope layout": (lambda x: jax_rope.apply_rope(x, *tables(), layout="half"), rope_of("interleaved"), HEADS),
    "rope off by one": (lambda x: jax_rope.apply_rope(x, *tables(), layout="half"), rope_of("half", 1), HEADS),
    "swapped gate and up": (jax_ffn.swiglu, lambda g, u: torch_ffn.swiglu(u, g), ACTIVATIONS),
    "gelu tanh for erf": (
        lambda x: jax_ffn.activate("gelu", x),
        lambda x: torch_ffn.activate("gelu_tanh", x),
        ACTIVATIONS[:1],
    ),
    "rms_norm eps": (
        lambda x, s: jax_norm.rms_norm(x, s, eps=1e-6),
        lambda x, s: torch_norm.rms_norm(x, s, eps=1e-5),
        NORMS,
    ),
    "no document mask": (
        lambda *x: jax_attention.attention(*x, two_documents(), two_documents()),
        attention_of(torch.ones_like(SEGMENTS)),
        HEADS * 3,
    ),
    "mask off by one": (
        lambda *x: jax_attention.attention(*x, two_documents(), two_documents()),
        attention_of(SEGMENTS, 1),
        HEADS * 3,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, rng: np.random.Generator) -> None:
    jax_op, torch_op, shapes = FAULTS[fault]
    with pytest.raises(AssertionError, match="output: error"):
        op_parity(jax_op, torch_op, shapes, rng)

"""Attention, convolution and scans of rows that are split over devices: values and gradients of one device, float64.

Shapes: B batch, T length, N heads, K kv heads, H head dim, F channels, P state, G groups, C devices.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxlm.ops import sequence_parallel
from jaxlm.ops.attention import attend as whole
from jaxlm.ops.attention import blockwise, ring
from jaxlm.ops.attention.kernels import KERNELS
from jaxlm.ops.attention.visible import Form, Mixed, Places
from jaxlm.ops.ssm import convolution, selective_scan, ssd

B, N, K, H = 2, 4, 2, 4
SCANS = {"selective_scan": selective_scan.selective_scan, "ssd": ssd.ssd}
ALONG, WHOLE = PartitionSpec(None, "context"), PartitionSpec()


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def rows_of(t: int) -> Places:
    """A row of three documents, one of one token, with padding on both sides; and one of a document and padding."""
    positions, segments = np.zeros((B, t), np.int32), np.zeros((B, t), np.int32)
    begins = (2, t // 3, t // 3 + 1, t - 1)
    for segment, (begin, end) in enumerate(itertools.pairwise(begins), 1):
        segments[0, begin:end], positions[0, begin:end] = segment, np.arange(end - begin)
    segments[1, : t - 2], positions[1, : t - 2] = 1, np.arange(t - 2)
    return Places(jnp.asarray(positions), jnp.asarray(segments))


def over(devices: int, op: Callable[..., Any], splits: tuple[bool, ...], results: Any = ALONG) -> Callable[..., Any]:
    """The op on so many devices; `splits`: which arguments are."""
    mesh = jax.make_mesh((devices,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    in_specs = tuple(ALONG if split else WHOLE for split in splits)
    local = functools.partial(op, axis="context")
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=results, check_vma=False))


def same(one: Callable[..., Any], other: Callable[..., Any], arrays: list[jax.Array], *rest: Any) -> None:
    """The same values, and the same gradients of a random combination of the finite ones."""

    def run(op: Callable[..., Any]) -> Any:
        def loss(*arrays: jax.Array) -> tuple[jax.Array, Any]:
            random = np.random.default_rng(1)
            out = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), op(*arrays, *rest))
            return sum(jnp.sum(x * random.standard_normal(x.shape)) for x in jax.tree.leaves(out)), out

        return jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), run(one), run(other))


def heads(t: int) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal((B, t, n, H))) for n in (N, K, K)]


def check_attention(devices: int, t: int, impl: str, window: int, softcap: float) -> None:
    options: Any = {"window": window, "softcap": softcap}
    one = lambda q, k, v, places: whole.attend(q, k, v, places, places, impl="xla", **options)  # noqa: E731
    split = over(
        devices,
        functools.partial(ring.part, kernel=KERNELS[impl], form=Form(window, softcap, jnp.dtype("float64"))),
        (True,) * 4,
    )
    same(one, split, heads(t), rows_of(t))


@pytest.mark.parametrize(
    ("devices", "t", "impl", "window", "softcap"),
    [
        (2, 16, "blockwise", 0, 0.0),
        (4, 32, "blockwise", 0, 0.7),
        (8, 32, "blockwise", 20, 0.0),  # a window of more than half the row: the ring
        (4, 32, "blockwise", 13, 0.7),  # of two devices
        (8, 24, "blockwise", 0, 0.0),  # an odd number of tokens on each device: gathered
        (8, 32, "xla", 0, 0.7),
    ],
)
def test_attention_of_a_split_row(devices: int, t: int, impl: str, window: int, softcap: float) -> None:
    check_attention(devices, t, impl, window, softcap)


@pytest.mark.parametrize("window", [0, 5])
def test_attention_of_many_blocks(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window also of several pieces, the first of which has the keys of the neighbour before it."""
    monkeypatch.setattr(blockwise, "BLOCK", 2)
    monkeypatch.setattr(blockwise, "MAX_BLOCKS", 4)
    check_attention(2, 44, "blockwise", window, 0.0)


@pytest.mark.parametrize(("devices", "keep_first"), [(2, 3), (8, 5)])
def test_first_tokens_that_lie_on_other_devices(devices: int, keep_first: int) -> None:
    options: Any = {"keep_first": keep_first, "window": 4, "softcap": 0.7}
    one = functools.partial(whole.attend_first, **options)
    split = over(devices, functools.partial(ring.attend_first, **options), (True,) * 4)
    same(one, split, heads(24), rows_of(24))


def around(q: jax.Array, k: jax.Array, v: jax.Array, places: Places, axis: str) -> jax.Array:
    return ring.part(q, k, v, places, axis=axis, kernel=KERNELS["blockwise"], form=Form(0, 0.0, v.dtype)).out


def test_the_ring_halves_the_square() -> None:
    """Each of two devices does half of what one does alone, which leaves out blocks of late keys."""
    t = 1024
    places = Places(*[jax.ShapeDtypeStruct((1, t), jnp.int32)] * 2)
    arrays = [jax.ShapeDtypeStruct((1, t, n, H), jnp.float32) for n in (N, K, K)]
    one = lambda q, k, v, places: whole.attention(q, k, v, places, places, impl="blockwise", aligned=True)  # noqa: E731
    split = over(2, around, (True,) * 4)
    alone, each = (jax.jit(op).lower(*arrays, places).compile().cost_analysis()["flops"] for op in (one, split))
    assert 0.49 < each / alone < 0.52


def test_low_precision_sums_are_wide() -> None:
    """bfloat16 inputs: the ring is no further from float64 than twice one device."""
    places, wide_heads = rows_of(64), [x.astype(jnp.bfloat16).astype(jnp.float64) for x in heads(64)]
    narrow = [x.astype(jnp.bfloat16) for x in wide_heads]

    def gradients(op: Callable[..., Any], arrays: list[jax.Array]) -> list[np.ndarray]:
        loss = lambda *arrays: jnp.sum(jnp.sin(op(*arrays, places).astype(jnp.float32)))  # noqa: E731
        return [np.asarray(x, np.float64) for x in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)]

    one = lambda q, k, v, places: whole.attention(q, k, v, places, places, impl="blockwise", aligned=True)  # noqa: E731
    split = over(2, around, (True,) * 4)
    for golden, alone, ringed in zip(
        gradients(one, wide_heads), gradients(one, narrow), gradients(split, narrow), strict=True
    ):
        assert np.linalg.norm(ringed - golden) < 2 * np.linalg.norm(alone - golden)


def scan_inputs(kind: str, t: int) -> list[jax.Array]:
    random = np.random.default_rng(0)
    f, p, n, g = 3, 4, 4, 2
    if kind == "selective_scan":
        shapes: Any = ((B, t, f), (B, t, f), (f, p), (B, t, p), (B, t, p), (f,))
    else:
        shapes = ((B, t, n, H), (B, t, n), (n,), (B, t, g, p), (B, t, g, p), (n,))
    arrays = [random.standard_normal(shape) for shape in shapes]
    arrays[1], arrays[2] = np.log1p(np.exp(arrays[1])), -np.exp(arrays[2])
    return [jnp.asarray(x) for x in arrays]


def check_scan(kind: str, devices: int, impl: str) -> None:
    t, op = 8 * devices, SCANS[kind]
    one = lambda *arrays: op(*arrays, impl=impl, chunk=3)[0]  # noqa: E731
    local = lambda *arrays, axis: op(*arrays, impl=impl, chunk=3, axis=axis)[0]  # noqa: E731
    split = over(devices, local, (True, True, False, True, True, False, True))
    same(one, split, scan_inputs(kind, t), rows_of(t).segments)


@pytest.mark.parametrize("kind", ["selective_scan", "ssd"])
@pytest.mark.parametrize(("devices", "impl"), [(2, "sequential"), (8, "chunked")])
def test_scan_of_a_split_row(kind: str, devices: int, impl: str) -> None:
    check_scan(kind, devices, impl)


@pytest.mark.parametrize("kind", ["selective_scan", "ssd"])
def test_the_last_state_of_the_last_device_is_that_of_the_row(kind: str) -> None:
    op, arrays, segments = SCANS[kind], scan_inputs(kind, 16), rows_of(16).segments
    last = lambda *arrays, axis: op(*arrays, axis=axis)[1][None]  # noqa: E731
    splits, results = (True, True, False, True, True, False, True), PartitionSpec("context")
    states = over(4, last, splits, results)(*arrays, segments)
    np.testing.assert_allclose(states[-1], jax.jit(op)(*arrays, segments)[1], rtol=1e-10, atol=1e-12)


def check_conv(devices: int, t: int) -> None:
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal(shape)) for shape in ((B, t, 3), (4, 3), (3,))]
    one = lambda *arrays: convolution.causal_conv(*arrays)[0]  # noqa: E731
    local = lambda *arrays, axis: convolution.causal_conv(*arrays, axis=axis)[0]  # noqa: E731
    same(one, over(devices, local, (True, False, False, True)), arrays, rows_of(t).segments)


@pytest.mark.parametrize(("devices", "t"), [(2, 16), (8, 16)])
def test_convolution_of_a_split_row(devices: int, t: int) -> None:
    """Three taps before the token's own: from one neighbour, and from two."""
    check_conv(devices, t)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_every_device_has_an_early_and_a_late_part(devices: int) -> None:
    index = jnp.broadcast_to(jnp.arange(4 * devices), (B, 4 * devices))
    there = over(devices, sequence_parallel.zigzag, (True,))(index)
    parts = there[0].reshape(devices, 2, 2)[..., 0] // 2
    assert parts.tolist() == [[device, 2 * devices - 1 - device] for device in range(devices)]
    np.testing.assert_array_equal(over(devices, sequence_parallel.unzigzag, (True,))(there), index)


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 100])
def test_tokens_before_a_device(tokens: int) -> None:
    index = jnp.arange(1, 17)[None]
    local = lambda x, axis: sequence_parallel.halo(x, tokens, axis)  # noqa: E731
    got = np.asarray(over(8, local, (True,))(index)).reshape(8, tokens)
    for device in range(8):
        before = range(2 * device - tokens + 1, 2 * device + 1)
        assert got[device].tolist() == [max(token, 0) for token in before]


original_shift, original_before, original_starts = sequence_parallel.shift, sequence_parallel.before, convolution.starts
ATTENTION = functools.partial(check_attention, 4, 32, "blockwise", 0, 0.0)
FAULTS = {
    "a ring that does not turn": (sequence_parallel, "shift", lambda tree, *_, **__: tree, ATTENTION),
    "gradients that are not brought home": (
        ring,
        "_around",
        lambda visit, carry, keys, axis: visit(1, carry, original_shift(keys, axis, around=True)),
        ATTENTION,
    ),
    "log-sum-exp left out of the sum": (
        ring,
        "_add",
        lambda one, other: Mixed((one.out + other.out) / 2, one.lse),
        ATTENTION,
    ),
    "keys of one neighbour only": (
        sequence_parallel,
        "halo",
        lambda x, tokens, axis: jnp.pad(
            original_shift(x, axis), ((0, 0), (tokens - x.shape[1], 0), *((0, 0),) * (x.ndim - 2))
        ),
        functools.partial(check_attention, 4, 32, "blockwise", 13, 0.0),
    ),
    "states that do not decay": (
        sequence_parallel,
        "before",
        lambda ends, decays, axis, **options: original_before(ends, jnp.ones_like(decays), axis, **options),
        functools.partial(check_scan, "ssd", 4, "chunked"),
    ),
    "states of the wrong side backwards": (
        sequence_parallel,
        "before",
        lambda ends, decays, axis, reverse=False: original_before(ends, decays, axis),
        functools.partial(check_scan, "selective_scan", 4, "chunked"),
    ),
    "a document that begins anew on each device": (
        selective_scan,
        "starts",
        lambda segments, axis=None: original_starts(segments),
        functools.partial(check_scan, "selective_scan", 4, "chunked"),
    ),
    "a convolution without its neighbour": (
        sequence_parallel,
        "halo",
        lambda x, tokens, axis: jnp.zeros((x.shape[0], tokens, *x.shape[2:]), x.dtype),
        functools.partial(check_conv, 2, 16),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, wrong, check = FAULTS[fault]
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check()

"""The GPU computes what the CPU does: `make gpu-check`. Errors are measured against float64 on the CPU.

Shapes: B batch, T length, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.numerics import Policy
from jaxlm.objectives.lm import lm_loss
from jaxlm.ops.attention.attend import attention
from jaxlm.ops.attention.visible import Places

pytestmark = pytest.mark.gpu
B, T, N, K, H = 2, 512, 4, 2, 64
MODEL = config.Model(vocab_size=512, d_model=256, n_layers=2, n_heads=N, n_kv_heads=K, head_dim=H, max_seq_len=T)


@pytest.fixture(scope="module")
def gpu() -> jax.Device:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.fail(f"make gpu-check needs a GPU that JAX can see: {error}")


def packed() -> Places:
    """Two documents in a row; the second row ends in padding."""
    positions, segments = np.tile(np.arange(T), (B, 1)), np.ones((B, T), int)
    for row, cut in enumerate((200, 384)):
        positions[row, cut:] = np.arange(T - cut)
        segments[row, cut:] = 2
    segments[1, -31:] = 0
    return Places(jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32))


def error(got: Any, golden: Any) -> float:
    """Relative norm of the difference of two trees."""
    got, golden = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)]) for t in (got, golden)
    )
    return float(np.linalg.norm(got - golden) / np.linalg.norm(golden))


def attention_and_gradients(device: jax.Device, dtype: Any, impl: str, window: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    places = packed()
    real = np.asarray(places.segments != 0)[..., None, None]
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    # every dtype starts from the same bfloat16 numbers; nothing flows back from padding
    q, k, v, dout = (jnp.asarray(random.standard_normal(shape), jnp.bfloat16).astype(dtype) for shape in shapes)
    dout = dout * real

    @jax.jit
    def both(q, k, v, dout, places):
        out, vjp = jax.vjp(
            lambda *qkv: attention(*qkv, places, places, impl=impl, aligned=True, window=window), q, k, v
        )
        return out, *vjp(dout)

    return [np.asarray(x, np.float64) for x in both(*jax.device_put((q, k, v, dout, places), device))]


@pytest.mark.parametrize("window", [0, 100])
def test_cudnn_attention_is_the_readable_one(gpu: jax.Device, window: int) -> None:
    """Packed documents, grouped heads, bfloat16: cuDNN errs at most twice as much as `xla` does."""
    with jax.enable_x64(True):
        golden = attention_and_gradients(jax.devices("cpu")[0], jnp.float64, "xla", window)
    fused, readable = (attention_and_gradients(gpu, jnp.bfloat16, impl, window) for impl in ("cudnn", "xla"))
    for name, got, ours, best in zip(("out", "dq", "dk", "dv"), fused, readable, golden, strict=True):
        assert error(got, best) <= 2 * error(ours, best), name
    np.testing.assert_array_equal(fused[0][np.asarray(packed().segments) == 0], 0)


def loss_and_gradients(device: jax.Device, params: Any, dtype: Any, wide: Any) -> tuple[float, Any]:
    decoder, places = Decoder(MODEL, Policy(wide, dtype, "highest")), packed()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, MODEL.vocab_size, (B, T + 1)), jnp.int32)
    weights = (places.segments != 0).astype(wide)

    @jax.jit
    def compute(params, tokens, places, weights):
        def loss(params):
            hidden, _ = decoder.apply({"params": params}, tokens[:, :-1], *places, method="hidden")
            kernel, bias = decoder.apply({"params": params}, method="unembedding")
            return lm_loss(hidden, kernel, bias, tokens[:, 1:], weights, block=256).loss / weights.sum()

        with jax.default_matmul_precision("highest"):
            return jax.value_and_grad(loss)(params)

    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, wide), params)
    loss, gradients = compute(*jax.device_put((params, tokens, places, weights), device))
    return float(loss), jax.device_get(gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_and_gradients_are_those_of_the_cpu(gpu: jax.Device, dtype: str) -> None:
    """Each gradient's error against float64 is at most twice the CPU's."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        params = jax.device_get(init_params(Decoder(MODEL), jax.random.key(0)))
    with jax.enable_x64(True):
        _, golden = loss_and_gradients(cpu, params, jnp.float64, jnp.float64)
    on_gpu, on_cpu = (loss_and_gradients(device, params, jnp.dtype(dtype), jnp.float32)[1] for device in (gpu, cpu))
    leaves = zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (on_gpu, on_cpu, golden)), strict=True)
    for (path, got), (_, ours), (_, best) in leaves:
        assert error(got, best) <= 2 * error(ours, best), jax.tree_util.keystr(path)

"""Experts compiled for TPUs: the grouped products are the kernel, forward and backward, and tokens go by all-to-all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.ops.moe import experts as moe
from jaxlm.plan.hlo.program import parse

T, D, F, E, K = 1024, 256, 384, 8, 2
NEEDED = 9 * 2 * T * K * D * F
"""FLOP of the nine products."""


def gradient(device: Any, impl: str) -> Any:
    """The compiled gradient of the experts by their inputs and parameters."""
    whole = NamedSharding(Mesh(np.array([device]), "x"), PartitionSpec())
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype, sharding=whole)  # noqa: E731
    parameters = moe.Experts(shape(E, D, F), shape(E, D, F), shape(E, F, D))
    arguments = shape(T, D), shape(T, K, dtype=jnp.float32), shape(T, K, dtype=jnp.int32), parameters

    def loss(x: Any, weights: Any, experts: Any, parameters: Any) -> Any:
        y = moe.moe(x, weights, experts, parameters, activation="swiglu", impl=impl, platform="tpu")
        return jnp.sum(y.astype(jnp.float32) ** 2)

    with Layout.from_config(config.Mesh(), [device]).active():
        return jax.jit(jax.grad(loss, argnums=(0, 1, 3))).lower(*arguments).compile()


@pytest.mark.parametrize("topology", ["v5p:2x2x1", pytest.param("v6e:2x2", marks=pytest.mark.soak)])
def test_every_product_of_experts_is_the_kernel(topology: str, tpu: Callable[[str], Sequence[Any]]) -> None:
    """Three products, and two for the gradient of each, of the rows that there are."""
    text = gradient(tpu(topology)[0], "auto").as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 9
    assert parse(text).flops().total == NEEDED


@pytest.mark.soak
def test_ragged_dot_computes_the_gradient_of_its_kernels_for_all_rows(tpu: Callable[[str], Sequence[Any]]) -> None:
    """Why it is not the default: 3 of 9 products cost E times too much. If this fails, XLA has learned it."""
    products = [3, 3, 3 * E]
    assert gradient(tpu("v5p:2x2x1")[0], "ragged").cost_analysis()["flops"] > 0.99 * NEEDED * sum(products) / 9


def test_the_step_of_a_model_with_experts(
    tpu: Callable[[str], Sequence[Any]], compiled: Callable[[config.Config, Sequence[Any]], Any]
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 256, "d_model": 256, "n_layers": 1, "n_heads": 2, "d_ff": 256}
    model = config.Model(**sizes, pattern=("attention+moe",), moe=config.MoE(n_experts=8, top_k=2))
    cfg = config.Config(
        model=model,
        mesh=config.Mesh(data=1, expert=4),
        data=config.Data(seq_len=128),
        train=config.Train(batch_size=16),
        numerics=config.Numerics(compute="bfloat16"),
    )
    text = compiled(cfg, tpu("v6e:2x2")).as_text()
    assert "all-to-all" in text and "tpu_custom_call" in text and "ragged-dot" not in text

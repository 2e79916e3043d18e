"""What the TPU's own compiler makes of the training step and of the attention kernels; no TPU is needed.

Shapes: B batch, T length, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.ops.attention import Places, attention
from jaxlm.ops.moe import Experts, moe

Devices = Callable[[str], Sequence[Any]]
KERNELS = ["dkv", "dq", "fwd"]


def kernels(text: str) -> list[str]:
    """The passes of splash in a compiled program, each once."""
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return sorted({found[1] for line in calls for found in [re.search(r"splash_mha_(\w+?)_segmented", line)] if found})


def step_config(mesh: config.Mesh, **options: Any) -> config.Config:
    sizes: Any = {"vocab_size": 256, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64}
    return config.Config(
        model=config.Model(max_seq_len=256, layer_loop="scan", **sizes, **options),
        data=config.Data(seq_len=256),
        train=config.Train(batch_size=4),
        numerics=config.Numerics(compute="bfloat16"),
        mesh=mesh,
    )


@pytest.mark.parametrize(
    ("name", "mesh", "options"),
    [
        ("v5p:2x2x1", config.Mesh(data=1, fsdp=2, tensor=2), {}),
        ("v6e:2x2", config.Mesh(data=1, fsdp=2, context=2), {"window": 100, "softcap": 30.0, "sink_logits": True}),
    ],
)
def test_the_step_of_a_dense_model_runs_splash(
    name: str, mesh: config.Mesh, options: dict[str, Any], tpu: Devices, compiled: Any
) -> None:
    """Nobody asks for it: the choice follows the devices that are compiled for, on a machine of CPUs."""
    assert jax.default_backend() == "cpu"
    assert kernels(compiled(step_config(mesh, **options), tpu(name)).as_text()) == KERNELS


def attention_program(devices: Sequence[Any], impl: str, t: int, **options: Any) -> Any:
    """Gradients of attention over one row a device, compiled."""
    layout = Layout.from_config(config.Mesh(data=len(devices)), devices)
    rows = layout.sharding(("batch",))
    b, n, k, h = len(devices), 2, 1, options.pop("head_dim", 64)
    dtype = options.pop("dtype", jnp.bfloat16)
    qkv = [jax.ShapeDtypeStruct((b, t, heads, h), dtype, sharding=rows) for heads in (n, k, k)]
    places = Places(*[jax.ShapeDtypeStruct((b, t), jnp.int32, sharding=rows)] * 2)

    def summed(qkv: list[jax.Array], places: Places) -> jax.Array:
        out = attention(*qkv, places, places, impl=impl, aligned=True, **options)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with layout.active():
        return jax.jit(jax.grad(summed)).lower(qkv, places).compile()


def test_splash_holds_no_square_of_the_row(tpu: Devices) -> None:
    """Scores are 2 T^2 bytes a head and more; splash needs a fraction of this, and no array with two sides of T."""
    t, chips = 1024, tpu("v6e:2x2")
    xla, splash = (attention_program(chips, impl, t) for impl in ("xla", "splash"))
    scores = 2 * t * t * 2
    assert xla.memory_analysis().temp_size_in_bytes > scores
    assert splash.memory_analysis().temp_size_in_bytes < scores / 2
    squares = [re.search(rf"\w+\[[\d,]*{t},{t}\]", program.as_text()) is not None for program in (xla, splash)]
    assert squares == [True, False]
    assert [kernels(program.as_text()) for program in (xla, splash)] == [[], KERNELS]


@pytest.mark.parametrize(
    "options",
    [{"head_dim": 256, "dtype": jnp.float32}, {"head_dim": 80, "window": 300}, {"head_dim": 8, "softcap": 30.0}],
)
def test_the_compiler_takes_every_shape_that_the_table_gives_it(options: dict[str, Any], tpu: Devices) -> None:
    """Rows that are no multiple of a block, head dims that fill no register or two."""
    assert kernels(attention_program(tpu("v5p:2x2x1"), "splash", 700, **options).as_text()) == KERNELS


def test_experts_are_grouped_matrix_products(tpu: Devices) -> None:
    """One kernel for each product of all experts, in both directions."""
    layout = Layout.from_config(config.Mesh(), tpu("v6e:2x2")[:1])

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.replicated)

    experts = Experts(array(4, 128, 256), array(4, 128, 256), array(4, 256, 128))
    chosen, weights = array(512, 2, dtype=jnp.int32), array(512, 2, dtype=jnp.float32)

    def summed(x: jax.Array, experts: Experts, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        return jnp.sum(moe(x, weights, chosen, experts, activation="swiglu"))

    with layout.active():
        text = jax.jit(jax.grad(summed, (0, 1))).lower(array(512, 128), experts, weights, chosen).compile().as_text()
    assert len(set(re.findall(r"(ragged-dot[\w.-]*) = ", text))) >= 8, re.findall(r"ragged-dot[\w.-]*", text)

"""What the TPU's own compiler makes of the training step and of the attention kernels; no TPU is needed.

Shapes: T length.
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
from jaxlm.models.sequence_parallel import attention_site
from jaxlm.ops.attention.attend import attention
from jaxlm.ops.attention.visible import Places

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


def attention_program(devices: Sequence[Any], impl: str, t: int, head_dim: int, n: int, k: int, **options: Any) -> Any:
    """Gradients of attention over one row on one device, compiled."""
    layout = Layout.from_config(config.Mesh(), devices[:1])
    dtype = options.pop("dtype", jnp.bfloat16)
    qkv = [jax.ShapeDtypeStruct((1, t, h, head_dim), dtype, sharding=layout.replicated) for h in (n, k, k)]
    places = Places(*[jax.ShapeDtypeStruct((1, t), jnp.int32, sharding=layout.replicated)] * 2)

    def summed(qkv: list[jax.Array], places: Places) -> jax.Array:
        out = attention(*qkv, places, places, impl=impl, aligned=True, site=attention_site(cached=False), **options)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with layout.active():
        return jax.jit(jax.grad(summed)).lower(qkv, places).compile()


def test_splash_holds_no_square_of_the_row(tpu: Devices) -> None:
    """Scores of one head are 2 T^2 bytes and more; splash needs a fraction, and has no array with two sides of T."""
    t, chips = 4096, tpu("v6e:2x2")
    xla, splash = (attention_program(chips, impl, t, 64, 1, 1) for impl in ("xla", "splash"))
    assert xla.memory_analysis().temp_size_in_bytes > 2 * t * t
    assert splash.memory_analysis().temp_size_in_bytes < t * t / 4
    squares = [re.search(rf"\w+\[[\d,]*{t},{t}\]", program.as_text()) is not None for program in (xla, splash)]
    assert squares == [True, False]
    assert [kernels(program.as_text()) for program in (xla, splash)] == [[], KERNELS]


@pytest.mark.parametrize(
    "options",
    [{"head_dim": 256, "dtype": jnp.float32}, {"head_dim": 80, "window": 300}, {"head_dim": 8, "softcap": 30.0}],
)
def test_the_compiler_takes_every_shape_that_the_table_gives_it(options: dict[str, Any], tpu: Devices) -> None:
    """Rows that are no multiple of a block, head dims that fill no register or two."""
    assert kernels(attention_program(tpu("v5p:2x2x1"), "splash", 700, n=4, k=2, **options).as_text()) == KERNELS

"""What devices that split rows send to each other, read from the compiled gradient."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.mesh import RULES, Layout
from jaxlm.models import sequence_parallel
from jaxlm.models.decoder import Decoder, abstract_params
from jaxlm.recipes.pretrain import loss_fn

B, T, D, DEVICES, STATE, INNER = 2, 128, 16, 4, 4, 32
MODEL = config.Model(
    vocab_size=32,
    d_model=D,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_ff=32,
    max_seq_len=T,
    attention_impl="blockwise",
    mamba=config.Mamba(d_state=STATE, head_dim=8),
    pattern=("mamba", "mamba2", "attention"),
)


def sent(model: config.Model) -> dict[str, set[int]]:
    """Sizes, in elements, of what each kind of collective yields on one device in the gradient of a loss."""
    layout = Layout.from_config(config.Mesh(data=1, context=DEVICES), jax.devices()[:DEVICES])
    decoder, train = Decoder(model), config.Train(loss_block=64)
    shapes, whole = abstract_params(decoder)[0], layout.replicated
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "positions": jnp.int32, "segments": jnp.int32}
    batch = {
        name: jax.ShapeDtypeStruct((B, T), dtype, sharding=layout.batch)
        for name, dtype in {**kinds, "weights": jnp.float32}.items()
    }
    with layout.active():
        gradient = jax.jit(
            lambda params, batch: jax.grad(loss_fn(decoder, train), has_aux=True)(params, {}, batch, None)
        )
        text = gradient.lower(params, batch).compile().as_text()
    found: dict[str, set[int]] = {}
    for line in text.splitlines():
        match = re.search(r" = (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\w*\(", line)
        if match:
            shapes = re.findall(r"\w\d+\[([\d,]*)\]", match[1])
            found.setdefault(match[2], set()).update(math.prod(map(int, filter(None, x.split(",")))) for x in shapes)
    return found


def check(model: config.Model) -> None:
    sizes = sent(model)
    states = DEVICES * B * STATE * INNER  # of both kinds of Mamba
    assert sizes.pop("all-gather") <= {states, DEVICES * B * INNER // 8}  # the second: decays, one a head
    assert max(sizes.pop("collective-permute")) <= B * T // DEVICES * D  # queries, keys and values of one device
    assert max(sizes.pop("reduce-scatter", {0})) <= states
    assert max(sizes.pop("all-reduce")) <= 2 * D * INNER  # gradients of parameters
    assert not sizes


def test_no_device_gathers_rows():
    check(MODEL)


def test_rows_gathered_by_the_partitioner_are_seen(monkeypatch):
    monkeypatch.setattr(sequence_parallel, "sequence_axis", lambda: None)
    with pytest.raises(AssertionError):
        check(dataclasses.replace(MODEL, n_layers=1, pattern=("mamba",)))


def test_a_sequence_over_two_axes_is_refused():
    layout = Layout.from_config(config.Mesh(data=2, context=2, tensor=2))
    layout = dataclasses.replace(layout, rules={**RULES, "seq": ("context", "tensor")})
    with layout.active(), pytest.raises(UserError, match="over context and tensor"):
        sequence_parallel.sequence_axis()

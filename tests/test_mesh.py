"""The mesh and the table of rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm import config, config_file
from jaxlm.errors import UserError
from jaxlm.mesh import AXES, RULES, Layout, constrain

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs the 8 virtual devices of conftest.py")


@pytest.fixture
def layout() -> Layout:
    return Layout.from_config(config.Mesh(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1, 1, 1)),
        ({"data": 1, "tensor": -1}, (1, 1, 1, 1, 8)),
        ({"data": 1, "fsdp": 2, "expert": 2, "context": 2}, None),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 1, 1, 2)),
    ],
)
def test_sizes(sizes, shape):
    if shape is None:
        sizes, shape = sizes | {"tensor": 1}, (1, 2, 2, 2, 1)
    mesh = Layout.from_config(config.Mesh(**sizes)).mesh
    assert (mesh.axis_names, mesh.devices.shape) == (AXES, shape)


@pytest.mark.parametrize("sizes", [{"tensor": 3}, {"data": 4}, {"data": 16}, {"fsdp": 16}])
def test_sizes_that_do_not_fit_the_devices(sizes):
    with pytest.raises(UserError, match=r"^\[mesh\] .* does not fit 8 devices \(set one axis to -1\)$"):
        Layout.from_config(config.Mesh(**sizes))


@pytest.mark.parametrize("size", [0, -2])
def test_sizes_that_are_none(size):
    with pytest.raises(UserError, match=f"mesh.fsdp = {size} must be positive or -1"):
        config_file.from_dict({"mesh": {"fsdp": size}})


def test_two_free_axes():
    with pytest.raises(UserError, match="more than one axis"):
        config_file.from_dict({"mesh": {"fsdp": -1}})  # data is -1 by default


def test_specs(layout):
    assert layout.spec(("embed", "heads", "head_dim"), (4, 2, 3)) == P("fsdp", "tensor", None)
    assert layout.spec(("batch", "seq")) == P(("data", "fsdp", "expert"), "context")
    assert layout.replicated.spec == P()


def test_what_does_not_divide_is_named_with_its_numbers(layout):
    with pytest.raises(UserError, match="o_proj: heads of 3 does not divide over tensor = 2 devices"):
        layout.spec(("heads", "embed"), (3, 4), "o_proj")
    with pytest.raises(UserError, match=r"rows: batch of 6 does not divide over .*data.*fsdp.* = 4 devices"):
        layout.spec(("batch", "seq"), (6, 8), "rows")


def test_a_collision_is_refused(layout):
    with pytest.raises(UserError, match=r"kernel: axes .* use one mesh axis twice"):
        layout.spec(("heads", "mlp"), name="kernel")
    clash = Layout(layout.mesh, {**RULES, "seq": "fsdp"})
    with pytest.raises(UserError, match="use one mesh axis twice"):
        clash.spec(("batch", "seq"))


def test_a_batch_lies_in_parts(layout):
    rows = np.arange(32).reshape(8, 4)
    placed = layout.place({"tokens": rows})["tokens"]
    assert placed.sharding.shard_shape(placed.shape) == (2, 4)
    np.testing.assert_array_equal(placed, rows)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "mesh",
    [
        config.Mesh(data=8),
        config.Mesh(data=1, tensor=8),
        config.Mesh(data=2, tensor=4),
        config.Mesh(data=1, fsdp=2, context=4),
        config.Mesh(data=2, expert=2, context=2),
    ],
)
def test_a_process_reads_the_rows_of_its_devices(mesh, processes):
    layout = Layout.from_config(mesh)
    held = {}
    for shard in layout.place({"row": np.repeat(np.arange(8)[:, None], 8, 1)})["row"].addressable_shards:
        held.setdefault(shard.device, set()).update(np.asarray(shard.data).ravel().tolist())
    for mine in np.split(np.array(jax.devices()), processes):
        assert layout.rows(8, mine.tolist()).tolist() == sorted(set().union(*(held[device] for device in mine)))


def test_constrain_places_only_inside_a_layout(layout):
    x = jnp.zeros((4, 4))
    place = lambda x: constrain(x, "batch", "mlp")  # noqa: E731
    assert len(jax.jit(place)(x).sharding.device_set) == 1
    with layout.active():
        placed = jax.jit(lambda x: place(x))(x)
        assert placed.sharding.is_equivalent_to(layout.sharding(("batch", "mlp")), 2)
        with pytest.raises(UserError, match="activation: batch of 5"):
            jax.jit(lambda x: place(x))(jnp.zeros((5, 4)))
    assert constrain(x, "batch", "mlp") is x

"""The mesh and the table of rules."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P

from jaxlm import config
from jaxlm.config import toml
from jaxlm.errors import UserError
from jaxlm.mesh import AXES, RULES, Layout, arrange, constrain

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


@pytest.mark.parametrize(
    ("sizes", "hint"),
    [
        ({"tensor": 3}, "3, the product of the others, must divide 8"),
        ({"fsdp": 16}, "16, the product of the others, must divide 8"),
        ({"data": 4}, "set one axis to -1"),
        ({"data": 16}, "set one axis to -1"),
        ({"dcn": config.Dcn(data=3)}, "3, the product of the others, must divide 8"),
    ],
)
def test_sizes_that_do_not_fit_the_devices(sizes, hint):
    for layout in (Layout.from_config, lambda mesh: Layout.abstract(mesh, 8)):
        with pytest.raises(UserError, match=rf"^\[mesh\] .* does not fit 8 devices \({hint}\)$"):
            layout(config.Mesh(**sizes))


@pytest.mark.parametrize("size", [0, -2])
def test_sizes_that_are_none(size):
    with pytest.raises(UserError, match=f"mesh.fsdp = {size} must be positive or -1"):
        toml.from_dict({"mesh": {"fsdp": size}})


def test_two_free_axes():
    with pytest.raises(UserError, match=r"more than one axis of \[mesh\] is -1"):
        toml.from_dict({"mesh": {"fsdp": -1}})  # data is -1 by default
    with pytest.raises(UserError, match=r"more than one axis of \[mesh\.dcn\] is -1"):
        toml.from_dict({"mesh": {"dcn": {"data": -1, "fsdp": -1}}})


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as placement asks for: a TPU v5p on its torus."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0


def chips(slices: int, side: int = 2) -> list[Chip]:
    places = [(x, y, z) for z in range(side) for y in range(side) for x in range(side)]
    return [Chip(s * side**3 + i, s, place) for s in range(slices) for i, place in enumerate(places)]


def test_what_crosses_slices_is_a_block_of_devices():
    """Without slices of the hardware: shares of the devices in order. Each axis has its slow part outside."""
    mesh = config.Mesh(data=1, fsdp=2, tensor=2, dcn=config.Dcn(data=2))
    placed = Layout.from_config(mesh).mesh
    assert dict(placed.shape) == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    ids = np.vectorize(lambda device: device.id)(placed.devices)
    np.testing.assert_array_equal(ids.reshape(2, 2, 2), np.arange(8).reshape(2, 2, 2))
    mesh = config.Mesh(data=1, fsdp=2, tensor=2, dcn=config.Dcn(fsdp=2))
    ids = np.vectorize(lambda device: device.id)(Layout.from_config(mesh).mesh.devices).reshape(4, 2)
    np.testing.assert_array_equal(ids, [[0, 1], [2, 3], [4, 5], [6, 7]])
    mesh = config.Mesh(data=1, fsdp=2, tensor=2, dcn=config.Dcn(tensor=2))
    ids = np.vectorize(lambda device: device.id)(Layout.from_config(mesh).mesh.devices).reshape(2, 4)
    np.testing.assert_array_equal(ids, [[0, 1, 4, 5], [2, 3, 6, 7]])


@pytest.mark.parametrize("dcn", [{"data": 4}, {"data": 2, "fsdp": 2}, {"fsdp": -1}, {"tensor": 4}])
def test_slices_lie_as_jax_lays_them(dcn):
    mesh = config.Mesh(data=1, fsdp=2, tensor=4, dcn=config.Dcn(**dcn))
    outer = [4 if mesh.dcn.sizes[axis] == -1 else mesh.dcn.sizes[axis] for axis in AXES]
    devices = chips(4)
    expected = mesh_utils.create_hybrid_device_mesh((1, 2, 1, 1, 4), outer, devices)
    np.testing.assert_array_equal(arrange(mesh, devices[::-1]), expected)


def test_neighbours_on_the_torus_share_the_last_axis():
    """An axis of 2 devices is one link; 4 over a torus whose axes are 2 long is a plane of it."""
    placed = arrange(config.Mesh(data=1, fsdp=-1, tensor=2), chips(1)).reshape(4, 2)
    assert all(math.dist(a.coords, b.coords) == 1 for a, b in placed)
    placed = arrange(config.Mesh(data=1, fsdp=16, tensor=4), chips(1, side=4)).reshape(16, 4)  # a ring of 4
    assert all(sum(len({chip.coords[i] for chip in ring}) > 1 for i in range(3)) == 1 for ring in placed)


def test_an_axis_of_the_torus_is_split_where_no_other_way_is_left():
    with pytest.raises(NotImplementedError):
        mesh_utils.create_device_mesh((32, 2), chips(1, side=4))
    placed = arrange(config.Mesh(data=1, fsdp=32, tensor=2), chips(1, side=4)).reshape(32, 2)
    assert len({chip.id for chip in placed.flat}) == 64
    assert all(sum(a.coords[i] != b.coords[i] for i in range(3)) == 1 for a, b in placed)


@pytest.mark.parametrize(("slices", "dcn"), [(2, {}), (1, {"data": 2}), (4, {"data": 2})])
def test_slices_that_are_not_those_of_the_hardware(slices, dcn):
    message = rf"\[mesh.dcn\] data {dcn.get('data', 1)} x .*, slices of these chips: {slices} \(mesh.dcn.data=-1 "
    with pytest.raises(UserError, match=message):
        arrange(config.Mesh(dcn=config.Dcn(**dcn)), chips(slices))


def test_one_slice_of_many_hosts_is_one_slice():
    hosts = [dataclasses.replace(chip, process_index=chip.id // 4) for chip in chips(1)]
    placed = arrange(config.Mesh(data=1, fsdp=-1, dcn=config.Dcn(data=-1)), hosts)
    assert placed.shape == (1, 8, 1, 1, 1)


def test_on_gpus_hosts_are_slices_for_who_asks():
    gpus = [dataclasses.replace(chip, platform="gpu", process_index=chip.slice_index) for chip in chips(4)]
    one = arrange(config.Mesh(data=1, fsdp=-1), gpus)
    assert [gpu.id for gpu in one.flat] == list(range(32))
    hosts = arrange(config.Mesh(data=1, fsdp=-1, dcn=config.Dcn(data=-1)), gpus)
    assert hosts.shape == (4, 8, 1, 1, 1) and {gpu.process_index for gpu in hosts[2].flat} == {2}
    pairs = arrange(config.Mesh(data=1, fsdp=-1, dcn=config.Dcn(data=2)), gpus)
    assert {gpu.process_index for gpu in pairs[1].flat} == {2, 3}


def test_a_layout_needs_no_devices():
    mesh = config.Mesh(data=1, fsdp=-1, tensor=8, dcn=config.Dcn(data=-1))
    layout = Layout.abstract(mesh, 512, slices=4)
    assert dict(layout.mesh.shape) == {"data": 4, "fsdp": 16, "expert": 1, "context": 1, "tensor": 8}
    assert layout.sharding(("embed", "heads", None), (64, 32, 5)).shard_shape((64, 32, 5)) == (4, 4, 5)
    assert dict(Layout.abstract(mesh).mesh.shape) == {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 8}


def test_specs(layout):
    assert layout.spec(("embed", "heads", "head_dim"), (4, 2, 3)) == P("fsdp", "tensor", None)
    assert layout.spec(("batch", "seq")) == P(("data", "fsdp", "expert"), "context")
    assert layout.replicated.spec == P()


def test_what_does_not_divide_is_named_with_its_numbers(layout):
    with pytest.raises(UserError) as error:
        layout.spec(("heads", "embed"), (3, 4), "o_proj")
    assert str(error.value) == (
        "o_proj: heads of 3 does not divide over tensor = 2 devices, in [3, 4] "
        "(the next size that does is 4; mesh.rules.heads=[] leaves it whole)"
    )
    with pytest.raises(UserError) as error:
        layout.spec(("batch", "seq"), (6, 8), "rows")
    assert str(error.value) == (
        "rows: batch of 6 does not divide over data 2 x fsdp 2 x expert 1 = 4 devices, in [6, 8] "
        "(the next train.batch_size / train.microbatches that does is 8; 6 divides over 2)"
    )


def test_a_collision_is_refused(layout):
    with pytest.raises(UserError) as error:
        layout.spec(("heads", "mlp"), name="kernel")
    assert str(error.value) == (
        "kernel: heads and mlp both lie on the mesh axis tensor (change mesh.rules.heads or mesh.rules.mlp)"
    )
    clash = Layout(layout.mesh, {**RULES, "seq": "fsdp"})
    with pytest.raises(UserError, match="batch and seq both lie on the mesh axis fsdp"):
        clash.spec(("batch", "seq"))


def test_rules_are_changed_by_the_config(layout):
    mesh = config.Mesh(
        data=2, fsdp=4, rules={"embed": ("fsdp", "data"), "heads": ()}, optimizer_rules={"heads": ("tensor",)}
    )
    changed = Layout.from_config(mesh)
    assert changed.spec(("embed", "heads", "mlp"), (16, 3, 4)) == P(("fsdp", "data"), None, "tensor")
    assert changed.optimizer.spec(("embed", "heads"), (16, 3)) == P(("fsdp", "data"), "tensor")
    assert layout.spec(("embed", "heads")) == layout.optimizer.spec(("embed", "heads")) == P("fsdp", "tensor")
    with pytest.raises(UserError, match=r"change mesh.optimizer_rules.heads or mesh.optimizer_rules.mlp"):
        changed.optimizer.spec(("heads", "mlp"))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"rules": {"embd": ("fsdp",)}}, "mesh.rules.embd: there is no logical axis 'embd' (did you mean 'embed'?)"),
        ({"rules": {"embed": ("fdsp",)}}, "mesh.rules.embed: there is no mesh axis 'fdsp' (did you mean 'fsdp'?)"),
        ({"rules": {"embed": ("fsdp", "fsdp")}}, "mesh.rules.embed = ['fsdp', 'fsdp'] names a mesh axis twice"),
        ({"optimizer_rules": {"head": ()}}, "mesh.optimizer_rules.head: there is no logical axis 'head' "),
    ],
)
def test_rules_that_name_nothing_are_refused(rules, message):
    with pytest.raises(UserError) as error:
        Layout.from_config(config.Mesh(**rules))
    assert str(error.value).startswith(message)


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

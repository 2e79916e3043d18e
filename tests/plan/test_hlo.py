"""Compiled programs read: FLOP and collectives of programs whose counts are known on paper."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.plan.hlo.collectives import collectives, groups_of, moved_by
from jaxlm.plan.hlo.kernels import count
from jaxlm.plan.hlo.program import parse
from jaxlm.plan.hlo.text import arrays

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs the 8 virtual devices of conftest.py")
SIZES = {"data": 2, "fsdp": 1, "tensor": 4}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(AxisType.Auto,) * 3)


def compiled(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def placed(mesh, spec, *shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def test_shapes():
    (one,) = arrays("bf16[8,4096]{1,0:T(8,128)(2,1)S(1)}")
    assert (one.dtype, one.dims, one.bytes) == ("bf16", (8, 4096), 8 * 4096 * 2) and "S(1)" in one.layout
    sizes = [array.bytes for array in arrays("(f32[], /*index=1*/pred[3], s4[8]{0}, f8e4m3fn[2,2], c64[5], f64[<=3])")]
    assert sizes == [4, 3, 4, 4, 40, 24]


def test_flops_of_a_loop_count_every_turn():
    def loop(x, w):
        return jax.lax.scan(lambda x, one: (jnp.tanh(x @ one), None), x, w)[0]

    program = parse(compiled(loop, jnp.zeros((4, 16)), jnp.zeros((5, 16, 16))))
    assert program.flops() == (5 * 2 * 4 * 16 * 16, 0)
    assert program.unknown_loops == ()


def test_a_trip_count_is_read_from_the_condition_where_xla_does_not_tell():
    """The text of the TPU compiler has no `known_trip_count`."""
    text = compiled(
        lambda x, w: jax.lax.scan(lambda x, one: (x @ one, None), x, w)[0], jnp.zeros((4, 16)), jnp.zeros((5, 16, 16))
    )
    silent = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert silent != text
    assert parse(silent).flops().total == parse(text).flops().total == 5 * 2 * 4 * 16 * 16


def test_a_loop_may_go_by_steps():
    """As the TPU compiler unrolls loops that multiply and send in turn: `i += 2`, and what is left of the last step."""
    text = compiled(
        lambda x: jax.lax.while_loop(lambda c: c[0] < 7, lambda c: (c[0] + 2, c[1] @ c[1]), (0, x))[1],
        jnp.zeros((8, 8)),
    )
    silent = re.sub(r'"known_(trip_count|init_step)":\{[^}]*\},?', "", text)
    assert silent != text
    assert parse(silent).flops().total == parse(text).flops().total == 4 * 2 * 8**3


def test_a_loop_that_depends_on_data_is_named():
    program = parse(compiled(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x), jnp.zeros((8, 8)), 3))
    assert program.flops().total == 2 * 8**3 and len(program.unknown_loops) == 1


def test_a_loop_may_be_idle():
    def rarely(x, n):
        with jax.named_scope("rarely"):
            return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    text = compiled(rarely, jnp.zeros((8, 8)), 3)
    idle, other = parse(text, idle="rarely"), parse(text, idle="rare")
    assert (idle.flops().total, idle.unknown_loops) == (0, ())
    assert other.flops().total == 2 * 8**3 and len(other.unknown_loops) == 1


def test_recomputation_stands_apart():
    def loss(x, w):
        body = jax.checkpoint(lambda x, one: (jnp.sin(jnp.sin(x @ one) @ one), None), prevent_cse=False)
        return jax.lax.scan(body, x, w)[0].sum()

    flops = parse(compiled(jax.grad(loss, argnums=(0, 1)), jnp.zeros((4, 16)), jnp.zeros((5, 16, 16)))).flops()
    product = 5 * 2 * 4 * 16 * 16
    assert flops == (8 * product, 2 * product)  # two forward, two again, four backward


def test_flops_of_convolutions():
    def one(x, w):
        return jax.lax.conv_general_dilated(x, w, (2,), ((3, 0),), feature_group_count=4)

    measured = parse(compiled(one, jnp.zeros((2, 8, 32)), jnp.zeros((12, 2, 4)))).flops().total
    # 16 places two apart, the first of which (at -3) sees one element of four and the second (-1) three
    assert measured == 2 * 2 * 12 * 2 * (16 * 4 - 4)


def test_flops_of_the_tpus_products_with_a_batch():
    """The TPU compiler writes a batch of products as a dilated convolution, whose holes are no work."""
    text = """HloModule m

ENTRY %main (a: f32[8,256,8,128], b: f32[8,256,128,1]) -> f32[8,256,8,256] {
  %a = f32[8,256,8,128]{3,2,1,0} parameter(0)
  %b = f32[8,256,128,1]{3,2,1,0} parameter(1)
  ROOT %c = f32[8,256,8,256]{1,3,2,0:T(8,128)} convolution(%a, %b), window={size=8x1 stride=7x1 lhs_dilate=8x1}, \
dim_labels=0b1f_0oi1->0b1f
}
"""
    swapped = text.replace("b: f32[8,256,8,128]", "b: f32[8,256,128,1]").replace(
        "%b = f32[8,256,8,128]", "%b = f32[8,256,128,1]"
    )
    assert parse(swapped).flops().total == 2 * 8 * 256 * 8 * 128 * 256


def test_collectives_of_products(mesh):
    """Megatron's pair: the second product is summed over `tensor`, and the gradient's mean over `data`."""

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w["up"]) @ w["down"])

    w = {"up": placed(mesh, P(None, "tensor"), 16, 64), "down": placed(mesh, P("tensor", None), 64, 16)}
    x = placed(mesh, P("data", None), 32, 16)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, w)
    step = jax.jit(jax.grad(loss), out_shardings=shardings)
    found = collectives(parse(step.lower(w, x).compile().as_text()), mesh.shape)
    assert {(one.kind, one.axes) for one in found} == {("all-reduce", ("data",))}
    assert sum(one.operand_bytes * one.times for one in found) == 2 * 4 * 16 * 64 // 4


def test_collectives_in_loops(mesh):
    """A layer gathered in each turn of a scan, as FSDP does."""

    def forward(w, x):
        return jax.lax.scan(lambda x, one: (jax.lax.with_sharding_constraint(x @ one, row), None), x, w)[0]

    row = NamedSharding(mesh, P(None, None))
    text = compiled(forward, placed(mesh, P(None, None, "tensor"), 5, 16, 16), placed(mesh, P(), 4, 16))
    moved = moved_by(collectives(parse(text), mesh.shape))
    # what is gathered is the weight (16 x 4 of each of 4) or the result (4 x 4 of each), five times
    assert moved in ({("all-gather", ("tensor",)): 5 * 3 * 4 * n} for n in (16 * 4, 4 * 4))


@pytest.mark.parametrize("kind", ["psum", "all_gather", "psum_scatter", "all_to_all", "ppermute"])
@pytest.mark.parametrize("axes", [("data",), ("tensor",), ("data", "tensor")])
def test_every_kind_along_every_axis(mesh, kind, axes):
    members = {("data",): 2, ("tensor",): 4, ("data", "tensor"): 8}[axes]

    def local(x):
        if kind == "ppermute":
            return jax.lax.ppermute(x, axes, [(i, (i + 1) % members) for i in range(members)])
        if kind == "all_to_all":
            return jax.lax.all_to_all(x, axes, 0, 1, tiled=True)
        options = {"psum": {}, "all_gather": {"tiled": True}, "psum_scatter": {"tiled": True}}[kind]
        return getattr(jax.lax, kind)(x, axes, **options)

    run = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    moved = moved_by(collectives(parse(compiled(run, placed(mesh, P(), 16, 8))), mesh.shape))
    size, n = 16 * 8 * 4, members
    name, share = {
        "psum": ("all-reduce", 2 * (n - 1) / n),
        "all_gather": ("all-gather", n - 1),
        "psum_scatter": ("reduce-scatter", (n - 1) / n),
        "all_to_all": ("all-to-all", (n - 1) / n),
        "ppermute": ("collective-permute", 1),
    }[kind]
    assert moved == {(name, axes): size * share}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x={1}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,3]<=[6], x", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=[3,2]<=[2,3]T(1,0), x", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=3] {'axis_0'}, x={0}", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=3] {'axis_0','axis_1'}, x={0}", [[0, 1, 2, 3, 4, 5]]),
        ("replica_groups=mesh['a'=6] {'a':(1)2}, x={0}", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['a'=6] {'a':(2)3}, x={0}", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=mesh['a'=2,'b'=3], device_ids=([3,2]<=[6]) {'b'}, x={0}", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=mesh['a'=3,'b'=2], device_ids=([2,3]T(1,0)) {'b'}, x={0}", [[0, 3], [1, 4], [2, 5]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_groups(text, groups):
    assert np.array_equal(groups_of(text, 6), groups)


def test_flops_of_kernels():
    """Splash: half of 2 B N T S H a product, also for grouped heads. Grouped products: rows times a matrix."""
    q, k = (8, 12, 1024, 64), (8, 12, 1024, 64)
    product = 8 * 12 * 1024 * 1024 * 64
    assert count("splash_mha_fwd_segmented_residuals.3", [q, k, k], q) == (2 * product, 0)
    assert count("splash_mqa_dkv_no_residuals", [q, (8, 1024, 64)], q) == (4 * product, product)
    assert count("gmm.1", [(512, 64), (4, 64, 32)], (512, 32)) == count("tgmm", [(64, 512), (512, 32)], (4, 64, 32))
    gmm, tgmm = ("gmm.1", [(512, 64), (4, 64, 32)], (512, 32)), ("tgmm", [(64, 512), (512, 32)], (4, 64, 32))
    for one in (gmm, tgmm, ("tgmm", [(512, 64), (512, 32)], (4, 64, 32))):  # the compiler may turn what it takes
        assert count(*one, filled=400) == (2 * 400 * 64 * 32, 0)
        assert count(*one, filled=600) == count(*one) == (2 * 512 * 64 * 32, 0)
    assert count("another", [q], q) is None


def test_a_line_that_an_attribute_breaks_is_one():
    """`kernel_metadata` of the TPU's kernels has line ends; what stands behind them still belongs to the call."""
    text = """HloModule m

ENTRY %main (a: bf16[2,4,256,64]) -> bf16[2,4,256,64] {
  %a = bf16[2,4,256,64]{3,2,1,0} parameter(0)
  ROOT %splash_mha_fwd.1 = bf16[2,4,256,64]{3,2,1,0} custom-call(%a, %a, %a), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"x": 1
}}, metadata={op_name="jit(f)/rematted_computation/splash"}
}
"""
    product = 2 * 4 * 256 * 256 * 64
    assert parse(text).flops() == (2 * product, 2 * product)

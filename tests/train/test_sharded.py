"""One program on any mesh: float64 losses, gradients and updates on 8 devices are those of one."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from jaxlm import config
from jaxlm.config import registry, toml
from jaxlm.errors import UserError
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, abstract_params, init_params
from jaxlm.numerics import Policy
from jaxlm.recipes.pretrain import loss_fn
from jaxlm.train.optim import make_optimizer
from jaxlm.train.program import state_shardings
from jaxlm.train.step import init_state, make_step

B, T, V = 32, 8, 32
MODEL = config.Model(vocab_size=V, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, max_seq_len=T)
MESHES = {
    "data.fsdp.tensor": config.Mesh(data=2, fsdp=2, tensor=2),
    "fsdp": config.Mesh(data=1, fsdp=8),
    "data.expert": config.Mesh(data=2, expert=4),
    "data.expert.tensor": config.Mesh(data=2, expert=2, tensor=2),
    "slices, whole kv heads, zero1": config.Mesh(
        data=1,
        tensor=4,
        dcn=config.Dcn(data=2),
        rules={"kv_heads": ()},
        optimizer_rules={"embed": ("fsdp", "data")},
    ),
    "expert": config.Mesh(data=1, expert=8),
    "fsdp.expert.tensor": config.Mesh(data=1, fsdp=2, expert=2, tensor=2),
    "whole experts": config.Mesh(
        data=1, expert=2, context=2, tensor=2, rules={"experts": ("expert", "tensor"), "mlp": ()}
    ),
    "zero1": toml.from_dict({"mesh": registry.mesh("zero1")}).mesh,
    "data.context": config.Mesh(data=2, context=4),
    "fsdp.context.tensor": config.Mesh(data=1, fsdp=2, context=2, tensor=2),
}
SSM = config.Mamba(d_state=4, head_dim=8)
ARCHITECTURES = {
    "dense": {},
    "mamba": {"pattern": ("mamba",), "mamba": SSM},
    "mamba2": {"pattern": ("mamba2",), "mamba": SSM},
    "jamba": {"pattern": ("mamba+mlp", "attention+mlp"), "mamba": config.Mamba(d_state=4, inner_norms=True)},
    "hybrid with experts": {"pattern": ("mamba2+moe", "attention+mlp"), "mamba": SSM, "moe": config.MoE(n_shared=1)},
}


@pytest.fixture
def batches():
    random = np.random.default_rng(0)

    def make():
        tokens = random.integers(0, V, (B, T + 1)).astype(np.int32)
        starts = random.integers(1, T, (B, 1))  # two documents in each row
        segments = np.where(np.arange(T) < starts, 1, 2).astype(np.int32)
        positions = np.where(segments == 1, np.arange(T), np.arange(T) - starts).astype(np.int32)
        weights = random.integers(0, 2, (B, T)).astype(np.float32)
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": positions,
            "segments": segments,
            "weights": weights,
        }

    return [make() for _ in range(3)]


def three_steps(layout, model, microbatches, batches):
    """Metrics of three updates, the first gradient (AdamW's first moment) and the last state; float64."""
    train = config.Train(batch_size=B, microbatches=microbatches, steps=10, warmup_steps=2, learning_rate=1e-2)
    decoder = Decoder(model, Policy.from_config(config.Numerics(params="float64", compute="float64")))
    optimizer = make_optimizer(train)
    shardings = state_shardings(decoder, optimizer, layout)
    params = jax.jit(lambda key: init_params(decoder, key), out_shardings=shardings.params)(jax.random.key(3))
    state = jax.jit(lambda params: init_state(params, optimizer), out_shardings=shardings)(params)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    step = jax.jit(
        make_step(loss_fn(decoder, train), optimizer, train, seed=0, layout=layout, model=model),
        out_shardings=(shardings, layout.replicated),
    )
    seen = [jax.device_get(state.params)]
    for batch in batches:
        state, metrics = step(state, {}, layout.place(batch))
        seen.append(jax.device_get((metrics, optax.tree.get(state.opt_state, "mu"))))
    return seen, jax.device_get(state)


@pytest.mark.parametrize(
    ("architecture", "mesh", "layer_loop", "microbatches"),
    [
        ("dense", "data.fsdp.tensor", "scan", 1),
        ("dense", "fsdp", "unroll", 4),
        ("dense", "slices, whole kv heads, zero1", "scan", 2),
        pytest.param("hybrid with experts", "zero1", "scan", 1, marks=pytest.mark.soak),
        ("mamba", "data.fsdp.tensor", "scan", 1),
        ("mamba2", "data.fsdp.tensor", "unroll", 1),
        pytest.param("jamba", "data.fsdp.tensor", "scan", 1, marks=pytest.mark.soak),
        # Such a hybrid over experts and tensors by parts: mamba2, the experts below, and both in test_rows_split.
        pytest.param("hybrid with experts", "data.expert.tensor", "scan", 1, marks=pytest.mark.soak),
    ],
)
def test_eight_devices_compute_what_one_does(architecture, mesh, layer_loop, microbatches, batches):
    model = dataclasses.replace(MODEL, layer_loop=layer_loop, **ARCHITECTURES[architecture])
    with jax.enable_x64(True):
        alone = three_steps(Layout.from_config(config.Mesh(), jax.devices()[:1]), model, microbatches, batches)
        sharded = three_steps(Layout.from_config(MESHES[mesh]), model, microbatches, batches)
    jax.tree.map(np.testing.assert_array_equal, alone[0][0], sharded[0][0])  # initial parameters: the same bits
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), alone, sharded)


SINKS = {"window": 3, "keep_first": 1, "sink_logits": True, "sink_tokens": 2, "softcap": 3.0}


@pytest.mark.parametrize(
    ("mesh", "microbatches", "options"),
    [
        ("data.context", 2, {"pattern": ("mamba", "attention"), "mamba": SSM, "positions": "learned", **SINKS}),
        (
            "fsdp.context.tensor",
            1,
            {
                "pattern": ("mamba2+moe", "attention+mlp"),
                "mamba": SSM,
                "moe": config.MoE(n_experts=4, capacity_factor=1.1, balance_loss=0.1),
                "dropout": 0.2,
                "remat": "dots",
            },
        ),
    ],
)
def test_rows_split_over_devices(mesh, microbatches, options, batches):
    """Dropout, learned positions, drops and balance of experts too are those of one device."""
    model = dataclasses.replace(MODEL, attention_impl="blockwise", **options)
    with jax.enable_x64(True):
        alone = three_steps(Layout.from_config(config.Mesh(), jax.devices()[:1]), model, microbatches, batches)
        split = three_steps(Layout.from_config(MESHES[mesh]), model, microbatches, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), alone, split)


def test_windows_and_sinks_on_eight_devices(batches):
    """Sinks are split like the features and the heads."""
    model = dataclasses.replace(MODEL, attention_impl="blockwise", **SINKS)
    with jax.enable_x64(True):
        alone = three_steps(Layout.from_config(config.Mesh(), jax.devices()[:1]), model, 1, batches)
        sharded = three_steps(Layout.from_config(MESHES["data.fsdp.tensor"]), model, 1, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), alone, sharded)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("data.expert", {"selection_bias": True, "balance_loss": 0.1, "importance_loss": 0.1, "z_loss": 1e-2}),
        ("data.expert.tensor", {"exchange": "gather", "router": "sigmoid", "n_shared": 1, "capacity_factor": 1.1}),
        pytest.param("data.fsdp.tensor", {"impl": "ragged"}, marks=pytest.mark.soak),
        ("whole experts", {"impl": "ragged", "balance_loss": 0.1, "capacity_factor": 1.1}),
        pytest.param("expert", {"top_k": 1, "balance_loss": 0.1}, marks=pytest.mark.soak),
        pytest.param("fsdp.expert.tensor", {"exchange": "all_to_all", "top_k": 3}, marks=pytest.mark.soak),
    ],
)
def test_eight_devices_share_the_experts(mesh, options, batches):
    experts = config.MoE(**options)
    model = dataclasses.replace(MODEL, pattern=("attention+moe",), moe=experts, biases=("experts", "router"))
    with jax.enable_x64(True):
        alone = three_steps(Layout.from_config(config.Mesh(), jax.devices()[:1]), model, 2, batches)
        sharded = three_steps(Layout.from_config(MESHES[mesh]), model, 2, batches)
    metrics = alone[0][-1][0]
    assert metrics["expert_load"].sum() == 2 * B * T * experts.top_k
    assert (metrics["dropped"] > 0) == (experts.capacity_factor > 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), alone, sharded)


def test_moments_lie_where_their_parameters_do():
    decoder, layout = Decoder(MODEL), Layout.from_config(MESHES["data.fsdp.tensor"])
    state = state_shardings(decoder, make_optimizer(config.Train()), layout)
    for moment in ("mu", "nu"):
        assert optax.tree.get(state.opt_state, moment) == state.params
    shapes, axes = abstract_params(decoder)
    split = [
        sharding.shard_shape(leaf.shape) != leaf.shape
        for sharding, leaf in zip(jax.tree.leaves(state.params), jax.tree.leaves(shapes), strict=True)
    ]
    assert all(split), "every parameter of this model is split over fsdp or tensor"
    assert axes["layers_0"]["mixer"]["k_proj"]["kernel"] == ("embed", "kv_heads", "head_dim")


def test_zero1_shares_the_optimiser_in_the_compiled_step(batches):
    """What a device holds between steps falls by seven eighths of both moments, and no step gathers them again."""
    train = config.Train(batch_size=B)
    decoder, optimizer = Decoder(MODEL), make_optimizer(train)
    like = jax.eval_shape(lambda key: init_state(init_params(decoder, key), optimizer), jax.random.key(0))

    def memory(name):
        layout = Layout.from_config(toml.from_dict({"mesh": registry.mesh(name)}).mesh)
        shardings = state_shardings(decoder, optimizer, layout)
        state = jax.tree.map(lambda leaf, at: leaf.update(sharding=at), like, shardings)
        step = make_step(loss_fn(decoder, train), optimizer, train, seed=0, layout=layout)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated))
        return jitted.lower(state, {}, layout.place(batches[0])).compile().memory_analysis()

    whole, shared = memory("replicas"), memory("zero1")
    moments = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like.params))
    for kind in ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes"):
        assert getattr(whole, kind) - getattr(shared, kind) == moments * 7 // 8, kind
    assert shared.temp_size_in_bytes < whole.temp_size_in_bytes


def test_heads_that_do_not_divide_are_refused_with_numbers():
    layout = Layout.from_config(config.Mesh(tensor=8))
    with pytest.raises(UserError) as error:
        state_shardings(Decoder(dataclasses.replace(MODEL, n_heads=8)), make_optimizer(config.Train()), layout)
    assert str(error.value) == (
        "layers_0.mixer.k_proj.kernel: kv_heads of 2 does not divide over tensor = 8 devices, in [16, 2, 4] "
        "(the next model.n_kv_heads that does is 8; 2 divides over 2; mesh.rules.kv_heads=[] leaves it whole)"
    )


def test_an_optimiser_that_does_not_divide_is_named():
    layout = Layout.from_config(config.Mesh(optimizer_rules={"mlp": ("data",)}))
    message = r"optimizer\.layers_0.*: mlp of 36 .* over data = 8 .*mesh.optimizer_rules.mlp=\[\]"
    with pytest.raises(UserError, match=message):
        state_shardings(Decoder(dataclasses.replace(MODEL, d_ff=36)), make_optimizer(config.Train()), layout)


def test_experts_that_do_not_divide_are_refused_with_numbers():
    layout = Layout.from_config(config.Mesh(data=2, expert=4))
    model = dataclasses.replace(MODEL, pattern=("attention+moe",), moe=config.MoE(n_experts=6))
    message = r"experts\.\w+_proj\.kernel: experts of 6 does not divide over expert = 4 devices, in \[6, "
    with pytest.raises(UserError, match=message):
        state_shardings(Decoder(model), make_optimizer(config.Train()), layout)

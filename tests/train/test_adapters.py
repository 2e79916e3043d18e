"""Training adapters: no gradient of a frozen matrix is computed, and any mesh makes the same update."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.counts.flops import flops_per_token, mixing_flops
from jaxlm.mesh import Layout
from jaxlm.models.decoder import init_params
from jaxlm.plan.hlo.program import parse
from jaxlm.recipes.sft import recipe
from jaxlm.train.adapters import adapter_params, base_collections, new_adapters
from jaxlm.train.program import Program, abstract_inputs, training_program
from jaxlm.train.recipe import BASE

DENSE = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "d_ff": 64, "vocab_size": 64}
EXPERTS = {**DENSE, "pattern": ["attention+moe"], "moe": {"n_experts": 4}}
MESHES = {
    "fsdp": {"data": 1, "fsdp": 8},
    "data.fsdp.tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data.expert": {"data": 2, "expert": 4},
}


def settings(model: dict[str, Any], lora: dict[str, Any], mesh: dict[str, Any], **train: Any) -> config.Config:
    wide = {"params": "float64", "compute": "float64", "matmul": "highest"}
    common = {"init_from": "base", "batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-2, **train}
    tree = {"recipe": "sft", "model": model, "lora": lora, "train": common, "mesh": mesh, "numerics": wide}
    return toml.from_dict({**tree, "data": {"seq_len": 16}})


def flops(cfg: config.Config) -> tuple[float, Program]:
    layout = Layout.from_config(cfg.mesh, jax.devices()[:1])
    program = training_program(cfg, layout, recipe(cfg))
    compiled = program.step.lower(*abstract_inputs(cfg, layout, program)).compile()
    return parse(compiled.as_text()).flops().total, program


def test_a_frozen_matrix_has_no_gradient() -> None:
    """Not the output matrix either, though `lm_loss` makes its gradient in the forward pass."""
    model = {**DENSE, "d_ff": 192, "vocab_size": 512, "layer_loop": "unroll"}
    size = {"batch_size": 2, "loss_block": 16}
    with jax.enable_x64(True):
        adapters, program = flops(settings(model, {"rank": 2}, {"data": 1}, **size))
        full, _ = flops(settings(model, {}, {"data": 1}, **size))
        cfg, few = program.decoder.config, adapter_params(program.decoder, config.LoRA(rank=2))
    assert 0.6 < adapters / full <= 0.72
    assert flops_per_token(cfg, 1000, 16, few) == 4 * 1000 + 3 * mixing_flops(cfg, 16) + 6 * few


def updates(cfg: config.Config, devices: list[Any]) -> tuple[list[float], Any]:
    """Losses of three steps, and the adapters then."""
    layout = Layout.from_config(cfg.mesh, devices)
    program = training_program(cfg, layout, recipe(cfg))
    base = jax.tree.map(np.asarray, init_params(program.decoder, jax.random.key(1)))
    frozen = jax.device_put(base_collections(program.decoder, cfg.lora, base), program.frozen_shardings[BASE])
    begin = new_adapters(program.decoder, cfg.lora, base, cfg.seed)
    state = jax.jit(program.init, out_shardings=program.shardings)(jax.random.key(0))
    state = state._replace(params=jax.device_put(begin, program.shardings.params))
    random, axes = np.random.default_rng(0), {name: column.axes for name, column in program.recipe.columns.items()}
    tokens = random.integers(0, 64, (8, 17)).astype(np.int32)
    place = np.arange(16, dtype=np.int32) % 8
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": np.tile(place, (8, 1))}
    rows |= {"segments": np.tile(1 + np.arange(16, dtype=np.int32) // 8, (8, 1))}
    rows |= {"weights": random.integers(0, 2, (8, 16)).astype(np.float32)}
    losses = []
    for _ in range(3):
        state, metrics = program.step(state, {BASE: frozen}, layout.place(rows, 8, axes))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [
        ("data.fsdp.tensor", "nf4"),
        *(
            pytest.param(mesh, kind, marks=pytest.mark.soak)
            for mesh, kind in (("fsdp", "nf4"), ("fsdp", "dora"), ("data.expert", "lora"), ("data.fsdp.tensor", "dora"))
        ),
    ],
)
def test_a_mesh_makes_the_same_update(mesh: str, kind: str) -> None:
    lora = {"rank": 4, **({"quantize": "nf4"} if kind == "nf4" else {"dora": kind == "dora"})}
    model = EXPERTS if mesh == "data.expert" else DENSE
    with jax.enable_x64(True):
        losses, wanted = updates(settings(model, lora, {"data": 1}), jax.devices()[:1])
        split, found = updates(settings(model, lora, MESHES[mesh]), jax.devices())
    np.testing.assert_allclose(split, losses, rtol=1e-10)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12, err_msg=jax.tree_util.keystr(path))

"""Plans of distillation: the teacher, the projections, and the outputs of layers that the loss waits for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.infer.model import Model
from jaxlm.mesh import Layout
from jaxlm.parity.inputs import random_params
from jaxlm.plan.compile_elsewhere import measure
from jaxlm.plan.memory import estimate
from jaxlm.plan.topology import parse
from jaxlm.recipes import make_recipe
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train.program import abstract_inputs, training_program

eight = pytest.mark.skipif(jax.device_count() != 8, reason="needs the 8 virtual devices of conftest.py")
BYTES = Tokenizer.bytes_level()
MODEL: dict[str, Any] = {"vocab_size": BYTES.vocab_size, "n_heads": 2, "n_kv_heads": 2, "max_seq_len": 128}
TEACHER = {**MODEL, "d_model": 128, "n_layers": 4, "d_ff": 128, "layer_loop": "scan"}
STUDENT = {**MODEL, "d_model": 32, "n_layers": 4, "d_ff": 64, "layer_loop": "scan", "remat": "full"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "teacher"
    cfg = toml.from_dict({"model": TEACHER, "data": {"seq_len": 128}})
    params = jax.tree.map(lambda x: np.asarray(x, "float32"), random_params(cfg.model))
    Model(cfg, params, BYTES).save(folder)
    return folder


@eight
@pytest.mark.parametrize("divergence", ["forward", "hidden"])
def test_the_config_of_the_repository_is_planned(divergence: str, teacher: Path) -> None:
    """Its student, a teacher of another shape and the projection, split over a mesh: all that lies there is counted."""
    file = Path(__file__).parents[2] / "configs" / "finetune" / "distill.toml"
    options = [f'distill.teacher="{teacher}"', f"model.vocab_size={BYTES.vocab_size}"]
    mesh = [f"mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    cfg = toml.load(file, [*options, *mesh, f"distill.divergence={divergence}"])
    layout = Layout.from_config(cfg.mesh)
    taken = state, frozen, _ = abstract_inputs(cfg, layout, training_program(cfg, layout, make_recipe(cfg)))
    assert frozen.keys() == {"teacher"}
    assert ("projection" in state.params) == (divergence == "hidden")
    wanted = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(taken))
    assert estimate(cfg, 8).state == pytest.approx(wanted, abs=200), "but for a few counters"


@eight
def test_what_a_teacher_adds_is_that_of_the_compiler(teacher: Path) -> None:
    """Within a tenth of the memory of the compiled step: a teacher whose distributions are compared, and then hidden
    states, from one pair of layers to all of them, stacked in both models."""

    def cfg(recipe: str, *layers: int) -> config.Config:
        hidden = {"divergence": "hidden", "layers": [[i, i] for i in layers]} if layers else {}
        tree = {
            "recipe": recipe,
            "model": STUDENT,
            "data": {"seq_len": 128},
            "train": {"batch_size": 32, "loss_block": 64},
        }
        return toml.from_dict({**tree, "distill": {"teacher": str(teacher), **hidden}})

    for fewer, more in ((cfg("pretrain"), cfg("distill")), (cfg("distill", 3), cfg("distill", 0, 1, 2, 3))):
        counted, measured = (found(more) - found(fewer) for found in (_estimated, _measured))
        assert 0.9 < counted / measured < 1.1


@eight
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_logits_of_a_large_vocabulary_are_counted(divergence: str, tmp_path: Path) -> None:
    """Blocks of logits that are larger than all else: a teacher adds as much as the compiled step says."""
    wide = {"vocab_size": 8192, "tie_embeddings": False}
    teaching = toml.from_dict({"model": {**TEACHER, **wide}, "data": {"seq_len": 128}})
    params = jax.tree.map(lambda x: np.asarray(x, "float32"), random_params(teaching.model))
    Model(teaching, params, BYTES).save(tmp_path / "teacher")
    common = {"model": {**STUDENT, **wide}, "data": {"seq_len": 128}, "train": {"batch_size": 32, "loss_block": 256}}
    options = {"teacher": str(tmp_path / "teacher"), "divergence": divergence}
    alone, taught = (
        toml.from_dict({**common, "recipe": name, "distill": distill})
        for name, distill in (("pretrain", {}), ("distill", options))
    )
    counted, measured = (found(taught) - found(alone) for found in (_estimated, _measured))
    assert 0.9 < counted / measured < 1.1


@eight
@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_activations_of_a_value_model_are_counted(trunk: str) -> None:
    """One of its own has as many layers as the policy, and both wait for the backward pass of one loss."""
    common = {"model": STUDENT, "data": {"seq_len": 128}, "train": {"batch_size": 32, "init_from": "base"}}
    rl = {"rewards": ["exact_text"], "prompts": 8, "group": 4, "max_new_tokens": 64, "value_trunk": trunk}
    policy, both = (toml.from_dict({**common, "recipe": name, "rl": rl}) for name in ("grpo", "ppo"))
    counted, measured = (found(both) - found(policy) for found in (_estimated, _measured))
    assert 0.9 < counted / measured < 1.1


def _estimated(cfg: config.Config) -> int:
    return estimate(cfg, 8).bytes


def _measured(cfg: config.Config) -> int:
    return measure(cfg, parse("cpu:8")).bytes

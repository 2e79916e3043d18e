"""The public layouts with state spaces: config.json of real models, what is refused, old spellings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm import config
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.families.jamba import period
from jaxlm.convert.files import storage
from jaxlm.convert.open_model import load
from jaxlm.convert.rows import plan, to_layout
from jaxlm.convert.settings import function_of
from jaxlm.convert.tensors import InMemory
from jaxlm.counts.parameters import parameters
from jaxlm.errors import UserError

MAMBA_130M = {
    "model_type": "mamba",
    "hidden_size": 768,
    "intermediate_size": 1536,
    "num_hidden_layers": 24,
    "state_size": 16,
    "time_step_rank": 48,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "vocab_size": 50280,
}
MAMBA2_130M = {
    "model_type": "mamba2",
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "num_heads": 24,
    "n_groups": 1,
    "time_step_limit": [0.0, math.inf],
    "norm_before_gate": False,
    "tie_word_embeddings": True,
    "vocab_size": 50288,
}
CODESTRAL = {
    "model_type": "mamba2",
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "num_heads": 128,
    "n_groups": 8,
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
    "norm_before_gate": True,
    "tie_word_embeddings": False,
    "vocab_size": 32768,
}
JAMBA = {
    "model_type": "jamba",
    "vocab_size": 65536,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 256,
    "mamba_inner_layernorms": True,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("hf", "total", "active"),
    [(MAMBA_130M, "0.129", ""), (MAMBA2_130M, "0.129", ""), (CODESTRAL, "7.29", ""), (JAMBA, "51.6", "12.1")],
    ids=["mamba-130m", "mamba2-130m", "codestral", "jamba-v0.1"],
)
def test_public_models(hf: dict, total: str, active: str) -> None:
    """Parameters, in thousands of millions, as published; what goes out says what came in."""
    family = FAMILIES[hf["model_type"]]
    model = family.config_from_hf(hf)
    found = parameters(model)
    assert [f"{one / 1e9:.3g}" for one in found] == [total, active or total]
    back = family.config_to_hf(model, dtype="bfloat16")
    ours = {"residual_in_fp32", *({"norm_before_gate", "time_step_limit"} & hf.keys())}
    assert {key: back[key] for key in back.keys() & hf.keys() - ours} == {
        key: hf[key] for key in back.keys() & hf.keys() - ours
    }
    assert function_of(family.config_from_hf(back)) == function_of(model)
    assert sum(math.prod(one.shape) for one in plan(_Nothing(), model, family.rows(model))) == found[0]


class _Nothing(InMemory):
    """Parameters that are never read."""

    def __init__(self) -> None:
        super().__init__({})

    def dtype(self, name: str) -> str:
        return "bfloat16"


def test_the_pattern_of_jamba() -> None:
    model = FAMILIES["jamba"].config_from_hf(JAMBA)
    mixers = [kind.split("+")[0] for kind in model.pattern]
    assert mixers == ["mamba"] * 4 + ["attention"] + ["mamba"] * 3 and model.repeats == 4
    assert [kind.split("+")[1] for kind in model.pattern] == ["mlp", "moe"] * 4
    plain = FAMILIES["jamba"].config_from_hf({**JAMBA, "num_experts": 1, "num_experts_per_tok": 1})
    assert {kind.split("+")[1] for kind in plain.pattern} == {"mlp"}


@pytest.mark.parametrize(
    ("chosen", "repeats", "found"),
    [
        ([0, 1], 3, (2, 1)),
        ([0, 0, 1, 0], 1, (4, 2)),
        ([1], 4, (1, 0)),
        ([0, 0], 2, (7, 6)),  # none in one repeat more
        ([1, 0, 1], 1, (2, 0)),
        ([1, 1, 0], 2, ()),
    ],
)
def test_period(chosen: list[int], repeats: int, found: tuple) -> None:
    assert period([bool(one) for one in chosen], repeats) == found


@pytest.mark.parametrize(
    ("hf", "key"),
    [
        ({**MAMBA_130M, "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({**MAMBA_130M, "rms_norm": False}, "rms_norm = False"),
        ({**MAMBA2_130M, "time_step_limit": [0.0, 0.1]}, "time_step_limit = "),
        ({**MAMBA2_130M, "num_heads": 23}, "num_heads = 23 of head_dim = 64"),
        ({**JAMBA, "mamba_inner_layernorms": False}, "mamba_inner_layernorms = False"),
        ({**JAMBA, "sliding_window": 4096}, "sliding_window = 4096"),
        ({**JAMBA, "attn_layer_offset": 8}, "attn_layer_offset = 8 is not below attn_layer_period = 8"),
        ({**JAMBA, "expert_layer_period": 0}, "expert_layer_offset = 1 is not below expert_layer_period = 0"),
        ({**JAMBA, "hidden_act": "relu"}, "hidden_act = 'relu'"),
    ],
)
def test_what_config_json_may_not_say(hf: dict, key: str) -> None:
    with pytest.raises(UserError, match=rf"config\.json: {key.replace('[', chr(92) + '[')}"):
        FAMILIES[hf["model_type"]].config_from_hf(hf)


INNER = {"mamba": config.Mamba(inner_norms=True), "positions": "none"}
EXPERTS = {**INNER, "pattern": ("mamba+moe", "attention+moe"), "moe": config.MoE(renormalize=False)}


@pytest.mark.parametrize(
    ("to", "options", "option"),
    [
        ("mamba", {"pattern": ("mamba+mlp",)}, "model.pattern"),
        ("mamba", {"pattern": ("mamba2",), "mamba": config.Mamba(head_dim=8)}, "model.pattern"),
        ("mamba", {"pattern": ("mamba",), **INNER}, "model.mamba.inner_norms = True"),
        ("mamba", {"pattern": ("mamba", "mamba(d_state=3)")}, "model.mamba.d_state = 3 of layer 1"),
        ("mamba", {"pattern": ("mamba",), "norm": "layernorm"}, "model.norm = 'layernorm'"),
        ("mamba", {"pattern": ("mamba",), "positions": "learned"}, "model.positions = 'learned'"),
        ("mamba2", {"pattern": ("mamba2", "mamba2(d_conv=3)"), "mamba": config.Mamba(head_dim=8)}, "d_conv = 3"),
        ("jamba", {**EXPERTS, "positions": "rope"}, "model.positions = 'rope'"),
        ("jamba", {**EXPERTS, "moe": config.MoE()}, "model.moe.renormalize = True"),
        ("jamba", {**EXPERTS, "moe": config.MoE(renormalize=False, d_ff=8)}, "model.moe.d_ff = 8"),
        ("jamba", {**EXPERTS, "mamba": config.Mamba()}, "model.mamba.inner_norms = False"),
        ("jamba", {**EXPERTS, "pattern": ("attention+mlp", "mamba+mlp") * 2, "window": 8}, "model.window = 8"),
        ("jamba", {**INNER, "pattern": ("mamba+mlp", "attention+mlp", "attention+mlp", "mamba+mlp")}, "model.pattern"),
        ("llama", {"pattern": ("mamba",)}, "model.pattern"),
    ],
)
def test_what_a_layout_has_no_place_for(make_model: Callable, to: str, options: dict, option: str) -> None:
    with pytest.raises(UserError, match=option):
        FAMILIES[to].config_to_hf(make_model(**options), dtype="float32")


def test_what_plays_no_role_is_no_obstacle(make_model: Callable) -> None:
    """Options of the other mixer, a block that spells out what the model says."""
    cfg = make_model(pattern=("mamba", "mamba(d_state=7)"), mamba=config.Mamba(d_state=7, head_dim=5, n_groups=3))
    assert FAMILIES["mamba"].config_to_hf(cfg, dtype="float32")["state_size"] == 7
    cfg = make_model(pattern=("mamba2",), mamba=config.Mamba(head_dim=8, dt_rank=9, inner_norms=True))
    assert FAMILIES["mamba2"].config_to_hf(cfg, dtype="float32")["num_heads"] == 4


OLD, NEW = "backbone.embedding.weight", "backbone.embeddings.weight"


def _folder(tmp_path: Path, cfg: config.Model, tensors: dict[str, np.ndarray]) -> Path:
    files = {"config.json": json.dumps(FAMILIES["mamba"].config_to_hf(cfg, dtype="float32"))}
    storage.write_folder(tmp_path / "old", storage.planned(tensors.items()), files, layout="mamba")
    return tmp_path / "old"


def test_the_old_spelling_of_the_embedding(
    make_model: Callable, make_params: Callable, same: Callable, tmp_path: Path
) -> None:
    """As the first files of state-spaces/mamba-*-hf have it, with a copy of it as the head."""
    cfg = make_model(pattern=("mamba",))
    params = make_params(cfg)
    tensors = dict(to_layout(params, cfg, FAMILIES["mamba"].rows(cfg)))
    tensors[OLD] = tensors.pop(NEW)
    opened = load(_folder(tmp_path, cfg, {**tensors, "lm_head.weight": tensors[OLD]}))
    same(opened.params, params)


def test_a_head_that_is_not_the_embedding(make_model: Callable, make_params: Callable, tmp_path: Path) -> None:
    cfg = make_model(pattern=("mamba",))
    tensors: dict[str, Any] = dict(to_layout(make_params(cfg), cfg, FAMILIES["mamba"].rows(cfg)))
    tensors[OLD] = tensors.pop(NEW)
    with pytest.raises(UserError, match=rf"lm_head\.weight differs from {NEW}"):
        load(_folder(tmp_path, cfg, {**tensors, "lm_head.weight": tensors[OLD] + 1}))


def test_both_spellings_are_one_too_many(make_model: Callable, make_params: Callable, tmp_path: Path) -> None:
    cfg = make_model(pattern=("mamba",))
    tensors: dict[str, Any] = dict(to_layout(make_params(cfg), cfg, FAMILIES["mamba"].rows(cfg)))
    with pytest.raises(UserError, match=f"{OLD} and {NEW} are the same tensor"):
        load(_folder(tmp_path, cfg, {**tensors, OLD: tensors[NEW]}))

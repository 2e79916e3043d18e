"""Explanations of faults in folders of Hugging Face, computed by transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import config
from jaxlm.convert.open_model import load
from jaxlm.errors import UserError
from jaxlm.parity import check as check_parity
from jaxlm.parity.diagnose.search import explain
from jaxlm.parity.sides.torch_side import TorchSide
from jaxlm.parity.sides.transformers_side import HuggingFaceSide
from parity_tests import families, families_moe
from parity_tests.families import Example, exported
from parity_tests.test_explain import check, inputs_of, interleaved


def example(family: str) -> Example:
    return next(one for one in (*families.EXAMPLES, *families_moe.EXAMPLES) if one.family == family)


FOLDERS: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "theta": (
        "llama",
        {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e6},
        None,
        "^rope_theta is 1e\\+06 instead",
    ),
    "eps": ("mistral", {"rms_norm_eps": 1e-8}, None, "^norm_eps is 1e-08 instead"),
    "GELU": ("gpt2", {"activation_function": "gelu"}, None, "erf form of GELU instead of the tanh"),
    "top-k": ("mixtral", {"num_experts_per_tok": 2}, None, "^top_k is 2 instead of 1"),
    "transposed": (
        "llama",
        {},
        lambda name, x: x.T if name.endswith("q_proj.weight") and x.shape[0] == x.shape[1] else x,
        r"^mixer\.q_proj\.weight .*: transposed$",
    ),
    "interleaved": (
        "qwen2",
        {},
        lambda name, x: interleaved(x, example("qwen2").model.head_dim) if re.search("[qk]_proj", name) else x,
        "in the order of interleaved .* rotary pairs$",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_fault_in_a_public_folder_is_named(name: str, tmp_path: Path) -> None:
    family, keys, change, words = FOLDERS[name]
    one = example(family)
    folder = exported(one, tmp_path)
    said = json.loads((folder / "config.json").read_text())
    for key, value in keys.items():
        said[key] = {**(said.get(key) or {}), **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "manifest.json").unlink()
    stored = load_file(folder / "model.safetensors")
    if change:
        stored = {key: np.ascontiguousarray(change(key, x)) for key, x in stored.items()}
        save_file(stored, folder / "model.safetensors")
    sound = config.Config(model=one.model)
    ours, theirs = TorchSide.of(sound, families.values(one)), HuggingFaceSide(sound, folder)
    check(explain(ours, theirs, sound, None, inputs_of(one.model)), words)


@pytest.mark.parametrize(
    ("family", "key", "value"), [("llama", "hidden_act", "gelu"), ("gpt2", "activation_function", "quick_gelu")]
)
def test_its_own_program_computes_what_jaxlm_cannot_express(family: str, key: str, value: str, tmp_path: Path) -> None:
    folder = exported(example(family), tmp_path)
    said = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "manifest.json").unlink()
    report = check_parity(folder, levels=["forward"], dtypes=["float64"])
    differing = [finding for finding in report.findings if not finding.ok]
    assert {finding.level for finding in differing} == {"config", "forward"} and not report.same
    assert differing[0].name == key
    assert differing[0].note == f"{value!r}, which transformers computes and jaxlm cannot express"
    for refused in (lambda: check_parity(folder, computed_by="torch"), lambda: load(folder)):
        with pytest.raises(UserError, match=f"{key} = '{value}'"):
            refused()

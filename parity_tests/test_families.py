"""Every public family: its rows are all tensors of transformers, conversion keeps every bit, both compute the same.

transformers casts to float32 in norms, rotary angles, routers and softmax whatever the dtype of the model; the float64
rung lifts these casts (`jaxlm.parity.lifted`), so that only different mathematics is left to be seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jaxlm.convert import storage
from jaxlm.convert.convert import convert
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.load import open_model
from jaxlm.convert.settings import function_of
from parity_tests import families, families_moe, families_ssm
from parity_tests.families import Example, exported, measure, strictly
from parity_tests.tolerances import FLOAT64, FLOORS, RATIO

EXAMPLES = (*families.EXAMPLES, *families_moe.EXAMPLES, *families_ssm.EXAMPLES)
FIRST = tuple({one.family: one for one in reversed(EXAMPLES)}.values())
"""One example of each family."""
NOT_THE_MODEL = {"architectures", "transformers_version", "use_cache", "dtype", "torch_dtype"} | {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
every_example = pytest.mark.parametrize("one", EXAMPLES, ids=str)


def bits(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    """Shape, dtype and bytes of every tensor."""
    return {name: (x.shape, x.dtype.name, np.ascontiguousarray(x).tobytes()) for name, x in tensors.items()}


@every_example
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_bit_goes_out_and_comes_back(one: Example, dtype: str, tmp_path: Path) -> None:
    """ours -> family -> transformers -> its own files -> ours -> family."""
    out = exported(one, tmp_path, dtype, shard_bytes=30_000 if dtype == "float32" else 10**9)
    assert (out / storage.INDEX).exists() == (dtype == "float32")
    written = bits(storage.read_folder(out))
    theirs = strictly(out)
    assert {parameter.dtype for parameter in theirs.parameters()} == {getattr(torch, dtype)}
    theirs.save_pretrained(tmp_path / "saved")
    saved = bits(storage.read_folder(tmp_path / "saved"))
    assert saved == written, [name for name in saved | written if saved.get(name) != written.get(name)]
    convert(tmp_path / "saved", tmp_path / "again", "torch")
    assert bits(storage.read_folder(tmp_path / "again")) == bits(storage.read_folder(tmp_path / "torch"))
    convert(tmp_path / "again", tmp_path / "out", one.family)
    assert bits(storage.read_folder(tmp_path / "out")) == written


@every_example
def test_the_rows_and_the_config_are_those_of_their_model(one: Example, tmp_path: Path) -> None:
    """A model that transformers makes from a config of its own: the same tensors, the same `[model]`, the same keys."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(one.theirs()).save_pretrained(tmp_path / "theirs")
    ours = open_model(tmp_path / "theirs")
    assert function_of(ours.config.model) == function_of(one.model)
    shapes = {name: tensor.shape for name, tensor in storage.read_folder(tmp_path / "theirs").items()}
    out = exported(one, tmp_path)
    assert {name: tensor.shape for name, tensor in storage.read_folder(out).items()} == shapes

    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "theirs", out))
    shared = before.keys() & after.keys() - NOT_THE_MODEL
    assert {key: after[key] for key in shared} == {key: before[key] for key in shared}
    loaded = AutoConfig.from_pretrained(out).to_dict()
    differing = {key for key in before if loaded.get(key) != before[key]} - NOT_THE_MODEL
    assert not differing, {key: (before[key], loaded.get(key)) for key in differing}
    assert function_of(open_model(out).config.model) == function_of(one.model)
    family = FAMILIES[one.family]
    again = family.config_from_hf(family.config_to_hf(one.model, dtype="float32"))
    assert again.rope_layout == one.model.rope_layout


@every_example
def test_transformers_computes_the_same(one: Example) -> None:
    """Logits of a prompt of 512 tokens; every dtype for one example of each family."""
    errors = measure(one, ("float32", "bfloat16") if one in FIRST else ())
    FLOAT64.check(errors.float64, "logits in float64")
    if one in FIRST:
        for dtype in ("float32", "bfloat16"):
            ours, theirs = getattr(errors, dtype)
            RATIO.check(ours / max(theirs, FLOORS[dtype].allowed), f"{dtype}: jaxlm against transformers")

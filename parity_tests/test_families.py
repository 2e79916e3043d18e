"""Every public family: its rows are all tensors of transformers, conversion keeps every bit, both compute the same.

transformers casts to float32 in norms, rotary angles, routers and softmax whatever the dtype of the model; the float64
rung lifts these casts (`jaxlm.parity.sides.float64_mode`), so that only different mathematics is left to be seen.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jaxlm.convert.families import FAMILIES
from jaxlm.convert.family import Family
from jaxlm.convert.files import storage
from jaxlm.convert.open_model import open_model
from jaxlm.convert.rows import Row, matrix, pairs_to_halves
from jaxlm.convert.settings import Setting, always, function_of
from jaxlm.convert.write_model import convert
from parity_tests import table
from parity_tests.families import Example, exported, measure, strictly
from parity_tests.table import EXAMPLES
from parity_tests.tolerances import FLOAT64, FLOORS, RATIO

FIRST = tuple({one.family: one for one in reversed(EXAMPLES)}.values())
"""One example of each family."""
NOT_THE_MODEL = {"_name_or_path", "architectures", "transformers_version", "use_cache", "dtype", "torch_dtype"} | {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
every_example = pytest.mark.parametrize("one", EXAMPLES, ids=str)


def bits(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    """Shape, dtype and bytes of every tensor."""
    return {name: (x.shape, x.dtype.name, np.ascontiguousarray(x).tobytes()) for name, x in tensors.items()}


NARROW = [(dtype, one) for dtype in ("bfloat16", "float16") for one in EXAMPLES]
"""All tensors are narrowed by the same lines, but for `FLOAT32`: one example of a family suffices, `soak` has all."""


@pytest.mark.parametrize(
    ("dtype", "one"),
    [
        *(("float32", one) for one in EXAMPLES),
        *(pytest.param(*case, marks=() if case[1] in FIRST else pytest.mark.soak) for case in NARROW),
    ],
    ids=str,
)
def test_every_bit_goes_out_and_comes_back(one: Example, dtype: str, tmp_path: Path) -> None:
    """ours -> family -> transformers -> its own files -> ours -> family."""
    out = exported(one, tmp_path, dtype, shard_bytes=30_000 if dtype == "float32" else 10**9)
    assert (out / storage.INDEX).exists() == (dtype == "float32")
    written = bits(storage.read_folder(out))
    theirs = strictly(out)
    assert theirs.lm_head.weight.dtype == getattr(torch, dtype)
    theirs.save_pretrained(tmp_path / "saved")
    saved = bits(storage.read_folder(tmp_path / "saved"))
    assert saved == written, [name for name in saved | written if saved.get(name) != written.get(name)]
    convert(tmp_path / "saved", tmp_path / "again", "torch")
    assert bits(storage.read_folder(tmp_path / "again")) == bits(storage.read_folder(tmp_path / "torch"))
    convert(tmp_path / "again", tmp_path / "out", one.family)
    assert bits(storage.read_folder(tmp_path / "out")) == written


@every_example
def test_the_rows_and_the_config_are_those_of_their_model(
    one: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that transformers makes from a config of its own: the same tensors, the same `[model]`, the same keys."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(one.theirs()).save_pretrained(tmp_path / "theirs")
    capsys.readouterr()
    ours = open_model(tmp_path / "theirs")
    assert capsys.readouterr().err == ""  # no key of theirs is unknown
    assert function_of(ours.config.model) == function_of(one.model)
    shapes = {name: tensor.shape for name, tensor in storage.read_folder(tmp_path / "theirs").items()}
    out = exported(one, tmp_path)
    assert {name: tensor.shape for name, tensor in storage.read_folder(out).items()} == shapes

    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "theirs", out))
    shared = before.keys() & after.keys() - NOT_THE_MODEL
    assert {key: after[key] for key in shared} == {key: before[key] for key in shared}
    before, loaded = (AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / "theirs", out))
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


def of_rows(change: Callable[[Row], Row]) -> Callable[[Family], Family]:
    """A fault in the rows of a family."""
    return lambda family: replace(family, rows=lambda cfg: [change(row) for row in family.rows(cfg)])


def swap_gate_and_up(row: Row) -> Row:
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    swap = lambda name: re.sub("gate_proj|up_proj", lambda found: other[found[0]], name)  # noqa: E731
    return Row(row.ours, tuple(map(swap, row.theirs)), *row.transforms)


def forget_the_turn(row: Row) -> Row:
    return Row(row.ours, row.theirs, *(one for one in row.transforms if one is not pairs_to_halves))


def values_first(row: Row) -> Row:
    return Row(row.ours[::-1], row.theirs, *row.transforms)


def conv1d_as_linear(row: Row) -> Row:
    turned = row.theirs[0].endswith("attn.c_proj.weight")
    return Row(row.ours, row.theirs, *((matrix,) if turned else row.transforms))


ONE_MORE = Setting(
    lambda model: {"sliding_window": model.window - 1},
    lambda hf: {"pattern": ["attention+mlp"], "window": hf["sliding_window"] + 1},
)
"""A window that leaves the token itself out of its count, both ways."""


def of_settings(theirs: str, wrong: Setting) -> Callable[[Family], Family]:
    """A fault in the settings of a family: another in the place of that for a key."""
    return lambda family: replace(
        family, settings=tuple(wrong if one.name == theirs else one for one in family.settings)
    )


FAULTS: dict[str, tuple[str, Callable[[Family], Family]]] = {
    "gate and up swapped": ("llama: grouped heads, tied", of_rows(swap_gate_and_up)),
    "rotary pairs as they are": ("llama: interleaved", of_rows(forget_the_turn)),
    "eps left to the default": ("llama: grouped heads, tied", of_settings("rms_norm_eps", always("norm_eps", 1e-5))),
    "window of one more": ("mistral: window", of_settings("sliding_window", ONE_MORE)),
    "values before keys": ("gpt2: tied", of_rows(values_first)),
    "Conv1D read as a Linear": ("gpt2: tied", of_rows(conv1d_as_linear)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant = FAULTS[fault]
    one = next(one for one in EXAMPLES if str(one) == name)
    monkeypatch.setitem(FAMILIES, one.family, plant(FAMILIES[one.family]))  # pyright: ignore[reportArgumentType]
    assert measure(one, ()).float64 > 1e3 * FLOAT64.allowed


def test_the_documentation_has_a_row_for_every_family() -> None:
    """With as many models as there are examples: a table that is out of date is made anew by `parity_tests.table`."""
    rows = re.findall(r"^\| `(\w+)` \| \w+ \| (\d+) \|", table.PAGE.read_text(encoding="utf-8"), re.M)
    assert {name: int(count) for name, count in rows} == Counter(one.family for one in EXAMPLES)
    assert [name for name, _ in rows] == list(FAMILIES)

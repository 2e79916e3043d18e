"""Depth and form of the layers change nothing: what is opened, converted, computed and proved, and what is refused.

Layers are stacked where they are scanned, as they are above eight, and a stack has one dtype. Tensors of some layers
are drawn to be missing, superfluous, of another shape, of another dtype or not finite: the same must be said of them
whether the layers are stacked or not, however many there are, and by each command.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert import native
from jaxlm.convert.canonical import canonical, leaves
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.files import storage
from jaxlm.convert.open_model import load
from jaxlm.convert.rows import Row, expand
from jaxlm.convert.write_model import convert
from jaxlm.errors import UserError
from jaxlm.infer import load as infer
from jaxlm.parity.check import check
from jaxlm.parity.subject import open_subject
from jaxlm.text.tokenizer import Tokenizer

SIZES: dict[str, Any] = {"d_model": 8, "n_heads": 2, "n_kv_heads": 1, "d_ff": 12, "vocab_size": 300, "max_seq_len": 32}
MAMBA = config.Mamba(d_state=4, head_dim=4)
PATTERNS = (
    ("attention+mlp",),
    ("mamba",),
    ("mamba2", "attention(window=4)+mlp"),
    ("attention+mlp", "mamba+moe", "attention(sink_logits=true)+mlp"),
)
DTYPES = ("float16", "bfloat16", "float32", "float64")
REFUSED = ("int32", "uint8", "missing", "superfluous", "shape", "nan")
MOST = 10
"""Layers of a drawn model; one of every other is stacked by itself, and one is not."""


class Change(NamedTuple):
    """Something about one tensor of one layer."""

    layer: int
    tensor: int
    """Which of the layer's, counted around."""
    kind: str
    """A dtype, or one of `REFUSED`."""


class Drawn(NamedTuple):
    """A model whose tensors differ from one another."""

    pattern: tuple[str, ...]
    depth: int
    layout: str
    dtype: str
    changes: tuple[Change, ...]


@st.composite
def drawn_models(
    draw: Callable, kinds: tuple[str, ...] = (*DTYPES, *REFUSED), dtype: str | None = None, most: int = MOST
) -> Drawn:
    pattern = draw(st.sampled_from(PATTERNS))
    depth = len(pattern) * draw(st.integers(1, most // len(pattern)))
    layout = draw(st.sampled_from(("torch", "llama"))) if pattern == PATTERNS[0] else "torch"
    change = st.builds(Change, st.integers(0, depth - 1), st.integers(0, 40), st.sampled_from(kinds))
    changes = draw(st.lists(change, max_size=3, unique_by=lambda one: one[:2]))
    return Drawn(pattern, depth, layout, dtype or draw(st.sampled_from(DTYPES)), tuple(changes))


def config_of(model: Drawn, form: str) -> config.Config:
    sizes = {**SIZES, "n_layers": model.depth, "pattern": model.pattern, "layer_loop": form}
    wide = "float64" if model.dtype == "float64" else "float32"
    numerics = config.Numerics(params=wide, compute=wide)
    moe = config.MoE(n_experts=2, top_k=1)
    return config.Config(model=config.Model(mamba=MAMBA, moe=moe, **sizes), numerics=numerics)


def rows_of(model: Drawn, cfg: config.Model) -> list[Row]:
    return expand(FAMILIES["llama"].rows(cfg) if model.layout == "llama" else native.rows(cfg), cfg)


def kinds_of(model: Drawn, cfg: config.Model) -> dict[str, str]:
    """What is drawn about each tensor, by the names of the layout; of two things about one the first."""
    layers: dict[str, list[str]] = {}
    for row in rows_of(model, cfg):
        layers.setdefault(".".join(row.ours[0].split(".")[:2]), []).extend(row.theirs)
    found: dict[str, str] = {}
    for layer, number, kind in model.changes:
        names = sorted(layers[f"layers.{layer}"])
        found.setdefault(names[number % len(names)], kind)
    return found


def tensors_of(model: Drawn, cfg: config.Model) -> dict[str, np.ndarray]:
    """Every tensor by the names of the layout, with values that depend on its name alone, and what is drawn of it."""
    found, kinds = {}, kinds_of(model, cfg)
    for row in rows_of(model, cfg):
        for name, shape in zip(row.theirs, row.shapes([leaves(cfg)[one] for one in row.ours]), strict=True):
            exact = np.random.default_rng(zlib.crc32(name.encode())).uniform(0.5, 1.5, shape)
            values = exact.astype(model.dtype)
            match kinds.get(name, model.dtype):
                case "missing":
                    continue
                case "superfluous":
                    found |= {name: values, f"{name}.more": values}
                case "shape":
                    found[name] = np.ones((*shape, 2), model.dtype)
                case "nan":
                    found[name] = np.full_like(values, np.nan)
                case dtype:
                    found[name] = exact.astype(dtype)  # with all the digits that this dtype has
    return found


def written(model: Drawn, form: str, at: Path) -> dict[str, np.ndarray]:
    """Write the folder of a drawn model; returns its tensors."""
    cfg = config_of(model, form)
    tensors = tensors_of(model, cfg.model)
    if model.layout == "llama":
        files = {"config.json": json.dumps(FAMILIES["llama"].config_to_hf(cfg.model, dtype=model.dtype))}
    else:
        files = {"config.toml": toml.to_toml(cfg)}
    files |= {"tokenizer.json": Tokenizer.bytes_level().to_json()}
    storage.write_folder(at, storage.planned(tensors.items()), files, layout="torch")
    return tensors


def line_of(work: Callable[[], Any], at: Path) -> tuple[str, Any]:
    """What a command says against a folder, or "" and what it returns."""
    try:
        return "", work()
    except UserError as error:
        return str(error).replace(str(at), "FOLDER"), None


def outcome(model: Drawn, form: str) -> dict[str, str]:
    """What each command says; whatever is taken must have kept its values."""
    with tempfile.TemporaryDirectory() as scratch:
        at, to = Path(scratch, "model"), Path(scratch, "run")
        tensors = written(model, form, at)
        lines: dict[str, str] = {}
        lines["load"], opened = line_of(lambda: load(at), at)
        lines["parity"], subject = line_of(lambda: open_subject(at), at)
        lines["convert"], _ = line_of(lambda: convert(at, to, "jaxlm"), at)
        trees = [one.params for one in (opened, subject) if one]
        if not lines["convert"]:
            lines["converted"], again = line_of(lambda: load(to), to)
            trees += [again.params] if again else []
        for params in trees:
            check_values(params, model, config_of(model, form).model, tensors)
        return lines


def check_values(params: Any, model: Drawn, cfg: config.Model, tensors: Mapping[str, np.ndarray]) -> None:
    """Fails unless a live tree has exactly the values of the tensors."""
    parameters = canonical(params, cfg)
    for row in rows_of(model, cfg):
        theirs = row.out([np.asarray(parameters[name]) for name in row.ours], [leaves(cfg)[name] for name in row.ours])
        for name, values in zip(row.theirs, theirs, strict=True):
            np.testing.assert_array_equal(values.astype("f8"), tensors[name].astype("f8"), err_msg=name)


def check_outcomes(model: Drawn) -> None:
    """One line for all forms and depths, and one answer by all commands."""
    forms = ("scan", "unroll") if model.layout == "torch" else ("auto",)
    lines = {form: outcome(model, form) for form in forms}
    deeper = model._replace(depth=model.depth + len(model.pattern) * -(-(9 - model.depth) // len(model.pattern)))
    lines |= {f"{deeper.depth} layers": outcome(deeper, "auto")} if deeper.depth > model.depth else {}
    expected = next(iter(lines.values()))
    assert set(map(str, lines.values())) == {str(expected)}, lines
    refused = any(kind in REFUSED for kind in kinds_of(model, config_of(model, "auto").model).values())
    assert {bool(line) for line in expected.values()} == {refused}, expected


@settings(max_examples=6)
@given(drawn_models())
def test_the_same_is_said_of_any_depth_and_form(model: Drawn) -> None:
    check_outcomes(model)


@pytest.mark.soak
@settings(max_examples=500)
@given(drawn_models())
def test_the_same_is_said_of_many(model: Drawn) -> None:
    check_outcomes(model)


def check_numbers(model: Drawn, tokens: int) -> None:
    """Logits in float64, and so many greedy tokens, of tensors of several dtypes."""
    found = []
    for form in ("scan", "unroll"):
        with tempfile.TemporaryDirectory() as scratch:
            written(model, form, Path(scratch, "model"))
            opened = infer.load(Path(scratch, "model"))
            text = opened.generate("ab", max_new_tokens=tokens).tokens if tokens else []
            found.append((np.asarray(opened([5, 8, 2, 70, 41, 9])), text))
    (logits, text), (others, other_text) = found
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, others, rtol=0, atol=1e-10 * np.abs(logits).max())
    assert text == other_text


@settings(max_examples=1)
@given(drawn_models(DTYPES, "float64", 3).filter(lambda model: model.changes and len(model.pattern) > 1))
def test_numbers_are_those_of_any_form(model: Drawn) -> None:
    check_numbers(model, 0)


@pytest.mark.soak
@settings(max_examples=40)
@given(drawn_models(DTYPES, "float64"))
def test_numbers_of_many(model: Drawn) -> None:
    check_numbers(model, 6)


@pytest.mark.soak
@settings(max_examples=6)
@given(drawn_models(DTYPES))
def test_the_whole_proof(model: Drawn) -> None:
    """`jaxlm parity` takes what `generate` takes, and finds both frameworks the same."""
    for form in ("scan", "unroll"):
        with tempfile.TemporaryDirectory() as scratch:
            written(model, form, Path(scratch, "model"))
            report = check(Path(scratch, "model"), levels=("weights", "forward", "generation"), dtypes=("float64",))
            assert report.same, report

"""Golden files: quiet when a model is computed again, loud at every planted fault, small, and refused when damaged."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxlm import config
from jaxlm.cli.app import app
from jaxlm.config import toml
from jaxlm.convert.open_model import Model
from jaxlm.errors import UserError
from jaxlm.models.decoder import Params
from jaxlm.ops import norm
from jaxlm.parity import assert_golden, check_golden, write_golden
from jaxlm.parity.compare import Finding
from jaxlm.parity.golden import comparison, content
from jaxlm.parity.golden.file import Golden, read_golden
from jaxlm.parity.inputs import make_inputs, random_params
from jaxlm.parity.sides import jax_side
from jaxlm.parity.sides.jax_side import JaxSide
from jaxlm.parity.trace import DTYPES

BASE: dict[str, Any] = {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"layer_loop": "unroll"},
    "learned positions, biases": {
        "positions": "learned",
        "max_seq_len": 128,
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "biases": ("qkv", "attention_out", "mlp"),
    },
    "experts": {
        "pattern": ("attention+moe",),
        "moe": {"n_experts": 4, "selection_bias": True, "balance_loss": 0.1},
        "n_layers": 1,
    },
    "mamba": {"pattern": ("mamba",), "mamba": {"d_state": 4}, "n_layers": 1},
    "hybrid": {
        "pattern": ("mamba2", "attention(window=32)+moe"),
        "mamba": {"d_state": 4, "head_dim": 8},
        "moe": {"n_experts": 4, "d_ff": 24},
        "layer_loop": "unroll",
    },
}


def settings(**options: Any) -> config.Config:
    """A small model with these options."""
    return toml.from_dict({"model": {"max_seq_len": 512, **BASE, **options}, "data": {"seq_len": 16}}, "test")


@pytest.fixture(scope="module")
def frozen() -> Callable[..., tuple[config.Config, Params, Golden]]:
    """A function from a model to its config, random weights and golden content."""

    @functools.cache
    def make(name: str, dtypes: tuple[str, ...] = ("float64",)) -> tuple[config.Config, Params, Golden]:
        cfg = settings(**MODELS[name])
        params = random_params(cfg.model)
        return cfg, params, content.freeze(JaxSide(cfg, params), cfg, make_inputs(cfg.model), dtypes)

    return make


def wrong(findings: list[Finding]) -> list[tuple[str, str, str]]:
    """Dtype, level and name of every difference."""
    return [(one.dtype, one.level, one.name) for one in findings if not one.ok]


SHORT = [name if name == "hybrid" else pytest.param(name, marks=pytest.mark.soak) for name in MODELS]
LEVELS = ["config", "weights", "forward", "loss", "gradients", "update 1", "update 20", "generation"]


@pytest.mark.parametrize("name", SHORT)
def test_the_same_model_passes(name: str, frozen: Any, tmp_path: Path) -> None:
    cfg, params, content = frozen(name)
    size = content.save(tmp_path / "a.json.gz")
    assert size < 50_000
    back = read_golden(tmp_path / "a.json.gz")
    assert back == content
    jax.clear_caches()  # compiled anew
    findings = comparison.compare(back, JaxSide(cfg, params), cfg)
    assert wrong(findings) == [] and len(findings) > 60
    levels = dict.fromkeys(one.level for one in findings)
    assert list(levels) == LEVELS
    assert max(one.error for one in findings if one.dtype == "float64") < 1e-13


def with_head_swapped(params: Params) -> Params:
    """The first two heads of the queries of a layer have changed places."""
    changed = jax.tree.map(np.array, params)
    kernel = changed["layers_1"]["mixer"]["q_proj"]["kernel"]
    kernel[:, [0, 1]] = kernel[:, [1, 0]]
    return changed


def with_one_weight_larger(params: Params) -> Params:
    changed = jax.tree.map(np.array, params)
    changed["layers_1"]["ffn"]["up_proj"]["kernel"][3, 5] *= np.float32(1 + 1e-6)
    return changed


# By name: options of [model] and of [train], a change of the weights; what is said of options and weights, and the
# first tensor of the computation that differs.
Fault = tuple[dict[str, Any], dict[str, Any], Callable[[Params], Params], str, tuple[str, str]]
FAULTS: dict[str, Fault] = {
    "eps": ({"norm_eps": 2e-5}, {}, lambda p: p, "model.norm_eps", ("forward", "layers.0.mixer_norm")),
    "theta": ({"rope_theta": 9999.0}, {}, lambda p: p, "model.rope_theta", ("forward", "layers.0.mixer.o_proj")),
    "one weight": ({}, {}, with_one_weight_larger, "layers.1.ffn.up_proj.weight", ("forward", "layers.1.ffn.up_proj")),
    "two heads": ({}, {}, with_head_swapped, "layers.1.mixer.q_proj.weight", ("forward", "layers.1.mixer.q_proj")),
    "optimiser": ({}, {"beta2": 0.96}, lambda p: p, "train.beta2", ("update 20", "embed.weight")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str, frozen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options, training, change, stored, (level, tensor) = FAULTS[name]
    cfg, params, content = frozen("dense")
    if not training:  # what comes after the gradients takes long to compile
        monkeypatch.setattr(JaxSide, "_updates", lambda *_: {})
        monkeypatch.setattr(jax_side, "generate", lambda *_, **__: [list(row) for row in content.tokens["float64"]])
    cfg = dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, **options), train=dataclasses.replace(cfg.train, **training)
    )
    findings = comparison.compare(content, JaxSide(cfg, change(params)), cfg)
    found = wrong(findings)
    assert found[0] == ("stored", "config" if options or training else "weights", stored)
    assert found[1] == ("float64", level, tensor), found[:4]
    changed = "the weights have changed" if not (options or training) else "the computation has changed"
    assert changed in comparison.explanations_of(findings)[0]


def test_a_change_of_the_code_is_told_from_one_of_the_weights(
    frozen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, params, content = frozen("dense")
    content.save(tmp_path / "dense.json.gz")
    original = norm.rms_norm
    monkeypatch.setattr("jaxlm.ops.norm.rms_norm", lambda x, scale, *, eps: original(x, scale, eps=2 * eps))
    jax.clear_caches()
    words = r"layers\.0\.mixer_norm \(float64, forward\).*the weights are those of the golden file, the computation has"
    with pytest.raises(AssertionError, match=words):
        assert_golden(Model(cfg, params, None, "run"), tmp_path / "dense.json.gz")
    jax.clear_caches()


def test_lost_precision_is_seen(frozen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right in float64; then float32 is computed in bfloat16."""
    cfg, params, content = frozen("dense", DTYPES[:2])
    assert wrong(comparison.compare(content, JaxSide(cfg, params), cfg)) == []
    numerics_of = jax_side.numerics_of
    monkeypatch.setattr(jax_side, "numerics_of", lambda dtype: numerics_of("bfloat16" if dtype == "float32" else dtype))
    found = wrong(comparison.compare(content, JaxSide(cfg, params), cfg))
    assert {dtype for dtype, _, _ in found} == {"float32"}
    assert found[0] == ("float32", "forward", "embed")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Same bytes each time, a report, and a model of another shape, of which nothing is computed."""
    cfg = settings(n_layers=1, d_model=16, max_seq_len=16, positions="learned")
    path = tmp_path / "model.toml"
    path.write_text(toml.to_toml(dataclasses.replace(cfg, data=config.Data(cache_dir=str(tmp_path), seq_len=16))))
    for name in ("one", "two"):
        write_golden(path, tmp_path / "golden" / f"{name}.json.gz", dtypes=("float64",), show=True)
    one, two = ((tmp_path / "golden" / f"{name}.json.gz").read_bytes() for name in ("one", "two"))
    assert one == two and "tensors in float64," in capsys.readouterr().out
    report = check_golden(path, tmp_path / "golden" / "one.json.gz", out=tmp_path / "out")
    assert report.verdict == "same" and (tmp_path / "out" / "parity.html").is_file()
    path.write_text(path.read_text().replace("d_model = 16", "d_model = 24"))
    report = check_golden(path, tmp_path / "golden" / "one.json.gz")
    assert not report.same and report.levels == ["config", "weights"]
    assert "all" in report.seconds
    assert "shape [97, 16] in the golden file, [97, 24] now" in {one.note for one in report.findings}


def test_mistakes_at_the_command_line(tmp_path: Path) -> None:
    path = str(tmp_path / "model.toml")
    Path(path).write_text(toml.to_toml(settings()))
    for options, message in [
        (["--golden", "freeze", "x"], "--golden freeze: unknown"),
        (["--golden", "check", str(tmp_path / "none.json.gz")], "no golden file"),
        ([path, "--golden", "check", "x"], "--golden takes one model"),
        (["--golden", "write", "x", "--with", "hf"], "--with hf: a golden file is computed by jaxlm or by torch"),
    ]:
        result = CliRunner().invoke(app, ["parity", path, *options])
        assert isinstance(result.exception, UserError) and message in str(result.exception)


def content_of(path: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress(path.read_bytes()))


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def harm(path: Path) -> None:
        content = content_of(path)
        change(content)
        path.write_bytes(gzip.compress(json.dumps(content).encode()))

    return harm


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, r"no golden file \(jaxlm parity MODEL --golden write"),
    "no gzip": (lambda p: p.write_bytes(b"{}"), "not readable as a golden file"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "not readable as a golden file"),
    "flipped": (flipped, "golden file"),
    "no JSON": (lambda p: p.write_bytes(gzip.compress(b"\x80\x02}q\x00.")), "not readable as a golden file"),
    "deep": (lambda p: p.write_bytes(gzip.compress(b"[" * 200_000)), "not readable as a golden file"),
    "foreign": (lambda p: p.write_bytes(gzip.compress(b'{"loss": 1}')), "not a golden file of jaxlm"),
    "newer": (rewritten(lambda c: c.update(version=2)), "golden format 2, this jaxlm reads 1 .*update jaxlm"),
    "key missing": (rewritten(lambda c: c.pop("tokens")), "damaged golden file: tokens: Field required"),
    "key added": (rewritten(lambda c: c.update(pickle="x")), "damaged golden file: pickle"),
    "NaN": (rewritten(lambda c: c.update(tail=[float("nan")])), "damaged golden file: tail.0"),
    "short sketch": (
        rewritten(lambda c: c["levels"]["forward"]["embed"][2].pop()),
        "the sketch of embed has 15 values",
    ),
    "huge": (lambda p: p.write_bytes(gzip.compress(b" " * ((1 << 28) + 1), 1)), "more than 256 MB"),
    "no rows": (rewritten(lambda c: c["shown"]["rows"].pop("targets")), "damaged golden file: 'targets'"),
    "odd rows": (rewritten(lambda c: c["shown"]["rows"]["targets"].pop()), "its rows have several shapes"),
    "alien token": (rewritten(lambda c: c["shown"]["stream"].append(97)), "its tokens lie outside the vocabulary"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_golden_file_is_refused(name: str, frozen: Any, tmp_path: Path) -> None:
    harm, message = DAMAGE[name]
    path = tmp_path / "dense.json.gz"
    frozen("dense")[2].save(path)
    harm(path)
    with pytest.raises(UserError, match=message):
        read_golden(path)


def test_nan_is_not_frozen(frozen: Any) -> None:
    cfg, params, _ = frozen("dense")
    changed = jax.tree.map(np.array, params)
    changed["final_norm"]["scale"][0] = np.nan
    with pytest.raises(UserError, match=r"final_norm \(forward\) is NaN or infinite: there is nothing to freeze"):
        content.freeze(JaxSide(cfg, changed), cfg, make_inputs(cfg.model), ("float64",))

"""`jaxlm parity`: quiet on models that are the same, and every planted fault is caught and its first tensor named."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert.native import to_torch
from jaxlm.convert.open_model import Model
from jaxlm.errors import UserError
from jaxlm.models.decoder import Params
from jaxlm.parity import Report, assert_parity, check
from jaxlm.parity.both_sides import compare_sides
from jaxlm.parity.compare import (
    ALL,
    Finding,
    compare_by_ratio,
    compare_exact,
    compare_tokens,
    cosine,
    relative,
)
from jaxlm.parity.inputs import LEVELS, Inputs, make_inputs, random_params
from jaxlm.parity.second_look import MAJORITY, look_again
from jaxlm.parity.sides import torch_side
from jaxlm.parity.sides.jax_side import JaxSide
from jaxlm.parity.sides.torch_side import TorchSide
from jaxlm.parity.trace import DTYPES, Side, Trace
from torch_ref.models.decoder import Decoder
from torch_ref.ops.attention.attend import Places

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 48,
    "max_seq_len": 512,
}
GELU: dict[str, Any] = {"activation": "gelu", "positions": "learned", "norm": "layernorm", "biases": ("qkv", "mlp")}
EVERY: dict[str, tuple[Any, ...]] = {
    "vocab_size": (97, 300),
    "n_layers": (1, 2),
    "n_kv_heads": (1, 2, 4),
    "head_dim": (8, 10),
    "activation": ("swiglu", "gelu", "gelu_tanh", "relu", "silu"),
    "norm": ("rmsnorm", "layernorm"),
    "norm_position": ("pre", "post"),
    "final_norm": (True, False),
    "qk_norm": (True, False),
    "positions": ("rope", "learned", "sinusoidal", "none"),
    "rope_layout": ("half", "interleaved"),
    "biases": ((), ("qkv",), ("qkv", "attention_out", "mlp")),
    "tie_embeddings": (True, False),
    "layer_loop": ("scan", "unroll"),
    "remat": ("none", "full"),
    "dropout": (0.0, 0.1),
}


def settings(**options: Any) -> config.Config:
    """A small model with these options."""
    return config.Config(model=config.Model(**{**BASE, **options}))


def report_of(sides: tuple[Side, Side], inputs: Inputs, dtypes: tuple[str, ...] = DTYPES) -> Report:
    seconds = defaultdict[str, float](float)
    findings = tuple(one for some in compare_sides(sides, inputs, dtypes, seconds=seconds) for one in some)
    return Report("test", "small", inputs.text, findings, seconds)


MODELS = [(0, DTYPES[:2]), pytest.param(2, DTYPES[::2], marks=pytest.mark.soak)]
MORE_MODELS = [pytest.param(seed, DTYPES, marks=pytest.mark.soak) for seed in range(20)]


@pytest.mark.parametrize(("seed", "dtypes"), MODELS + MORE_MODELS)
def test_no_false_alarm(seed: int, dtypes: tuple[str, ...]) -> None:
    random = np.random.default_rng([7, seed])
    cfg = settings(**{key: values[random.integers(len(values))] for key, values in EVERY.items()})
    params, inputs = random_params(cfg.model, seed), make_inputs(cfg.model)
    report = report_of((JaxSide(cfg, params), TorchSide.of(cfg, params)), inputs, dtypes)
    assert report.verdict == "same", cfg.model
    assert report.levels == ["forward", "loss", "gradients", "update 1", "update 20", "generation"]
    assert report.dtypes == list(dtypes)


class Truth(JaxSide):
    """The side of jaxlm, traced once, and what its mirror is made of."""

    def __init__(self, cfg: config.Config, params: Params) -> None:
        super().__init__(cfg, params)
        self.settings, self.tensors, self.inputs = cfg, dict(to_torch(params, cfg.model)), make_inputs(cfg.model)
        self.traces: dict[str, Trace] = {}

    def trace(self, dtype: str, inputs: Inputs, progress: Callable[[str], None]) -> Trace:
        if dtype not in self.traces:
            self.traces[dtype] = super().trace(dtype, self.inputs, progress)
        trace = self.traces[dtype]
        levels = {level: arrays for level, arrays in trace.levels.items() if inputs.wants(level.split()[0])}
        return dataclasses.replace(trace, levels=levels)


@pytest.fixture(scope="module")
def truth() -> Callable[[str], Truth]:
    @functools.cache
    def make(name: str) -> Truth:
        cfg = settings(**(GELU if name == "gelu" else {}))
        return Truth(cfg, random_params(cfg.model))

    return make


# A fault is told the config and tensors of the mirror and returns others, or patches torch_ref.
Mirrored = tuple[config.Config, dict[str, np.ndarray]]
Fault = Callable[[config.Config, dict[str, np.ndarray], pytest.MonkeyPatch], Mirrored]


def model_is(**wrong: Any) -> Fault:
    return lambda cfg, tensors, patch: (
        dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **wrong)),
        tensors,
    )


def train_is(**wrong: Any) -> Fault:
    return lambda cfg, tensors, patch: (
        dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **wrong)),
        tensors,
    )


def patched(where: str, wrong: Any) -> Fault:
    def plant(cfg: config.Config, tensors: dict[str, np.ndarray], patch: pytest.MonkeyPatch) -> Mirrored:
        patch.setattr(where, wrong)
        return cfg, tensors

    return plant


def tensor_is(name: str, wrong: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def plant(cfg: config.Config, tensors: dict[str, np.ndarray], patch: pytest.MonkeyPatch) -> Mirrored:
        return cfg, tensors | {name: wrong(tensors[name])}

    return plant


def swapped_gate_and_up(cfg: config.Config, tensors: dict[str, np.ndarray], patch: pytest.MonkeyPatch) -> Mirrored:
    gate, up = "layers.1.ffn.gate_proj.weight", "layers.1.ffn.up_proj.weight"
    return cfg, tensors | {gate: tensors[up], up: tensors[gate]}


def missing_tie(cfg: config.Config, tensors: dict[str, np.ndarray], patch: pytest.MonkeyPatch) -> Mirrored:
    """A head of its own that starts as a copy: every value is right, the gradient is not."""
    untied = dataclasses.replace(cfg.model, tie_embeddings=False)
    return dataclasses.replace(cfg, model=untied), tensors | {"head.weight": tensors["embed.weight"]}


def one_element(x: np.ndarray) -> np.ndarray:
    """In float64: a change of 1e-6 is hardly more than a rounding unit of float32."""
    x = x.astype(np.float64)
    x[3, 5] *= 1 + 1e-6
    return x


def positions_off_by_one(cfg: config.Config, tensors: dict[str, np.ndarray], patch: pytest.MonkeyPatch) -> Mirrored:
    hidden = Decoder.hidden
    patch.setattr(Decoder, "hidden", lambda self, tokens, positions, *rest: hidden(self, tokens, positions + 1, *rest))
    patch.setattr(torch_side, "generate", lambda *_, **__: [[]] * 3)  # its table would end too soon
    return cfg, tensors


def one_document(q: Places, k: Places, window: int = 0) -> torch.Tensor:
    real = (q.segments[:, :, None] != 0) & (k.segments[:, None, :] != 0)
    return real & (q.positions[:, :, None] >= k.positions[:, None, :])


FAULTS: dict[str, tuple[str, Fault, str, str]] = {
    "rope layout": ("base", model_is(rope_layout="interleaved"), "forward", "layers.0.mixer.o_proj"),
    "rope theta": ("base", model_is(rope_theta=9999.0), "forward", "layers.0.mixer.o_proj"),
    "swapped gate and up": ("base", swapped_gate_and_up, "forward", "layers.1.ffn.up_proj"),
    "transposed kernel": (
        "base",
        tensor_is("layers.1.mixer.q_proj.weight", lambda x: np.ascontiguousarray(x.T)),
        "forward",
        "layers.1.mixer.q_proj",
    ),
    "eps": ("base", model_is(norm_eps=1e-6), "forward", "layers.0.mixer_norm"),
    "gelu tanh for erf": ("gelu", model_is(activation="gelu_tanh"), "forward", "layers.0.ffn.down_proj"),
    "missing tie": ("base", missing_tie, "gradients", "head.weight"),
    "no document mask": (
        "base",
        patched("torch_ref.ops.attention.attend.visible", one_document),
        "forward",
        "layers.0.mixer.o_proj",
    ),
    "positions off by one": ("gelu", positions_off_by_one, "forward", "position_embed"),
    "a tensor larger by 1e-6": (
        "base",
        tensor_is("layers.1.mixer.o_proj.weight", lambda x: x.astype(np.float64) * (1 + 1e-6)),
        "forward",
        "layers.1.mixer.o_proj",
    ),
    "an element larger by 1e-6": (
        "gelu",
        tensor_is("layers.0.mixer.k_proj.weight", one_element),
        "forward",
        "layers.0.mixer.k_proj",
    ),
    "z-loss": ("base", train_is(z_loss=1e-4), "loss", "loss"),
    "optimiser eps": ("base", train_is(eps=1e-7), "update 1", "embed.weight"),
    "optimiser beta": ("base", train_is(beta2=0.96), "update 20", "embed.weight"),
    "schedule": ("base", train_is(schedule="linear"), "update 20", "embed.weight"),
    "decay of norms": (
        "base",
        patched(
            "torch_ref.train.optim.decay_mask", lambda decoder: dict.fromkeys(dict(decoder.named_parameters()), True)
        ),
        "update 1",
        "layers.0.mixer_norm.weight",
    ),
    "cache one token late": (
        "base",
        patched(
            "torch_ref.models.cache.Slots.places",
            property(lambda cache: Places(cache.positions + 1, (cache.positions >= 0).int())),
        ),
        "generation",
        "prompt 1",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str, truth: Callable[[str], Truth], monkeypatch: pytest.MonkeyPatch) -> None:
    model, plant, level, tensor = FAULTS[name]
    sound = truth(model)
    cfg, tensors = plant(sound.settings, dict(sound.tensors), monkeypatch)
    upto = LEVELS[: LEVELS.index(level.split()[0]) + 1]  # what comes later takes longest
    inputs = dataclasses.replace(sound.inputs, levels=upto)
    report = report_of((sound, TorchSide(cfg, tensors)), inputs, ("float64",))
    assert not report.same
    assert report.first is not None
    assert (report.first.level, report.first.name) == (level, tensor), report.verdict
    assert f"{tensor} (float64, {level})" in report.verdict


def test_lost_precision_is_named(truth: Callable[[str], Truth], monkeypatch: pytest.MonkeyPatch) -> None:
    """Mathematics is right and float32 is computed in bfloat16."""
    sound = truth("base")
    numerics_of = torch_side.numerics_of
    monkeypatch.setattr(
        torch_side, "numerics_of", lambda dtype: numerics_of("bfloat16" if dtype == "float32" else dtype)
    )
    side = TorchSide(sound.settings, sound.tensors)
    report = report_of((sound, side), sound.inputs, ("float64", "float32"))
    assert report.verdict.startswith("differ: first differing tensor embed (float32, forward): relative error")


def test_an_output_off_on_one_draw_alone_is_no_alarm(truth: Callable[[str], Truth]) -> None:
    """Massive activations of a trained model: the error of a few elements on one draw of rows is luck."""
    sound = truth("base")
    side = TorchSide(sound.settings, sound.tensors)
    alarm = Finding("float32", "forward", "layers.0.ffn.down_proj", 3e-6, 1e-6, errors=(3e-6, 1e-7))
    (judged,) = look_again("float32", [alarm], sound.inputs, (sound, side))
    assert judged.ok and judged.note.endswith(f"the middle of {MAJORITY} other draws"), judged


def test_an_imprecise_optimiser_is_named(truth: Callable[[str], Truth]) -> None:
    """Updates of float32 that are off by 2e-4, a twentieth of what moments in bfloat16 would do."""
    sound = truth("base")
    golden, single = (sound.trace(dtype, sound.inputs, print) for dtype in ("float64", "float32"))
    level = "update 20"
    off = {name: update * (1 + 2e-4) for name, update in single.levels[level].items()}
    broken = dataclasses.replace(single, levels={**single.levels, level: off})
    assert all(finding.ok for finding in compare_by_ratio("float32", golden, single, single))
    wrong = [finding for finding in compare_by_ratio("float32", golden, single, broken) if not finding.ok]
    assert [(finding.level, finding.name) for finding in wrong] == [(level, ALL)]


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a config file to the page and the JSON, first of the sound model, then with a fault."""
    path = tmp_path / "small.toml"
    path.write_text(toml.to_toml(dataclasses.replace(settings(), data=config.Data(cache_dir=str(tmp_path)))))
    x64 = jax.config.jax_enable_x64
    report = check(path, out=tmp_path / "out")
    assert (report.same, report.verdict) == (True, "same")
    assert jax.config.jax_enable_x64 == x64
    told = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert told["same"] and len(told["findings"]) == len(report.findings) > 100
    page = (tmp_path / "out" / "parity.html").read_text()
    assert "Same: both compute the same model." in page
    assert "http" not in page and "<script" not in page

    monkeypatch.setattr("torch_ref.ops.attention.attend.visible", one_document)
    with pytest.raises(AssertionError, match=r"first differing tensor layers\.0\.mixer\.o_proj \(float64, forward\)"):
        assert_parity(path)


def test_another_model_is_another_model() -> None:
    """Two sources: one weight in the second is a millionth larger."""
    cfg = settings()
    params = random_params(cfg.model)
    changed = jax.tree.map(np.array, params)
    changed["layers_1"]["ffn"]["down_proj"]["kernel"][3, 5] *= 1 + 1e-6
    one, two = (Model(cfg, tree, None, "run") for tree in (params, changed))
    with pytest.raises(
        AssertionError, match=r"first differing tensor layers\.1\.ffn\.down_proj\.weight \(stored, weights\)"
    ):
        assert_parity(one, two)


def test_a_nan_differs_and_is_valid_json(truth: Callable[[str], Truth], tmp_path: Path) -> None:
    """Neither NaN nor infinity reaches the file."""
    sound = truth("base")
    trace = sound.trace("float64", sound.inputs, print)
    name = "layers.1.ffn"
    forward = {**trace.levels["forward"], name: np.full_like(trace.levels["forward"][name], np.nan)}
    broken = Trace({**trace.levels, "forward": forward}, [[], *trace.tokens[1:]], trace.weights)
    findings = [
        *compare_exact(trace, broken, ["jaxlm", "torch_ref"]),
        *compare_tokens("float64", sound.inputs, (sound, sound), (trace, broken)),
    ]
    assert [(finding.level, finding.name) for finding in findings if not finding.ok] == [
        ("forward", name),
        ("generation", "prompt 1"),
    ]
    Report("test", "small", "", tuple(findings), {}).write(tmp_path)
    told = json.loads((tmp_path / "parity.json").read_text(), parse_constant=pytest.fail)
    assert [finding["error"] for finding in told["findings"] if not finding["ok"]] == [None, None]
    assert name in (tmp_path / "parity.html").read_text()


@pytest.mark.parametrize(("lucky", "ok"), [(True, True), (False, False)])
def test_a_margin_is_judged_by_several_draws(lucky: bool, ok: bool) -> None:
    """Of the text where tokens part, both sides err by 0.01; of shorter ones by 1 if that draw was lucky. The margin
    between the two tokens is 0.5."""

    class Fake(TorchSide):
        def __init__(self) -> None:
            pass

        def next_logits(self, dtype: str, ids: list[int]) -> np.ndarray:
            error = 0.0 if dtype == "float64" else 0.01 if len(ids) == 5 or not lucky else 1.0
            return np.array([0.0, 0.5, -9.0]) + error

    side = Fake()
    traces = [Trace({}, [tokens], {}) for tokens in ([2, 2, 1], [2, 2, 0])]
    inputs = dataclasses.replace(make_inputs(settings().model), prompts=((5, 6, 7),))
    (finding,) = compare_tokens("bfloat16", inputs, (side, side), (traces[0], traces[1]))
    assert (finding.error, finding.ok) == (0.5, ok)
    assert finding.note == "parts at token 3, margin of the logits, bound of 5 draws"


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such folder"):
        check(tmp_path / "nothing")
    with pytest.raises(UserError, match="no such config file"):
        check(tmp_path / "nothing.toml")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'jaxlm\[torch\]'"):
        check(tmp_path)


def test_distances() -> None:
    a, b = np.array([3.0, 4.0]), np.array([3.0, 4.0 + 1e-9])
    assert relative(b, a) == pytest.approx(2e-10)
    assert relative(b, a, scale=1.0) == pytest.approx(1e-9)
    assert cosine(2 * a, a) < 1e-30
    assert cosine(-a, a) == pytest.approx(2)
    assert cosine(0 * a, a) == 1

"""Explanations: each planted fault is named first, in every architecture that can have it; no more is claimed.

Faults are planted in the other side's config, tensors, inputs, or in torch_ref itself, never by means of the code that
is tested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from jaxlm import config
from jaxlm.parity.diagnose.search import explain
from jaxlm.parity.inputs import make_inputs, packed, random_params
from jaxlm.parity.sides.jax_side import JaxSide
from jaxlm.parity.sides.torch_side import TorchSide
from jaxlm.parity.trace import Arrays
from parity_tests.diagnosed import (
    ATTENTION,
    EVERY,
    EXPERTS,
    MAMBA,
    ROTATED,
    check,
    explained,
    inputs_of,
    model,
    of,
    planted,
    tensors,
)
from parity_tests.wrong_sides import Half, Ignoring, OneDocument, OneText, shifted
from torch_ref.models import attention as attention_module
from torch_ref.ops import ffn, norm
from torch_ref.ops.attention import attend as attention
from torch_ref.ops.moe import router
from torch_ref.ops.ssm import selective_scan


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Faults in the config


CONFIGS = {
    r"rotary pairs are \(2i, 2i \+ 1\)": of(ROTATED, rope_layout="interleaved"),
    r"rope_theta is 500000 instead": of(ROTATED, rope_theta=5e5),
    r"norm_eps is 1e-08 instead": of(EVERY, norm_eps=1e-8),
    r"activation is the erf form of GELU": of(("gpt2",), activation="gelu"),
    r"QK-norm is missing": of(("qwen3",), qk_norm=False),
    r"sliding window is missing": of(("mistral",), window=0),
    r"sliding window is one token longer": of(("mistral",), window=21),
    r"other layers have the sliding window": of(("gpt_oss",), pattern=("attention+moe", "attention(window=20)+moe")),
    r"rope_scaling is missing": of(("gpt_oss",), rope_scaling=config.RopeScaling()),
    r"sinks are missing": of(("gpt_oss",), sink_logits=False),
    r"softmax before top-k": of(("mixtral", "gpt_oss"), "moe", renormalize=False),
    r"softmax after top-k": of(("jamba",), "moe", renormalize=True),
    r"top_k is 3 instead of 2": of(EXPERTS, "moe", top_k=3),
    r"head is the embedding": of(("llama",), tie_embeddings=True),
    r"final norm is missing": of(("llama", "gpt2", "mamba"), final_norm=False),
    r"norms of step size, B and C are missing": of(("jamba",), "mamba", inner_norms=False),
    r"soft-capped at 50": of(("llama",), softcap=50.0),
    r"clamped form of gpt-oss": of(("llama", "mixtral"), activation="swiglu_clamped"),
}


@pytest.mark.parametrize(
    ("name", "section", "wrong", "words"),
    planted(((names, (*wrong, words)) for words, (names, *wrong) in CONFIGS.items())),
)
def test_a_wrong_option_is_named(name: str, section: str, wrong: dict[str, Any], words: str) -> None:
    cfg = model(name)
    wrong = {section: dataclasses.replace(getattr(cfg, section), **wrong)} if section else wrong
    check(explained(name, dataclasses.replace(cfg, **wrong), patch=Ignoring), words)


# Faults in the weights


def exchanged(x: Arrays, one: str, two: str) -> Arrays:
    """The tensors of two modules, in every layer and among experts."""
    return {name: x[name.replace(one, "\n").replace(two, one).replace("\n", two)] for name in x}


def each(x: Arrays, ending: str | tuple[str, ...], change: Callable[[np.ndarray], np.ndarray]) -> Arrays:
    return {name: np.ascontiguousarray(change(t)) if name.endswith(ending) else t for name, t in x.items()}


def interleaved(x: np.ndarray, head: int) -> np.ndarray:
    """From halves to pairs, as Meta's checkpoints store them."""
    rows = x.reshape(-1, 2, head // 2, *x.shape[1:])
    return rows.swapaxes(1, 2).reshape(x.shape)


WEIGHTS: dict[str, tuple[tuple[str, ...], str, Callable[[Arrays, config.Model], Arrays]]] = {
    "transposed square kernel": (
        ATTENTION,
        r"^mixer\.q_proj\.weight of layers? .*: transposed(, and read in the old shape)?$",
        lambda x, cfg: each(x, "q_proj.weight", lambda t: t.T if t.shape[0] == t.shape[1] else t.T.reshape(t.shape)),
    ),
    "kernel read in the old shape": (
        ("llama", "gpt2", "mixtral"),
        r"down_proj\.weight of layers 0 and 1: transposed, and read in the old shape$",
        lambda x, cfg: each(x, "down_proj.weight", lambda t: t.swapaxes(-1, -2).reshape(t.shape)),
    ),
    "rotary pairs": (
        ("llama", "qwen3", "mistral", "mixtral", "gpt_oss"),
        r"k_proj\.weight.* of layers 0 and 1: in the order of interleaved \(2i, 2i \+ 1\) rotary pairs$",
        lambda x, cfg: each(
            x,
            ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias", "q_norm.weight", "k_norm.weight"),
            lambda t: interleaved(t, cfg.head_dim),
        ),
    ),
    "gate and up": (
        ("llama", "qwen3", "mistral", "mixtral", "gpt_oss", "jamba"),
        r"gate and up are swapped$",
        lambda x, cfg: exchanged(x, "gate_proj", "up_proj"),
    ),
    "keys and values": (ATTENTION, r"k and v are swapped$", lambda x, cfg: exchanged(x, "k_proj", "v_proj")),
    "heads in another order": (
        ATTENTION,
        r"q_proj\.weight.*: (with heads in another order: 2, 3, 0, 1|regrouped: .*)$",
        lambda x, cfg: each(x, ("q_proj.weight", "q_proj.bias"), lambda t: np.roll(t, -2 * cfg.head_dim, 0)),
    ),
    "one head repeated": (
        ("llama", "mistral"),
        r"k_proj\.weight .*: heads are repeated and others missing: 0, 0$",
        lambda x, cfg: each(x, "k_proj.weight", lambda t: np.concatenate([t[: cfg.head_dim]] * 2)),
    ),
    "swapped layers": (
        ("llama", "gpt2", "mixtral", "mamba", "mamba2"),
        r"^layers 0 and 1 are swapped",
        lambda x, cfg: exchanged(x, "layers.0.", "layers.1."),
    ),
    "norms of 1 + w": (
        EVERY,
        r"norm\.weight.*: smaller by 1: the scale of a norm is \(1 \+ w\)",
        lambda x, cfg: each(x, "norm.weight", lambda t: t - 1),
    ),
    "a sign": (
        EVERY,
        r"^final_norm\.weight: of the other sign$",
        lambda x, cfg: each(x, "final_norm.weight", lambda t: -t),
    ),
    "a factor": (
        ATTENTION,
        r"o_proj\.weight of layers? .*: 1\.00001 times ours$",
        lambda x, cfg: each(x, "o_proj.weight", lambda t: t.astype(np.float64) * 1.00001),
    ),
    "experts in another order": (
        EXPERTS,
        r"experts\..*: with experts in another order: 1, 2, 3, 0$",
        lambda x, cfg: {n: np.roll(t, -1, 0) if ".experts." in n else t for n, t in x.items()},
    ),
    "bfloat16": (
        EVERY,
        r": rounded to bfloat16$",
        lambda x, cfg: {n: torch.tensor(t).bfloat16().float().numpy() for n, t in x.items()},
    ),
    "taps": (
        MAMBA,
        r"conv\.weight.*: reversed: the taps run the other way$",
        lambda x, cfg: each(x, "conv.weight", lambda t: t[:, ::-1]),
    ),
    "A for A_log": (
        MAMBA,
        r"A_log of layers? .*: -exp of ours$",
        lambda x, cfg: each(x, "A_log", lambda t: -np.exp(t)),
    ),
    "split of in_proj": (
        MAMBA,
        r"in_proj\.weight of layers? .*: with its halves along the rows swapped$",
        lambda x, cfg: each(x, "in_proj.weight", lambda t: np.roll(t, len(t) // 2, 0)),
    ),
    "never loaded": (
        EVERY,
        r"^final_norm\.weight: all 1: never loaded",
        lambda x, cfg: each(x, "final_norm.weight", np.ones_like),
    ),
}


@pytest.mark.parametrize(("name", "fault"), planted((names, (fault,)) for fault, (names, _, _) in WEIGHTS.items()))
def test_a_change_of_the_weights_is_named(name: str, fault: str) -> None:
    _, words, change = WEIGHTS[fault]
    check(explained(name, wrong=change(tensors(name), model(name))), words)


def test_a_missing_tie_is_named() -> None:
    """A copy of the embedding gives the same outputs and another gradient; a head of its own gives others."""
    cfg, x = dataclasses.replace(model("mistral"), tie_embeddings=False), tensors("mistral")
    (found,) = explained("mistral", cfg, {**x, "head.weight": x["embed.weight"]})
    assert found.what.startswith("the tie is missing: head.weight is a copy of the embedding")
    assert found.what.endswith("the outputs are the same")
    check(explained("mistral", cfg, {**x, "head.weight": x["embed.weight"][::-1].copy()}), r"^the tie is missing")


def test_a_padded_vocabulary_is_named() -> None:
    cfg, x = dataclasses.replace(model("mistral"), vocab_size=104), tensors("mistral")
    padded = {**x, "embed.weight": np.pad(x["embed.weight"], ((0, 7), (0, 0)))}
    check(explained("mistral", cfg, padded), r"^embed\.weight: longer by 7 rows, the others being equal$")


# Faults in the computation


@pytest.mark.parametrize(
    ("name", "side", "words"),
    [
        ("gpt2", shifted(1), r"positions are off by one: they begin at 1$"),
        ("gpt2", shifted(2), r"positions are off by two"),
        *[(name, OneDocument, r"^the document mask is missing$") for name in EVERY],
        *[
            (name, OneText, r"document mask is missing, and (positions do not restart|order is that)")
            for name in ROTATED
        ],
        ("gpt2", OneText, r"document mask is missing, and positions do not restart$"),
        *[(name, Half, r"^it computes in bfloat16$") for name in ("llama", "gpt2", "mamba2")],
    ],
)
def test_a_change_of_the_inputs_is_named(name: str, side: type[TorchSide], words: str) -> None:
    check(explained(name, patch=side), words)


def rms_of_the_wrong_scale(x: torch.Tensor, scale: torch.Tensor, *, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + scale)


def twice(x: torch.Tensor) -> torch.Tensor:
    return torch.log1p(torch.exp(torch.log1p(torch.exp(x))))


def unscaled(products: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
    return attention_mix(products * v.shape[-1] ** 0.5, v, *rest)


def top_k_by_sigmoid(logits: torch.Tensor, bias: Any = None, **options: Any) -> Any:
    return route(logits, bias, **{**options, "router": "sigmoid"})


def future(q: Any, k: Any, window: int = 0, beyond: int = 0) -> torch.Tensor:
    seen = (q.segments[:, :, None] == k.segments[:, None, :]) & (q.segments != 0)[:, :, None]
    distance = q.positions[:, :, None] - k.positions[:, None, :]
    return seen & (distance < window) if window else seen


attention_mix, route = attention._mix, router.route
PATCHES: dict[str, tuple[tuple[str, ...], Any, str, Any, str]] = {
    "1 + w": (("llama", "mixtral", "mamba"), norm, "rms_norm", rms_of_the_wrong_scale, r"\(1 \+ w\) instead of w$"),
    "quick GELU": (
        ("gpt2",),
        ffn,
        "activate",
        lambda name, x: x * torch.sigmoid(1.702 * x),
        r"quick GELU instead of the tanh",
    ),
    "GELU gate": (
        ("llama", "qwen3", "mistral", "mixtral"),
        ffn,
        "swiglu",
        lambda gate, up: torch.nn.functional.gelu(gate) * up,
        r"the gate passes the erf form of GELU instead of swiglu",
    ),
    "silu of up": (
        ("llama", "mixtral"),
        ffn,
        "swiglu",
        lambda g, u: torch.nn.functional.silu(u) * g,
        r"^gate and up are swapped",
    ),
    "scores without scale": (
        ("llama", "gpt2", "gpt_oss"),
        attention,
        "_mix",
        unscaled,
        r"scores are not divided by sqrt\(H\)",
    ),
    "no causal mask": (("llama", "gpt2", "mistral"), attention, "visible", future, r"^the causal mask is missing$"),
    "sigmoid router": (("mixtral", "gpt_oss"), router, "route", top_k_by_sigmoid, r"router's scores are a sigmoid"),
    "two softplus": (MAMBA, selective_scan, "softplus", twice, r"softplus is applied twice"),
    "gate of Mamba-2": (
        ("mamba2",),
        norm,
        "gated_rms_norm",
        lambda x, gate, scale, *, eps, groups: norm.rms_norm(x, scale, eps=eps) * torch.nn.functional.silu(gate),
        r"gate comes after the norm",
    ),
    "no rotation": (("llama", "qwen3"), attention_module, "apply_rope", lambda x, *_, **__: x, r"are not rotated$"),
}


@pytest.mark.parametrize(("name", "fault"), planted((names, (fault,)) for fault, (names, *_) in PATCHES.items()))
def test_a_change_of_the_computation_is_named(name: str, fault: str) -> None:
    _, owner, function, wrong, words = PATCHES[fault]

    class Patched(TorchSide):
        def forward(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, function, wrong)
                return super().forward(dtype, rows)

    check(explained(name, patch=Patched), words)


def test_zeroed_tensors_are_named_though_they_are_stored() -> None:
    """The skip of the scan and the learned positions are in the file, and left out of the computation."""
    for name, ending, words in (("mamba", "mixer.D", "skip D u"), ("gpt2", "position_embed.weight", "not added")):

        class Without(Ignoring):
            def __init__(self, settings: config.Config, x: Mapping[str, np.ndarray]) -> None:
                TorchSide.__init__(self, settings, each(dict(x), ending, np.zeros_like))  # noqa: B023
                self.all = x

        check(explained(name, patch=Without), words)


# Two faults, unknown faults, no fault


def test_two_faults_are_both_named() -> None:
    cfg = dataclasses.replace(model("llama"), rope_theta=5e5, norm_eps=1e-6)
    found = explained("llama", cfg)
    assert {one.what.partition(" is")[0] for one in found} == {"rope_theta", "norm_eps"} and found[-1].vanishes, found
    cfg = dataclasses.replace(model("gpt2"), activation="gelu")
    wrong = each(tensors("gpt2"), "0.mixer.o_proj.weight", lambda t: t.T)
    first, second = explained("gpt2", cfg, wrong)
    assert first.what == "mixer.o_proj.weight of layer 0: transposed" and not first.vanishes
    assert "erf form of GELU" in second.what and second.vanishes


def test_what_is_not_known_is_not_claimed() -> None:
    random = np.random.default_rng(0)
    wrong = each(tensors("llama"), "1.mixer.q_proj.weight", lambda t: t + 0.01 * random.standard_normal(t.shape))
    (found,) = explained("llama", wrong=wrong)
    assert found.what.startswith("mixer.q_proj.weight of layer 1: not related in any known way; 1024 of 1024 elements")
    found = explained("llama", dataclasses.replace(model("llama"), rope_theta=12345.0))
    assert found[-1].what.startswith("none of the ") and not any(one.vanishes for one in found), found
    near = dataclasses.replace(model("llama"), norm_eps=1.1e-6)  # the known 1e-6 leaves an error of 8e-7
    found = explained("llama", near)
    assert found[-1].what.startswith("none of the ") and not any(one.vanishes for one in found), found
    odd = dataclasses.replace(model("llama"), activation="swiglu_clamped", rope_theta=12345.0)
    found = explained("llama", odd)
    assert found[-1].what.startswith("none of the ") and not any(one.vanishes for one in found), found


def test_a_fault_that_short_rows_do_not_show() -> None:
    """A window longer than the first rows that are tried."""
    cfg = dataclasses.replace(model("mistral"), window=90)
    sound = config.Config(model=cfg)
    ours, theirs = (
        TorchSide(config.Config(model=m), tensors("mistral")) for m in (cfg, dataclasses.replace(cfg, window=0))
    )
    inputs = dataclasses.replace(inputs_of(cfg), rows=packed(make_inputs(cfg).stream, 192, cfg.vocab_size))
    check(explain(ours, theirs, sound, None, inputs), "sliding window is missing")


def test_the_other_config_is_asked_first() -> None:
    wrong = dataclasses.replace(model("llama"), rope_theta=7777.0)
    sound = config.Config(model=model("llama"))
    ours, theirs = TorchSide(sound, tensors("llama")), TorchSide(config.Config(model=wrong), tensors("llama"))
    check(
        explain(ours, theirs, sound, wrong, inputs_of(wrong)), "rope_theta is 7777 instead of 10000, as its config says"
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_explanation_of_nothing(seed: int) -> None:
    random = np.random.default_rng([3, seed])
    name = EVERY[seed % len(EVERY)]
    every = {"n_layers": (2, 4), "norm_eps": (1e-5, 1e-6), "tie_embeddings": (True, False), "vocab_size": (61, 97)}
    drawn = {key: values[random.integers(2)] for key, values in every.items()}
    cfg = dataclasses.replace(model(name), **drawn)
    params = random_params(cfg, seed)
    sound = config.Config(model=cfg)
    ours = TorchSide.of(sound, params) if seed > 2 else JaxSide(sound, params)
    assert explain(ours, TorchSide.of(sound, params), sound, cfg, inputs_of(cfg)) == []

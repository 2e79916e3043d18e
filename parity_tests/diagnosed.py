"""Small models of nine architectures, and the explanation of a fault that is planted in one of them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from jaxlm import config
from jaxlm.parity.diagnose.search import Explanation, explain
from jaxlm.parity.inputs import Inputs, make_inputs, packed, random_params
from jaxlm.parity.sides.torch_side import TorchSide
from jaxlm.parity.trace import Arrays
from parity_tests import pairs

ROWS = 128


SMALL_MAMBA = {"d_state": 5, "head_dim": 8}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_embeddings": False},
    "gpt2": {
        "norm": "layernorm",
        "positions": "learned",
        "activation": "gelu_tanh",
        "biases": ("qkv", "attention_out", "mlp"),
        "n_kv_heads": 4,
    },
    "qwen3": {"qk_norm": True, "rope_theta": 1e6, "norm_eps": 1e-6},
    "mistral": {"window": 20},
    "mixtral": {"pattern": ("attention+moe",), "moe": {"n_experts": 4}, "rope_theta": 1e6},
    "gpt_oss": {
        "pattern": ("attention(window=20)+moe", "attention+moe"),
        "moe": {"n_experts": 4},
        "sink_logits": True,
        "head_dim": 16,
        "rope_theta": 150000.0,
        "rope_scaling": {"kind": "yarn", "factor": 32.0, "original_max_seq_len": 4096, "truncate": False},
        "activation": "swiglu_clamped",
        "biases": ("qkv", "attention_out", "router", "experts"),
    },
    "mamba": {"pattern": ("mamba",), "mamba": SMALL_MAMBA},
    "mamba2": {"pattern": ("mamba2",), "mamba": SMALL_MAMBA},
    "jamba": {
        "pattern": ("mamba+mlp", "attention(positions=none)+moe"),
        "mamba": {**SMALL_MAMBA, "inner_norms": True},
        "moe": {"n_experts": 4, "renormalize": False},
    },
}


ATTENTION = ("llama", "gpt2", "qwen3", "mistral", "mixtral", "gpt_oss", "jamba")


ROTATED = ("llama", "qwen3", "mistral", "mixtral", "gpt_oss")


EXPERTS = ("mixtral", "gpt_oss", "jamba")


MAMBA = ("mamba", "mamba2", "jamba")


EVERY = tuple(ARCHITECTURES)


@functools.cache
def model(name: str) -> config.Model:
    return pairs.model(**{"n_layers": 2, **ARCHITECTURES[name]})


@functools.cache
def tensors(name: str) -> Arrays:
    return TorchSide.of(config.Config(model=model(name)), random_params(model(name))).weights()


def inputs_of(cfg: config.Model) -> Inputs:
    inputs = make_inputs(cfg)
    return dataclasses.replace(inputs, rows=packed(inputs.stream, ROWS, cfg.vocab_size))


def explained(
    name: str, cfg: config.Model | None = None, wrong: Mapping[str, np.ndarray] | None = None, patch: Any = None
) -> list[Explanation]:
    """Ours against a torch_ref with another config, other tensors, or another class of side."""
    sound = config.Config(model=model(name))
    ours = TorchSide(sound, tensors(name))
    theirs = (patch or TorchSide)(config.Config(model=cfg or model(name)), dict(wrong or tensors(name)))
    return explain(ours, theirs, sound, None, inputs_of(model(name)))


def check(found: list[Explanation], words: str) -> None:
    """The first explanation is this one, and it is the whole explanation."""
    assert found, "no explanation"
    assert re.search(words, found[0].what), found
    assert found[0].vanishes, found
    assert all(one.what.startswith("or: ") for one in found[1:]), found


def of(names: tuple[str, ...], section: str = "", /, **wrong: Any) -> tuple[tuple[str, ...], str, dict[str, Any]]:
    return names, section, wrong


def planted(each: Iterable[tuple[tuple[str, ...], tuple[Any, ...]]]) -> list[Any]:
    """`make test` plants a fault in the first and the last architecture that can have it, `make soak` in all."""
    soak = lambda name, names: [] if name in (names[0], names[-1]) else [pytest.mark.soak]  # noqa: E731
    return [pytest.param(name, *fault, marks=soak(name, names)) for names, fault in each for name in names]

"""The engine on a mesh of virtual devices: the tokens of one device, in float64, and caches that are split."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.errors import UserError
from jaxlm.infer.engine import Engine, Request, Result
from jaxlm.infer.engine.on_jax.runner import JaxRunner
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder
from jaxlm.numerics import Policy
from jaxlm.text.sampling import Sampling
from tests.infer.test_engine import PROMPTS, V, random_params, random_request, run

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs the 8 virtual devices of conftest.py")
PATTERN = ("attention+mlp", "attention(window=6, keep_first=2)+moe", "mamba", "mamba2")
MESHES: dict[str, dict[str, int]] = {
    "tensor": {"tensor": 2},
    "fsdp": {"fsdp": 8},
    "fsdp, tensor": {"fsdp": 2, "data": 2, "tensor": 2},
    "data": {"data": 8},
    "expert": {"expert": 2, "data": 2, "tensor": 2},
}


def decoder() -> Decoder:
    parts: dict[str, Any] = {
        "mamba": config.Mamba(head_dim=8, d_state=5),
        "moe": config.MoE(n_experts=4, top_k=2, d_ff=16),
    }
    sizes: dict[str, Any] = {"d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 96}
    numbers = toml.from_dict({"numerics": {"params": "float64", "compute": "float64"}}, "test").numerics
    return Decoder(config.Model(vocab_size=V, pattern=PATTERN, **parts, **sizes), Policy.from_config(numbers))


def requests() -> list[Request]:
    rng = np.random.default_rng(2)
    asked = [random_request(rng) for _ in range(4)]
    return [*asked, Request(PROMPTS[5], sampling=Sampling(top_k=20), max_new_tokens=16, logprobs=2)]


@functools.cache
def params() -> Any:
    return jax.tree.map(np.asarray, random_params(decoder()))


def layout(name: str) -> Layout:
    """The mesh on as many devices as it needs."""
    sizes: Any = {"data": 1, **MESHES[name]}
    return Layout.from_config(config.Mesh(**sizes), jax.devices()[: math.prod(sizes.values())])


def answers(on: Layout | None) -> tuple[list[Result], JaxRunner]:
    runner = JaxRunner(decoder(), params(), rows=2, slots=96, widths=(16,), layout=on)
    made = Engine(runner, threaded=False, warm_up=False, prefix_memory=1 << 20)
    return run(made, requests()), runner


@pytest.fixture(scope="module")
def alone() -> list[Result]:
    with jax.enable_x64(True):
        return answers(None)[0]


@pytest.mark.parametrize("name", ["tensor", *(pytest.param(name, marks=pytest.mark.soak) for name in [*MESHES][1:])])
def test_the_tokens_of_one_device(name: str, alone: list[Result]) -> None:
    with jax.enable_x64(True):
        found, runner = answers(layout(name))
    for one, other in zip(found, alone, strict=True):
        for mine, its in zip(one.choices, other.choices, strict=True):
            assert (mine.ids, mine.finish) == (its.ids, its.finish)
            pairs = zip(mine.log_probs, its.log_probs, strict=True)
            assert all(x.log_prob == y.log_prob or abs(x.log_prob - y.log_prob) < 1e-10 for x, y in pairs)
    held = [leaf.addressable_shards[0].data.nbytes / leaf.nbytes for leaf in jax.tree.leaves(runner.state.cache)]
    assert min(held) == 1 / MESHES[name].get("tensor", 1)


def test_what_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"kv_heads of 2 does not divide over tensor = 4"), jax.enable_x64(True):
        answers(Layout.from_config(config.Mesh(data=1, tensor=4), jax.devices()[:4]))

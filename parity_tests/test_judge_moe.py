"""An independent judge: the mixtures of experts of transformers, at random weights, forward and backward.

Mixtral, Qwen3-MoE and DeepSeek-V3 compute their scores in float32 whatever the dtype; that is lifted (`Lifted`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from jaxlm import config
from jaxlm.models.moe import MoE
from jaxlm.numerics import Policy
from jaxlm.ops.attention.visible import Places
from jaxlm.parity.sides.float64_mode import Lifted
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64

D, F, E, K, T = 32, 24, 8, 3, 90
Named = dict[str, torch.Tensor]


def halves(gate_up: torch.Tensor) -> dict[str, Any]:
    """Kernels of gate and up from [E, 2 F, D]."""
    gate, up = gate_up.transpose(1, 2).chunk(2, dim=-1)
    return {"gate_proj": {"kernel": gate}, "up_proj": {"kernel": up}}


def gated(named: Named) -> dict[str, Any]:
    """Mixtral and Qwen3-MoE."""
    experts = halves(named["experts.gate_up_proj"])
    experts["down_proj"] = {"kernel": named["experts.down_proj"].transpose(1, 2)}
    return {"router": {"kernel": named["gate.weight"].T}, "experts": experts}


def deepseek(named: Named) -> dict[str, Any]:
    """A selection bias, and shared experts."""
    found = gated(named)
    found["router"]["selection_bias"] = named["gate.e_score_correction_bias"]
    names = ("gate_proj", "up_proj", "down_proj")
    return {**found, "shared": {name: {"kernel": named[f"shared_experts.{name}.weight"].T} for name in names}}


def gpt_oss(named: Named) -> dict[str, Any]:
    """Gate and up are interleaved, and everything has a bias."""
    gate_up, bias = named["experts.gate_up_proj"], named["experts.gate_up_proj_bias"]
    return {
        "router": {"kernel": named["router.weight"].T, "bias": named["router.bias"]},
        "experts": {
            "gate_proj": {"kernel": gate_up[..., ::2], "bias": bias[..., ::2]},
            "up_proj": {"kernel": gate_up[..., 1::2], "bias": bias[..., 1::2]},
            "down_proj": {"kernel": named["experts.down_proj"], "bias": named["experts.down_proj_bias"]},
        },
    }


SIZES = {"hidden_size": D, "num_experts_per_tok": K}
ROUTED = {"n_experts": E, "top_k": K, "d_ff": F}
DEEPSEEK = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_shared_experts": 2}
JUDGES: dict[str, tuple[Callable[[], Any], Callable[[Named], dict[str, Any]], dict[str, Any]]] = {
    "mixtral": (
        lambda: MixtralSparseMoeBlock(MixtralConfig(**SIZES, intermediate_size=F, num_local_experts=E)),
        gated,
        {"moe": ROUTED},
    ),
    "qwen3 moe": (
        lambda: Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(**SIZES, moe_intermediate_size=F, num_experts=E, norm_topk_prob=False)
        ),
        gated,
        {"moe": ROUTED | {"renormalize": False}},
    ),
    "gpt-oss": (
        lambda: GptOssMLP(GptOssConfig(**SIZES, intermediate_size=F, num_local_experts=E)),
        gpt_oss,
        {"moe": ROUTED, "activation": "swiglu_clamped", "biases": ("router", "experts")},
    ),
    "deepseek-v3": (
        lambda: DeepseekV3MoE(DeepseekV3Config(**SIZES, moe_intermediate_size=F, n_routed_experts=E, **DEEPSEEK)),
        deepseek,
        {
            "moe": ROUTED
            | {"router": "sigmoid", "n_groups": 4, "top_groups": 2, "route_scale": 2.5, "n_shared": 2}
            | {"selection_bias": True}
        },
    ),
}


def judged(name: str, rng: np.random.Generator, **wrong: Any) -> dict[str, float]:
    """Errors of the output and every gradient against the judge; `wrong` options spoil our side."""
    make, ours, options = JUDGES[name]
    theirs = make().double()
    for tensor in [*theirs.parameters(), *theirs.buffers()]:
        scale = 0.1 if tensor.shape == (E,) else 1.5 * D**-0.5  # a selection bias that does not choose alone
        tensor.data = torch.tensor(rng.standard_normal(tensor.shape) * scale)
    x, dy = 3 * rng.standard_normal((2, T, D)), rng.standard_normal((2, T, D))
    x_ = torch.tensor(x, requires_grad=True)
    with Lifted():
        out = theirs(x_)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(torch.tensor(dy))
    named = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}

    options = {**options, "moe": {**options["moe"], **wrong.pop("moe", {})}, **wrong}
    cfg = pairs.model(d_model=D, pattern=("attention+moe",), n_layers=1, layer_loop="unroll", **options)
    module = MoE(cfg, Policy.from_config(config.Numerics(params="float64", compute="float64")))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf.detach().numpy()), ours(named))
    places = Places(jnp.zeros((2, T), jnp.int32), jnp.ones((2, T), jnp.int32))

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        y, pull = jax.vjp(lambda params, x: module.apply({"params": params}, x, places), params, x)
        return y, *pull(jnp.asarray(dy))

    y, dparams, dx = run(params, jnp.asarray(x))
    pairs_of = {"output": (y, out), "input": (dx, x_.grad)}
    flat = zip(jax.tree_util.tree_leaves_with_path(dparams), jax.tree.leaves(ours(gradients)), strict=True)
    pairs_of |= {jax.tree_util.keystr(path): (mine, other) for (path, mine), other in flat}
    return {key: pairs.error(np.asarray(a), b.detach().double().numpy()) for key, (a, b) in pairs_of.items()}


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("impl", ["naive", "blocks"])
def test_the_judge_agrees(name: str, impl: str, rng: np.random.Generator) -> None:
    for what, distance in judged(name, rng, moe={"impl": impl}).items():
        FLOAT64.check(distance, f"{name}: {what}")


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "weights not renormalised": ("mixtral", {"moe": {"renormalize": False}}),
    "weights renormalised": ("qwen3 moe", {"moe": {"renormalize": True}}),
    "gate not clamped, nothing added to up": ("gpt-oss", {"activation": "swiglu"}),
    "softmax for sigmoid": ("deepseek-v3", {"moe": {"router": "softmax"}}),
    "no groups": ("deepseek-v3", {"moe": {"n_groups": 1}}),
    "one group fewer": ("deepseek-v3", {"moe": {"n_groups": 2, "top_groups": 1}}),
    "scale left out": ("deepseek-v3", {"moe": {"route_scale": 1.0}}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, rng: np.random.Generator) -> None:
    name, wrong = FAULTS[fault]
    assert judged(name, rng, **wrong)["output"] > 1e7 * FLOAT64.allowed

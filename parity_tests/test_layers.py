"""Rung 2: every module of both frameworks on its own, forward and every gradient, in float64; planted faults are seen.

The modules and their weights are those of a decoder of one block, so that the conversion of names is part of the test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm import config
from jaxlm.models import attention as jax_attention
from jaxlm.models import block as jax_block
from jaxlm.models import ffn as jax_ffn
from jaxlm.models import layers as jax_layers
from jaxlm.ops import rope as jax_rope
from jaxlm.ops.attention import visible as jax_visible
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64
from torch_ref.models import decoder as torch_decoder
from torch_ref.ops import rope as torch_rope
from torch_ref.ops.attention import attend as torch_ops

T = 130
BIASES = ("qkv", "attention_out", "mlp")


def one_block(**options: Any) -> config.Model:
    """A decoder of one block."""
    return pairs.model(n_layers=1, layer_loop="unroll", **options)


def where_tokens_stand(cfg: config.Model, rng: np.random.Generator) -> tuple[tuple, tuple]:
    """Places and rotary table of packed rows, for each framework."""
    batch = pairs.packed_batch(cfg, rng, T)
    positions, segments = batch["positions"], batch["segments"]
    jax_table = torch_table = None
    if cfg.rope is not None:
        jax_table = jax_rope.rope_table_of(jnp.asarray(positions), cfg.rope, jnp.float64)
        torch_table = torch_rope.rope_table_of(torch.tensor(positions), cfg.rope, torch.float64)
    return (
        (jax_visible.Places(jnp.asarray(positions), jnp.asarray(segments)), jax_table, None),
        (torch_ops.Places(torch.tensor(positions), torch.tensor(segments)), torch_table, None),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A module of the decoder: its config, its path, its class in jaxlm, the shape of its input."""

    path: str
    make: Callable[[config.Model, Any], nn.Module]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = (2, T, 32)
    placed: bool = False
    block: bool = False
    """Takes the tables of all rotations, where a mixer takes its own."""


def q_proj(cfg: config.Model, policy: Any) -> nn.Module:
    axes = ("embed", "heads", "head_dim")
    return jax_layers.Linear((cfg.n_heads, cfg.head_dim), axes, 0.1, policy, use_bias="qkv" in cfg.biases)


def o_proj(cfg: config.Model, policy: Any) -> nn.Module:
    axes = ("heads", "head_dim", "embed")
    return jax_layers.Linear((cfg.d_model,), axes, 0.1, policy, n_in=2, use_bias="attention_out" in cfg.biases)


def norm(cfg: config.Model, policy: Any) -> nn.Module:
    return jax_layers.Norm(cfg.norm, cfg.norm_eps, policy)


def qk_norm(cfg: config.Model, policy: Any) -> nn.Module:
    return jax_layers.Norm("rmsnorm", cfg.norm_eps, policy, axis="head_dim")


def block(cfg: config.Model, policy: Any) -> nn.Module:
    return jax_block.Block("attention+mlp", cfg, policy)


EVERY_SINK = {"window": 9, "keep_first": 2, "sink_logits": True, "sink_tokens": 2, "softcap": 2.0, "qk_norm": True}
MIXER, FFN, BLOCK = "layers.0.mixer", "layers.0.ffn", "layers.0"
CASES = {
    "linear": Case(f"{MIXER}.q_proj", q_proj),
    "linear, bias": Case(f"{MIXER}.q_proj", q_proj, {"biases": BIASES}),
    "linear of two axes": Case(f"{MIXER}.o_proj", o_proj, {"biases": BIASES}, (2, T, 4, 8)),
    "rmsnorm": Case("final_norm", norm),
    "layernorm": Case("final_norm", norm, {"norm": "layernorm", "norm_eps": 1e-6}),
    "norm of heads": Case(f"{MIXER}.q_norm", qk_norm, {"qk_norm": True}, (2, T, 4, 8)),
    **{
        f"mlp {name}": Case(FFN, jax_ffn.MLP, {"activation": name, "biases": BIASES})
        for name in ("swiglu", "swiglu_clamped", "gelu", "gelu_tanh", "relu", "silu")
    },
    "MHA": Case(MIXER, jax_attention.Attention, {"n_kv_heads": 4}, placed=True),
    "GQA": Case(MIXER, jax_attention.Attention, {"biases": BIASES, "qk_norm": True}, placed=True),
    "MQA": Case(MIXER, jax_attention.Attention, {"n_kv_heads": 1, "rope_layout": "interleaved"}, placed=True),
    "odd heads": Case(MIXER, jax_attention.Attention, {"head_dim": 7, "positions": "none"}, placed=True),
    "window, first tokens": Case(MIXER, jax_attention.Attention, {"window": 9, "keep_first": 2}, placed=True),
    "every sink": Case(MIXER, jax_attention.Attention, EVERY_SINK, placed=True),
    "pre-norm block": Case(BLOCK, block, placed=True, block=True),
    "post-norm block": Case(BLOCK, block, {"norm_position": "post", "norm": "layernorm"}, placed=True, block=True),
}


def run_jax(case: Case, pair: pairs.Pair, x: np.ndarray, dy: np.ndarray, rest: tuple) -> pairs.Arrays:
    """Output, gradient of the input and of each parameter, by its name in torch."""
    cfg = pair.jax.config
    module = case.make(cfg, pair.jax.policy)
    keys = case.path.replace("layers.0", "layers_0").split(".")
    subtree = pair.params
    for key in keys:
        subtree = subtree[key]

    @jax.jit
    def run(subtree: pairs.Params, x: jax.Array) -> Any:
        out, pull = jax.vjp(lambda subtree, x: first(module.apply({"params": subtree}, x, *rest)), subtree, x)
        return out, *pull(jnp.asarray(dy))

    out, dsubtree, dx = run(subtree, jnp.asarray(x))
    tree = jax.tree.map(np.zeros_like, pair.params)
    parent = tree
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = dsubtree
    named = {k: v for k, v in pairs.torch_names(tree, pair.jax).items() if k.startswith(f"{case.path}.")}
    return {"output": np.asarray(out), "input": np.asarray(dx), **named}


def run_torch(case: Case, decoder: torch_decoder.Decoder, x: np.ndarray, dy: np.ndarray, rest: tuple) -> pairs.Arrays:
    """The same of torch_ref."""
    module = decoder.get_submodule(case.path)
    x_ = torch.tensor(x, requires_grad=True)
    out = first(module(x_, *rest))
    names, parameters = zip(*module.named_parameters(prefix=case.path), strict=True)
    dx, *gradients = torch.autograd.grad(out, [x_, *parameters], torch.tensor(dy))
    arrays = {"output": out, "input": dx, **dict(zip(names, gradients, strict=True))}
    return {name: array.detach().numpy() for name, array in arrays.items()}


def first(result: Any) -> Any:
    """The output of a module that may return a cache beside it."""
    return result[0] if isinstance(result, tuple) else result


def check_module(
    case: Case, rng: np.random.Generator, plant: Callable[[torch_decoder.Decoder], Any] | None = None
) -> None:
    """Both modules agree; `plant` spoils the torch side first."""
    cfg = one_block(**case.options)
    pair = pairs.pair(cfg, pairs.random_params(cfg, rng))
    ours, theirs = where_tokens_stand(cfg, rng) if case.placed else ((), ())
    if case.block:
        ours, theirs = ((places, (table,), cache) for places, table, cache in (ours, theirs))
    x = rng.standard_normal(case.shape)
    spec = pair.torch.get_submodule(case.path)
    with torch.no_grad():
        dy = rng.standard_normal(first(spec(torch.tensor(x), *theirs)).shape)
    if plant is not None:
        plant(pair.torch)
    jax_result, torch_result = run_jax(case, pair, x, dy, ours), run_torch(case, pair.torch, x, dy, theirs)
    for name, distance, _ in pairs.differences(torch_result, jax_result):
        FLOAT64.check(distance, name)


@pytest.mark.parametrize("name", CASES)
def test_module(name: str, rng: np.random.Generator) -> None:
    check_module(CASES[name], rng)


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "tie_embeddings": False, "biases": ("head",)}])
def test_embed_and_head(options: dict[str, Any], rng: np.random.Generator) -> None:
    """Tables and the output matrix come through bit for bit, up to the last id; without a tie the head is its own."""
    cfg = one_block(**options)
    pair = pairs.pair(cfg, pairs.random_params(cfg, rng))
    ids = np.array([[0, cfg.vocab_size - 1, 5]], np.int32)

    def look_up(decoder: Any, ids: jax.Array, name: str) -> jax.Array:
        return getattr(decoder, name)(ids)

    for name in ["embed"] + ["position_embed"] * (cfg.positions == "learned"):
        theirs = pair.jax.apply(
            {"params": pair.params}, jnp.asarray(ids), method=lambda m, ids, n=name: getattr(m, n)(ids)
        )
        np.testing.assert_array_equal(getattr(pair.torch, name)(torch.tensor(ids)).detach(), theirs)
    kernel, bias = pair.jax.apply({"params": pair.params}, method="unembedding")
    ours, our_bias = pair.torch.unembedding()
    np.testing.assert_array_equal(ours.detach(), kernel)
    assert (bias is None) == (our_bias is None) == cfg.tie_embeddings
    if bias is not None:
        np.testing.assert_array_equal(our_bias.detach(), bias)
    assert ("head.weight" in pair.torch.state_dict()) == (not cfg.tie_embeddings)


def transpose(path: str) -> Callable[[torch_decoder.Decoder], None]:
    def plant(decoder: torch_decoder.Decoder) -> None:
        weight = decoder.get_parameter(path)
        assert weight.shape == weight.T.shape
        weight.data = weight.data.T.clone()

    return plant


def swap_gate_and_up(decoder: torch_decoder.Decoder) -> None:
    ffn = decoder.get_submodule(FFN)
    ffn.up_proj, ffn.gate_proj = ffn.gate_proj, ffn.up_proj


def reconfigure(path: str, **wrong: Any) -> Callable[[torch_decoder.Decoder], None]:
    def plant(decoder: torch_decoder.Decoder) -> None:
        module = decoder.get_submodule(path)
        module.config = dataclasses.replace(module.config, **wrong)

    return plant


def other_eps(decoder: torch_decoder.Decoder) -> None:
    decoder.final_norm.eps = 1e-6


def no_sink_logits(decoder: torch_decoder.Decoder) -> None:
    decoder.get_parameter(f"{MIXER}.sink_logits").data.fill_(-torch.inf)


FAULTS = {
    "sink logits dropped": ("every sink", no_sink_logits),
    "retained tokens at their own distance": ("window, first tokens", reconfigure(MIXER, keep_first=3)),
    "transposed kernel": ("linear", transpose(f"{MIXER}.q_proj.weight")),
    "swapped gate and up": ("mlp swiglu", swap_gate_and_up),
    "gelu tanh for erf": ("mlp gelu", reconfigure(FFN, activation="gelu_tanh")),
    "rope layout": ("MHA", reconfigure(MIXER, rope_layout="interleaved")),
    "eps": ("rmsnorm", other_eps),
    "pre-norm for post-norm": ("post-norm block", reconfigure(BLOCK, norm_position="pre")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, rng: np.random.Generator) -> None:
    name, plant = FAULTS[fault]
    with pytest.raises(AssertionError, match="output: error"):
        check_module(CASES[name], rng, plant)

"""Teaching blocks against `transformers` in float64: GPT-2 is pre-norm, GPT-1 post-norm. Every pattern is causal.

Both have learned positions, LayerNorm, GELU by tanh, biases, and `Conv1D`, whose weight is [in, out].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxlm import config
from jaxlm.models.decoder import Decoder, Params
from jaxlm.numerics import Policy
from jaxlm.ops import norm as jax_norm
from parity_tests import pairs
from parity_tests.options import MIXTURES, OPTIONS
from parity_tests.tolerances import FLOAT64
from torch_ref.ops import norm as torch_norm

V, D, L, N, T = 97, 24, 3, 4, 40
COMMON = {
    "vocab_size": V,
    "d_model": D,
    "n_layers": L,
    "n_heads": N,
    "n_kv_heads": N,
    "d_ff": 4 * D,
    "max_seq_len": T,
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu_tanh",
    "biases": ("qkv", "attention_out", "mlp"),
    "layer_loop": "unroll",
    "attention_impl": "xla",
}
OURS = {
    "gpt2": config.Model(**COMMON),
    "openai-gpt": config.Model(**COMMON, norm_position="post", final_norm=False),
}
SIZES = {"vocab_size": V, "n_positions": T, "n_embd": D, "n_layer": L, "n_head": N}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FLOAT64_POLICY = Policy(np.dtype("float64"), np.dtype("float64"), "highest")


def theirs(kind: str, rng: np.random.Generator) -> Any:
    """A random model of `transformers`, each parameter with values of its own."""
    if kind == "gpt2":
        options = {**SIZES, **DROPOUT, "attn_implementation": "eager", "layer_norm_epsilon": 1e-5}
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))
    else:
        options = {**SIZES, **DROPOUT, "layer_norm_epsilon": 1e-5}
        model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**options))
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.tensor(rng.standard_normal(tuple(parameter.shape)))
            parameter.copy_(1 + 0.3 * values if "ln" in name and "weight" in name else 0.3 * values)
    return model


def ours(kind: str, tensors: dict[str, np.ndarray]) -> Params:
    """Their tensors in our tree, by hand."""

    def norm(name: str) -> Params:
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def linear(name: str) -> Params:
        return {"kernel": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def layer(i: int) -> Params:
        block = f"transformer.h.{i}"
        heads = (N, D // N)
        kernels = np.split(tensors[f"{block}.attn.c_attn.weight"], 3, axis=1)
        biases = np.split(tensors[f"{block}.attn.c_attn.bias"], 3)
        mixer = {
            f"{name}_proj": {"kernel": kernel.reshape(D, *heads), "bias": bias.reshape(heads)}
            for name, kernel, bias in zip("qkv", kernels, biases, strict=True)
        }
        out = linear(f"{block}.attn.c_proj")
        mixer["o_proj"] = {"kernel": out["kernel"].reshape(*heads, D), "bias": out["bias"]}
        ffn = {"up_proj": linear(f"{block}.mlp.c_fc"), "down_proj": linear(f"{block}.mlp.c_proj")}
        return {"mixer_norm": norm(f"{block}.ln_1"), "mixer": mixer, "ffn_norm": norm(f"{block}.ln_2"), "ffn": ffn}

    words, places = ("wte", "wpe") if kind == "gpt2" else ("tokens_embed", "positions_embed")
    tree = {
        "embed": {"embedding": tensors[f"transformer.{words}.weight"]},
        "position_embed": {"embedding": tensors[f"transformer.{places}.weight"]},
        **{f"layers_{i}": layer(i) for i in range(L)},
    }
    return tree | ({"final_norm": norm("transformer.ln_f")} if kind == "gpt2" else {})


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradients(decoder: Decoder, params: Params, inputs: Any, weights: Any) -> Any:
    def loss(params: Params) -> Any:
        logits, _ = decoder.apply({"params": params}, *inputs)
        return (logits * weights).sum(), logits

    return jax.grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(decoder: Decoder, params: Params, inputs: Any) -> Any:
    return decoder.apply({"params": params}, *inputs)[0]


@pytest.mark.parametrize("kind", OURS)
def test_logits_and_gradients_are_those_of_transformers(kind: str, rng: np.random.Generator) -> None:
    model = theirs(kind, rng)
    tokens = rng.integers(0, V, (2, T), dtype=np.int32)
    positions, ones = np.tile(np.arange(T, dtype=np.int32), (2, 1)), np.ones((2, T), np.int32)
    weights = rng.standard_normal((2, T, V))
    expected = model(input_ids=torch.tensor(tokens).long()).logits
    (expected * torch.tensor(weights)).sum().backward()
    values = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    params = jax.tree.map(jnp.asarray, ours(kind, values))
    inputs = (tokens, positions, ones)
    gradients, logits = logits_and_gradients(Decoder(OURS[kind], FLOAT64_POLICY), params, inputs, weights)
    FLOAT64.check(pairs.error(np.asarray(logits), expected.detach().numpy()), "logits")
    wanted = ours(kind, {name: parameter.grad.numpy() for name, parameter in model.named_parameters()})
    for (path, found), want in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
    ):
        scale = 1e-5 * np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(wanted)))
        FLOAT64.check(pairs.error(np.asarray(found), want, scale), jax.tree_util.keystr(path))


def test_gpt2_with_padding_on_the_left(rng: np.random.Generator) -> None:
    """Position ids and a mask there are positions and segment 0 here."""
    model = theirs("gpt2", rng)
    tokens = rng.integers(0, V, (2, T), dtype=np.int32)
    segments = np.ones((2, T), np.int32)
    segments[0, :9] = 0
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    arrays = {"input_ids": tokens, "attention_mask": segments, "position_ids": positions}
    expected = model(**{name: torch.tensor(x).long() for name, x in arrays.items()}).logits.detach().numpy()
    values = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    params = jax.tree.map(jnp.asarray, ours("gpt2", values))
    inputs = (tokens, positions, segments)
    logits = logits_of(Decoder(OURS["gpt2"], FLOAT64_POLICY), params, inputs)
    real = segments != 0
    FLOAT64.check(pairs.error(np.asarray(logits)[real], expected[real]), "logits")


def test_layer_norm_is_the_standard_one(rng: np.random.Generator) -> None:
    """Biased variance, eps inside the root. Dividing by (unbiased std + eps), as in S4-02, is far off."""
    x, scale, bias = rng.standard_normal((5, 16)), rng.standard_normal(16), rng.standard_normal(16)
    expected = torch.nn.functional.layer_norm(torch.tensor(x), (16,), torch.tensor(scale), torch.tensor(bias), 1e-5)
    in_jax = jax_norm.layer_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias), eps=1e-5)
    in_torch = torch_norm.layer_norm(torch.tensor(x), torch.tensor(scale), torch.tensor(bias), eps=1e-5)
    FLOAT64.check(pairs.error(np.asarray(in_jax), expected.numpy()), "jaxlm")
    FLOAT64.check(pairs.error(in_torch.numpy(), expected.numpy()), "torch_ref")
    unbiased = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-5) * scale + bias
    with pytest.raises(AssertionError, match="unbiased"):
        FLOAT64.check(pairs.error(unbiased, expected.numpy()), "unbiased")


def without_scores(name: str) -> bool:
    """Whether an entry changes only how a model is trained or run."""
    return not {"loss", "remat", "layer_loop"} & (OPTIONS | MIXTURES)[name].keys()


@pytest.mark.parametrize("name", [*filter(without_scores, OPTIONS), *MIXTURES])
def test_a_later_token_moves_no_earlier_logit(name: str, rng: np.random.Generator) -> None:
    """Causal by default (S4-04 was not), for every option and pattern; torch_ref's logits stand for both frameworks."""
    options = {key: value for key, value in (OPTIONS | MIXTURES)[name].items() if key != "loss"}
    cfg = pairs.model(**options)
    mirror = pairs.pair(cfg, pairs.random_params(cfg, rng)).torch
    before, after = np.tile(rng.integers(0, cfg.vocab_size - 1, (1, 21), dtype=np.int32), (2, 1, 1))
    after = after.copy()
    after[0, -1] += 1
    places = torch.arange(21, dtype=torch.int32)[None], torch.ones(1, 21, dtype=torch.int32)
    with torch.no_grad():
        first, second = (mirror(torch.tensor(tokens), *places)[0].numpy() for tokens in (before, after))
    FLOAT64.check(pairs.error(second[:, :-1], first[:, :-1]), "an earlier logit")
    assert pairs.error(second[:, -1], first[:, -1]) > 1e-3


FAULTS: dict[str, Callable[[dict[str, np.ndarray]], None]] = {
    "Conv1D read as a Linear": lambda tensors: tensors.update(
        {"transformer.h.0.attn.c_proj.weight": tensors["transformer.h.0.attn.c_proj.weight"].T}
    ),
    "keys before queries": lambda tensors: tensors.update(
        {"transformer.h.1.attn.c_attn.weight": np.roll(tensors["transformer.h.1.attn.c_attn.weight"], D, axis=1)}
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, rng: np.random.Generator) -> None:
    model = theirs("gpt2", rng)
    tokens = rng.integers(0, V, (1, T), dtype=np.int32)
    values = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    FAULTS[fault](values)
    params = jax.tree.map(jnp.asarray, ours("gpt2", values))
    inputs = (tokens, np.arange(T, dtype=np.int32)[None], np.ones((1, T), np.int32))
    logits = logits_of(Decoder(OURS["gpt2"], FLOAT64_POLICY), params, inputs)
    expected = model(input_ids=torch.tensor(tokens).long()).logits.detach().numpy()
    assert pairs.error(np.asarray(logits), expected) > 1e-3

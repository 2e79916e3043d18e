"""An independent judge, in float64: rotations, windows, sinks and soft cap as `transformers` computes them.

Weights are random and copied by hand. What transformers casts to float32 whatever the dtype is lifted (`Lifted`).

Shapes: B batch, T length, N heads, K kv heads, H head dim, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.phi3 import modeling_phi3

from jaxlm import config
from jaxlm.ops.attention import attend as jax_attention
from jaxlm.ops.attention import visible as jax_visible
from jaxlm.ops.rope import apply_rope, rope_frequencies, rope_table, rope_temperature
from jaxlm.parity.sides.float64_mode import Lifted
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64
from torch_ref.models.attention import Attention
from torch_ref.ops.attention.attend import Places
from torch_ref.ops.rope import rope_table_of

B, T, WINDOW = 2, 96, 17
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_slow": 1.0, "beta_fast": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": YARN,
    "yarn, not truncated": YARN | {"truncate": False, "beta_fast": 32.0},
    "yarn, attention factor": YARN | {"attention_factor": 1.7},
}
NAMES = {"original_max_position_embeddings": "original_max_seq_len"}


def scaling_of(name: str) -> config.RopeScaling:
    """Our section for one of SCALINGS."""
    options = {NAMES.get(key, key): value for key, value in SCALINGS[name].items()}
    return config.RopeScaling(kind=name.partition(",")[0], **options)  # pyright: ignore[reportArgumentType]


def rope_parameters(name: str) -> dict[str, Any]:
    """Theirs."""
    return {"rope_type": name.partition(",")[0], "rope_theta": 10000.0, **SCALINGS[name]}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("theta", [1e4, 15e4])
def test_frequencies(name: str, head_dim: int, theta: float) -> None:
    parameters = rope_parameters(name) | {"rope_theta": theta, "original_max_position_embeddings": 4096}
    cfg = LlamaConfig(**SIZES | {"head_dim": head_dim}, rope_parameters=parameters, max_position_embeddings=16384)
    with Lifted():
        theirs, temperature = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](cfg, torch.device("cpu"))
    scaling = scaling_of(name)
    if scaling.original_max_seq_len:
        scaling = dataclasses.replace(scaling, original_max_seq_len=4096)
    FLOAT64.check(pairs.error(theirs.double().numpy(), rope_frequencies(head_dim, theta, scaling)), "frequencies")
    assert rope_temperature(scaling) == pytest.approx(temperature, rel=1e-12)


def hf_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under the names of the Llama family, whose rotary pairs are (i, i + H/2)."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in (
            ("embed.", "model.embed_tokens."),
            ("final_norm.", "model.norm."),
            ("head.", "lm_head."),
            ("layers.", "model.layers."),
            ("mixer_norm.", "input_layernorm."),
            ("ffn_norm.", "post_attention_layernorm."),
            (".mixer.", ".self_attn."),
            (".ffn.", ".mlp."),
        ):
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def gpt2_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names of GPT-2, whose kernels are [in, out] and whose q, k and v are one."""
    renamed = {
        "transformer.wte.weight": state["embed.weight"],
        "transformer.wpe.weight": state["position_embed.weight"],
    }
    for kind in ("weight", "bias"):
        turn = (lambda x: x.T) if kind == "weight" else (lambda x: x)
        renamed[f"transformer.ln_f.{kind}"] = state[f"final_norm.{kind}"]
        for i in range(3):
            ours, theirs = f"layers.{i}", f"transformer.h.{i}"
            joined = torch.cat([state[f"{ours}.mixer.{part}_proj.{kind}"] for part in "qkv"])
            renamed[f"{theirs}.attn.c_attn.{kind}"] = turn(joined)
            renamed[f"{theirs}.attn.c_proj.{kind}"] = turn(state[f"{ours}.mixer.o_proj.{kind}"])
            renamed[f"{theirs}.mlp.c_fc.{kind}"] = turn(state[f"{ours}.ffn.up_proj.{kind}"])
            renamed[f"{theirs}.mlp.c_proj.{kind}"] = turn(state[f"{ours}.ffn.down_proj.{kind}"])
            renamed[f"{theirs}.ln_1.{kind}"] = state[f"{ours}.mixer_norm.{kind}"]
            renamed[f"{theirs}.ln_2.{kind}"] = state[f"{ours}.ffn_norm.{kind}"]
    return renamed


EAGER = {"attn_implementation": "eager", "tie_word_embeddings": True}
MODELS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    **{
        f"Llama, {name}": (
            {"rope_scaling": dataclasses.asdict(scaling_of(name))},
            lambda name=name: LlamaForCausalLM(
                LlamaConfig(**SIZES, **EAGER, rope_parameters=rope_parameters(name), max_position_embeddings=128)
            ),
        )
        for name in ("linear", "llama3", "yarn")
    },
    "Mistral": (
        {"window": WINDOW},
        lambda: MistralForCausalLM(MistralConfig(**SIZES, **EAGER, sliding_window=WINDOW)),
    ),
    "Qwen3": ({"qk_norm": True}, lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **EAGER))),
    "Qwen3, window in the first block": (
        {"qk_norm": True, "pattern": ("attention(window=17)+mlp", *["attention+mlp"] * 2), "layer_loop": "unroll"},
        lambda: Qwen3ForCausalLM(
            Qwen3Config(
                **SIZES,
                **EAGER,
                sliding_window=WINDOW,
                use_sliding_window=True,
                layer_types=["sliding_attention", "full_attention", "full_attention"],
            )
        ),
    ),
    "GPT-2": (
        {
            "positions": "learned",
            "norm": "layernorm",
            "activation": "gelu_tanh",
            "biases": ("qkv", "attention_out", "mlp"),
            "n_kv_heads": 4,
            "head_dim": 8,
        },
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=97,
                n_positions=128,
                n_embd=32,
                n_layer=3,
                n_head=4,
                n_inner=40,
                bos_token_id=0,
                eos_token_id=0,
                **EAGER,
            )
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model(name: str, rng: np.random.Generator) -> None:
    """Logits of both our decoders, and the gradient of every weight."""
    options, make = MODELS[name]
    cfg = pairs.model(**{"head_dim": 16, "max_seq_len": 128, **options})
    pair = pairs.pair(cfg, pairs.random_params(cfg, rng))
    state = dict(pair.torch.named_parameters())
    names = gpt2_names if name == "GPT-2" else hf_names
    with Lifted():
        theirs = make().double().eval()
        info = theirs.load_state_dict({k: v.detach() for k, v in names(state).items()}, strict=False)
    assert not info.unexpected_keys and set(info.missing_keys) <= {"lm_head.weight"}
    theirs.tie_weights()

    tokens = rng.integers(0, cfg.vocab_size, (B, T), dtype=np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    dlogits = rng.standard_normal((B, T, cfg.vocab_size))
    with Lifted():
        logits = theirs(torch.tensor(tokens, dtype=torch.long)).logits
        (logits * torch.tensor(dlogits)).sum().backward()
    ours, _ = pair.torch(*map(torch.tensor, (tokens, positions, np.ones_like(tokens))))
    (ours * torch.tensor(dlogits)).sum().backward()

    logits_of = jax.jit(lambda params, *places: pair.jax.apply({"params": params}, *places)[0])
    again = np.asarray(logits_of(pair.params, tokens, positions, np.ones_like(tokens)))
    FLOAT64.check(pairs.error(ours.detach().numpy(), logits.detach().numpy()), "logits of torch_ref")
    FLOAT64.check(pairs.error(again, logits.detach().numpy()), "logits of jaxlm")
    gradients = names({k: v.grad for k, v in state.items() if v.grad is not None})
    expected = dict(theirs.named_parameters())
    for key, gradient in gradients.items():
        found = expected[key].grad
        assert found is not None
        FLOAT64.check(
            pairs.error(gradient.numpy(), found.numpy(), 1e-5 * float(found.norm() + 1)), f"gradient of {key}"
        )


@pytest.mark.parametrize("layer", [0, 1], ids=["window", "all"])
def test_gpt_oss_attention(layer: int, rng: np.random.Generator) -> None:
    """Sink logits, a window in every second layer, YaRN that is not truncated, biases; gradients of the sinks too."""
    with Lifted():
        sizes = {key: value for key, value in SIZES.items() if key != "rms_norm_eps"}
        theirs_cfg = GptOssConfig(**sizes, sliding_window=WINDOW, max_position_embeddings=256)
        theirs_cfg._attn_implementation = "eager"
        theirs_cfg.rope_parameters = rope_parameters("yarn, not truncated")
        theirs = modeling_gpt_oss.GptOssAttention(theirs_cfg, layer).double()
        rotary = modeling_gpt_oss.GptOssRotaryEmbedding(theirs_cfg)
    cfg = pairs.model(
        n_layers=1,
        head_dim=16,
        sink_logits=True,
        window=0 if layer else WINDOW,
        biases=("qkv", "attention_out"),
        rope_scaling=dataclasses.asdict(scaling_of("yarn, not truncated")),
    )
    pair = pairs.pair(cfg, pairs.random_params(cfg, rng))
    ours = pair.torch.get_submodule("layers.0.mixer")
    assert isinstance(ours, Attention) and cfg.rope is not None
    theirs.load_state_dict({k.replace("sink_logits", "sinks"): v.detach() for k, v in ours.state_dict().items()})

    x, dy = (torch.tensor(rng.standard_normal((B, T, 32))) for _ in range(2))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & ((distance < WINDOW) if layer == 0 else True)
    mask = torch.where(seen, 0.0, -torch.inf).double()[None, None]
    places = Places(torch.arange(T).expand(B, T), torch.ones(B, T, dtype=torch.int32))
    with Lifted():
        expected, _ = theirs(x, rotary(x, places.positions), mask)
    got, _ = ours(x, places, rope_table_of(places.positions, cfg.rope, torch.float64), None)
    FLOAT64.check(pairs.error(got.detach().numpy(), expected.detach().numpy()), "output")
    (got * dy).sum().backward()
    (expected * dy).sum().backward()
    for name, parameter in theirs.named_parameters():
        mine = ours.get_parameter(name.replace("sinks", "sink_logits")).grad
        assert mine is not None and parameter.grad is not None
        FLOAT64.check(pairs.error(mine.numpy(), parameter.grad.numpy(), pairs.SMALL), f"gradient of {name}")


@pytest.mark.parametrize("softcap", [0.5, 5.0])
def test_gemma2_soft_cap(softcap: float, rng: np.random.Generator) -> None:
    q, k, v = (rng.standard_normal((B, T, heads, 8)) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # pyright: ignore[reportArgumentType]
    mask = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    heads_first = [torch.tensor(x).transpose(1, 2) for x in (q, k, v)]
    with Lifted():
        expected, _ = modeling_gemma2.eager_attention_forward(
            module, *heads_first, mask, scaling=8**-0.5, softcap=softcap
        )
    held = jax_visible.Places(jnp.tile(jnp.arange(T), (B, 1)), jnp.ones((B, T), int))
    for impl in ("xla", "blockwise"):
        got = jax_attention.attention(
            *map(jnp.asarray, (q, k, v)), held, held, impl=impl, aligned=True, softcap=softcap
        )
        FLOAT64.check(pairs.error(np.asarray(got), expected.numpy()), impl)


@pytest.mark.parametrize(("module", "layout"), [(modeling_phi3, "half"), (modeling_glm, "interleaved")])
def test_partial_rotary(module: Any, layout: Any, rng: np.random.Generator) -> None:
    """Phi-3 rotates the first half of a head by halves, GLM by neighbours."""
    x, positions = rng.standard_normal((B, T, 4, 16)), np.tile(np.arange(T), (B, 1))
    frequencies = rope_frequencies(8, 1e4)
    angles = torch.tensor(positions[..., None] * np.concatenate([frequencies, frequencies]))
    q = torch.tensor(x).transpose(1, 2)
    expected, _ = module.apply_rotary_pos_emb(q, q, angles.cos(), angles.sin())
    got = apply_rope(jnp.asarray(x), *rope_table(jnp.asarray(positions), frequencies, jnp.float64), layout=layout)
    FLOAT64.check(pairs.error(np.asarray(got), expected.transpose(1, 2).numpy()), layout)

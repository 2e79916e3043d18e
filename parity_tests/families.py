"""Models of the public families, small and random: ours, and the config of transformers that should be the same.

`Example` and the measurements here serve all families; `EXAMPLES` are the dense ones. `families_moe` and `families_ssm`
hold the others, and `test_families` and `table` walk all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert import native
from jaxlm.convert.files import storage
from jaxlm.convert.write_model import convert
from jaxlm.models.decoder import Decoder, Params
from jaxlm.numerics import Policy
from jaxlm.parity.sides.float64_mode import Lifted
from parity_tests import pairs

T = 512
"""Tokens of the prompt whose logits are compared."""
FLOAT32 = {
    ("dots1", "bfloat16", "selection_bias"),
    ("dots1", "float16", "selection_bias"),
    ("gpt_oss", "float16", "scale"),
}
"""Family, dtype of the model, parameter: what transformers keeps and stores in float32 all the same."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One model of a family, said twice."""

    family: str
    name: str
    model: config.Model
    theirs: Callable[[], Any]
    """Makes the config of transformers, without looking at ours."""

    def __str__(self) -> str:
        """As the name of a test."""
        return f"{self.family}: {self.name}"


def example(family: str, name: str, theirs: Callable[..., Any], said: dict[str, Any], **ours: Any) -> Example:
    """An example by the options of `pairs.model` and the arguments of a config of transformers."""
    return Example(family, name, pairs.model(**{"layer_loop": "unroll", **ours}), functools.partial(theirs, **said))


def values(one: Example, dtype: str = "float32") -> Params:
    """Values of their own in every leaf, the same in each run, as numpy arrays; see `FLOAT32`."""
    rng = np.random.default_rng(list(str(one).encode()))

    def leaf(path: tuple, x: Any) -> np.ndarray:
        return np.asarray(x).astype("float32" if (one.family, dtype, path[-1].key) in FLOAT32 else dtype)

    return jax.tree_util.tree_map_with_path(leaf, pairs.random_params(one.model, rng))


def torch_folder(params: Params, cfg: config.Model, folder: Path, **files: str) -> Path:
    """Write a live tree as a torch_ref folder, from which `convert` goes on."""
    tensors = storage.planned(native.to_torch(params, cfg))
    settings = {"config.toml": toml.to_toml(config.Config(model=cfg))}
    storage.write_folder(folder, tensors, settings | files, layout="torch", overwrite=True)
    return folder


def exported(one: Example, folder: Path, dtype: str = "float32", **options: Any) -> Path:
    """The example in the layout of its family."""
    torch_folder(values(one, dtype), one.model, folder / "torch")
    convert(folder / "torch", folder / one.family, one.family, **options)
    return folder / one.family


def strictly(folder: Path, **options: Any) -> Any:
    """The model as transformers loads it, with nothing missing, unexpected or of another shape."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(told.values()), told
    return model.eval()


def prompt(cfg: config.Model) -> np.ndarray:
    """512 tokens, the last id of the vocabulary among them."""
    tokens = np.random.default_rng(5).integers(0, cfg.vocab_size, (1, T), dtype=np.int32)
    tokens[:, 7::50] = cfg.vocab_size - 1
    return tokens


def our_logits(cfg: config.Model, params: Params, dtype: str) -> np.ndarray:
    """Of the prompt, in float64; needs `jax_enable_x64` for the dtype `float64`."""
    stored = "float64" if dtype == "float64" else "float32"
    numerics = config.Numerics(params=stored, compute=dtype, matmul="highest")  # pyright: ignore[reportArgumentType]
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, jnp.dtype(stored))), params)
    tokens, places = prompt(cfg), np.arange(T, dtype=np.int32)[None]
    apply = jax.jit(Decoder(cfg, Policy.from_config(numerics)).apply)
    logits, _ = apply({"params": params}, tokens, places, np.ones_like(places))
    return np.asarray(logits, np.float64)


def their_logits(folder: Path, cfg: config.Model, dtype: str) -> np.ndarray:
    """Of the prompt, in float64. Everything is float64 for the dtype `float64`, what transformers casts too."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    tokens = torch.tensor(prompt(cfg), dtype=torch.long)
    with torch.no_grad():
        if dtype != "float64":
            return strictly(folder, dtype=getattr(torch, dtype), **eager)(tokens).logits.double().numpy()
        with Lifted():
            model = strictly(folder, dtype=torch.float64, **eager)
            narrow = [name for name, x in model.named_buffers() if x.dtype in (torch.float32, torch.bfloat16)]
            assert not narrow, f"made outside of Lifted: {narrow}"
            return model(tokens).logits.numpy()


class Errors(NamedTuple):
    """Relative errors of logits. In float64 of ours against theirs; in the others of ours and of theirs against the
    float64 logits of both."""

    float64: float
    float32: tuple[float, float] = (0.0, 0.0)
    bfloat16: tuple[float, float] = (0.0, 0.0)


def measure(one: Example, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> Errors:
    """Convert, load and compare; float64 always, and the other dtypes as asked."""
    params = values(one)
    with tempfile.TemporaryDirectory() as name:
        folder = exported(one, Path(name))
        golden = our_logits(one.model, params, "float64")
        exact = pairs.error(golden, their_logits(folder, one.model, "float64"))
        rounded = {
            dtype: (
                pairs.error(our_logits(one.model, params, dtype), golden),
                pairs.error(their_logits(folder, one.model, dtype), golden),
            )
            for dtype in dtypes
        }
    return Errors(exact, **rounded)


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
"""`pairs.BASE` with two layers, in the words of Llama."""
TIED: dict[str, Any] = {**SIZES, "tie_word_embeddings": True}
TWO = {"n_layers": 2}
UNTIED: dict[str, Any] = {"n_layers": 2, "tie_embeddings": False}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "beta_slow": 1.0, "beta_fast": 4.0}


def scaled(kind: str, theta: float = 1e4, **options: Any) -> dict[str, Any]:
    """Llama's config with scaled frequencies, a model of 512 tokens that was trained on 128."""
    options = options if kind == "linear" else {**options, "original_max_position_embeddings": 128}
    return {**SIZES, "rope_parameters": {"rope_type": kind, "rope_theta": theta, **options}}


def scaling(kind: str, **options: Any) -> dict[str, Any]:
    """Our half of it."""
    return {**UNTIED, "rope_scaling": {"kind": kind, "original_max_seq_len": 128, **options}}


LLAMA = functools.partial(example, "llama", theirs=transformers.LlamaConfig)
MISTRAL = functools.partial(example, "mistral", theirs=transformers.MistralConfig)
QWEN2 = functools.partial(example, "qwen2", theirs=transformers.Qwen2Config, biases=("qkv",))
QWEN3 = functools.partial(example, "qwen3", theirs=transformers.Qwen3Config, qk_norm=True)
GPT2 = functools.partial(
    example,
    "gpt2",
    theirs=transformers.GPT2Config,
    n_kv_heads=4,
    norm="layernorm",
    positions="learned",
    biases=("qkv", "attention_out", "mlp"),
    **TWO,
)
GPT2_SIZES = {"vocab_size": 97, "n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2_SIZES |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}

EXAMPLES: tuple[Example, ...] = (
    LLAMA("grouped heads, tied", said=TIED, **TWO),
    LLAMA("interleaved", said={**SIZES, "rope_theta": 5e5}, rope_layout="interleaved", rope_theta=5e5, **UNTIED),
    LLAMA(
        "all biases, one kv head, wide heads, interleaved, scanned",
        said={**TIED, "num_key_value_heads": 1, "head_dim": 12, "attention_bias": True, "mlp_bias": True},
        n_kv_heads=1,
        head_dim=12,
        biases=("qkv", "attention_out", "mlp"),
        rope_layout="interleaved",
        layer_loop="scan",
        **TWO,
    ),
    LLAMA(
        "as many kv heads, attention biases, other eps, three layers",
        said={**TIED, "num_key_value_heads": None, "num_hidden_layers": 3, "attention_bias": True}
        | {"rms_norm_eps": 1e-3},
        n_kv_heads=4,
        biases=("qkv", "attention_out"),
        norm_eps=1e-3,
    ),
    LLAMA("linear scaling", said=scaled("linear", factor=4.0), **scaling("linear", factor=4.0)),
    LLAMA("llama3 scaling", said=scaled("llama3", 5e5, **LLAMA3), rope_theta=5e5, **scaling("llama3", **LLAMA3)),
    LLAMA("yarn, factor of the lengths", said=scaled("yarn", **YARN), **scaling("yarn", **YARN | {"factor": 0.0})),
    LLAMA(
        "yarn, not truncated, attention factor",
        said=scaled("yarn", **YARN, truncate=False, attention_factor=1.7),
        **scaling("yarn", **YARN, truncate=False, attention_factor=1.7),
    ),
    MISTRAL("window", said={**SIZES, "sliding_window": 100}, window=100, **UNTIED),
    MISTRAL(
        "no window, wide heads, interleaved, tied",
        said={**TIED, "sliding_window": None, "head_dim": 12, "rope_theta": 1e6},
        head_dim=12,
        rope_theta=1e6,
        rope_layout="interleaved",
        **TWO,
    ),
    QWEN2("no window, tied", said=TIED, **TWO),
    QWEN2(
        "window from the second layer on, interleaved",
        said={**SIZES, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 50}
        | {"max_window_layers": 1},
        pattern=("attention+mlp", *["attention(window=50)+mlp"] * 2),
        rope_layout="interleaved",
        tie_embeddings=False,
    ),
    QWEN2(
        "window in all layers, yarn",
        said={**scaled("yarn", **YARN), "use_sliding_window": True, "sliding_window": 50, "max_window_layers": 0},
        window=50,
        **scaling("yarn", **YARN),
    ),
    QWEN3("tied, wide heads", said={**TIED, "head_dim": 12}, head_dim=12, **TWO),
    QWEN3(
        "biases, window in every second layer, interleaved, scanned",
        said={**SIZES, "head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 50}
        | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        biases=("qkv", "attention_out"),
        pattern=("attention(window=50)+mlp", "attention+mlp"),
        n_layers=4,
        rope_layout="interleaved",
        layer_loop="scan",
        tie_embeddings=False,
    ),
    GPT2("tied", said=GPT2_SIZES, activation="gelu_tanh", d_ff=128),
    GPT2(
        "untied, erf, narrow, other eps, scanned",
        said={**GPT2_SIZES, "n_inner": 40, "activation_function": "gelu", "tie_word_embeddings": False}
        | {"layer_norm_epsilon": 1e-3},
        activation="gelu",
        norm_eps=1e-3,
        tie_embeddings=False,
        layer_loop="scan",
    ),
)
"""The dense families."""

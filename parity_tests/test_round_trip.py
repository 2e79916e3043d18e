"""Converted weights are the same weights: torch_ref loads the native conversion strictly; a Llama of transformers comes
in and goes out, with its config and its tokenizer. `test_families` has what holds for every family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from jaxlm import config
from jaxlm.convert import native
from jaxlm.convert.files import storage
from jaxlm.convert.open_model import load
from jaxlm.convert.write_model import convert
from jaxlm.text.tokenizer import Tokenizer
from parity_tests import families
from parity_tests.families import exported, strictly, torch_folder
from parity_tests.pairs import model, random_params
from torch_ref.models.decoder import Decoder as TorchDecoder
from torch_ref.numerics import Policy as TorchPolicy

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TEXT = "def f(x):\n    return x  # gr\u00fc\u00dfe \u4f60\u597d <|endoftext|> 12345"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small tokenizer with words and special tokens."""
    return Tokenizer.train(["def f(x):\n    return x\n" * 20], 290)


def random_tree(cfg: config.Model, rng: np.random.Generator, dtype: str = "float32") -> Any:
    """Random values in every leaf, as numpy arrays of `dtype`."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), random_params(cfg, rng))


def assert_bits(tensors: Mapping[str, torch.Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    assert tensors.keys() == arrays.keys(), tensors.keys() ^ arrays.keys()
    for name, array in arrays.items():
        tensor = tensors[name].detach().contiguous()
        assert (tuple(tensor.shape), str(tensor.dtype)) == (array.shape, f"torch.{array.dtype.name}"), name
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == np.ascontiguousarray(array).tobytes(), name


MIRRORED: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": False, "biases": ("qkv", "attention_out", "mlp", "head"), "norm": "layernorm"},
    {"positions": "learned", "activation": "gelu", "qk_norm": True, "n_kv_heads": 1, "layer_loop": "unroll"},
    {"final_norm": False, "norm_position": "post", "positions": "sinusoidal"},
    {
        "pattern": ("attention+moe",),
        "moe": {"n_shared": 1, "selection_bias": True, "noisy": True},
        "biases": ("router", "experts", "mlp"),
    },
]


@pytest.mark.parametrize("options", MIRRORED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_ref_loads_strictly_and_gives_back_the_bits(
    tmp_path: Path, rng: np.random.Generator, options: dict, dtype: str
) -> None:
    from safetensors.torch import load_file, save_file

    cfg = model(**{"vocab_size": 290, **options})
    params = random_tree(cfg, rng, dtype)
    mirror = TorchDecoder(cfg, TorchPolicy(DTYPES[dtype], DTYPES[dtype]))
    mirror.load_state_dict(load_file(torch_folder(params, cfg, tmp_path / "torch") / "model.safetensors"), strict=True)
    assert_bits(dict(mirror.named_parameters()), dict(native.to_torch(params, cfg)))
    save_file(mirror.state_dict(), tmp_path / "model.safetensors")
    back = native.from_torch(storage.read_folder(tmp_path), cfg)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("padded", [False, True])
def test_tokenizer_and_generation(tmp_path: Path, rng: np.random.Generator, tokenizer: Tokenizer, padded: bool) -> None:
    """Also where the vocabulary of the model is padded: it has ids that the tokenizer has not."""
    cfg = model(vocab_size=320 if padded else 290)
    torch_folder(random_tree(cfg, rng), cfg, tmp_path / "torch", **{"tokenizer.json": tokenizer.to_json()})
    convert(tmp_path / "torch", tmp_path / "llama", "llama")
    hf, tok = strictly(tmp_path / "llama"), AutoTokenizer.from_pretrained(tmp_path / "llama")
    encoded = tok(TEXT, return_tensors="pt")
    assert encoded.keys() == {"input_ids", "attention_mask"}
    assert encoded["input_ids"][0].tolist() == tokenizer.encode(TEXT, allow_special=True)
    assert tok.decode(encoded["input_ids"][0]) == TEXT
    assert (tok.eos_token_id, tok.pad_token_id) == (tokenizer.eot, tokenizer.specials["pad"])
    settings = GenerationConfig.from_pretrained(tmp_path / "llama")
    assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == (tokenizer.eot, tokenizer.pad, None)
    new = hf.generate(**encoded, max_new_tokens=3, do_sample=False)
    assert new.shape[1] <= encoded["input_ids"].shape[1] + 3
    assert load(tmp_path / "llama").config.model.vocab_size == cfg.vocab_size == hf.config.vocab_size


def test_a_run_holds_the_same_bits(tmp_path: Path) -> None:
    """family -> run -> family."""
    one = families.EXAMPLES[0]
    out = exported(one, tmp_path)
    convert(out, tmp_path / "run", "jaxlm")
    convert(tmp_path / "run", tmp_path / "back", one.family)
    assert_bits(strictly(tmp_path / "back").state_dict(), {k: v.numpy() for k, v in strictly(out).state_dict().items()})

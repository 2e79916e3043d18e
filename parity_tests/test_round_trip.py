"""Converted weights are the same weights, and the frameworks that load them compute the same model.

torch_ref loads the native conversion and transformers the Llama layout, both strictly. transformers casts to float32 in
its norms, rotary angles and softmax whatever the dtype of the model; the float64 rung lifts these casts (`Lifted`) and
replaces the frequencies, so that only different mathematics is left to be seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from jaxlm import config, config_file
from jaxlm.convert import native, storage
from jaxlm.convert.convert import convert
from jaxlm.convert.families import llama
from jaxlm.convert.load import load
from jaxlm.convert.rows import Row, to_layout
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.models.decoder import Decoder
from jaxlm.numerics import Policy
from jaxlm.ops.rope import rope_frequencies
from parity_tests.pairs import error, model, random_params
from parity_tests.tolerances import FLOAT64, RATIO
from torch_ref.models.decoder import Decoder as TorchDecoder
from torch_ref.numerics import Policy as TorchPolicy

LLAMAS: dict[str, dict[str, Any]] = {
    "gqa, tied": {},
    "untied, interleaved, theta": {"tie_embeddings": False, "rope_layout": "interleaved", "rope_theta": 5e5},
    "mha, attention biases": {"n_kv_heads": 4, "biases": ("qkv", "attention_out"), "norm_eps": 1e-3},
    "mqa, all biases, wide heads": {
        "n_kv_heads": 1,
        "head_dim": 12,
        "biases": ("qkv", "attention_out", "mlp"),
        "rope_layout": "interleaved",
        "layer_loop": "unroll",
    },
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TEXT = "def f(x):\n    return x  # gr\u00fc\u00dfe \u4f60\u597d <|endoftext|> 12345"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small tokenizer with words and special tokens."""
    return Tokenizer.train(["def f(x):\n    return x\n" * 20], 290)


@pytest.fixture
def torch_folder(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Writes a live tree as a torch_ref folder with a tokenizer."""

    def write(cfg: config.Model, params: Any) -> Path:
        files = {"config.toml": config_file.to_toml(config.Config(model=cfg)), "tokenizer.json": tokenizer.to_json()}
        storage.write_folder(tmp_path / "torch", storage.planned(native.to_torch(params, cfg)), files, layout="torch")
        return tmp_path / "torch"

    return write


class Lifted(TorchFunctionMode):
    """Computes in float64 what is asked for in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        lift = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        return func(*map(lift, args), **{key: lift(value) for key, value in (kwargs or {}).items()})


def random_tree(cfg: config.Model, rng: np.random.Generator, dtype: str = "float32") -> Any:
    """Random values in every leaf, as numpy arrays of `dtype`."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), random_params(cfg, rng))


def assert_bits(tensors: Mapping[str, torch.Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    assert tensors.keys() == arrays.keys(), tensors.keys() ^ arrays.keys()
    for name, array in arrays.items():
        tensor = tensors[name].detach().contiguous()
        assert (tuple(tensor.shape), str(tensor.dtype)) == (array.shape, f"torch.{array.dtype.name}"), name
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == np.ascontiguousarray(array).tobytes(), name


def strictly(folder: Path, **options: Any) -> LlamaForCausalLM:
    """The model as transformers loads it, with nothing missing, unexpected or of another shape."""
    hf, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert type(hf) is LlamaForCausalLM
    assert not any(info.values()), info
    return hf.eval()


def jax_logits(cfg: config.Model, params: Any, tokens: np.ndarray, dtype: str) -> np.ndarray:
    decoder = Decoder(cfg, Policy.from_config(config.Numerics(params=dtype, compute=dtype, matmul="highest")))
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    logits, _ = jax.jit(decoder.apply)({"params": params}, tokens, positions, np.ones_like(tokens))
    return np.asarray(logits, np.float64)


def hf_logits(hf: LlamaForCausalLM, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return hf(torch.tensor(tokens, dtype=torch.long)).logits.double().numpy()


def hf_logits_float64(hf: LlamaForCausalLM, cfg: config.Model, tokens: np.ndarray) -> np.ndarray:
    """Logits with every cast to float32 lifted and the frequencies of jaxlm."""
    hf = hf.double()
    hf.model.rotary_emb.inv_freq = torch.tensor(rope_frequencies(cfg.head_dim, cfg.rope_theta))
    with Lifted():
        return hf_logits(hf, tokens)


@pytest.fixture
def tokens(rng: np.random.Generator) -> np.ndarray:
    """A prompt of 512 tokens, the last id of the vocabulary among them."""
    tokens = rng.integers(0, 290, (1, 512), dtype=np.int32)
    tokens[:, 7::50] = 289
    return tokens


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
    tmp_path: Path, torch_folder: Callable, rng: np.random.Generator, options: dict, dtype: str
) -> None:
    from safetensors.torch import load_file, save_file

    cfg = model(**{"vocab_size": 290, **options})
    params = random_tree(cfg, rng, dtype)
    mirror = TorchDecoder(cfg, TorchPolicy(DTYPES[dtype], DTYPES[dtype]))
    mirror.load_state_dict(load_file(torch_folder(cfg, params) / "model.safetensors"), strict=True)
    assert_bits(dict(mirror.named_parameters()), dict(native.to_torch(params, cfg)))
    save_file(mirror.state_dict(), tmp_path / "model.safetensors")
    back = native.from_torch(storage.read_folder(tmp_path), cfg)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("options", LLAMAS.values(), ids=LLAMAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_loads_strictly_and_gives_back_the_bits(
    tmp_path: Path, torch_folder: Callable, rng: np.random.Generator, options: dict, dtype: str
) -> None:
    cfg = model(**{"vocab_size": 290, **options})
    params = random_tree(cfg, rng, dtype)
    src = torch_folder(cfg, params)
    convert(src, tmp_path / "llama", "llama", shard_bytes=30_000)
    assert (tmp_path / "llama" / "model.safetensors.index.json").exists()
    hf = strictly(tmp_path / "llama")
    assert_bits(dict(hf.named_parameters()), dict(to_layout(params, cfg, llama.rows(cfg))))

    hf.save_pretrained(tmp_path / "saved")  # what transformers writes, jaxlm reads
    convert(tmp_path / "saved", tmp_path / "again", "torch")
    jax.tree.map(np.testing.assert_array_equal, native.from_torch(storage.read_folder(tmp_path / "again"), cfg), params)


@pytest.mark.parametrize("options", LLAMAS.values(), ids=LLAMAS)
def test_transformers_computes_the_same(
    tmp_path: Path, torch_folder: Callable, rng: np.random.Generator, tokens: np.ndarray, options: dict
) -> None:
    cfg = model(**{"vocab_size": 290, **options})
    params = random_tree(cfg, rng)
    convert(torch_folder(cfg, params), tmp_path / "llama", "llama")
    hf = strictly(tmp_path / "llama", attn_implementation="eager")
    theirs = hf_logits(hf, tokens)
    ours = jax_logits(cfg, params, tokens, "float32")
    golden = jax_logits(cfg, params, tokens, "float64")
    FLOAT64.check(error(hf_logits_float64(hf, cfg, tokens), golden), "logits in float64")
    RATIO.check(error(ours, golden) / error(theirs, golden), "float32 logits of jaxlm against those of transformers")


def _swap_gate_and_up(rows: list[Row]) -> list[Row]:
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    swapped = []
    for row in rows:
        kind = next((kind for kind in other if kind in row.theirs), "")
        swapped.append(Row(row.ours, row.theirs.replace(kind, other[kind]) if kind else row.theirs, *row.transforms))
    return swapped


def _forget_the_turn(rows: list[Row]) -> list[Row]:
    return [Row(row.ours, row.theirs, *row.transforms[-1:]) for row in rows]


@pytest.mark.parametrize("fault", [_swap_gate_and_up, _forget_the_turn])
def test_planted_faults_are_seen(
    tmp_path: Path,
    torch_folder: Callable,
    rng: np.random.Generator,
    tokens: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[list[Row]], list[Row]],
) -> None:
    cfg = model(vocab_size=290, rope_layout="interleaved")
    params = random_tree(cfg, rng)
    rows = llama.rows
    monkeypatch.setattr(llama, "rows", lambda cfg: fault(rows(cfg)))
    convert(torch_folder(cfg, params), tmp_path / "llama", "llama")
    found = hf_logits_float64(strictly(tmp_path / "llama", attn_implementation="eager"), cfg, tokens)
    with pytest.raises(AssertionError, match="logits: error"):
        FLOAT64.check(error(found, jax_logits(cfg, params, tokens, "float64")), "logits")


def test_a_transformers_model_comes_in_and_goes_out(tmp_path: Path, tokens: np.ndarray) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=290, num_key_value_heads=2, initializer_range=0.3, **sizes)).eval()
    hf.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert (ours.kind, ours.tokenizer_path, ours.config.model.norm_eps) == ("llama", None, 1e-6)
    convert(tmp_path / "theirs", tmp_path / "run", "jaxlm")
    convert(tmp_path / "run", tmp_path / "back", "llama")
    again = strictly(tmp_path / "back")
    assert_bits(again.state_dict(), {name: tensor.numpy() for name, tensor in hf.state_dict().items()})
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    theirs_only = {"transformers_version", "use_cache", "pretraining_tp"}
    ids = {"bos_token_id", "eos_token_id"}  # of the tokenizer, and there is none
    assert {key: after.get(key) for key in before.keys() - theirs_only - ids} == {
        key: value for key, value in before.items() if key not in theirs_only | ids
    }
    golden = jax_logits(ours.config.model, ours.params, tokens, "float64")
    FLOAT64.check(error(hf_logits_float64(again, ours.config.model, tokens), golden), "logits")


def test_tokenizer_and_generation(
    tmp_path: Path, torch_folder: Callable, rng: np.random.Generator, tokenizer: Tokenizer
) -> None:
    cfg = model(vocab_size=290)
    convert(torch_folder(cfg, random_tree(cfg, rng)), tmp_path / "llama", "llama")
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

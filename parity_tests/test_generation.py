"""Cached decoding: the same logits as without a cache, and the same tokens in both frameworks."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
import pytest
import torch

from jaxlm import config
from jaxlm.config import toml
from jaxlm.infer import generate as jax_generate
from jaxlm.infer.load import load
from jaxlm.models import decoder as jax_decoder
from jaxlm.text.completion import right_padded
from jaxlm.text.sampling import GREEDY, Sampling
from jaxlm.text.tokenizer import Tokenizer
from parity_tests.options import MAMBA
from parity_tests.pairs import Pair, model, pair, random_params
from parity_tests.tolerances import FLOAT64
from torch_ref.infer import generate as torch_generate
from torch_ref.models import decoder as torch_decoder

LENGTHS = range(1, 41)
AFTER = 4  # cached steps after the prefill
VARIANTS = [
    {},
    {"positions": "learned", "norm": "layernorm", "activation": "gelu", "biases": ("qkv", "mlp"), "n_kv_heads": 4},
    {"positions": "sinusoidal", "tie_embeddings": False, "norm_position": "post", "n_kv_heads": 1},
    {"rope_layout": "interleaved", "qk_norm": True, "layer_loop": "unroll"},
    {"window": 7, "keep_first": 2, "layer_loop": "unroll", "n_layers": 2},
    {
        "pattern": ("attention(window=5, keep_first=1)+mlp", "attention(positions=none)+mlp"),
        "n_layers": 2,
        "sink_logits": True,
        "sink_tokens": 2,
        "softcap": 3.0,
        "rotary_fraction": 0.5,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16},
    },
    MAMBA["mamba"],
    MAMBA["mamba2 groups"],
    MAMBA["jamba"],
    {"pattern": ("attention+moe", "attention+mlp"), "n_layers": 2, "moe": {"n_shared": 1, "router": "sigmoid"}},
]
VARIED = Sampling(temperature=0.0, repetition_penalty=2.0)  # greedy text of random weights falls into loops
WARM = Sampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.3)


@pytest.fixture(
    scope="module",
    params=VARIANTS,
    ids=["base", "learned", "sinusoidal", "interleaved", "window", "sinks", "mamba", "mamba2", "jamba", "moe"],
)
def models(request: pytest.FixtureRequest) -> Pair:
    cfg = model(**request.param)
    return pair(cfg, random_params(cfg, np.random.default_rng(7)))


def jax_apply(models: Pair, arrays: tuple[np.ndarray, ...], cache: Any = None) -> tuple[np.ndarray, Any]:
    logits, cache = _jax_apply(models.jax, models.params, arrays, cache)
    return np.asarray(logits), cache


@functools.partial(jax.jit, static_argnums=0)
def _jax_apply(decoder: jax_decoder.Decoder, params: Any, arrays: Any, cache: Any) -> Any:
    return decoder.apply({"params": params}, *arrays, cache)


def torch_apply(models: Pair, arrays: tuple[np.ndarray, ...], cache: Any = None) -> tuple[np.ndarray, Any]:
    with torch.inference_mode():
        logits, cache = models.torch(*map(torch.tensor, arrays), cache)
    return logits.numpy(), cache


FRAMEWORKS = {
    "jax": (jax_apply, lambda models, rows, slots: jax_decoder.init_cache(models.jax, rows, slots)),
    "torch": (torch_apply, lambda models, rows, slots: torch_decoder.init_cache(models.torch, rows, slots)),
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_cached_logits_are_the_uncached(models: Pair, framework: str, rng: np.random.Generator) -> None:
    """Prefill of a batch with a row of each length from 1 to 40, then single steps: every logit of every real token."""
    apply, init_cache = FRAMEWORKS[framework]
    tokens = rng.integers(0, models.jax.config.vocab_size, (len(LENGTHS), max(LENGTHS) + AFTER), dtype=np.int32)
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    uncached, _ = apply(models, (tokens, places, np.ones_like(places)))

    prompts = [row[:length].tolist() for row, length in zip(tokens, LENGTHS, strict=True)]
    *padded, lengths = right_padded(prompts, max(LENGTHS), pad_id=0)
    cached, cache = apply(models, tuple(padded), init_cache(models, len(LENGTHS), max(LENGTHS) + AFTER))
    error = np.abs((cached - uncached[:, : max(LENGTHS)])[padded[2] != 0]).max()
    for step in range(AFTER):
        at = (lengths + step)[:, None]
        last = np.take_along_axis(tokens, at, axis=1), at.astype(np.int32), np.ones_like(at, np.int32)
        cached, cache = apply(models, last, cache)
        error = max(error, np.abs(cached[:, 0] - np.take_along_axis(uncached, at[..., None], axis=1)[:, 0]).max())
    FLOAT64.check(float(error), f"{framework}: cached logits")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_prompt_in_pieces(models: Pair, framework: str, rng: np.random.Generator) -> None:
    """Pieces of different lengths in each row, one of them empty, with padding on either side: as in one piece."""
    apply, init_cache = FRAMEWORKS[framework]
    tokens = rng.integers(0, models.jax.config.vocab_size, (3, 30), dtype=np.int32)
    places = np.broadcast_to(np.arange(30, dtype=np.int32), tokens.shape)
    uncached, _ = apply(models, (tokens, places, np.ones_like(places)))
    cuts, cache = [[0, 11, 12, 30], [0, 1, 19, 30], [0, 15, 15, 30]], init_cache(models, 3, 60)
    for i in range(3):
        piece = np.zeros((3, 3, 20), np.int32)  # tokens, positions, segments
        spans = [(row, slice(*cuts[row][i : i + 2]), i + row) for row in range(3)]
        for row, span, left in spans:
            at = slice(left % 3, left % 3 + span.stop - span.start)
            piece[:, row, at] = tokens[row, span], places[row, span], np.ones_like(places[row, span])
        logits, cache = apply(models, tuple(piece), cache)
        for row, span, _ in spans:
            FLOAT64.check(np.abs(logits[row][piece[2, row] != 0] - uncached[row, span]).max(initial=0), framework)


def check_same_tokens(models: Pair, sampling: Sampling, rng: np.random.Generator) -> None:
    """64 tokens of rows of different lengths; the random numbers come from the seed and the row."""
    vocab = models.jax.config.vocab_size
    prompts = [rng.integers(0, vocab, length).tolist() for length in (1, 5, 23, 40)]
    options: dict[str, Any] = {"max_new_tokens": 64, "eos_id": 3, "pad_id": 1, "seed": 11}
    ours = jax_generate.generate(models.jax, models.params, prompts, sampling, **options)
    assert torch_generate.generate(models.torch, prompts, sampling, **options) == ours
    options["eos_id"] = None
    ours = jax_generate.generate(models.jax, models.params, prompts, sampling, **options)
    assert torch_generate.generate(models.torch, prompts, sampling, **options) == ours
    assert [len(row) for row in ours] == [64] * 4
    assert sampling == GREEDY or len({token for row in ours for token in row}) > 10


OTHERS = [pytest.param(sampling, marks=pytest.mark.soak) for sampling in (GREEDY, VARIED)]


@pytest.mark.parametrize("sampling", [WARM, *OTHERS], ids=["warm", "greedy", "varied"])
def test_the_same_tokens_in_both(models: Pair, sampling: Sampling, rng: np.random.Generator) -> None:
    """Every model; how a token is drawn from its logits does not depend on the model."""
    check_same_tokens(models, sampling, rng)


@pytest.mark.parametrize("sampling", [GREEDY, VARIED], ids=["greedy", "varied"])
def test_the_same_tokens_of_each_sampling(sampling: Sampling, rng: np.random.Generator) -> None:
    """One model."""
    cfg = model(n_layers=1)
    check_same_tokens(pair(cfg, random_params(cfg, np.random.default_rng(7))), sampling, rng)


@pytest.mark.parametrize("options", [VARIANTS[0], MAMBA["mamba"]], ids=["base", "mamba"])
def test_log_probabilities_of_what_is_drawn(options: dict[str, Any]) -> None:
    """The ids are those of `generate`, and each has the log-probability of a forward pass over the whole row."""
    models = pair(model(**options), random_params(model(**options), np.random.default_rng(7)))
    prompts, length = [[3, 5, 8], [7]], {"max_new_tokens": 6, "eos_id": 4, "seed": 2}
    ours = jax_generate.draws(models.jax, models.params, prompts, 0.7, **length)
    theirs = torch_generate.draws(models.torch, prompts, 0.7, **length)
    wanted = jax_generate.generate(models.jax, models.params, prompts, Sampling(temperature=0.7), **length)
    assert ours.ids == theirs.ids == wanted
    for prompt, ids, *found in zip(prompts, ours.ids, ours.logps, theirs.logps, strict=True):
        tokens = np.array([[*prompt, *ids]], np.int32)
        logits = jax_apply(models, (tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens)))[0][0]
        cold = logits[len(prompt) - 1 : -1] / 0.7
        logps = cold[np.arange(len(ids)), ids] - np.log(np.exp(cold - cold.max(1, keepdims=True)).sum(1)) - cold.max(1)
        for one in found:
            FLOAT64.check(np.abs(one - logps).max(), "log-probabilities of the drawn")


STACKED = {"layer_loop": "scan", "n_layers": jax_generate.MAX_UNROLLED + 1}


@pytest.mark.parametrize("options", [VARIANTS[0], MAMBA["mamba"], STACKED], ids=["base", "mamba", "stacked"])
def test_samples_of_a_prompt_are_rows_of_their_own(options: dict[str, Any]) -> None:
    """The model reads a prompt once; ids and log-probabilities are those of the prompt written so many times."""
    models = pair(model(**options), random_params(model(**options), np.random.default_rng(7)))
    prompts, length = [[3, 5, 8], [7]], {"max_new_tokens": 6, "eos_id": 4, "seed": 2}
    written = [prompt for prompt in prompts for _ in range(3)]
    wanted = jax_generate.draws(models.jax, models.params, written, 0.7, **length)
    ours = jax_generate.draws(models.jax, models.params, prompts, 0.7, samples=3, **length)
    theirs = torch_generate.draws(models.torch, prompts, 0.7, samples=3, **length)
    assert ours.ids == theirs.ids == wanted.ids and len({tuple(ids) for ids in ours.ids}) > 3
    for one in (ours, theirs):
        for found, logps in zip(one.logps, wanted.logps, strict=True):
            FLOAT64.check(np.abs(found - logps).max(), "log-probabilities of samples")


def test_greedy_tokens_without_a_cache(models: Pair) -> None:
    prompt = [5, 9, 2]
    new = torch_generate.generate(models.torch, [prompt, [4] * 11], GREEDY, max_new_tokens=64)[0]
    ids = np.array([prompt + new], np.int32)
    places = np.arange(ids.shape[1], dtype=np.int32)[None]
    for apply, _ in FRAMEWORKS.values():
        logits, _ = apply(models, (ids, places, np.ones_like(places)))
        assert logits[0, len(prompt) - 1 : -1].argmax(axis=-1).tolist() == new


@pytest.mark.parametrize("size", [1, 5, 64])
def test_torch_blocks_are_the_whole(models: Pair, size: int) -> None:
    prompts = [[5, 9, 2], [4] * 11]
    parts = [*torch_generate.blocks(models.torch, prompts, WARM, max_new_tokens=12, size=size)]
    assert [part.shape[1] for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert np.concatenate(parts, axis=1).tolist() == torch_generate.generate(
        models.torch, prompts, WARM, max_new_tokens=12
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A torch_ref folder with random weights."""
    from jaxlm.convert.files.storage import planned, write_folder
    from jaxlm.convert.native import to_torch

    tokenizer = Tokenizer.bytes_level()
    cfg = model(vocab_size=tokenizer.vocab_size)
    numerics = config.Numerics(params="float64", compute="float64")
    settings = dataclasses.replace(config.Config(), model=cfg, numerics=numerics)
    path = tmp_path_factory.mktemp("weights") / "torch"
    values = jax.tree.map(lambda leaf: leaf.astype(np.float64), random_params(cfg, np.random.default_rng(3)))
    files = {"config.toml": toml.to_toml(settings), "tokenizer.json": tokenizer.to_json()}
    write_folder(path, planned(to_torch(values, cfg)), files, layout="torch")
    return path


def test_texts_of_both_backends_and_of_the_command(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, options = load(folder), {"max_new_tokens": 40, "seed": 2, "num_samples": 2, "stop": ["z"]}
    ours = model.generate(["def add", ""], sampling=WARM, **options)
    assert model.generate(["def add", ""], sampling=WARM, backend="torch", **options) == ours
    assert [done.prompt for done in ours] == ["def add", "def add", "", ""]
    assert ours[0].tokens != ours[1].tokens

    flags = ["--max-new-tokens=40", "--seed=2", "--temperature=0.8", "--top-k=50", "--top-p=0.95", "--min-p=0.01"]
    flags += ["--repetition-penalty=1.1", "--presence-penalty=0.3", "--stop=z"]
    assert torch_generate.main([str(folder), "def add", *flags]) == 0
    assert capsys.readouterr().out == f"def add{ours[0].text}\n"


def test_a_file_of_prompts_in_both_backends(folder: Any, tmp_path: Any) -> None:
    from jaxlm.infer.engine import Request

    lines = [{"prompt": "def add"}, {"prompt": "x", "seed": 3, "n": 2}, {"prompt": 5}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = []
    for backend in ("jax", "torch"):
        out, defaults = tmp_path / f"{backend}.jsonl", Request("", sampling=WARM, max_new_tokens=6)
        assert [*load(folder).answer_file(tmp_path / "in.jsonl", out, defaults, rows=2, backend=backend)] == [1, 2, 3]
        found.append([json.loads(line) | {"key": 0} for line in out.read_text().splitlines()])
    assert found[0] == found[1] and "error" in found[0][2]
    options: dict[str, Any] = {"rows": 2, "backend": "torch", "speculate": 5, "draft": load(folder)}
    guessed = tmp_path / "guessed.jsonl"
    assert [*load(folder).answer_file(tmp_path / "in.jsonl", guessed, defaults, **options)] == [1, 2, 3]
    answers = [json.loads(line) for line in guessed.read_text().splitlines()]
    assert [answer.get("ids") for answer in answers] == [answer.get("ids") for answer in found[0]]
    assert answers[0]["usage"]["accepted"] == answers[0]["usage"]["drafted"] > 0


def test_mistakes_of_the_torch_command(folder: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert torch_generate.main([str(tmp_path), "x"]) == 2
    assert torch_generate.main([str(folder), "x", "--top-p=7"]) == 2
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (wrong / name).write_bytes((folder / name).read_bytes())
    text = (folder / "config.toml").read_text()
    (wrong / "config.toml").write_text(text.replace("n_layers = 3", "n_layers = 2"))
    assert torch_generate.main([str(wrong), "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [("config.toml" in lines[0]), ("top_p" in lines[1]), ("layers.2" in lines[2])] == [True] * 3
    assert len(lines) == 3

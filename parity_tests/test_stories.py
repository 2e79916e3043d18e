"""Real weights with a real tokenizer, out of llama2.c's model.bin: one story in jaxlm, torch_ref and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from jaxlm import config
from jaxlm.convert.canonical import leaves
from jaxlm.convert.native import to_torch
from jaxlm.convert.open_model import load
from jaxlm.convert.write_model import convert
from jaxlm.infer import load as use
from jaxlm.text.tokenizer import Tokenizer
from parity_tests.families import our_logits, prompt, strictly, their_logits, torch_folder
from parity_tests.pairs import error, model, random_params
from parity_tests.tolerances import FLOAT64
from tests.data.test_llama2c import LETTERS, stored
from torch_ref.infer.generate import decoder_of

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high."
)
PROMPTS = ["", "Tom and his cat", "  One day,\n", "caf\u00e9 \u65e5\u672c \U0001f642", "<s>Lily"]
NEW = 240


class Converted(NamedTuple):
    """One model.bin and what became of it."""

    source: Path
    run: Path
    torch: Path
    llama: Path
    real: bool


@pytest.fixture(scope="module", params=["stories260K", "made here"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The weights of the stories, which need the data; and random ones."""
    folder, real = tmp_path_factory.mktemp("stories"), request.param == "stories260K"
    if real:
        source = request.getfixturevalue("shared_data") / "llama2c_weights" / "stories260K.bin"
        if not source.is_file():
            pytest.skip(f"no {source}; name the folder of data that has it in JAXLM_DATA")
    else:
        source = _made(folder)
    convert(source, folder / "run", "jaxlm")
    convert(source, folder / "torch", "torch")
    convert(folder / "run", folder / "llama", "llama")
    return Converted(source, *(folder / name for name in ("run", "torch", "llama")), real)


def _made(folder: Path) -> Path:
    """A model of its own in llama2.c's layout: another width, a head of its own, 3 heads on 1, 280 pieces."""
    pieces = [" the", " a", "he", *LETTERS[:15], " ", "\u00e9", "."]
    cfg = model(vocab_size=259 + len(pieces), d_model=48, n_heads=3, n_kv_heads=1, n_layers=2, tie_embeddings=False)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), random_params(cfg, np.random.default_rng(11)))
    (folder / "tokenizer.bin").write_bytes(stored(pieces))
    tokenizer = Tokenizer.from_file(folder / "tokenizer.bin")
    torch_folder(params, cfg, folder / "ours", **{"tokenizer.json": tokenizer.to_json()})
    convert(folder / "ours", folder / "bin", "llama2c")
    return folder / "bin" / "model.bin"


def test_the_same_story_token_for_token(converted: Converted) -> None:
    ours = use.load(converted.run).generate(PROMPTS, max_new_tokens=NEW)
    assert use.load(converted.source).generate(PROMPTS, max_new_tokens=NEW, backend="torch") == ours
    hf, tokenizer = strictly(converted.llama), AutoTokenizer.from_pretrained(converted.llama)
    for text, done in zip(PROMPTS, ours, strict=True):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not text.startswith("<s>"))
        new = NEW if not text else 60
        (theirs,) = hf.generate(**ids, max_new_tokens=new, do_sample=False, pad_token_id=0).tolist()
        begin = ids["input_ids"].shape[1]
        assert theirs[0] == 1 and done.tokens[: len(theirs) - begin] == theirs[begin:]
        if not text:
            assert theirs[begin:] == done.tokens
            assert len(done.tokens) >= 200 or not converted.real
            assert done.text == tokenizer.decode(theirs, skip_special_tokens=True)
            assert done.text.startswith(STORY) or not converted.real


def test_the_text_is_that_of_transformers(converted: Converted) -> None:
    """Prompt and completion together, whatever the ids, and the pieces of the stream."""
    ours, theirs = Tokenizer.from_file(converted.run / "tokenizer.json"), AutoTokenizer.from_pretrained(converted.llama)
    rng = np.random.default_rng(3)
    for text in PROMPTS:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text, allow_special=True)
        ids = [*ours.encode(text), *rng.integers(0, ours.vocab_size, 40).tolist()]
        shown = theirs.decode(ids, skip_special_tokens=True)
        assert "".join(ours.decode_stream(ids, skip_special=True)) == shown


def test_float64_logits_of_512_tokens(converted: Converted) -> None:
    opened = load(converted.run)
    cfg = opened.config.model
    ours = our_logits(cfg, opened.params, "float64")
    FLOAT64.check(error(ours, their_logits(converted.llama, cfg, "float64")), "transformers")
    numerics = config.Numerics(params="float64", compute="float64")
    tensors = {name: np.asarray(x, np.float64) for name, x in to_torch(opened.params, cfg)}
    decoder = decoder_of(config.Config(model=cfg, numerics=numerics), tensors)
    tokens = torch.tensor(prompt(cfg))
    with torch.no_grad():
        logits, _ = decoder(tokens, torch.arange(tokens.shape[1])[None], torch.ones_like(tokens))
    FLOAT64.check(error(ours, logits.numpy()), "torch_ref")


def test_back_to_the_same_bytes(converted: Converted, tmp_path: Path) -> None:
    """Through each of our layouts; Llama's has no place for tables that another machine has rounded otherwise."""
    for source in (converted.run, converted.torch, converted.llama):
        convert(source, tmp_path / source.name, "llama2c")
        written = (tmp_path / source.name / "model.bin").read_bytes()
        original = converted.source.read_bytes()
        if source == converted.llama:
            tables = 4 * 512 * load(source).config.model.head_dim
            end = -tables if load(source).config.model.tie_embeddings else None
            written, original = written[:end], original[:end]
        assert written == original
        tokenizer = "tok512.bin" if converted.real else "tokenizer.bin"
        assert (tmp_path / source.name / "tokenizer.bin").read_bytes() == (
            converted.source.parent / tokenizer
        ).read_bytes()


def test_the_stories_are_likely(shared_data: Path) -> None:
    """Nats a token of real stories, of which 512 equal choices would be 6.2."""
    opened = load(shared_data / "llama2c_weights" / "stories260K.bin")
    assert opened.tokenizer_path is not None
    tokenizer = Tokenizer.from_file(opened.tokenizer_path)
    decoder = decoder_of(opened.config, dict(to_torch(opened.params, opened.config.model)))
    lines = (shared_data / "tinystories" / "stories.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    total, count = 0.0, 0
    for line in lines:
        ids = [1, *tokenizer.encode(json.loads(line)["text"])][:512]
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits, _ = decoder(tokens, torch.arange(len(ids))[None], torch.ones_like(tokens))
        nll = torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:].long(), reduction="sum")
        total, count = total + nll.item(), count + len(ids) - 1
    assert 1.0 < total / count < 1.5, total / count


def test_our_rotation_in_their_layout(tmp_path: Path) -> None:
    """A model with pairs (i, i + H/2) computes the same with the pairs of llama2.c."""
    cfg = model(layer_loop="unroll", n_layers=2)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), random_params(cfg, np.random.default_rng(4)))
    assert len(leaves(cfg)) == 2 + 9 * 2
    convert(torch_folder(params, cfg, tmp_path / "ours"), tmp_path / "bin", "llama2c")
    back = load(tmp_path / "bin")
    assert (cfg.rope_layout, back.config.model.rope_layout) == ("half", "interleaved")
    there = our_logits(back.config.model, back.params, "float64")
    FLOAT64.check(error(our_logits(cfg, params, "float64"), there), "half against interleaved")

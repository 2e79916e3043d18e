"""`jaxlm eval RUN position`: losses through the cache are those of one whole pass, for every variant; and mistakes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert.files.storage import planned, write_folder
from jaxlm.convert.native import to_torch
from jaxlm.convert.open_model import load
from jaxlm.data.pipeline import prepare
from jaxlm.errors import UserError
from jaxlm.eval import perplexity
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.text.tokenizer import Tokenizer

SEQ_LEN, WINDOW, FIRST = 16, 9, 2


def folder(path: Path, **options: Any) -> Path:
    """A model with random weights, its tokenizer, and a corpus of text without meaning."""
    (path / "corpus").mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(12):
        words = ("".join(random.choice(list("abcdef"), 5)) for _ in range(40))
        (path / "corpus" / f"{i}.txt").write_text(" ".join(words))
    tokenizer = Tokenizer.bytes_level()
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": SEQ_LEN, "init_std": 0.3}
    settings = config.Config(
        model=config.Model(vocab_size=tokenizer.vocab_size, **sizes | options),
        data=config.Data(
            source=str(path / "corpus"), cache_dir=str(path / "cache"), seq_len=SEQ_LEN, validation_fraction=0.3
        ),
    )
    params = jax.tree.map(np.asarray, init_params(Decoder(settings.model), jax.random.key(0)))
    files = {"config.toml": toml.to_toml(settings), "tokenizer.json": tokenizer.to_json()}
    write_folder(path / "model", planned(to_torch(params, settings.model)), files, layout="torch")
    return path / "model"


def uncached(path: Path, texts: np.ndarray, **override: int) -> np.ndarray:
    """Mean loss of each target over the texts, in one pass."""
    model = load(path)
    decoder = Decoder(dataclasses.replace(model.config.model, **override))
    tokens, targets = jnp.asarray(texts[:, :-1]), texts[:, 1:]
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits, _ = jax.jit(decoder.apply)({"params": jax.device_put(model.params)}, tokens, places, jnp.ones_like(tokens))
    losses = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=-1)[..., 0]
    return losses.mean(axis=0)


def test_losses_are_those_of_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the training length, in chunks longer than the window that do not divide it."""
    monkeypatch.setattr(perplexity, "CHUNK", 24)
    path = folder(tmp_path)
    report = perplexity.position(path, window=WINDOW, keep_first=FIRST, texts=3, buckets=8)
    assert (report.trained_length, report.length, report.texts) == (SEQ_LEN, 8 * SEQ_LEN, 3)
    tokens = prepare(load(path).config, Tokenizer.from_file(path / "tokenizer.json")).validation.tokens
    starts = np.linspace(0, len(tokens) - report.length - 1, 3).astype(int)
    texts = np.stack([tokens[start : start + report.length + 1] for start in starts]).astype(np.int32)
    names, losses = [], {}
    for variant in report.variants:
        expected = uncached(path, texts, window=variant.window, keep_first=variant.keep_first)
        edges = [(bucket.begin - 1, bucket.end - 1) for bucket in variant.buckets]
        assert edges == [(16 * i, 16 * i + 16) for i in range(8)]
        means = [expected[begin:end].mean() for begin, end in edges]
        np.testing.assert_allclose([bucket.nll for bucket in variant.buckets], means, rtol=2e-5)
        names.append(variant.name)
        losses[variant.name] = means
    assert names == ["as trained", "window 9", "window 9, first 2"]
    assert np.abs(np.diff(list(losses.values()), axis=0)).min(axis=1).max() > 1e-4  # they are three functions
    assert report.variants[1].cache_bytes * 10 < report.variants[0].cache_bytes

    kept = json.loads((path / "eval" / "position.json").read_text())
    assert kept == json.loads(json.dumps(report.to_json()))
    bucket = kept["variants"][2]["buckets"][3]
    assert bucket["perplexity"] == pytest.approx(math.exp(bucket["nll"]))
    assert (path / "eval" / "position.png").stat().st_size > 5000


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    path = folder(tmp_path, window=WINDOW, keep_first=FIRST)
    short, long = (perplexity.position(path, length=n, texts=1).variants for n in (20, 400))
    assert [variant.name for variant in short] == ["as trained"]
    assert short[0].cache_bytes == long[0].cache_bytes


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"length": 10**6}, "held-out tokens are fewer than one text of 1,000,000"),
        ({}, {"length": -1}, "length = -1 must be positive"),
        ({}, {"buckets": 0}, "buckets = 0 must be positive"),
        ({"positions": "learned"}, {}, "length = 128, model.positions = 'learned' end at model.max_seq_len = 16"),
    ],
)
def test_mistakes(tmp_path: Path, options: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        perplexity.position(folder(tmp_path, **options), **arguments)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        perplexity.position(path)

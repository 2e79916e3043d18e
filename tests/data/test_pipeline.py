"""From a config to batches: the same data for any number of processes, and resuming is exact."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxlm import config
from jaxlm.config import toml
from jaxlm.data import pipeline
from jaxlm.data.pipeline import make_train_iterator, make_validation_batches, prepare
from jaxlm.data.rows.inspect import inspect_corpus
from jaxlm.data.sources import Documents
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer

SHARED = Path(os.environ.get("JAXLM_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def settings(tmp_path: Path) -> config.Config:
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(40):
        (root / f"{i:02}.txt").write_text(f"document {i} says: " + "la " * (3 * i) + "\n")
    return make_config(root, tmp_path)


def make_config(source: Path, tmp_path: Path, **tokenizer) -> config.Config:
    data = {"source": str(source), "cache_dir": str(tmp_path / "cache"), "seq_len": 24, "validation_fraction": 0.2}
    return toml.from_dict({"data": data, "tokenizer": {"vocab_size": 300, **tokenizer}})


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return [next(iterator) for _ in range(count)]


def assert_equal(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"tokens", "targets", "positions", "segments", "weights"}
        for name in a:
            assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]), name


@pytest.mark.parametrize("consumed", [0, 1, 7, 60])  # an epoch has fewer than 60 batches
def test_restored_state_continues_bitwise(settings, consumed):
    corpus = prepare(settings)
    first = make_train_iterator(settings.data, corpus, batch_size=4, seed=1)
    take(first, consumed)
    state = json.loads(json.dumps(first.get_state()))
    expected = take(first, 10)
    fresh = make_train_iterator(settings.data, prepare(settings), batch_size=4, seed=1)
    take(fresh, 3)  # what was prefetched before the restore must not appear
    fresh.set_state(state)
    assert_equal(take(fresh, 10), expected)
    first.set_state(state)  # backwards, over epochs that have been forgotten
    assert_equal(take(first, 10), expected)


def test_a_process_makes_only_its_rows(settings):
    corpus = prepare(settings)

    def batches(rows):
        options = {"batch_size": 8, "rows": rows}
        trained = take(make_train_iterator(settings.data, corpus, seed=5, **options), 6)
        return trained + list(make_validation_batches(settings.data, corpus, **options))

    rows = np.array([1, 2, 6])
    expected = [{name: array[rows] for name, array in batch.items()} for batch in batches(None)]
    assert_equal(batches(rows), expected)


def test_validation_holds_each_token_once_in_one_order(settings):
    corpus = prepare(settings)
    batches = list(make_validation_batches(settings.data, corpus, batch_size=8))
    assert all(batch["tokens"].shape == (8, 24) for batch in batches)
    tokens = np.concatenate([batch["tokens"][batch["segments"] > 0] for batch in batches])
    assert sorted(tokens) == sorted(corpus.validation.tokens)
    assert sum(batch["weights"].sum() for batch in batches) == len(tokens) - corpus.validation.documents
    assert_equal(list(make_validation_batches(settings.data, corpus, batch_size=8)), batches)
    assert_equal(list(make_validation_batches(settings.data, corpus, batch_size=8, max_batches=2)), batches[:2])


def test_no_validation_makes_no_batches(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    settings = toml.from_dict(
        {
            "data": {"source": str(tmp_path / "a.txt"), "validation_fraction": 0.0, "cache_dir": str(tmp_path / "c")},
            "tokenizer": {"kind": "bytes"},
        }
    )
    corpus = prepare(settings)
    assert list(make_validation_batches(settings.data, corpus, batch_size=2)) == []
    assert math.isnan(corpus.unigram_entropy)
    batch = next(make_train_iterator(settings.data, corpus, batch_size=2, seed=0))
    assert batch["weights"].sum() == 8, "each row is the text and its end"


def test_second_start_reads_nothing_again(settings, monkeypatch):
    first = prepare(settings)
    monkeypatch.setattr(Documents, "__iter__", lambda self: pytest.fail("the corpus was read again"))
    again = prepare(settings)
    assert (first.reused, again.reused) == (False, True)
    assert again.fingerprint == first.fingerprint
    assert again.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    assert again.statistics == first.statistics
    assert prepare(settings, tokenizer=first.tokenizer).reused, "a resumed run with its own tokenizer finds the shards"


def test_damaged_cached_tokenizer_is_trained_again(settings):
    first = prepare(settings).tokenizer.fingerprint()
    [path] = Path(settings.data.cache_dir).glob("tokenizer-*.json")
    path.write_text("{")
    assert prepare(settings).tokenizer.fingerprint() == first
    assert Tokenizer.from_file(path).fingerprint() == first


def test_tokenizer_is_trained_on_training_documents_only(settings):
    corpus = prepare(settings)
    texts = [document.text for side, document in Documents(settings.data) if side == "train"]
    assert pipeline._sample(Documents(settings.data), 10**6) == texts
    assert corpus.tokenizer.fingerprint() == Tokenizer.train(texts, 300).fingerprint()


def test_sample_is_spread_evenly(tmp_path):
    lines = [f"{i:07}\n" for i in range(100_000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    data = config.Data(source=str(tmp_path / "a.txt"), validation_fraction=0.0)
    sample = pipeline._sample(Documents(data), 100_000)
    starts = np.array([int(piece[:7]) for piece in sample])
    assert 80_000 <= sum(map(len, sample)) <= 110_000
    assert np.all(np.diff(starts) > 0) and starts[0] < 10_000 and starts[-1] > 85_000
    assert np.diff(starts).max() < 3 * np.diff(starts).min()


def test_kinds_of_tokenizer(settings, tmp_path):
    prepare(settings).tokenizer.save(tmp_path / "tokenizer.json")
    root = Path(settings.data.source)
    assert prepare(make_config(root, tmp_path, kind="bytes", specials=False)).tokenizer.vocab_size == 256
    loaded = prepare(make_config(root, tmp_path, kind="file", path=str(tmp_path / "tokenizer.json")))
    assert loaded.reused and loaded.tokenizer.vocab_size == 300
    with pytest.raises(UserError, match=r"needs tokenizer\.path"):
        prepare(make_config(root, tmp_path, kind="file"))


def test_tokenizer_must_fit_the_model(settings, tmp_path):
    tree = toml.to_dict(settings)
    tree["model"]["vocab_size"] = 299
    with pytest.raises(UserError, match=r"300 ids, the model only model\.vocab_size = 299"):
        prepare(toml.from_dict(tree))


def test_skipped_files_are_reported_once(settings, capsys):
    Path(settings.data.source, "image.bin").write_bytes(b"\0\1")
    assert prepare(settings).skipped == prepare(settings).skipped == {"image.bin": "is binary, not text"}
    assert capsys.readouterr().err.count("1 skipped, e.g. image.bin is binary") == 1


def test_report_shows_figures_and_a_row(settings):
    console = Console(record=True, width=120)
    console.print(inspect_corpus(settings))
    shown = console.export_text()
    assert "unigram baseline" in shown and "rows of 24 tokens" in shown and "la la" in shown


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("tinyshakespeare/input.txt", "text"),
        ("tinystories/stories.jsonl", "text"),
        ("hh_rlhf/train.jsonl.gz", "chosen"),
    ],
)
def test_real_corpora(path, key, tmp_path):
    if not (SHARED / path).is_file():
        pytest.skip(f"{path} is not in JAXLM_DATA")
    data = {"source": str(SHARED / path), "text_key": key, "max_bytes": 300_000, "cache_dir": str(tmp_path)}
    corpus = prepare(toml.from_dict({"data": data, "tokenizer": {"vocab_size": 1000}}))
    train, validation = corpus.statistics["train"], corpus.statistics["validation"]
    assert train.text_bytes + validation.text_bytes == 300_000
    assert 0.01 < validation.text_bytes / 300_000 < 0.12
    assert train.bytes_per_token > 2.5
    assert 4 < corpus.unigram_entropy < math.log(1000)

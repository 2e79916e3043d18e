"""Tokenised once, reused, rebuilt when the corpus or the files on disk changed, and never half written."""

import errno
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase

from jaxlm.config import Data, toml
from jaxlm.data import shards as module
from jaxlm.data.pipeline import prepare
from jaxlm.data.rows.copies import copies
from jaxlm.data.shards import Shards, open_shards
from jaxlm.data.sources import Documents
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
COPIES = (
    "5 of 5 validation documents, 100% of their tokens, are training documents to the letter: a loss on them shows "
    "memory; take them out, or name another data.validation_source"
)
LOSSY = (
    "the tokenizer does not give back 69 of 69 texts as they were: bits/byte divide the loss on what the ids hold by "
    "the bytes of the whole text"
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(60):
        (root / f"{i:02}.txt").write_text(f"document {i}: " + "é" * (7 * i) + "\n")
    return root


def build(corpus: Path, cache: Path, *, workers: int = 2, tokenizer: Tokenizer | None = None, **options) -> Shards:
    documents = Documents(Data(source=str(corpus), validation_fraction=0.2, **options))
    return open_shards(documents, tokenizer or Tokenizer.bytes_level(), cache, workers)


def test_shards_hold_the_documents_in_order(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARS", 50)
    tokenizer = Tokenizer.bytes_level()
    shards = build(corpus, tmp_path / "cache")
    documents = list(Documents(Data(source=str(corpus), validation_fraction=0.2)))
    for side in ("train", "validation"):
        shard = getattr(shards, side)
        texts = [d.text for s, d in documents if s == side]
        bounds = zip(shard.offsets[:-1], shard.offsets[1:], strict=True)
        stored = [shard.tokens[a:b].tolist() for a, b in bounds]
        assert [tokenizer.decode(ids[:-1]) for ids in stored] == texts
        assert all(ids[-1] == tokenizer.eot for ids in stored)
        assert shard.text_bytes == sum(len(text.encode()) for text in texts)
        assert shard.tokens.dtype == np.uint16 and shard.documents == len(texts)


def test_second_start_reuses_without_reading(corpus, tmp_path, monkeypatch):
    first = build(corpus, tmp_path / "cache")
    monkeypatch.setattr(Documents, "__iter__", lambda self: pytest.fail("the corpus was read again"))
    second = build(corpus, tmp_path / "cache")
    assert (first.reused, second.reused) == (False, True)
    assert second.fingerprint == first.fingerprint
    assert isinstance(second.train.tokens, np.memmap)


def test_fingerprint_is_of_the_content_and_not_of_the_place(corpus, tmp_path):
    first = build(corpus, tmp_path / "a", workers=1)
    copy = shutil.copytree(corpus, tmp_path / "copy")
    assert build(copy, tmp_path / "b", workers=3).fingerprint == first.fingerprint
    (copy / "07.txt").write_text("changed")
    assert build(copy, tmp_path / "b").fingerprint != first.fingerprint


def test_another_tokenizer_or_corpus_is_another_folder(corpus, tmp_path):
    cache = tmp_path / "cache"
    folders = {build(corpus, cache).folder}
    folders.add(build(corpus, cache, tokenizer=Tokenizer.bytes_level(specials=False)).folder)
    folders.add(build(corpus, cache, max_bytes=500).folder)
    (corpus / "00.txt").write_text("new")
    folders.add(build(corpus, cache).folder)
    assert len(folders) == 4


@pytest.mark.parametrize("name", ["train/tokens.bin", "validation/offsets.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["truncate", "lengthen", "delete"])
def test_damage_is_noticed_and_mended(corpus, tmp_path, name, damage):
    first = build(corpus, tmp_path / "cache")
    path = first.folder / name
    if damage == "delete":
        path.unlink()
    elif damage == "lengthen":
        path.write_bytes(path.read_bytes() + b"\0\0")
    else:
        os.truncate(path, path.stat().st_size - 3)
    again = build(corpus, tmp_path / "cache")
    assert not again.reused and again.fingerprint == first.fingerprint
    assert build(corpus, tmp_path / "cache").reused


def test_offsets_of_the_right_size_but_wrong_are_noticed(corpus, tmp_path):
    first = build(corpus, tmp_path / "cache")
    path = first.folder / "train" / "offsets.npy"
    offsets = np.load(path)
    offsets[3] = offsets[-1] + 5
    np.save(path, offsets)
    assert not build(corpus, tmp_path / "cache").reused


def test_another_format_is_rebuilt(corpus, tmp_path):
    meta_path = build(corpus, tmp_path / "cache").folder / "meta.json"
    meta_path.write_text(json.dumps(json.loads(meta_path.read_text()) | {"format": 0}))
    assert not build(corpus, tmp_path / "cache").reused


@pytest.mark.parametrize("after", [0, 5])
def test_full_disk_is_one_line_and_leaves_nothing(corpus, tmp_path, monkeypatch, after):
    cache, calls = tmp_path / "cache", []
    real = module._Writer.add

    def add(self, *arguments):
        calls.append(1)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, *arguments)

    monkeypatch.setattr(module._Writer, "add", add)
    with pytest.raises(UserError, match="the disk is full") as caught:
        build(corpus, cache)
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    monkeypatch.undo()
    assert not build(corpus, cache).reused


def test_cache_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write here"):
        build(corpus, tmp_path / "file")


def test_remains_of_a_killed_process_do_no_harm(corpus, tmp_path):
    first = build(corpus, tmp_path / "cache")
    first.folder.rename(first.folder.with_suffix(".tmp"))
    (first.folder.with_suffix(".tmp") / "train" / "tokens.bin").write_bytes(b"half")
    assert build(corpus, tmp_path / "cache").fingerprint == first.fingerprint
    assert not first.folder.with_suffix(".tmp").exists()


def _prepare(corpus: Path, cache: Path, barrier, results) -> None:
    quick = module._build

    def slow(*arguments):
        time.sleep(0.5)  # long enough for the other process to find no shards either
        quick(*arguments)

    module._build = slow
    barrier.wait(timeout=120)
    shards = build(corpus, cache)
    results.put((shards.reused, shards.fingerprint))


def test_two_processes_at_once_both_end_well(corpus, tmp_path):
    context = multiprocessing.get_context("spawn")
    results, barrier = context.Queue(), context.Barrier(2)
    arguments = (corpus, tmp_path / "cache", barrier, results)
    processes = [context.Process(target=_prepare, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len({fingerprint for _, fingerprint in outcomes}) == 1
    assert sorted(reused for reused, _ in outcomes) == [False, True], "one builds, the other waits and reuses"


def test_entropy_is_the_smoothed_cross_entropy(tmp_path):
    (tmp_path / "train.txt").write_text("aaab")
    (tmp_path / "v.txt").write_text("ab")
    data = Data(source=str(tmp_path / "train.txt"), validation_source=str(tmp_path / "v.txt"))
    shards = open_shards(Documents(data), Tokenizer.bytes_level(specials=False), tmp_path / "cache")
    assert shards.unigram_entropy == pytest.approx(-(np.log(4 / 260) + np.log(2 / 260)) / 2, rel=1e-12)


def test_no_validation_is_allowed(corpus, tmp_path):
    documents = Documents(Data(source=str(corpus), validation_fraction=0.0))
    shards = open_shards(documents, Tokenizer.bytes_level(), tmp_path / "cache")
    assert shards.validation.documents == 0 and len(shards.validation.tokens) == 0
    assert np.isnan(shards.unigram_entropy)


def test_large_vocabulary_needs_uint32(tmp_path):
    inner = Tokenizer.bytes_level(specials=False)._inner
    inner.add_tokens([f"<{i}>" for i in range(70_000)])
    (tmp_path / "a.txt").write_text("text 日本 é")
    data = Data(source=str(tmp_path / "a.txt"), validation_fraction=0.0)
    shards = open_shards(Documents(data), Tokenizer(inner), tmp_path / "cache")
    assert shards.train.tokens.dtype == np.uint32
    assert bytes(shards.train.tokens.tolist()).decode() == "text 日本 é"


def test_copies_on_both_sides_are_counted(corpus, tmp_path):
    shards = build(corpus, tmp_path / "cache")
    assert copies([shards.train], shards.validation) == (0, 0)
    options = Data(source=str(corpus), validation_fraction=0.2)
    held_out = [document for side, document in Documents(options) if side != "train"]
    for number, document in enumerate(held_out[:2]):
        (corpus / f"copy {number}").mkdir()
        for name in range(8):  # a hash of the name chooses the side of a file: some are trained on
            (corpus / f"copy {number}" / f"{name}.txt").write_text(document.text)
    shards = build(corpus, tmp_path / "cache")
    sides = list(Documents(options))
    trained = {document.text for side, document in sides if side == "train"}
    sizes = [(len(document.text.encode()) + 1, document.text in trained) for side, document in sides if side != "train"]
    copied = [size for size, known in sizes if known]
    expected = len(copied), sum(copied) / sum(size for size, _ in sizes)
    assert len(copied) > 2 and copies([shards.train], shards.validation) == expected
    assert list((shards.train.folder / "plans").glob("digests.npy")), "kept beside the shard"
    assert copies([shards.train], shards.validation) == expected, "as they were kept, too"


def test_copies_in_another_corpus_of_a_mixture_are_counted(corpus, tmp_path, caplog):
    (tmp_path / "other").mkdir()
    held_out = [d for side, d in Documents(Data(source=str(corpus), validation_fraction=0.2)) if side != "train"]
    for number, document in enumerate([*held_out, *held_out]):
        (tmp_path / "other" / f"{number}.txt").write_text(document.text)
    parts = [f'{{name="{name}", source="{tmp_path / name}", weight=1.0}}' for name in ("corpus", "other")]
    options = [
        f"data.mixture=[{', '.join(parts)}]",
        f'data.cache_dir="{tmp_path / "c"}"',
        "data.validation_fraction=0.2",
    ]
    prepare(toml.load(QUICKSTART, [*options, "tokenizer.kind=bytes", "model.vocab_size=0"]))
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith(f"warning: {tmp_path / 'corpus'}: ") and "to the letter" in line for line in lines), (
        lines
    )


def test_one_line_when_validation_lies_in_the_training_folder_or_the_tokenizer_loses_text(corpus, tmp_path, caplog):
    (tmp_path / "link").symlink_to(corpus / "sub", target_is_directory=True)
    (corpus / "sub").mkdir()
    for i in range(5):
        (corpus / "sub" / f"{i}.txt").write_text(f"Held out {i}")
    words = BPE(vocab={letter: i for i, letter in enumerate(map(chr, range(32, 127)))}, merges=[])
    inner = tokenizers.Tokenizer(words)
    inner.normalizer = Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    inner.save(str(tmp_path / "tokenizer.json"))
    for source in (corpus / "sub", tmp_path / "link"):
        data = [f'data.source="{corpus}"', f'data.validation_source="{source}"', f'data.cache_dir="{tmp_path / "c"}"']
        lossy = ["tokenizer.kind=file", f'tokenizer.path="{tmp_path / "tokenizer.json"}"']
        for options, expected in (([], [COPIES]), (lossy, [COPIES, LOSSY])):
            caplog.clear()
            prepare(toml.load(QUICKSTART, [*data, *options, "tokenizer.specials=true", "model.vocab_size=0"]))
            lines = [record.getMessage() for record in caplog.records if "no end-of-text" not in record.getMessage()]
            assert lines == [f"warning: {corpus}: {line}" for line in expected]

"""Fill-in-the-middle: pieces give back their text, marks stand in order, parts are encoded as a prompt is."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import toml
from jaxlm.data.fim import SLACK, FillIn, Marks, by_characters, by_lines, parts, prompt
from jaxlm.data.packing.stream import PackedRows
from jaxlm.data.packing.whole_documents import BestFitRows
from jaxlm.data.pipeline import prepare
from jaxlm.data.rows.build import source_rows
from jaxlm.data.rows.compose import FilledRows
from jaxlm.data.rows.local_encoding import PartsOfText, splits_before_words
from jaxlm.data.shards import Shard
from jaxlm.text.tokenizer import Tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n    def __init__(self, x):\n        self.x = x\n" * 3,
    "Größe   naïve\n\n\t\tcafé \u2013 “quoted” 日本語の文 \U0001f600 end\r\n  x = 12345 * 67\n" * 2,
    "the spelling <|fim_prefix|> of a mark and <|endoftext|> stays text, always\n" * 2,
    "a" * 50 + "\n" * 20 + " " * 30 + "b",
    "{'k': [1, 2, 3], \"it's\": \"don't\"}\n" * 5,
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train(TEXTS, 420)


def marks_of(tokenizer: Tokenizer) -> Marks:
    """The tokenizer's own marks, or ids behind its vocabulary."""
    names = ("fim_prefix", "fim_suffix", "fim_middle", "eot")
    return Marks(*(tokenizer.specials.get(name, tokenizer.vocab_size + i) for i, name in enumerate(names)))


def text_back(tokenizer: Tokenizer, filler: FillIn, filled) -> str:
    """The text in its order; each part is decoded alone, as it was encoded."""
    before, middle, after = parts(filled.tokens, filler.marks)
    if filled.spm:
        answer = filled.tokens[filled.answer : -1].tolist()
        assert not before
        before, middle = middle[: len(middle) - len(answer)], answer
    if tokenizer.is_byte_level:
        return b"".join(tokenizer.token_bytes(i) for i in [*before, *middle, *after]).decode(errors="surrogateescape")
    return "".join(tokenizer.decode(ids) for ids in (before, middle, after))


@settings(max_examples=60)
@given(
    st.sampled_from(TEXTS) | st.text(st.characters(codec="utf-8"), min_size=1, max_size=80),
    st.integers(0, 10**6),
    st.sampled_from([by_characters, by_lines]),
)
def test_a_piece_gives_back_its_text_exactly(bpe, text, seed, spans):
    filler = FillIn(bpe, marks_of(bpe), least=1)
    ids = np.array(bpe.encode(text))
    filled = filler.fill_in(ids, np.random.default_rng(seed), spans, 10**6)
    if filled is None:
        assert text.isspace() or len(text) < 3 or spans is by_lines
        return
    assert text_back(bpe, filler, filled) == text
    first, last = filled.span
    assert bpe.decode(filled.tokens[filled.answer : -1].tolist()) == text[first:last] != ""
    assert filled.tokens[-1] == bpe.eot and (filled.tokens == bpe.eot).sum() == 1
    again = filler.fill_in(ids, np.random.default_rng(seed), spans, 10**6)
    assert again is not None and np.array_equal(again.tokens, filled.tokens)


@settings(max_examples=60)
@given(st.sampled_from(TEXTS), st.integers(0, 10**6))
def test_training_and_inference_encode_alike(bpe, text, seed):
    filler = FillIn(bpe, marks_of(bpe))
    filled = filler.fill_in(np.array(bpe.encode(text)), np.random.default_rng(seed), by_characters, 10**6)
    assert filled is not None
    first, last = filled.span
    asked = prompt(bpe, marks_of(bpe), text[:first], text[last:], spm=filled.spm)
    assert filled.tokens[: filled.answer].tolist() == asked
    assert filled.tokens[filled.answer : -1].tolist() == bpe.encode(text[first:last])


def test_psm_and_spm_by_hand():
    tokenizer = Tokenizer.bytes_level()
    marks = marks_of(tokenizer)
    a, b, c = (ord(letter) for letter in "abc")
    assert prompt(tokenizer, marks, "a", "c") == [marks.prefix, a, marks.suffix, c, marks.middle]
    assert prompt(tokenizer, marks, "a", "c", spm=True) == [marks.prefix, marks.suffix, c, marks.middle, a]
    seen = {}
    filler = FillIn(tokenizer, marks, least=1)
    for seed in range(60):
        filled = filler.fill_in(np.array([a, b, c]), np.random.default_rng(seed), by_characters, 99)
        if filled and filled.span == (1, 2):
            seen[filled.spm] = filled.tokens.tolist()
    assert seen[False] == [marks.prefix, a, marks.suffix, c, marks.middle, b, marks.end]
    assert seen[True] == [marks.prefix, marks.suffix, c, marks.middle, a, b, marks.end]


def test_halves_of_characters_at_the_ends_stay_where_they_are():
    tokenizer = Tokenizer.bytes_level()
    text = "日本語 and some more text 日本語"
    ids = np.array(tokenizer.encode(text))[1:-2]
    filler = FillIn(tokenizer, marks_of(tokenizer))
    for seed in range(20):
        filled = filler.fill_in(ids, np.random.default_rng(seed), by_characters, 999)
        assert filled is not None
        before, middle, after = parts(filled.tokens, filler.marks)
        if filled.spm:
            answer = filled.tokens[filled.answer : -1].tolist()
            before, middle = middle[: len(middle) - len(answer)], answer
        assert [*before, *middle, *after] == ids.tolist()


@pytest.mark.parametrize("text", ["a", "  \n \n\t  \n            ", "\u0301", ""])
def test_what_has_nothing_to_choose_is_left_alone(bpe, text):
    filler = FillIn(bpe, marks_of(bpe))
    ids = np.array(bpe.encode(text), np.int64)
    assert filler.fill_in(ids, np.random.default_rng(0), by_characters, 999) is None


def test_no_room_is_no_transformation():
    tokenizer = Tokenizer.bytes_level()
    ids = np.array(tokenizer.encode("twenty characters ok"))
    filler = FillIn(tokenizer, marks_of(tokenizer))
    assert filler.fill_in(ids, np.random.default_rng(0), by_characters, len(ids) + 3) is None
    filled = filler.fill_in(ids, np.random.default_rng(0), by_characters, len(ids) + 4)
    assert filled is not None and len(filled.tokens) == len(ids) + 4


@settings(max_examples=100)
@given(
    st.lists(
        st.sampled_from([*" \n\ta1'_", "  ", "\n\n", "don't ", " foo", "é", "日本", "=="]), min_size=2, max_size=30
    ),
    st.data(),
)
def test_parts_are_encoded_as_alone(bpe, pieces, data):
    """Only the words around the cuts are encoded again, and nobody can tell."""
    text = "".join(pieces)
    assert splits_before_words(bpe)
    first, last = sorted((data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(text)))))
    sizes = np.array([len(bpe.token_bytes(i)) for i in range(bpe.vocab_size)])
    encoded = PartsOfText(np.array(bpe.encode(text)), text, sizes, bpe)
    for begin, end in ((0, first), (first, last), (last, len(text))):
        assert encoded.part(begin, end) == bpe.encode(text[begin:end])


def test_an_unknown_rule_of_words_is_not_trusted(bpe):
    changed = bpe.to_json().replace(r"\\p{N}{1,3}", r"\\p{N}{1,4}")

    assert changed != bpe.to_json()
    assert not splits_before_words(Tokenizer(tokenizers.Tokenizer.from_str(changed)))


def shard_of(tokenizer: Tokenizer, texts: list[str]) -> Shard:
    documents = [[*tokenizer.encode(text), tokenizer.eot] for text in texts]
    return Shard(np.concatenate([np.array(d, np.uint16) for d in documents]), np.cumsum([0, *map(len, documents)]), 0)


@pytest.mark.parametrize("pack", [PackedRows, BestFitRows])
@pytest.mark.parametrize("seq_len", [64, 200])
def test_rows_lose_nothing_and_never_cross_documents(bpe, pack, seq_len):
    shard = shard_of(bpe, [text * (1 + i % 4) for i, text in enumerate(TEXTS * 6)])
    packed = pack(shard, seq_len, seed=1, pad=bpe.pad, draw=0.5, slack=SLACK)
    filler = FillIn(bpe, marks_of(bpe))
    rows = FilledRows(packed, filler, lambda _: by_characters, seed=1)
    taken = np.zeros(len(shard.tokens), int)

    def document(place: int) -> int:
        return int(np.searchsorted(shard.offsets, place, "right"))

    drawn = done = 0
    for index in range(rows.rows_per_epoch):
        made, pieces = rows.made(index), packed.pieces(index)
        assert sum(len(piece.tokens) for piece in made) <= seq_len
        for piece, begin, end, stop in zip(made, pieces.begins, pieces.ends, pieces.stops, strict=True):
            taken[begin:end] += 1
            assert end <= stop and document(begin) == document(end - 1)
            ids = shard.tokens[begin:end].astype(np.int64)
            if piece.filled:
                whole = b"".join(bpe.token_bytes(i) for i in (ids[:-1] if end == stop else ids).tolist())
                assert text_back(bpe, filler, piece.filled[0]).encode("utf-8", "surrogateescape") == whole
                assert piece.after == -1 and piece.tokens[-1] == bpe.eot
            else:
                assert np.array_equal(piece.tokens, ids)
        drawn += int(pieces.drawn.sum())
        done += sum(bool(piece.filled) for piece in made)
    assert np.all(taken == 1), "no token is missing or comes twice"
    assert done >= 0.95 * drawn > 0, "a drawn piece finds room"
    batch = rows[np.arange(rows.rows_per_epoch)]
    assert batch.weights.sum() > 0 and np.all(batch.targets[batch.weights == 0] == bpe.pad)


def test_loss_on_middles_only(bpe):
    shard = shard_of(bpe, TEXTS * 4)
    packed = BestFitRows(shard, 128, seed=1, pad=bpe.pad, draw=0.5, slack=SLACK)
    rows = FilledRows(packed, FillIn(bpe, marks_of(bpe)), lambda _: by_characters, seed=1, middles_only=True)
    for index in range(rows.rows_per_epoch):
        batch = rows[np.array([index])]
        wanted = [
            id for piece in rows.made(index) if piece.filled for id in piece.tokens[piece.filled[0].answer :].tolist()
        ]
        assert batch.targets[batch.weights > 0].tolist() == wanted


def test_what_is_cut_depends_on_the_row_and_not_on_who_asks_first(bpe):
    shard = shard_of(bpe, TEXTS * 8)

    def rows() -> FilledRows:
        packed = PackedRows(shard, 96, seed=4, draw=0.5, slack=SLACK)
        return FilledRows(packed, FillIn(bpe, marks_of(bpe)), lambda _: by_characters, seed=4)

    forwards = [rows()[np.array([i])].tokens for i in range(12)]
    other = rows()
    backwards = [other[np.array([i])].tokens for i in reversed(range(12))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    epoch = other.rows_per_epoch
    assert not np.array_equal(other[np.arange(12)].tokens, other[np.arange(12) + epoch].tokens)


@pytest.mark.parametrize(
    "fault", ["marks out of order", "middle cut off", "no end of text", "what was looked ahead at stays"]
)
def test_planted_faults_are_seen(bpe, fault, monkeypatch):
    filler = FillIn(bpe, marks_of(bpe))
    text = TEXTS[0]
    filled = filler.fill_in(np.array(bpe.encode(text)), np.random.default_rng(2), by_characters, 10**6)
    assert filled is not None
    if fault == "what was looked ahead at stays":
        monkeypatch.setattr(PartsOfText, "_without_end", lambda self, ids, size: ids)
        sizes = np.array([len(bpe.token_bytes(i)) for i in range(bpe.vocab_size)])
        encoded = PartsOfText(np.array(bpe.encode(text)), text, sizes, bpe)
        assert any(encoded.part(at, len(text)) != bpe.encode(text[at:]) for at in range(1, len(text)))
        return
    ids = filled.tokens.tolist()
    if fault == "marks out of order":
        hole, after = ids.index(filler.marks.suffix), ids.index(filler.marks.middle)
        ids[hole], ids[after] = ids[after], ids[hole]
    if fault == "middle cut off":
        ids = ids[:-2] + ids[-1:]
        broken = filled._replace(tokens=np.array(ids))
        assert text_back(bpe, filler, broken) != text
        return
    if fault == "no end of text":
        ids = ids[:-1]
    with pytest.raises(ValueError, match=r"not a piece|not in order"):
        parts(ids, filler.marks)


def others(data: Path, tmp_path: Path) -> dict[str, Tokenizer]:
    unpacked = tmp_path / "deepseek.json"
    unpacked.write_bytes(gzip.decompress((data / "tokenizers/deepseek_r1/tokenizer.json.gz").read_bytes()))
    return {
        "gpt2": Tokenizer.from_file(data / "tokenizers/gpt2/tokenizer.json"),
        "deepseek_r1": Tokenizer.from_file(unpacked),
        "tok512": Tokenizer.from_file(data / "llama2c_weights/tok512.bin"),
    }


def test_tokenizers_of_others_give_back_the_text(shared_data, tmp_path):
    """A vocabulary without marks gets ids behind its own; SentencePiece puts a blank before each part."""
    for name, tokenizer in others(shared_data, tmp_path).items():
        filler = FillIn(tokenizer, marks_of(tokenizer)._replace(end=tokenizer.special("eot")))
        assert splits_before_words(tokenizer) == (name != "tok512")
        for text in TEXTS:
            ids = np.array(tokenizer.encode(text))
            for seed in range(3):
                filled = filler.fill_in(ids, np.random.default_rng(seed), by_characters, 10**6)
                assert filled is not None and text_back(tokenizer, filler, filled) == text, name
                first, last = filled.span
                asked = prompt(tokenizer, filler.marks, text[:first], text[last:], spm=filled.spm)
                assert filled.tokens[: filled.answer].tolist() == asked, name


EVERYTHING = [
    pytest.param(name, span, seq_len, packing, marks=pytest.mark.soak, id=f"{name}-{span}-{seq_len}-{packing}")
    for name in ("ours", "gpt2", "deepseek_r1", "tok512")
    for span in ("characters", "lines", "syntax")
    for seq_len, packing in ((64, "best_fit"), (256, "stream"), (2048, "best_fit"), (2048, "stream"))
]


@pytest.mark.parametrize(("name", "span", "seq_len", "packing"), [("small", "characters", 96, "best_fit"), *EVERYTHING])
@pytest.mark.timeout(3600)
def test_every_piece_of_a_corpus_gives_back_its_text(name, span, seq_len, packing, request, tmp_path):
    """One epoch of the whole standard library: texts, tokens, marks and shares, through the rows of a run."""
    tokenizer: dict = {"vocab_size": 2048}
    if name not in ("small", "ours"):
        data = request.getfixturevalue("shared_data")
        files = {"gpt2": "tokenizers/gpt2/tokenizer.json", "tok512": "llama2c_weights/tok512.bin"}
        path = data / files[name] if name in files else tmp_path / "deepseek.json"
        if name == "deepseek_r1":
            path.write_bytes(gzip.decompress((data / "tokenizers/deepseek_r1/tokenizer.json.gz").read_bytes()))
        tokenizer = {"kind": "file", "path": str(path), "fim_marks": True}
    source = str(Path(json.__file__).parent) if name == "small" else "stdlib"
    tree = {"source": source, "cache_dir": str(tmp_path / "cache"), "seq_len": seq_len, "packing": packing}
    cfg = toml.from_dict({"data": {**tree, "fim": {"rate": 0.5, "span": span}}, "tokenizer": tokenizer})
    corpus = prepare(cfg)
    counts = look_at_epoch(source_rows(cfg.data, corpus.train, corpus.tokenizer, 3), corpus.tokenizer)
    print(name, span, seq_len, packing, counts)
    roomy, drawn = counts["roomy"], counts["drawn"]
    assert abs(drawn - 0.5 * roomy) <= 3 * np.sqrt(0.25 * roomy), "the share is the rate"
    assert counts["transformed"] >= {"characters": 0.98, "lines": 0.7, "syntax": 0.7}[span] * drawn
    assert counts["transformed"] * 0.5 == pytest.approx(counts["spm"], abs=3 * np.sqrt(0.25 * counts["transformed"]))


def look_at_epoch(rows: FilledRows, tokenizer: Tokenizer) -> dict[str, int]:
    """Check every piece of epoch 0, and count them."""
    filler, shard = rows._fill_in, rows.shard
    spelled = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)] if tokenizer.is_byte_level else None
    taken = np.zeros(len(shard.tokens), int)
    counts = dict.fromkeys(("pieces", "roomy", "drawn", "transformed", "spm"), 0)
    for index in range(rows.rows_per_epoch):
        made, pieces = rows.made(index), rows.pieces(index)
        assert sum(len(piece.tokens) for piece in made) <= rows.seq_len
        for piece, begin, end, stop, drawn in zip(made, *pieces, strict=True):
            taken[begin:end] += 1
            document = shard.document_at(int(begin))
            assert int(shard.offsets[document + 1]) == stop, "a piece lies in one document"
            counts["pieces"] += 1
            counts["roomy"] += end - begin + SLACK <= rows.seq_len
            counts["drawn"] += bool(drawn)
            ids = np.asarray(shard.tokens[begin:end], np.int64)
            if not piece.filled:
                assert np.array_equal(piece.tokens, ids)
                continue
            counts["transformed"] += 1
            counts["spm"] += piece.filled[0].spm
            first = int(len(ids) > 0 and ids[0] == tokenizer.bos)
            body = ids[first : len(ids) - (end == stop and ids[-1] == filler.marks.end)]
            back = text_back(tokenizer, filler, piece.filled[0])
            if spelled is None:
                assert back == filler.text(body, starts=int(shard.offsets[document]) == int(begin))
            else:
                assert back.encode("utf-8", "surrogateescape") == b"".join(spelled[i] for i in body.tolist())
    assert np.all(taken == 1), "no token is missing or comes twice"
    return {name: int(count) for name, count in counts.items()}

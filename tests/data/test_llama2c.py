"""llama2.c's vocabulary cuts texts as llama2.c does, and comes back byte for byte."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.text import tokenizer_bin
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.text.tokenizer_bin import SPACE

FIXED = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
LETTERS = "".join(chr(code) for code in range(97, 123))


def packed(pieces: Sequence[bytes], scores: Sequence[float]) -> bytes:
    entries = (struct.pack("<fi", score, len(one)) + one for one, score in zip(pieces, scores, strict=True))
    return struct.pack("<i", max(map(len, pieces))) + b"".join(entries)


def stored(ordinary: Sequence[str]) -> bytes:
    """A vocabulary with these ordinary pieces, best first."""
    pieces = [*FIXED, *(piece.encode() for piece in ordinary)]
    return packed(pieces, [0.0] * len(FIXED) + [-float(i) for i in range(len(ordinary))])


def reference(content: bytes, text: str) -> list[int]:
    """`encode` of llama2.c's run.c, after Karpathy; what SentencePiece's BPE does."""
    vocabulary, scores, at = [], [], 4
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        vocabulary.append(content[at + 8 : at + 8 + length])
        scores.append(score)
        at += 8 + length
    number = {piece: i for i, piece in enumerate(vocabulary)}
    ids = [number[b" "]] if text else []
    for character in text:
        piece = character.encode()
        ids += [number[piece]] if piece in number else [byte + 3 for byte in piece]
    while True:
        best, where, joined = -1e10, -1, -1
        for i, (left, right) in enumerate(itertools.pairwise(ids)):
            found = number.get(vocabulary[left] + vocabulary[right])
            if found is not None and scores[found] > best:
                best, where, joined = scores[found], i, found
        if where < 0:
            return ids
        ids[where : where + 2] = [joined]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], Path]:
    folder = tmp_path_factory.mktemp("llama2c")

    def write(content: bytes) -> Path:
        (folder / "tokenizer.bin").write_bytes(content)
        return folder / "tokenizer.bin"

    return write


TRAINED = [" t", "he", " a", " the", "in", "nd", " and", "ing", "\u00e9t", *LETTERS, " ", ".", "T", "\u00e9", "\u65e5"]
"""As SentencePiece orders them: joined pieces by rank, then single characters."""

TEXTS = st.text(
    st.one_of(st.sampled_from([*" \n\taehintdT.", "\u65e5", "\u00e9", "\U0001f642"]), st.characters(codec="utf-8"))
)


@settings(max_examples=300)
@given(text=TEXTS.filter(lambda text: SPACE not in text))
@example("")
@example(" ")
@example("  the  the\n\nthe ")
@example("<s></s><unk><0x41>\x00")
def test_texts_are_cut_as_llama2c_does(write: Callable, text: str) -> None:
    content = stored(TRAINED)
    tokenizer = _cached(write, content)
    assert tokenizer.encode(text) == reference(content, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "".join(tokenizer.decode_stream(tokenizer.encode(text))) == text


_TOKENIZERS: dict[bytes, Tokenizer] = {}


def _cached(write: Callable, content: bytes) -> Tokenizer:
    if content not in _TOKENIZERS:
        _TOKENIZERS[content] = Tokenizer.from_file(write(content))
    return _TOKENIZERS[content]


@settings(max_examples=200)
@given(
    joins=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=12),
    text=st.text("ab ", max_size=24),
)
def test_any_trained_vocabulary_cuts_as_llama2c_does(write: Callable, joins: list, text: str) -> None:
    """Every piece joins two that were there before, so that repeats overlap in all ways."""
    pieces = [" ", "a", "b"]
    for left, right in joins:
        joined = pieces[left % len(pieces)] + pieces[right % len(pieces)]
        if joined not in pieces and len(joined) < 9:
            pieces.append(joined)
    content = stored([*pieces[3:], *pieces[:3]])
    tokenizer = Tokenizer.from_file(write(content))
    assert tokenizer.encode(text) == reference(content, text)
    assert tokenizer_bin.from_json(json.loads(tokenizer.to_json()), "x") == content


def test_the_vocabulary_of_the_stories(shared_data: Path) -> None:
    tok512 = shared_data / "llama2c_weights" / "tok512.bin"
    content, tokenizer = tok512.read_bytes(), Tokenizer.from_file(tok512)
    stories = (shared_data / "tinystories" / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    for line in stories[::20]:
        text = json.loads(line)["text"][:300]
        assert tokenizer.encode(text) == reference(content, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer_bin.from_json(json.loads(tokenizer.to_json()), "x") == content
    assert (tokenizer.bos, tokenizer.eot, tokenizer.vocab_size) == (1, 2, 512)


def test_a_literal_u2581_is_a_space(write: Callable) -> None:
    """So SentencePiece has it; run.c, which has spaces in its pieces, spells it in bytes."""
    tokenizer = _cached(write, stored(TRAINED))
    assert tokenizer.encode(f"a{SPACE}the") == tokenizer.encode("a the")


def test_it_is_what_a_tokenizer_json_says(write: Callable, tmp_path: Path) -> None:
    tokenizer = _cached(write, stored(TRAINED))
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert tokenizer_bin.from_json(json.loads(again.to_json()), "x") == stored(TRAINED)


def test_transformers_reads_spaces_before_the_pieces(write: Callable) -> None:
    """Newer files of Llama have no normaliser: a pre-tokenizer puts the space before the text. Both are one cut."""
    content = stored(TRAINED)
    written = json.loads(_cached(write, content).to_json())
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    assert tokenizer_bin.from_json({**written, "normalizer": None, "pre_tokenizer": spaces}, "x") == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(type="WordPiece"), "the first 259 ids"),
        (lambda t: t["model"]["vocab"].update({"zz": 999}), "the first 259 ids"),
        (lambda t: t["model"].update(byte_fallback=False), "no byte fallback"),
        (lambda t: t["added_tokens"].append({"id": 259, "content": "<|im_end|>"}), "added tokens"),
        (lambda t: t.update(normalizer=None), "spaces"),
        (lambda t: t.update(decoder=None), "decoder"),
        (lambda t: t["model"]["merges"].pop(), "every cut"),
        (lambda t: t["model"]["merges"].reverse(), "do not follow the order of its ids"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(write: Callable, change: Callable, message: str) -> None:
    written = json.loads(_cached(write, stored(TRAINED)).to_json())
    change(written)
    with pytest.raises(UserError, match=f"run/tokenizer.json: not a vocabulary that llama2.c can hold: .*{message}"):
        tokenizer_bin.from_json(written, "run/tokenizer.json")


def test_a_byte_level_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="the first 259 ids"):
        tokenizer_bin.from_json(json.loads(Tokenizer.bytes_level().to_json()), "tokenizer.json")


PLAIN = stored(["ab", "a", "b", " "])
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "piece 0 is nothing where llama2.c has '<unk>'"),
    "truncated in a piece": (PLAIN[:-1], "piece 262 has 1 bytes, the longest 6, the file ends after"),
    "truncated in a length": (PLAIN[:-5], "truncated"),
    "longer": (PLAIN + b"\0" * 8, "piece 263 has 0 bytes"),
    "longer than the longest": (b"\x05\0\0\0" + PLAIN[4:], "the longest 5"),
    "negative length": (PLAIN[:8] + struct.pack("<i", -7) + PLAIN[12:], "piece 0 has -7 bytes"),
    "absurd length": (PLAIN[:8] + struct.pack("<i", 2**31 - 1) + PLAIN[12:], "has 2147483647 bytes"),
    "no byte pieces": (packed([*FIXED[:40], b"a", *FIXED[41:]], [0.0] * 259), "piece 40 is 'a'"),
    "no specials": (packed([b"<pad>", *FIXED[1:]], [0.0] * 259), "piece 0 is '<pad>'"),
    "not UTF-8": (packed([*FIXED, b"\xc3"], [0.0] * 260), r"piece 259, b'\\xc3', is no UTF-8"),
    "U+2581": (packed([*FIXED, SPACE.encode()], [0.0] * 260), "stands for a space"),
    "twice": (packed([*FIXED, b"a", b"a"], [0.0] * 261), "'a' is there twice"),
    "ties": (packed([*FIXED, b"a", b"b", b"ab", b"ba"], [0.0] * 263), "'ab' and 'ba' have scores"),
    "NaN": (packed([*FIXED, b"a", b"b", b"ab", b"ba"], [0.0] * 261 + [1.0, float("nan")]), "have scores"),
    "a pickle": (b"PK\x03\x04" + b"\0" * 60, "truncated, or no tokenizer.bin"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_scores_need_not_be_numbered(write: Callable) -> None:
    """Any order of scores is read; only numbers by id are written."""
    content = packed([*FIXED, b" ", b"a", b"b", b"ab", b"abb"], [0.0] * 259 + [-9.0, -9.0, -9.0, -7.5, 2.25])
    tokenizer = Tokenizer.from_file(write(content))
    assert tokenizer.encode("abb ab") == reference(content, "abb ab")
    with pytest.raises(UserError, match="do not follow the order of its ids"):
        tokenizer_bin.from_json(json.loads(tokenizer.to_json()), "x")


def test_a_missing_or_huge_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such"):
        tokenizer_bin.read(tmp_path / "tokenizer.bin")
    (tmp_path / "tokenizer.bin").write_bytes(PLAIN)
    monkeypatch.setattr(tokenizer_bin, "LARGEST", 100)
    with pytest.raises(UserError, match="are no vocabulary"):
        tokenizer_bin.read(tmp_path / "tokenizer.bin")

"""The vocabulary of llama2.c, `tokenizer.bin`, as a `tokenizer.json`, and back.

    int32 longest                                       bytes of the longest piece
    float32 score, int32 length, length bytes           for each piece, in the order of ids

It is a SentencePiece BPE vocabulary: `<unk>`, begin and end of text, 256 bytes for what has no piece, then pieces with
spaces for SentencePiece's U+2581. Of all neighbours those are joined first whose piece has the highest score, the
leftmost of equals (SentencePiece's greedy algorithm; `encode` in llama2.c's run.c). A `tokenizer.json` has no scores
but a list of merges: every cut of every piece into two others, by falling score.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import UserError

SPACE = "\u2581"
SPECIALS = ("<unk>", "<s>", "</s>")
BOS = SPECIALS.index("<s>")
_STORED = (b"<unk>", b"\n<s>\n", b"\n</s>\n")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
FIRST = len(SPECIALS) + len(_BYTES)
"""Id of the first ordinary piece."""

LARGEST = 2**26
"""Bytes of the largest file that is read."""

_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
_METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


class Piece(NamedTuple):
    """One entry of the vocabulary, its text as SentencePiece spells it."""

    text: str
    score: float


def read(path: str | Path) -> list[Piece]:
    """The pieces of a `tokenizer.bin`.

    Raises:
        UserError: the file is missing, truncated, too long, or no vocabulary of llama2.c.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are no vocabulary of llama2.c")
    content = path.read_bytes()
    longest = struct.unpack_from("<i", content)[0] if len(content) >= 4 else 0
    pieces: list[Piece] = []
    at = 4
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at) if at + 8 <= len(content) else (0.0, 0)
        begin, at = at + 8, at + 8 + length
        if not 0 < length <= longest or at > len(content):
            what = f"piece {len(pieces)} has {length} bytes, the longest {longest}, the file ends after {len(content)}"
            raise UserError(f"{path}: {what}", "truncated, or no tokenizer.bin of llama2.c")
        pieces.append(Piece(_spelling(path, len(pieces), content[begin:at]), score))
    check(path, pieces)
    return pieces


def _spelling(path: Path, number: int, stored: bytes) -> str:
    if number < len(SPECIALS) and stored == _STORED[number]:
        return SPECIALS[number]
    try:
        text = stored.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: piece {number}, {stored!r}, is no UTF-8") from None
    if SPACE in text:
        raise UserError(f"{path}: piece {number}, {text!r}, has U+2581, which stands for a space")
    return text.replace(" ", SPACE)


def check(path: Path, pieces: Sequence[Piece]) -> None:
    """Refuse pieces that are no vocabulary of SentencePiece BPE, laid out as Llama's.

    Raises:
        UserError: other special tokens, a piece that is there twice, equal scores of two pieces.
    """
    texts = [piece.text for piece in pieces]
    for number, wanted in enumerate((*SPECIALS, *_BYTES)):
        if number >= len(texts) or texts[number] != wanted:
            found = repr(texts[number]) if number < len(texts) else "nothing"
            raise UserError(f"{path}: piece {number} is {found} where llama2.c has {wanted!r}")
    if len(set(texts)) != len(texts):
        raise UserError(f"{path}: piece {next(t for i, t in enumerate(texts) if t in texts[:i])!r} is there twice")
    joined = {left + right for left, right in merges(pieces)}
    ranked = sorted((piece for piece in pieces[FIRST:] if piece.text in joined), key=lambda piece: -piece.score)
    for one, other in pairwise(ranked):
        if not one.score > other.score:  # NaN too
            raise UserError(f"{path}: {one.text!r} and {other.text!r} have scores {one.score} and {other.score}")


def merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every cut of every ordinary piece into two others, by falling score, the longest left part first."""
    known = {piece.text for piece in pieces[FIRST:]}

    def cuts() -> Iterator[tuple[str, str]]:
        for text, _ in sorted(pieces[FIRST:], key=lambda piece: -piece.score):
            for cut in range(len(text) - 1, 0, -1):
                if text[:cut] in known and text[cut:] in known:
                    yield text[:cut], text[cut:]

    return list(cuts())


def to_json(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The `tokenizer.json`: it cuts every text as SentencePiece does and puts begin of text before it."""
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{kind: {**one, "type_id": 1}} for part in (begin, text) for kind, one in part.items()]
    second[1]["Sequence"]["id"] = "B"
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags, "special": True} for i, token in enumerate(SPECIALS)],
        "normalizer": _NORMALIZER,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, *second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": _DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: number for number, piece in enumerate(pieces)},
            "merges": merges(pieces),
        },
    }


def from_json(tokenizer: Mapping[str, Any], where: str) -> bytes:
    """The `tokenizer.bin` of a `tokenizer.json` as the `tokenizers` library writes it.

    Scores fall by one from id to id, as SentencePiece trains them.

    Raises:
        UserError: it is no SentencePiece BPE with a piece for each byte, or its merges do not follow its ids.
    """
    model = tokenizer["model"]
    vocab: dict[str, int] = model["vocab"] if model["type"] == "BPE" else {}
    texts = sorted(vocab, key=vocab.__getitem__)
    if sorted(vocab.values()) != list(range(len(vocab))) or texts[:FIRST] != [*SPECIALS, *_BYTES]:
        raise _unlike(where, f"the first {FIRST} ids are not <unk>, <s>, </s> and the bytes")
    pieces = [Piece(text, -float(i - FIRST) if i >= FIRST else 0.0) for i, text in enumerate(texts)]
    stated, derived = [tuple(one) for one in model["merges"]], merges(pieces)
    spaces = tokenizer["normalizer"], tokenizer["pre_tokenizer"]
    for holds, what in (
        (model["byte_fallback"], "the model has no byte fallback"),
        ({token["content"] for token in tokenizer["added_tokens"]} <= set(SPECIALS), "there are added tokens"),
        (spaces in ((_NORMALIZER, None), (None, _METASPACE)), "spaces are not treated as SentencePiece does"),
        (tokenizer["decoder"] == _DECODER, "its decoder is another"),
        (set(stated) == set(derived), "it does not merge every cut of every piece"),
        ([a + b for a, b in stated] == [a + b for a, b in derived], "its merges do not follow the order of its ids"),
    ):
        if not holds:
            raise _unlike(where, what)
    stored = [*_STORED, *(piece.text.replace(SPACE, " ").encode() for piece in pieces[len(SPECIALS) :])]
    entries = (struct.pack("<fi", pieces[i].score, len(one)) + one for i, one in enumerate(stored))
    return struct.pack("<i", max(map(len, stored))) + b"".join(entries)


def _unlike(where: str, what: str) -> UserError:
    hint = "a copy of the folder without the tokenizer gives the weights alone"
    return UserError(f"{where}: not a vocabulary that llama2.c can hold: {what}", hint)


def as_text(path: str | Path) -> str:
    """The `tokenizer.json` of the `tokenizer.bin` at `path`, as text."""
    return json.dumps(to_json(read(path)), ensure_ascii=False)

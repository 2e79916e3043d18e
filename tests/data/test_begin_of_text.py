"""A text begins with begin of text if and only if the tokenizer.json says so; what is shown is what `decode` makes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import processors

from jaxlm.config import Data
from jaxlm.data import shards as module
from jaxlm.data.shards import Shards, open_shards
from jaxlm.data.sources import Documents
from jaxlm.errors import UserError
from jaxlm.text.completion import complete, encode_prompts
from jaxlm.text.tokenizer import Tokenizer
from tests.data.test_llama2c import TRAINED, stored

BYTES = Tokenizer.bytes_level()
BOS = BYTES.special("user")


def processed(*parts: Any) -> Tokenizer:
    """The tokenizer of bytes with a post-processor."""
    inner = Inner.from_str(BYTES.to_json())
    chosen: Any = parts[0] if len(parts) == 1 else processors.Sequence(list(parts))
    inner.post_processor = chosen
    return Tokenizer(inner)


def template(single: str) -> Any:
    specials = [("<|user|>", BOS), ("<|end|>", BYTES.special("end_of_turn"))]
    return processors.TemplateProcessing(single=single, special_tokens=specials)


BYTE_LEVEL = processors.ByteLevel(trim_offsets=False)
LLAMA3 = processed(BYTE_LEVEL, template("<|user|> $A"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Pieces with spaces, bytes for the rest, `<s>` before a text."""
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.bin"
    path.write_bytes(stored(TRAINED))
    return Tokenizer.from_file(path)


@pytest.mark.parametrize(
    ("tokenizer", "bos"),
    [
        (BYTES, None),
        (processed(BYTE_LEVEL), None),
        (processed(template("$A <|end|>")), None),
        (processed(template("<|user|> $A")), BOS),
        (processed(template("<|user|> $A <|end|>")), BOS),
        (LLAMA3, BOS),
    ],
)
def test_the_post_processor_decides(tokenizer: Tokenizer, bos: int | None, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for one in (tokenizer, Tokenizer.from_file(tmp_path / "tokenizer.json")):
        assert one.bos == bos
        assert one.encode("ab") == [97, 98]  # documents and prompts get it once, from who knows where they begin
        begin = [] if bos is None else [bos]
        assert encode_prompts(one, ["ab", ""]) == [[*begin, 97, 98], begin or [BYTES.eot]]


def test_a_prompt_that_spells_it_has_it_once() -> None:
    assert encode_prompts(LLAMA3, ["<|user|>a", "a<|user|>"]) == [[BOS, 97], [BOS, 97, BOS]]
    with pytest.raises(UserError, match="no end-of-text"):
        encode_prompts(Tokenizer.bytes_level(specials=False), [""])


def test_the_beginning_of_another_text_is_an_end() -> None:
    """What a model that knows no end of text writes when it is done, as run.c of llama2.c has it."""
    blocks = (np.array([[65, BOS], [66, 67]]), np.array([[68, 69], [BYTES.eot, 70]]))
    first, second = complete(iter(blocks), LLAMA3, ["x", ""])
    assert (first.text, first.tokens) == ("A", [65, BOS])
    assert (second.text, second.tokens) == ("BC", [66, 67, BYTES.eot])
    first, _ = complete(iter(blocks), BYTES, ["x", ""])
    assert first.tokens == [65, BOS, 68, 69]


@given(
    prompt=st.text("the and\u00e9", max_size=6),
    new=st.lists(st.integers(3, 259 + len(TRAINED) - 1), max_size=12),
    size=st.integers(1, 4),
)
@example(prompt="the", new=[262], size=1)
@example(prompt="", new=[262, 262], size=1)
@example(prompt=" ", new=[262], size=1)
@example(prompt="a", new=[3 + 0xF0, 3 + 0x9F, 3 + 0x99, 3 + 0x82, 262], size=1)
@example(prompt="a", new=[3 + 0x0A, 3 + 0xF0, 262], size=1)
def test_prompt_and_completion_are_one_text(sentencepiece: Tokenizer, prompt: str, new: list[int], size: int) -> None:
    """The space before a word is dropped at the beginning of a text only; runs of bytes are decoded as a whole."""
    pieces: list[str] = []
    blocks = (np.array([new[start : start + size]]) for start in range(0, len(new), size))
    (done,) = complete(blocks, sentencepiece, [prompt], stream=lambda _, piece: pieces.append(piece))
    ids = [*encode_prompts(sentencepiece, [prompt])[0], *new]
    assert prompt + done.text == sentencepiece.decode(ids, skip_special=True)
    assert "".join(pieces) == done.text


def test_text_appears_as_soon_as_it_is_certain(sentencepiece: Tokenizer) -> None:
    seen: list[str] = []
    ids = [*sentencepiece.encode("the a\u65e5\nthe"), 3 + 0x0A]
    complete([np.array([[token]]) for token in ids], sentencepiece, ["a"], stream=lambda _, piece: seen.append(piece))
    assert seen == [" the", " a", "\u65e5", "\nt", "he", "\n"]


def build(corpus: Path, cache: Path, tokenizer: Tokenizer) -> Shards:
    return open_shards(Documents(Data(source=str(corpus), validation_fraction=0.0)), tokenizer, cache, 2)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    for i in range(4):
        (tmp_path / "corpus" / f"{i}.txt").write_text("the and\nthe a\n" * (1 + 5 * i) + "end\n")
    return tmp_path / "corpus"


@pytest.mark.parametrize("kind", ["plain", "llama3", "sentencepiece"])
def test_documents_begin_with_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentencepiece: Tokenizer, kind: str
) -> None:
    """SentencePiece puts a space before each text, so a document must not be cut into texts."""
    monkeypatch.setattr(module, "PIECE_CHARS", 20)
    tokenizer = {"plain": BYTES, "llama3": LLAMA3, "sentencepiece": sentencepiece}[kind]
    assert tokenizer.cuts_at_lines == (kind != "sentencepiece")
    shard = build(corpus, tmp_path / "cache", tokenizer).train
    begin = [] if kind == "plain" else [tokenizer.bos]
    documents = [shard.tokens[a:b].tolist() for a, b in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)]
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    assert documents == [[*begin, *tokenizer.encode(text), tokenizer.eot] for text in texts]


def test_shards_made_before_are_not_taken_for_new_ones(corpus: Path, tmp_path: Path, sentencepiece: Tokenizer) -> None:
    """And those of tokenizers without begin of text are still the same."""

    def before(tokenizer: Tokenizer) -> str:
        identity = Documents(Data(source=str(corpus), validation_fraction=0.0)).identity()
        return hashlib.sha256(f"{module.FORMAT} {identity} {tokenizer.fingerprint()}".encode()).hexdigest()[:32]

    for tokenizer, kept in ((BYTES, True), (processed(BYTE_LEVEL), True), (LLAMA3, False), (sentencepiece, False)):
        assert (build(corpus, tmp_path / "cache", tokenizer).folder.name == before(tokenizer)) == kept

"""Results that look well and are not: whatever the corpus, what is wrong with its figures is said, and nothing else."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase

from jaxlm.config import toml
from jaxlm.data.pipeline import prepare
from jaxlm.errors import UserError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
END = "<|endoftext|>"


class Lines(logging.Handler):
    """Keeps the warnings of a block."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("jaxlm").addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger("jaxlm").removeHandler(self)


def write_tokenizer(path: Path, *, lowers: bool, ends: bool) -> None:
    """Letters as ids; capitals become small ones or have ids of their own; with an end of text or without."""
    inner = tokenizers.Tokenizer(BPE(vocab={"a": 0, "b": 1, "A": 2}, merges=[]))
    inner.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    if lowers:
        inner.normalizer = Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    if ends:
        inner.add_special_tokens([END])
    inner.save(str(path))


def lines_of(trained: list[str], held_out: list[str], root: Path) -> list[str]:
    """The warnings about a corpus, or the error as one line."""
    for side, texts in (("trained", trained), ("held-out", held_out)):
        (root / side).mkdir()
        for number, text in enumerate(texts):
            (root / side / f"{number}.txt").write_text(text)
    options = [f'data.source="{root / "trained"}"', f'data.validation_source="{root / "held-out"}"']
    options += [f'data.cache_dir="{root / "cache"}"', "data.workers=1", "model.vocab_size=0"]
    options += ["tokenizer.kind=file", f'tokenizer.path="{root / "tokenizer.json"}"']
    with Lines() as lines:
        try:
            prepare(toml.load(QUICKSTART, options))
        except UserError as error:
            return [f"error: {error}"]
    return [line for line in lines if "no end-of-text" not in line]


texts = st.lists(st.text("abA", min_size=1, max_size=3), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(trained=texts, held_out=texts, lowers=st.booleans(), ends=st.booleans())
def test_what_is_wrong_with_the_figures_of_a_corpus_is_said(
    trained: list[str], held_out: list[str], lowers: bool, ends: bool
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write_tokenizer(Path(scratch, "tokenizer.json"), lowers=lowers, ends=ends)
        lines = lines_of(trained, held_out, Path(scratch))
    if not ends and max(map(len, trained)) == 1:
        assert len(lines) == 1 and "every document has one token, so none is a target" in lines[0]
        return
    ids = {text: (text.lower() if lowers else text) for text in (*trained, *held_out)}
    copied = [text for text in held_out if ids[text] in {ids[one] for one in trained}]
    share = sum(len(text) + ends for text in copied) / sum(len(text) + ends for text in held_out)
    lost = sum(lowers and "A" in text for text in (*trained, *held_out))
    expected = []
    if copied:
        expected.append(f"{len(copied)} of {len(held_out)} validation documents, {share:.0%} of their tokens,")
    if lost:
        expected.append(f"the tokenizer does not give back {lost} of {len(trained) + len(held_out)} texts")
    assert len(lines) == len(expected), lines
    for line, words in zip(lines, expected, strict=True):
        assert line.startswith("warning: ") and words in line

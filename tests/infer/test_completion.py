"""The text side of generation, without a model: stop strings, characters that span tokens, padding, checks."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.text.completion import StopStrings, check_prompts, complete, encode_prompts, right_padded
from jaxlm.text.sampling import uniforms
from jaxlm.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes_level()


def in_blocks(ids: list[int], size: int) -> list[np.ndarray]:
    return [np.array([ids[start : start + size]]) for start in range(0, len(ids), size)]


@given(text=st.text("abc", max_size=12), stop=st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_stop_strings_in_pieces(text: str, stop: list[str]) -> None:
    """Character by character, the text ends before the first stop string that is complete."""
    stops = StopStrings(stop)
    pieces = [stops.push(character) for character in text]
    shown = "".join(pieces) + stops.flush()
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(string) for string in stop)]
    if not ends:
        assert (shown, stops.found) == (text, False)
    else:
        first = text[: ends[0]]
        assert shown == first[: min(first.find(string) for string in stop if string in first)]
    for end, piece in zip(itertools.accumulate(map(len, pieces)), pieces, strict=True):
        assert shown[:end].endswith(piece)  # nothing that was shown is taken back


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("stop", [(), ("\n\n",), ("né",), ("not there",)])
def test_streamed_pieces_are_the_text(size: int, stop: tuple[str, ...]) -> None:
    text = "a\nà la carte: 日本語 né\n\nend"
    pieces: list[str] = []
    ids = BYTES.encode(text)
    (done,) = complete(in_blocks(ids, size), BYTES, ["p"], stop=stop, stream=lambda _, piece: pieces.append(piece))
    cut = text.find(stop[0]) if stop and stop[0] in text else len(text)
    assert "".join(pieces) == done.text == text[:cut]
    assert not any("\ufffd" in piece for piece in pieces)
    whole = BYTES.decode(done.tokens)
    assert whole == text if cut == len(text) else whole == text[:cut] + stop[0]


def test_no_block_is_asked_for_after_the_end() -> None:
    assert BYTES.eot is not None

    def blocks():
        yield np.array([[65, BYTES.eot, 0], [66, 67, 68]])
        yield np.array([[0, 0], [BYTES.eot, 0]])
        raise AssertionError("both rows have ended")

    first, second = complete(blocks(), BYTES, ["x", "y"])
    assert (first.prompt, first.text, first.tokens) == ("x", "A", [65, BYTES.eot])
    assert (second.text, second.tokens) == ("BCD", [66, 67, 68, BYTES.eot])


def test_an_incomplete_character_at_the_end_is_shown_as_such() -> None:
    (done,) = complete(in_blocks([65, 0xC3], 1), BYTES, ["p"])
    assert done.text == "A\ufffd"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserError, match="stop string is empty"):
        complete([], BYTES, ["p"], stop=[""])


def test_an_empty_prompt_begins_a_document() -> None:
    assert encode_prompts(BYTES, ["", "A"]) == [[BYTES.eot], [65]]
    with pytest.raises(UserError, match="no end-of-text"):
        encode_prompts(Tokenizer.bytes_level(specials=False), [""])


def test_padding() -> None:
    tokens, positions, segments, lengths = right_padded([[7, 8, 9], [5]], 4, pad_id=3)
    assert tokens.tolist() == [[7, 8, 9, 3], [5, 3, 3, 3]]
    assert positions.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert segments.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert lengths.tolist() == [3, 1]


def test_uniforms_of_a_row_are_its_own() -> None:
    numbers = uniforms(4, 3, 10)
    assert numbers.dtype == np.float32 and (numbers >= 0).all() and (numbers < 1).all()
    np.testing.assert_array_equal(uniforms(4, 2, 6), numbers[:2, :6])
    assert len(np.unique([*numbers.flat, *uniforms(5, 3, 10).flat])) == 60


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 4, "no prompt"),
        ([[1], []], 4, "prompt 1 has no token"),
        ([[1, 97]], 4, "vocab_size is 97"),
        ([[-1]], 4, "vocab_size is 97"),
        ([[1]], 0, "max_new_tokens"),
        ([[1], [1] * 5], 4, "at most 3 new tokens fit"),
        ([[1] * 8], 4, "shorten the prompt"),
    ],
)
def test_prompts_that_cannot_be_completed(prompts: list[list[int]], new: int, message: str) -> None:
    cfg = config.Model(vocab_size=97, d_model=8, n_heads=2, max_seq_len=8, positions="learned")
    with pytest.raises(UserError, match=message):
        check_prompts(cfg, prompts, new)


def test_rotary_positions_beyond_training_are_only_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    cfg = config.Model(vocab_size=97, d_model=8, n_heads=2, max_seq_len=8)
    with caplog.at_level(logging.WARNING):
        check_prompts(cfg, [[1] * 4], 4)
        assert not caplog.records
        check_prompts(cfg, [[1] * 5], 4)
    assert "max_seq_len = 8" in caplog.text

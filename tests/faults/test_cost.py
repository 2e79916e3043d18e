"""What costs the square of a text or the whole of a file: bounds that hold for any text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models

from jaxlm.text.stream import TextStream
from jaxlm.text.tokenizer import Tokenizer

PIECES = ["▁", "▁a", "b", "▁cd", "\n", "\ufffd", *(f"<0x{byte:02X}>" for byte in (0xC3, 0xA9, 0xFF))]


class Counting(Tokenizer):
    """Counts the ids that are decoded."""

    decoded = 0

    def decode(self, ids, **options) -> str:
        self.decoded += len(ids)
        return super().decode(ids, **options)


def counting() -> Counting:
    inner = Inner(models.BPE(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[], byte_fallback=True))
    spaces = decoders.Replace("▁", " ")
    inner.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return Counting(inner)


runs = st.lists(st.tuples(st.integers(0, len(PIECES) - 1), st.integers(1, 120)), max_size=8)


@settings(max_examples=150, deadline=None)
@given(runs)
def test_a_streamed_text_is_decoded_a_few_times_over(drawn: list[tuple[int, int]]) -> None:
    """Of any ids, long runs of one among them: a token costs no more the longer the text before it."""
    ids = [token for token, times in drawn for _ in range(times)]
    tokenizer = counting()
    stream = TextStream(tokenizer)
    text = "".join([*map(stream.push, ids), stream.flush()])
    assert tokenizer.decoded <= 32 * (len(ids) + 8)
    assert text == tokenizer.decode(ids)

"""Pieces of documents as rows of a batch: what stands at each place, and which targets are learned.

Shapes: B rows, M pieces, N tokens of all pieces, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64


class Rows(NamedTuple):
    """Packed rows.

    Attributes:
        tokens: the inputs; `pad` at padding.
        targets: the next token of the same document; `pad` where there is none.
        positions: place in the document's piece, from 0.
        segments: 1, 2, 3, ... for the pieces of a row, 0 for padding. No token may attend to another segment.
        weights: 1 where there is a target, 0 at the end of a document and at padding.
    """

    tokens: Int32[np.ndarray, "b t"]
    targets: Int32[np.ndarray, "b t"]
    positions: Int32[np.ndarray, "b t"]
    segments: Int32[np.ndarray, "b t"]
    weights: Float32[np.ndarray, "b t"]


class Pieces(NamedTuple):
    """The pieces of one row, in their order.

    Attributes:
        begins, ends: where they lie in the shard.
        stops: where their documents end in the shard.
        drawn: whether there is room to turn the piece into one for fill-in-the-middle.
    """

    begins: Int64[np.ndarray, "m"]
    ends: Int64[np.ndarray, "m"]
    stops: Int64[np.ndarray, "m"]
    drawn: Bool[np.ndarray, "m"]

    @classmethod
    def none(cls) -> Pieces:
        """A row of padding."""
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing, nothing, nothing > 0)


class Text(NamedTuple):
    """The tokens of several pieces, one piece after the other.

    Attributes:
        tokens: of all pieces.
        lengths: of each piece, none of them 0.
        after: the next token of each piece's document; -1 where there is none.
        learned: whether the target of each token is learned; None: all are.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    after: np.ndarray
    learned: np.ndarray | None = None


def text_of(shard_tokens: np.ndarray, pieces: Pieces) -> Text:
    """The tokens of pieces as the shard has them."""
    lengths_M = pieces.ends - pieces.begins
    starts_M = np.cumsum(lengths_M) - lengths_M
    source_N = np.arange(int(lengths_M.sum())) + np.repeat(pieces.begins - starts_M, lengths_M)
    has_next_M = pieces.ends < pieces.stops
    after_M = np.full(len(lengths_M), -1, np.int64)
    after_M[has_next_M] = shard_tokens[pieces.ends[has_next_M]]
    return Text(shard_tokens[source_N], lengths_M, after_M)


def lay(shard_tokens: np.ndarray, rows: Sequence[Pieces], seq_len: int, pad: int) -> Rows:
    """Rows of the pieces of a shard, which fit."""
    joined = Pieces(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))
    return lay_text(text_of(shard_tokens, joined), [len(row.begins) for row in rows], seq_len, pad)


def lay_text(text: Text, pieces_of_rows: Sequence[int] | np.ndarray, seq_len: int, pad: int) -> Rows:
    """Rows of these pieces: the first `pieces_of_rows[0]` in the first row, and so on."""
    pieces_B = np.asarray(pieces_of_rows, np.int64)
    shape = (len(pieces_B), seq_len)
    tokens_BT, targets_BT = np.full(shape, pad, np.int32), np.full(shape, pad, np.int32)
    positions_BT, segments_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights_BT = np.zeros(shape, np.float32)
    # Of each piece: its row, its number in the row, and where it begins there; of each token: its place in the rows.
    row_M = np.repeat(np.arange(len(pieces_B)), pieces_B)
    first_B = np.cumsum(pieces_B) - pieces_B
    starts_M = np.cumsum(text.lengths) - text.lengths
    total = np.append(starts_M, len(text.tokens))
    begins_M = starts_M - total[first_B[row_M]]
    within_N = np.arange(len(text.tokens)) - np.repeat(starts_M, text.lengths)
    place_N = within_N + np.repeat(row_M * seq_len + begins_M, text.lengths)
    # The target of a token is the next one; of a piece's last token, the one that follows in its document.
    targets_N = np.empty(len(text.tokens), np.int64)
    targets_N[:-1] = text.tokens[1:]
    targets_N[starts_M + text.lengths - 1] = text.after
    learned_N = targets_N >= 0
    if text.learned is not None:
        learned_N &= text.learned
    if len(text.tokens) == len(pieces_B) * seq_len:  # no padding: rows follow each other as the tokens do
        segments_N = np.repeat(np.arange(len(row_M)) - first_B[row_M] + 1, text.lengths)
        parts = text.tokens, np.where(learned_N, targets_N, pad), within_N, segments_N
        tokens_BT, targets_BT, positions_BT, segments_BT = (part.astype(np.int32).reshape(shape) for part in parts)
        return Rows(tokens_BT, targets_BT, positions_BT, segments_BT, learned_N.astype(np.float32).reshape(shape))
    tokens_BT.flat[place_N] = text.tokens
    targets_BT.flat[place_N] = np.where(learned_N, targets_N, pad)
    positions_BT.flat[place_N] = within_N
    segments_BT.flat[place_N] = np.repeat(np.arange(len(row_M)) - first_B[row_M] + 1, text.lengths)
    weights_BT.flat[place_N] = learned_N
    return Rows(tokens_BT, targets_BT, positions_BT, segments_BT, weights_BT)

"""Rows are a pure function of (seed, index), and every token of an epoch lies in exactly one place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.packing.stream import PackedRows
from jaxlm.data.shards import Shard

PAD = 7


def shard_of(lengths: list[int]) -> Shard:
    """Documents of these lengths whose tokens are all different, so that a token tells where it is from."""
    offsets = np.cumsum([0, *lengths])
    return Shard(np.arange(1000, 1000 + offsets[-1], dtype=np.uint16), offsets, text_bytes=0)


corpora = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(shard_of)


@settings(max_examples=150, deadline=None)
@given(corpora, st.integers(1, 24), st.integers(0, 5), st.integers(0, 3))
def test_epoch_holds_every_token_once_with_its_own_successor(shard, seq_len, seed, epoch):
    packed = PackedRows(shard, seq_len, seed=seed, pad=PAD)
    count = packed.rows_per_epoch
    rows = packed[np.arange(count) + epoch * count]
    real = rows.segments > 0
    assert sorted(rows.tokens[real]) == shard.tokens.tolist()
    assert np.all(rows.tokens[~real] == PAD) and np.all(rows.positions[~real] == 0)

    document = np.searchsorted(shard.offsets, rows.tokens - 1000, side="right")
    last = np.isin(rows.tokens - 999, shard.offsets)
    has_target = real & ~last
    assert np.array_equal(rows.weights, has_target)
    assert np.array_equal(rows.targets[has_target], rows.tokens[has_target] + 1)
    assert np.all(rows.targets[~has_target] == PAD)

    for r in range(count):
        assert np.all(np.diff(real[r].astype(int)) <= 0), "padding comes last"
        for segment in range(1, rows.segments[r].max() + 1):
            places = np.flatnonzero(rows.segments[r] == segment)
            assert np.array_equal(places, np.arange(places[0], places[0] + len(places))), "a piece is contiguous"
            assert np.array_equal(rows.positions[r, places], np.arange(len(places)))
            assert len(set(document[r, places])) == 1, "one document under one segment"
            assert np.array_equal(np.diff(rows.tokens[r, places]), np.ones(len(places) - 1)), "in the document's order"


@settings(max_examples=50, deadline=None)
@given(corpora, st.integers(1, 24), st.lists(st.integers(0, 60), min_size=1, max_size=20))
def test_any_row_alone_equals_the_row_among_others(shard, seq_len, indices):
    together = PackedRows(shard, seq_len, seed=3)[np.array(indices)]
    for place, index in enumerate(indices):
        alone = PackedRows(shard, seq_len, seed=3)[np.array([index])]
        for whole, part in zip(together, alone, strict=True):
            assert np.array_equal(whole[place], part[0])


def test_order_changes_with_epoch_and_seed():
    shard = shard_of([9, 30, 4, 17, 25, 8])
    every = np.arange(PackedRows(shard, 8).rows_per_epoch)
    first, again, other = (PackedRows(shard, 8, seed=seed)[every].tokens for seed in (0, 0, 1))
    second = PackedRows(shard, 8)[every + len(every)].tokens
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first, second)


def test_one_long_document_is_cut_elsewhere_in_each_epoch():
    packed = PackedRows(shard_of([1000]), 64)
    count = packed.rows_per_epoch
    phases = {int(packed[np.arange(count) + e * count].tokens.min(axis=1)[0] % 64) for e in range(8)}
    assert len(phases) > 4


@pytest.mark.parametrize("lengths", [[1], [3], [2, 2]])
def test_corpus_shorter_than_a_row_repeats_padded(lengths):
    rows = PackedRows(shard_of(lengths), 16, pad=PAD)[np.arange(5)]
    assert rows.tokens.shape == (5, 16)
    assert np.all((rows.segments > 0).sum(axis=1) == sum(lengths))


def test_first_epoch_ends_in_padding():
    packed = PackedRows(shard_of([20]), 8, pad=PAD)
    rows = packed.first_epoch(np.arange(5))
    assert np.array_equal(rows.tokens[:3], packed[np.arange(3)].tokens)
    assert np.all(rows.segments[3:] == 0) and np.all(rows.weights[3:] == 0) and np.all(rows.tokens[3:] == PAD)


def test_dtypes_and_empty_documents():
    offsets = np.array([0, 0, 3, 3, 5, 5])
    rows = PackedRows(Shard(np.arange(5, dtype=np.uint32), offsets, 0), 5)[np.arange(1)]
    assert [array.dtype.name for array in rows] == ["int32"] * 4 + ["float32"]
    assert rows.segments.max() <= 3 and sorted(rows.tokens[0]) == list(range(5))

"""Rows of state spaces with one mistake each: still a bijection, so only the logits of transformers see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from jaxlm import config
from jaxlm.convert import write_model
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.rows import Row, Transform, of_each
from jaxlm.parity.sides.jax_side import short_chunks
from parity_tests import pairs
from parity_tests.families import measure
from parity_tests.families_ssm import EXAMPLES
from parity_tests.tolerances import FLOAT64

Rows = Sequence[Row]

rolled = of_each(lambda x, leaf: np.roll(x, x.shape[0] // 2, 0), lambda x, leaf: np.roll(x, x.shape[0] // 2, 0))
reversed_taps = of_each(lambda x, leaf: x[::-1], lambda x, leaf: x[::-1])


def after(rows: Rows, name: str, *more: Transform) -> Rows:
    """One row with another transform behind its own."""
    return [Row(row.ours, row.theirs, *row.transforms, *more) if name in row.theirs[0] else row for row in rows]


def before(rows: Rows, name: str, *more: Transform) -> Rows:
    """One row with another transform before its own."""
    return [Row(row.ours, row.theirs, *more, *row.transforms) if name in row.theirs[0] else row for row in rows]


def reordered(rows: Rows, name: str) -> Rows:
    """The parts of a joined row the other way round."""
    return [Row(row.ours[::-1], row.theirs, *row.transforms) if name in row.theirs[0] else row for row in rows]


def swapped(rows: Rows, one: str, other: str) -> Rows:
    """The names of two rows exchanged."""
    names = {one: other, other: one}
    fix = lambda text: next((text.replace(a, b) for a, b in names.items() if a in text), text)  # noqa: E731
    return [Row(row.ours, tuple(map(fix, row.theirs)), *row.transforms) for row in rows]


# The norms of B and C in each other's place are no fault: only the products of their scales matter.
FAULTS: dict[str, tuple[str, Callable[[Rows], Rows]]] = {
    "mamba: z before x": ("mamba", lambda rows: after(rows, "mixer.in_proj.", rolled)),
    "mamba: taps reversed": ("mamba", lambda rows: before(rows, "conv1d.weight", reversed_taps)),
    "mamba2: step size before B and C before z and x": ("mamba2", lambda rows: reordered(rows, "in_proj.weight")),
    "mamba2: B and C convolved before x": ("mamba2", lambda rows: reordered(rows, "conv1d.weight")),
    "jamba: gate for up": ("jamba", lambda rows: swapped(rows, "gate_proj", "up_proj")),
    "jamba: norms of the block": ("jamba", lambda rows: swapped(rows, "input_layernorm", "pre_ff_layernorm")),
    "jamba: skip for the step size": ("jamba", lambda rows: swapped(rows, "mamba.D", "mamba.dt_proj.bias")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_row_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, spoil = FAULTS[fault]
    family = FAMILIES[name]
    spoilt = dataclasses.replace(family, rows=lambda cfg: spoil(family.rows(cfg)))
    monkeypatch.setattr(write_model, "FAMILIES", {**FAMILIES, name: spoilt})
    one = next(one for one in EXAMPLES if one.family == name and "experts, att" not in one.name)
    with pytest.raises(AssertionError, match="logits: error"):
        FLOAT64.check(measure(one, ()).float64, "logits")


def test_only_the_chunks_of_mamba_are_made_short() -> None:
    """Where nobody has said how long they are."""
    assert short_chunks(pairs.model(pattern=("mamba",))).mamba.chunk == 2
    for left_alone in (
        pairs.model(pattern=("mamba",), mamba=config.Mamba(chunk=5)),
        pairs.model(pattern=("mamba", "mamba2"), n_layers=2, mamba=config.Mamba(head_dim=8)),
    ):
        assert short_chunks(left_alone) == left_alone

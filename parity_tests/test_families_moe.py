"""Faults that conversions of experts are prone to, planted one at a time: the float64 logits show each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from jaxlm import config
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.families.gpt_oss import PUBLISHED
from jaxlm.convert.families.llama import rope
from jaxlm.convert.family import Family
from jaxlm.convert.rows import Row, Transform, each, interleave, join
from jaxlm.convert.settings import Setting, always
from parity_tests.families import measure
from parity_tests.families_moe import EXAMPLES
from parity_tests.tolerances import FLOAT64

backwards = Transform(lambda xs, leaves: list(xs[0][::-1]), each.back)
"""The experts in the order in which no one wants them."""


ROPE = rope(150000.0, absent=PUBLISHED)


def without_truncate(model: config.Model) -> dict[str, Any]:
    sections = ("rope_scaling", "rope_parameters")
    hf = ROPE.out(model)
    return hf | {name: {k: v for k, v in hf[name].items() if k != "truncate"} for name in sections}


TRUNCATED = Setting(without_truncate, lambda hf: ROPE.back(hf) | {"rope_scaling.truncate": False})
"""Knows nothing of `truncate`, which is true by default."""


def renamed(row: Row) -> Row:
    other = {"w1": "w3", "w3": "w1"}
    names = (".".join(other.get(part, part) for part in name.split(".")) for name in row.theirs)
    return Row(row.ours, tuple(names), *row.transforms)


def in_place_of(one: Transform, other: Transform) -> Callable[[Family], Family]:
    return of_rows(lambda row: Row(row.ours, row.theirs, *(other if x is one else x for x in row.transforms)))


def of_rows(change: Callable[[Row], Row]) -> Callable[[Family], Family]:
    return lambda family: replace(family, rows=lambda cfg: [change(row) for row in family.rows(cfg)])


def of_settings(theirs: str, wrong: Setting) -> Callable[[Family], Family]:
    """Another setting in the place of that for a key."""
    return lambda family: replace(
        family, settings=tuple(wrong if one.name == theirs else one for one in family.settings)
    )


FAULTS: dict[str, tuple[str, str, Callable[[Family], Family]]] = {
    "w1 and w3 swapped": ("mixtral", "theta", of_rows(renamed)),
    "experts backwards": ("qwen3_moe", "every second", in_place_of(each, backwards)),
    "gate and up in halves": ("gpt_oss", "YaRN", in_place_of(interleave, join(-1))),
    "YaRN truncated": ("gpt_oss", "YaRN", of_settings("rope_parameters", TRUNCATED)),
    "not renormalised": ("qwen3_moe", ", renormalised", of_settings("norm_topk_prob", always("moe.renormalize", True))),
    "scale left out": ("dots1", "groups", of_settings("routed_scaling_factor", always("moe.route_scale", 2.5))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, name, plant = FAULTS[fault]
    one = next(one for one in EXAMPLES if one.family == family and name in one.name)
    monkeypatch.setitem(FAMILIES, family, plant(FAMILIES[family]))  # pyright: ignore[reportArgumentType]
    assert measure(one, ()).float64 > 1e3 * FLOAT64.allowed

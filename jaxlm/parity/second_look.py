"""A second look: alarms below float64 about outputs and gradients, judged anew on other rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxlm.parity.compare import LOOKS, Finding, low_and_high, real_tokens
from jaxlm.parity.inputs import Inputs
from jaxlm.parity.tolerances import FLOORS, RATIO
from jaxlm.parity.trace import Arrays, Side
from jaxlm.processes.freed_memory import give_freed_memory_back

AGAIN = ("forward", "gradients")
"""Levels of which an alarm below float64 is judged anew on other rows."""
MOST = 0.9
"""The share of the elements of a tensor that judge it on other rows."""
MAJORITY = LOOKS // 2 + 1
"""So many draws on one side of the bound, and those that are still to come cannot move the middle over it."""


def look_again(
    dtype: str,
    found: Sequence[Finding],
    inputs: Inputs,
    sides: tuple[Side, Side],
    at_one_time: int = 2,
) -> Iterator[Finding]:
    """`found`, with every alarm about an output or a gradient judged anew by the middle of `LOOKS` other draws.

    The error of a few elements, or of many that share a cause, is a matter of luck, and so is the ratio of two. One
    token near a tie is given to other experts by rounding. In a trained model few features have values a hundred times
    those of all others (Sun et al. 2024, "Massive activations"), and the order in which a library adds up decides how
    exact these few are: they rule the norm of an output and of a gradient. What rounds too often is as wrong on other
    rows and in all elements. So a draw is judged by what nine of ten elements keep (`most_elements`). Both its errors
    grow with how sensitive its rows are, tenfold from one draw to another, so the middle is that of their ratios.

    Args:
        at_one_time: so many of float64 and both sides are computed together; each holds the outputs of all modules.
    """
    one_sided = not all(side.mirrors for side in sides)
    suspects = [
        (one.level, one.name) for one in found if one.level in AGAIN and not one.ok and math.isfinite(one.error)
    ]
    if not suspects:
        yield from found
        return
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {suspect: [] for suspect in suspects}
    alarmed = {level: [name for where, name in suspects if where == level] for level in AGAIN}

    def judged(errors: tuple[float, float]) -> tuple[float, float]:
        low, high = low_and_high(errors, one_sided)
        return high, RATIO.allowed * max(low, FLOORS[dtype].allowed)

    for draw in _draws(dtype, inputs, sides, alarmed, at_one_time):
        for level, name in suspects:
            exact, mine, other = (arrays[name] for arrays in draw[level])
            seen[level, name].append((most_elements(mine, exact), most_elements(other, exact)))
        if at_one_time == 1:
            give_freed_memory_back()
        if all(_is_decided(draws, FLOORS[dtype].allowed) for draws in seen.values()):
            break
    for one in found:
        if (one.level, one.name) in seen:
            draws = seen[one.level, one.name]
            # Of two in the middle, the one that is judged worse.
            middle = [(*judged(errors), errors) for errors in _middle(draws, FLOORS[dtype].allowed)]
            high, bound, errors = max(middle, key=lambda one: one[0] / one[1])
            note = f"nine of ten elements, the middle of {len(draws)} other draws"
            yield dataclasses.replace(one, error=high, bound=bound, errors=errors, note=note)
        else:
            yield one


def most_elements(a: np.ndarray, b: np.ndarray) -> float:
    """The error that nine of ten elements keep, relative to the size that nine of ten elements of `b` keep.

    Zeros of `b` are left out: those of an embedding or an expert that no token uses say nothing about the others.
    """
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    used = b != 0
    a, b = (a[used], b[used]) if used.any() else (a, b)
    size, error = (float(np.quantile(np.abs(x), MOST)) for x in (b, a - b))
    return error / size if size else error


def _middle(draws: Sequence[tuple[float, float]], floor: float) -> Sequence[tuple[float, float]]:
    """The one or two draws whose ratio of errors is the median; a draw that is not finite, if there is one."""
    for errors in draws:
        if not all(map(math.isfinite, errors)):
            return [errors]
    ordered = sorted(draws, key=lambda errors: _ratio(errors, floor))
    return ordered[(len(draws) - 1) // 2 : len(draws) // 2 + 1]


def _is_decided(draws: Sequence[tuple[float, float]], floor: float) -> bool:
    """Whether the middle of all `LOOKS` draws lies on a known side of the bound, whatever the others will be."""
    if not all(math.isfinite(error) for errors in draws for error in errors):
        return True
    ratios = [_ratio(errors, floor) for errors in draws]
    above = sum(ratio > RATIO.allowed for ratio in ratios)
    below = sum(ratio < 1 / RATIO.allowed for ratio in ratios)
    return max(above, below, len(ratios) - above - below) >= MAJORITY


def _ratio(errors: tuple[float, float], floor: float) -> float:
    """Ours by the other's, none of them below the floor."""
    return max(errors[0], floor) / max(errors[1], floor)


def _draws(
    dtype: str, inputs: Inputs, sides: tuple[Side, Side], names: Mapping[str, Sequence[str]], at_one_time: int
) -> Iterator[dict[str, list[Arrays]]]:
    """These tensors of each level for other rows: jaxlm's in float64, then those of both sides."""
    wanted = [(sides[0], "float64"), *((side, dtype) for side in sides)]

    def compute(level: str, side: Side, width: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        if level == "gradients":
            gradients = side.gradients(width, rows)
            return {name: gradients[name].copy() for name in names[level]}  # a view would keep the gradients of all
        outputs = side.forward(width, rows)
        return {name: real_tokens(outputs[name], rows) for name in names[level]}

    with ThreadPoolExecutor(min(at_one_time, len(wanted))) as pool:
        for number in range(1, LOOKS + 1):
            rows = inputs.other_rows(number)
            yield {
                level: [*pool.map(lambda one, level=level, rows=rows: compute(level, one[0], one[1], rows), wanted)]
                for level in names
                if names[level]
            }

"""Both sides traced in every dtype, and their traces compared."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxlm import config
from jaxlm.counts.parameters import parameters
from jaxlm.parity.compare import (
    Finding,
    comparable,
    compare_by_ratio,
    compare_exact,
    compare_tokens,
)
from jaxlm.parity.inputs import Inputs
from jaxlm.parity.routing import compare_routing
from jaxlm.parity.second_look import look_again
from jaxlm.parity.trace import DTYPES, LARGE, Side, Trace, on_disk
from jaxlm.processes.freed_memory import give_freed_memory_back

OF_PARAMETERS = ("gradients", "update")
"""Levels with values for every parameter."""
Progress = Callable[[str, str, str], None]
"""Called with the side, the dtype and what begins."""


def compare_sides(
    sides: tuple[Side, Side],
    inputs: Inputs,
    dtypes: Sequence[str] = DTYPES,
    progress: Progress = lambda side, dtype, part: None,
    model: config.Model | None = None,
    seconds: defaultdict[str, float] | None = None,
) -> Iterator[list[Finding]]:
    """The findings of a dtype as soon as they are known: float64 first, each in the order of computation.

    Where the outputs differ, narrower dtypes are left out. A large model is compared in two rounds of all dtypes: first
    its outputs, then what has values for every parameter.

    Args:
        model: of the sides; None: experts are not compared, and the model is not large.
        seconds: the seconds that each part takes are added here.
    """
    seconds = defaultdict(float) if seconds is None else seconds
    if model is None or parameters(model)[0] <= LARGE:
        yield from _compared(sides, inputs, dtypes, progress, model, seconds, len(sides))
        return
    sound = True
    for of_parameters in (False, True):
        levels = tuple(level for level in inputs.levels if (level in OF_PARAMETERS) == of_parameters)
        some = dataclasses.replace(inputs, levels=levels)
        if sound:
            for findings in _compared(sides, some, dtypes, progress, model, seconds, 1):
                sound &= _outputs_agree(findings)
                yield findings


def _compared(
    sides: tuple[Side, Side],
    inputs: Inputs,
    dtypes: Sequence[str],
    progress: Progress,
    model: config.Model | None,
    seconds: defaultdict[str, float],
    at_one_time: int,
) -> Iterator[list[Finding]]:
    """See `compare_sides`; adds to `seconds`. So many sides work at one time, for one of them is often compiling."""
    golden: Trace | None = None
    exact_is_sound = True
    one_sided = not all(side.mirrors for side in sides)

    def trace(side: Side, dtype: str) -> Trace:
        with _timed(side.name, dtype, seconds, progress) as part:
            found = side.trace(dtype, inputs, part)
            if at_one_time == 1:
                found = on_disk(found)
                give_freed_memory_back()
            return found

    # XLA compiles without the interpreter lock, so torch computes meanwhile. float64 comes first, because its trace of
    # our side is the reference of all others.
    with ThreadPoolExecutor(at_one_time) as pool:
        for dtype in ("float64", *(dtype for dtype in dtypes if dtype != "float64")):
            ours, theirs = pool.map(trace, sides, [dtype] * len(sides))
            ours, theirs = comparable(ours, theirs, sides, inputs)
            if golden is None:
                golden = ours
                findings = [*compare_exact(ours, theirs, [side.name for side in sides])]
            else:
                # An alarm below float64 may be one unlucky draw of rows, so it is judged again on other rows; but only
                # if float64 is sound, for otherwise the difference is real.
                findings = [*compare_by_ratio(dtype, golden, ours, theirs, one_sided)]
                if exact_is_sound:
                    findings = [*look_again(dtype, findings, inputs, sides, at_one_time)]
            if model is not None and inputs.wants("routing") and inputs.wants("forward"):
                # Which experts are chosen is compared apart: near a tie, rounding decides, and everything behind such a
                # token differs without a fault.
                exact, mine, other = (trace.levels["forward"] for trace in (golden, ours, theirs))
                findings += compare_routing(dtype, exact, mine, other, model)
            if inputs.wants("generation"):
                findings += compare_tokens(dtype, inputs, sides, (ours, theirs))
            del ours, theirs  # of a large model some gigabytes
            yield findings
            if not _outputs_agree(findings):
                break  # of other mathematics, rounding says nothing
            exact_is_sound &= all(one.ok for one in findings if one.dtype == "float64")


def _outputs_agree(findings: Sequence[Finding]) -> bool:
    return all(one.ok for one in findings if one.level == "forward")


@contextlib.contextmanager
def _timed(side: str, dtype: str, seconds: dict[str, float], progress: Progress) -> Iterator[Callable[[str], None]]:
    """Yield a function to call with the part that begins; it adds the seconds of the part that has ended."""
    # The name and the start of the part at work. The part before the first has no name, and its seconds are dropped at
    # the end.
    now: list[Any] = ["", time.monotonic()]

    def part(name: str) -> None:
        seconds[f"{side}, {now[0]}"] += time.monotonic() - now[1]
        now[:] = name, time.monotonic()
        if name:
            progress(side, dtype, name)

    yield part
    part("")
    seconds.pop(f"{side}, ", None)

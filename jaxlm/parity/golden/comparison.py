"""A model held against the content of a golden file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.parity.compare import Finding, compare_by_ratio, compare_tokens, relative
from jaxlm.parity.golden.content import DRAWS, Progress, digest, frozen_options, tail_of, typical_errors
from jaxlm.parity.golden.file import Golden
from jaxlm.parity.golden.projection import Sketch, relative_distance, sketch
from jaxlm.parity.inputs import Inputs
from jaxlm.parity.tolerances import FLOAT64, FLOORS, RATIO, ZERO_GRADIENT
from jaxlm.parity.trace import Arrays, Side, Trace

STORED = "stored"
"""The dtype, in a report, of what is not computed."""


def compare(
    golden: Golden, side: Side, settings: config.Config, progress: Progress = lambda dtype, part: None
) -> list[Finding]:
    """All findings: options and weights, then float64, then each narrower dtype in the order of computation.

    Nothing is computed with weights of other names or shapes.
    """
    findings = [
        *_compare_options(golden.config, frozen_options(settings)),
        *_compare_weights(golden.weights, side.weights()),
    ]
    if any(one.level == "weights" and math.isinf(one.error) for one in findings):
        return findings
    inputs = golden.shown.inputs()
    exact: Trace | None = None
    for dtype in golden.dtypes:
        # float64 comes first in the file too; its trace of today is what narrower dtypes are measured against.
        now = side.trace(dtype, inputs, lambda part, dtype=dtype: progress(dtype, part))
        if exact is None:
            exact = now
            findings += _compare_exact(golden, now)
        else:
            found = [*_compare_narrow(dtype, golden, exact, now)]
            findings += _look_again(dtype, found, golden, side, inputs)
        then = Trace({}, [list(row) for row in golden.tokens[dtype]], {})
        findings += compare_tokens(dtype, inputs, (side, side), (then, now))
    progress("", "")
    return findings


def _compare_options(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Finding]:
    """Options that both versions of jaxlm know."""
    changed = [name for name in then if name in now and now[name] != then[name]]
    for name in changed:
        note = f"{then[name]!r} in the golden file, {now[name]!r} now"
        yield Finding(STORED, "config", name, math.inf, 0.0, note=note)
    if not changed:
        yield Finding(STORED, "config", "all options", 0.0, 0.0, note=f"{len(then)} options")


def _compare_weights(then: Mapping[str, tuple[str, Sketch]], now: Arrays) -> Iterator[Finding]:
    for name in dict.fromkeys([*then, *now]):
        if note := _unlike(name, {key: one for key, (_, one) in then.items()}, now):
            yield Finding(STORED, "weights", name, math.inf, 0.0, note=note)
            continue
        sha256, before = then[name]
        same = digest(now[name]) == sha256
        # the smallest number that is not 0, where a change is too small for the estimate
        error = 0.0 if same else max(relative_distance(before, sketch(now[name])), 2.0**-1074)
        yield Finding(STORED, "weights", name, error, 0.0)


def _compare_exact(golden: Golden, now: Trace) -> Iterator[Finding]:
    """Every tensor of float64 by its sketch; gradients that are nothing but rounding as in `compare.compare_exact`."""
    # Gradients that are zero in exact arithmetic hold rounding alone, and their relative error is of order 1. They are
    # measured against all gradients together, and their updates are left out, since AdamW blows noise up to full size.
    norms = {name: one.norm for name, one in golden.levels["gradients"].items()}
    everything = math.hypot(*norms.values())
    noise = {name for name, norm in norms.items() if norm <= ZERO_GRADIENT.allowed * everything}
    bound = FLOAT64.allowed
    for level, then in golden.levels.items():
        arrays = now.levels.get(level, {})
        for name in dict.fromkeys([*then, *arrays]):
            if level.startswith("update") and name in noise:
                continue
            if note := _unlike(name, then, arrays):
                yield Finding("float64", level, name, math.inf, bound, note=note)
                continue
            # The sketch estimates the length of a difference, and the estimate is never wrong by orders of magnitude:
            # see `projection`.
            scale = everything if level == "gradients" and name in noise else 0.0
            yield Finding("float64", level, name, relative_distance(then[name], sketch(arrays[name]), scale), bound)
        if level == "forward" and "logits" in arrays:
            yield Finding("float64", level, "logits, tail", relative(tail_of(now), np.array(golden.tail)), bound)


def _compare_narrow(dtype: str, golden: Golden, exact: Trace, now: Trace) -> Iterator[Finding]:
    """How far each tensor lies from float64, against twice as far as it lay when the file was written."""
    # Both places hold the trace of today: the file has no arrays of the past, only how far they lay from float64, and
    # that is the bound.
    found = {(one.level, one.name): one for one in compare_by_ratio(dtype, exact, now, now)}
    for level, names in golden.bounds[dtype].items():
        for name, bound in names.items():
            if one := found.get((level, name)):
                yield Finding(dtype, level, name, one.error, bound)
            else:
                yield Finding(dtype, level, name, math.inf, bound, note="only in the golden file")


def _look_again(dtype: str, found: Sequence[Finding], golden: Golden, side: Side, inputs: Inputs) -> Iterator[Finding]:
    """`found`, with every alarm about a gradient judged anew by its median error; see `second_look`."""
    # The median over several draws of rows is stable where one draw is not; the file holds the medians of its own time.
    suspects = [one.name for one in found if one.level == "gradients" and not one.ok and math.isfinite(one.error)]
    medians = typical_errors(side, inputs, [dtype], suspects)[dtype] if suspects else {}
    for one in found:
        if one.level == "gradients" and one.name in medians:
            bound = RATIO.allowed * max(golden.typical[dtype][one.name], FLOORS[dtype].allowed)
            note = f"median of {DRAWS} other draws"
            yield dataclasses.replace(one, error=medians[one.name], bound=bound, note=note)
        else:
            yield one


def explanations_of(findings: Sequence[Finding]) -> tuple[str, ...]:
    """Whether the weights or the computation have changed, in words."""
    wrong = {one.level for one in findings if not one.ok}
    if not wrong:
        return ()
    if "weights" in wrong:
        return ("the weights have changed, and so has what is computed with them",)
    return ("the weights are those of the golden file, the computation has changed",)


def _unlike(name: str, then: Mapping[str, Sketch], now: Mapping[str, np.ndarray]) -> str:
    if name not in then or name not in now:
        return f"only {'in the golden file' if name in then else 'now'}"
    if then[name].shape == now[name].shape:
        return ""
    return f"shape {list(then[name].shape)} in the golden file, {list(now[name].shape)} now"

"""Two traces to findings: every tensor with its error, its bound and whether it keeps it.

float64 is judged first and strictly: different mathematics shows, rounding does not. float32 and bfloat16 are judged by
ratio against the float64 trace of jaxlm: the larger error is at most twice the smaller one, of which one below the
floor counts as the floor (`tolerances`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxlm import config
from jaxlm.convert.settings import function_of
from jaxlm.parity.inputs import Inputs
from jaxlm.parity.tolerances import FLOAT64, FLOORS, PARAMETER_ROUNDING, RATIO, ZERO_GRADIENT
from jaxlm.parity.trace import Arrays, Side, Trace

Array = Shaped[np.ndarray, "..."]

STORED = "stored"
"""The dtype of findings about config and weights: whatever they are stored in."""
GENERATION = "generation"
"""The level of the greedy tokens."""
LOOKS = 16
"""Draws by which an alarm below float64 is confirmed: other rows, or texts that end earlier."""
ALL = "median of all parameters"
"""The name of a finding about all tensors of a level together."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One comparison."""

    dtype: str
    level: str
    name: str
    error: float
    """float64: of one framework against the other, relative. Else: the larger error of the two against float64."""
    bound: float
    cosine: float | None = None
    """1 - cos of the angle, for gradients and updates, of the framework with the larger error. It is only reported."""
    errors: tuple[float, float] | None = None
    """Below float64: the errors of both, in the order in which the sides were given."""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is a number within the bound."""
        return self.error <= self.bound

    @property
    def share(self) -> float:
        """Error by bound; 1 is the limit."""
        if math.isnan(self.error):
            return math.inf
        return self.error / self.bound if self.bound else (math.inf if self.error else 0.0)


def compare_exact(ours: Trace, theirs: Trace, names: Sequence[str]) -> Iterator[Finding]:
    """Every tensor of two float64 traces, level by level in the order of computation; `names` of the sides."""
    noise = zero_gradients(ours)
    for level, order in _orders(ours, theirs).items():
        mine, other = ours.levels[level], theirs.levels[level]
        everything = _norm(mine.values()) if level == "gradients" else 0.0
        for name in order:
            if level.startswith("update") and name in noise:
                continue
            if name not in mine or name not in other or mine[name].shape != other[name].shape:
                yield Finding("float64", level, name, math.inf, FLOAT64.allowed, note=_unlike(name, mine, other, names))
                continue
            scale = everything if name in noise else 0.0
            angle = None if level in ("forward", "loss") or name in noise else cosine(other[name], mine[name])
            yield Finding(
                "float64", level, name, relative(other[name], mine[name], scale), FLOAT64.allowed, cosine=angle
            )


def compare_config(ours: config.Model, theirs: config.Model, names: Sequence[str]) -> Iterator[Finding]:
    """Every option that decides the function of a model, if it differs; one finding for all if none does."""
    mine, other = function_of(ours), function_of(theirs)
    keys = [*dict.fromkeys([*mine, *other])]
    found: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        if mine.get(key) != other.get(key):
            values = ", ".join(
                f"{options.get(key)!r} in {name}" for options, name in zip((mine, other), names, strict=True)
            )
            parts = key.split(".", 2)
            layer, option = (parts[1], parts[2]) if parts[0] == "layers" else ("", key)
            found.setdefault((option, values), []).append(layer)
    for (option, values), layers in found.items():
        some = "" if len(layers) == ours.n_layers or not layers[0] else f" of layers {', '.join(layers)}"
        yield Finding(STORED, "config", option + some, math.inf, 0.0, note=values)
    if not found:
        yield Finding(STORED, "config", "all options", 0.0, 0.0, note=f"{len(keys)} options")


def compare_weights(ours: Arrays, theirs: Arrays, names: Sequence[str]) -> Iterator[Finding]:
    """Every stored tensor by the names of torch_ref: equal, or rounded once where the sides store another dtype."""
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            yield Finding(STORED, "weights", name, math.inf, 0.0, note=_unlike(name, ours, theirs, names))
            continue
        mine, other = ours[name], theirs[name]
        narrow = max((mine.dtype, other.dtype), key=lambda dtype: float(jnp.finfo(dtype).eps))
        bound = 0.0 if mine.dtype == other.dtype else float(jnp.finfo(narrow).eps) / 2
        note = "" if mine.dtype == other.dtype else f"{mine.dtype} in {names[0]}, {other.dtype} in {names[1]}"
        yield Finding(STORED, "weights", name, relative(other, mine), bound, note=note)


def comparable(ours: Trace, theirs: Trace, sides: tuple[Side, Side], inputs: Inputs) -> tuple[Trace, Trace]:
    """Both traces as far as a side that is no mirror can be compared: modules that both have, at real tokens."""
    if all(side.mirrors for side in sides) or "forward" not in ours.levels:
        return ours, theirs
    found = [trace.levels["forward"] for trace in (ours, theirs)]
    shared = [name for name in found[0] if name in found[1]]
    forwards = ({name: real_tokens(outputs[name], inputs.rows) for name in shared} for outputs in found)
    mine, other = (
        dataclasses.replace(trace, levels={**trace.levels, "forward": forward})
        for trace, forward in zip((ours, theirs), forwards, strict=True)
    )
    return mine, other


def real_tokens(x: Array, rows: Mapping[str, np.ndarray]) -> Array:
    """What was computed for tokens that are no padding, [N, ...] of [B, T, ...]; anything else as it is."""
    real = rows["segments"] > 0
    return x[real] if x.shape[:2] == real.shape else x


def compare_by_ratio(
    dtype: str, golden: Trace, ours: Trace, theirs: Trace, one_sided: bool = False
) -> Iterator[Finding]:
    """Tensors of two traces in `dtype` against the float64 trace; what float64 could not compare is left out.

    `one_sided`: the other side may round as it likes, and only ours is judged.

    Updates are judged by the median over the elements of all tensors. AdamW gives an element with a tiny gradient a
    full-size update whose sign depends on rounding, and such elements rule every norm: the ratio of two would be luck.
    """
    noise, floor = zero_gradients(golden), FLOORS[dtype].allowed
    for level, order in _orders(golden, theirs).items():
        traces = [trace.levels[level] for trace in (golden, ours, theirs)]
        shared = [name for name in order if all(name in one for one in traces)]
        shared = [name for name in shared if len({one[name].shape for one in traces}) == 1]
        exact, mine, other = ({name: one[name] for name in shared} for one in traces)
        everything = _norm(exact.values()) if level == "gradients" else 0.0
        if level.startswith("update"):
            kept = [name for name in shared if name not in noise]
            if kept:
                updates = [[one[name] for name in kept] for one in (exact, mine, other)]
                steps = int(level.removeprefix("update "))
                weights = [golden.weights[name] for name in kept]
                yield _typical(dtype, level, updates, weights, steps, floor, one_sided)
            continue
        for name in shared:
            scale = everything if name in noise else 0.0
            angle = level == "gradients" and name not in noise
            values = exact[name], mine[name], other[name]
            yield _by_ratio(dtype, level, name, values, floor, one_sided, scale, angle)


def compare_tokens(
    dtype: str, inputs: Inputs, sides: tuple[Side, Side], traces: tuple[Trace, Trace]
) -> Iterator[Finding]:
    """The greedy tokens of each prompt: equal in float64; below, they may part where two tokens are nearly as likely.

    The bound is then how far the logits of both frameworks lie from float64 there, the error the float64 margin between
    the two tokens. A margin beyond that is judged anew by the largest of several draws, the texts that end some tokens
    earlier: where a token is near a tie of experts, one draw says little. What follows is another text and is not
    compared.
    """

    def reach(ids: list[int], exact: np.ndarray) -> float:
        return sum(float(np.max(np.abs(side.next_logits(dtype, ids) - exact))) for side in sides)

    for row, (prompt, mine, other) in enumerate(zip(inputs.prompts, traces[0].tokens, traces[1].tokens, strict=True)):
        name = f"prompt {row + 1}"
        if mine == other:
            yield Finding(dtype, GENERATION, name, 0.0, 0.0, note=f"{len(mine)} tokens")
            continue
        at = next((i for i, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), None)
        if dtype == "float64" or at is None:
            note = "of another length" if at is None else f"parts at token {at + 1}"
            yield Finding(dtype, GENERATION, name, math.inf, 0.0, note=note)
            continue
        ids = [*prompt, *mine[:at]]
        exact = sides[0].next_logits("float64", ids)
        margin = float(abs(exact[mine[at]] - exact[other[at]]))
        bound, note = reach(ids, exact), f"parts at token {at + 1}, margin of the logits"
        if margin > bound:
            shorter = [ids[:-less] for less in range(1, min(LOOKS, len(ids) - 1) + 1)]
            bound = max([bound, *(reach(one, sides[0].next_logits("float64", one)) for one in shorter)])
            note += f", bound of {len(shorter) + 1} draws"
        yield Finding(dtype, GENERATION, name, margin, bound, note=note)


def zero_gradients(trace: Trace) -> set[str]:
    """Parameters whose gradient is nothing but rounding; see `tolerances.ZERO_GRADIENT`."""
    gradients = trace.levels.get("gradients", {})
    limit = ZERO_GRADIENT.allowed * _norm(gradients.values())
    return {name for name, gradient in gradients.items() if _norm([gradient]) <= limit}


def relative(a: Array, b: Array, scale: float = 0.0) -> float:
    """Norm of the difference relative to that of `b`, or to `scale` when it is given."""
    a, b = _wide(a), _wide(b)
    size = scale or float(np.linalg.norm(b))
    difference = float(np.linalg.norm(a - b))
    return difference / size if size else difference


def cosine(a: Array, b: Array) -> float:
    """1 - cos of the angle between two tensors, from the difference of their unit vectors: exact near zero."""
    a, b = _wide(a), _wide(b)
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if 0.0 in lengths:
        return 0.0 if lengths[0] == lengths[1] else 1.0
    return float(np.sum((a / lengths[0] - b / lengths[1]) ** 2)) / 2


def _by_ratio(
    dtype: str,
    level: str,
    name: str,
    values: tuple[Array, Array, Array],
    floor: float,
    one_sided: bool,
    scale: float = 0.0,
    angle: bool = False,
) -> Finding:
    exact, mine, other = values
    errors = relative(mine, exact, scale), relative(other, exact, scale)
    low, high = low_and_high(errors, one_sided)
    worse = mine if one_sided or errors[0] >= errors[1] else other
    bound = RATIO.allowed * max(low, floor)
    return Finding(dtype, level, name, high, bound, cosine(worse, exact) if angle else None, errors)


def low_and_high(errors: tuple[float, float], one_sided: bool) -> tuple[float, float]:
    """The error that bounds and the error that is judged, of ours and theirs: the larger of the two, or ours."""
    if any(map(math.isnan, errors)):
        return math.nan, math.nan
    return (errors[1], errors[0]) if one_sided else (min(errors), max(errors))


def _typical(
    dtype: str,
    level: str,
    updates: Sequence[Sequence[Array]],
    weights: Sequence[Array],
    steps: int,
    floor: float,
    one_sided: bool,
) -> Finding:
    """The median error of an element of an update, relative to the median size of one; `updates`: exact, ours, theirs.

    An update is the difference of two float32 parameters, so it is never more exact than they are.
    """
    exact, mine, other = updates
    moved = [_wide(array) != 0 for array in exact]
    if not any(mask.any() for mask in moved):
        moved = [np.ones_like(mask) for mask in moved]

    def typical(arrays: Iterable[np.ndarray]) -> float:
        return float(np.median(np.concatenate([np.abs(a[mask]) for a, mask in zip(arrays, moved, strict=True)])))

    def error(arrays: Sequence[Array]) -> float:
        return typical(_wide(a) - _wide(b) for a, b in zip(arrays, exact, strict=True)) / size

    size = typical(map(_wide, exact)) or 1.0
    errors = error(mine), error(other)
    low, high = low_and_high(errors, one_sided)
    weight = typical(map(_wide, weights))
    rounding = steps * PARAMETER_ROUNDING.allowed * weight / size
    return Finding(dtype, level, ALL, high, RATIO.allowed * max(low, floor, rounding), errors=errors)


def _orders(ours: Trace, theirs: Trace) -> dict[str, list[str]]:
    """The names of each level in the order of computation: gradients flow from the last module to the first.

    What a router chose (`#`) is for `compare_routing`. The order of modules is that of the other side.
    """
    place = {name: index for index, name in enumerate(theirs.levels.get("forward", ()))}
    orders = {}
    for level in ours.levels:
        names = [name for name in dict.fromkeys([*theirs.levels[level], *ours.levels[level]]) if "#" not in name]
        if level not in ("forward", "loss"):
            names.sort(key=lambda name: place.get(name.rpartition(".")[0], len(place)), reverse=level == "gradients")
        orders[level] = names
    return orders


def _unlike(name: str, mine: Arrays, other: Arrays, names: Sequence[str]) -> str:
    if name in mine and name in other:
        return f"shape {list(mine[name].shape)} in {names[0]}, {list(other[name].shape)} in {names[1]}"
    return f"only in {names[0] if name in mine else names[1]}"


def _norm(arrays: Iterable[Array]) -> float:
    return math.sqrt(sum(float(np.sum(_wide(array) ** 2)) for array in arrays))


def _wide(array: Array) -> np.ndarray:
    return np.asarray(array, np.float64).ravel()


def cell_text(finding: Finding) -> str:
    """Error and bound, or the note about options and tokens."""
    if finding.level == "config":
        return finding.note if finding.ok else f"{finding.name}: {finding.note}"
    if finding.level != GENERATION:
        return f"{finding.error:.1e} {'≤' if finding.ok else '>'} {finding.bound:.1e}"
    if finding.ok and finding.error:
        return "near tie: " + finding.note.partition(",")[0]
    return ("equal" if finding.ok else "differ") + f": {finding.note}"

"""How one tensor was made of another: transposed, reordered, scaled, shifted, rounded. Arrays are float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

NARROW = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
FLOAT32 = 2**-23
"""What one operation in float32 may leave: a scale or a shift was seldom made in float64."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """What an axis of a tensor is made of."""

    unit: str
    """What one entry is: row, expert, tap, ..."""
    block: int = 0
    """Entries of one head, 0 where the axis has no heads."""
    rotated: int = 0
    """Leading entries of a head that are rotated."""


def relation(mine: np.ndarray, theirs: np.ndarray, axes: Sequence[Axis]) -> str | None:
    """What was done to `mine` to make `theirs`, in words that follow the name of the tensor; None: nothing known."""
    if theirs.size and np.all(theirs == theirs.flat[0]) and not np.all(mine == mine.flat[0]):
        return f"{'all ' if theirs.size > 1 else ''}{theirs.flat[0]:g}: never loaded, or left out"
    # Cheap and exact relations first: an order of entries is compared bit for bit, a scale or shift only up to float32.
    # A relation after rounding is tried last, for rounding makes more things look alike.
    if theirs.shape == mine.shape:
        if what := rounding(mine, theirs):
            return what
        if what := _moved(mine, theirs, axes) or _elementwise(mine, theirs):
            return what
        for dtype in NARROW:
            narrow = _narrow(mine, dtype)
            # Rounding is an explanation only if it changes ours and leaves theirs: otherwise every tensor that happens
            # to be narrow would fit.
            changed = not np.array_equal(narrow, mine) and np.array_equal(_narrow(theirs, dtype), theirs)
            if changed and (what := _moved(narrow, theirs, axes)):
                return f"{what}, and rounded to {dtype}"
        return None
    return _other_shape(mine, theirs)


def rounding(mine: np.ndarray, theirs: np.ndarray) -> str | None:
    """Whether one is the other in a narrower dtype."""
    for dtype in ("float32", "float16", "bfloat16"):
        if np.array_equal(_narrow(mine, dtype), theirs):
            return f"rounded to {dtype}"
        if np.array_equal(_narrow(theirs, dtype), mine):
            return f"wider: ours is rounded to {dtype}"
    # bfloat16 is the upper half of float32. Who copies the upper half instead of rounding is off by up to one unit,
    # always towards zero.
    bits = mine.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    if np.array_equal(bits.view(np.float32), theirs):
        return "cut off to bfloat16 instead of rounded"
    return None


def _narrow(x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(NARROW[dtype]).astype(np.float64)


def _other_shape(mine: np.ndarray, theirs: np.ndarray) -> str | None:
    if theirs.shape == mine.shape[::-1] and np.array_equal(theirs, mine.T):
        return "transposed"
    if theirs.ndim == mine.ndim and theirs.shape[1:] == mine.shape[1:]:
        # A vocabulary that was padded to a round number, or cut back, on one side.
        shared = min(len(mine), len(theirs))
        if np.array_equal(mine[:shared], theirs[:shared]):
            more = len(theirs) - len(mine)
            return f"{'longer' if more > 0 else 'shorter'} by {abs(more)} rows, the others being equal"
    return None


def _moved(mine: np.ndarray, theirs: np.ndarray, axes: Sequence[Axis]) -> str | None:
    """Transposed, or entries of an axis in another order."""
    if mine.ndim >= 2:
        turned = mine.swapaxes(-1, -2)
        if turned.shape == theirs.shape and np.array_equal(turned, theirs):
            return "transposed"
        if np.array_equal(turned.reshape(theirs.shape), theirs):
            return "transposed, and read in the old shape"
        # A square matrix has the old shape after a transpose, so the reshaped forms say nothing new there.
        if mine.shape[-1] != mine.shape[-2] and np.array_equal(mine.reshape(turned.shape).swapaxes(-1, -2), theirs):
            return "transposed, and read in the old shape"
    for number, axis in enumerate(axes):
        # The axis moves to the front, so that an entry of it is a row and rows can be looked up by their bytes.
        take = source(np.moveaxis(mine, number, 0), np.moveaxis(theirs, number, 0))
        if take is not None:
            return order(take, axis)
    return None


def source(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray | None:
    """The entry of `mine` that each entry of `theirs` along the first axis is; None where one is not there."""
    # By bytes and not by distance: an order is an exact relation, and a table of bytes finds it in linear time.
    places: dict[bytes, list[int]] = {}
    for index, row in enumerate(mine):
        places.setdefault(np.ascontiguousarray(row).tobytes(), []).append(index)
    take, seen = [], dict.fromkeys(places, 0)
    for row in theirs:
        key = np.ascontiguousarray(row).tobytes()
        if key not in places:
            return None
        same = places[key]
        take.append(same[seen[key] % len(same)])  # equal entries in turn
        seen[key] += 1
    return np.array(take)


def order(take: np.ndarray, axis: Axis) -> str:
    """An order of entries in words; entry i is `take[i]` of ours."""
    n, heads = len(take), axis.block
    # An entry that occurs twice displaces another: heads that were repeated to match the number of query heads are the
    # common case.
    if len(set(take.tolist())) < n:
        return f"{_heads(take, heads)} are repeated and others missing: {_first(_blocks(take, heads))}"
    if np.array_equal(take, np.arange(n)[::-1]):
        return f"reversed: the {axis.unit}s run the other way"
    if heads and axis.rotated:
        # The two layouts of rotary pairs are orders within each head; the rest of a head that is not rotated stays.
        for name, one in _layouts(heads, axis.rotated):
            if np.array_equal(take, (np.arange(0, n, heads)[:, None] + one).ravel()):
                return f"in the order of {name} rotary pairs"
    # The largest blocks that stay together name the order in the fewest words: heads, halves, groups of heads.
    size = _block(take)
    size = heads if heads and size % heads == 0 else size
    blocks = take[::size] // size
    if len(blocks) == 2 and size != heads:
        return f"with its halves along the {axis.unit}s swapped"
    unit = axis.unit if size == 1 else "head" if size == heads else f"block of {size} {axis.unit}"
    # [groups, each] read as [each, groups]: a reshape with two axes exchanged, as of grouped queries.
    for groups in range(2, len(blocks)):
        each, left = divmod(len(blocks), groups)
        if not left and np.array_equal(np.arange(len(blocks)).reshape(groups, each).T.ravel(), blocks):
            return f"regrouped: {unit}s ({groups}, {each}) in the order ({each}, {groups})"
    return f"with {unit}s in another order: {_first(blocks)}"


def _heads(take: np.ndarray, heads: int) -> str:
    return "heads" if _whole(take, heads) else "entries"


def _whole(take: np.ndarray, size: int) -> bool:
    if size < 1 or len(take) % size:
        return False
    return bool(
        np.array_equal(take, (take[::size, None] + np.arange(size)).ravel()) and np.all(take[::size] % size == 0)
    )


def _blocks(take: np.ndarray, heads: int) -> np.ndarray:
    return take[::heads] // heads if _whole(take, heads) else take


def _block(take: np.ndarray) -> int:
    """The size of the largest blocks that stay together."""
    return next(size for size in range(len(take) // 2, 0, -1) if _whole(take, size))


def _layouts(heads: int, rotated: int) -> Iterator[tuple[str, np.ndarray]]:
    rest = np.arange(rotated, heads)
    yield "half (i, i + H/2)", np.concatenate([np.arange(rotated).reshape(-1, 2).T.ravel(), rest])
    yield "interleaved (2i, 2i + 1)", np.concatenate([np.arange(rotated).reshape(2, -1).T.ravel(), rest])


def _first(numbers: np.ndarray) -> str:
    shown = ", ".join(str(number) for number in numbers[:8].tolist())
    return shown + (", ..." if len(numbers) > 8 else "")


FUNCTIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "-exp of ours": lambda x: -np.exp(x),
    "exp of ours": np.exp,
    "log of ours": np.log,
    "log of minus ours": lambda x: np.log(-x),
    "softplus of ours": lambda x: np.logaddexp(x, 0),
    "the inverse softplus of ours": lambda x: x + np.log(-np.expm1(-x)),
    "the inverse of ours": lambda x: 1 / x,
}


def _elementwise(mine: np.ndarray, theirs: np.ndarray) -> str | None:
    """A function of each element, exact but for one operation in float32."""
    size = float(np.linalg.norm(theirs.ravel()))
    if not size or not np.isfinite(size) or mine.size < 2:
        return None
    # A shift is the mean difference if all differences lie near it. One operation in float32 may have made it, so its
    # spread may be one rounding of the largest value.
    shift = float(np.mean(theirs - mine))
    spread = float(np.max(np.abs(theirs - mine - shift)))
    reach = float(np.max(np.abs(theirs)) + np.max(np.abs(mine)))
    if spread <= FLOAT32 * reach and abs(shift) > 4 * FLOAT32 * reach:
        near = round(shift)
        if near and abs(shift - near) <= FLOAT32 * reach:
            return f"{'larger' if near > 0 else 'smaller'} by {abs(near)}: the scale of a norm is (1 + w) on one side"
        return f"larger by {shift:.6g} in every element"
    # The scale by least squares; a relation only if what it leaves is one rounding, and if it is not 1.
    factor = float(np.sum(theirs * mine) / np.sum(mine * mine))
    left = float(np.linalg.norm((theirs - factor * mine).ravel())) / size
    if left <= FLOAT32 and abs(factor - 1) > max(4 * left, 1e-15):
        return "of the other sign" if abs(factor + 1) <= 4 * FLOAT32 else f"{_factor(factor, mine.shape)} times ours"
    with np.errstate(all="ignore"):
        for what, function in FUNCTIONS.items():
            made = function(mine)
            if np.all(np.isfinite(made)) and float(np.linalg.norm((made - theirs).ravel())) <= 8 * FLOAT32 * size:
                return what
    return None


def _factor(factor: float, shape: tuple[int, ...]) -> str:
    for width in dict.fromkeys(shape):
        for value, name in ((math.sqrt(width), f"sqrt({width})"), (1 / math.sqrt(width), f"1 / sqrt({width})")):
            if math.isclose(factor, value, rel_tol=1e-6):
                return f"{factor:.6g} = {name}"
    return f"{factor:.8g}"

"""What is kept of a tensor so that a later one can be compared with it: its norm and K = 16 random projections.

The entries of the projection matrix S are independent, of mean 0 and variance V, so |S d|^2 / (K V) has the expectation
|d|^2 whatever d is: from S x then and S x now, the length of the difference x now - x then is estimated without x then
(Johnson & Lindenstrauss 1984; Achlioptas 2003 for entries that are no Gaussians). The square of estimate by truth is
distributed like chi-square with K degrees of freedom over K: with 16 it lies between 0.25 and 2.5 in 998 of 1000 cases.
So against a bound of 1e-10 an error of 1e-9 goes unseen with probability 4e-14, one of 3e-10 with 4e-6; and what
rounding leaves, 1e-14, is never taken for 1e-10.

An entry is the number of ones among 8 random bits, less 4: an integer, the same on any machine and with any version of
numpy, whose bit generators are frozen where its distributions are not. A difference in a single element goes unseen
when all its entries are 0, which happens once in 10^9.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8, Shaped

PROJECTIONS = 16
VARIANCE = 2.0
CHUNK = 1 << 13
SEED = 0x6A61786C6D
_KEPT = 256  # chunks of the matrix: 32 MB

_ONES = np.array([bin(byte).count("1") - 4 for byte in range(256)], np.int8)


class Sketch(NamedTuple):
    """The shape and norm of a tensor and its projections; or its elements, when they are no more than that."""

    shape: tuple[int, ...]
    norm: float
    values: tuple[float, ...]


def sketch(x: Shaped[np.ndarray, "..."]) -> Sketch:
    """The sketch of a tensor, in float64."""
    # A tensor of no more elements than projections is kept whole: that is smaller and exact.
    wide = np.asarray(x, np.float64).ravel()
    if wide.size <= PROJECTIONS:
        return Sketch(x.shape, float(np.linalg.norm(wide)), tuple(wide.tolist()))
    # The matrix is made chunk by chunk, each from its own counter of the bit generator. So memory is bounded, and a
    # chunk does not depend on the length of the tensor.
    values = np.zeros(PROJECTIONS)
    for number, start in enumerate(range(0, wide.size, CHUNK)):
        part = wide[start : start + CHUNK]
        columns = _matrix(number)[:, : part.size].astype(np.float64)
        values += np.einsum("kc,c->k", columns, part)  # not by BLAS, whose threads cost more than they bring here
    return Sketch(x.shape, float(np.linalg.norm(wide)), tuple(values.tolist()))


def distance(then: Sketch, now: Sketch) -> float:
    """The estimated norm of the difference of two tensors of one shape."""
    length = math.dist(then.values, now.values)
    return length if math.prod(then.shape) <= PROJECTIONS else length / math.sqrt(PROJECTIONS * VARIANCE)


def relative_distance(then: Sketch, now: Sketch, scale: float = 0.0) -> float:
    """The same relative to the norm of `then`, or to `scale` when it is given."""
    size = scale or then.norm
    return distance(then, now) / size if size else distance(then, now)


@functools.lru_cache(maxsize=_KEPT)
def _matrix(number: int) -> Int8[np.ndarray, "k c"]:
    """The columns of S for the elements of one chunk."""
    # Raw bits, read as bytes in a fixed order: the same matrix on machines of either byte order.
    words = np.random.Philox(key=np.array([SEED, number], np.uint64)).random_raw(PROJECTIONS * CHUNK // 8)
    return _ONES[words.astype("<u8").view(np.uint8)].reshape(PROJECTIONS, CHUNK)

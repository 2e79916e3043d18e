"""Tensors from one place to another without holding the model: a few threads, a few megabytes at a time.

What a thread writes it has checked, hashed and written while it lay in the processor's cache. Sources are mapped files,
whose pages are handed back as soon as they are used, so the memory in use stays small whatever the model's size.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np

from jaxlm.errors import UserError

CHUNK = 4 << 20
"""Bytes that a thread handles at a time."""
SLACK = 32 << 20
"""Bytes that tensors may take in memory besides two of the largest one."""
THREADS = min(4, os.cpu_count() or 1)
EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80_0000, "float64": 0x7FF0_0000_0000_0000}
"""The bits that are all set in what is no finite number."""


class Planned(NamedTuple):
    """A tensor that is yet to be made."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray]
    """A view where nothing needs to be copied."""
    origin: str = ""
    """Which stored tensor it comes from, unchecked: its values must turn out finite. Empty: any values will do."""
    settle: Callable[[np.ndarray, str], object] = lambda made, digest: None
    """Called with the values made and their sha256; compares the source, often the same values, with a manifest."""
    source: str = ""
    """Tensors of one source are made one after the other, so that the source need not stay in memory."""

    @property
    def nbytes(self) -> int:
        """Of the values."""
        return int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize


class Target(NamedTuple):
    """A tensor and its place in an open file."""

    tensor: Planned
    file: int
    offset: int


def write(targets: Sequence[Target], report: Callable[[int], object]) -> dict[str, str]:
    """Write every tensor to its place, several at once; returns the sha256 of each by name.

    Of made tensors and what they are made from, at most two of the largest and `SLACK` are in memory together.

    Args:
        report: called with the bytes of each tensor that is written, in this thread.

    Raises:
        UserError: a value is NaN or infinite. Whatever `make` and `settle` raise ends the writing, and so does Ctrl-C.
    """
    budget = _Budget(2 * max((target.tensor.nbytes for target in targets), default=0) + SLACK)
    stop, digests = threading.Event(), {}
    locks = {target.file: threading.Lock() for target in targets}
    sources = dict.fromkeys(target.tensor.source for target in targets)
    with ThreadPoolExecutor(THREADS) as pool:
        for source in sources:
            waiting = {
                pool.submit(_write_one, target, budget, locks, stop): target.tensor
                for target in targets
                if target.tensor.source == source
            }
            try:
                for done in as_completed(waiting):
                    digests[waiting[done].name] = done.result()
                    report(waiting[done].nbytes)
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    return digests


def _write_one(target: Target, budget: _Budget, locks: Mapping[int, threading.Lock], stop: threading.Event) -> str:
    """Write a tensor chunk by chunk; returns its sha256."""
    tensor, offset = target.tensor, target.offset
    needed = 2 * tensor.nbytes  # what it is made from and what is made of it
    digest = hashlib.sha256()
    budget.take(needed)
    try:
        array = tensor.make()
        if (array.shape, array.dtype.name) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{tensor.name} is {array.dtype} {array.shape}, planned {tensor.dtype} {tensor.shape}")
        kept = 0 if mapping(array) is not None and array.flags.c_contiguous else tensor.nbytes
        budget.give(needed - kept)
        needed = kept
        for chunk in chunks(array):
            if stop.is_set():
                break
            part = fetched(chunk)
            if tensor.origin and not all_finite(part.view(chunk.dtype)):
                raise UserError(f"{tensor.origin} is NaN or infinite somewhere", "was its training sound?")
            digest.update(part.data)
            with locks[target.file]:  # the system writes one at a time, and waits for its turn at full speed
                _write_at(target.file, part, offset)
            offset += part.nbytes
        else:
            tensor.settle(array, digest.hexdigest())
    finally:
        budget.give(needed)
    return digest.hexdigest()


def _write_at(file: int, part: np.ndarray, offset: int) -> None:
    data = part.reshape(-1).view(np.uint8).data
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


class _Budget:
    """Bytes that threads may hold together; one thread always gets what it asks for."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._free = limit, 0, threading.Condition()

    def take(self, size: int) -> None:
        with self._free:
            self._free.wait_for(lambda: not self._used or self._used + size <= self._limit)
            self._used += size

    def give(self, size: int) -> None:
        with self._free:
            self._used -= size
            self._free.notify_all()


def sha256(array: np.ndarray) -> str:
    """Of the values in the order of a file."""
    digest = hashlib.sha256()
    for chunk in chunks(array):
        digest.update(fetched(chunk).data)
    return digest.hexdigest()


def same_memory(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same bytes in the same order."""
    bounds = np.lib.array_utils.byte_bounds
    return a.flags.c_contiguous and b.flags.c_contiguous and a.dtype == b.dtype and bounds(a) == bounds(b)


def all_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, judged by the exponents, without a copy of the array."""
    exponent = EXPONENTS.get(array.dtype.name)
    if exponent is None:
        return True
    magnitude = (1 << 8 * array.dtype.itemsize - 1) - 1
    for chunk in chunks(words(array), 1 << 19):
        if np.bitwise_and(chunk, chunk.dtype.type(magnitude)).max(initial=0) >= exponent:
            return False
        release(chunk)
    return True


def words(array: np.ndarray) -> np.ndarray:
    """The same bits as unsigned integers, which numpy moves faster than the floats that it does not know."""
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.name in EXPONENTS else array


def chunks(array: np.ndarray, size: int = CHUNK) -> Iterator[np.ndarray]:
    """Views of at most `size` bytes (or one value) that follow each other in the order of a file."""
    if not array.size:
        return
    if array.flags.c_contiguous:
        array = array.reshape(-1)
    row = array.nbytes // len(array)  # no value is looked at, that would map its page
    if row > size and array.ndim > 1:
        yield from itertools.chain.from_iterable(chunks(one, size) for one in array)
    else:
        rows = max(1, size // row)
        yield from (array[start : start + rows] for start in range(0, len(array), rows))


class MappedBytes(mmap.mmap):
    """A file as memory that cannot be written to; its descriptor serves to read it without mapping its pages."""

    descriptor: int

    @classmethod
    def of(cls, path: Path) -> MappedBytes:
        """Map a file that is not empty; it stays open as long as anything looks into it."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            mapped = cls(descriptor, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(descriptor)
            raise
        weakref.finalize(mapped, os.close, descriptor)
        mapped.descriptor = descriptor
        return mapped

    def place(self, array: np.ndarray) -> tuple[int, int]:
        """Offsets in the file of the first byte of a view and of the one after its last."""
        origin = np.frombuffer(self, np.uint8).__array_interface__["data"][0]
        low, high = np.lib.array_utils.byte_bounds(array)
        return low - origin, high - origin


def mapping(array: np.ndarray) -> MappedBytes | None:
    """The mapped file that an array is a view of."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    return base if isinstance(base, MappedBytes) else None


def fetched(chunk: np.ndarray) -> np.ndarray:
    """A chunk as `words` in one piece, valid until this thread fetches the next one.

    What lies in a file as it is asked for is read; copying it through mapped pages takes the processor twice as long.
    """
    mapped = mapping(chunk)
    if mapped is None or not chunk.flags.c_contiguous:
        copy = np.ascontiguousarray(words(chunk))
        release(chunk)
        return copy
    if not hasattr(_thread, "room"):
        _thread.room = np.empty(CHUNK, np.uint8)
    part, (place, end) = _thread.room[: chunk.nbytes], mapped.place(chunk)
    while place < end:
        got = os.preadv(mapped.descriptor, [part[chunk.nbytes - (end - place) :].data], place)
        if not got:
            raise OSError(errno.EIO, "a file that is being read has become shorter")
        place += got
    return words(part.view(chunk.dtype))


_thread = threading.local()


def release(*arrays: np.ndarray) -> None:
    """Hand back the pages of mapped files behind these views; they are read again when they are needed again."""
    for array in arrays:
        mapped = mapping(array)
        if mapped is not None and array.size:
            low, high = mapped.place(array)
            start = low // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, start, high - start)


def planned(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[Planned]:
    """Tensors that are there already."""
    for name, array in tensors:
        yield Planned(name, array.shape, array.dtype.name, lambda array=array: array)

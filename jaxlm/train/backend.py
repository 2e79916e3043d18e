"""What the training loop asks of a framework: a model with its optimiser. It imports neither JAX nor torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlm import config
from jaxlm.train.recipe import RowFunction

Batch = Mapping[str, np.ndarray]


@runtime_checkable
class Engine(Protocol):
    """A model with its optimiser, in one framework."""

    flops_per_token: float
    process_index: int
    process_count: int
    rows: np.ndarray | None
    """The rows of each batch that this process makes; None: all."""

    def peak_flops(self, reached: float) -> float:
        """Of all devices together, FLOP/s; a peak that was measured is at least what a run reached."""
        ...

    def checkpoints(self) -> list[int]:
        """Steps that can be resumed from."""
        ...

    def restore(self, warn: Any) -> dict[str, Any]:
        """Load the newest intact checkpoint and return its `run` record."""
        ...

    def step(self, batch: Batch) -> Mapping[str, Any]:
        """One update; the metrics may still be under way on the device."""
        ...

    def fetch(self, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Wait for metrics and bring them to the host: floats, and lists of numbers."""
        ...

    def evaluate(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Sums of the objective over batches, without dropout."""
        ...

    def map_rows(
        self, function: RowFunction, batches: Iterator[Batch], frozen: Mapping[str, Any] | None = None, /
    ) -> Iterator[np.ndarray]:
        """The numbers [B, ...] of each batch, of the rows of all processes, without dropout.

        Args:
            frozen: the trees of the function, as `freeze` takes them; nothing that is trained is looked at. None: the
                function has none, and takes what is trained as it is now.
        """
        ...

    def complete(self, prompts: Sequence[str], sample: config.Sample, check: Callable[[], None]) -> list[str]:
        """Continue texts with the current parameters; `check` is called now and then, and may raise."""
        ...

    def adopt(self, params: Any, name: str = ..., /) -> None:
        """Let a trained tree, that of the run's model unless another is named, begin with these numpy arrays.

        They are the live tree of jaxlm, or for PyTorch tensors by the names of its `state_dict`.
        """
        ...

    def freeze(self, name: str, params: Any, /) -> None:
        """Give the frozen tree `name` its parameters, as `adopt` takes them."""
        ...

    def save(self, run: dict[str, Any], validation_loss: float | None) -> None:
        """Start to write a checkpoint; one of the same step is replaced."""
        ...

    def stops_at(self, point: int) -> bool:
        """Of many processes: whether a preemption notice to any of them lets all stop at this point, counted from 1."""
        ...

    def part(self) -> None:
        """Of many processes, which all call it: leave the others, so that the first that ends takes none along."""
        ...

    def of_first(self, value: bool) -> bool:
        """Of many processes, which all call it: the value of the first one."""
        ...

    def gather(self, value: float) -> list[float]:
        """The value of each process, which all call it."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes in use and at most: of the first device of this process, or of the process where devices do not say."""
        ...

    def profile(self, folder: Path | None) -> None:
        """Begin to write a profile of the first process into `folder`; None: finish it, if one is under way."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...

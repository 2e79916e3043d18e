"""What a framework makes of the inputs, under canonical names: the common form of both sides, and the side of jaxlm.

A side is asked for one dtype at a time, so that no more than two traces and the golden one are in memory.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np

from jaxlm import config
from jaxlm.counts.parameters import parameters
from jaxlm.errors import UserError
from jaxlm.parity.inputs import Inputs

Arrays = dict[str, np.ndarray]

DTYPES = ("float64", "float32", "bfloat16")
STEPS = (1, 20)
LARGE = 50_000_000
"""Parameters above which one side works after the other, and gradients and updates are compared after all else. In
float64 a side has 8 bytes for each and some ten copies: the model, its gradient, both moments, two updates, the trace;
together with the outputs of all modules more than a laptop holds. The traces then lie on the disk."""
LEARNING_RATE, OF_LARGE = 3e-4, 1e-4
"""Highest peak of the optimiser steps, and that of a large model. Longer strides over the same rows amplify rounding:
20 updates of the quickstart model at 4e-3 part by 5e-11 in float64, at 3e-4 by 1e-13. Those of a trained model of 135M
parameters part in float32 at 3e-4 by 1.1e-3 in jaxlm and 2e-4 in torch on one draw of rows, 2e-3 and 6e-3 on another;
at 1e-4 by 2e-5 in both on both. Shorter ones drown in the rounding of parameters: an update is judged relative to its
own size."""
LOGITS = "logits"
"""The name of what the whole decoder returns."""
ARRIVES, RETURNS = "arrives", "returns"
Events = dict[tuple[str, str], np.ndarray]
"""`ARRIVES` or `RETURNS` and the name of a module to what it is given or gives, in the order of computation."""
ROUTING = ("weights", "experts")
"""What else arrives at the experts; the event of `layers.1.ffn.experts` is named `layers.1.ffn.experts#weights`."""
CHOICE = ("experts", "biased")
"""What a router returns besides its weights and `compare_routing` looks at, after a `#` behind its name."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """Everything that one framework computed in one dtype."""

    levels: Mapping[str, Arrays]
    """`forward`, `loss`, `gradients`, `update 1`, `update 20`, as far as wanted: name to value, in the order of
    computation. Gradients and updates by the names of torch_ref."""
    tokens: list[list[int]]
    """The greedy continuation of each prompt, if wanted."""
    weights: Arrays
    """The parameters before the first update, by the names of torch_ref; empty where no update is wanted."""


@runtime_checkable
class Side(Protocol):
    """One implementation of a model, ready to be traced."""

    name: str
    mirrors: bool
    """Whether it has every module of torch_ref, rounds where jaxlm rounds and makes zeros of padding. Of another
    side only the modules are compared that it has, at real tokens, and it may round as it likes."""

    def trace(self, dtype: str, inputs: Inputs, progress: Callable[[str], None]) -> Trace:
        """Compute what `inputs.levels` wants in `dtype`; `progress` is called with the name of each part
        as it begins."""
        ...

    def weights(self) -> Arrays:
        """The parameters as they are stored, by the names of torch_ref."""
        ...

    def forward(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """The outputs of all modules for these rows, by the names of torch_ref, and `logits`."""
        ...

    def gradients(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """The gradients of these rows alone, by the names of torch_ref."""
        ...

    def next_logits(self, dtype: str, ids: list[int]) -> np.ndarray:
        """Logits [V] of the token after `ids`, without a cache."""
        ...

    def replay(self, dtype: str, rows: Mapping[str, np.ndarray], inputs: Arrays | None) -> Events:
        """What arrives at and returns from every module when each is given `inputs` instead of what arrives."""
        ...


def numerics_of(dtype: str) -> config.Numerics:
    """What is computed in which dtype: bfloat16 keeps float32 parameters, as in training."""
    params = "float64" if dtype == "float64" else "float32"
    return config.Numerics(params=params, compute=dtype, matmul="highest")  # pyright: ignore[reportArgumentType]


def settings_of(settings: config.Config) -> config.Config:
    """The config that both sides follow: no dropout, kernels of any platform, twenty steps with both ends of the
    schedule."""
    peak = OF_LARGE if parameters(settings.model)[0] > LARGE else LEARNING_RATE
    train = dataclasses.replace(
        settings.train,
        steps=max(STEPS),
        warmup_steps=min(5, settings.train.warmup_steps),
        learning_rate=min(peak, settings.train.learning_rate),
        batch_size=2,
        microbatches=1,
    )
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model.portable, dropout=0.0), train=train)


def without_balancing(settings: config.Config) -> config.Config:
    """The same without what steers the routers in training, which is no part of the function of a model."""
    moe = dataclasses.replace(
        settings.model.moe, balance_loss=0.0, importance_loss=0.0, z_loss=0.0, bias_update_rate=0.0
    )
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, moe=moe))


def moved(now: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """The difference of two states of a parameter, which is small against both, in float64."""
    return now.astype(np.float64) - begin.astype(np.float64)


def on_disk(trace: Trace) -> Trace:
    """The same trace, its arrays in a file without a name that goes with them: the system keeps what fits in memory.

    Raises:
        UserError: the folder of temporary files has no room.
    """
    every = [array for arrays in (*trace.levels.values(), trace.weights) for array in arrays.values()]
    # One file for all, since each mapped file takes a descriptor. An offset that is a multiple of 64 suits every dtype.
    places = np.cumsum([0, *(-(-array.nbytes // 64) * 64 for array in every)])
    with tempfile.TemporaryFile() as file:
        _reserve(file, max(1, int(places[-1])))
        mapped = np.memmap(file, np.uint8, "r+")
    offsets = iter(places)

    def filed(arrays: Arrays) -> Arrays:
        return {name: _copied(array, mapped[next(offsets) :]) for name, array in arrays.items()}

    levels = {level: filed(arrays) for level, arrays in trace.levels.items()}
    return dataclasses.replace(trace, levels=levels, weights=filed(trace.weights))


def _reserve(file: IO[bytes], size: int) -> None:
    """Take the room at once: a mapped file that finds none later ends the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except OSError as error:
        message = f"{tempfile.gettempdir()}: no room for the {size:,} bytes of a trace: {error.strerror}"
        raise UserError(message, "set TMPDIR to a folder with more room") from None


def _copied(array: np.ndarray, into: np.ndarray) -> np.ndarray:
    copy = into[: array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def returned(name: str, output: Any) -> dict[str, Any]:
    """What a module returned, by its name; a cache beside an output is dropped, of a router the choice is kept."""
    if not isinstance(output, tuple):
        return {name: output}
    choice = {f"{name}#{what}": getattr(output, what) for what in CHOICE if hasattr(output, what)}
    return {name: output[0], **choice}

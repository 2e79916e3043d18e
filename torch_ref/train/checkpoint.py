"""Checkpoints as safetensors: each appears whole or not at all; the newest N and the best are kept.

    runs/NAME/checkpoints/STEP/  model.safetensors  optimizer.safetensors  run.json

`run.json` holds what is not a tensor: the counters, the record of the training loop, the validation loss, and the
sha256 of everything, so that damage is noticed when it is read. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jaxlm.errors import UserError
from jaxlm.run.torch_checkpoint import COUNT, MODEL, MOMENTS, OPTIMIZER, RUN, read_record, write_record
from jaxlm.train.recipe import MODEL as RUN_MODEL
from torch_ref.train.step import Part, TrainState

_OTHER = "this is another architecture: use the run's own config.toml, or another out_dir"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError)  # of files that are truncated, altered or missing


class Checkpointer:
    """Saves and restores the training state of one run directory."""

    def __init__(self, run_dir: str | Path, keep: int = 3) -> None:
        self.folder, self.keep = Path(run_dir).absolute() / "checkpoints", keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def save(
        self,
        parts: Sequence[Part],
        state: TrainState,
        run: Mapping[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Write to a temporary folder, flush it to the disk, and give it its name; one of the same step is replaced.

        Raises:
            UserError: the disk is full or the folder is not writable.
        """
        target = self.folder / str(state.step)
        stage = target.with_name(f".{state.step}.partial")
        parameters = _parameters(parts)
        known = validation_loss is not None and math.isfinite(validation_loss)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".*.partial"):  # by a process that was killed
                shutil.rmtree(left)
            stage.mkdir()
            save_file({name: parameter.detach() for name, parameter in parameters.items()}, stage / MODEL)
            save_file(_moments(parts), stage / OPTIMIZER)
            write_record(stage, state._asdict(), run, validation_loss if known else None)
            for path in (stage / MODEL, stage / OPTIMIZER, stage / RUN):
                shutil.copymode(stage / RUN, path)  # the library's files are private to the user
                _flush(path)
            _flush(stage)
            if target.exists():
                shutil.rmtree(target)
            stage.rename(target)
            _flush(self.folder)
            self._prune()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(stage, ignore_errors=True)
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise UserError(f"{target}: checkpoint not written: {reason}", "earlier ones are intact") from error

    def restore(self, parts: Sequence[Part], warn: Callable[[str], None]) -> tuple[TrainState, dict[str, Any]]:
        """Load the newest intact checkpoint into modules and optimisers; returns the counters and the loop's record.

        Damaged checkpoints are named through `warn`, passed over, and moved out of the way of the ones to come.

        Raises:
            UserError: none is intact, or the parameters have other shapes.
        """
        parameters = _parameters(parts)
        damaged = []
        for step in reversed(self.steps()):
            where = self.folder / str(step)
            if (where / "manifest.json").is_file():
                hint = "generate, eval, parity and convert read it; train another out_dir"
                raise UserError(f"{where}: parameters from a conversion, without an optimizer to resume", hint)
            if (where / "params").is_dir():
                carry = f"`jaxlm convert {self.folder.parent} DST --to jaxlm --backend torch` carries it over"
                raise UserError(f"{where}: a checkpoint of the JAX backend", f"{carry}, or resume with --backend jax")
            try:
                model, moments, record = _read(where)
            except _DAMAGE as error:
                warn(f"{where} is damaged: {error}")
                damaged.append(step)
                continue
            _check_shapes(where, parameters, model)
            _copy(parameters, model)
            _copy(_moments(parts), moments)
            self._set_aside(damaged)
            return TrainState(**record["state"]), record["run"]
        raise UserError(f"{self.folder}: no intact checkpoint", "start again with another out_dir")

    def _set_aside(self, damaged: Iterable[int]) -> None:
        aside = self.folder.with_name("damaged")
        for step in damaged:
            aside.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(tempfile.mkdtemp(prefix=f"{step}-", dir=aside))

    def _prune(self) -> None:
        """Remove all but the newest `keep` and the best by validation loss."""
        steps = self.steps()
        losses = {step: loss for step in steps if (loss := _validation_loss(self.folder / str(step))) is not None}
        kept = {*steps[-self.keep :], *sorted(losses, key=lambda step: losses[step])[:1]}
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.folder / str(step))


def _prefix(part: Part) -> str:
    return "" if part.name == RUN_MODEL else f"{part.name}/"


def _parameters(parts: Sequence[Part]) -> dict[str, nn.Parameter]:
    """What is saved by name: all parameters, or the adapters; of modules besides the model, `NAME/` stands before."""
    return {
        _prefix(part) + name: parameter
        for part in parts
        if part.module is not None
        for name, parameter in part.module.named_parameters()
        if parameter.requires_grad or not part.adapters
    }


def _moments(parts: Sequence[Part]) -> dict[str, Tensor]:
    """The optimisers' own tensors by name: `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME` of what moves."""
    return {
        f"{kind}.{_prefix(part)}{name}": part.optimizer.state[parameter][kind]
        for part in parts
        if part.module is not None
        for name, parameter in part.module.named_parameters()
        if parameter in part.optimizer.state
        for kind in (*MOMENTS, COUNT)
    }


def _read(where: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Tensors of the model and of the optimiser and the record of one checkpoint, after checking every byte."""
    record = read_record(where)
    return load_file(where / MODEL), load_file(where / OPTIMIZER), record


def _check_shapes(where: Path, parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    for name in sorted(parameters.keys() | stored.keys()):
        have, want = (list(side[name].shape) if name in side else "absent" for side in (stored, parameters))
        if have != want:
            raise UserError(f"{where}: {name} is {have}, the config asks for {want}", _OTHER)


@torch.no_grad()
def _copy(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])


def _validation_loss(where: Path) -> float | None:
    try:
        return json.loads((where / RUN).read_text(encoding="utf-8"))["validation_loss"]
    except _DAMAGE:
        return None


def _flush(path: Path) -> None:
    """Bring a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""`jaxlm convert RUN DST --to jaxlm --backend torch|jax`: a run goes on in the other framework.

The moments of AdamW go through the same rows as the parameters, for rows only move values about. The record of the
loop, with its place in the data, is one and the same on both sides. Selection biases of routers are parameters.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert import native
from jaxlm.convert.files import storage
from jaxlm.convert.open_model import TOKENIZER
from jaxlm.convert.write_model import Summary, require_apart
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, Params, abstract_params
from jaxlm.numerics import Policy
from jaxlm.run.checkpoints import checkpoint_folder
from jaxlm.run.torch_checkpoint import COUNT, MODEL, MOMENTS, OPTIMIZER, RUN, read_record, write_record
from jaxlm.train.optim import make_optimizer
from jaxlm.train.step import TrainState, init_state

METRICS = "metrics.jsonl"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError)  # of files that are truncated, altered or missing


class Training(NamedTuple):
    """All that a resumed run needs, on the host."""

    step: int
    skipped: int
    """Non-finite updates in a row, up to now."""
    updates: int
    """How many updates the moments have seen."""
    params: Params
    moments: tuple[Params, Params]
    """First and second, trees like that of the parameters."""
    run: dict[str, Any]
    """The record of the loop."""
    validation_loss: float | None


def convert_state(
    src: str | Path, dst: str | Path, backend: config.Backend, *, step: int | None = None, overwrite: bool = False
) -> Summary:
    """Write a run that `backend` can resume: one checkpoint with the optimiser, config, tokenizer and metrics.

    Parameters and moments keep every bit. The destination appears whole or not at all.

    Args:
        step: which checkpoint; None: the newest.
        overwrite: replace whatever lies at `dst`.

    Raises:
        UserError: `src` is no run, has no such checkpoint, or one that is damaged, holds weights only or is already of
            `backend`; `dst` holds something else or cannot be written.
    """
    began = time.perf_counter()
    src, dst = Path(src), Path(dst)
    require_apart(src, dst)
    if not (src / "config.toml").is_file() or not (src / "checkpoints").is_dir():
        raise UserError(f"{src}: not a run", "only a run, with config.toml and checkpoints/, has an optimiser to carry")
    settings = toml.load(src / "config.toml")
    if settings.lora.rank:
        raise UserError(f"{src}: a run with adapters resumes in its own framework", "without --backend it goes merged")
    where = checkpoint_folder(src, step)
    source = _backend_of(where)
    if source == backend:
        raise UserError(f"{where} is a checkpoint of the {backend} backend already", "copy the run as it is")
    with jax.enable_x64(True):  # what is float64 stays so; the rest has its own dtype
        training = _read_torch(where, settings) if source == "torch" else _read_jax(where, settings)
        with storage.staged(dst, overwrite) as stage:
            text = toml.to_toml(dataclasses.replace(settings, out_dir=str(dst)))
            for name in (TOKENIZER, METRICS):
                if (src / name).is_file():
                    shutil.copyfile(src / name, stage / name)
            (_write_torch if backend == "torch" else _write_jax)(stage, training, settings)
            (stage / "config.toml").write_text(text, encoding="utf-8")
    arrays = jax.tree.leaves((training.params, training.moments))
    size = sum(x.nbytes for x in arrays)
    return Summary(dst, f"step {training.step} for --backend {backend}", len(arrays), size, time.perf_counter() - began)


def _backend_of(where: Path) -> config.Backend:
    if (where / RUN).is_file():
        return "torch"
    if (where / "params").is_dir() and (where / "optimizer").is_dir():
        return "jax"
    raise UserError(f"{where}: holds no optimiser state", "weights alone need no --backend")


def _read_jax(where: Path, settings: config.Config) -> Training:
    from jaxlm.train.checkpoint import Checkpointer  # Orbax takes a second to import

    # On the host: the mesh that trained the model need not exist here.
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), _abstract_state(settings))
    checkpoints = Checkpointer(where.parents[1], read_only=True)
    try:
        state, run, loss = checkpoints.read(like, int(where.name))
    finally:
        checkpoints.close()
    state = jax.tree.map(np.asarray, state)
    counts = {int(count) for _, count in optax.tree.get_all_with_path(state.opt_state, "count")}
    moments = optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")
    return Training(int(state.step), int(state.skipped), _only(counts, where), state.params, moments, run, loss)


def _write_jax(stage: Path, training: Training, settings: config.Config) -> None:
    from jaxlm.train.checkpoint import Checkpointer

    number = lambda value: jnp.asarray(value, jnp.int32)  # noqa: E731
    fields = {"count": number(training.updates), **dict(zip(("mu", "nu"), training.moments, strict=True))}
    opt_state = optax.tree.set(_abstract_state(settings).opt_state, None, **fields)
    state = TrainState(number(training.step), training.params, opt_state, number(training.skipped))
    checkpoints = Checkpointer(stage)
    checkpoints.save(state, training.run, training.validation_loss)
    checkpoints.close()


def _abstract_state(settings: config.Config) -> Any:
    """Shapes and dtypes of the state that the JAX engine restores."""
    shapes, _ = abstract_params(Decoder(settings.model, Policy.from_config(settings.numerics)))
    return jax.eval_shape(lambda params: init_state(params, make_optimizer(settings.train)), shapes)


def _read_torch(where: Path, settings: config.Config) -> Training:
    try:
        record = read_record(where)
        tensors, optimizer = load_file(where / MODEL), load_file(where / OPTIMIZER)
        state, run, loss = record["state"], record["run"], record["validation_loss"]
        step, skipped = int(state["step"]), int(state["skipped"])
    except _DAMAGE as error:
        raise UserError(f"{where} is damaged: {error}", "name another with --step, or copy the run again") from error
    for name, tensor in (tensors | optimizer).items():
        if tensor.dtype.name != settings.numerics.params and not name.startswith(f"{COUNT}."):
            raise UserError(f"{where}: {name} is {tensor.dtype}, numerics.params is {settings.numerics.params}")
    kinds: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in (*MOMENTS, COUNT)}
    for name, tensor in optimizer.items():
        kind, _, parameter = name.partition(".")
        kinds.setdefault(kind, {})[parameter] = tensor
    if unknown := sorted(kinds.keys() - {*MOMENTS, COUNT}):
        raise UserError(f"{where / OPTIMIZER}: {unknown[0]} is no part of AdamW's state")
    if kinds[COUNT].keys() != tensors.keys():
        odd = sorted(kinds[COUNT].keys() ^ tensors.keys())[0]
        raise UserError(f"{where / OPTIMIZER}: {COUNT}.{odd} is missing or not expected")
    updates = _only({float(count) for count in kinds[COUNT].values()}, where)
    first, second = (native.from_torch(kinds[k], settings.model, f"{where / OPTIMIZER}, {k}") for k in MOMENTS)
    params = native.from_torch(tensors, settings.model, str(where / MODEL))
    return Training(step, skipped, updates, params, (first, second), run, loss)


def _write_torch(stage: Path, training: Training, settings: config.Config) -> None:
    where = stage / "checkpoints" / str(training.step)
    where.mkdir(parents=True)
    tensors = _contiguous(training.params, settings.model)
    optimizer = {f"{COUNT}.{name}": np.asarray(training.updates, np.float32) for name in tensors}
    for kind, tree in zip(MOMENTS, training.moments, strict=True):
        optimizer |= {f"{kind}.{name}": array for name, array in _contiguous(tree, settings.model).items()}
    save_file(tensors, where / MODEL)
    save_file(optimizer, where / OPTIMIZER)
    write_record(where, {"step": training.step, "skipped": training.skipped}, training.run, training.validation_loss)
    for name in (MODEL, OPTIMIZER):
        shutil.copymode(where / RUN, where / name)  # the library's files are private to the user


def _contiguous(params: Params, model: config.Model) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array) for name, array in native.to_torch(params, model)}


def _only(counts: set[Any], where: Path) -> int:
    """The one number of updates that all parameters have seen."""
    if len(counts) != 1 or (count := counts.pop()) != int(count):
        raise UserError(f"{where}: its parameters have seen different numbers of updates", "only whole runs cross")
    return int(count)

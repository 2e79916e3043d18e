"""`jaxlm convert RUN DST --to jaxlm --backend torch|jax`: a run goes on in the other framework.

The moments of AdamW go through the same rows as the parameters, for rows only move values about. The record of the
loop, with its place in the data, is one and the same on both sides. Selection biases of routers are parameters. Every
trained tree crosses: a value model or projections beside the model.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
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
from jaxlm.convert.files.side_files import carried
from jaxlm.convert.open_model import TOKENIZER
from jaxlm.convert.write_model import Summary, require_apart
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, Params, abstract_params
from jaxlm.numerics import Policy
from jaxlm.run.checkpoints import checkpoint_folder
from jaxlm.run.torch_checkpoint import COUNT, MODEL, MOMENTS, OPTIMIZER, RUN, read_record, write_record
from jaxlm.train.optim import make_optimizer
from jaxlm.train.program import abstract_maps
from jaxlm.train.recipe import MODEL as RUN_MODEL
from jaxlm.train.recipe import Models
from jaxlm.train.step import Part, TrainState, init_states

METRICS = "metrics.jsonl"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError)  # of files that are truncated, altered or missing


class Training(NamedTuple):
    """All that a resumed run needs, on the host."""

    step: int
    skipped: int
    """Non-finite updates in a row, up to now."""
    updates: int
    """How many updates the moments have seen."""
    params: dict[str, Params]
    """Every trained tree by its name."""
    moments: tuple[dict[str, Params], dict[str, Params]]
    """First and second, of the trees alike."""
    run: dict[str, Any]
    """The record of the loop."""
    validation_loss: float | None


def convert_state(
    src: str | Path,
    dst: str | Path,
    backend: config.Backend,
    models_of: Callable[[config.Config], Models],
    *,
    step: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Write a run that `backend` can resume: one checkpoint with the optimiser, config, tokenizer and metrics.

    Parameters and moments keep every bit. The destination appears whole or not at all.

    Args:
        models_of: the trees of the stage of a config: `make_recipe(cfg).models`.
        step: which checkpoint; None: the newest.
        overwrite: replace whatever lies at `dst`.

    Raises:
        UserError: `src` is no run, has no such checkpoint, or one that is damaged, holds weights only or is already of
            `backend`; trains adapters or a part of a tree; `dst` holds something else or cannot be written.
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
    models = models_of(settings)
    for name, tree in models.trained.items():
        if tree.moves is not None:
            raise UserError(f"{src}: only a part of the tree {name!r} is trained", f"resume with --backend {source}")
    with jax.enable_x64(True):  # what is float64 stays so; the rest has its own dtype
        training = (_read_torch if source == "torch" else _read_jax)(where, settings, models)
        with storage.staged(dst, overwrite) as stage:
            text = toml.to_toml(dataclasses.replace(settings, out_dir=str(dst)))
            for name in (TOKENIZER, METRICS):
                if (src / name).is_file():
                    shutil.copyfile(src / name, stage / name)
            for name, stored in carried(src).items():  # the template and the ends of a stage of conversations
                (stage / name).write_bytes(stored)
            (_write_torch if backend == "torch" else _write_jax)(stage, training, settings, models)
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


def _read_jax(where: Path, settings: config.Config, models: Models) -> Training:
    from jaxlm.train.checkpoint import Checkpointer  # Orbax takes a second to import

    # On the host: the mesh that trained the model need not exist here.
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    abstract = _abstract_state(settings, models)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), abstract)
    checkpoints = Checkpointer(where.parents[1], read_only=True, several=models.several)
    try:
        state, run, loss = checkpoints.read(like, int(where.name))
    finally:
        checkpoints.close()
    state = jax.tree.map(np.asarray, state)
    counts = {int(count) for _, count in optax.tree.get_all_with_path(state.opt_state, "count")}
    params, opt_states = _by_name(state.params, models), _by_name(state.opt_state, models)
    first, second = ({name: optax.tree.get(one, kind) for name, one in opt_states.items()} for kind in ("mu", "nu"))
    updates = _only(counts, where)
    return Training(int(state.step), int(state.skipped), updates, params, (first, second), run, loss)


def _write_jax(stage: Path, training: Training, settings: config.Config, models: Models) -> None:
    from jaxlm.train.checkpoint import Checkpointer

    number = lambda value: jnp.asarray(value, jnp.int32)  # noqa: E731
    first, second = training.moments
    opt_states = {
        name: optax.tree.set(one, None, count=number(training.updates), mu=first[name], nu=second[name])
        for name, one in _by_name(_abstract_state(settings, models).opt_state, models).items()
    }
    params, opt_state = (trees if models.several else trees[RUN_MODEL] for trees in (training.params, opt_states))
    state = TrainState(number(training.step), params, opt_state, number(training.skipped))
    checkpoints = Checkpointer(stage, several=models.several)
    checkpoints.save(state, training.run, training.validation_loss)
    checkpoints.close()


def _abstract_state(settings: config.Config, models: Models) -> Any:
    """Shapes and dtypes of the state that the JAX engine restores."""
    policy = Policy.from_config(settings.numerics)
    shapes = {name: abstract_params(Decoder(tree.model, policy))[0] for name, tree in models.trained.items()}
    shapes |= {name: abstract_maps(tree, policy)[0] for name, tree in models.maps.items()}
    trees = {**models.trained, **models.maps}
    parts = [Part(name, tree.train, make_optimizer(tree.train)) for name, tree in trees.items()]
    params = shapes if models.several else shapes[RUN_MODEL]
    return jax.eval_shape(lambda params: init_states(params, parts), params)


def _by_name(trees: Any, models: Models) -> dict[str, Any]:
    """The dict of several trees; the only one stands for itself in a state of JAX."""
    return dict(trees) if models.several else {RUN_MODEL: trees}


def _read_torch(where: Path, settings: config.Config, models: Models) -> Training:
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
    first, second = (_trees(kinds[kind], models, f"{where / OPTIMIZER}, {kind}") for kind in MOMENTS)
    params = _trees(tensors, models, str(where / MODEL))
    return Training(step, skipped, updates, params, (first, second), run, loss)


def _write_torch(stage: Path, training: Training, settings: config.Config, models: Models) -> None:
    where = stage / "checkpoints" / str(training.step)
    where.mkdir(parents=True)
    tensors = _tensors(training.params, models)
    optimizer = {f"{COUNT}.{name}": np.asarray(training.updates, np.float32) for name in tensors}
    for kind, trees in zip(MOMENTS, training.moments, strict=True):
        optimizer |= {f"{kind}.{name}": array for name, array in _tensors(trees, models).items()}
    save_file(tensors, where / MODEL)
    save_file(optimizer, where / OPTIMIZER)
    write_record(where, {"step": training.step, "skipped": training.skipped}, training.run, training.validation_loss)
    for name in (MODEL, OPTIMIZER):
        shutil.copymode(where / RUN, where / name)  # the library's files are private to the user


def _tensors(trees: Mapping[str, Params], models: Models) -> dict[str, np.ndarray]:
    """Trees by the names of the PyTorch engine: those beside the model have `NAME/` before them."""
    found: dict[str, np.ndarray] = {}
    for tree, params in trees.items():
        maps, prefix = tree in models.maps, "" if tree == RUN_MODEL else f"{tree}/"
        named = native.maps_to_torch(params) if maps else native.to_torch(params, models.trained[tree].model)
        found |= {prefix + name: np.ascontiguousarray(array) for name, array in named}
    return found


def _trees(tensors: Mapping[str, np.ndarray], models: Models, where: str) -> dict[str, Params]:
    """The inverse of `_tensors`.

    Raises:
        UserError: a tensor is missing, unexpected or not usable, or is of no tree of the stage.
    """
    groups: dict[str, dict[str, np.ndarray]] = {name: {} for name in models.moving}
    for full, tensor in tensors.items():
        tree, _, name = full.rpartition("/")
        if (tree or RUN_MODEL) not in groups:
            raise UserError(f"{where}: {full} is of no tree that the stage trains", f"it has: {', '.join(groups)}")
        groups[tree or RUN_MODEL][name] = tensor
    maps = {name: native.maps_from_torch(groups[name], maps.shapes, where) for name, maps in models.maps.items()}
    return {name: native.from_torch(groups[name], tree.model, where) for name, tree in models.trained.items()} | maps


def _only(counts: set[Any], where: Path) -> int:
    """The one number of updates that all parameters have seen."""
    if len(counts) != 1 or (count := counts.pop()) != int(count):
        raise UserError(f"{where}: its parameters have seen different numbers of updates", "only whole runs cross")
    return int(count)

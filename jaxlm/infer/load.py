"""Open a model and lay it on the devices of this process, or on those of a mesh: `jaxlm.load`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, Literal

import flax.traverse_util
import jax
import numpy as np

from jaxlm import config
from jaxlm.config import registry, toml
from jaxlm.convert import open_model
from jaxlm.convert.canonical import fill
from jaxlm.errors import DamagedCheckpointError, UserError
from jaxlm.infer.model import Model
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, Params, abstract_params
from jaxlm.numerics import precision
from jaxlm.processes import meet
from jaxlm.processes.compiled_together import connect, everywhere
from jaxlm.run.checkpoints import CHECKPOINTS
from jaxlm.text.tokenizer import Tokenizer

Dtype = Literal["float32", "bfloat16", "float64"]

_log = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    dtype: Dtype | None = None,
    mesh: str | config.Mesh | None = None,
    step: int | None = None,
) -> Model:
    """Open a model and lay it on this process's devices.

    Args:
        path: a run, a torch_ref or Hugging Face folder, a `model.bin` of llama2.c, or `org/name` on the hub.
        dtype: in which it computes; None: as its config says. `float64` widens the parameters too.
        mesh: devices over which to split it, those of all processes, a `config.Mesh` or the name of a preset such as
            `zero3`; None: the first. Each parameter, or stack of layers, goes there before the next is read; a run with
            adapters is merged on the host first.
        step: which checkpoint of a run; None: the newest that is intact, which all processes of a mesh can read.

    Raises:
        UserError: `path` holds no model (the message says what was looked for), or a damaged one; `dtype` or `mesh` is
            unknown or does not fit.
    """
    if isinstance(mesh, str):
        mesh = toml.from_dict({"mesh": registry.mesh(mesh)}, "mesh").mesh
    if mesh is None:
        stored, layout = open_model.load(path, step=step), None
        settings = _computing_in(stored.config, dtype)
        wanted = np.dtype(settings.numerics.params) if dtype else None
        with precision(settings.numerics):
            params = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf, wanted), stored.params))
    else:
        layout = Layout.from_config(mesh)
        stored, settings, params = _intact_on_mesh(path, step, layout, dtype)
    own = stored.tokenizer_path
    tokenizer = Tokenizer.from_file(own) if own else None
    found = {"kind": stored.kind, "tokenizer_path": own, "layout": layout}
    return Model(settings, params, tokenizer=tokenizer, path=Path(path), **found)


def _computing_in(settings: config.Config, dtype: Dtype | None) -> config.Config:
    if dtype is None:
        return settings
    numerics: dict[str, Any] = {"params": "float64" if dtype == "float64" else "float32", "compute": dtype}
    numerics |= {"matmul": settings.numerics.matmul}
    return dataclasses.replace(settings, numerics=toml.from_dict({"numerics": numerics}, "dtype").numerics)


def _intact_on_mesh(
    path: str | Path, step: int | None, layout: Layout, dtype: Dtype | None
) -> tuple[open_model.Opened, config.Config, Params]:
    """The newest checkpoint that all processes can read: where one of them finds damage, all take the one before.

    Raises:
        UserError: there is none, or a process cannot open one for another reason; in all processes alike.
    """
    connect(layout.mesh)
    damage = None
    for at in _steps_of_first(path, step):
        found = refused = None
        try:
            opened = open_model.open_model(path, step=at)
            settings = _computing_in(opened.config, dtype)
            with precision(settings.numerics):
                params = _on_mesh(opened, layout, np.dtype(settings.numerics.params) if dtype else None)
            found = opened, settings, params
        except DamagedCheckpointError as error:
            damage = error
            if step is None:
                _log.warning(error.message)
        except UserError as error:
            refused = error
        # Each process votes whatever it found, or the others would wait for it.
        if everywhere(found is not None) and found:
            return found
        if not everywhere(refused is None):
            raise refused or UserError(f"{path}: another process cannot open it", "its log says why")
    if step is None:
        raise UserError(f"{Path(path) / CHECKPOINTS}: no intact checkpoint", "name another run") from damage
    raise damage or UserError(f"{path}: another process finds step {step} damaged", "name another step, or another run")


def _steps_of_first(path: str | Path, step: int | None) -> list[int | None]:
    """The steps to try as the first process lists them: a run that goes on may save before another one looks."""
    steps: list[int | None] = [step]
    if meet.is_first():
        with contextlib.suppress(UserError):  # `open_model` raises it again, where all processes vote
            steps = open_model.steps_to_try(path, step)
    return json.loads(meet.from_first(json.dumps(steps)))


def _on_mesh(opened: open_model.Opened, layout: Layout, dtype: np.dtype | None) -> Params:
    """The parameters where the mesh wants them, each laid there before the next one is read."""
    shapes, axes = abstract_params(Decoder(opened.config.model))
    places: Any = flax.traverse_util.flatten_dict(layout.shardings(axes, shapes))

    def lay(path: tuple[str, ...], leaf: np.ndarray) -> jax.Array:
        leaf = np.asarray(leaf, dtype)
        return jax.make_array_from_callback(leaf.shape, places[path], leaf.__getitem__)

    return fill(opened.parameters, opened.config.model, lay)

"""Open anything that holds a model: a run, a torch_ref folder, a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxlm import config, config_file
from jaxlm.convert import native, storage
from jaxlm.convert.canonical import canonical, fill
from jaxlm.convert.families import FAMILIES, REFUSED
from jaxlm.convert.rows import Parameters
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, Params, abstract_params
from jaxlm.numerics import Policy

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in memory: its config, its live tree as numpy arrays, and where it came from."""

    config: config.Config
    params: Params
    tokenizer_path: Path | None
    kind: str
    """`run`, `torch`, or the name of a family."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model on disk: its config, and its parameters by canonical names, each read when it is asked for."""

    path: Path
    config: config.Config
    parameters: Mapping[str, np.ndarray]
    kind: str
    """`run`, `torch`, or the name of a family."""

    @property
    def tokenizer_path(self) -> Path | None:
        """Of its tokenizer.json, if it has one."""
        return self.path / TOKENIZER if (self.path / TOKENIZER).is_file() else None

    def read(self) -> Model:
        """The whole model in memory."""
        params = fill(self.parameters, self.config.model, str(self.path))
        return Model(self.config, params, self.tokenizer_path, self.kind)


def load(path: str | Path, *, step: int | None = None) -> Model:
    """Open a run directory, a torch_ref folder or a Hugging Face folder, and read it.

    Args:
        step: which checkpoint of a run; None: the newest.

    Raises:
        UserError: `path` is none of the three, or what it holds is damaged or does not fit its config.
    """
    return open_model(path, step=step).read()


def open_model(path: str | Path, *, step: int | None = None) -> Opened:
    """As `load`, but nothing is read yet."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}", _WANTED)
    if (path / "config.toml").is_file() and (path / "checkpoints").is_dir():
        return _open_run(path, step)
    if step is not None:
        raise UserError(f"{path} is not a run, it has no step {step}")
    if (path / "config.toml").is_file():
        settings = _settings(path, "")
        return Opened(path, settings, _torch_parameters(path, settings), "torch")
    if (path / "config.json").is_file():
        return _open_family(path)
    raise UserError(f"{path}: not a model", _WANTED)


def _open_run(path: Path, step: int | None) -> Opened:
    settings = _settings(path, str(path))
    checkpoints = path / "checkpoints"
    steps = sorted(int(child.name) for child in checkpoints.iterdir() if re.fullmatch(r"\d+", child.name))
    if not steps or (step is not None and step not in steps):
        wanted = "no checkpoint" if step is None else f"no step {step}"
        raise UserError(f"{checkpoints}: {wanted}", f"there are: {', '.join(map(str, steps)) or 'none'}")
    newest = checkpoints / str(steps[-1] if step is None else step)
    if any(newest.glob("model.safetensors*")):  # a run of `--backend torch`
        parameters = _torch_parameters(newest, settings)
    else:
        parameters = canonical(_orbax_params(path, settings, step), settings.model)
    return Opened(path, settings, parameters, "run")


def _orbax_params(path: Path, settings: config.Config, step: int | None) -> Params:
    from jaxlm.train.checkpoint import Checkpointer  # Orbax takes a second to import

    # On the host: the mesh that trained the model need not exist here.
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with jax.enable_x64(True):  # float64 parameters stay so; the others have their own dtype
        shapes, _ = abstract_params(Decoder(settings.model, Policy.from_config(settings.numerics)))
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host), shapes)
        checkpoints = Checkpointer(path, read_only=True)
        params = checkpoints.restore_params(like, functools.partial(print, file=sys.stderr), step)
        checkpoints.close()
        return jax.tree.map(np.asarray, params)


def _torch_parameters(path: Path, settings: config.Config) -> Parameters:
    return Parameters(storage.read_folder(path), settings.model, native.rows(settings.model), str(path))


def _open_family(path: Path) -> Opened:
    where = path / "config.json"
    hf = storage.read_json(where)
    family = FAMILIES.get(str(hf.get("model_type")))
    if reason := REFUSED.get(str(hf.get("model_type"))):
        raise UserError(f"{where}: model_type {hf['model_type']!r}: {reason}")
    if family is None:
        raise UserError(f"{where}: model_type {hf.get('model_type')!r} is not known", f"known: {', '.join(FAMILIES)}")
    model = family.config_from_hf(hf, str(where))
    tensors = family.tensors(storage.read_folder(path), model)
    parameters = Parameters(tensors, model, family.rows(model), str(path))
    dtype = parameters.dtype("embed.embedding")
    tree: dict[str, Any] = {
        "data": {"seq_len": min(config.Data().seq_len, model.max_seq_len)},
        "numerics": {
            "params": "float64" if dtype == "float64" else "float32",
            "compute": dtype if dtype in ("bfloat16", "float64") else "float32",
        },
        "tokenizer": {"kind": "file", "path": str(path / TOKENIZER)} if (path / TOKENIZER).is_file() else {},
    }
    settings = dataclasses.replace(config_file.from_dict(tree, str(where)), model=model)
    return Opened(path, settings, parameters, family.name)


def _settings(path: Path, out_dir: str) -> config.Config:
    settings = dataclasses.replace(config_file.load(path / "config.toml"), out_dir=out_dir)
    if not settings.model.vocab_size:
        raise UserError(
            f"{path / 'config.toml'}: model.vocab_size is 0", "the config of a finished run has it resolved"
        )
    return settings


_WANTED = (
    "looked for config.toml and checkpoints/ (a run), config.toml and model.safetensors (torch_ref), "
    "config.json and model.safetensors (Hugging Face)"
)

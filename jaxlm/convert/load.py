"""Open anything that holds a model: a run, a torch_ref folder, a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxlm import config, config_file
from jaxlm.convert import native, storage
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.rows import from_layout
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
    kind: Literal["run", "torch", "llama"]


def load(path: str | Path, *, step: int | None = None) -> Model:
    """Open a run directory, a torch_ref folder or a Hugging Face folder.

    Args:
        step: which checkpoint of a run; None: the newest.

    Raises:
        UserError: `path` is none of the three, or what it holds is damaged or does not fit its config.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}", _WANTED)
    if (path / "config.toml").is_file() and (path / "checkpoints").is_dir():
        return _load_run(path, step)
    if step is not None:
        raise UserError(f"{path} is not a run, it has no step {step}")
    if (path / "config.toml").is_file():
        settings = _settings(path, "")
        return Model(settings, _torch_params(path, settings), _tokenizer(path), "torch")
    if (path / "config.json").is_file():
        return _load_family(path)
    raise UserError(f"{path}: not a model", _WANTED)


def _load_run(path: Path, step: int | None) -> Model:
    settings = _settings(path, str(path))
    checkpoints = path / "checkpoints"
    steps = sorted(int(child.name) for child in checkpoints.iterdir() if re.fullmatch(r"\d+", child.name))
    if not steps or (step is not None and step not in steps):
        wanted = "no checkpoint" if step is None else f"no step {step}"
        raise UserError(f"{checkpoints}: {wanted}", f"there are: {', '.join(map(str, steps)) or 'none'}")
    newest = checkpoints / str(steps[-1] if step is None else step)
    if any(newest.glob("model.safetensors*")):  # a run of `--backend torch`
        params = _torch_params(newest, settings)
    else:
        params = _orbax_params(path, settings, step)
    return Model(settings, params, _tokenizer(path), "run")


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


def _torch_params(path: Path, settings: config.Config) -> Params:
    return native.from_torch(storage.read_folder(path), settings.model, str(path))


def _load_family(path: Path) -> Model:
    where = path / "config.json"
    hf = storage.read_json(where)
    family = FAMILIES.get(str(hf.get("model_type")))
    if family is None:
        raise UserError(f"{where}: model_type {hf.get('model_type')!r} is not known", f"known: {', '.join(FAMILIES)}")
    model = family.config_from_hf(hf, str(where))
    tensors = storage.read_folder(path)
    tensors = tensors.without(family.extras(tensors, model))
    params = from_layout(tensors, model, family.rows(model), str(path))
    tokenizer = _tokenizer(path)
    dtype = jax.tree.leaves(params)[0].dtype.name
    tree: dict[str, Any] = {
        "numerics": {
            "params": "float64" if dtype == "float64" else "float32",
            "compute": dtype if dtype in ("bfloat16", "float64") else "float32",
        },
        "tokenizer": {"kind": "file", "path": str(tokenizer)} if tokenizer else {},
    }
    settings = dataclasses.replace(config_file.from_dict(tree, str(where)), model=model)
    return Model(settings, params, tokenizer, hf["model_type"])


def _settings(path: Path, out_dir: str) -> config.Config:
    settings = dataclasses.replace(config_file.load(path / "config.toml"), out_dir=out_dir)
    if not settings.model.vocab_size:
        raise UserError(
            f"{path / 'config.toml'}: model.vocab_size is 0", "the config of a finished run has it resolved"
        )
    return settings


def _tokenizer(path: Path) -> Path | None:
    return path / TOKENIZER if (path / TOKENIZER).is_file() else None


_WANTED = (
    "looked for config.toml and checkpoints/ (a run), config.toml and model.safetensors (torch_ref), "
    "config.json and model.safetensors (Hugging Face)"
)

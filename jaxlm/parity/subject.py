"""The model to prove: a run, a folder, a config with random weights, or a model in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import config
from jaxlm.config import registry, toml
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.open_model import Model as LoadedModel
from jaxlm.convert.open_model import load, open_nearest
from jaxlm.infer.model import Model
from jaxlm.models.decoder import Params
from jaxlm.parity.inputs import random_params


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model to prove, and where it came from."""

    name: str
    settings: config.Config
    params: Params
    tokenizer_path: Path | None
    folder: Path | None
    """Where the report belongs."""
    public: Path | None = None
    """The folder, when it is one of Hugging Face."""
    refused: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of its config.json, with their values, that jaxlm cannot express and that `settings` leave out."""


def open_subject(model: str | Path | Model | LoadedModel, *, nearest: bool = False) -> Subject:
    """Read a run, a folder or a config, or take a model in memory.

    Args:
        nearest: of a Hugging Face folder that jaxlm cannot express, take the nearest model and say what is `refused`.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    if isinstance(model, Model | LoadedModel):
        params = jax.tree.map(np.asarray, model.params)
        return Subject(f"{model.kind} in memory", model.config, params, model.tokenizer_path, None)
    path = Path(model) if Path(model).exists() else registry.find(model)
    if path.suffix == ".toml":
        settings = toml.load(path)
        if not settings.model.vocab_size:
            sized = dataclasses.replace(settings.model, vocab_size=settings.tokenizer.vocab_size)
            settings = dataclasses.replace(settings, model=sized)
        return Subject(f"{path}, random weights", settings, random_params(settings.model), None, None)
    if nearest and (path / "config.json").is_file() and not (path / "config.toml").is_file():
        opened, refused = open_nearest(path)
        loaded = opened.read()
    else:
        loaded, refused = load(path), {}
    folder = path if loaded.kind == "run" else None
    public = path if loaded.kind in FAMILIES else None
    return Subject(str(path), loaded.config, loaded.params, loaded.tokenizer_path, folder, public, refused)

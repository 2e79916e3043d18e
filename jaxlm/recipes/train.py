"""Train from Python: `jaxlm.train(config)` is what `jaxlm train CONFIG` calls."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

from jaxlm import config
from jaxlm.config import toml
from jaxlm.errors import UserError
from jaxlm.infer.trained_run import Run
from jaxlm.recipes import start


def train(
    cfg: config.Config | str | Path, *overrides: str, resume: bool = False, backend: config.Backend = "jax"
) -> Run:
    """Train the model of a config and return the run; its directory is `out_dir`.

    Args:
        cfg: a config, or a file or a name of one, which is read with `overrides` such as "train.steps=100".
        resume: continue the run, or begin it if there is none.
        backend: the framework that computes.

    Raises:
        UserError: the config, the data or the run directory is not usable.
    """
    if not isinstance(cfg, config.Config):
        cfg = toml.load(cfg, overrides)
    elif overrides:
        raise UserError(
            f"{overrides[0]!r} beside a config that is read already", "jaxlm.load_config(FILE, [OVERRIDES])"
        )
    if not cfg.out_dir:
        raise UserError("out_dir is empty", "dataclasses.replace(config, out_dir='runs/NAME')")
    with _guest(backend):
        start.run(cfg, resume=resume, backend=backend)
    return Run(cfg.out_dir)


def _guest(backend: config.Backend) -> contextlib.AbstractContextManager[None]:
    """JAX's settings as before, where JAX computes; with PyTorch it is not imported for that."""
    if backend == "torch":
        return contextlib.nullcontext()
    return importlib.import_module("jaxlm.processes.settings").settings_restored()

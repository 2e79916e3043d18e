"""The one way to begin a run, whatever its stage: meet the other processes, open data and models, train.

run(toml.load("configs/quickstart.toml"))
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.processes import meet
from jaxlm.processes.file_lock import only_trainer
from jaxlm.processes.freed_memory import keep_freed_memory
from jaxlm.recipes import make_recipe
from jaxlm.run.directory import compare_with_run, shared_facts, tokenizer_of_run, with_vocabulary
from jaxlm.run.progress import tell
from jaxlm.text.sampling import Sampling
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train.loop import Engine, FrozenFile, Progress, train
from jaxlm.train.recipe import MODEL, DataSource, Recipe, digest_of

if TYPE_CHECKING:
    from jaxlm.models.decoder import Decoder


def run(cfg: config.Config, *, resume: bool = False, backend: config.Backend = "jax") -> Progress:
    """Train by the recipe of `cfg` and leave a run directory.

    Raises:
        UserError: the config, the data or the run directory is not usable.
    """
    keep_freed_memory()
    cfg, first = join_processes(cfg, backend)
    warm = threading.Thread(target=_import_ahead, args=(backend,))  # no daemon: ending within an import aborts
    warm.start()
    cfg, recipe, source = open_stage(cfg, resume=resume, tell=tell if first else lambda _: None)
    warm.join()
    with only_trainer(Path(cfg.out_dir)) if first else contextlib.nullcontext():
        return _train(cfg, recipe, source, resume, backend)


def _train(cfg: config.Config, recipe: Recipe, source: DataSource, resume: bool, backend: config.Backend) -> Progress:
    if backend == "torch":
        from jaxlm.convert.native import to_torch
        from torch_ref.train.engine import TorchEngine

        def by_name(params: Any, model: config.Model) -> Any:
            return dict(to_torch(params, model))

        torch_engine = TorchEngine(cfg, recipe)
        frozen = give_parameters(cfg, recipe, source, torch_engine, resume, by_name)
        return train(cfg, recipe, source, torch_engine, resume=resume, frozen=frozen)
    from jaxlm.numerics import precision
    from jaxlm.train.engine import JaxEngine

    meet.agree(shared_facts(cfg, source.identity(), resume))
    with precision(cfg.numerics):
        engine = JaxEngine(cfg, recipe, completer(cfg, source.tokenizer))
        if engine.process_index == 0:
            tell(f"kernels: {engine.kernels} ({engine.layout.platform})")
        frozen = give_parameters(cfg, recipe, source, engine, resume)
        return train(cfg, recipe, source, engine, resume=resume, frozen=frozen)


def open_stage(
    cfg: config.Config, *, resume: bool, tell: Callable[[str], None] = tell
) -> tuple[config.Config, Recipe, DataSource]:
    """Open the data of the stage and compare with the run that is there; returns the resolved config with both.

    Raises:
        UserError: a run is already there and `resume` is not asked for, it has another architecture, or the data or
            the recipe is not usable.
    """
    tokenizer = tokenizer_of_run(cfg, resume=resume)
    source = make_recipe(cfg).data(tokenizer)
    cfg = with_vocabulary(cfg, source.tokenizer)
    if tokenizer is not None:
        compare_with_run(cfg, tell)
    return cfg, make_recipe(cfg), source


def give_parameters(
    cfg: config.Config,
    recipe: Recipe,
    source: DataSource,
    engine: Engine,
    resume: bool,
    layout: Callable[[Any, config.Model], Any] = lambda params, model: params,
) -> dict[str, FrozenFile]:
    """Hand the engine the parameters with which trees begin, trained and frozen; returns what the latter were.

    Args:
        layout: how the engine takes the parameters of a model.

    Raises:
        UserError: a model is not there, computes another function, or has another tokenizer.
    """
    from jaxlm.recipes.init_from import initial_params, read_params

    begins = {name: tree.path for name, tree in recipe.models.trained.items()}
    begins[MODEL] = begins[MODEL] or cfg.train.init_from
    if resume and engine.checkpoints():  # a run with a checkpoint has its own
        begins = {}
    for name, path in begins.items():
        if path:
            model = recipe.models.trained[name].model
            engine.adopt(layout(initial_params(cfg, source.tokenizer, path, model), model), name)
    files = {}
    for name, tree in recipe.models.frozen.items():
        sha256 = f"seed {cfg.seed}"
        if tree.path:
            params = read_params(tree.path, tree.model, tree.dtype)
            sha256 = digest_of(_named_leaves(params))
            engine.freeze(name, layout(params, tree.model))
        files[name] = FrozenFile(tree.path, sha256)
    return files


def join_processes(cfg: config.Config, backend: config.Backend) -> tuple[config.Config, bool]:
    """Join the other processes of the run, if there are any.

    Returns:
        The config without what is this process's own, and whether this is the first of them.

    Raises:
        UserError: see `meet.initialize`; or PyTorch, which trains in one process, is to compute.
    """
    if backend == "torch":
        if meet.find_place(cfg.distributed, os.environ):
            raise UserError("--backend torch trains in one process", "launch one, or use --backend jax")
        return cfg, True
    place = meet.initialize(cfg.distributed)
    anyone = dataclasses.replace(cfg.distributed, coordinator="", processes=0, process_id=-1)
    return dataclasses.replace(cfg, distributed=anyone), place is None or place.process_id == 0


def completer(cfg: config.Config, tokenizer: Tokenizer) -> Callable[..., list[str]]:
    """The function by which the JAX engine continues texts."""

    def complete(
        decoder: Decoder, params: Any, prompts: Sequence[str], sample: config.Sample, check: Callable[[], None]
    ) -> list[str]:
        from jaxlm.infer.text import Generator

        sampling, length = Sampling(temperature=sample.temperature), sample.max_new_tokens
        generator = Generator(decoder, params, tokenizer)
        options: Any = {"max_new_tokens": length, "seed": cfg.seed, "stream": lambda *_: check()}
        return [completion.text for completion in generator.complete(prompts, sampling, **options)]

    return complete


def _named_leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _named_leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves


def _import_ahead(backend: config.Backend) -> None:
    """Load the framework while the data is opened."""
    importlib.import_module("jaxlm.train.engine" if backend == "jax" else "torch")

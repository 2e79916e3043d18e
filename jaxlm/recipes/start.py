"""The one way to begin a run, whatever its stage: meet the other processes, open data and models, train.

run(toml.load("configs/quickstart.toml"))
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.processes import meet
from jaxlm.processes.file_lock import only_trainer
from jaxlm.processes.freed_memory import keep_freed_memory, one_step_at_a_time
from jaxlm.recipes import make_recipe
from jaxlm.run.checkpoints import checkpoint_steps
from jaxlm.run.directory import compare_with_run, shared_facts, tokenizer_of_run, with_vocabulary
from jaxlm.run.progress import counting, tell
from jaxlm.text.sampling import Sampling
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train.loop import Engine, FrozenFile, Progress, train
from jaxlm.train.recipe import BASE, MODEL, Batch, CachingSource, DataSource, Recipe, Trained, base_name, digest_of

if TYPE_CHECKING:
    from jaxlm.models.decoder import Decoder
    from jaxlm.recipes import init_from


def run(cfg: config.Config, *, resume: bool = False, backend: config.Backend = "jax") -> Progress:
    """Train by the recipe of `cfg` and leave a run directory.

    Raises:
        UserError: the config, the data or the run directory is not usable.
    """
    keep_freed_memory()
    cfg, first = join_processes(with_base(cfg), backend)
    recipe = make_recipe(cfg)  # what it imports is there before a second thread imports
    require_models(cfg, recipe, resume)
    warm = threading.Thread(target=_import_ahead, args=(backend,))  # no daemon: ending within an import aborts
    warm.start()
    cfg, recipe, source = open_stage(cfg, recipe, resume=resume, tell=tell if first else lambda _: None)
    warm.join()
    if backend == "jax":
        one_step_at_a_time()
    with only_trainer(Path(cfg.out_dir)) if first else contextlib.nullcontext():
        return _train(cfg, recipe, source, resume, backend)


def require_models(cfg: config.Config, recipe: Recipe, resume: bool) -> None:
    """Open every model that the run begins with and compare its function, before any data is read.

    Parameters are read of runs with adapters and of PEFT folders alone, which are merged as they are opened.

    Raises:
        UserError: one is not there, or computes another function than the run; says what of the run it is.
    """
    computed = {} if recipe.objective.cached is None else recipe.objective.cached.frozen
    frozen = {**computed, **recipe.models.frozen}
    trees = {f"the frozen {name}": (tree.path, tree.model) for name, tree in frozen.items() if tree.path}
    if not (resume and checkpoint_steps(cfg.out_dir)):  # else the run has its own parameters
        begun = {name: tree._replace(path=_begins(cfg, name, tree)) for name, tree in recipe.models.trained.items()}
        trees |= {f"the start of {name}": (tree.path, tree.model) for name, tree in begun.items() if tree.path}
    if not trees:
        return
    from jaxlm.convert.open_model import open_model
    from jaxlm.recipes import init_from

    for what, (path, model) in trees.items():
        try:
            opened = open_model(path)
            size = model.vocab_size or opened.config.model.vocab_size  # 0: the tokenizer says it, when it is read
            model = dataclasses.replace(model, vocab_size=size)
            init_from.require_same_function(model, opened, _key_of(cfg, path))
        except UserError as error:
            raise UserError(f"{what}: {error.message}", error.hint) from None


def _begins(cfg: config.Config, name: str, tree: Trained) -> str:
    """The path of the model with which a trained tree begins; empty: it is drawn from the seed."""
    return tree.path or (cfg.train.init_from if name == MODEL else "")


def _key_of(cfg: config.Config, path: str) -> str:
    """The path of a model, with the key of the config that names it."""
    keys = {
        "train.init_from": cfg.train.init_from,
        "preference.reference": cfg.preference.reference,
        "rl.value_from": cfg.rl.value_from,
        "distill.teacher": cfg.distill.teacher,
    }
    return next((f"{key} = {path!r}" for key, value in keys.items() if value == path), path)


def with_base(cfg: config.Config) -> config.Config:
    """The config with the model and the tokenizer of `train.init_from`: see `init_from.with_base`."""
    if not cfg.train.init_from or cfg.recipe == "pretrain":
        return cfg
    from jaxlm.recipes import init_from

    return init_from.with_base(cfg)


def _train(cfg: config.Config, recipe: Recipe, source: DataSource, resume: bool, backend: config.Backend) -> Progress:
    if backend == "torch":
        from torch_ref.train.engine import TorchEngine

        torch_engine = TorchEngine(cfg, recipe)
        frozen = give_parameters(cfg, recipe, source, torch_engine, resume, by_name=True)
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
    cfg: config.Config, recipe: Recipe, *, resume: bool, tell: Callable[[str], None] = tell
) -> tuple[config.Config, Recipe, DataSource]:
    """Open the data of the stage and compare with the run that is there; returns config and recipe resolved, and data.

    Raises:
        UserError: a run is already there and `resume` is not asked for, it has another architecture, or the data is not
            usable.
    """
    tokenizer = tokenizer_of_run(cfg, resume=resume)
    source = recipe.data(tokenizer)
    cfg = with_vocabulary(cfg, source.tokenizer)
    if tokenizer is not None:
        compare_with_run(cfg, tell)
    return cfg, recipe.with_vocabulary(cfg.model.vocab_size), source


def inspect_data(cfg: config.Config, *, step: int = 1, rows: int = 1) -> Any:
    """What `jaxlm data inspect` shows of the data of a stage: an object with `rows`, which rich can print.

    Raises:
        UserError: the data is not usable, or cannot be looked at.
    """
    cfg = with_base(cfg)
    source = make_recipe(cfg).data(None)
    inspect: Any = getattr(source, "inspect", None)
    if inspect is None:
        raise UserError(
            f"recipe = {cfg.recipe!r}: `jaxlm data inspect` shows corpora, conversations, pairs and prompts"
        )
    return inspect(step=step, rows=rows)


def give_parameters(
    cfg: config.Config,
    recipe: Recipe,
    source: DataSource,
    engine: Engine,
    resume: bool,
    *,
    by_name: bool = False,
) -> dict[str, FrozenFile]:
    """Hand the engine the parameters with which trees begin, trained and frozen; returns what the latter were.

    Args:
        by_name: the engine takes them by the names of torch_ref, not as live trees.

    Raises:
        UserError: a model is not there, computes another function, or has another tokenizer.
    """
    from jaxlm.recipes import init_from

    anew = not (resume and engine.checkpoints())  # a run with a checkpoint has its own parameters
    files: dict[str, FrozenFile] = {}
    layout = init_from.BY_NAME if by_name else init_from.LIVE
    begins = {name: _begins(cfg, name, tree) for name, tree in recipe.models.trained.items()}
    for name, tree in recipe.models.trained.items():
        if tree.adapters:
            path = begins.pop(name)
            base = init_from.initial_params(cfg, source.tokenizer, path, tree.model)
            files[base_name(name)] = FrozenFile(path, init_from.base_digest(base, tree.model))
            engine.freeze(base_name(name), layout.parameters(base, tree.model))
            if anew:
                engine.adopt(layout.adapters(base, tree, cfg), name)
    files |= _cache_numbers(cfg, recipe, source, engine, layout, files)
    for name, path in begins.items():
        if path and anew:
            model = recipe.models.trained[name].model
            params = init_from.initial_params(cfg, source.tokenizer, path, model)
            engine.adopt(layout.parameters(params, model), name)
    for name, tree in recipe.models.maps.items():
        if anew:
            engine.adopt(layout.maps(tree.draw(name, cfg.seed, cfg.numerics.params)), name)
    for name, tree in recipe.models.frozen.items():
        sha256 = f"seed {cfg.seed}"
        if tree.path:
            params = init_from.read_params(tree.path, tree.model, tree.dtype, source.tokenizer)
            sha256 = digest_of(_named_leaves(params))
            engine.freeze(name, layout.parameters(params, tree.model))
        files[name] = FrozenFile(tree.path, sha256)
    return files


def _cache_numbers(
    cfg: config.Config,
    recipe: Recipe,
    source: DataSource,
    engine: Engine,
    layout: init_from.ParameterLayout,
    bases: Mapping[str, FrozenFile],
) -> dict[str, FrozenFile]:
    """Let the source have what frozen trees say of its rows, once for all; returns what the trees were.

    It comes before the run's own parameters: in JAX only one model is in memory, unless it lies under adapters. In
    PyTorch the run's own module is already there.

    Args:
        bases: what lies under adapters; it identifies the reference where the function has no frozen tree.
    """
    from jaxlm.recipes import init_from

    function = recipe.objective.cached
    if function is None:
        return {}
    files, trees = dict[str, FrozenFile](), dict[str, Any]()
    for name, tree in function.frozen.items():
        params = init_from.read_params(tree.path, tree.model, tree.dtype, source.tokenizer)
        files[name] = FrozenFile(tree.path, digest_of(_named_leaves(params)))
        trees[name] = layout.parameters(params, tree.model)

    passes, models = itertools.count(), ", ".join(trees) or BASE

    def compute(batches: Iterator[Batch]) -> Iterator[np.ndarray]:
        if engine.process_index == 0 and next(passes) == 0:
            tell(f"the frozen {models} computes its numbers of all rows, once")
        advance(0)
        for numbers in engine.map_rows(function, batches, trees):
            advance(len(numbers))
            yield numbers

    if not isinstance(source, CachingSource):
        raise TypeError(f"{type(source).__name__} keeps no numbers of its rows")
    facts = {name: file.sha256 for name, file in (files or bases).items()}
    computed = [tree.model for tree in function.frozen.values()] or [cfg.model]
    facts["function"] = init_from.function_digest(*computed)  # the same weights may be read as another model
    facts["numerics"] = " ".join(str(value) for value in dataclasses.asdict(cfg.numerics).values())
    if not files:
        facts["quantize"] = cfg.lora.quantize + " double" * cfg.lora.double_quantize
    with counting(f"rows of the frozen {models}", quiet=engine.process_index != 0) as advance:
        source.cache(facts, compute, engine)
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
        completions = generator.complete(
            prompts, sampling, max_new_tokens=length, seed=cfg.seed, stream=lambda *_: check()
        )
        return [completion.text for completion in completions]

    return complete


def _named_leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _named_leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves


def _import_ahead(backend: config.Backend) -> None:
    """Load the framework while the data is opened.

    Of two threads that import the same modules, one may see a module half made, and Python raises what it likes (under
    pytest a SystemError); then it is this one that gives up, and what is missing is loaded when it is needed.
    """
    with contextlib.suppress(Exception):
        importlib.import_module("jaxlm.train.engine" if backend == "jax" else "torch")

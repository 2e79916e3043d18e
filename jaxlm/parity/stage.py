"""The proof of a training stage: its own loss, gradients and updates by both frameworks, on rows drawn for its columns.

Both frameworks get the same parameters of every tree, trained and frozen, and take `STEPS` updates in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert.adapters import to_torch as adapters_to_torch
from jaxlm.convert.native import maps_to_torch, to_torch
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Params, init_params
from jaxlm.parity.compare import Finding, relative
from jaxlm.parity.sides.module_hooks import array_of
from jaxlm.parity.tolerances import FLOAT64
from jaxlm.parity.trace import STEPS, numerics_of, settings_of
from jaxlm.recipes import make_recipe
from jaxlm.train import adapters
from jaxlm.train.program import Program, training_program
from jaxlm.train.recipe import MODEL, Recipe, Trained, base_name, parameter_name
from jaxlm.train.step import init_states
from torch_ref.models import attach_lora
from torch_ref.models.decoder import Decoder as TorchDecoder
from torch_ref.models.layers import linear_maps
from torch_ref.numerics import Policy as TorchPolicy
from torch_ref.train.optim import make_optimizer
from torch_ref.train.step import Part, TrainState, make_steps

ROWS, TOKENS = 2, 32
LOSS = "stage loss"
EPS = 1e-6
"""AdamW's epsilon in these steps, or that of the config if it is larger. Where the gradient of an element happens to be
near zero, a smaller one makes an update of what rounding left: of the 2.4 million elements of adapters on SmolLM2 one
parted by 2e-13 at 1e-8, and all others by less than 3e-15."""
Named = dict[str, np.ndarray]


def compare_stage(settings: config.Config, params: Params) -> Iterator[Finding]:
    """Compare the sums of the objective, and every trainable parameter after each number of `STEPS` updates.

    Args:
        params: of the model of the run; other trees are drawn from the seed.
    """
    # One device and float64: what is proved here is the mathematics of the stage; meshes and narrow types have proofs
    # of their own.
    cfg = dataclasses.replace(settings_of(settings), numerics=numerics_of("float64"), mesh=config.Mesh(data=1))
    train = dataclasses.replace(cfg.train, eps=max(EPS, cfg.train.eps))
    cfg = dataclasses.replace(cfg, train=train, data=dataclasses.replace(cfg.data, seq_len=TOKENS), seed=settings.seed)
    cfg = _with_adapters(cfg, settings.out_dir)
    recipe = make_recipe(cfg)
    batch = draw_batch(recipe, cfg)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        layout = Layout.from_config(cfg.mesh, jax.devices()[:1])
        program = training_program(cfg, layout, recipe)
        trees = _trees(program, params, cfg.seed)
        ours, theirs = dict(_of_jax(program, trees, batch)), dict(_of_torch(cfg, program, trees, batch))
        # Updates are compared as differences to the start. The parameters themselves agree to many digits even if no
        # update were made.
        begin = _named({name: trees[name] for name in recipe.models.moving}, program)
    for level in ours:
        for name, value in ours[level].items():
            start = 0.0 if level == LOSS else begin[name]
            error = relative(np.asarray(theirs[level][name] - start), np.asarray(value - start))
            yield Finding("float64", level, name, error, FLOAT64.allowed)


def draw_batch(recipe: Recipe, cfg: config.Config) -> Named:
    """Random arrays for every column: two documents a row, whole numbers below the vocabulary or `Column.below`."""
    rng, shape = np.random.default_rng(cfg.seed), (ROWS, TOKENS)
    # Two documents a row, so that a stage that sums over rows where it should sum over documents is found out.
    half = np.arange(TOKENS) % (TOKENS // 2), 1 + np.arange(TOKENS) // (TOKENS // 2)
    known = {"positions": np.broadcast_to(half[0], shape), "segments": np.broadcast_to(half[1], shape)}
    models = {**recipe.models.trained, **recipe.models.frozen}.values()
    vocabulary = min(tree.model.vocab_size for tree in models)  # a teacher's may be filled up to another size
    known |= {name: rng.integers(0, vocabulary, shape) for name in ("tokens", "targets")}
    batch = {}
    for name, column in recipe.columns.items():
        size = column.shape(ROWS, TOKENS)
        drawn = rng.random(size) if column.dtype.startswith("float") else rng.integers(0, column.below, size)
        batch[name] = np.ascontiguousarray(known.get(name, drawn).astype(column.dtype))
    return batch


def _trees(program: Program, params: Params, seed: int) -> dict[str, Params]:
    """Parameters of every tree in float64: those of the run's model, the others drawn."""
    # Each tree has its own draw: equal trees would hide that a loss takes the policy where it means the reference.
    draws = {name: jax.random.key(seed + number) for number, name in enumerate(program.modules, 1)}
    trees = {
        name: params if name == MODEL else init_params(module, draws[name]) for name, module in program.modules.items()
    }
    trees |= {name: tree.draw(name, seed, "float64") for name, tree in program.recipe.models.maps.items()}
    trees = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), trees)
    for name, tree in program.recipe.models.trained.items():
        if tree.adapters is None:
            continue
        first, rng = adapters.new_adapters(program.modules[name], tree.adapters, trees[name], seed), _random(name, seed)
        moved = jax.tree.map(lambda leaf, rng=rng: leaf + 0.01 * rng.standard_normal(leaf.shape), first)  # B is zero
        trees |= {name: moved, base_name(name): trees[name]}
    return trees


def _random(name: str, seed: int) -> np.random.Generator:
    """Other numbers for each tree, for equal adapters would hide that one is taken for another."""
    return np.random.default_rng(seed if name == MODEL else [seed, *name.encode()])


def _of_jax(program: Program, trees: Mapping[str, Params], batch: Named) -> Iterator[tuple[str, Named]]:
    models = program.recipe.models
    trained = {name: jax.tree.map(jax.numpy.asarray, trees[name]) for name in models.moving}
    frozen = {name: jax.tree.map(jax.numpy.asarray, trees[name]) for name in models.frozen}
    for name, tree in models.trained.items():
        if tree.adapters:
            below = adapters.base_collections(program.modules[name], tree.adapters, trees[base_name(name)])
            frozen[base_name(name)] = jax.tree.map(jax.numpy.asarray, below)
    # One trained tree is handed over as itself, several as a mapping: the same convention as in the engine, so the
    # objective sees what it sees in training.
    state = init_states(trained if models.several else trained[MODEL], program.parts)
    rows = {name: jax.numpy.asarray(array) for name, array in batch.items()}
    sums = program.loss_fn(state.params, frozen, rows, None)[1]  # pyright: ignore[reportArgumentType]
    yield LOSS, {name: np.asarray(value) for name, value in sums.items() if value.ndim == 0}
    for number in range(1, max(STEPS) + 1):
        state, _ = program.step(state, frozen, rows)
        if number in STEPS:
            now = jax.device_get(state.params if models.several else {MODEL: state.params})
            yield f"stage update {number}", _named(now, program)


def _named(trees: Mapping[str, Params], program: Program) -> Named:
    return {
        f"{tree}: {name}": array
        for tree, params in trees.items()
        for name, array in _by_torch_name(params, program, tree)
    }


def _by_torch_name(params: Params, program: Program, name: str) -> Iterator[tuple[str, np.ndarray]]:
    if name in program.recipe.models.maps:
        return maps_to_torch(params)
    tree = program.recipe.models.trained[name]
    if tree.adapters is None:
        return to_torch(params, tree.model)
    return adapters_to_torch(params, adapters.targets(program.modules[name], tree.adapters), tree.model)


def _with_adapters(cfg: config.Config, run: str) -> config.Config:
    """The config with `[lora]` of a run with adapters, whose model is opened with these merged."""
    file = Path(run) / "config.toml"
    options = toml.load(file).lora if run and file.is_file() else cfg.lora
    train = dataclasses.replace(cfg.train, init_from=run or cfg.train.init_from) if options.rank else cfg.train
    return dataclasses.replace(cfg, lora=dataclasses.replace(options, dropout=0.0), train=train)


def _of_torch(
    cfg: config.Config, program: Program, trees: Mapping[str, Params], batch: Named
) -> Iterator[tuple[str, Named]]:
    recipe = program.recipe
    policy, models = TorchPolicy.from_config(cfg.numerics), {**recipe.models.trained, **recipe.models.frozen}
    modules: dict[str, Any] = {}
    for name, tree in models.items():
        modules[name] = TorchDecoder(_reference(tree.model), policy).eval()
        below = base_name(name) if isinstance(tree, Trained) and tree.adapters else name
        tensors = {key: torch.tensor(np.asarray(x)) for key, x in to_torch(trees[below], tree.model)}
        # Everything is frozen first, and then opened by the filter of the stage: what the filter forgets would
        # otherwise still move.
        modules[name].load_state_dict(tensors, strict=True)
        modules[name].requires_grad_(False)
    parts = []
    for name, tree in recipe.models.trained.items():
        if tree.adapters:
            parts.append(_attached(name, tree, modules[name], program, trees[name]))
            continue
        for path, parameter in modules[name].named_parameters():
            parameter.requires_grad_(tree.moves is None or tree.moves(parameter_name(path)))
        parts.append(Part(name, tree.train, make_optimizer(modules[name], tree.train, tree.moves), modules[name]))
    for name, tree in recipe.models.maps.items():
        modules[name] = linear_maps(tree.shapes, policy)
        modules[name].load_state_dict({key: torch.tensor(array) for key, array in maps_to_torch(trees[name])})
        parts.append(Part(name, tree.train, make_optimizer(modules[name], tree.train), modules[name]))
    loss_fn = recipe.objective.torch(modules, cfg)
    tensors = {name: torch.tensor(array) for name, array in batch.items()}
    sums = loss_fn(tensors)[1]
    yield LOSS, {name: array_of(value) for name, value in sums.items() if value.ndim == 0}
    whole = recipe.objective.torch_whole(modules, cfg) if recipe.objective.torch_whole else None
    update_if, state = recipe.objective.update_if, TrainState()
    step = make_steps(loss_fn, parts, cfg.train.microbatches, seed=cfg.seed, whole=whole, update_if=update_if)
    with torch.random.fork_rng(devices=[]):  # each step seeds the generator of the process
        for number in range(1, max(STEPS) + 1):
            state, _ = step(state, tensors)
            if number in STEPS:
                yield (
                    f"stage update {number}",
                    {
                        f"{part.name}: {name}": array_of(parameter).copy()
                        for part in parts
                        for name, parameter in modules[part.name].named_parameters()
                        if parameter.requires_grad or not part.adapters
                    },
                )


def _attached(name: str, tree: Trained, module: TorchDecoder, program: Program, adapters: Params) -> Part:
    """A module with the adapters of a tree beside its linear maps."""
    options = tree.adapters
    assert options is not None
    attach_lora.attach(module, options)
    if options.quantize == "nf4":
        attach_lora.quantize(module, double=options.double_quantize)
    values = _by_torch_name(adapters, program, name)
    attach_lora.load(module, {key: torch.tensor(np.array(array)) for key, array in values})
    return Part(name, tree.train, make_optimizer(module, tree.train, attach_lora.moves(options)), module, adapters=True)


def _reference(model: config.Model) -> config.Model:
    """With the reference attention: PyTorch's fused kernel is tested by itself."""
    return dataclasses.replace(model, attention_impl="xla") if model.attention_impl == "auto" else model

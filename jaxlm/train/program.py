"""The program of a training run: the jitted step, and what it takes, as shapes with their places on the mesh.

The engine runs it and the planner compiles it, so both see the same step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.models.adapted import Adapted
from jaxlm.models.decoder import Decoder, Params, abstract_params, init_params
from jaxlm.numerics import Policy
from jaxlm.train import adapters
from jaxlm.train.optim import make_optimizer
from jaxlm.train.recipe import BASE, MODEL, Maps, Models, Recipe, RowFunction, Trained, base_name
from jaxlm.train.step import LossFn, Part, TrainState, init_states, make_steps, moving, within


class Program(NamedTuple):
    """What `train.engine` runs: built from the config, the mesh and the recipe alone, nothing is allocated."""

    recipe: Recipe
    modules: Mapping[str, Decoder]
    """The Flax modules of all models by name, trained and frozen."""
    loss_fn: LossFn
    parts: tuple[Part, ...]
    maps_shapes: Mapping[str, Params]
    """Shapes of the trained trees that are no models."""
    shardings: TrainState
    """Where each leaf of the state lies."""
    frozen_shapes: dict[str, Any]
    frozen_shardings: dict[str, Any]
    step: Any
    """`jax.jit` of `(state, frozen, batch) -> (state, metrics)`; the state is donated."""

    @property
    def decoder(self) -> Decoder:
        """The model of the run."""
        return self.modules[MODEL]

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first update, from random parameters. The model takes `key` itself.

        Adapters and maps, whose first values are drawn outside of JAX, are zero until they are given.
        """
        others = [name for name in self.recipe.models.trained if name != MODEL]
        keys = {MODEL: key} | {name: jax.random.fold_in(key, number) for number, name in enumerate(others, 1)}
        trees = {name: self._drawn(name, keys[name]) for name in self.recipe.models.trained}
        trees |= {name: _zeros(shapes) for name, shapes in self.maps_shapes.items()}
        return init_states(trees if self.recipe.models.several else trees[MODEL], self.parts)

    def whole(self, params: Params, frozen: Params) -> Params:
        """The parameters of the model of the run; adapters are added to their base."""
        own = params[MODEL] if self.recipe.models.several else params
        options = self.recipe.models.trained[MODEL].adapters
        return adapters.whole_on_devices(self.decoder, options, own, frozen[BASE]) if options else own

    def tree(self, name: str, params: Params, frozen: Params) -> Any:
        """A trained tree as an objective takes it: its parameters, or its adapters beside their base."""
        own, model = params[name] if self.recipe.models.several else params, self.recipe.models.trained.get(name)
        return Adapted(own, frozen[base_name(name)]) if model and model.adapters else own

    def _drawn(self, name: str, key: jax.Array) -> Params:
        if (options := self.recipe.models.trained[name].adapters) is None:
            return init_params(self.modules[name], key)
        return _zeros(adapters.abstract_trained(self.modules[name], options)[0])


def training_program(cfg: config.Config, layout: Layout, recipe: Recipe) -> Program:
    """The training step of `cfg` on the mesh of `layout`.

    Raises:
        UserError: a size does not divide over the mesh.
    """
    policy, models = Policy.from_config(cfg.numerics), recipe.models
    rows = (cfg.train.batch_size // cfg.train.microbatches, cfg.data.seq_len)
    layout.spec(("batch", "seq"), rows, "the rows of a microbatch")
    modules = {name: Decoder(tree.model, policy) for name, tree in models.trained.items()}
    modules |= {name: Decoder(tree.model, stored_policy(policy, tree.dtype)) for name, tree in models.frozen.items()}
    loss_fn = _beside_base(recipe.objective.jax(modules, cfg), models)
    parts = tuple(_part(name, tree) for name, tree in models.trained.items())
    parts += tuple(Part(name, tree.train, make_optimizer(tree.train)) for name, tree in models.maps.items())
    maps = {name: abstract_maps(tree, policy) for name, tree in models.maps.items()}
    trained = {name: _abstract(modules[name], tree) for name, tree in models.trained.items()} | maps
    shardings = _state_shardings(trained, parts, layout)
    below = {name: abstract_params(modules[name]) for name in models.frozen}
    for name, tree in models.trained.items():
        if tree.adapters:
            below[base_name(name)] = adapters.abstract_base(modules[name], tree.adapters)
    frozen = {name: layout.shardings(axes, shapes) for name, (shapes, axes) in below.items()}
    shapes = {name: tree for name, (tree, _) in below.items()}
    matmul = cfg.numerics.matmul
    whole = _beside_base(recipe.objective.jax_whole(modules, cfg), models) if recipe.objective.jax_whole else None
    step = make_steps(
        loss_fn,
        parts,
        cfg.train.microbatches,
        seed=cfg.seed,
        layout=layout,
        matmul=matmul,
        whole=whole,
        update_if=recipe.objective.update_if,
        divisors=recipe.objective.divisors,
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated))
    of_maps = {name: tree for name, (tree, _) in maps.items()}
    return Program(recipe, modules, loss_fn, parts, of_maps, shardings, shapes, frozen, jitted)


class RowProgram(NamedTuple):
    """A row function as a program."""

    compute: Any
    """`jax.jit` of `(trained, frozen, batch) -> array`, which every device then has whole."""
    shapes: dict[str, Any]
    """Of the trees that only the function needs, and their places."""
    shardings: dict[str, Any]
    untrained: Params
    """What stands for the trained trees where none is looked at."""


def row_program(cfg: config.Config, layout: Layout, program: Program, function: RowFunction) -> RowProgram:
    """The program of a row function beside that of the training step."""
    policy, models = Policy.from_config(cfg.numerics), program.recipe.models
    beside = {n: Decoder(tree.model, stored_policy(policy, tree.dtype)) for n, tree in function.frozen.items()}
    below = {name: abstract_params(module) for name, module in beside.items()}
    compute = _beside_base(function.jax({**program.modules, **beside}, cfg), models)
    jitted = jax.jit(within(layout, cfg.numerics.matmul, compute), out_shardings=layout.replicated)
    places = {name: layout.shardings(axes, shapes) for name, (shapes, axes) in below.items()}
    untrained: Params = {name: {} for name in models.moving} if models.several else {}
    return RowProgram(jitted, {name: shapes for name, (shapes, _) in below.items()}, places, untrained)


def abstract_inputs(cfg: config.Config, layout: Layout, program: Program) -> tuple[TrainState, dict, dict[str, Any]]:
    """The state, the frozen trees and the batch that the step takes: shapes and dtypes with their shardings."""

    def placed(shapes: Any, places: Any) -> Any:
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)

    state = jax.eval_shape(program.init, jax.random.key(0))
    batch = {}
    for name, column in program.recipe.columns.items():
        shape = column.shape(cfg.train.batch_size, cfg.data.seq_len)
        place = layout.sharding(column.axes, shape, f"the batch's {name}")
        batch[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(column.dtype), sharding=place)
    return placed(state, program.shardings), placed(program.frozen_shapes, program.frozen_shardings), batch


def state_shardings(decoder: Decoder, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Where each leaf of the state of one tree lies: moments lie with their parameters, or by the optimiser's rules."""
    return _state_shardings({MODEL: abstract_params(decoder)}, (Part(MODEL, config.Train(), optimizer),), layout)


def _part(name: str, tree: Trained) -> Part:
    model = None if tree.adapters else tree.model  # a frozen router is not moved
    return Part(name, tree.train, make_optimizer(tree.train), model, tree.moves)


def _beside_base(function: Callable[..., Any], models: Models) -> Any:
    """A function of `(trained, frozen, ...)` that is handed adapters beside their base, where a tree has some."""
    names = [name for name, tree in models.trained.items() if tree.adapters]
    if not names:
        return function

    def compute(trained: Any, frozen: Any, *rest: Any) -> Any:
        if not models.several:
            return function(Adapted(trained, frozen[BASE]), frozen, *rest)
        beside = {name: Adapted(trained[name], frozen[base_name(name)]) for name in names}
        return function({**trained, **beside}, frozen, *rest)

    return compute


def stored_policy(policy: Policy, dtype: str) -> Policy:
    """The policy of a tree whose parameters are kept in another dtype."""
    wide = policy.params.itemsize > jnp.dtype("float32").itemsize  # float64 is asked for to compare, all of it
    return policy if wide else dataclasses.replace(policy, params=jnp.dtype(dtype))


def abstract_maps(tree: Maps, policy: Policy) -> adapters.Shapes:
    """Shapes and logical axes of a trained tree that is no model."""
    shapes = {name: {"kernel": jax.ShapeDtypeStruct(shape, policy.params)} for name, shape in tree.shapes.items()}
    return shapes, {name: {"kernel": ("embed", None)} for name in shapes}


def _zeros(shapes: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _abstract(module: Decoder, tree: Trained) -> adapters.Shapes:
    """Shapes and logical axes of what is trained."""
    return adapters.abstract_trained(module, tree.adapters) if tree.adapters else abstract_params(module)


def _state_shardings(trained: Mapping[str, adapters.Shapes], parts: tuple[Part, ...], layout: Layout) -> TrainState:
    params, opt_states = {}, {}
    for part in parts:
        shapes, axes = trained[part.name]
        params[part.name] = layout.shardings(axes, shapes)
        of_optimizer = layout.optimizer.shardings(axes, shapes, "optimizer.")
        opt_states[part.name] = optax.tree.map_params(
            part.optimizer,
            lambda _, sharding: sharding,
            jax.eval_shape(part.optimizer.init, moving(shapes, part.moves)),
            moving(of_optimizer, part.moves),
            transform_non_params=lambda _: layout.replicated,
        )
    whole: Any = layout.replicated
    if len(parts) == 1:
        return TrainState(whole, params[parts[0].name], opt_states[parts[0].name], whole)
    return TrainState(whole, params, opt_states, whole)

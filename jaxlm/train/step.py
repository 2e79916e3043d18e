"""The training step: microbatches, gradient, clip, guard, update, as one jitted function. It serves every objective.

    step = jax.jit(make_step(loss_fn, optimizer, config.train, seed=0), donate_argnums=0)
    state, metrics = step(state, frozen, batch)

`loss_fn(trained, frozen, batch, key)` returns a sum over the targets of the batch, and sums to report beside it;
`weight` among them divides all. So microbatches with different numbers of targets add up to the large batch, up to
rounding; balancing terms and capacities of experts alone are those of each microbatch.
`frozen` holds trees that only compute: they are neither differentiated nor donated.

Shapes: B rows, T length, M microbatches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.run.schedule import learning_rate
from jaxlm.train.expert_balance import load_metrics, update_biases
from jaxlm.train.recipe import MODEL, parameter_name

Batch = Mapping[str, Array]
Sums = dict[str, Array]
LossFn = Callable[[Any, Any, Batch, Array], tuple[Array, Sums]]
COUNTS = ("weight", "expert_load", "dropped")
"""Sums that are no weighted sums over targets."""


class TrainState(NamedTuple):
    """All that an update changes. Randomness is a function of the seed and `step`, so no key is kept."""

    step: Int[Array, ""]
    params: Any
    """The trained tree, or a dict of several."""
    opt_state: Any
    """The state of its optimiser, or a dict of several."""
    skipped: Int[Array, ""]
    """Non-finite updates in a row, up to now."""


class Part(NamedTuple):
    """How one trained tree moves."""

    name: str
    train: config.Train
    optimizer: optax.GradientTransformation
    model: config.Model | None = None
    """If it has experts, their selection biases are moved after the update by the load of the whole batch."""
    moves: Callable[[str], bool] | None = None
    """See `recipe.Trained`."""

    @property
    def balanced(self) -> config.Model | None:
        """The model, if it has experts."""
        return self.model if self.model is not None and self.model.moes else None


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of one tree, all of which moves, before the first update."""
    return init_states(params, [Part(MODEL, config.Train(), optimizer)])


def init_states(params: Any, parts: Sequence[Part]) -> TrainState:
    """The state before the first update: `params` is the tree of the only part, or a dict of the trees of several."""
    trees = _by_name(params, parts)
    opt_states = {part.name: part.optimizer.init(moving(trees[part.name], part.moves)) for part in parts}
    return TrainState(jnp.zeros((), jnp.int32), params, _bare(opt_states, parts), jnp.zeros((), jnp.int32))


def moving(tree: Any, moves: Callable[[str], bool] | None, *, rest: bool = False) -> Any:
    """The tree with None for what does not move, or with None for what does (`rest`)."""
    if moves is None:
        return tree

    def keep(path: Any, leaf: Any) -> Any:
        name = parameter_name(jax.tree_util.keystr(path, simple=True, separator="."))
        return leaf if moves(name) != rest else None

    return jax.tree_util.tree_map_with_path(keep, tree)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    train: config.Train,
    *,
    seed: int,
    layout: Layout | None = None,
    matmul: str = "default",
    model: config.Model | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Sums]]:
    """`make_steps` for one tree, all of which moves."""
    part = Part(MODEL, train, optimizer, model)
    return make_steps(loss_fn, [part], train.microbatches, seed=seed, layout=layout, matmul=matmul)


def make_steps(
    loss_fn: LossFn,
    parts: Sequence[Part],
    microbatches: int,
    *,
    seed: int,
    layout: Layout | None = None,
    matmul: str = "default",
    whole: Callable[[Any, Any, Batch], Sums] | None = None,
    update_if: Callable[[Sums], Array] | None = None,
    divisors: Mapping[str, str] = {},
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Sums]]:
    """The update as a pure function `(state, frozen, batch) -> (state, metrics)`; jit it with the state donated.

    A loss or gradient that is not finite changes nothing but the counters. Metrics: `loss` and the means of the
    other sums, `weight` (targets in the batch), `grad_norm` (before clipping), `learning_rate`, `skipped` (in a row);
    of trees other than `model` `NAME_grad_norm` and `NAME_learning_rate`. With experts, those of `load_metrics`.

    Args:
        whole: see `recipe.Objective.jax_whole`.
        update_if: see `recipe.Objective`, as for `divisors`.
    """

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        trees, opt_states = _by_name(state.params, parts), _by_name(state.opt_state, parts)
        move = {part.name: moving(trees[part.name], part.moves) for part in parts}
        rest = {part.name: moving(trees[part.name], part.moves, rest=True) for part in parts if part.moves}

        def loss(move: Any, batch: Batch, key: Array) -> tuple[Array, Sums]:
            return loss_fn(_bare(_joined(move, rest), parts), frozen, batch, key)

        if whole and microbatches > 1:
            of_rows = functools.partial(whole, state.params, frozen)
            batch = {**batch, **_over_batch(of_rows, batch, microbatches)}
        sums, grads = _gradient(loss, move, batch, key, microbatches)
        weight, metrics = jnp.maximum(sums["weight"], 1), _means(sums, divisors)
        finite = jnp.isfinite(metrics["loss"])
        new_trees, new_states = {}, {}
        for part in parts:
            name, prefix = part.name, "" if part.name == MODEL else f"{part.name}_"
            moved, new_states[name], grad_norm = _moved(part, move[name], opt_states[name], grads[name], weight)
            new_trees[name] = _joined({name: moved}, rest)[name]
            finite &= jnp.isfinite(grad_norm)
            rate = learning_rate(part.train, _updates_made(opt_states[name]).astype(float), jnp)
            metrics |= {f"{prefix}grad_norm": grad_norm, f"{prefix}learning_rate": rate}
            if part.balanced is not None:
                new_trees[name] = update_biases(new_trees[name], sums["expert_load"], part.balanced)
        new, old = (new_trees, new_states), (trees, opt_states)
        allowed = update_if(sums) if update_if else jnp.array(True)
        metrics |= {"stopped": 1.0 - allowed} if update_if else {}
        trees, opt_states = jax.tree.map(lambda new, old: jnp.where(finite & allowed, new, old), new, old)
        metrics["skipped"] = skipped = jnp.where(finite, 0, state.skipped + 1)
        for part in parts:
            if part.balanced is not None:
                metrics |= load_metrics(trees[part.name], sums, part.balanced)
        return TrainState(state.step + 1, _bare(trees, parts), _bare(opt_states, parts), skipped), metrics

    return within(layout, matmul, step)


def _means(sums: Sums, divisors: Mapping[str, str]) -> Sums:
    """The sums of a batch, each divided by the sum that divides it, and the weight as it is."""
    means = {
        name: value / jnp.maximum(sums[divisors.get(name, "weight")], 1)
        for name, value in sums.items()
        if name not in COUNTS
    }
    return means | {"weight": sums["weight"]}


def _moved(part: Part, tree: Any, opt_state: Any, grads: Any, weight: Array) -> tuple[Any, Any, Array]:
    """Returns the moved tree, its optimiser state and the norm of the gradient."""
    grad_norm = optax.tree.norm(grads) / weight
    scale = _scale(part, grad_norm, weight)
    scaled = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
    updates, opt_state = part.optimizer.update(scaled, opt_state, tree)
    return optax.apply_updates(tree, updates), opt_state, grad_norm


def _scale(part: Part, grad_norm: Array, weight: Array) -> Array:
    """What the gradient of a sum is multiplied by to be that of the mean, and clipped."""
    scale = 1 / weight
    if part.train.clip_norm:  # the 1e-6 of torch's clip_grad_norm_
        scale = scale * jnp.minimum(1, part.train.clip_norm / (grad_norm + 1e-6))
    return scale


def make_eval(
    loss_fn: LossFn, *, layout: Layout | None = None, matmul: str = "default"
) -> Callable[[Any, Any, Batch], Sums]:
    """`(params, frozen, batch) -> sums`, numbers only, without dropout."""

    def evaluate(params: Any, frozen: Any, batch: Batch) -> Sums:
        sums = loss_fn(params, frozen, batch, None)[1]  # pyright: ignore[reportArgumentType]
        return {name: value for name, value in sums.items() if value.ndim == 0}

    return within(layout, matmul, evaluate)


def _updates_made(opt_state: Any) -> Int[Array, ""]:
    """How many updates the optimiser has made, which its schedule goes by; skipped ones do not count."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def _by_name(trees: Any, parts: Sequence[Part]) -> dict[str, Any]:
    """Trees by the names of their parts: the only one stands for itself."""
    return trees if len(parts) > 1 else {parts[0].name: trees}


def _bare(trees: dict[str, Any], parts: Sequence[Part]) -> Any:
    """The inverse of `_by_name`."""
    return trees if len(parts) > 1 else trees[parts[0].name]


def _joined(moving: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Whole trees of what moves and what does not."""
    pick = lambda a, b: b if a is None else a  # noqa: E731
    absent = lambda leaf: leaf is None  # noqa: E731
    return {
        name: jax.tree.map(pick, tree, rest[name], is_leaf=absent) if name in rest else tree
        for name, tree in moving.items()
    }


def _over_batch(function: Callable[[Batch], Sums], batch: Batch, microbatches: int) -> Sums:
    """The sums of a function over all microbatches."""
    same, parts = _microbatches(batch, microbatches)
    shapes = jax.eval_shape(function, same | {name: x[0] for name, x in parts.items()})
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    add = lambda total, rows: (jax.tree.map(jnp.add, total, function(same | rows)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, parts)[0]


def _microbatches(batch: Batch, microbatches: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """What is the same in each part, and the rows of the parts: row b goes to microbatch b mod M, so that each device
    keeps its own rows."""
    same = {name: x for name, x in batch.items() if x.ndim == 0}
    parts = {name: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items() if x.ndim > 0}
    return same, parts


def _gradient(
    loss_fn: Callable[..., Any], params: Any, batch: Batch, key: Array, microbatches: int
) -> tuple[Sums, Any]:
    """Sums and gradient of the whole batch, one microbatch at a time."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if microbatches == 1:
        grads, sums = grad_fn(params, batch, key)
        return sums, grads

    def add(total: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
        index, rows = part
        grads, sums = grad_fn(params, {**same, **rows}, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, (sums, grads)), None

    same, parts = _microbatches(batch, microbatches)
    shapes = jax.eval_shape(grad_fn, params, same | {name: x[0] for name, x in parts.items()}, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[0]))
    return jax.lax.scan(add, zeros, (jnp.arange(microbatches), parts))[0]


def within(layout: Layout | None, matmul: str, function: Callable) -> Callable:
    """`function`, traced where activations are placed by `layout` and matrix products have the precision `matmul`."""

    def traced(*args: Any) -> Any:
        with layout.active() if layout else contextlib.nullcontext(), jax.default_matmul_precision(matmul):
            return function(*args)

    return traced

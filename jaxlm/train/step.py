"""The training step: microbatches, gradient, clip, guard, update, as one jitted function. It serves every objective.

    step = jax.jit(make_step(loss_fn, optimizer, config.train, seed=0), donate_argnums=0)
    state, metrics = step(state, batch)

`loss_fn(params, batch, key)` returns a sum over the targets of the batch, and sums to report beside it; `weight` among
them divides all. So microbatches with different numbers of targets add up to exactly the large batch.

Shapes: B rows, T length, M microbatches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.run.schedule import learning_rate
from jaxlm.train.expert_balance import load_metrics, update_biases

Batch = Mapping[str, Array]
Sums = dict[str, Array]
LossFn = Callable[[Any, Batch, Array], tuple[Array, Sums]]
COUNTS = ("weight", "expert_load", "dropped")
"""Sums that are no weighted sums over targets."""


class TrainState(NamedTuple):
    """All that an update changes. Randomness is a function of the seed and `step`, so no key is kept."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    skipped: Int[Array, ""]
    """Non-finite updates in a row, up to now."""


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    train: config.Train,
    *,
    seed: int,
    layout: Layout | None = None,
    matmul: str = "default",
    model: config.Model | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """The update as a pure function `(state, batch) -> (state, metrics)`; jit it with the state donated.

    A non-finite loss or gradient changes nothing but the counters. Metrics: `loss` and the means of the other sums,
    `weight` (targets in the batch), `grad_norm` (before clipping), `learning_rate`, `skipped` (in a row). With a
    `model` that has experts, its selection biases are moved after the update by the load of the whole batch, and there
    are the metrics of `load_metrics`.
    """
    balanced = model if model and model.moes else None

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        sums, grads = _gradient(loss_fn, state.params, batch, key, train.microbatches)
        weight = jnp.maximum(sums["weight"], 1)
        grad_norm = optax.tree.norm(grads) / weight
        metrics = {name: value / weight for name, value in sums.items() if name not in COUNTS}

        scale = 1 / weight
        if train.clip_norm:
            scale = scale * jnp.minimum(1, train.clip_norm / (grad_norm + 1e-6))  # the 1e-6 of torch's clip_grad_norm_
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if balanced:
            params = update_biases(params, sums["expert_load"], balanced)

        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics |= {
            "weight": sums["weight"],
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(train, _updates_made(state.opt_state).astype(float), jnp),
            "skipped": skipped,
        }
        if balanced:
            metrics |= load_metrics(params, sums, balanced)
        return TrainState(state.step + 1, params, opt_state, skipped), metrics

    return _within(layout, matmul, step)


def make_eval(
    loss_fn: LossFn, *, layout: Layout | None = None, matmul: str = "default"
) -> Callable[[Any, Batch], Sums]:
    """`(params, batch) -> sums`, numbers only, without dropout."""

    def evaluate(params: Any, batch: Batch) -> Sums:
        sums = loss_fn(params, batch, None)[1]  # pyright: ignore[reportArgumentType]
        return {name: value for name, value in sums.items() if value.ndim == 0}

    return _within(layout, matmul, evaluate)


def _updates_made(opt_state: Any) -> Int[Array, ""]:
    """How many updates the optimiser has made, which its schedule goes by; skipped ones do not count."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def _gradient(loss_fn: LossFn, params: Any, batch: Batch, key: Array, microbatches: int) -> tuple[Sums, Any]:
    """Sums and gradient of the whole batch, one microbatch at a time."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if microbatches == 1:
        grads, sums = grad_fn(params, batch, key)
        return sums, grads

    def add(total: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
        index, rows = part
        grads, sums = grad_fn(params, rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, (sums, grads)), None

    # row b goes to microbatch b mod M, so that each device keeps its own rows
    parts = {name: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
    shapes = jax.eval_shape(grad_fn, params, {name: x[0] for name, x in parts.items()}, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[0]))
    return jax.lax.scan(add, zeros, (jnp.arange(microbatches), parts))[0]


def _within(layout: Layout | None, matmul: str, function: Callable) -> Callable:
    """`function`, traced where activations are placed by `layout` and matrix products have the precision `matmul`."""

    def traced(*args: Any) -> Any:
        with layout.active() if layout else contextlib.nullcontext(), jax.default_matmul_precision(matmul):
            return function(*args)

    return traced

"""The program of a training run: the jitted step, and what it takes, as shapes with their places on the mesh.

The engine runs it and the planner compiles it, so both see the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, abstract_params
from jaxlm.numerics import Policy
from jaxlm.train.optim import make_optimizer
from jaxlm.train.step import LossFn, TrainState, init_state, make_step

MakeLoss = Callable[[Decoder, config.Train], LossFn]


class Program(NamedTuple):
    """What `train.engine` runs: built from the config and the mesh alone, nothing is allocated."""

    decoder: Decoder
    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    shardings: TrainState
    """Where each leaf of the state lies."""
    step: Any
    """`jax.jit` of `(state, batch) -> (state, metrics)`; the state is donated."""


def training_program(cfg: config.Config, layout: Layout, make_loss: MakeLoss) -> Program:
    """The training step of `cfg` on the mesh of `layout`.

    Raises:
        UserError: a size does not divide over the mesh.
    """
    decoder = Decoder(cfg.model, Policy.from_config(cfg.numerics))
    rows = (cfg.train.batch_size // cfg.train.microbatches, cfg.data.seq_len)
    layout.spec(("batch", "seq"), rows, "the rows of a microbatch")
    loss_fn, optimizer = make_loss(decoder, cfg.train), make_optimizer(cfg.train)
    shardings = state_shardings(decoder, optimizer, layout)
    matmul = cfg.numerics.matmul
    step = make_step(loss_fn, optimizer, cfg.train, seed=cfg.seed, model=cfg.model, layout=layout, matmul=matmul)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated))
    return Program(decoder, loss_fn, optimizer, shardings, jitted)


def abstract_inputs(cfg: config.Config, layout: Layout, program: Program) -> tuple[TrainState, dict[str, Any]]:
    """The state and the batch that the step takes: shapes and dtypes with their shardings."""
    shapes = abstract_params(program.decoder)[0]
    state = jax.eval_shape(lambda params: init_state(params, program.optimizer), shapes)
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, program.shardings
    )
    rows = (cfg.train.batch_size, cfg.data.seq_len)
    integers = dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32)
    kinds = integers | {"weights": jnp.float32}
    return placed, {name: jax.ShapeDtypeStruct(rows, kind, sharding=layout.batch) for name, kind in kinds.items()}


def state_shardings(decoder: Decoder, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Where each leaf of the training state lies: moments lie with their parameters, or by the optimiser's rules."""
    shapes, axes = abstract_params(decoder)
    params = layout.shardings(axes, shapes)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        layout.optimizer.shardings(axes, shapes, "optimizer."),
        transform_non_params=lambda _: layout.replicated,
    )
    whole: Any = layout.replicated
    return TrainState(whole, params, opt_state, whole)

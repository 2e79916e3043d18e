"""What a framework makes of the inputs, under canonical names: the common form of both sides, and the side of jaxlm.

A side is asked for one dtype at a time, so that no more than two traces and the golden one are in memory.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlm import config
from jaxlm.convert.native import to_torch
from jaxlm.data.completion import GREEDY, right_padded
from jaxlm.infer.generate import bucket, generate
from jaxlm.models.decoder import Decoder, Params, unrolled, unstack_layers
from jaxlm.numerics import Policy
from jaxlm.parity.inputs import Inputs
from jaxlm.recipes.pretrain import loss_fn
from jaxlm.train.optim import make_optimizer
from jaxlm.train.step import LossFn, TrainState, init_state, make_step

Arrays = dict[str, np.ndarray]

DTYPES = ("float64", "float32", "bfloat16")
STEPS = (1, 20)
LEARNING_RATE = 3e-4
"""Highest peak of the optimiser steps. Longer strides over the same rows amplify rounding: 20 updates of the quickstart
model at 4e-3 part by 5e-11 in float64, at 3e-4 by 1e-13. An update is judged relative to its own size."""
LEVELS = ("forward", "loss", "gradients", *(f"update {steps}" for steps in STEPS))
"""What is compared tensor by tensor, in the order of computation; the greedy tokens come last."""
CHOICE = ("experts", "biased")
"""What a router returns besides its weights and `compare_routing` looks at, after a `#` behind its name."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """Everything that one framework computed in one dtype."""

    levels: Mapping[str, Arrays]
    """Of `LEVELS`: name to value, in the order of computation. Gradients and updates by the names of torch_ref."""
    tokens: list[list[int]]
    """The greedy continuation of each prompt."""
    weights: Arrays
    """The parameters before the first update, by the names of torch_ref."""


@runtime_checkable
class Side(Protocol):
    """One implementation of a model, ready to be traced."""

    name: str

    def trace(self, dtype: str, inputs: Inputs, told: Callable[[str], None]) -> Trace:
        """Compute everything in `dtype`; `told` is called with the name of each part as it is begun."""
        ...

    def weights(self) -> Arrays:
        """The parameters as they are stored, by the names of torch_ref."""
        ...

    def forward(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """The outputs of all modules for these rows, by the names of torch_ref, and `logits`."""
        ...

    def gradients(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """The gradients of these rows alone, by the names of torch_ref."""
        ...

    def next_logits(self, dtype: str, ids: list[int]) -> np.ndarray:
        """Logits [V] of the token after `ids`, without a cache."""
        ...


def numerics_of(dtype: str) -> config.Numerics:
    """What is computed in which dtype: bfloat16 keeps float32 parameters, as in training."""
    params = "float64" if dtype == "float64" else "float32"
    return config.Numerics(params=params, compute=dtype, matmul="highest")  # pyright: ignore[reportArgumentType]


def settings_of(settings: config.Config) -> config.Config:
    """The config that both sides follow: no dropout, and a run of twenty steps that has both ends of the schedule."""
    train = dataclasses.replace(
        settings.train,
        steps=max(STEPS),
        warmup_steps=min(5, settings.train.warmup_steps),
        learning_rate=min(LEARNING_RATE, settings.train.learning_rate),
        batch_size=2,
        microbatches=1,
    )
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, dropout=0.0), train=train)


class JaxSide:
    """jaxlm: the decoder with its layers unrolled for the forward and the gradient, as configured for the steps."""

    name = "jaxlm"

    def __init__(self, settings: config.Config, params: Params) -> None:
        self._settings, self._params = settings_of(settings), params

    def trace(self, dtype: str, inputs: Inputs, told: Callable[[str], None]) -> Trace:
        """See `Side`."""
        with _precision(dtype):
            decoder, params = self._decoder(dtype)
            told("forward and gradient")
            captured, sums, gradients = self._compute(decoder, params, inputs.rows)
            levels = {
                "forward": _outputs(captured),
                "loss": {name: sums[name] for name in ("loss", "nll")},
                "gradients": gradients,
            }
            told("optimiser steps")
            levels |= self._updates(decoder, params, inputs)
            told("greedy tokens")
            tokens = generate(decoder, params, inputs.prompts, GREEDY, max_new_tokens=inputs.new_tokens)
            weights = dict(to_torch(jax.device_get(params), decoder.config))
        return Trace(levels, tokens, weights)

    def weights(self) -> Arrays:
        """See `Side`."""
        return dict(to_torch(self._params, self._settings.model))

    def forward(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """See `Side`."""
        with _precision(dtype):
            return _outputs(self._compute(*self._decoder(dtype), rows)[0])

    def gradients(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """See `Side`."""
        with _precision(dtype):
            return self._compute(*self._decoder(dtype), rows)[2]

    def next_logits(self, dtype: str, ids: list[int]) -> np.ndarray:
        """See `Side`."""
        *places, _ = right_padded([ids], bucket(len(ids)), 0)
        with _precision(dtype):
            decoder, params = self._decoder(dtype)
            return np.asarray(_logits(decoder, params, *places)[0, len(ids) - 1])

    def _decoder(self, dtype: str) -> tuple[Decoder, Params]:
        policy = Policy.from_config(numerics_of(dtype))
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, policy.params), self._params)
        return Decoder(short_chunks(self._settings.model), policy), params

    def _compute(
        self, decoder: Decoder, params: Params, rows: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, Any], Arrays, Arrays]:
        """Outputs of all modules, means of the loss, and gradients by the names of torch_ref."""
        opened = unrolled(without_remat(decoder))
        params = unstack_layers(params, decoder.config)
        computed = _forward_and_gradient(opened, self._settings.train, params, dict(rows))
        captured, sums, gradients = jax.device_get(computed)
        return captured, sums, dict(to_torch(gradients, opened.config))

    def _updates(self, decoder: Decoder, params: Params, inputs: Inputs) -> dict[str, Arrays]:
        """How far the optimiser has moved each parameter after each number of `STEPS`."""
        train = self._settings.train
        state = init_state(params, make_optimizer(train))
        begin, levels = dict(to_torch(jax.device_get(params), decoder.config)), {}
        for number in range(1, max(STEPS) + 1):
            state, _ = _step(decoder, train, state, dict(inputs.step_rows))
            if number in STEPS:
                now = to_torch(jax.device_get(state.params), decoder.config)
                levels[f"update {number}"] = {name: moved(array, begin[name]) for name, array in now}
        return levels


def moved(now: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """The difference of two states of a parameter, which is small against both, in float64."""
    return now.astype(np.float64) - begin.astype(np.float64)


def short_chunks(model: config.Model) -> config.Model:
    """The same model with the least chunks in the scan of Mamba, unless it says how long they are.

    XLA compiles every token of a chunk, three times in three dtypes: twice as fast for 2 tokens as for 8. The length
    changes the order of one sum, that of the gradient of A.
    """
    if model.mamba.chunk or any(model.halves(kind).mixer_name == "mamba2" for kind in model.pattern):
        return model
    return dataclasses.replace(model, mamba=dataclasses.replace(model.mamba, chunk=2))


def without_remat(decoder: Decoder) -> Decoder:
    """The same decoder, with nothing recomputed: what a recomputed block holds cannot be captured."""
    return decoder.clone(config=dataclasses.replace(decoder.config, remat="none"))


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    """float64 only where it is asked for, and only here: it is a switch of the whole thread."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward_and_gradient(decoder: Decoder, train: config.Train, params: Params, batch: Any) -> Any:
    """The output of every module, the means of the loss, and the gradient of its mean."""
    _, captured = decoder.apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch["segments"],
        capture_intermediates=lambda module, method: method == "__call__" and not isinstance(module, nn.Dropout),
        mutable=["intermediates"],
    )
    objective = loss_fn(decoder, train)

    def mean(params: Params) -> tuple[jax.Array, Any]:
        loss, sums = objective(params, batch, None)  # pyright: ignore[reportArgumentType]  (no dropout, no key)
        return loss / sums["weight"], {name: value / sums["weight"] for name, value in sums.items()}

    gradients, means = jax.grad(mean, has_aux=True)(params)
    return captured["intermediates"], means, gradients


_logits = jax.jit(lambda decoder, params, *places: decoder.apply({"params": params}, *places)[0], static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(decoder: Decoder, train: config.Train, state: TrainState, batch: Any) -> Any:
    """The update of training without noise; jitted here, so that it is compiled once for all comparisons of a model."""
    objective = loss_fn(decoder, train)
    still: LossFn = lambda params, batch, _: objective(params, batch, None)  # noqa: E731  # pyright: ignore
    options: Any = {"seed": 0, "matmul": "highest", "model": decoder.config}
    return make_step(still, make_optimizer(train), train, **options)(state, batch)


def _outputs(captured: Mapping[str, Any], prefix: str = "") -> Arrays:
    """Flax's tree of captured outputs as `layers.0.mixer.q_proj`; a cache beside an output is dropped."""
    found: Arrays = {}
    for key, value in captured.items():
        if key == "__call__":
            found |= returned(prefix.removesuffix(".") or "logits", value[0])
        else:
            name = key.replace("layers_", "layers.", 1) if not prefix else key
            found |= _outputs(value, f"{prefix}{name}.")
    return found


def returned(name: str, output: Any) -> dict[str, Any]:
    """What a module returned, by its name; a cache beside an output is dropped, of a router the choice is kept."""
    if not isinstance(output, tuple):
        return {name: output}
    choice = {f"{name}#{what}": getattr(output, what) for what in CHOICE if hasattr(output, what)}
    return {name: output[0], **choice}

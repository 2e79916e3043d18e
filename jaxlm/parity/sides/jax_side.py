"""jaxlm as a side of a comparison: every module's output, gradients, updates and tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlm import config
from jaxlm.convert.native import to_torch
from jaxlm.infer.generate import bucket, generate
from jaxlm.models.decoder import Decoder, Params, abstract_params, unrolled, unstack_layers
from jaxlm.numerics import Policy
from jaxlm.ops.moe.router import Routing
from jaxlm.parity.inputs import Inputs
from jaxlm.parity.sides.score_loss import jax_loss
from jaxlm.parity.trace import (
    ARRIVES,
    LOGITS,
    RETURNS,
    ROUTING,
    STEPS,
    Arrays,
    Events,
    Trace,
    moved,
    numerics_of,
    returned,
    settings_of,
)
from jaxlm.text.completion import right_padded
from jaxlm.text.sampling import GREEDY
from jaxlm.train.optim import make_optimizer
from jaxlm.train.step import LossFn, TrainState, init_state, make_step


class JaxSide:
    """jaxlm: the decoder with its layers unrolled for the forward and the gradient, as configured for the steps."""

    mirrors = True

    def __init__(self, settings: config.Config, params: Params, name: str = "jaxlm") -> None:
        self._settings, self._params, self.name = settings_of(settings), params, name

    def trace(self, dtype: str, inputs: Inputs, progress: Callable[[str], None]) -> Trace:
        """See `Side`."""
        levels, tokens = {}, []
        with _precision(dtype):
            decoder, params = self._decoder(dtype)
            if inputs.wants("forward", "loss", "gradients"):
                progress("forward and gradient")
                found = self._compute(decoder, params, inputs.rows, inputs.wants("gradients"))
                levels = {level: arrays for level, arrays in found.items() if inputs.wants(level)}
            if inputs.wants("update"):
                progress("optimiser steps")
                levels |= self._updates(decoder, params, inputs)
            if inputs.wants("generation"):
                progress("greedy tokens")
                tokens = generate(decoder, params, inputs.prompts, GREEDY, max_new_tokens=inputs.new_tokens)
            weights = dict(to_torch(jax.device_get(params), decoder.config)) if inputs.wants("update") else {}
        return Trace(levels, tokens, weights)

    def weights(self) -> Arrays:
        """See `Side`."""
        return dict(to_torch(self._params, self._settings.model))

    def forward(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """See `Side`."""
        with _precision(dtype):
            return self._compute(*self._decoder(dtype), rows, False)["forward"]

    def gradients(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """See `Side`."""
        with _precision(dtype):
            return self._compute(*self._decoder(dtype), rows, True)["gradients"]

    def next_logits(self, dtype: str, ids: list[int]) -> np.ndarray:
        """See `Side`."""
        *places, _ = right_padded([ids], bucket(len(ids)), 0)
        with _precision(dtype):
            decoder, params = self._decoder(dtype)
            return np.asarray(_logits(decoder, params, *places)[0, len(ids) - 1])

    def replay(self, dtype: str, rows: Mapping[str, np.ndarray], inputs: Arrays | None) -> Events:
        """See `Side`."""
        with _precision(dtype):
            decoder, params = self._decoder(dtype)
            # A scan has one module for all layers, whose outputs are stacked and cannot be replaced one by one.
            # Unrolled, every layer is a module by its own name, as in torch.
            opened, params = unrolled(without_remat(decoder)), unstack_layers(params, decoder.config)
            forced = None if inputs is None else _nested(inputs)
            places = tuple(rows[name] for name in ("tokens", "positions", "segments"))
            # Two dictionaries of Flax, one for each kind of event; merged in the order of computation, which jit does
            # not keep.
            arrived, returned = jax.device_get(_replayed(opened, params, forced, *places))
            found = {(ARRIVES, name): x for name, x in _outputs(arrived).items()}
            found |= {(RETURNS, name): x for name, x in _outputs(returned).items()}
        return {event: found[event] for event in events_of(self._settings.model) if event in found}

    def _decoder(self, dtype: str) -> tuple[Decoder, Params]:
        policy = Policy.from_config(numerics_of(dtype))
        # By numpy: a program of JAX would be compiled for each shape.
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, policy.params)), self._params)
        return Decoder(short_chunks(self._settings.model), policy), params

    def _compute(
        self, decoder: Decoder, params: Params, rows: Mapping[str, np.ndarray], gradients: bool
    ) -> dict[str, Arrays]:
        """Outputs of all modules, means of the loss, and gradients by the names of torch_ref, if wanted."""
        opened = unrolled(without_remat(decoder))
        params = unstack_layers(params, decoder.config)
        computed = _forward_and_gradient(opened, self._settings.train, gradients, params, dict(rows))
        # One program gives outputs, sums and gradients: to compile it is what costs here, not to run it.
        captured, sums, derived = jax.device_get(computed)
        levels = {"forward": self._ordered(_outputs(captured)), "loss": {name: sums[name] for name in ("loss", "nll")}}
        return levels | ({"gradients": dict(to_torch(derived, opened.config))} if gradients else {})

    def _ordered(self, outputs: Arrays) -> Arrays:
        """A jitted function returns its outputs sorted by name."""
        order = [name for kind, name in events_of(self._settings.model) if kind == RETURNS]
        return {name: outputs[name] for name in order if name in outputs} | outputs

    def _updates(self, decoder: Decoder, params: Params, inputs: Inputs) -> dict[str, Arrays]:
        """How far the optimiser has moved each parameter after each number of `STEPS`."""
        train = self._settings.train
        # The steps run with the model as configured, scanned or not: the loop over layers is part of what is proved.
        # A step gives its state away, so that there is one at a time; the parameters before it are needed later.
        state = init_state(jax.tree.map(jnp.copy, params), make_optimizer(train))
        begin, levels = dict(to_torch(jax.device_get(params), decoder.config)), {}
        for number in range(1, max(STEPS) + 1):
            state, _ = _step(decoder, train, state, dict(inputs.step_rows))
            if number in STEPS:
                now = to_torch(jax.device_get(state.params), decoder.config)
                levels[f"update {number}"] = {name: moved(array, begin[name]) for name, array in now}
        return levels


_NUMBERS = itertools.count()


@functools.lru_cache(maxsize=8)
def events_of(model: config.Model) -> tuple[tuple[str, str], ...]:
    """What arrives and returns, in the order of computation; traces every block, of which nothing is computed."""
    decoder = unrolled(without_remat(Decoder(model)))
    events: dict[tuple[str, str], None] = {}

    def watch(call: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        # Dropout is skipped on both sides: without noise it does nothing.
        if not _is_watched(context):
            return call(*args, **kwargs)
        name = _dotted(context.module.path)
        events.setdefault((ARRIVES, name))
        # The choice of experts arrives as a tuple beside the tokens. Its parts are events of their own, so that it can
        # be forced: one token sent elsewhere would be taken for an error of the experts.
        if name.endswith(".experts"):
            events.update(dict.fromkeys((ARRIVES, f"{name}#{what}") for what in ROUTING))
        output = call(*args, **kwargs)
        events.setdefault((RETURNS, name))
        return output

    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    # Blocks that have equal variables are traced once for all: these have not.
    apart = {f"layers_{i}": {"apart": jax.ShapeDtypeStruct((next(_NUMBERS),), jnp.int8)} for i in range(model.n_layers)}
    variables = {"params": abstract_params(decoder)[0], "apart": apart}
    with nn.intercept_methods(watch):
        jax.eval_shape(decoder.apply, variables, ids, ids, ids)
    return tuple(events)


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


def _is_watched(context: nn.module.InterceptorContext) -> bool:
    return context.method_name == "__call__" and not isinstance(context.module, nn.Dropout)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward_and_gradient(decoder: Decoder, train: config.Train, gradients: bool, params: Params, batch: Any) -> Any:
    """The output of every module, the means of the loss, and the gradient of its mean, if wanted."""
    _, captured = decoder.apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch["segments"],
        capture_intermediates=_captured,
        mutable=["intermediates"],
    )
    objective = jax_loss(decoder, train)

    def mean(params: Params) -> tuple[jax.Array, Any]:
        loss, sums = objective(params, {}, batch, None)  # pyright: ignore[reportArgumentType]  (no dropout, no key)
        return loss / sums["weight"], {name: value / sums["weight"] for name, value in sums.items()}

    # The gradient of the mean, as torch differentiates it; sums leave as means too, for comparison over frameworks.
    derived, means = jax.grad(mean, has_aux=True)(params) if gradients else (None, mean(params)[1])
    return captured["intermediates"], means, derived


def _captured(module: nn.Module, method: str) -> bool:
    return method == "__call__" and not isinstance(module, nn.Dropout)


@functools.partial(jax.jit, static_argnums=0)
def _replayed(decoder: Decoder, params: Params, forced: Any, *places: Any) -> Any:
    """What arrives at every module and what it returns; `forced` replaces what arrives where it has the same shape.

    Both are collections of variables, which pass through the jit of a block; a closure would not.
    """
    variables = {"params": params} | ({} if forced is None else {"forced": forced})
    with nn.intercept_methods(_force):
        _, collections = decoder.apply(
            variables, *places, capture_intermediates=_captured, mutable=["intermediates", "arriving"]
        )
    return collections["arriving"], collections["intermediates"]


def _force(call: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    if not _is_watched(context) or not context.module.path:
        return call(*args, **kwargs)
    # The first argument of every watched module is its input. Positions, masks and caches behind it are the same on
    # both sides and stay.
    x, *rest = args
    x = _exchanged(context.module, "__call__", x)
    if rest and isinstance(rest[0], Routing):
        exchanged = {name: _exchanged(context.module, f"#{name}", getattr(rest[0], name)) for name in ROUTING}
        rest[0] = rest[0]._replace(**exchanged)
    return call(x, *rest, **kwargs)


def _exchanged(module: nn.Module, key: str, x: jax.Array) -> jax.Array:
    """Note what arrives, and give what is forced."""
    # Noted before it is replaced: what would have arrived is what is compared, what is forced is what is computed with.
    module.sow("arriving", key, x)
    forced = module.get_variable("forced", key)
    return x if forced is None or forced.shape != x.shape else jnp.asarray(forced, x.dtype)


_logits = jax.jit(lambda decoder, params, *places: decoder.apply({"params": params}, *places)[0], static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(decoder: Decoder, train: config.Train, state: TrainState, batch: Any) -> Any:
    """The update of training without noise; jitted here, so that it is compiled once for all comparisons of a model."""
    objective = jax_loss(decoder, train)
    still: LossFn = lambda params, frozen, batch, _: objective(params, frozen, batch, None)  # noqa: E731  # pyright: ignore
    step = make_step(still, make_optimizer(train), train, seed=0, matmul="highest", model=decoder.config)
    return step(state, {}, batch)


def _outputs(captured: Mapping[str, Any], prefix: str = "") -> Arrays:
    """Flax's tree of what was captured as `layers.0.mixer.q_proj`; a cache beside an output is dropped."""
    found: Arrays = {}
    for key, value in captured.items():
        if isinstance(value, Mapping):
            found |= _outputs(value, f"{prefix}{_dotted((key,)) if not prefix else key}.")
        else:
            found |= returned((prefix.removesuffix(".") or LOGITS) + key.removeprefix("__call__"), value[0])
    return found


def _nested(inputs: Arrays) -> dict[str, Any]:
    """The inverse of `_outputs`, for modules whose input is no matter of ids."""
    tree: dict[str, Any] = {}
    for name, x in inputs.items():
        # `layers.3` of torch is `layers_3` of Flax, and the method is the last key, as `sow` writes it.
        module, _, key = name.partition("#")
        path = re.sub(r"^layers\.(\d+)", r"layers_\1", module).split(".")
        inside = tree
        for part in path:
            inside = inside.setdefault(part, {})
        inside[f"#{key}" if key else "__call__"] = x
    return tree


def _dotted(path: tuple[str, ...]) -> str:
    return re.sub(r"^layers_(\d+)", r"layers.\1", ".".join(path)) or LOGITS

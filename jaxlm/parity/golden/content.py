"""The content of a golden file: what is frozen of a model, and how."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlm import config
from jaxlm.config import toml
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, abstract_params
from jaxlm.parity.compare import compare_by_ratio, relative
from jaxlm.parity.golden.file import Golden, Shown
from jaxlm.parity.golden.projection import sketch
from jaxlm.parity.inputs import Inputs
from jaxlm.parity.report import describe, versions
from jaxlm.parity.sides.jax_side import without_remat
from jaxlm.parity.trace import DTYPES, STEPS, Side, Trace, settings_of

TAIL = 8
"""How many logits are kept as they are."""


DRAWS = 5
"""Draws of rows, the same at both times, by which an alarm about a gradient below float64 is confirmed."""


Progress = Callable[[str, str], None]
"""Called with a dtype and what begins, and with two empty words at the end."""


_CHOICES = (
    *("dropout", "init_std", "attention_impl", "layer_loop", "remat"),
    *("moe.impl", "moe.exchange", "mamba.impl", "mamba.chunk"),
)

"""Options of `[model]` that change no result but by rounding, or are left out of the comparison."""


_STEPS = (
    *("learning_rate", "schedule", "warmup_steps", "final_lr_fraction", "decay_fraction", "beta1", "beta2", "eps"),
    *("weight_decay", "clip_norm", "z_loss", "label_smoothing"),
)


def freeze(
    side: Side,
    settings: config.Config,
    inputs: Inputs,
    dtypes: Sequence[str] = DTYPES,
    progress: Progress = lambda dtype, part: None,
) -> Golden:
    """Everything that a golden file holds.

    Raises:
        UserError: a value is NaN or infinite.
    """
    trace = lambda dtype: side.trace(dtype, inputs, lambda part: progress(dtype, part))  # noqa: E731
    exact = in_order(trace("float64"), settings.model)
    _require_finite(exact)
    levels = {level: {n: sketch(x) for n, x in arrays.items()} for level, arrays in exact.levels.items()}
    tokens, bounds = {"float64": exact.tokens}, {}
    narrow = [dtype for dtype in dtypes if dtype != "float64"]
    for dtype in narrow:
        now = trace(dtype)
        tokens[dtype] = now.tokens
        bounds[dtype] = {level: {} for level in levels}
        # The trace is compared with itself. What remains is its distance to float64, and the bound is a multiple of
        # that.
        for one in compare_by_ratio(dtype, exact, now, in_order(now, settings.model)):
            if not math.isfinite(one.bound):
                raise UserError(f"{one.name} is NaN in {dtype}: there is nothing to freeze")
            bounds[dtype][one.level][one.name] = one.bound
    if narrow:
        progress(narrow[-1], "other rows")
    return Golden(
        computed_by=side.name,
        model=describe(settings.model),
        versions=versions(),
        config=frozen_options(settings),
        shown=Shown.of(inputs),
        weights={name: (digest(x), sketch(x)) for name, x in side.weights().items()},
        levels=levels,
        tail=tuple(tail_of(exact)),
        tokens={dtype: tuple(map(tuple, rows)) for dtype, rows in tokens.items()},
        bounds=bounds,
        typical=typical_errors(side, inputs, narrow, list(exact.levels["gradients"])),
    )


def in_order(trace: Trace, model: config.Model) -> Trace:
    """The outputs in the order of computation; a jitted function returns them sorted by name."""
    # The first tensor that differs is named in the report, so the order of the file must be the order of computation.
    place = {name: number for number, name in enumerate(_modules(model))}
    forward = trace.levels["forward"]
    names = sorted(forward, key=lambda name: place.get(name, len(place)))
    levels = {"forward": {name: forward[name] for name in names}, "loss": trace.levels["loss"]}
    # Parameters have the place of their module: forwards in updates, backwards in gradients.
    key = lambda name: place.get(name.rpartition(".")[0], len(place))  # noqa: E731
    for level in ("gradients", *(f"update {steps}" for steps in STEPS)):
        backwards = level == "gradients"  # which flow from the last module to the first
        arrays = trace.levels[level]
        levels[level] = {name: arrays[name] for name in sorted(arrays, key=key, reverse=backwards)}
    return dataclasses.replace(trace, levels=levels)


def _modules(model: config.Model) -> list[str]:
    """The modules in the order in which they finish, by the names of torch_ref."""
    decoder = without_remat(Decoder(dataclasses.replace(model, layer_loop="scan")))
    found: dict[str, None] = {}

    def note(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = function(*args, **kwargs)
        if context.method_name == "__call__":
            found[".".join(context.module.path) or "logits"] = None
        return result

    row = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    with nn.intercept_methods(note):
        jax.eval_shape(lambda params, x: decoder.apply({"params": params}, x, x, x), abstract_params(decoder)[0], row)
    # Traced as a scan, a block of the pattern runs once, whatever the depth. Its modules are repeated here for every
    # layer of that slot.
    inside = [name for name in found if name.startswith("layers.")]
    layers = []
    for number in range(model.n_layers):
        slot = f"layers.slot_{number % len(model.pattern)}"
        layers += [name.replace(slot, f"layers.{number}") for name in inside if f"{name}.".startswith(f"{slot}.")]
    outside = [name for name in found if name not in inside]
    first = next(iter(place for place, name in enumerate(found) if name in inside), 0)
    return [*outside[:first], *layers, *outside[first:]]


def frozen_options(settings: config.Config) -> dict[str, Any]:
    """Every option that decides the numbers, by its full name, as JSON has it."""
    # Options that change no number are left out: a golden file must not alarm because a faster kernel was chosen.
    # Through JSON once, so that lists and tuples compare equal later.
    tree = toml.to_dict(settings_of(settings))
    found = {f"train.{name}": tree["train"][name] for name in _STEPS}

    def walk(section: Mapping[str, Any], prefix: str) -> None:
        for name, value in section.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{name}.")
            elif prefix + name not in _CHOICES:
                found[f"model.{prefix}{name}"] = value

    walk(tree["model"], "")
    return json.loads(json.dumps(found))


def typical_errors(
    side: Side, inputs: Inputs, dtypes: Sequence[str], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """By dtype and parameter, the median over other draws of rows of the error of a gradient against float64."""
    seen: dict[str, dict[str, list[float]]] = {dtype: {name: [] for name in names} for dtype in dtypes}
    for number in range(1, DRAWS + 1) if dtypes else ():
        # The same draws when the file is written and when it is checked: they are numbered, and the numbers seed them.
        rows = inputs.other_rows(number)
        exact = side.gradients("float64", rows)
        for dtype in dtypes:
            gradients = side.gradients(dtype, rows)
            for name in names:
                seen[dtype][name].append(relative(gradients[name], exact[name]))
    return {
        dtype: {name: float(np.median(values)) for name, values in errors.items()} for dtype, errors in seen.items()
    }


def digest(x: np.ndarray) -> str:
    """Of the values, in whichever dtype they are stored."""
    return hashlib.sha256(np.ascontiguousarray(x, "<f8").tobytes()).hexdigest()


def tail_of(trace: Trace) -> np.ndarray:
    return np.asarray(trace.levels["forward"]["logits"], np.float64).ravel()[-TAIL:]


def _require_finite(trace: Trace) -> None:
    for level, arrays in trace.levels.items():
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise UserError(f"{name} ({level}) is NaN or infinite: there is nothing to freeze")

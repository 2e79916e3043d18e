"""Golden files: the present behaviour of a model, frozen, for the regression tests of other people.

    jaxlm parity MODEL --golden write tests/golden/model.json.gz
    jaxlm parity MODEL --golden check tests/golden/model.json.gz

float64 is judged by the estimated relative error of each tensor (`sketch`), at the bound of `jaxlm parity`. float32 and
bfloat16 are judged by how far they lie from the float64 of the same run, at most twice as far as when the file was
written: no sketch is needed, for float64 is the same as then or the check has failed already.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlm import config, config_file
from jaxlm.compilation import enable_compilation_cache
from jaxlm.convert.load import Model
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, abstract_params
from jaxlm.parity.check import _open, _progress
from jaxlm.parity.compare import Finding, compare_by_ratio, compare_tokens, relative
from jaxlm.parity.golden_file import Golden, Shown, read_golden
from jaxlm.parity.inputs import Inputs, make_inputs
from jaxlm.parity.report import Report, describe, versions
from jaxlm.parity.sketch import Sketch, relative_distance, sketch
from jaxlm.parity.tolerances import FLOAT64, FLOORS, RATIO, ZERO_GRADIENT
from jaxlm.parity.trace import DTYPES, STEPS, Arrays, JaxSide, Side, Trace, settings_of, without_remat

STORED = "stored"
"""The dtype, in a report, of what is not computed."""
TAIL = 8
"""How many logits are kept as they are."""
DRAWS = 5
"""Draws of rows, the same at both times, by which an alarm about a gradient below float64 is confirmed."""
Told = Callable[[str, str], None]
"""Called with a dtype and what begins, and with two empty words at the end."""

_CHOICES = ("dropout", "init_std", "attention_impl", "layer_loop", "remat")
_CHOICES += ("moe.impl", "moe.exchange", "mamba.impl", "mamba.chunk")
"""Options of `[model]` that change no result but by rounding, or are left out of the comparison."""
_STEPS = (
    *("learning_rate", "schedule", "warmup_steps", "final_lr_fraction", "decay_fraction", "beta1", "beta2", "eps"),
    *("weight_decay", "clip_norm", "z_loss", "label_smoothing"),
)


def write_golden(
    model: str | Path | Model,
    path: str | Path,
    *,
    computed_by: str = "jaxlm",
    dtypes: Sequence[str] = DTYPES,
    show: bool = False,
) -> Golden:
    """Freeze the behaviour of a model in a file.

    Args:
        model: a run, a torch_ref folder, a Hugging Face folder, a config (random weights), or a loaded model.
        path: the file, by custom NAME.json.gz; it is replaced.
        computed_by: `jaxlm` or `torch`.
        dtypes: float64, and those of float32 and bfloat16 that are wanted.
        show: print progress and the size.

    Raises:
        UserError: the model cannot be used, computes NaN, or the file cannot be written.
    """
    subject = _open(model)
    enable_compilation_cache(subject.settings.data.cache_dir)
    inputs = make_inputs(subject.settings.model, subject.tokenizer_path)
    with _progress(show) as told:
        side = _side(subject, computed_by)
        golden = freeze(side, subject.settings, inputs, dtypes, functools.partial(told, side.name))
    size = golden.save(path)
    if show:
        count = sum(len(names) for names in golden.levels.values())
        print(f"{path}: {count} tensors in {', '.join(golden.dtypes)}, {size / 1e3:.1f} kB")
    return golden


def check_golden(
    model: str | Path | Model,
    path: str | Path,
    *,
    computed_by: str = "jaxlm",
    out: str | Path | None = None,
    show: bool = False,
) -> Report:
    """Compare a model with a golden file; the arguments are those of `write_golden`, `out` is a folder for the report.

    Raises:
        UserError: the file or the model cannot be used.
    """
    began, golden = time.monotonic(), read_golden(path)
    subject = _open(model)
    enable_compilation_cache(subject.settings.data.cache_dir)
    seconds: dict[str, float] = {}
    with _progress(show) as told:
        side = _side(subject, computed_by)
        findings = compare(golden, side, subject.settings, _timed(seconds, functools.partial(told, side.name)))
    seconds["all"] = time.monotonic() - began
    report = Report(
        f"{subject.name} and {path}",
        describe(subject.settings.model),
        golden.shown.text,
        tuple(findings),
        seconds,
        who=f"{side.name} against {path}, written by {golden.computed_by} {golden.versions['jaxlm']}",
        explanations=_told(findings),
    )
    written = report.write(out) if out is not None else []
    if show:
        from rich.console import Console

        Console().print(report)
        for file in written:
            print(file)
    return report


def assert_golden(model: str | Path | Model, path: str | Path, *, computed_by: str = "jaxlm") -> None:
    """Raise AssertionError with the first differing tensor unless the model behaves as the file says: for tests."""
    report = check_golden(model, path, computed_by=computed_by)
    if not report.same:
        raise AssertionError(report.verdict)


def freeze(
    side: Side,
    settings: config.Config,
    inputs: Inputs,
    dtypes: Sequence[str] = DTYPES,
    told: Told = lambda dtype, part: None,
) -> Golden:
    """Everything that a golden file holds.

    Raises:
        UserError: a value is NaN or infinite.
    """
    trace = lambda dtype: side.trace(dtype, inputs, lambda part: told(dtype, part))  # noqa: E731
    exact = _in_order(trace("float64"), settings.model)
    _require_finite(exact)
    levels = {level: {n: sketch(x) for n, x in arrays.items()} for level, arrays in exact.levels.items()}
    tokens, bounds = {"float64": exact.tokens}, {}
    narrow = [dtype for dtype in dtypes if dtype != "float64"]
    for dtype in narrow:
        now = trace(dtype)
        tokens[dtype] = now.tokens
        bounds[dtype] = {level: {} for level in levels}
        for one in compare_by_ratio(dtype, exact, now, _in_order(now, settings.model)):
            if not math.isfinite(one.bound):
                raise UserError(f"{one.name} is NaN in {dtype}: there is nothing to freeze")
            bounds[dtype][one.level][one.name] = one.bound
    if narrow:
        told(narrow[-1], "other rows")
    return Golden(
        computed_by=side.name,
        model=describe(settings.model),
        versions=versions(),
        config=_options(settings),
        shown=Shown.of(inputs),
        weights={name: (_digest(x), sketch(x)) for name, x in side.weights().items()},
        levels=levels,
        tail=tuple(_tail(exact)),
        tokens={dtype: tuple(map(tuple, rows)) for dtype, rows in tokens.items()},
        bounds=bounds,
        typical=_typical(side, inputs, narrow, list(exact.levels["gradients"])),
    )


def compare(
    golden: Golden, side: Side, settings: config.Config, told: Told = lambda dtype, part: None
) -> list[Finding]:
    """All findings: options and weights, then float64, then each narrower dtype in the order of computation.

    Nothing is computed with weights of other names or shapes.
    """
    findings = [*_compare_options(golden.config, _options(settings)), *_compare_weights(golden.weights, side.weights())]
    if any(one.level == "weights" and math.isinf(one.error) for one in findings):
        return findings
    inputs = golden.shown.inputs()
    exact: Trace | None = None
    for dtype in golden.dtypes:
        now = side.trace(dtype, inputs, lambda part, dtype=dtype: told(dtype, part))
        if exact is None:
            exact = now
            findings += _compare_exact(golden, now)
        else:
            found = [*_compare_narrow(dtype, golden, exact, now)]
            findings += _look_again(dtype, found, golden, side, inputs)
        then = Trace({}, [list(row) for row in golden.tokens[dtype]], {})
        findings += compare_tokens(dtype, inputs, (side, side), (then, now))
    told("", "")
    return findings


def _timed(seconds: dict[str, float], told: Told) -> Told:
    """`told`, which also adds the seconds of a part to `seconds` when the next one begins."""
    now: list[Any] = []

    def part(dtype: str, name: str) -> None:
        if now:
            seconds[now[0]] = seconds.get(now[0], 0.0) + time.monotonic() - now[1]
        now[:] = f"{dtype}, {name}", time.monotonic()
        if name:
            told(dtype, name)

    return part


def _side(subject: Any, computed_by: str) -> Side:
    if computed_by == "jaxlm":
        return JaxSide(subject.settings, subject.params)
    if computed_by != "torch":
        raise UserError(f"--with {computed_by}: a golden file is computed by jaxlm or by torch")
    try:
        from jaxlm.parity.mirror import TorchSide
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError("--with torch needs PyTorch", "pip install 'jaxlm[torch]'") from None
    return TorchSide.of(subject.settings, subject.params)


def _in_order(trace: Trace, model: config.Model) -> Trace:
    """The outputs in the order of computation; a jitted function returns them sorted by name."""
    place = {name: number for number, name in enumerate(_modules(model))}
    forward = trace.levels["forward"]
    names = sorted(forward, key=lambda name: place.get(name, len(place)))
    levels = {"forward": {name: forward[name] for name in names}, "loss": trace.levels["loss"]}
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
    inside = [name for name in found if name.startswith("layers.")]
    layers = []
    for number in range(model.n_layers):
        slot = f"layers.slot_{number % len(model.pattern)}"
        layers += [name.replace(slot, f"layers.{number}") for name in inside if f"{name}.".startswith(f"{slot}.")]
    outside = [name for name in found if name not in inside]
    first = next(iter(place for place, name in enumerate(found) if name in inside), 0)
    return [*outside[:first], *layers, *outside[first:]]


def _options(settings: config.Config) -> dict[str, Any]:
    """Every option that decides the numbers, by its full name, as JSON has it."""
    tree = config_file.to_dict(settings_of(settings))
    found = {f"train.{name}": tree["train"][name] for name in _STEPS}

    def walk(section: Mapping[str, Any], prefix: str) -> None:
        for name, value in section.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{name}.")
            elif prefix + name not in _CHOICES:
                found[f"model.{prefix}{name}"] = value

    walk(tree["model"], "")
    return json.loads(json.dumps(found))


def _compare_options(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Finding]:
    """Options that both versions of jaxlm know."""
    changed = [name for name in then if name in now and now[name] != then[name]]
    for name in changed:
        note = f"{then[name]!r} in the golden file, {now[name]!r} now"
        yield Finding(STORED, "config", name, math.inf, 0.0, note=note)
    if not changed:
        yield Finding(STORED, "config", "all options", 0.0, 0.0, note=f"{len(then)} options")


def _compare_weights(then: Mapping[str, tuple[str, Sketch]], now: Arrays) -> Iterator[Finding]:
    for name in dict.fromkeys([*then, *now]):
        if note := _unlike(name, {key: one for key, (_, one) in then.items()}, now):
            yield Finding(STORED, "weights", name, math.inf, 0.0, note=note)
            continue
        digest, before = then[name]
        same = _digest(now[name]) == digest
        # the smallest number that is not 0, where a change is too small for the estimate
        error = 0.0 if same else max(relative_distance(before, sketch(now[name])), 2.0**-1074)
        yield Finding(STORED, "weights", name, error, 0.0)


def _compare_exact(golden: Golden, now: Trace) -> Iterator[Finding]:
    """Every tensor of float64 by its sketch; gradients that are nothing but rounding as in `compare.compare_exact`."""
    norms = {name: one.norm for name, one in golden.levels["gradients"].items()}
    everything = math.hypot(*norms.values())
    noise = {name for name, norm in norms.items() if norm <= ZERO_GRADIENT.allowed * everything}
    bound = FLOAT64.allowed
    for level, then in golden.levels.items():
        arrays = now.levels.get(level, {})
        for name in dict.fromkeys([*then, *arrays]):
            if level.startswith("update") and name in noise:
                continue
            if note := _unlike(name, then, arrays):
                yield Finding("float64", level, name, math.inf, bound, note=note)
                continue
            scale = everything if level == "gradients" and name in noise else 0.0
            yield Finding("float64", level, name, relative_distance(then[name], sketch(arrays[name]), scale), bound)
        if level == "forward" and "logits" in arrays:
            yield Finding("float64", level, "logits, tail", relative(_tail(now), np.array(golden.tail)), bound)


def _compare_narrow(dtype: str, golden: Golden, exact: Trace, now: Trace) -> Iterator[Finding]:
    """How far each tensor lies from float64, against twice as far as it lay when the file was written."""
    found = {(one.level, one.name): one for one in compare_by_ratio(dtype, exact, now, now)}
    for level, names in golden.bounds[dtype].items():
        for name, bound in names.items():
            if one := found.get((level, name)):
                yield Finding(dtype, level, name, one.error, bound)
            else:
                yield Finding(dtype, level, name, math.inf, bound, note="only in the golden file")


def _look_again(dtype: str, found: Sequence[Finding], golden: Golden, side: Side, inputs: Inputs) -> Iterator[Finding]:
    """`found`, with every alarm about a gradient judged anew by its median error; see `compare.look_again`."""
    suspects = [one.name for one in found if one.level == "gradients" and not one.ok and math.isfinite(one.error)]
    medians = _typical(side, inputs, [dtype], suspects)[dtype] if suspects else {}
    for one in found:
        if one.level == "gradients" and one.name in medians:
            bound = RATIO.allowed * max(golden.typical[dtype][one.name], FLOORS[dtype].allowed)
            note = f"median of {DRAWS} other draws"
            yield dataclasses.replace(one, error=medians[one.name], bound=bound, note=note)
        else:
            yield one


def _typical(side: Side, inputs: Inputs, dtypes: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """By dtype and parameter, the median over other draws of rows of the error of a gradient against float64."""
    seen: dict[str, dict[str, list[float]]] = {dtype: {name: [] for name in names} for dtype in dtypes}
    for number in range(1, DRAWS + 1) if dtypes else ():
        rows = inputs.other_rows(number)
        exact = side.gradients("float64", rows)
        for dtype in dtypes:
            gradients = side.gradients(dtype, rows)
            for name in names:
                seen[dtype][name].append(relative(gradients[name], exact[name]))
    return {
        dtype: {name: float(np.median(values)) for name, values in errors.items()} for dtype, errors in seen.items()
    }


def _told(findings: Sequence[Finding]) -> tuple[str, ...]:
    """Whether the weights or the computation have changed, in words."""
    wrong = {one.level for one in findings if not one.ok}
    if not wrong:
        return ()
    if "weights" in wrong:
        return ("the weights have changed, and so has what is computed with them",)
    return ("the weights are those of the golden file, the computation has changed",)


def _unlike(name: str, then: Mapping[str, Sketch], now: Mapping[str, np.ndarray]) -> str:
    if name not in then or name not in now:
        return f"only {'in the golden file' if name in then else 'now'}"
    if then[name].shape == now[name].shape:
        return ""
    return f"shape {list(then[name].shape)} in the golden file, {list(now[name].shape)} now"


def _digest(x: np.ndarray) -> str:
    """Of the values, in whichever dtype they are stored."""
    return hashlib.sha256(np.ascontiguousarray(x, "<f8").tobytes()).hexdigest()


def _tail(trace: Trace) -> np.ndarray:
    return np.asarray(trace.levels["forward"]["logits"], np.float64).ravel()[-TAIL:]


def _require_finite(trace: Trace) -> None:
    for level, arrays in trace.levels.items():
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise UserError(f"{name} ({level}) is NaN or infinite: there is nothing to freeze")

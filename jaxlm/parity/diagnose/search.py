"""Why two models differ: the usual culprits are tried, and the one that makes the difference vanish is named.

First the weights, tensor by tensor: each that differs is related to ours. Then the computation: torch_ref, holding the
other side's weights, is changed culprit by culprit until it gives the other side's outputs to 1e-10. An explanation is
a measurement: the error of the logits before and after the change. Imports torch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.parity.diagnose.attention_hypotheses import CULPRITS, Culprit, explain_config
from jaxlm.parity.diagnose.hypothesis import Try
from jaxlm.parity.diagnose.torch_patches import rounded
from jaxlm.parity.diagnose.variant import Variant, agrees, attempt, distance
from jaxlm.parity.diagnose.weight_relations import Recognised, recognise
from jaxlm.parity.inputs import Inputs, packed
from jaxlm.parity.tolerances import FLOAT64
from jaxlm.parity.trace import Arrays, Side, settings_of

ROW = 96
"""Tokens of a row to begin with: enough for every culprit but a long window, and faster than the rows of parity."""
STEPS = 3
"""Culprits at once, at most."""
BEAM = 2
"""Unfinished explanations that are carried on."""
FALLS = 100.0
"""An explanation that leaves a rest is one only if it makes the error this much smaller."""
FEW = 3
"""Modules that rounding may leave as they are: embedding, first norm."""
OTHERS = 3
"""Explanations that fit equally well and are reported, at most."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A difference between the two sides, in words, and what became of the error when ours was changed so."""

    what: str
    error_before: float
    """Relative error of the logits, in float64, with all that explanations before this one have changed."""
    error_after: float
    where: tuple[str, ...]
    """Tensors that differ, or the first module whose outputs did."""

    def __str__(self) -> str:
        return f"{self.what} (relative error of the logits {self.error_before:.1e}, then {self.error_after:.1e})"

    @property
    def vanishes(self) -> bool:
        """Whether nothing of the difference is left."""
        return self.error_after <= FLOAT64.allowed


def explain(
    ours: Side, theirs: Side, settings: config.Config, their_config: config.Model | None, inputs: Inputs
) -> list[Explanation]:
    """What makes `theirs` differ from `ours`; nothing if weights and float64 outputs are the same.

    An explanation belongs to all before it: together they lead from ours to theirs. One that begins with `or` fits as
    well as the last. If a rest stays unexplained, the last entry says so.

    Args:
        settings: the config of `ours`.
        their_config: what the other side's own config says, if it has one: the first thing to try.
    """
    model = settings_of(settings).model
    mine, other = ours.weights(), theirs.weights()
    # Short rows first: every hypothesis costs a forward pass. What fits there is confirmed on the full rows, and what
    # differs on the full rows alone is searched there.
    short = _short(inputs)
    base, subject = Variant(model, mine, short), theirs
    target = theirs.forward("float64", short)
    found = recognise(mine, other, model) if other else []
    before = _error(target, attempt(base), base)
    if before <= FLOAT64.allowed:
        base, target = dataclasses.replace(base, rows=inputs.rows), theirs.forward("float64", inputs.rows)
        before = _error(target, attempt(base), base)
    # Weights differ and outputs do not: the difference has no effect, such as rows of a vocabulary that no id reaches.
    if before <= FLOAT64.allowed and found:
        suffix = "; the outputs are the same"
        return [Explanation(one.what + suffix, before, before, one.names) for one in found]
    if before <= FLOAT64.allowed:
        subject, target = ours, ours.forward("float64", inputs.rows)
        before = _error(target, attempt(base), base)
        if before <= FLOAT64.allowed:
            return []
    weights = list(_weights(base, found, other, target, before))
    if weights:
        base = dataclasses.replace(base, model=structure(model, other), tensors=other, made={})
        if weights[-1].vanishes:
            return weights
    table = (*((explain_config(their_config),) if their_config is not None and subject is theirs else ()), *CULPRITS)
    search = Search(subject, table, inputs.rows)
    return [*weights, *search.run(base, target)]


def _short(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The beginning of rows of one document, or else rows packed anew: the beginning has no boundary."""
    length = min(ROW, inputs.rows["tokens"].shape[1])
    if (inputs.rows["segments"] == 1).all():
        return {name: array[:, :length] for name, array in inputs.rows.items()}
    return packed(inputs.stream, length, inputs.vocab_size)


def structure(model: config.Model, tensors: Mapping[str, np.ndarray]) -> config.Model:
    """`model` with the options that the names of tensors, by torch_ref, and the rows of the embedding tell."""
    # The other side's tensors tell its structure, whatever its config says: what has no bias in the file has no bias.
    has = lambda *endings: any(name.endswith(endings) for name in tensors)  # noqa: E731
    kinds = {
        "qkv": "mixer.q_proj.bias",
        "attention_out": "mixer.o_proj.bias",
        "mlp": "ffn.down_proj.bias",
        "head": "head.bias",
        "router": "router.bias",
        "experts": "experts.down_proj.bias",
    }
    options: dict[str, Any] = {
        "tie_embeddings": "head.weight" not in tensors,
        "qk_norm": has("mixer.q_norm.weight"),
        "sink_logits": has("mixer.sink_logits"),
        "final_norm": has("final_norm.weight"),
        "norm": "layernorm" if has("mixer_norm.bias") else "rmsnorm",
        "biases": tuple(kind for kind, name in kinds.items() if has(name)),
    }
    if "embed.weight" in tensors:
        options["vocab_size"] = len(tensors["embed.weight"])
    same = {key: getattr(model, key) for key in options}
    same["biases"] = tuple(kind for kind in kinds if kind in model.biases)
    return dataclasses.replace(model, **{key: value for key, value in options.items() if value != same[key]})


def _weights(
    base: Variant, found: list[Recognised], other: Arrays, target: Arrays, before: float
) -> Iterator[Explanation]:
    """What each difference of the weights does to the error, one after the other."""
    tensors = dict(base.tensors)
    for one in found:
        # The differences are put in one after the other, each on top of those before, so that the last error is that of
        # all of them.
        for name in one.names:
            tensors.pop(name, None)
            tensors |= {name: other[name]} if name in other else {}
        try:
            base = dataclasses.replace(base, model=structure(base.model, tensors), tensors=dict(tensors), made={})
            after = _error(target, attempt(base), base)
        except ValueError:
            after = float("inf")
        yield Explanation(one.what, before, after, one.names)
        before = after


def _error(target: Arrays, outputs: Arrays, variant: Variant) -> float:
    return distance(target.get("logits"), outputs.get("logits"), variant.rows["segments"] != 0)


@dataclasses.dataclass(frozen=True)
class _Tried:
    """A variant, what was changed to come to it, and how near it is."""

    whats: tuple[str, ...]
    variant: Variant
    error: float
    agree: int
    """Modules whose outputs are those of the other side."""
    first: tuple[str, ...]
    """The first module whose outputs are not."""
    path: tuple[_Tried, ...]
    """Where it was before each change."""

    def kept(self) -> _Tried:
        """As far as each change made more modules agree, or the error much smaller."""
        stages = (*self.path, self)
        for before, after in itertools.pairwise(stages):
            # A step that brings neither agreement nor a much smaller error was a guess on the way and explains nothing.
            if after.agree <= before.agree and after.error > before.error / FALLS:
                return before
        return self


class Search:
    """Culprits one after the other, until the other side's outputs are reproduced."""

    def __init__(self, side: Side, culprits: tuple[Culprit, ...], rows: Mapping[str, np.ndarray]) -> None:
        self._side, self._culprits, self._rows, self._count = side, culprits, rows, 0

    def run(self, base: Variant, target: Arrays) -> list[Explanation]:
        """The explanations of the difference between `base` and `target`, or the word that there is none."""
        start = self._measure(base, target, (), ())
        fit, closest = self._deepen(start, target)
        # A hypothesis that fits short rows may be wrong on long ones: windows, scalings and late positions show there
        # only.
        if fit and base.rows is not self._rows:
            full = dataclasses.replace(base, rows=self._rows)
            target = self._side.forward("float64", self._rows)
            again = [self._again(full, target, one.whats) for one in fit]
            sound = [one for one, other in zip(fit, again, strict=True) if other and other.error <= FLOAT64.allowed]
            if not sound:  # there is more than the short rows show
                start = self._measure(full, target, (), ())
                found = [one for one in again if one is not None]
                sound, closest = self._deepen(min(found, key=lambda one: one.error, default=start), target)
            fit = sound
        if fit:
            # Others are reported too if they differ in the last step alone: equally good explanations of the same rest.
            best = fit[0]
            others = [one for one in fit[1:] if set(one.whats) != set(best.whats) and one.whats[:-1] == best.whats[:-1]]
            others = [one for one in others if not best.whats[-1].startswith(one.whats[-1])][:OTHERS]
            return [*_explanations(best, start), *(_or(one) for one in others)]
        return self._unexplained(start, closest)

    def _deepen(self, start: _Tried, target: Arrays) -> tuple[list[_Tried], _Tried]:
        """Those of the first culprit that fit, or none; and the closest."""
        # A beam search: two faults in one model are found one after the other, if the first makes more modules agree.
        # One blind step is allowed where two faults hide each other.
        beam, closest, guessed = [start], start, False
        for _ in range(STEPS):
            tried: list[_Tried] = []
            for front in beam:
                for culprit in self._culprits:
                    tried += (attempts := list(self._all(front, culprit, target)))
                    if fit := [one for one in attempts if one.error <= FLOAT64.allowed]:
                        return fit, closest
            self._count = self._count or len(tried)
            closest = min([closest, *tried], key=lambda one: one.error)
            # Agreement of modules counts before the error of the logits: it grows from the front of the model, where
            # the first fault lies, and is not misled by chance.
            better = [one for one in tried if one.agree > beam[0].agree or one.error < beam[0].error / FALLS]
            better.sort(key=lambda one: (-one.agree, one.error))
            if not better and guessed:
                break
            guessed = guessed or not better
            beam = better[:BEAM] or [min(tried, key=lambda one: one.error, default=start)]
        return [], closest

    def _all(self, front: _Tried, culprit: Culprit, target: Arrays) -> Iterator[_Tried]:
        for what, make in culprit.tries(front.variant):
            if what not in front.whats:
                try:
                    variant = make()
                except ValueError:
                    continue
                yield self._measure(variant, target, (*front.whats, what), (*front.path, front))

    def _tries(self, variant: Variant) -> Iterator[Try]:
        for culprit in self._culprits:
            yield from culprit.tries(variant)

    def _again(self, variant: Variant, target: Arrays, whats: tuple[str, ...]) -> _Tried | None:
        """The same changes on other rows."""
        one = self._measure(variant, target, (), ())
        for wanted in whats:
            make = next((make for what, make in self._tries(one.variant) if what == wanted), None)
            if make is None:
                return None
            one = self._measure(make(), target, (*one.whats, wanted), (*one.path, one))
        return one

    def _measure(self, variant: Variant, target: Arrays, whats: tuple[str, ...], path: tuple[_Tried, ...]) -> _Tried:
        outputs, real = attempt(variant), variant.rows["segments"] != 0
        error = _error(target, outputs, variant)
        known = [name for name in outputs if name in target]
        same = {name: agrees(target[name], outputs[name], real, FLOAT64.allowed) for name in known}
        first = next(((name,) for name in known if not same[name]), ())
        return _Tried(whats, variant, error, sum(same.values()), first, path)

    def _unexplained(self, start: _Tried, closest: _Tried) -> list[Explanation]:
        """What has become much smaller, and that no culprit makes the rest vanish."""
        rest = closest.kept()
        rest = rest if rest.error < start.error / FALLS else start
        found = _explanations(rest, start)
        what = f"none of the {self._count} known culprits makes the {'rest of the ' if found else ''}difference vanish"
        if closest.whats[len(rest.whats) :]:
            what += f"; the closest is: {' and '.join(closest.whats[len(rest.whats) :])}"
        return [*found, Explanation(what + self._size(rest), rest.error, closest.error, rest.first)]

    def _size(self, rest: _Tried) -> str:
        """Whether everything differs from the first modules on, as much as rounding makes it differ in this model."""
        if rest.agree > FEW:
            return ""
        # An error as large as rounding to a narrow dtype makes in this very model, at every module from the first on,
        # is most likely that.
        mine, real = attempt(rest.variant).get("logits"), rest.variant.rows["segments"] != 0
        for dtype in ("bfloat16", "float16", "float32"):
            change = lambda name, x, dtype=dtype: rounded(x + 2.0**-40 * x, dtype)  # noqa: E731
            noise = distance(mine, attempt(rest.variant.with_tensors(change)).get("logits"), real)
            if noise / 4 < rest.error < 4 * noise:
                return f"; it is as large as what rounding to {dtype} does to this model, {noise:.1e}"
        return ""


def _explanations(one: _Tried, start: _Tried) -> list[Explanation]:
    """One explanation for each change that was made."""
    errors = [*(stage.error for stage in one.path), one.error]
    return [Explanation(what, errors[i], errors[i + 1], start.first) for i, what in enumerate(one.whats)]


def _or(one: _Tried) -> Explanation:
    return Explanation(f"or: {one.whats[-1]}", one.path[-1].error, one.error, one.first)

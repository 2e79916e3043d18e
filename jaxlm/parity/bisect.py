"""The guilty operation: every module is replayed with the input that it has in float64, so that no error accumulates.

A module that returns something else on the same input is guilty itself. Where something else arrives although all that
came before had the right input, what lies between is guilty.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

from jaxlm import config
from jaxlm.parity.compare import low_and_high, real_tokens, relative
from jaxlm.parity.inputs import Inputs
from jaxlm.parity.tolerances import FLOAT64, FLOORS, RATIO
from jaxlm.parity.trace import ARRIVES, LOGITS, RETURNS, Arrays, Events, Side

BETWEEN: Mapping[str, str] = {
    "mixer.o_proj": "rotation, mask, softmax or grouping of the heads",
    "mixer.out_proj": "scan or gate",
    "mixer.x_proj": "the activation after the convolution",
    "mixer.norm": "the activation after the convolution, or the scan",
    "ffn.down_proj": "activation or gate",
    "ffn.experts": "the choice or the weights of the experts",
    "ffn.shared.down_proj": "activation or gate",
}
"""What lies before a module, by the end of its name."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One module on the same input."""

    dtype: str
    kind: str
    """`ARRIVES` or `RETURNS`."""
    name: str
    error: float
    """float64: of one side against the other. Else: of the side that is more often wrong, against float64."""
    bound: float
    what: str
    """The operation that is judged, in words."""

    @property
    def ok(self) -> bool:
        """Whether the error is a number within the bound."""
        return self.error <= self.bound


class Replayed:
    """What the first side computes in float64, and what both make of it in other dtypes, on the same inputs."""

    def __init__(self, sides: tuple[Side, Side], inputs: Inputs, model: config.Model) -> None:
        self._sides, self._rows, self._model = sides, inputs.rows, model
        self._golden: Events | None = None

    def parts(self, dtype: str) -> list[Part]:
        """Every operation in the order of computation, as far as both sides have it."""
        if self._golden is None:
            self._golden = self._sides[0].replay("float64", self._rows, None)
        golden = self._golden
        # Both sides get the float64 inputs of the first side at every module. An error made in one module then cannot
        # reach the next, so the first module that differs is the one at fault, and not a victim.
        inputs = _inputs(golden)
        theirs = self._sides[1].replay(dtype, self._rows, inputs)
        ours = golden if dtype == "float64" else self._sides[0].replay(dtype, self._rows, inputs)
        whole = all(side.mirrors for side in self._sides)
        # The order is that of a mirror, which has every module. Other implementations have fewer, so there the order is
        # ours, with what both have.
        order = list(theirs if whole else (event for event in golden if event in theirs))
        return [*self._judged(dtype, order, ours, theirs, whole)]

    def _judged(self, dtype: str, order: list, ours: Events, theirs: Events, whole: bool) -> Iterator[Part]:
        golden = self._golden or {}
        for place, (kind, name) in enumerate(order):
            exact = golden.get((kind, name))
            # Names with `#` are choices of experts and other whole numbers: equal or not, they have no relative error.
            if "#" in name or exact is None or exact.dtype.kind in "iu" or (kind, name) not in ours:
                continue
            if name.endswith(".router") and (dtype != "float64" or not whole):
                continue  # which experts are chosen in a near tie is luck
            arrays = [exact, ours[kind, name], theirs[kind, name]]
            if len({x.shape for x in arrays}) > 1:
                what = f"{_what(kind, name, order[:place])}, which has another shape"
                yield Part(dtype, kind, name, float("inf"), 0.0, what)
                continue
            # An implementation that is not a mirror computes something else for padding, and may.
            exact, mine, other = (x if whole else real_tokens(x, self._rows) for x in arrays)
            error, bound = relative(other, exact), FLOAT64.allowed
            # Below float64 both sides err against the exact value. The better of the two is the measure for the worse,
            # never below a few roundings.
            if dtype != "float64":
                low, error = low_and_high((relative(mine, exact), error), not whole)
                bound = RATIO.allowed * max(low, FLOORS[dtype].allowed)
            yield Part(dtype, kind, name, error, bound, _what(kind, name, order[:place]))


def first_guilty(parts: list[Part]) -> Part | None:
    """The first operation that is wrong on the right input."""
    return next((part for part in parts if not part.ok), None)


def _inputs(golden: Events) -> Arrays:
    """What is exchanged: activations and the choice of experts, never the ids and positions of a token."""
    return {name: x for (kind, name), x in golden.items() if kind == ARRIVES and (x.dtype.kind == "f" or "#" in name)}


def _what(kind: str, name: str, before: list[tuple[str, str]]) -> str:
    """The operation whose result is judged, by what happened before it in the same module."""
    parent = name.rpartition(".")[0]
    inside = [other for k, other in before if k == RETURNS and other.rpartition(".")[0] == name]
    # What a module returns is judged on the right input and with right inputs for all modules inside it. So if it
    # differs, the fault lies behind the last module inside.
    if kind == RETURNS:
        if name == LOGITS:
            return "the output matrix"
        return f"{name}, after {inside[-1].removeprefix(name + '.')}" if inside else name
    if re.fullmatch(r"layers\.\d+", name):
        number = int(name.split(".")[1])
        return f"the sum of the residual stream before {name}" if number else "the embeddings before layers.0"
    # What arrives at a module differs although all modules before it are right: the fault is code between two modules,
    # which has no name of its own. It is named by its neighbours.
    siblings = [other for k, other in before if k == RETURNS and other.rpartition(".")[0] == parent]
    siblings = [*dict.fromkeys(other.removeprefix(parent + ".") for other in siblings)]
    last = name.removeprefix(parent + ".")
    where = next((words for end, words in BETWEEN.items() if name.endswith("." + end)), "")
    where = f" ({where})" if where else ""
    if not parent:
        return f"what lies before {name}"
    return f"{parent}, between {', '.join(siblings) or 'its input'} and {last}{where}"

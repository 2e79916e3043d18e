"""What each row is asked to do, kept up to date as texts come, grow and go."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxlm.infer.engine.growing import Growing
from jaxlm.infer.engine.request import ENDS
from jaxlm.infer.engine.runner import BURST, Orders, Runner
from jaxlm.infer.engine.speculative import follow
from jaxlm.infer.engine.structured import Guide
from jaxlm.text.sampling import Sampling

KNOBS = (
    "temperature",
    "top_k",
    "typical_p",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
"""Options of `Sampling` in the order of `ops.sampling.Knobs`."""
_PENALTIES = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


class RowOrders:
    """The arrays of `Orders`, row by row."""

    def __init__(self, rows: int, vocab: int) -> None:
        self._vocab = vocab
        self._orders = Orders.empty(rows, vocab)

    def start(self, row: int, growing: Growing, runner: Runner) -> None:
        """A text begins in a row: set all of its options."""
        orders, request = self._orders, growing.request
        for values, name in zip(orders.knobs, KNOBS, strict=True):
            values[row] = getattr(request.sampling, name)
        orders.least[row] = request.min_new_tokens
        orders.scored[row] = request.logprobs is not None or request.best_of is not None
        orders.processed[row] = request.processed and bool(orders.scored[row])
        orders.biased[row] = bool(request.logit_bias or request.forbidden)
        orders.ruled[row] = 0
        orders.ends[row] = -1
        ends = sorted(growing.ends)[:ENDS]
        orders.ends[row, : len(ends)] = ends
        self.moved(row, growing)
        if orders.biased[row] or _penalised(request.sampling):
            self._penalise(row, growing, runner)

    def moved(self, row: int, growing: Growing) -> None:
        """A text has grown."""
        orders = self._orders
        orders.token[row] = growing.last
        orders.position[row] = len(growing.prompt_ids) + len(growing.ids) - 1
        orders.made[row] = len(growing.ids)

    def rest(self, row: int) -> None:
        """A row has no text."""
        for values in (self._orders.scored, self._orders.processed, self._orders.biased, self._orders.ruled):
            values[row] = 0
        for values, name in zip(self._orders.knobs, KNOBS, strict=True):
            values[row] = getattr(Sampling(temperature=0.0), name)

    def rule(self, row: int, guide: Guide) -> str:
        """Allow in a row what its grammar does; returns what is wrong, or nothing."""
        self._orders.ruled[row] = 1
        return guide.allow(self._orders.mask, row)

    def make(self, growing: Mapping[int, Growing], burst: int) -> tuple[Orders, int]:
        """The orders of a call in which these rows draw, and how many tokens at most."""
        orders = self._orders
        orders.active[:] = 0
        orders.forced[:] = -1
        steps = min(burst, BURST, *(one.limit - len(one.ids) for one in growing.values()))
        for row, one in growing.items():
            orders.active[row] = 1
            orders.uniforms[:steps, row] = one.uniforms(steps)
            forced = one.request.forced[len(one.ids) : len(one.ids) + steps]
            orders.forced[: len(forced), row] = forced
        return orders, steps

    def check(
        self, growing: Mapping[int, Growing], guesses: dict[int, list[int]]
    ) -> tuple[Orders, np.ndarray, np.ndarray]:
        """The orders of a call in which these rows draw as far as their guesses are right, guesses [N, R], masks."""
        orders = self._orders
        guess_NR = np.full((BURST, len(orders.active)), -1, np.int32)
        masks_NRW = follow(growing, guesses, orders.mask)
        orders.active[:], orders.forced[:] = 0, -1
        for row, one in growing.items():
            ids = guesses.get(row, [])
            steps = len(ids) + 1
            orders.active[row] = 1
            guess_NR[: len(ids), row] = ids
            orders.uniforms[:steps, row] = one.uniforms(steps)
            forced = one.request.forced[len(one.ids) : len(one.ids) + steps]
            orders.forced[: len(forced), row] = forced
        return orders._replace(until=np.asarray(BURST, np.int32)), guess_NR, masks_NRW

    def _penalise(self, row: int, growing: Growing, runner: Runner) -> None:
        request = growing.request
        seen_V, counts_V = np.zeros(self._vocab, bool), np.zeros(self._vocab, np.int32)
        seen_V[list(growing.prompt_ids)] = True
        bias_V = np.zeros(self._vocab)
        bias_V[list(request.logit_bias)] = list(request.logit_bias.values())
        bias_V[list(request.forbidden)] = -np.inf
        runner.penalise(row, seen_V, counts_V, bias_V)


def _penalised(sampling: Sampling) -> bool:
    return any(getattr(sampling, name) != neutral for name, neutral in _PENALTIES.items())

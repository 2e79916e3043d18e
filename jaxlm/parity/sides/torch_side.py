"""The side of torch_ref: forward hooks, autograd, its own optimiser and its own cache. Imports torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jaxlm import config
from jaxlm.convert.native import to_torch
from jaxlm.models.decoder import Params
from jaxlm.parity.inputs import Inputs
from jaxlm.parity.sides.module_hooks import array_of, first, half_of_the_threads, watched
from jaxlm.parity.sides.score_loss import torch_loss
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
from jaxlm.text.sampling import GREEDY
from torch_ref.infer.generate import generate
from torch_ref.models.decoder import Decoder
from torch_ref.numerics import Policy
from torch_ref.ops.moe.router import Routing
from torch_ref.train.optim import make_optimizer
from torch_ref.train.step import TrainState, make_step


class TorchSide:
    """torch_ref holding the tensors of a `state_dict`."""

    name, mirrors = "torch_ref", True

    def __init__(self, settings: config.Config, tensors: Mapping[str, np.ndarray]) -> None:
        self._settings, self._tensors = settings_of(settings), tensors

    @classmethod
    def of(cls, settings: config.Config, params: Params) -> TorchSide:
        """The mirror of a model of jaxlm, with its weights converted."""
        return cls(settings, dict(to_torch(params, settings.model)))

    def trace(self, dtype: str, inputs: Inputs, progress: Callable[[str], None]) -> Trace:
        """See `trace.Side`."""
        with half_of_the_threads():
            return self._trace(dtype, inputs, progress)

    def _trace(self, dtype: str, inputs: Inputs, progress: Callable[[str], None]) -> Trace:
        # The optimiser steps come last, because they change the parameters in place; the weights are copied before
        # that.
        decoder, batch = self._decoder(dtype), _tensors(inputs.rows)
        levels: dict[str, Arrays] = {}
        if inputs.wants("forward", "loss", "gradients"):
            progress("forward and gradient")
            sums, gradients = self._gradients(decoder, batch)
            found = {"gradients": gradients}
            found["loss"] = {name: array_of(sums[name] / sums["weight"]) for name in ("loss", "nll")}
            if inputs.wants("forward"):
                found["forward"] = self._forward(decoder, batch)
            levels = {level: found[level] for level in ("forward", "loss", "gradients") if inputs.wants(level)}
            del sums, gradients, found
        tokens = []
        if inputs.wants("generation"):
            progress("greedy tokens")
            tokens = generate(decoder, inputs.prompts, GREEDY, max_new_tokens=inputs.new_tokens)
        weights: Arrays = {}
        if inputs.wants("update"):
            progress("optimiser steps")
            weights = {name: array_of(parameter).copy() for name, parameter in decoder.named_parameters()}
            levels |= self._updates(decoder, inputs, weights)
        return Trace(levels, tokens, weights)

    def weights(self) -> Arrays:
        """See `trace.Side`."""
        return dict(self._tensors)

    def forward(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """See `trace.Side`."""
        return self._forward(self._decoder(dtype), _tensors(rows))

    def replay(self, dtype: str, rows: Mapping[str, np.ndarray], inputs: Arrays | None) -> Events:
        """See `trace.Side`."""
        # The same events as on the side of JAX. A module may be called twice (sinks are embedded as well as tokens):
        # the first call counts.
        events: Events = {}

        def exchanged(name: str, x: Any) -> Any:
            if not isinstance(x, Tensor) or (ARRIVES, name) in events:  # of sinks: the second call
                return x
            events[ARRIVES, name] = array_of(x)
            forced = None if inputs is None else inputs.get(name)
            return x if forced is None or forced.shape != x.shape else torch.tensor(np.asarray(forced)).to(x.dtype)

        def arrives(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
            x, *rest = args
            x = exchanged(name, x)
            if rest and isinstance(rest[0], Routing):
                routing = {what: exchanged(f"{name}#{what}", getattr(rest[0], what)) for what in ROUTING}
                rest[0] = rest[0]._replace(**routing)
            return (x, *rest), kwargs

        def returns(name: str, output: Any) -> None:
            events.setdefault((RETURNS, name), array_of(first(output)))

        decoder, batch = self._decoder(dtype), _tensors(rows)
        with torch.no_grad(), watched(_modules(decoder), returns, arrives):
            returns(LOGITS, decoder(batch["tokens"], batch["positions"], batch["segments"])[0])
        return events

    def _forward(self, decoder: Decoder, batch: dict[str, Tensor]) -> Arrays:
        captured: Arrays = {}

        def keep(name: str, output: Any) -> None:
            for key, tensor in returned(name, output).items():
                captured.setdefault(key, array_of(tensor))  # of sinks: the second call is not kept

        with torch.no_grad(), watched(_modules(decoder), keep):
            keep(LOGITS, decoder(batch["tokens"], batch["positions"], batch["segments"])[0])
        return captured

    def gradients(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """See `trace.Side`."""
        return self._gradients(self._decoder(dtype), _tensors(rows))[1]

    def next_logits(self, dtype: str, ids: list[int]) -> np.ndarray:
        """See `trace.Side`."""
        tokens_1T = torch.tensor([ids])
        with torch.no_grad():
            logits, _ = self._decoder(dtype)(
                tokens_1T, torch.arange(len(ids)).expand_as(tokens_1T), torch.ones_like(tokens_1T)
            )
        return array_of(logits[0, -1])

    def _gradients(self, decoder: Decoder, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Arrays]:
        """Sums of the loss, and the gradient of its mean."""
        # Parameters without a gradient are experts that no token chose; in JAX their gradient is zero and not absent.
        loss, sums = torch_loss(decoder, self._settings.train)(batch)
        (loss / sums["weight"]).backward()
        gradients = {
            name: array_of(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            for name, parameter in decoder.named_parameters()
        }
        decoder.zero_grad()
        return sums, gradients

    def _decoder(self, dtype: str) -> Decoder:
        numerics, model = numerics_of(dtype), self._settings.model
        if model.attention_impl == "auto":  # PyTorch's fused kernel, tested by itself, is 1.6 times as inexact
            model = dataclasses.replace(model, attention_impl="xla")
        decoder = Decoder(model, Policy.from_config(numerics))
        # through numpy, which knows how to widen the bfloat16 of JAX
        tensors = {name: torch.tensor(np.asarray(x, numerics.params)) for name, x in self._tensors.items()}
        decoder.load_state_dict(tensors, strict=True)
        return decoder.eval()

    def _updates(self, decoder: Decoder, inputs: Inputs, begin: Arrays) -> dict[str, Arrays]:
        """How far the optimiser has moved each parameter after each number of `STEPS`."""
        # `moved` keeps the difference to the start in float64: a relative error of the parameters would hide a wrong
        # update behind their size.
        train, batch, levels = self._settings.train, _tensors(inputs.step_rows), {}
        step = make_step(torch_loss(decoder, train), make_optimizer(decoder, train), train, seed=0, decoder=decoder)
        state = TrainState()
        with torch.random.fork_rng(devices=[]):  # each step seeds the generator of the process
            for number in range(1, max(STEPS) + 1):
                state, _ = step(state, batch)
                if number in STEPS:
                    now = {name: array_of(parameter) for name, parameter in decoder.named_parameters()}
                    levels[f"update {number}"] = {name: moved(array, begin[name]) for name, array in now.items()}
        return levels


def _modules(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All but the whole, and what does nothing."""
    named = itertools.islice(decoder.named_modules(), 1, None)
    return ((name, module) for name, module in named if not isinstance(module, nn.Dropout))


def _tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.tensor(array) for name, array in batch.items()}

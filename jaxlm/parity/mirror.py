"""The side of torch_ref: forward hooks, autograd, its own optimiser and its own cache. Imports torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jaxlm import config
from jaxlm.convert.native import to_torch
from jaxlm.data.completion import GREEDY
from jaxlm.models.decoder import Params
from jaxlm.parity.inputs import Inputs
from jaxlm.parity.trace import STEPS, Arrays, Trace, moved, numerics_of, returned, settings_of
from torch_ref.generate import generate
from torch_ref.models.decoder import Decoder
from torch_ref.numerics import Policy
from torch_ref.optim import make_optimizer
from torch_ref.step import TrainState, loss_fn, make_step


class TorchSide:
    """torch_ref holding the tensors of a `state_dict`."""

    name = "torch_ref"

    def __init__(self, settings: config.Config, tensors: Mapping[str, np.ndarray]) -> None:
        self._settings, self._tensors = settings_of(settings), tensors

    @classmethod
    def of(cls, settings: config.Config, params: Params) -> TorchSide:
        """The mirror of a model of jaxlm, with its weights converted."""
        return cls(settings, dict(to_torch(params, settings.model)))

    def trace(self, dtype: str, inputs: Inputs, told: Callable[[str], None]) -> Trace:
        """See `trace.Side`."""
        with _threads(torch.get_num_threads() // 2):  # jaxlm is at work on the other half
            return self._trace(dtype, inputs, told)

    def _trace(self, dtype: str, inputs: Inputs, told: Callable[[str], None]) -> Trace:
        decoder, batch = self._decoder(dtype), _tensors(inputs.rows)
        told("forward and gradient")
        levels = {"forward": self._forward(decoder, batch)}
        sums, levels["gradients"] = self._gradients(decoder, batch)
        levels["loss"] = {name: _array(sums[name] / sums["weight"]) for name in ("loss", "nll")}
        told("greedy tokens")
        tokens = generate(decoder, inputs.prompts, GREEDY, max_new_tokens=inputs.new_tokens)
        weights = {name: _array(parameter).copy() for name, parameter in decoder.named_parameters()}
        told("optimiser steps")
        levels |= self._updates(decoder, inputs, weights)
        return Trace(levels, tokens, weights)

    def weights(self) -> Arrays:
        """See `trace.Side`."""
        return dict(self._tensors)

    def forward(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """See `trace.Side`."""
        return self._forward(self._decoder(dtype), _tensors(rows))

    def _forward(self, decoder: Decoder, batch: dict[str, Tensor]) -> Arrays:
        with torch.no_grad(), _outputs(decoder) as captured:
            captured["logits"] = decoder(batch["tokens"], batch["positions"], batch["segments"])[0]
        return {name: _array(tensor) for name, tensor in captured.items()}

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
        return _array(logits[0, -1])

    def _gradients(self, decoder: Decoder, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Arrays]:
        """Sums of the loss, and the gradient of its mean."""
        loss, sums = loss_fn(decoder, self._settings.train)(batch)
        (loss / sums["weight"]).backward()
        gradients = {
            name: _array(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
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
        train, batch, levels = self._settings.train, _tensors(inputs.step_rows), {}
        step = make_step(loss_fn(decoder, train), make_optimizer(decoder, train), train, seed=0, decoder=decoder)
        state = TrainState()
        with torch.random.fork_rng(devices=[]):  # each step seeds the generator of the process
            for number in range(1, max(STEPS) + 1):
                state, _ = step(state, batch)
                if number in STEPS:
                    now = {name: _array(parameter) for name, parameter in decoder.named_parameters()}
                    levels[f"update {number}"] = {name: moved(array, begin[name]) for name, array in now.items()}
        return levels


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """At most this many threads for torch, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _outputs(decoder: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects what every module returns, in the order in which they finish; a cache beside an output is dropped."""
    captured: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            for key, tensor in returned(name, output).items():
                captured.setdefault(key, tensor)  # of sinks: the second call

        return keep

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in itertools.islice(decoder.named_modules(), 1, None)
        if not isinstance(module, nn.Dropout)
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.tensor(array) for name, array in batch.items()}


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

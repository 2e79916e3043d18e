"""The side of transformers: a Hugging Face folder computed by the model that it is meant for, hooks and autograd.

Documents of a packed row are marked by positions that begin again at 0, where its model knows them
(`tells_documents_apart`), and padding is a document a token: what is computed there is not compared. Parameters are
float32 where it computes in bfloat16, as jaxlm has them.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from jaxlm import config
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.open_model import open_nearest
from jaxlm.errors import UserError
from jaxlm.parity.inputs import Inputs
from jaxlm.parity.sides.float64_mode import Lifted
from jaxlm.parity.sides.module_hooks import array_of, first, half_of_the_threads, watched
from jaxlm.parity.sides.transformers_names import Names
from jaxlm.parity.sides.transformers_routing import choice_of, replayed
from jaxlm.parity.tolerances import FLOAT64
from jaxlm.parity.trace import ARRIVES, LOGITS, RETURNS, STEPS, Arrays, Events, Trace, moved, settings_of
from torch_ref.train.optim import adamw
from torch_ref.train.step import Batch, Sums, TrainState, make_step

Parameters = dict[str, Tensor]
"""By the names of the model in memory."""


class HuggingFaceSide:
    """A folder of Hugging Face, computed by transformers."""

    name, mirrors = "transformers", False

    def __init__(self, settings: config.Config, folder: str | Path, rope_layout: str = "half") -> None:
        """`rope_layout`: how the model that it is compared with stores its rotary pairs."""
        self._settings, self._folder = settings_of(settings), Path(folder)
        opened, _ = open_nearest(self._folder)
        self._cfg = dataclasses.replace(opened.config.model, rope_layout=rope_layout)  # pyright: ignore
        self._rows = FAMILIES[opened.kind].rows(self._cfg)
        self._loaded: dict[str, tuple[PreTrainedModel, Names]] = {}

    @property
    def tells_documents_apart(self) -> bool:
        """Whether a document that comes second in a row is computed as if it were alone, found by trying."""
        # The same document twice in one row: if the second is computed like the first, positions that begin again
        # separate documents.
        ids = np.arange(3) % self._cfg.vocab_size
        rows = {"tokens": np.tile(ids, (1, 2)), "positions": np.tile(np.arange(3), (1, 2))}
        with _lifted("float64"), torch.no_grad():
            first, second = self._call(self._model("float64")[0], rows)[0].split(3)
        return bool((first - second).norm() <= FLOAT64.allowed * first.norm())

    def trace(self, dtype: str, inputs: Inputs, progress: Callable[[str], None]) -> Trace:
        """See `trace.Side`."""
        with half_of_the_threads(), _lifted(dtype):
            return self._trace(dtype, inputs, progress)

    def _trace(self, dtype: str, inputs: Inputs, progress: Callable[[str], None]) -> Trace:
        progress("forward and gradient")
        model, names = self._model(dtype)
        parameters = self._parameters(dtype)
        levels: dict[str, Arrays] = {}
        if inputs.wants("forward", "loss", "gradients"):
            sums, gradients = self._gradients(model, names, parameters, inputs.rows, inputs.wants("gradients"))
            found = {"forward": self._forward(model, names, inputs.rows), "gradients": gradients}
            found["loss"] = {name: array_of(sums[name] / sums["weight"]) for name in ("loss", "nll")}
            levels = {level: found[level] for level in ("forward", "loss", "gradients") if inputs.wants(level)}
        tokens = []
        if inputs.wants("generation"):
            progress("greedy tokens")
            tokens = [self._continued(model, prompt, inputs.new_tokens) for prompt in inputs.prompts]
        weights = names.tensors(self._state(model, parameters))
        if inputs.wants("update"):
            progress("optimiser steps")
            levels |= self._updates(model, names, parameters, inputs)
        return Trace(levels, tokens, weights)

    def weights(self) -> Arrays:
        """See `trace.Side`."""
        model = self._read("auto")
        return Names(model, self._cfg, self._rows).tensors(model.state_dict())

    def forward(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """See `trace.Side`."""
        with _lifted(dtype):
            return self._forward(*self._model(dtype), rows)

    def gradients(self, dtype: str, rows: Mapping[str, np.ndarray]) -> Arrays:
        """See `trace.Side`."""
        with _lifted(dtype):
            return self._gradients(*self._model(dtype), self._parameters(dtype), rows)[1]

    def next_logits(self, dtype: str, ids: list[int]) -> np.ndarray:
        """See `trace.Side`."""
        with _lifted(dtype), torch.no_grad():
            model: Any = self._model(dtype)[0]
            return array_of(model(torch.tensor([ids]), use_cache=False).logits[0, -1])

    def replay(self, dtype: str, rows: Mapping[str, np.ndarray], inputs: Arrays | None) -> Events:
        """See `trace.Side`."""
        events: Events = {}
        with _lifted(dtype), torch.no_grad():
            model, names = self._model(dtype)
            places = names.places()

            def arrives(module: str, args: tuple, kwargs: dict[str, Any]) -> Any:
                x = args[0] if args else kwargs.get("hidden_states")
                if not isinstance(x, Tensor) or not x.is_floating_point():
                    return None
                for place in places[module]:
                    events[ARRIVES, place.name] = _taken(x, place.inputs, rows, place.takes)
                forced = [inputs[place.name] for place in places[module] if place.name in inputs] if inputs else []
                if not forced or forced[0].size != x.numel():
                    return None
                x = _given(forced[0], places[module][0].inputs, x)
                rest = replayed(args[1:], inputs or {}, places[module][0].name, rows)
                return ((x, *rest), kwargs) if args else (args, kwargs | {"hidden_states": x})

            def returns(module: str, output: Any) -> None:
                for place in places[module]:
                    events[RETURNS, place.name] = _taken(first(output), place.outputs, rows, place.gives)

            with watched(_modules(model, places), returns, arrives):
                events[RETURNS, LOGITS] = array_of(self._call(model, rows))
        return events

    def _forward(self, model: PreTrainedModel, names: Names, rows: Mapping[str, np.ndarray]) -> Arrays:
        captured: Arrays = {}
        places, routers = names.places(), names.routers()

        def keep(module: str, output: Any) -> None:
            for place in places.get(module, ()):
                captured[place.name] = _taken(first(output), place.outputs, rows, place.gives)
            if module in routers:
                captured.update(choice_of(model.get_submodule(module), output, *routers[module], rows["tokens"].shape))

        with torch.no_grad(), watched(_modules(model, {**places, **routers}), keep):
            captured[LOGITS] = array_of(self._call(model, rows))
        return captured

    def _call(self, model: Any, rows: Mapping[str, Any], parameters: Parameters | None = None) -> Tensor:
        """Logits; of other parameters than the model's own when they are given."""
        arguments: dict[str, Any] = {"input_ids": torch.as_tensor(rows["tokens"]).long(), "use_cache": False}
        if "position_ids" in inspect.signature(model.forward).parameters:
            arguments["position_ids"] = torch.as_tensor(rows["positions"]).long()
        if model.config.model_type == "gpt_oss":
            arguments["attention_mask"] = _masks(model, arguments["position_ids"])
        if parameters is None:
            return model(**arguments).logits
        own = dict(model.named_parameters())
        cast = {name: parameter.to(own[name].dtype) for name, parameter in parameters.items()}
        # Master parameters in float32 are cast to the dtype of the model inside the graph, so gradients flow to the
        # masters, as in jaxlm.
        found: Any = torch.func.functional_call(model, cast, kwargs=arguments, tie_weights=True)
        return found.logits

    def _loss(self, model: PreTrainedModel, parameters: Parameters) -> Callable[[Batch], tuple[Tensor, Sums]]:
        """The objective of `torch_ref.recipes.pretrain.loss_fn` on the logits of transformers."""
        train = self._settings.train

        def compute(batch: Batch) -> tuple[Tensor, Sums]:
            logits = self._call(model, batch, parameters)
            # The objective is ours and not that of the library, which shifts labels and knows no weights; in float32 or
            # wider, as in both our frameworks.
            logits = logits.float() if logits.dtype == torch.bfloat16 else logits
            partition = torch.logsumexp(logits, dim=-1)
            nll = partition - logits.gather(-1, batch["targets"].long()[..., None])[..., 0]
            smooth = train.label_smoothing
            loss = (1 - smooth) * nll + smooth * (partition - logits.mean(dim=-1)) + train.z_loss * partition**2
            weights = batch["weights"].to(loss.dtype)
            sums = {"loss": (loss * weights).sum(), "nll": (nll * weights).sum(), "weight": weights.sum()}
            return sums["loss"], sums

        return compute

    def _gradients(
        self,
        model: PreTrainedModel,
        names: Names,
        parameters: Parameters,
        rows: Mapping[str, np.ndarray],
        wanted: bool = True,
    ) -> tuple[Sums, Arrays]:
        """Sums of the loss, and the gradient of its mean, if wanted."""
        with torch.set_grad_enabled(wanted):
            loss, sums = self._loss(model, parameters)(_tensors(rows))
        if not wanted:
            return sums, {}
        found = torch.autograd.grad(loss / sums["weight"], list(parameters.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
        }
        return sums, names.tensors(self._state(model, gradients, zeros=True))

    def _updates(
        self, model: PreTrainedModel, names: Names, parameters: Parameters, inputs: Inputs
    ) -> dict[str, Arrays]:
        """How far the optimiser has moved each parameter after each number of `STEPS`."""
        train, batch, levels = self._settings.train, _tensors(inputs.step_rows), {}
        state, decayed = TrainState(), names.decayed()
        # The updates run on copies: the model in memory serves all levels.
        now = {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters.items()}
        optimizer = adamw([(parameter, name in decayed) for name, parameter in now.items()], train)
        step = make_step(self._loss(model, now), optimizer, train, seed=0)
        with torch.random.fork_rng(devices=[]):  # each step seeds the generator of the process
            for number in range(1, max(STEPS) + 1):
                state, _ = step(state, batch)
                if number in STEPS:
                    differences = {
                        name: torch.tensor(moved(array_of(parameter), array_of(parameters[name])))
                        for name, parameter in now.items()
                    }
                    levels[f"update {number}"] = names.tensors(self._state(model, differences, zeros=True))
        return levels

    def _continued(self, model: Any, prompt: tuple[int, ...], count: int) -> list[int]:
        """The greedy continuation, with its own cache."""
        model.generation_config = GenerationConfig()  # what the folder says about ends and penalties is no matter here
        greedy = GenerationConfig(do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            new = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        return new[0, len(prompt) :].tolist()

    def _state(self, model: PreTrainedModel, values: Parameters, zeros: bool = False) -> Parameters:
        """Values of the parameters with buffers, or zeros for them, and with both names of what is tied."""
        # A tied tensor stands twice in the state but is one parameter. Buffers are constants of the model: they have no
        # gradient and no update.
        by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
        state = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            owner = by_identity.get(id(tensor))
            state[name] = values[owner] if owner else torch.zeros_like(tensor) if zeros else tensor
        return state

    def _parameters(self, dtype: str) -> Parameters:
        """What is learned, in float32 or wider."""
        model, _ = self._model("float32" if dtype == "bfloat16" else dtype)
        return {name: parameter.detach().requires_grad_() for name, parameter in model.named_parameters()}

    def _model(self, dtype: str) -> tuple[PreTrainedModel, Names]:
        if dtype not in self._loaded:
            model = self._read(dtype)
            self._loaded[dtype] = model, Names(model, self._cfg, self._rows)
        return self._loaded[dtype]

    def _read(self, dtype: str) -> PreTrainedModel:
        """The model as transformers loads it, with nothing missing, unexpected or of another shape."""
        eager: Any = {"attn_implementation": "eager", "experts_implementation": "eager"}
        with _quiet():
            model, problems = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                self._folder,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **eager,
            )
        for kind, found in problems.items():
            if found:
                raise UserError(f"{self._folder}: for transformers there are {kind.replace('_', ' ')}: {found}")
        return model.eval()


def _masks(model: PreTrainedModel, positions: Tensor) -> dict[str, Any]:
    """gpt-oss does not look at the positions when it makes its masks, but takes those that are made for it."""
    options: dict[str, Any] = {
        "config": model.config,
        "inputs_embeds": torch.empty(*positions.shape, 0, dtype=model.dtype),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": positions,
    }
    return {
        "full_attention": create_causal_mask(**options),
        "sliding_attention": create_sliding_window_causal_mask(**options),
    }


def _modules(model: PreTrainedModel, places: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if name in places)


def _taken(x: Tensor, index: np.ndarray | None, rows: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """What a module of torch_ref would take or give: its channels in its order, tokens on two axes."""
    array, (b, t) = array_of(x), rows["tokens"].shape
    # Channels of theirs in the order of ours. Tokens may lie flat, [B T, ...], inside of experts.
    array = array if index is None else array[..., index]
    if shape:
        return array.reshape(b, t, *shape)
    return array if array.shape[:2] == (b, t) else array.reshape(b, t, *array.shape[1:])


def _given(forced: np.ndarray, index: np.ndarray | None, like: Tensor) -> Tensor:
    """The inverse of `_taken` for what is given to a module."""
    # `index` says where each of our channels lies in theirs, so writing through it is the inverse of reading through
    # it.
    flat = forced.reshape(-1, like.shape[-1])
    if index is not None:
        turned = np.empty_like(flat)
        turned[:, index] = flat
        flat = turned
    return torch.tensor(flat).reshape(like.shape).to(like.dtype)


@contextlib.contextmanager
def _lifted(dtype: str) -> Iterator[None]:
    """What transformers computes in float32 in float64, when that is asked for."""
    with _quiet(), Lifted() if dtype == "float64" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar and the warnings of transformers, for a while."""
    logging = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.tensor(array) for name, array in batch.items()}

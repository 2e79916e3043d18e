"""A model as it may have been computed: a config, tensors, rows, and patches of torch_ref; and what comes out of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from jaxlm import config
from jaxlm.config.pattern import FFNS, MIXERS, parse_block
from jaxlm.parity.trace import Arrays, numerics_of
from torch_ref.models.decoder import Decoder
from torch_ref.numerics import Policy

SMALL = 512
"""Width of a model that one thread computes as fast as several, 96 tokens at a time."""
Patch = Callable[[], AbstractContextManager[Any]]
"""Changes torch_ref while it is entered."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute a model; `tensors` by the names of torch_ref."""

    model: config.Model
    tensors: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray]
    patches: tuple[Patch, ...] = ()
    dtype: str = "float64"
    made: dict[int, tuple[np.ndarray, torch.Tensor]] = dataclasses.field(default_factory=dict, repr=False)
    """The tensors of the first variant as torch has them, by the arrays' identity: all later ones share them."""

    def forward(self) -> Arrays:
        """The outputs of all modules in the order of computation, `logits` last; empty if none come out."""
        with contextlib.ExitStack() as stack:
            for patch in self.patches:
                stack.enter_context(patch())
            # The kernels of torch cannot be patched, so variants run the readable path, on one thread if the model is
            # small: hundreds of variants are tried, and threads cost more than they bring.
            model = dataclasses.replace(self.model, attention_impl="xla")  # the code that is patched
            stack.enter_context(_threads(1 if model.d_model <= SMALL else torch.get_num_threads()))
            decoder = Decoder(model, Policy.from_config(numerics_of(self.dtype)))
            arrays = fitted(model, self.tensors)
            # `assign` takes the tensors as they are. Together with `made` no variant copies weights that it shares with
            # the first.
            decoder.load_state_dict({name: self._tensor(x) for name, x in arrays.items()}, assign=True)
            if not self.made and self.dtype == "float64":
                state = decoder.state_dict()
                self.made.update((id(x), (x, state[name])) for name, x in arrays.items())
            return _outputs(decoder.eval(), {name: torch.tensor(array) for name, array in self.rows.items()})

    def _tensor(self, x: np.ndarray) -> torch.Tensor:
        if self.dtype == "float64" and id(x) in self.made:
            return self.made[id(x)][1]
        # as the side holds it: a low precision rounds by the order in memory
        return torch.tensor(np.asarray(x, numerics_of(self.dtype).params)).contiguous()

    def with_options(self, section: str = "", **options: Any) -> Variant:
        """With these options of `[model]`, or of one of its sections, in every block.

        Raises:
            ValueError: the config refuses them.
        """
        return dataclasses.replace(self, model=changed(self.model, section, **options))

    def with_tensors(self, change: Callable[[str, np.ndarray], np.ndarray | None]) -> Variant:
        """With every tensor changed for which `change(name, tensor)` is not None."""
        # Unchanged arrays stay the same objects: `made` knows tensors by identity.
        made = {name: change(name, tensor) for name, tensor in self.tensors.items()}
        return dataclasses.replace(
            self, tensors={name: self.tensors[name] if x is None else x for name, x in made.items()}
        )

    def with_rows(self, **arrays: np.ndarray) -> Variant:
        """With other positions or segments."""
        return dataclasses.replace(self, rows={**self.rows, **{k: v.astype(np.int32) for k, v in arrays.items()}})

    def with_patch(self, *patches: Patch) -> Variant:
        """With torch_ref patched."""
        return dataclasses.replace(self, patches=(*self.patches, *patches))


def _outputs(decoder: Decoder, rows: Mapping[str, torch.Tensor]) -> Arrays:
    captured: Arrays = {}
    for name, module in decoder.named_modules():
        if name:
            module.register_forward_hook(functools.partial(_keep, captured, name))
    with torch.no_grad():
        logits, _ = decoder(rows["tokens"], rows["positions"], rows["segments"])
    return captured | {"logits": logits.numpy()}


def _keep(captured: Arrays, name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
    """The first output of a module; of sinks it is not the second call."""
    output = output[0] if isinstance(output, tuple) else output
    captured.setdefault(name, output.to(torch.promote_types(output.dtype, torch.float32)).numpy())


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def changed(model: config.Model, section: str = "", **options: Any) -> config.Model:
    """`model` with these options everywhere, also in the blocks that have their own."""
    # A block of the pattern that sets an option itself would override the new value: it is written into the block too.
    pattern = tuple(rendered(kind, options) for kind in model.pattern)
    if section:
        options = {section: dataclasses.replace(getattr(model, section), **options)}
    return dataclasses.replace(model, **{"pattern": pattern, **options})


def rendered(kind: str, options: Mapping[str, Any], add: bool = False) -> str:
    """A block of a pattern, written with those of `options` that it sets itself; `add`: with those that it may set."""
    mixer, mixer_options, ffn, ffn_options = parse_block(kind)

    def half(name: str, own: Mapping[str, Any], known: tuple[str, ...]) -> str:
        chosen = {**own, **{key: value for key, value in options.items() if key in (known if add else own)}}
        arguments = ", ".join(
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in chosen.items()
        )
        return f"{name}({arguments})" if arguments else name

    halves = [half(mixer, mixer_options, MIXERS[mixer])] + ([half(ffn, ffn_options, FFNS[ffn])] if ffn else [])
    return "+".join(halves)


def fitted(model: config.Model, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that a model has: an untied head is the embedding, a bias 0 and a norm 1 where `tensors` lacks them.

    Raises:
        ValueError: another one is missing, or of another shape.
    """
    found = {}
    for name, shape in shapes(model).items():
        # A variant may have a tensor that the weights lack. It gets the value with which the operation does nothing, so
        # that the option alone is what changes.
        tensor = tensors.get(name)
        if tensor is None and name == "head.weight":
            tensor = tensors["embed.weight"]
        if tensor is None and name.endswith("bias"):
            tensor = np.zeros(shape)
        if tensor is None and name.endswith("norm.weight"):
            tensor = np.ones(shape)
        if tensor is None or tensor.shape != shape:
            raise ValueError(f"no {name} {list(shape)}")
        found[name] = tensor
    return found


@functools.lru_cache(maxsize=64)
def shapes(model: config.Model) -> Mapping[str, tuple[int, ...]]:
    """Of every tensor of a model, by the names of torch_ref."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Decoder(model).state_dict().items()}


def attempt(variant: Variant) -> Arrays:
    """The outputs of a variant, none if it cannot be computed: a hypothesis may not fit the model."""
    try:
        return variant.forward()
    except (ValueError, IndexError, RuntimeError, KeyError, TypeError):
        return {}


def distance(theirs: np.ndarray | None, mine: np.ndarray | None, real_BT: np.ndarray) -> float:
    """Relative error of outputs [B, T, ...] over the tokens that are no padding; infinite where they do not compare."""
    if theirs is None or mine is None or theirs.shape != mine.shape:
        return math.inf
    # Padding is left out: each implementation computes something else there.
    if theirs.shape[:2] == real_BT.shape:
        theirs, mine = theirs[real_BT], mine[real_BT]
    size, error = _length(theirs), _length(np.asarray(mine, np.float64) - theirs)
    error = error / size if size else error
    return error if math.isfinite(error) else math.inf


def sample(real_BT: np.ndarray, count: int = 24) -> np.ndarray:
    """Some tokens that are no padding, evenly, as indices of rows and tokens flattened; the last among them."""
    places = np.flatnonzero(real_BT)
    return places[np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)]


def agrees(theirs: np.ndarray, mine: np.ndarray, real_BT: np.ndarray, bound: float) -> bool:
    """Whether the outputs of a module are the same at a sample of tokens."""
    if theirs.shape == mine.shape and theirs.shape[:2] == real_BT.shape:
        # 24 tokens decide whether a module agrees: a wrong computation is wrong at nearly every token, and thousands of
        # comparisons are made.
        some = sample(real_BT)
        theirs, mine = (x.reshape(real_BT.size, -1)[some][None] for x in (theirs, mine))
    return distance(theirs, mine, np.ones(theirs.shape[:2], bool)) <= bound


def _length(x: np.ndarray) -> float:
    """Euclidean, without BLAS: its threads cost more than they bring here."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.sqrt(np.sum(np.square(x, dtype=np.float64)))


def blocks_with(model: config.Model, mixer: str = "", ffn: str = "") -> Iterator[config.Model]:
    """`[model]` as each block of the pattern with this mixer, or this feed-forward, sees it."""
    for kind in model.pattern:
        halves = model.halves(kind)
        if mixer and halves.mixer_name == mixer:
            yield halves.mixer
        if ffn and halves.ffn_name == ffn:
            yield halves.ffn

"""A training stage as a value: the batch, the models, the loss, the source of rows, the judge.

The loop, the step, the planner, the checkpoints and the parity tool take a `Recipe` and know none by name. It imports
neither JAX nor torch; both engines take the same value.

Axes of a batch: `batch` (rows B) and `seq` (tokens T); None is an axis of `Column.size` entries that no device splits,
such as the M documents of a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxlm import config
from jaxlm.data.rows.validation import HeldOut
from jaxlm.text.tokenizer import Tokenizer

MODEL = "model"
"""The trained tree that is the model of the run: what `jaxlm.load` opens, and what goes to other layouts."""
BASE = "base"
"""The frozen tree under the adapters of the model of the run; see `base_name`."""
Batch = Mapping[str, np.ndarray]


class Column(NamedTuple):
    """One array of a batch."""

    dtype: str
    axes: tuple[str | None, ...]
    size: int = 1
    """Entries along an axis without a name."""
    below: int = 2
    """Random whole numbers of this column, as parity draws them, lie in 0 to `below` - 1."""

    def shape(self, batch: int, seq: int) -> tuple[int, ...]:
        """The shape for so many rows of so many tokens."""
        sizes: dict[str | None, int] = {"batch": batch, "seq": seq}
        return tuple(sizes.get(axis, self.size) for axis in self.axes)


ROWS: tuple[str | None, ...] = ("batch", "seq")
LM_COLUMNS = {
    **dict.fromkeys(("tokens", "targets", "positions", "segments"), Column("int32", ROWS)),
    "weights": Column("float32", ROWS),
}
"""Packed rows of next-token prediction; see `data.packing.pieces.Rows`."""


class Trained(NamedTuple):
    """A model whose parameters move."""

    model: config.Model
    train: config.Train
    """Its learning rate, schedule, decay and clip; the number of steps and rows are those of the run."""
    moves: Callable[[str], bool] | None = None
    """Whether a parameter moves, by its `parameter_name`; None: all do. The others have no gradient and no moments."""
    path: str = ""
    """The run or folder whose parameters it begins with, or only its trunk where the heads differ.

    Empty: `MODEL` begins with `train.init_from`, the others are drawn from the seed.
    """
    adapters: config.LoRA | None = None
    """These are trained instead, and the parameters with which the tree begins are the frozen tree `base_name`."""


def base_name(name: str) -> str:
    """The name of the frozen tree under the adapters of a trained one."""
    return BASE if name == MODEL else f"{name}_{BASE}"


def model_of_run(cfg: config.Config) -> Trained:
    """The model of `cfg`: all of its parameters move, or the adapters of `[lora]`."""
    return Trained(cfg.model, cfg.train, adapters=cfg.lora if cfg.lora.rank else None)


def parameter_name(path: str) -> str:
    """The name of a parameter in both frameworks, the same in all layers: `layers.mixer.q_proj.weight`.

    `path` is dotted: of a Flax tree, scanned or unrolled, or of a `state_dict` of torch_ref.
    """
    path = re.sub(r"^layers(?:_\d+|\.slot_\d+|\.\d+)\.", "layers.", path)
    module, _, kind = path.rpartition(".")
    return f"{module}.{'weight' if kind in ('kernel', 'embedding', 'scale') else kind}"


class Frozen(NamedTuple):
    """A model that only computes: a teacher, a reference, the base under adapters."""

    model: config.Model
    path: str
    """The run or folder that its parameters are read from; empty: they are drawn from the seed of the run."""
    dtype: str = "float32"


class Maps(NamedTuple):
    """A trained tree that is no model: linear maps which only the loss needs, such as projections.

    Checkpoints hold it, and what is exported does not. In JAX it is `{name: {"kernel": [in, out]}}`, in PyTorch a
    `ModuleDict` with the weights `NAME.weight` [out, in].
    """

    shapes: Mapping[str, tuple[int, int]]
    """Inputs and outputs of each; the inputs lie along the axis `embed`."""
    train: config.Train

    def draw(self, tree: str, seed: int, dtype: str) -> dict[str, dict[str, np.ndarray]]:
        """The tree of this name as a run begins, the same in both frameworks: normal kernels of variance 1 / inputs."""
        drawn = dict[str, dict[str, np.ndarray]]()
        for name, shape in self.shapes.items():
            rng = np.random.default_rng([seed, zlib.crc32(f"{tree}/{name}".encode())])
            drawn[name] = {"kernel": (rng.standard_normal(shape) * shape[0] ** -0.5).astype(dtype)}
        return drawn


class Models(NamedTuple):
    """The trees of a stage by name; one of the trained ones is `MODEL`."""

    trained: Mapping[str, Trained]
    frozen: Mapping[str, Frozen] = {}
    maps: Mapping[str, Maps] = {}

    @property
    def moving(self) -> tuple[str, ...]:
        """The names of all that is trained."""
        return (*self.trained, *self.maps)

    @property
    def several(self) -> bool:
        """Whether parameters are a dict of trees; the only trained tree stands for itself."""
        return len(self.moving) > 1


class RowFunction(NamedTuple):
    """Numbers of the rows of a batch in both frameworks: scores of its documents, or what a reference thinks of them.

    `jax(modules, cfg)` returns `(trained, frozen, batch) -> array [B, ...]`, `torch(modules, cfg)` its twin
    `(batch) -> array`; modules and trees are as for `Objective`.
    """

    jax: Callable[..., Callable[..., Any]]
    torch: Callable[..., Callable[..., Any]]
    frozen: Mapping[str, Frozen] = {}
    """Trees that only this needs: an engine holds them while it computes, and no longer."""


class Objective(NamedTuple):
    """The loss in both frameworks.

    `jax(modules, cfg)` returns `loss(trained, frozen, batch, key) -> (sum, sums)`: `modules` are the Flax modules by
    name, `trained` is the tree of parameters (or a dict of several), `frozen` a dict of trees, `key` is None where
    nothing is random. `torch(modules, cfg)` returns its twin `loss(batch) -> (sum, sums)`.

    `sum` is what is differentiated; `sums["weight"]` divides it and all other sums. `divisors` names another divisor
    for a metric.
    """

    jax: Callable[..., Callable[..., tuple[Any, dict[str, Any]]]]
    torch: Callable[..., Callable[..., tuple[Any, dict[str, Any]]]]
    jax_whole: Callable[..., Callable[..., dict[str, Any]]] | None = None
    """Numbers of the whole batch that the loss of each microbatch needs: `jax_whole(modules, cfg)` returns
    `(trained, frozen, batch) -> sums`, which are added up without gradients before the batch is cut, and stand in each
    microbatch by their names. A batch that is not cut has none."""
    torch_whole: Callable[..., Callable[..., dict[str, Any]]] | None = None
    """Its twin: `torch_whole(modules, cfg)` returns `(batch) -> sums`."""
    update_if: Callable[[Mapping[str, Any]], Any] | None = None
    """Whether an update is made, by the sums of the whole batch, in both frameworks; None: always. One that is not made
    changes nothing but the number of the step, and the metric `stopped` is 1."""
    divisors: Mapping[str, str] = {}
    """Sums by name that another one divides in the metrics of a step: `{"entropy": "tokens"}`."""
    kept: int = 0
    """Elements of one token, in the compute dtype, that stand until its gradient is known, beside what the trained
    models keep. The planner counts them."""
    blocks: int = 1
    """How many times the logits of a block of tokens stand side by side: those of a teacher, or their logarithms. The
    planner counts them."""
    cached: RowFunction | None = None
    """Numbers of each row that no update changes. They are computed once, before training, and kept by the data, which
    is a `CachingSource`; batches have them as a column, so the step needs neither the trees nor their forward pass."""


def twin(module: str, name: str = "objective") -> Callable[..., Any]:
    """A function of a module of torch_ref, imported when PyTorch trains or a proof is asked for."""

    def function(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return function


@runtime_checkable
class Batches(Protocol):
    """An iterator over batches, whose state is a few numbers; `next_index` among them is the next batch.

    It may have `count`, the number of batches until it ends, and `delivered()`, the tokens of each corpus since last.
    """

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class DataSource(Protocol):
    """Rows by number, or prompts that become rows."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to the ids of the rows."""
        ...

    @property
    def updates_per_phase(self) -> int:
        """Updates that follow on one `begin_phase`; checkpoints fall on the ends of phases. 1: every update
        is a phase."""
        ...

    def identity(self) -> dict[str, str]:
        """What must be the same when a run resumes: names, and fingerprints of what they name."""
        ...

    def batches(self, *, batch_size: int, rows: np.ndarray | None) -> Batches:
        """Training batches, of which this process makes `rows` (None: all)."""
        ...

    def held_out(self, *, batch_size: int, rows: np.ndarray | None, max_batches: int) -> Sequence[HeldOut]:
        """Sets of validation batches, always the same; `max_batches` of each, 0: all."""
        ...

    def begin_phase(self, number: int, engine: Any) -> None:
        """Make what the updates of phase `number` (counted from 0) need from the model as it is: rollouts."""
        ...


Compute = Callable[[Iterator[Batch]], Iterator[np.ndarray]]
"""Batches to the numbers of their rows, by an engine."""


@runtime_checkable
class CachingSource(DataSource, Protocol):
    """Rows that have a column of numbers which a frozen model computes once: see `Objective.cached`."""

    def cache(self, facts: Mapping[str, str], compute: Compute, engine: Any) -> None:
        """Read the numbers of all rows from a file that was made by the same facts, or compute and write them.

        Args:
            facts: what decides the numbers beside the rows: sha256 of the frozen model, numerics.
        """
        ...


class Judge(NamedTuple):
    """How a stage is judged: figures of the held-out rows, of which one is the headline."""

    figures: Callable[[Mapping[str, float]], dict[str, float]]
    """Sums over the held-out rows to the figures of a validation, by their names in `metrics.jsonl`."""
    headline: str = "validation_loss"
    lower_is_better: bool = True
    examine: Callable[[Any], dict[str, float]] = lambda engine: {}
    """Takes the engine at each validation: figures that are no sums, which stand beside the others; it may keep in the
    run what the report page shows."""
    describe: Callable[[Mapping[str, float]], str] = lambda figures: ""
    """One line about the figures, for the terminal."""
    baseline: float | None = None
    """The headline of a trivial model; plots draw it."""
    baseline_name: str = ""
    loss_unit: str = "nats a token"
    """In which the page of a run gives `loss` and `validation_loss`; empty: a loss without a unit."""

    def score(self, figures: Mapping[str, float]) -> float:
        """The headline as a number that is better when lower."""
        return figures[self.headline] if self.lower_is_better else -figures[self.headline]

    def reaches(self, score: float, target: float) -> bool:
        """Whether a score is that of a headline as good as `target`; nothing reaches 0."""
        return target > 0 and score <= self.score({self.headline: target})


class Recipe(NamedTuple):
    """What a training stage is.

    It is made before the data is opened, so `vocab_size` may still be 0 in the models of a run with a tokenizer of its
    own: `with_vocabulary` fills it in. Objectives read it from their modules.
    """

    columns: Mapping[str, Column]
    models: Models
    objective: Objective
    data: Callable[[Tokenizer | None], DataSource]
    """Opens the data; a run that resumes hands in its own tokenizer."""
    judge: Callable[[DataSource], Judge]

    def with_vocabulary(self, size: int) -> Recipe:
        """The same stage, of `size` tokens where a model of any tree leaves `vocab_size` open (0)."""

        def sized(trees: Mapping[str, Any]) -> dict[str, Any]:
            models = {name: tree.model for name, tree in trees.items()}
            full = {name: dataclasses.replace(one, vocab_size=one.vocab_size or size) for name, one in models.items()}
            return {name: tree._replace(model=full[name]) for name, tree in trees.items()}

        objective = self.objective
        if objective.cached is not None:
            objective = objective._replace(cached=objective.cached._replace(frozen=sized(objective.cached.frozen)))
        models = self.models._replace(trained=sized(self.models.trained), frozen=sized(self.models.frozen))
        return self._replace(models=models, objective=objective)


def digest_of(leaves: Mapping[str, Any]) -> str:
    """The sha256 (hex) of named arrays, whatever their order: names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(leaves):
        array = np.ascontiguousarray(np.asarray(leaves[name]))
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.view(np.uint8).data if array.dtype.kind in "fiu" else array.tobytes())
    return found.hexdigest()

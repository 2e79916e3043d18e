"""Checkpoints by Orbax: asynchronous, atomic, the newest N and the best.

    runs/NAME/checkpoints/STEP/  params  optimizer  run (JSON)  trained (trees besides the model, if there are any)

`run` holds what is not an array: data-iterator state, tokenizer hash, format version, shape and checksum of every leaf;
so another architecture is refused by name, and damage is noticed when it is read, whatever the mesh. Frozen trees are
not saved, nor the base under adapters: `run` has the path and sha256 of each, and a run resumes with the same ones
alone (`loop.FrozenFile`).
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import math
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import DamagedCheckpointError, UserError
from jaxlm.processes.compiled_together import everywhere
from jaxlm.processes.orbax_silence import OrbaxSilence
from jaxlm.train.orbax_manager import OrbaxManager
from jaxlm.train.recipe import MODEL
from jaxlm.train.step import TrainState

with OrbaxSilence():
    import orbax.checkpoint as ocp

FORMAT = 1
_TREES = ("params", "optimizer", "trained")
_LIMIT_GB = 96  # Orbax's own
_REPLACED = "the run goes on saving: try again, or let it keep more with checkpoint.keep"
_OTHER_STEP = "--step names an earlier one"
_Unreadable = Callable[[Exception], UserError]
_OTHER = "this is another architecture: use the run's own config.toml, or another out_dir"


class Checkpointer:
    """Saves and restores the training state of one run directory."""

    def __init__(
        self,
        run_dir: str | Path,
        keep: int = 3,
        read_only: bool = False,
        under_way_gb: int = _LIMIT_GB,
        several: bool = False,
    ) -> None:
        """`several`: the parameters of a state are a dict of trees, one of which is the model."""
        self._several = several
        self._silence = OrbaxSilence()
        policies = ocp.checkpoint_managers
        processes = _alone() if read_only else ocp.options.MultiprocessingOptions()
        best = policies.BestN(get_metric_fn=_quality, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(n=keep), best]),
            best_fn=_quality,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            multiprocessing_options=processes,
        )
        self.folder = Path(run_dir).absolute() / "checkpoints"
        self._read_only = read_only
        self._plain = self._plain_path()
        # Weights hardly compress: 8 % smaller for twice the time to read them.
        limits: Any = {"save_concurrent_gb": under_way_gb, "restore_concurrent_gb": under_way_gb}
        limits["multiprocessing_options"] = processes
        handlers: Any = {name: ocp.PyTreeCheckpointHandler(use_compression=False, **limits) for name in _TREES}
        handlers["run"] = ocp.JsonCheckpointHandler(multiprocessing_options=processes)
        self._manager = OrbaxManager(self._plain, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, run: dict[str, Any], validation_loss: float | None = None) -> None:
        """Start to save; returns when the arrays are copied, before they are written.

        A checkpoint of the same step is replaced: its record did not know the validation loss.

        Raises:
            UserError: the disk is full or the folder is not writable (also for the save before this one).
        """
        items = self._items(state)
        metrics = None if validation_loss is None else {"validation_loss": validation_loss}
        self._save(int(state.step), items, run, metrics)

    def restore(self, like: TrainState, warn: Callable[[str], None]) -> tuple[TrainState, dict[str, Any]]:
        """The newest intact checkpoint, in the shapes, dtypes and shardings of `like`, and its `run` record.

        Damaged checkpoints are named through `warn`, passed over, and moved out of the way of the ones to come.

        Raises:
            UserError: none is intact, or the parameters have other shapes.
        """
        items, run = self._first_intact(reversed(self.steps()), self._items(like), warn)
        self._set_aside(step for step in self.steps() if step > int(items["optimizer"]["step"]))
        return self._state(items), run

    def read(self, like: TrainState, step: int) -> tuple[TrainState, dict[str, Any], float | None]:
        """State, `run` record and validation loss of `step`, as `save` was given them; nothing is moved or passed over.

        Raises:
            UserError: the checkpoint is damaged, or of another architecture.
        """
        abstract = jax.tree.map(_abstract, self._items(like))
        try:
            items, run = self._read(step, abstract)
            loss = (self._manager.metrics(step) or {}).get("validation_loss")
        except UserError:
            raise
        except Exception as error:  # Orbax raises plain ones for what it cannot read
            raise UserError(
                f"{self.folder / str(step)} is damaged: {_first_line(error)}", self._others(step)
            ) from error
        record = {name: value for name, value in run.items() if name not in ("format", "shapes", "checksums")}
        return self._state(items), record, loss

    def restore_params(self, like: Any, warn: Callable[[str], None], step: int | None = None) -> Any:
        """Only the parameters of `step` (default: the newest intact one), in the shapes and shardings of `like`.

        Raises:
            UserError: there is no such checkpoint, or it is damaged or of another architecture.
        """
        for _ in range(5):
            asked = self._asked(step)
            try:
                return self._first_intact(reversed(asked), {"params": like}, warn)[0]["params"]
            except UserError:
                if not any(map(self._replaced, asked)):
                    raise
                self._manager.reload()  # the run went on and replaced what was being read
        raise UserError(f"{self.folder}: every checkpoint was replaced while it was read", _REPLACED)

    def stored_params(self, like: Any, step: int | None = None) -> Any:
        """As `restore_params`, but each leaf is a `StoredLeaf`, and damage is noticed when a leaf is read."""
        step = self._asked(step)[-1]
        try:
            record = self._record(step, {"params": like})
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise self._unreadable(step, error) from error
        limit = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
        unreadable = functools.partial(self._unreadable, step)
        shelf = _Shelf(self._plain / str(step), record["checksums"], limit, unreadable)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: StoredLeaf(tuple(key.key for key in path), leaf.shape, np.dtype(leaf.dtype), shelf), like
        )

    def wait(self) -> None:
        """Block until the last save is on disk."""
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        """Finish writing and release the threads."""
        self.wait()
        self._manager.close()
        self._silence.end()

    def _items(self, state: TrainState) -> dict[str, Any]:
        rest = {name: value for name, value in state._asdict().items() if name != "params"}
        items = {"params": state.params, "optimizer": rest}
        if self._several:
            others = {name: tree for name, tree in state.params.items() if name != MODEL}
            items |= {"params": state.params[MODEL], "trained": others}
        return items

    def _state(self, items: dict[str, Any]) -> TrainState:
        """The inverse of `_items`."""
        params = {MODEL: items["params"], **items["trained"]} if self._several else items["params"]
        return TrainState(params=params, **items["optimizer"])

    def _plain_path(self) -> Path:
        """The folder by a path without brackets, for Orbax looks for its files by patterns, and without a backslash,
        which tensorstore takes for a slash."""
        if not glob.has_magic(str(self.folder)) and "\\" not in str(self.folder):
            return self.folder
        if not self._read_only:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        links = tempfile.mkdtemp(prefix="jaxlm-")
        weakref.finalize(self, shutil.rmtree, links, ignore_errors=True)
        (Path(links) / "run").symlink_to(self.folder.parent, target_is_directory=True)
        return Path(links) / "run" / "checkpoints"

    def _replaced(self, step: int) -> bool:
        """Whether `step`, which could not be read, is gone, or is being deleted because a newer one has come."""
        there = {int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()}
        return self._read_only and (step not in there or max(there) > max(self.steps()))

    def _unreadable(self, step: int, error: Exception) -> UserError:
        where = self.folder / str(step)
        if self._replaced(step):
            return UserError(f"{where} was replaced while it was read", _REPLACED)
        return DamagedCheckpointError(f"{where} is damaged: {_first_line(error)}", _OTHER_STEP)

    def _save(self, step: int, items: dict[str, Any], run: dict[str, Any], metrics: dict[str, float] | None) -> None:
        if step in self._manager.all_steps():
            self.wait()
            self._manager.delete(step)
        shapes = {name: list(np.shape(leaf)) for name, leaf in _leaves(items).items()}
        run = {**run, "format": FORMAT, "shapes": shapes, "checksums": checksums(items)}
        run["sha256"] = _digest(run)
        saves: dict[str, Any] = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        try:
            self._manager.save(step, args=ocp.args.Composite(**saves, run=ocp.args.JsonSave(run)), metrics=metrics)
        except OSError as error:
            raise self._not_written(error) from error

    def _first_intact(
        self, steps: Iterable[int], like: dict[str, Any], warn: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The first of `steps` that all processes can read. Raises: UserError, when all have voted; none waits."""
        abstract, cause = jax.tree.map(_abstract, like), None
        for step in steps:
            found = refused = None
            try:
                found = self._read(step, abstract)
            except UserError as error:
                refused = error
            except Exception as error:  # Orbax raises plain ones for what it cannot read
                if not self._replaced(step):
                    warn(f"{self.folder / str(step)} is damaged: {_first_line(error)}")
                cause = error
            if everywhere(found is not None) and found:
                return found
            if refused:
                raise refused
        hint = "name another run" if self._read_only else "start again with another out_dir"
        raise DamagedCheckpointError(f"{self.folder}: no intact checkpoint", hint) from cause

    def _asked(self, step: int | None) -> list[int]:
        """The steps among which the user's is, oldest first."""
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            have = f"there are {', '.join(map(str, steps))}" if steps else "train first, or name a run directory"
            raise UserError(f"{self.folder}: no checkpoint" + (f" of step {step}" if steps else ""), have)
        return steps if step is None else [step]

    def _record(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The `run` record of a checkpoint that holds trees of these shapes."""
        where = self.folder / str(step)
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        if run.pop("sha256") != _digest(run):
            raise ValueError("the checksum of its record differs")
        if run["format"] != FORMAT:
            raise UserError(f"{where}: checkpoint format {run['format']}, this version reads {FORMAT}")
        stored = {name: shape for name, shape in run["shapes"].items() if name.split(".")[0] in abstract}
        wanted = {name: list(leaf.shape) for name, leaf in _leaves(abstract).items()}
        for name in sorted(stored.keys() | wanted.keys(), key=lambda name: (name.startswith("optimizer"), name)):
            if stored.get(name) != wanted.get(name):
                have, want = stored.get(name, "absent"), wanted.get(name, "absent")
                raise UserError(f"{where}: {name} is {have}, the config asks for {want}", _OTHER)
        return run

    def _read(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        run = self._record(step, abstract)
        restores: dict[str, Any] = {
            name: ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            for name, tree in abstract.items()
        }
        items = dict(self._manager.restore(step, args=ocp.args.Composite(**restores)).items())
        for name, found in checksums(items).items():
            if run["checksums"][name] != found:
                raise ValueError(f"the checksum of {name} differs")
        return items, run

    def _others(self, step: int) -> str:
        others = [str(other) for other in self.steps() if other != step]
        return f"name another with --step: {', '.join(others)}" if others else "there is no other"

    def _set_aside(self, damaged: Iterable[int]) -> None:
        """Move steps to `damaged/`: Orbax saves nothing older than the newest step it sees."""
        aside = self.folder.with_name("damaged")
        if jax.process_index() == 0:
            for step in damaged:
                aside.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(tempfile.mkdtemp(prefix=f"{step}-", dir=aside))
        everywhere(True)  # nobody looks before it is done
        self._manager.reload()

    def _not_written(self, error: OSError) -> UserError:
        return UserError(f"{self.folder}: checkpoint not written: {error.strerror or error}", "earlier ones are intact")


class _Shelf:
    """Leaves of a checkpoint that were read last; together no more bytes than the largest one."""

    def __init__(self, step: Path, checksums: Mapping[str, int], limit: int, unreadable: _Unreadable) -> None:
        self._step, self._checksums, self._limit, self._unreadable = step, checksums, limit, unreadable
        self._leaves: dict[tuple[str, ...], np.ndarray] = {}
        self._lock = threading.Lock()

    def get(self, leaf: StoredLeaf) -> np.ndarray:
        """The values of a leaf, compared with the checksum that was taken when they were saved."""
        with self._lock:
            found = self._leaves.pop(leaf.path, None)
            size = math.prod(leaf.shape) * leaf.dtype.itemsize
            while found is None and sum(kept.nbytes for kept in self._leaves.values()) + size > self._limit:
                del self._leaves[next(iter(self._leaves))]
            self._leaves[leaf.path] = self._read(leaf) if found is None else found
            return self._leaves[leaf.path]

    def _read(self, leaf: StoredLeaf) -> np.ndarray:
        restored = ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        how = functools.reduce(lambda inner, key: {key: inner}, reversed(leaf.path), restored)
        args = ocp.args.PyTreeRestore(item=jax.tree.map(lambda _: 0, how), restore_args=how, partial_restore=True)
        name = ".".join(("params", *leaf.path))
        try:
            alone: Any = {"multiprocessing_options": _alone()}
            with OrbaxSilence(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**alone), **alone) as checkpointer:
                values = jax.tree.leaves(checkpointer.restore(self._step / "params", args=args))[0]
            if _host_word_sum(values) != self._checksums[name]:
                raise ValueError(f"the checksum of {name} differs")
        except Exception as error:  # Orbax raises plain ones for what it cannot read
            raise self._unreadable(error) from error
        return values


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A leaf of a checkpoint; `np.asarray` reads it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    shelf: _Shelf

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.shelf.get(self)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Options of a reader that waits for no other process: one that finds damage leaves Orbax before the others do."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def _host_word_sum(x: np.ndarray) -> int:
    """As `checksums`."""
    words = np.ascontiguousarray(x).reshape(-1).view(f"u{min(x.dtype.itemsize, 4)}")
    return int(words.sum(dtype=np.uint64)) % 2**32


def checksums(tree: Any) -> dict[str, int]:
    """For each leaf the sum of its 32-bit words modulo 2^32: one pass on the device, the same on any mesh.

    One leaf after the other: the words are a copy of it, and on CPUs two programs under way may wait for each other.
    """
    return {name: int(_word_sum(leaf)) for name, leaf in _leaves(tree).items()}


@jax.jit
def _word_sum(x: jax.Array) -> jax.Array:
    words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)  # a 64-bit value is two words
    return jnp.sum(jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32), dtype=jnp.uint32)


def under_way_gb(shapes: Any) -> int:
    """How much of such a state a process may have under way between disk and device at a time.

    Orbax refuses what is larger than its limit, which can be a whole leaf: it may have been saved by one device.
    """
    largest = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return max(2, math.ceil(largest / 1e9) + 1)


def _quality(metrics: dict[str, float]) -> float:
    return -metrics["validation_loss"]


def _digest(run: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def _leaves(tree: Any) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]

"""The JAX engine of the training loop: decoder, optimiser, mesh and checkpoints behind one jitted step."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxlm import config
from jaxlm.counts.flops import flops_per_token
from jaxlm.counts.kernels import kernels_of
from jaxlm.counts.parameters import matmul_params
from jaxlm.errors import UserError
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, Params, init_params
from jaxlm.processes import meet
from jaxlm.processes.compile_cache import RUN_ONCE, enable_compilation_cache
from jaxlm.processes.compiled_together import CompiledTogether, connect
from jaxlm.processes.hang_watch import Watch
from jaxlm.run.metrics import PEAK_FLOPS, memory_of_process, plain
from jaxlm.run.peak import peak_flops
from jaxlm.train.adapters import base_collections, moved_params
from jaxlm.train.program import RowProgram, row_program, training_program
from jaxlm.train.recipe import MODEL, Recipe, RowFunction, base_name
from jaxlm.train.step import TrainState, make_eval

RUN_AHEAD = 2  # steps that may wait on the device
Complete = Callable[[Decoder, Params, Sequence[str], config.Sample, Callable[[], None]], list[str]]


class JaxEngine:
    """Trains the models of a recipe on the mesh of the config. See `backend.Engine`; `complete` continues texts."""

    def __init__(self, cfg: config.Config, recipe: Recipe, complete: Complete) -> None:
        enable_compilation_cache(cfg.data.cache_dir)
        self.config, self.layout, self._complete = cfg, Layout.from_config(cfg.mesh), complete
        self.process_index, self.process_count = jax.process_index(), jax.process_count()
        self._watch = None
        if self.process_count > 1 and cfg.distributed.hang_seconds:
            self._watch = Watch(cfg.distributed.hang_seconds, self.process_index, self.process_count, meet.client())
        connect(self.layout.mesh)
        self.rows: np.ndarray | None = self.layout.rows(cfg.train.batch_size)
        self.kernels = kernels_of(cfg, self.layout.platform)
        self.program = program = training_program(cfg, self.layout, recipe)
        self.decoder, self._step = program.decoder, CompiledTogether(program.step, "the training step")
        self._frozen: dict[str, Any] = {}
        self._row_programs: dict[Any, tuple[RowProgram, CompiledTogether]] = {}
        self._adapters = recipe.models.trained[MODEL].adapters
        self._bases = {base_name(name): name for name, tree in recipe.models.trained.items() if tree.adapters}
        self._whole = jax.jit(program.whole)
        self._init = jax.jit(
            program.init,
            out_shardings=program.shardings,
            compiler_options=RUN_ONCE if self.layout.platform == "cpu" else None,
        )
        self._state: TrainState | None = None
        evaluate = make_eval(program.loss_fn, layout=self.layout, matmul=cfg.numerics.matmul)
        self._eval = CompiledTogether(jax.jit(evaluate, out_shardings=self.layout.replicated), "the validation")
        self._under_way: collections.deque[Any] = collections.deque()
        self._checkpointer: Any = None
        self._steps, self._profiling = 0, False

        multiplied = matmul_params(self.decoder)
        moved = moved_params(self.decoder, self._adapters) if self._adapters else ()
        self.flops_per_token: float = flops_per_token(cfg.model, multiplied, cfg.data.seq_len, *moved)
        self._peak_flops = 0.0

    @property
    def state(self) -> TrainState:
        """Made when first needed: a run that resumes never holds two."""
        state: TrainState = self._init(jax.random.key(self.config.seed)) if self._state is None else self._state
        self._state = state
        return state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state

    def peak_flops(self, reached: float) -> float:
        """Of all devices together: the vendor's figure where it is known, else products timed here."""
        count = jax.device_count()
        if known := PEAK_FLOPS.get(jax.devices()[0].device_kind):
            return known * count
        # The virtual devices of a CPU share what is timed; one accelerator is timed for all.
        parts = 1 if self.layout.platform == "cpu" else count
        if self._peak_flops * parts < max(reached, 1.0):
            self._peak_flops = measured_flops(self.config.data.cache_dir, reached / parts)
        return self._peak_flops * parts

    @property
    def checkpointer(self) -> Any:
        """Made when first needed: importing Orbax takes a second."""
        if self._checkpointer is None:
            from jaxlm.train.checkpoint import Checkpointer, under_way_gb

            keep, limit = self.config.checkpoint.keep, under_way_gb(self._shapes())
            several = self.program.recipe.models.several
            self._checkpointer = Checkpointer(self.config.out_dir, keep, under_way_gb=limit, several=several)
        return self._checkpointer

    def checkpoints(self) -> list[int]:
        folder = Path(self.config.out_dir) / "checkpoints"
        if any(folder.glob("*/manifest.json")):
            hint = "generate, eval, parity and convert read it; train another out_dir"
            raise UserError(f"{folder}: parameters from a conversion, without an optimizer to resume", hint)
        if any(folder.glob("*/model.safetensors")):
            carry = f"`jaxlm convert {self.config.out_dir} DST --to jaxlm --backend jax` carries it over"
            hint = f"{carry}, or resume with --backend torch"
            raise UserError(f"{self.config.out_dir}: a run of the PyTorch backend", hint)
        return self.checkpointer.steps() if folder.is_dir() else []

    def restore(self, warn: Callable[[str], None]) -> dict[str, Any]:
        self.state, run = self.checkpointer.restore(self._shapes(), warn)
        return run

    def _shapes(self) -> TrainState:
        return jax.eval_shape(self._init, jax.random.key(self.config.seed))

    def adopt(self, params: Params, name: str = MODEL) -> None:
        """Let a trained tree begin with these parameters, numpy arrays that every process has."""
        several = self.program.recipe.models.several
        now = self.state.params[name] if several else self.state.params
        laid = jax.tree.map(lambda leaf, like: _lay(leaf, like.sharding), params, now)
        self.state = self.state._replace(params={**self.state.params, name: laid} if several else laid)

    @property
    def params(self) -> Params:
        """The parameters of the model of the run, as they are now; adapters are added to their base."""
        if self._adapters is None:
            return self.program.whole(self.state.params, {})
        return self._whole(self.state.params, self.frozen)

    def tree(self, name: str) -> Any:
        """A trained tree as it is now, as objectives take it: parameters, or `Adapted`."""
        return self.program.tree(name, self.state.params, self.frozen)

    def freeze(self, name: str, params: Params) -> None:
        """Give the frozen tree `name` its parameters, numpy arrays that every process has."""
        if name in self._bases:
            options = self.program.recipe.models.trained[self._bases[name]].adapters
            assert options is not None
            params = base_collections(self.program.modules[self._bases[name]], options, params)
        self._frozen[name] = _lay_tree(params, self.program.frozen_shapes[name], self.program.frozen_shardings[name])

    @property
    def frozen(self) -> dict[str, Any]:
        """The frozen trees by name; those that nobody gave are drawn from the seed of the run.

        Raises:
            UserError: the base of adapters was not given.
        """
        for name in self._bases.keys() - self._frozen.keys():
            raise UserError("adapters need the parameters of their base", f"freeze({name!r}, params)")
        for number, (name, places) in enumerate(self.program.frozen_shardings.items(), 1000):
            if name not in self._frozen:
                key = jax.random.fold_in(jax.random.key(self.config.seed), number)
                draw = jax.jit(functools.partial(init_params, self.program.modules[name]), out_shardings=places)
                self._frozen[name] = draw(key)
        return self._frozen

    def step(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        self._mark("in a step")
        with jax.profiler.StepTraceAnnotation("train", step_num=self._steps):
            self.state, metrics = self._step(self.state, self.frozen, self._place(batch))
        self._steps += 1
        self._under_way.append(metrics)
        if len(self._under_way) > RUN_AHEAD:
            jax.block_until_ready(self._under_way.popleft())
        self._mark("between two steps")
        return metrics

    def _mark(self, what: str) -> None:
        if self._watch:
            self._watch.mark(what)

    def _place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        axes = {name: column.axes for name, column in self.program.recipe.columns.items()}
        return self.layout.place(batch, self.config.train.batch_size, axes)

    def fetch(self, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [plain(one) for one in jax.device_get(list(metrics))]

    def evaluate(self, batches: Iterator[Mapping[str, np.ndarray]]) -> dict[str, float]:
        totals: dict[str, float] = collections.defaultdict(float)
        for batch in batches:
            self._mark("in a validation")
            for name, value in jax.device_get(self._eval(self.state.params, self.frozen, self._place(batch))).items():
                totals[name] += float(value)
        self._mark("between two steps")
        return dict(totals)

    def map_rows(
        self,
        function: RowFunction,
        batches: Iterator[Mapping[str, np.ndarray]],
        frozen: Mapping[str, Params] | None = None,
    ) -> Iterator[np.ndarray]:
        if function.jax not in self._row_programs:
            made = row_program(self.config, self.layout, self.program, function)
            self._row_programs[function.jax] = made, CompiledTogether(made.compute, "the numbers of rows")
        program, compute = self._row_programs[function.jax]
        if frozen is None:
            trees = self.state.params, self.frozen
        else:
            beside = {n: _lay_tree(tree, program.shapes[n], program.shardings[n]) for n, tree in frozen.items()}
            trees = program.untrained, {**self._frozen, **beside}
        for batch in batches:
            self._mark("in a forward pass over the data")
            yield np.asarray(compute(*trees, self._place(batch)))
        self._mark("between two steps")

    def complete(self, prompts: Sequence[str], sample: config.Sample, check: Callable[[], None]) -> list[str]:
        self._mark("in a sample")
        texts = self._complete(self.decoder, self.params, prompts, sample, check)
        self._mark("between two steps")
        return texts

    def save(self, run: dict[str, Any], validation_loss: float | None) -> None:
        self._mark("in a save")
        self.checkpointer.save(self.state, run, validation_loss)
        self._mark("between two steps")

    def stops_at(self, point: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(point)

    def part(self) -> None:
        jax.distributed.shutdown()

    def of_first(self, value: bool) -> bool:
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))

    def gather(self, value: float) -> list[float]:
        if self.process_count == 1:
            return [value]
        return multihost_utils.process_allgather(np.asarray(value, np.float32)).tolist()

    def memory(self) -> dict[str, int]:
        used = jax.local_devices()[0].memory_stats()
        if not used:
            return memory_of_process()
        return {"memory_bytes": used["bytes_in_use"], "memory_peak_bytes": used["peak_bytes_in_use"]}

    def profile(self, folder: Path | None) -> None:
        if self.process_index == 0 and self._profiling != (folder is not None):
            jax.block_until_ready(self.state)
            jax.profiler.start_trace(folder) if folder else jax.profiler.stop_trace()
            self._profiling = folder is not None

    def close(self) -> None:
        self.profile(None)
        if self._checkpointer is not None:
            self._mark("waiting for the last save")
            self._checkpointer.close()
        if self._watch:
            self._watch.close()


def _lay_tree(params: Params, shapes: Params, places: Params) -> Params:
    """Numpy arrays, in the dtypes of `shapes`, on their devices."""
    return jax.tree.map(lambda x, like, place: _lay(np.asarray(x, like.dtype), place), params, shapes, places)


def _lay(leaf: np.ndarray, place: Any) -> jax.Array:
    return jax.make_array_from_callback(leaf.shape, place, lambda index: leaf[index])


def measured_flops(folder: str | Path, reached: float) -> float:
    """FLOP/s of the default device, a peak for where none is published; see `jaxlm.run.peak`."""
    device = jax.devices()[0]

    def multiply(a: np.ndarray, b: np.ndarray) -> Callable[[], Any]:
        product, (x, y) = jax.jit(jnp.dot), jax.device_put((a, b))
        return lambda: product(x, y).block_until_ready()

    name = "" if device.platform == "cpu" else device.device_kind
    return peak_flops(folder, name, f"jax {jax.__version__}", multiply, reached)

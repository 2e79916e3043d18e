"""The JAX engine of the training loop: decoder, optimiser, mesh and checkpoints behind one jitted step."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.compilation import RUN_ONCE, enable_compilation_cache
from jaxlm.errors import UserError
from jaxlm.flops import flops_per_token
from jaxlm.mesh import Layout
from jaxlm.models.accounting import matmul_params
from jaxlm.models.decoder import Decoder, Params, init_params
from jaxlm.train.metrics import PEAK_FLOPS, plain
from jaxlm.train.program import MakeLoss, training_program
from jaxlm.train.program import state_shardings as state_shardings
from jaxlm.train.step import init_state, make_eval

RUN_AHEAD = 2  # steps that may wait on the device
Complete = Callable[[Decoder, Params, Sequence[str], config.Sample], list[str]]


class JaxEngine:
    """Trains a `Decoder` on the mesh of the config. See `loop.Engine`.

    The recipe brings `make_loss`, the objective, and `complete`, which continues texts.
    """

    def __init__(self, cfg: config.Config, make_loss: MakeLoss, complete: Complete) -> None:
        enable_compilation_cache(cfg.data.cache_dir)
        # On a CPU a step that is begun before the last one has freed its temporary buffers takes as much again.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        self.config, self.layout, self._complete = cfg, Layout.from_config(cfg.mesh), complete
        self.process_index, self.process_count = jax.process_index(), jax.process_count()
        program = training_program(cfg, self.layout, make_loss)
        self.decoder, self._step = program.decoder, program.step
        start = jax.jit(
            lambda key: init_state(init_params(self.decoder, key), program.optimizer),
            out_shardings=program.shardings,
            compiler_options=RUN_ONCE if self.layout.platform == "cpu" else None,
        )
        self.state = start(jax.random.key(cfg.seed))
        evaluate = make_eval(program.loss_fn, layout=self.layout, matmul=cfg.numerics.matmul)
        self._eval = jax.jit(evaluate, out_shardings=self.layout.replicated)
        self._under_way: collections.deque[Any] = collections.deque()
        self._checkpointer: Any = None

        multiplied = matmul_params(self.decoder)
        self.flops_per_token: float = flops_per_token(cfg.model, multiplied, cfg.data.seq_len)
        self._peak_flops: float | None = None

    @property
    def peak_flops(self) -> float:
        """Of all devices together: the vendor's figure where it is known, else a matrix product timed here."""
        if self._peak_flops is None:
            known = PEAK_FLOPS.get(jax.devices()[0].device_kind)
            self._peak_flops = known * jax.device_count() if known else measured_flops()
        return self._peak_flops

    @property
    def checkpointer(self) -> Any:
        """Made when first needed: importing Orbax takes a second."""
        if self._checkpointer is None:
            from jaxlm.train.checkpoint import Checkpointer

            self._checkpointer = Checkpointer(self.config.out_dir, self.config.checkpoint.keep)
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
        self.state, run = self.checkpointer.restore(self.state, warn)
        return run

    def step(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        self.state, metrics = self._step(self.state, self.layout.place(batch))
        self._under_way.append(metrics)
        if len(self._under_way) > RUN_AHEAD:
            jax.block_until_ready(self._under_way.popleft())
        return metrics

    def fetch(self, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [plain(one) for one in jax.device_get(list(metrics))]

    def evaluate(self, batches: Iterator[Mapping[str, np.ndarray]]) -> dict[str, float]:
        totals: dict[str, float] = collections.defaultdict(float)
        for batch in batches:
            for name, value in jax.device_get(self._eval(self.state.params, self.layout.place(batch))).items():
                totals[name] += float(value)
        return dict(totals)

    def complete(self, prompts: Sequence[str], sample: config.Sample) -> list[str]:
        return self._complete(self.decoder, self.state.params, prompts, sample)

    def save(self, run: dict[str, Any], validation_loss: float | None) -> None:
        self.checkpointer.save(self.state, run, validation_loss)

    def close(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close()


def measured_flops(size: int = 1536, tries: int = 3) -> float:
    """FLOP/s of the best of a few float32 matrix products on the default device: a peak for where none is published."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)

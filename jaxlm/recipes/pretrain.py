"""Pretraining: next-token cross-entropy on packed documents.

jaxlm train configs/quickstart.toml
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.processes import meet as distributed
from jaxlm.processes.freed_memory import keep_freed_memory
from jaxlm.run.directory import open_run, shared_facts
from jaxlm.text.sampling import Sampling
from jaxlm.train.backend import Engine
from jaxlm.train.loop import Progress, train

if TYPE_CHECKING:
    from jaxlm.models.decoder import Decoder
    from jaxlm.train.step import LossFn


def run(cfg: config.Config, *, resume: bool = False, backend: config.Backend = "jax") -> Progress:
    """Train the model of `cfg` and leave a run directory.

    Raises:
        UserError: the config, the data or the run directory is not usable.
    """
    keep_freed_memory()
    cfg, first = meet(cfg, backend)
    warm = threading.Thread(target=_import_ahead, args=(backend,))  # no daemon: ending within an import aborts
    warm.start()
    cfg, corpus = open_run(cfg, resume=resume, tell=print if first else lambda _: None)
    warm.join()
    if backend == "torch":
        from torch_ref.train.engine import TorchEngine

        torch_engine = TorchEngine(cfg)
        if starts_from_another(cfg, torch_engine, resume):
            from jaxlm.convert.native import to_torch
            from jaxlm.recipes.init_from import initial_params

            torch_engine.adopt(dict(to_torch(initial_params(cfg, corpus.tokenizer), cfg.model)))
        return train(cfg, corpus, torch_engine, resume=resume)
    import jax

    from jaxlm.train.engine import JaxEngine

    distributed.agree(shared_facts(cfg, corpus, resume))

    def complete(
        decoder: Decoder, params: Any, prompts: Sequence[str], sample: config.Sample, check: Callable[[], None]
    ) -> list[str]:
        from jaxlm.infer.text import Generator

        sampling, length = Sampling(temperature=sample.temperature), sample.max_new_tokens
        generator = Generator(decoder, params, corpus.tokenizer)
        options: Any = {"max_new_tokens": length, "seed": cfg.seed, "stream": lambda *_: check()}
        return [one.text for one in generator.complete(prompts, sampling, **options)]

    wide = "float64" in (cfg.numerics.params, cfg.numerics.compute) or bool(jax.config.read("jax_enable_x64"))
    with jax.enable_x64(wide):
        engine = JaxEngine(cfg, loss_fn, complete)
        if starts_from_another(cfg, engine, resume):
            from jaxlm.recipes.init_from import initial_params

            engine.adopt(initial_params(cfg, corpus.tokenizer))
        return train(cfg, corpus, engine, resume=resume)


def starts_from_another(cfg: config.Config, engine: Engine, resume: bool) -> bool:
    """Whether the parameters are those of `train.init_from`: a run with a checkpoint has its own."""
    return bool(cfg.train.init_from) and not (resume and engine.checkpoints())


def meet(cfg: config.Config, backend: config.Backend) -> tuple[config.Config, bool]:
    """Join the other processes of the run, if there are any.

    Returns:
        The config without what is this process's own, and whether this is the first of them.

    Raises:
        UserError: see `distributed.initialize`; or PyTorch, which trains in one process, is to compute.
    """
    if backend == "torch":
        if distributed.find_place(cfg.distributed, os.environ):
            raise UserError("--backend torch trains in one process", "launch one, or use --backend jax")
        return cfg, True
    place = distributed.initialize(cfg.distributed)
    anyone = dataclasses.replace(cfg.distributed, coordinator="", processes=0, process_id=-1)
    return dataclasses.replace(cfg, distributed=anyone), place is None or place.process_id == 0


def _import_ahead(backend: config.Backend) -> None:
    """Load the framework while the corpus is opened."""
    importlib.import_module("jaxlm.train.engine" if backend == "jax" else "torch")


def loss_fn(decoder: Decoder, train: config.Train) -> LossFn:
    """The language-model objective of `decoder`, for `train.step`."""
    from jaxlm.mesh import over_rows
    from jaxlm.objectives.lm import lm_loss
    from jaxlm.train.expert_balance import collect

    options: Any = {"z_loss": train.z_loss, "label_smoothing": train.label_smoothing, "block": train.loss_block}

    def compute(params: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        variables = {"params": params}
        applied: Any = decoder.apply(
            variables,
            batch["tokens"],
            batch["positions"],
            batch["segments"],
            method="hidden",
            rngs={} if key is None or not decoder.config.random else {"dropout": key},
            mutable=["routing"],
        )
        (hidden_BTD, _), told = applied
        unembedding: Any = decoder.apply(variables, method="unembedding")
        kernel_DV, bias_V = unembedding
        terms = over_rows(
            lambda head, rows: lm_loss(rows[0], *head, *rows[1:], **options),
            (kernel_DV, bias_V),
            (hidden_BTD, batch["targets"], batch["weights"]),
        )
        sums = {"loss": terms.loss, "nll": terms.nll, "accuracy": terms.correct, "weight": terms.weight}
        if decoder.config.moes:
            routed = collect(told["routing"], decoder.config)
            sums |= {name: term * terms.weight for name, term in routed.means.items()} | routed.counts
            sums["loss"] = terms.loss + routed.loss * terms.weight
        return sums["loss"], sums

    return compute

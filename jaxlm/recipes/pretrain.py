"""Pretraining: next-token cross-entropy on packed documents.

jaxlm train configs/quickstart.toml
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxlm import config
from jaxlm.data.completion import Sampling
from jaxlm.train.loop import Progress, train
from jaxlm.train.malloc import keep_freed_memory
from jaxlm.train.run import open_run

if TYPE_CHECKING:
    from jaxlm.models.decoder import Decoder
    from jaxlm.train.step import LossFn


def run(cfg: config.Config, *, resume: bool = False, backend: config.Backend = "jax") -> Progress:
    """Train the model of `cfg` and leave a run directory.

    Raises:
        UserError: the config, the data or the run directory is not usable.
    """
    keep_freed_memory()
    warm = threading.Thread(target=_import_ahead, args=(backend,))  # no daemon: ending within an import aborts
    warm.start()
    cfg, corpus = open_run(cfg, resume=resume)
    warm.join()
    if backend == "torch":
        from torch_ref.train import TorchEngine

        return train(cfg, corpus, TorchEngine(cfg), resume=resume)
    import jax

    from jaxlm.train.engine import JaxEngine

    def complete(decoder: Decoder, params: Any, prompts: Sequence[str], sample: config.Sample) -> list[str]:
        from jaxlm.infer.text import Generator

        sampling, length = Sampling(temperature=sample.temperature), sample.max_new_tokens
        generator = Generator(decoder, params, corpus.tokenizer)
        return [one.text for one in generator.complete(prompts, sampling, max_new_tokens=length, seed=cfg.seed)]

    wide = "float64" in (cfg.numerics.params, cfg.numerics.compute) or bool(jax.config.read("jax_enable_x64"))
    with jax.enable_x64(wide):
        return train(cfg, corpus, JaxEngine(cfg, loss_fn, complete), resume=resume)


def _import_ahead(backend: config.Backend) -> None:
    """Load the framework while the corpus is opened."""
    importlib.import_module("jaxlm.train.engine" if backend == "jax" else "torch")


def loss_fn(decoder: Decoder, train: config.Train) -> LossFn:
    """The language-model objective of `decoder`, for `train.step`."""
    from jaxlm.mesh import split_layout
    from jaxlm.objectives.lm import lm_loss
    from jaxlm.train.balance import collect

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
        layout = split_layout()
        shares = layout.parts("batch") * layout.parts("seq") if layout else 1
        terms = lm_loss(
            hidden_BTD,
            kernel_DV,
            bias_V,
            batch["targets"],
            batch["weights"],
            z_loss=train.z_loss,
            label_smoothing=train.label_smoothing,
            block=train.loss_block * shares,
        )
        sums = {"loss": terms.loss, "nll": terms.nll, "accuracy": terms.correct, "weight": terms.weight}
        if decoder.config.moes:
            routed = collect(told["routing"], decoder.config)
            sums |= {name: term * terms.weight for name, term in routed.means.items()} | routed.counts
            sums["loss"] = terms.loss + routed.loss * terms.weight
        return sums["loss"], sums

    return compute

"""Learning from pairs of answers without a reward model: the mirror of `jaxlm.recipes.dpo`.

Shapes: B rows, T tokens, M segments, P = M / 2 pairs of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from jaxlm import config
from jaxlm.data.preferences.rows import DIVERGENCE, REFERENCE_LOGPS
from torch_ref.models.attach_lora import base_of
from torch_ref.models.decoder import Decoder
from torch_ref.objectives.kto import KTODivergence, kto_divergence, labelled_sums, of_labelled
from torch_ref.objectives.logprobs import segment_sums, token_logps
from torch_ref.objectives.preference import pair_sums, preference_loss
from torch_ref.recipes.forward import with_routing
from torch_ref.train.expert_balance import collect
from torch_ref.train.step import Batch, LossFn, Sums


def objective(modules: Mapping[str, Any], cfg: config.Config) -> LossFn:
    """`batch -> (sum, sums)` of the decoder `model`, beside the frozen one `reference` where the loss has one."""
    decoder, options, reference = modules["model"], cfg.preference, _reference_of(modules, cfg)

    def compute(batch: Batch) -> tuple[Tensor, Sums]:
        training = decoder.training
        decoder.train(training and options.dropout)
        logps_BM, counts_BM = answer_sums(decoder, batch, cfg)
        decoder.train(training)
        routed = collect(decoder) if decoder.config.moes else None
        reference_BM: Any = None
        if options.needs_reference:
            reference_BM = reference(batch)
        if options.loss == "kto":
            whole = [KTODivergence(*(batch[name] for name in DIVERGENCE))] if DIVERGENCE[0] in batch else []
            answers = logps_BM, counts_BM, reference_BM, batch["labels"]
            found = labelled_sums(*answers, *whole, judged=not training, **options.loss_options)
        else:
            found = pair_sums(preference_loss(logps_BM, counts_BM, reference_BM, **options.loss_options))
        found = with_routing(found, routed)
        return found["loss"], found

    return compute


def whole_divergence(modules: Mapping[str, Any], cfg: config.Config) -> Callable[[Batch], Sums]:
    """`batch -> sums` of KTO's divergence, for batches that are cut into microbatches."""
    reference = _reference_of(modules, cfg)

    def compute(batch: Batch) -> Sums:
        decoder = modules["model"]
        training = decoder.training
        logps_BM, counts_BM = answer_sums(decoder.eval(), batch, cfg)
        decoder.train(training)
        reference_BM = reference(batch)
        sums = kto_divergence(logps_BM, of_labelled(counts_BM, batch["labels"]), reference_BM)
        return dict(zip(DIVERGENCE, sums, strict=True))

    return compute


def _reference_of(modules: Mapping[str, Any], cfg: config.Config) -> Callable[[Batch], Tensor]:
    """`batch -> [B, M]`: what the reference thinks of the answers, computed now or before training."""
    if cfg.preference.cached_reference:
        return lambda batch: batch[REFERENCE_LOGPS]
    return reference_logps(modules, cfg)


def reference_logps(modules: Mapping[str, Any], cfg: config.Config) -> Callable[[Batch], Tensor]:
    """`batch -> [B, M]`: log-probabilities of the answers under a frozen module, or under the policy without its
    adapters."""

    @torch.no_grad()
    def compute(batch: Batch) -> Tensor:
        if "reference" in modules:
            return answer_sums(modules["reference"].eval(), batch, cfg)[0]
        decoder = modules["model"]
        training = decoder.training
        with base_of(decoder.eval()):
            found = answer_sums(decoder, batch, cfg)[0]
        decoder.train(training)
        return found

    return compute


def answer_sums(decoder: Decoder, batch: Batch, cfg: config.Config) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the answers and their lengths, [B, M] each."""
    hidden_BTD, _ = decoder.hidden(batch["tokens"], batch["positions"], batch["segments"])
    logps_BT = token_logps(hidden_BTD, *decoder.unembedding(), batch["targets"], block=cfg.train.loss_block).logps
    where = batch["weights"].to(logps_BT.dtype), batch["segments"], 2 * batch["labels"].shape[1]
    return segment_sums(logps_BT, *where), segment_sums(torch.ones_like(logps_BT), *where)

"""Learning from pairs of answers without a reward model: the mirror of `jaxlm.recipes.dpo`.

Shapes: B rows, T tokens, M segments, P = M / 2 pairs of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from jaxlm import config
from jaxlm.data.preferences.rows import REFERENCE_LOGPS
from torch_ref.models.attach_lora import base_of
from torch_ref.models.decoder import Decoder
from torch_ref.objectives.kto import KTODivergence, kto_divergence, kto_loss
from torch_ref.objectives.logprobs import segment_sums, token_logps
from torch_ref.objectives.preference import preference_loss
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
            found = labelled_sums(logps_BM, counts_BM, reference_BM, batch, options, judged=not training)
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
        sums = kto_divergence(logps_BM, of_labelled(counts_BM, batch), reference_BM)
        return {f"divergence_{name}": value for name, value in sums._asdict().items()}

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


def pair_sums(terms: Any) -> Sums:
    """The sums over pairs by their names in `metrics.jsonl`."""
    found = dict(terms._asdict())
    return found | {"accuracy": found.pop("correct"), "margin": terms.chosen_reward - terms.rejected_reward}


def labelled_sums(
    logps_BM: Tensor,
    counts_BM: Tensor,
    reference_BM: Tensor,
    batch: Batch,
    options: config.Preference,
    *,
    judged: bool,
) -> Sums:
    """The sums over labelled answers; `accuracy` is how often one moved to its side of the divergence.

    Args:
        judged: report the order of pairs too, which have the label 0: they are held out, never trained on.
    """
    labels_BP, labelled_BM = batch["labels"], of_labelled(counts_BM, batch)
    if "divergence_total" in batch:
        z = KTODivergence(batch["divergence_total"], batch["divergence_weight"]).value
    else:
        z = kto_divergence(logps_BM, labelled_BM, reference_BM).value
    terms = kto_loss(logps_BM, reference_BM, labels_BP, z, **options.loss_options)
    moved_BP = (logps_BM - reference_BM)[:, 0::2].detach() - z
    accuracy = (labels_BP * moved_BP > 0).sum().to(logps_BM.dtype)
    found: Sums = {**terms._asdict(), "divergence": z * terms.weight, "accuracy": accuracy}
    if judged:
        pairs_BM = counts_BM - labelled_BM
        ordered = pair_sums(preference_loss(logps_BM, pairs_BM, reference_BM, kind="dpo", beta=options.beta))
        found |= {"pairs": ordered.pop("weight")} | {f"pair_{name}": x for name, x in ordered.items() if name != "loss"}
    return found


def of_labelled(counts_BM: Tensor, batch: Batch) -> Tensor:
    """The lengths of labelled answers and of their mismatched ones; 0 for those of pairs."""
    return counts_BM.masked_fill((batch["labels"] == 0).repeat_interleave(2, dim=1), 0)

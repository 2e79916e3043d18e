"""Pretraining: next-token cross-entropy on packed documents. The twin of `jaxlm.recipes.pretrain`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from jaxlm import config
from torch_ref.models.decoder import Decoder
from torch_ref.objectives.lm import lm_loss
from torch_ref.recipes.forward import with_routing
from torch_ref.train.expert_balance import collect
from torch_ref.train.step import Batch, LossFn, Sums


def objective(modules: Mapping[str, Decoder], cfg: config.Config) -> LossFn:
    """Cross-entropy of the model, for `train.step`."""
    return loss_fn(modules["model"], cfg.train)


def loss_fn(decoder: Decoder, train: config.Train) -> LossFn:
    """The language-model objective of `decoder`, with dropout where that is in training mode."""

    def compute(batch: Batch) -> tuple[Tensor, Sums]:
        hidden_BTD, _ = decoder.hidden(batch["tokens"], batch["positions"], batch["segments"])
        kernel_DV, bias_V = decoder.unembedding()
        terms = lm_loss(
            hidden_BTD,
            kernel_DV,
            bias_V,
            batch["targets"],
            batch["weights"],
            z_loss=train.z_loss,
            label_smoothing=train.label_smoothing,
            block=train.loss_block,
        )
        sums = {"loss": terms.loss, "nll": terms.nll, "accuracy": terms.correct, "weight": terms.weight}
        sums = with_routing(sums, collect(decoder) if decoder.config.moes else None)
        return sums["loss"], sums

    return compute

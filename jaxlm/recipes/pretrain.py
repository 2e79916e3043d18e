"""Pretraining: next-token cross-entropy on packed documents.

    jaxlm train configs/quickstart.toml
"""

from __future__ import annotations

from jaxtyping import Array

from jaxlm import config
from jaxlm.models.decoder import Decoder
from jaxlm.objectives.lm import lm_loss
from jaxlm.train.step import Batch, LossFn, Sums


def loss_fn(decoder: Decoder, train: config.Train) -> LossFn:
    """The language-model objective of `decoder`, for `train.step`."""

    def compute(params: dict, batch: Batch, key: Array | None) -> tuple[Array, Sums]:
        variables, dropout = {"params": params}, decoder.config.dropout and key is not None
        hidden_BTD, _ = decoder.apply(
            variables,
            batch["tokens"],
            batch["positions"],
            batch["segments"],
            method="hidden",
            rngs={"dropout": key} if dropout else {},
        )
        kernel_DV, bias_V = decoder.apply(variables, method="unembedding")
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
        return terms.loss, {"loss": terms.loss, "nll": terms.nll, "accuracy": terms.correct, "weight": terms.weight}

    return compute

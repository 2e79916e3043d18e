"""A reward model from pairs: the mirror of `jaxlm.recipes.reward`.

Shapes: B rows, T tokens, M segments, P = M / 2 pairs of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from jaxlm import config
from torch_ref.models.decoder import Decoder
from torch_ref.objectives.reward import reward_loss
from torch_ref.recipes.forward import with_routing
from torch_ref.train.expert_balance import collect
from torch_ref.train.step import Batch, LossFn, Sums


def document_scores(modules: Mapping[str, Decoder], cfg: config.Config) -> Callable[[Batch], Tensor]:
    """`batch -> [B, M]`: the score of each answer."""
    decoder = modules["model"]

    def compute(batch: Batch) -> Tensor:
        places, documents = (batch["tokens"], batch["positions"], batch["segments"]), 2 * batch["margins"].shape[1]
        return decoder.score_documents(*places, documents)[0][..., 0]

    return compute


def objective(modules: Mapping[str, Decoder], cfg: config.Config) -> LossFn:
    """`batch -> (sum, sums)`: the loss of Bradley and Terry's model on the pairs of each row."""
    decoder, options = modules["model"], cfg.reward.loss_options

    def compute(batch: Batch) -> tuple[Tensor, Sums]:
        places, documents = (batch["tokens"], batch["positions"], batch["segments"]), 2 * batch["margins"].shape[1]
        scores_BM1, present_BM = decoder.score_documents(*places, documents)
        scores_BM = scores_BM1[..., 0]
        terms = reward_loss(scores_BM, present_BM, batch["margins"].to(scores_BM.dtype), batch["ties"], **options)
        found = dict(terms._asdict())
        segment_M = torch.arange(1, documents + 1, device=scores_BM.device)
        lengths_BM = (batch["segments"][..., None] == segment_M).sum(1)
        longer_BP = 0.5 * (1 + torch.sign(lengths_BM[:, 0::2] - lengths_BM[:, 1::2]))
        found["longer"] = (longer_BP * (present_BM[:, 0::2] & present_BM[:, 1::2])).sum().to(scores_BM.dtype)
        found = with_routing(found, collect(decoder) if decoder.config.moes else None)
        return found["loss"], found

    return compute

"""The twin of `toy_stage.objective` in PyTorch."""

from __future__ import annotations

from typing import Any

import torch

DOCUMENTS = 2


def objective(modules: Any, cfg: Any) -> Any:
    """Squared error of each document's mean logit of token 0, for both trees; the teacher's beside it."""

    def compute(batch: Any) -> Any:
        def score(name: str) -> torch.Tensor:  # [B, M]
            logits_BT = modules[name](batch["tokens"], batch["positions"], batch["segments"])[0][..., 0]
            of_BTM = (batch["segments"][..., None] == torch.arange(1, DOCUMENTS + 1)).to(logits_BT.dtype)
            return (logits_BT[..., None] * of_BTM).sum(1) / of_BTM.sum(1)

        teacher, labels = score("teacher"), batch["labels"]
        model, value = score("model"), score("value")
        nll = ((model - labels) ** 2 + (value - labels) ** 2 + 0.1 * (model - teacher) ** 2).sum()
        return nll, {"loss": nll, "nll": nll, "weight": torch.tensor(float(labels.numel()))}

    return compute

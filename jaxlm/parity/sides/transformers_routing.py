"""The routers of transformers: which experts they choose, and the choice of another side in the place of theirs.

Each of them returns logits, weights and numbers of experts, and its experts are called with the tokens, the numbers and
the weights.

Shapes: B rows, T tokens of a row, E experts, K experts of one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from jaxlm.config.model_parts import MoE
from jaxlm.parity.sides.module_hooks import array_of
from jaxlm.parity.trace import Arrays


def choice_of(router: nn.Module, output: Any, name: str, moe: MoE, shape: tuple[int, int]) -> Arrays:
    """What a router chose and by which scores, as `compare_routing` wants it for the module `name` of torch_ref.

    Nothing for a router that returns its logits alone.
    """
    if not isinstance(output, tuple) or len(output) != 3:
        return {}
    logits, _, experts = output
    # `compare_routing` wants the scores that decide, with the selection bias. They are computed anew, since
    # transformers returns the logits alone.
    scores = logits.float()
    scores = torch.sigmoid(scores) if moe.router == "sigmoid" else torch.softmax(scores, dim=-1)
    if moe.selection_bias:
        bias: Any = router.e_score_correction_bias
        scores = scores + bias
    found = {f"{name}#experts": experts, f"{name}#biased": scores}
    return {key: array_of(tensor).reshape(*shape, -1) for key, tensor in found.items()}


def replayed(arriving: tuple, forced: Arrays, name: str, rows: Mapping[str, np.ndarray]) -> tuple:
    """Numbers and weights of the experts as those of the module `name` of torch_ref have them; padding keeps its own.

    `name` may be that of the whole feed-forward, where the experts alone are what transformers has for it.
    """
    # Choices of the other side replace theirs, so that a token near a tie goes the same way on both sides. At padding
    # theirs stays: nothing there is compared.
    name = next((one for one in (name, f"{name}.experts") if f"{one}#experts" in forced), "")
    if not name or len(arriving) != 2:
        return arriving
    experts, weights = arriving
    chosen = torch.tensor(forced[f"{name}#experts"]).reshape(experts.shape).to(experts.dtype)
    given = torch.tensor(forced[f"{name}#weights"]).reshape(weights.shape).to(weights.dtype)
    real = torch.tensor(rows["segments"] > 0).reshape(-1, 1)
    return torch.where(real, chosen, experts), torch.where(real, given, weights)

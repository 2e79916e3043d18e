"""Heads other than the language model's on the same trunk: value, reward, classification.

    reward = RewardModel(config.model, policy, documents=4)
    reward.load_state_dict(jaxlm.convert.native.scored_to_torch(...))
    scores_BM, present_BM = reward(tokens, positions, segments)

Each is a `Decoder` whose parameters keep their names, and a linear map `score` of what the trunk makes of a token. An
untied output matrix, `head`, stays behind. A document is a segment of a row; reward and class belong to a document.

Shapes: B batch, T length, D width, M documents of a row, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from jaxlm import config
from torch_ref.models.decoder import Cache, Decoder
from torch_ref.numerics import Policy, wide_matmul
from torch_ref.ops import pooling


class Score(nn.Module):
    """`x @ weight.T + bias` in float32 or wider: `weight` [C, D], `bias` [C]."""

    def __init__(self, d_model: int, outputs: int, std: float, policy: Policy) -> None:
        super().__init__()
        self.std, self.policy = std, policy
        self.weight = nn.Parameter(torch.empty(outputs, d_model, dtype=policy.params))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=policy.params))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Normal weight, zero bias."""
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator, dtype=self.weight.dtype) * self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x_BTD: Float[Tensor, "b t d"]) -> Float[Tensor, "b t c"]:
        compute = self.policy.compute
        return wide_matmul(x_BTD.to(compute), self.weight.T.to(compute)) + self.bias


class _Trunk(Decoder):
    """A decoder that scores instead of unembedding."""

    def __init__(self, config: config.Model, policy: Policy, outputs: int) -> None:
        super().__init__(config, policy)
        if not config.tie_embeddings:
            del self.head
        self.score = Score(config.d_model, outputs, config.init_std, policy)


class ValueModel(_Trunk):
    """A scalar for each token: the expected return from there on (PPO; Schulman et al. 2017)."""

    def __init__(self, config: config.Model, policy: Policy = Policy()) -> None:  # noqa: B008 (Policy is immutable)
        super().__init__(config, policy, 1)

    def forward(
        self,
        tokens_BT: Int[Tensor, "b t"],
        positions_BT: Int[Tensor, "b t"],
        segments_BT: Int[Tensor, "b t"],
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "b t"], Cache | None]:
        """The value of each token, 0 for padding, and the cache after these tokens; arguments as of `Decoder`."""
        hidden_BTD, cache = self.hidden(tokens_BT, positions_BT, segments_BT, cache)
        return torch.where(segments_BT != 0, self.score(hidden_BTD)[..., 0], 0), cache


class ClassificationModel(_Trunk):
    """Logits of `classes` classes for each document.

    `pooling`: the head sees the last token of a document, or the mean of all its tokens. `documents`: most documents
    of a row, M; segments above it are not scored.
    """

    def __init__(
        self,
        config: config.Model,
        policy: Policy = Policy(),  # noqa: B008 (Policy is immutable)
        classes: int = 2,
        pooling: Literal["last", "mean"] = "last",
        documents: int = 1,
    ) -> None:
        super().__init__(config, policy, classes)
        self.pooling, self.documents = pooling, documents

    def forward(
        self, tokens_BT: Int[Tensor, "b t"], positions_BT: Int[Tensor, "b t"], segments_BT: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b m c"], Bool[Tensor, "b m"]]:
        """Logits of the segments 1 to M, 0 where a row has no such segment, and whether it has it."""
        hidden_BTD, _ = self.hidden(tokens_BT, positions_BT, segments_BT)
        pool = pooling.last_token if self.pooling == "last" else pooling.mean
        present_BM = pooling.present(segments_BT, self.documents)
        logits_BMC = self.score(pool(hidden_BTD, segments_BT, self.documents))
        return torch.where(present_BM[..., None], logits_BMC, 0), present_BM


class RewardModel(_Trunk):
    """A scalar for each document, seen from its last token (Stiennon et al. 2020, section 3.4).

    `documents`: most documents of a row, M; segments above it are not scored.
    """

    def __init__(
        self,
        config: config.Model,
        policy: Policy = Policy(),  # noqa: B008 (Policy is immutable)
        documents: int = 1,
    ) -> None:
        super().__init__(config, policy, 1)
        self.documents = documents

    def forward(
        self, tokens_BT: Int[Tensor, "b t"], positions_BT: Int[Tensor, "b t"], segments_BT: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b m"], Bool[Tensor, "b m"]]:
        """Rewards of the segments 1 to M, 0 where a row has no such segment, and whether it has it."""
        hidden_BTD, _ = self.hidden(tokens_BT, positions_BT, segments_BT)
        present_BM = pooling.present(segments_BT, self.documents)
        pooled_BMD = pooling.last_token(hidden_BTD, segments_BT, self.documents)
        return torch.where(present_BM, self.score(pooled_BMD)[..., 0], 0), present_BM


def with_trunk(model: _Trunk, pretrained: Decoder) -> _Trunk:
    """Give `model` the trunk of a language model; the head of that is left behind. Returns it."""
    trunk = {name: tensor for name, tensor in pretrained.state_dict().items() if not name.startswith("head.")}
    model.load_state_dict(trunk | {name: t for name, t in model.state_dict().items() if name.startswith("score.")})
    return model


__all__ = ["ClassificationModel", "RewardModel", "Score", "ValueModel", "with_trunk"]

"""Heads other than the language model's on the same trunk: value, reward, classification.

    reward = RewardModel(config.model, policy, documents=4)
    params = with_trunk(init_params(reward, jax.random.key(0)), pretrained)
    scores_BM, present_BM = reward.apply({"params": params}, tokens, positions, segments)

Each is a `Decoder` whose parameters keep their names, and a linear map `score` of what the trunk makes of a token. An
untied output matrix, `head`, stays behind. A document is a segment of a row; reward and class belong to a document.

Shapes: B batch, T length, D width, M documents of a row, C classes.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.models.decoder import Cache, Decoder, Params
from jaxlm.numerics import Policy, wide
from jaxlm.ops import pooling


class Score(nn.Module):
    """`x @ kernel + bias` in float32 or wider: `kernel` [D, C], `bias` [C]."""

    outputs: int
    std: float
    policy: Policy

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "b t d"]) -> Float[Array, "b t c"]:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), ("embed", None))
        kernel_DC: Any = self.param("kernel", init, (x_BTD.shape[-1], self.outputs), self.policy.params)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
        bias_C: Any = self.param("bias", zeros, (self.outputs,), self.policy.params)
        compute, width = self.policy.compute, wide(self.policy.compute)
        with jax.default_matmul_precision(self.policy.matmul):
            y_BTC = jnp.einsum(
                "btd,dc->btc", x_BTD.astype(compute), kernel_DC.astype(compute), preferred_element_type=width
            )
        return y_BTC + bias_C


class ValueModel(Decoder):
    """A scalar for each token: the expected return from there on (PPO; Schulman et al. 2017)."""

    def setup(self) -> None:
        super().setup()
        self.score = Score(1, self.config.init_std, self.policy)

    def __call__(
        self,
        tokens_BT: Int[Array, "b t"],
        positions_BT: Int[Array, "b t"],
        segments_BT: Int[Array, "b t"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b t"], Cache | None]:
        """The value of each token, 0 for padding, and the cache after these tokens; arguments as of `Decoder`."""
        hidden_BTD, cache = self.hidden(tokens_BT, positions_BT, segments_BT, cache)
        return jnp.where(segments_BT != 0, self.score(hidden_BTD)[..., 0], 0), cache


class ClassificationModel(Decoder):
    """Logits of `classes` classes for each document."""

    classes: int = 2
    pooling: Literal["last", "mean"] = "last"
    """The head sees the last token of a document, or the mean of all its tokens."""
    documents: int = 1
    """Most documents of a row, M: segments above it are not scored."""

    def setup(self) -> None:
        super().setup()
        self.score = Score(self.classes, self.config.init_std, self.policy)

    def __call__(
        self, tokens_BT: Int[Array, "b t"], positions_BT: Int[Array, "b t"], segments_BT: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b m c"], Bool[Array, "b m"]]:
        """Logits of the segments 1 to M, 0 where a row has no such segment, and whether it has it."""
        hidden_BTD, _ = self.hidden(tokens_BT, positions_BT, segments_BT)
        pool = pooling.last_token if self.pooling == "last" else pooling.mean
        present_BM = pooling.present(segments_BT, self.documents)
        logits_BMC = self.score(pool(hidden_BTD, segments_BT, self.documents))
        return jnp.where(present_BM[..., None], logits_BMC, 0), present_BM


class RewardModel(Decoder):
    """A scalar for each document, seen from its last token (Stiennon et al. 2020, section 3.4)."""

    documents: int = 1
    """Most documents of a row, M: segments above it are not scored."""

    def setup(self) -> None:
        super().setup()
        self.score = Score(1, self.config.init_std, self.policy)

    def __call__(
        self, tokens_BT: Int[Array, "b t"], positions_BT: Int[Array, "b t"], segments_BT: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b m"], Bool[Array, "b m"]]:
        """Rewards of the segments 1 to M, 0 where a row has no such segment, and whether it has it."""
        hidden_BTD, _ = self.hidden(tokens_BT, positions_BT, segments_BT)
        present_BM = pooling.present(segments_BT, self.documents)
        pooled_BMD = pooling.last_token(hidden_BTD, segments_BT, self.documents)
        return jnp.where(present_BM, self.score(pooled_BMD)[..., 0], 0), present_BM


def with_trunk(params: Params, pretrained: Params) -> Params:
    """`params` of a model of this file with the trunk of a language model; the tree of its head is left behind."""
    found: dict[str, Any] = {name: pretrained[name] for name in params if name != "score"}
    return params | found


__all__ = ["ClassificationModel", "RewardModel", "Score", "ValueModel", "with_trunk"]

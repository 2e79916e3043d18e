"""The loss of KTO, for completions that are each wanted or not, without pairs.

An example is two neighbouring segments of one row: 2k-1 is a prompt with its own completion, 2k the same prompt with
the completion of another. The second has no label: it shows how far the policy has moved from the reference at large.

    r = log-probability of a completion - the same under the reference    s = sigmoid    b = beta

Shapes: B batch, M segments of a row, P = M / 2 examples of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.objectives.preference import pair_sums, preference_loss


class KTODivergence(NamedTuple):
    """The mean log ratio of mismatched pairs is `total / weight`; both are sums, so parts of a batch add up."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @property
    def value(self) -> Float[Array, ""]:
        """z of Ethayarajh et al. 2024, section 4.2: never below 0, without a gradient."""
        return jax.lax.stop_gradient(jax.nn.relu(self.total / jnp.maximum(self.weight, 1)))


def kto_divergence(
    logps_BM: Float[Array, "b m"], counts_BM: Float[Array, "b m"], reference_BM: Float[Array, "b m"]
) -> KTODivergence:
    """Sums for z over the mismatched pairs: every second segment is a prompt with the completion of another prompt.

    Take it over the whole batch before the batch is cut into microbatches.
    """
    present_BP = counts_BM[:, 1::2] > 0
    ratio_BP = logps_BM[:, 1::2] - reference_BM[:, 1::2]
    return KTODivergence(_masked_sum(ratio_BP, present_BP), jnp.sum(present_BP, dtype=ratio_BP.dtype))


class KTOLoss(NamedTuple):
    """Sums over the examples; divide by `weight`, rewards by the number of their side."""

    loss: Float[Array, ""]
    desirable_reward: Float[Array, ""]
    undesirable_reward: Float[Array, ""]
    desirable: Float[Array, ""]
    weight: Float[Array, ""]


def kto_loss(
    logps_BM: Float[Array, "b m"],
    reference_BM: Float[Array, "b m"],
    labels_BP: Int[Array, "b p"],
    divergence: Float[Array, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLoss:
    """Sums over examples of `l_d (1 - s(b (r - z)))` or `l_u (1 - s(b (z - r)))` (Ethayarajh et al. 2024, eq. 7).

    Args:
        labels_BP: 1 for a completion that is wanted, -1 for one that is not, 0 for none; it is the segment 2k-1.
        divergence: z, of the whole batch: `kto_divergence(...).value`.
    """
    ratio_BP = logps_BM[:, 0::2] - jax.lax.stop_gradient(reference_BM[:, 0::2])
    ratio_BP = jnp.where(labels_BP != 0, ratio_BP, 0)
    good_BP, bad_BP = labels_BP > 0, labels_BP < 0
    weight_BP = jnp.where(good_BP, desirable_weight, undesirable_weight).astype(ratio_BP.dtype)
    sign_BP = labels_BP.astype(ratio_BP.dtype)
    loss_BP = weight_BP * (1 - jax.nn.sigmoid(sign_BP * beta * (ratio_BP - jax.lax.stop_gradient(divergence))))
    rewards = (_masked_sum(beta * ratio_BP, side_BP) for side_BP in (good_BP, bad_BP))
    counts = (jnp.sum(side_BP, dtype=ratio_BP.dtype) for side_BP in (good_BP, labels_BP != 0))
    return KTOLoss(_masked_sum(loss_BP, labels_BP != 0), *rewards, *counts)


def labelled_sums(
    logps_BM: Float[Array, "b m"],
    counts_BM: Float[Array, "b m"],
    reference_BM: Float[Array, "b m"],
    labels_BP: Int[Array, "b p"],
    divergence: KTODivergence | None = None,
    *,
    judged: bool,
    beta: float,
    **weights: float,
) -> dict[str, Float[Array, ""]]:
    """The sums over labelled answers by their names in `metrics.jsonl`.

    `accuracy` is how often an answer moved to its side of the divergence.

    Args:
        counts_BM: lengths of the answers.
        divergence: that of the whole batch; None: these rows are all of it.
        judged: report the order of pairs too, which have the label 0: they are held out, never trained on.
        weights: `desirable_weight` and `undesirable_weight` of `kto_loss`.
    """
    labelled_BM = of_labelled(counts_BM, labels_BP)
    z = (divergence or kto_divergence(logps_BM, labelled_BM, reference_BM)).value
    terms = kto_loss(logps_BM, reference_BM, labels_BP, z, beta=beta, **weights)
    moved_BP = (logps_BM - reference_BM)[:, 0::2] - z
    found: dict[str, Float[Array, ""]] = {**terms._asdict(), "divergence": z * terms.weight}
    found["accuracy"] = jnp.sum(labels_BP * moved_BP > 0, dtype=logps_BM.dtype)
    if judged:
        pairs_BM = counts_BM - labelled_BM
        ordered = pair_sums(preference_loss(logps_BM, pairs_BM, reference_BM, kind="dpo", beta=beta))
        found["pairs"] = ordered.pop("weight")
        found |= {f"pair_{name}": total for name, total in ordered.items() if name != "loss"}
    return found


def of_labelled(counts_BM: Float[Array, "b m"], labels_BP: Int[Array, "b p"]) -> Float[Array, "b m"]:
    """The lengths of labelled answers and of their mismatched ones; 0 for those of pairs."""
    return jnp.where(jnp.repeat(labels_BP != 0, 2, axis=1), counts_BM, 0)


def _masked_sum(x_BP: Array, mask_BP: Bool[Array, "b p"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask_BP, x_BP, 0))

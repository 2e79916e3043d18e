"""The loss of KTO, for completions that are each wanted or not, without pairs.

An example is two neighbouring segments of one row: 2k-1 is a prompt with its own completion, 2k the same prompt with
the completion of another. The second has no label: it shows how far the policy has moved from the reference at large.

    r = log-probability of a completion - the same under the reference    s = sigmoid    b = beta

Shapes: B batch, M segments of a row, P = M / 2 examples of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from torch_ref.objectives.preference import pair_sums, preference_loss


class KTODivergence(NamedTuple):
    """The mean log ratio of mismatched pairs is `total / weight`; both are sums, so parts of a batch add up."""

    total: Float[Tensor, ""]
    weight: Float[Tensor, ""]

    @property
    def value(self) -> Float[Tensor, ""]:
        """z of Ethayarajh et al. 2024, section 4.2: never below 0, without a gradient."""
        return torch.relu(self.total / self.weight.clamp(min=1)).detach()


def kto_divergence(
    logps_BM: Float[Tensor, "b m"], counts_BM: Float[Tensor, "b m"], reference_BM: Float[Tensor, "b m"]
) -> KTODivergence:
    """Sums for z over the mismatched pairs: every second segment is a prompt with the completion of another prompt.

    Take it over the whole batch before the batch is cut into microbatches.
    """
    present_BP = counts_BM[:, 1::2] > 0
    ratio_BP = logps_BM[:, 1::2] - reference_BM[:, 1::2]
    return KTODivergence(_masked_sum(ratio_BP, present_BP), torch.sum(present_BP, dtype=ratio_BP.dtype))


class KTOLoss(NamedTuple):
    """Sums over the examples; divide by `weight`, rewards by the number of their side."""

    loss: Float[Tensor, ""]
    desirable_reward: Float[Tensor, ""]
    undesirable_reward: Float[Tensor, ""]
    desirable: Float[Tensor, ""]
    weight: Float[Tensor, ""]


def kto_loss(
    logps_BM: Float[Tensor, "b m"],
    reference_BM: Float[Tensor, "b m"],
    labels_BP: Int[Tensor, "b p"],
    divergence: Float[Tensor, ""],
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
    ratio_BP = logps_BM[:, 0::2] - reference_BM[:, 0::2].detach()
    ratio_BP = torch.where(labels_BP != 0, ratio_BP, 0)
    good_BP, bad_BP = labels_BP > 0, labels_BP < 0
    weight_BP = torch.where(good_BP, ratio_BP.new_tensor(desirable_weight), undesirable_weight)
    sign_BP = labels_BP.to(ratio_BP.dtype)
    loss_BP = weight_BP * (1 - torch.sigmoid(sign_BP * beta * (ratio_BP - divergence.detach())))
    rewards = (_masked_sum(beta * ratio_BP, side_BP) for side_BP in (good_BP, bad_BP))
    counts = (torch.sum(side_BP, dtype=ratio_BP.dtype) for side_BP in (good_BP, labels_BP != 0))
    return KTOLoss(_masked_sum(loss_BP, labels_BP != 0), *rewards, *counts)


def labelled_sums(
    logps_BM: Float[Tensor, "b m"],
    counts_BM: Float[Tensor, "b m"],
    reference_BM: Float[Tensor, "b m"],
    labels_BP: Int[Tensor, "b p"],
    divergence: KTODivergence | None = None,
    *,
    judged: bool,
    beta: float,
    **weights: float,
) -> dict[str, Float[Tensor, ""]]:
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
    moved_BP = (logps_BM - reference_BM)[:, 0::2].detach() - z
    found: dict[str, Float[Tensor, ""]] = {**terms._asdict(), "divergence": z * terms.weight}
    found["accuracy"] = torch.sum(labels_BP * moved_BP > 0, dtype=logps_BM.dtype)
    if judged:
        pairs_BM = counts_BM - labelled_BM
        ordered = pair_sums(preference_loss(logps_BM, pairs_BM, reference_BM, kind="dpo", beta=beta))
        found["pairs"] = ordered.pop("weight")
        found |= {f"pair_{name}": total for name, total in ordered.items() if name != "loss"}
    return found


def of_labelled(counts_BM: Float[Tensor, "b m"], labels_BP: Int[Tensor, "b p"]) -> Float[Tensor, "b m"]:
    """The lengths of labelled answers and of their mismatched ones; 0 for those of pairs."""
    return counts_BM.masked_fill((labels_BP == 0).repeat_interleave(2, dim=1), 0)


def _masked_sum(x_BP: Tensor, mask_BP: Bool[Tensor, "b p"]) -> Float[Tensor, ""]:
    return torch.sum(torch.where(mask_BP, x_BP, 0))

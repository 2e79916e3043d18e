"""Which experts both sides chose, token by token; where they differ, how near to a tie float64 was.

Two correct implementations part where the k-th and the next score are nearly equal, and everything behind such a token
is another computation. The margin says whether rounding was enough.

Shapes: N tokens, E experts, K experts of one token, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from jaxlm import config
from jaxlm.config.model_parts import MoE
from jaxlm.parity.compare import Finding
from jaxlm.parity.tolerances import FLOAT64
from jaxlm.parity.trace import Arrays

ROUTING = "routing"
"""The level of the chosen experts."""


def compare_routing(dtype: str, golden: Arrays, ours: Arrays, theirs: Arrays, model: config.Model) -> Iterator[Finding]:
    """One finding for each layer with experts: of the tokens whose experts differ, the one furthest from a tie.

    The error is the float64 margin between the k-th score and the next one. The bound is the reach of rounding: two
    scores change places if each is off by half their distance, so it is twice the error of the scores of that token, of
    the side that is further from float64. With groups, whose scores are sums of two, it is four times that, and the
    margin is that of the groups if it is smaller. In float64 nothing but FLOAT64 is rounding. What an earlier layer did
    to a token is part of the error of its scores.

    Args:
        golden: outputs of all modules (`Side.forward`) in float64, `ours` and `theirs`: in `dtype`. Layers without
            `router#experts` and `router#biased` are left out.
    """
    for layer in range(model.n_layers):
        half = model.halves(model.pattern[layer % len(model.pattern)])
        name = f"layers.{layer}.ffn.router"
        sides = golden, ours, theirs
        if half.ffn_name == "moe" and all({f"{name}#experts", f"{name}#biased"} <= side.keys() for side in sides):
            yield _compare(dtype, name, sides, half.ffn.moe)


def _compare(dtype: str, name: str, sides: tuple[Arrays, Arrays, Arrays], moe: MoE) -> Finding:
    shape = sides[1][f"{name}#experts"].shape[:-1]
    # Sorted: the order among the chosen experts changes no output, only the sums of their roundings.
    experts_NK, other_NK = (np.sort(side[f"{name}#experts"].reshape(-1, moe.top_k)) for side in sides[1:])
    exact_NE, *scores_NE = (np.asarray(side[f"{name}#biased"], np.float64).reshape(-1, moe.n_experts) for side in sides)
    judged_N = (np.maximum(experts_NK, other_NK) < moe.n_experts).all(-1)  # neither padding nor beyond the capacity
    differing = np.flatnonzero(judged_N & (experts_NK != other_NK).any(-1))
    if not differing.size:
        return Finding(dtype, ROUTING, name, 0.0, 0.0, note=f"{judged_N.sum()} tokens")
    # How far rounding reaches at a token is measured there, as the error of its scores on the worse side. A choice may
    # then differ only where the exact margin is within reach.
    margins_N = margins(exact_NE[differing], moe)
    reach_N = np.max([np.abs(side[differing] - exact_NE[differing]).max(-1) for side in scores_NE], axis=0)
    # In float64 the measured error itself may be the fault that is looked for, so its size is bounded by what rounding
    # can do.
    if dtype == "float64":
        reach_N = np.minimum(reach_N, FLOAT64.allowed * np.abs(exact_NE[differing]).max(-1))
    bounds_N = (2 if moe.n_groups == 1 else 4) * reach_N
    # The worst token by ratio; the smallest normal number keeps 0 / 0 out when nothing was rounded.
    worst = int(np.argmax(margins_N / np.maximum(bounds_N, np.finfo(np.float64).tiny)))
    at = differing[worst]
    place = [int(index) for index in np.unravel_index(at, shape)]
    mine, other = set(experts_NK[at].tolist()), set(other_NK[at].tolist())
    chosen = f"experts {sorted(mine - other)} against {sorted(other - mine)}"
    note = f"{differing.size} of {judged_N.sum()} tokens, at {place} {chosen}"
    return Finding(dtype, ROUTING, name, float(margins_N[worst]), float(bounds_N[worst]), note=note)


def margins(biased_NE: Float[np.ndarray, "n e"], moe: MoE) -> Float[np.ndarray, " n"]:
    """How far each token is from another choice: the k-th score less the next, or the same of its groups."""
    margin_N = np.full(len(biased_NE), np.inf)
    if moe.n_groups > 1:
        grouped_NGE = biased_NE.reshape(len(biased_NE), moe.n_groups, -1)
        # With groups a choice changes at two places: which groups are kept, and which experts within them. The margin
        # is the smaller of the two.
        sums_NG = np.sort(grouped_NGE)[..., -2:].sum(-1)
        order_NG = np.argsort(-sums_NG, kind="stable")
        margin_N = _gap(sums_NG, moe.top_groups)
        kept_NG = np.zeros_like(sums_NG, bool)
        np.put_along_axis(kept_NG, order_NG[:, : moe.top_groups], True, axis=-1)
        biased_NE = np.where(kept_NG[..., None], grouped_NGE, -np.inf).reshape(biased_NE.shape)
    return np.minimum(margin_N, _gap(biased_NE, moe.top_k))


def _gap(scores: Float[np.ndarray, "n m"], count: int) -> Float[np.ndarray, " n"]:
    """The score at the boundary of the best less the first beyond it; infinite where there is none."""
    if count == scores.shape[-1]:
        return np.full(len(scores), np.inf)
    ordered = -np.sort(-scores)
    return ordered[:, count - 1] - ordered[:, count]

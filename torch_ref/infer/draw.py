"""The next token of each row in PyTorch: penalties, bias, grammar, filters, the draw, and log-probabilities.

Shapes: R rows, V vocabulary, E end ids, Q likeliest others, W words of a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jaxlm.infer.engine.request import MOST_LOGPROBS
from torch_ref.ops import sampling as ops


class State(NamedTuple):
    """What the device keeps between calls besides the cache; written in place."""

    seen_RV: Bool[Tensor, "r v"]
    """Tokens of the prompt, for rows with a penalty."""
    counts_RV: Int[Tensor, "r v"]
    """How often a token stands in the text so far."""
    bias_RV: Float[Tensor, "r v"]
    """Added to the logits, -inf for forbidden ids."""

    @classmethod
    def empty(cls, rows: int, vocab: int, width: torch.dtype, device: torch.device) -> State:
        """Rows without a text."""
        kinds = torch.bool, torch.int32, width
        return cls(*(torch.zeros(rows, vocab, dtype=kind, device=device) for kind in kinds))


def draw(
    state: State, logits_RV: Float[Tensor, "r v"], orders: Any, step: int, active_R: Bool[Tensor, " r"]
) -> tuple[Tensor, ...]:
    """Draw in all rows, and count it in those that are active; returns the fields of `Drawn` for one token.

    Args:
        orders: `Orders` with tensors in place of arrays.
    """
    token_R, kept_RV = _draw_rows(state, logits_RV, orders, step)
    top_R = torch.minimum(logits_RV.amax(dim=-1), kept_RV.amax(dim=-1))  # -inf where nothing may be drawn
    bad_R = active_R & ~top_R.isfinite()
    state.counts_RV[torch.arange(len(token_R), device=token_R.device), token_R.long()] += active_R.int()
    if not orders.scored.any():
        few_R, many_RQ = logits_RV.new_zeros(len(token_R)), logits_RV.new_zeros(len(token_R), MOST_LOGPROBS)
        return token_R, bad_R, few_R, many_RQ.int(), many_RQ
    scored_RV = torch.where(orders.processed[:, None] != 0, kept_RV, logits_RV)
    return token_R, bad_R, *log_probs(scored_RV, token_R)


def log_probs(logits_RV: Float[Tensor, "r v"], token_R: Int[Tensor, " r"]) -> tuple[Tensor, ...]:
    """Log-probability of each token, and the likeliest tokens with theirs; of equal ones the lower first."""
    total_R = logits_RV.logsumexp(dim=-1)
    own_R = logits_RV.gather(1, token_R[:, None].long())[:, 0] - total_R
    top_RV, ids_RV = torch.sort(logits_RV, dim=-1, descending=True, stable=True)
    return own_R, ids_RV[:, :MOST_LOGPROBS].int(), top_RV[:, :MOST_LOGPROBS] - total_R[:, None]


def _draw_rows(state: State, logits_RV: Tensor, orders: Any, step: int) -> tuple[Tensor, Tensor]:
    """The next token of each row, and the logits that the draw was from, those not kept at -inf."""
    knobs = ops.Knobs(*orders.knobs)
    logits_RV = ops.penalised_rows(logits_RV, state.seen_RV | (state.counts_RV > 0), state.counts_RV, knobs)
    if orders.biased.any():
        logits_RV = torch.where(orders.biased[:, None] != 0, logits_RV + state.bias_RV, logits_RV)

    # Ends are forbidden until the text has its least length; then the grammar has its say.
    index_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    early_R1 = (orders.made + step < orders.least)[:, None]
    if early_R1.any():
        end_RV = (orders.ends[:, :, None] == index_V).any(dim=1)
        logits_RV = logits_RV.masked_fill(early_R1 & end_RV, -torch.inf)
    if orders.ruled.any():
        allowed_RV = (orders.mask[:, index_V // 32] >> (index_V % 32)) & 1
        logits_RV = logits_RV.masked_fill((allowed_RV == 0) & (orders.ruled[:, None] != 0), -torch.inf)
    if ((orders.active != 0) & ((knobs.temperature > 0) | (orders.processed != 0))).any():
        kept_RV = ops.filtered_rows(logits_RV, knobs)
        token_R = ops.draw(kept_RV, orders.uniforms[step])
    else:
        kept_RV, token_R = logits_RV, ops.greedy(logits_RV)
    forced_R = orders.forced[step]
    return torch.where(forced_R >= 0, forced_R, token_R).int(), kept_RV

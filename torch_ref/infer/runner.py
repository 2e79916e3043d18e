"""The engine's hands in PyTorch: the contract of `jaxlm.infer.engine.runner`, without compiled programs.

    engine = Engine(TorchRunner(decoder, rows=8, slots=2048), tokenizer, ends=(0,))

Shapes: R rows, N tokens of a burst, C tokens of a piece, D width, V vocabulary, Q likeliest others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jaxlm.errors import UserError
from jaxlm.infer.engine.request import MOST_LOGPROBS
from jaxlm.infer.engine.runner import Drawn, Orders, Scored
from torch_ref.infer import rows as row_ops
from torch_ref.models.decoder import Cache, Decoder
from torch_ref.numerics import wide
from torch_ref.ops import sampling as ops


class TorchRunner:
    """Rows of a decoder on the decoder's device. Not for several threads at once.

    Args:
        slots: the longest text of a row.
        widths: tokens of the pieces of a prompt, rising; the last is the chunk.
    """

    def __init__(self, decoder: Decoder, *, rows: int, slots: int, widths: Sequence[int] = (16, 64, 256)) -> None:
        self.decoder = decoder.eval()
        self.rows, self.length, self.widths = rows, slots, tuple(widths)
        self.vocab = decoder.config.vocab_size
        self.programs: dict[str, str] = {}
        self._device = decoder.embed.weight.device
        self.clear()

    def clear(self) -> None:
        """Empty all rows."""
        self._cache: Cache = row_ops.empty_rows(self.decoder, self.rows, self.length + self.widths[-1])
        shape = (self.rows, self.vocab)
        self._seen_RV = torch.zeros(shape, dtype=torch.bool, device=self._device)
        self._counts_RV = torch.zeros(shape, dtype=torch.int32, device=self._device)
        self._bias_RV = torch.zeros(shape, dtype=wide(self.decoder.policy.compute), device=self._device)

    def update(self, params: Mapping[str, Tensor]) -> None:
        """Take other weights, by the names of `state_dict`.

        Raises:
            UserError: a name or a shape differs.
        """
        try:
            self.decoder.load_state_dict(dict(params), strict=True)
        except RuntimeError as error:
            raise UserError(f"the new weights are not those of the engine: {' '.join(str(error).split())}") from None

    def prefill(self, row: int, tokens: Sequence[int], start: int, width: int) -> None:
        """Put a piece of a prompt into a row, at `start`."""
        self._run_chunk(row, tokens, start)

    @torch.inference_mode()
    def score(self, row: int, tokens: Sequence[int], targets: Sequence[int], start: int, width: int) -> Scored:
        """As `prefill`, with the log-probabilities of the tokens that follow."""
        logits_CV = self.decoder.unembed(self._run_chunk(row, tokens, start))[0]
        return Scored(*(x.cpu().numpy() for x in _log_probs(logits_CV, torch.tensor(targets, device=self._device))))

    @torch.inference_mode()
    def decode(self, orders: Orders) -> Drawn:
        """Draw in every running row until `orders.until` tokens, or until a row ends."""
        given: Any = _tensors(orders, self._device)
        active_R, token_R, row_R = given.active != 0, given.token, torch.arange(self.rows, device=self._device)
        drawn: list[tuple[Tensor, ...]] = []
        for step in range(int(given.until)):
            position_R1 = (given.position + step)[:, None]
            inputs = token_R[:, None], position_R1, active_R.int()[:, None], self._cache
            hidden_R1D, after = self.decoder.hidden(*inputs)
            assert after is not None
            self._cache = after
            logits_RV = self.decoder.unembed(hidden_R1D)[:, 0]
            token_R, kept_RV = self._draw(logits_RV, given, step)
            top_R = torch.minimum(logits_RV.amax(dim=-1), kept_RV.amax(dim=-1))  # -inf where nothing may be drawn
            bad_R = active_R & ~top_R.isfinite()
            self._counts_RV[row_R, token_R.long()] += active_R.int()
            scored_RV = torch.where(given.processed[:, None] != 0, kept_RV, logits_RV)
            drawn.append((token_R, bad_R, *_scored(scored_RV, token_R, bool(given.scored.any()))))
            if (active_R & ((token_R[:, None] == given.ends).any(dim=-1) | bad_R)).any():
                break
        arrays = [torch.stack(values).cpu().numpy() for values in zip(*drawn, strict=True)]
        return Drawn(*arrays, steps=np.asarray(len(drawn), np.int32))

    @torch.inference_mode()
    def reset(self, row: int, *, scrub: bool = False) -> None:
        """Empty a row; `scrub` also overwrites numbers that are none."""
        row_ops.reset_row(self._cache, row, scrub)

    def penalise(self, row: int, seen_V: np.ndarray, counts_V: np.ndarray, bias_V: np.ndarray) -> None:
        """Set what the penalties of a row count, and its bias."""
        for ours, values_V in ((self._seen_RV, seen_V), (self._counts_RV, counts_V), (self._bias_RV, bias_V)):
            ours[row] = torch.as_tensor(values_V).to(ours)

    def keep(self, row: int, start: int) -> Any:
        """Return what the row has after the chunk at `start`, the last one written."""
        return row_ops.keep(self._cache, row, start, self.widths[-1])

    @torch.inference_mode()
    def put_back(self, row: int, start: int, kept: Any) -> None:
        """Put what `keep` returned into a row."""
        row_ops.put_back(self._cache, row, start, kept, self.widths[-1])

    def kept_bytes(self, kept: Any) -> int:
        """Memory of what `keep` returned."""
        return sum(leaf.nbytes for layer in kept for leaf in layer)

    def warm_up(self) -> None:
        """Do nothing: there is nothing to compile."""

    @torch.inference_mode()
    def _run_chunk(self, row: int, tokens: Sequence[int], start: int) -> Tensor:
        """A piece of one row's prompt; returns what the head would see [1, C, D]."""
        tokens_1C = torch.tensor([list(tokens)], dtype=torch.int32, device=self._device)
        positions_1C = torch.arange(start, start + len(tokens), dtype=torch.int32, device=self._device)[None]
        part = row_ops.one_row(self._cache, row)
        hidden_1CD, after = self.decoder.hidden(tokens_1C, positions_1C, torch.ones_like(positions_1C), part)
        assert after is not None
        row_ops.put_row(part, after)
        return hidden_1CD

    def _draw(self, logits_RV: Tensor, orders: Any, step: int) -> tuple[Tensor, Tensor]:
        """The next token of each row, and the logits that the draw was from, those not kept at -inf."""
        knobs = ops.Knobs(*orders.knobs)
        logits_RV = ops.penalised_rows(logits_RV, self._seen_RV | (self._counts_RV > 0), self._counts_RV, knobs)
        if orders.biased.any():
            logits_RV = torch.where(orders.biased[:, None] != 0, logits_RV + self._bias_RV, logits_RV)

        # Ends are forbidden until the text has its least length; then the grammar has its say.
        index_V = torch.arange(self.vocab, device=self._device)
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


def _scored(logits_RV: Tensor, token_R: Tensor, wanted: bool) -> tuple[Tensor, ...]:
    """`_log_probs`; zeros where no row wants them."""
    if wanted:
        return _log_probs(logits_RV, token_R)
    few, many = logits_RV.new_zeros(len(token_R)), logits_RV.new_zeros(len(token_R), MOST_LOGPROBS)
    return few, many.int(), many


def _log_probs(logits_RV: Tensor, token_R: Tensor) -> tuple[Tensor, ...]:
    """Log-probability of each token, and the likeliest tokens with theirs; of equal ones the lower first."""
    total_R = logits_RV.logsumexp(dim=-1)
    own_R = logits_RV.gather(1, token_R[:, None].long())[:, 0] - total_R
    top_RV, ids_RV = torch.sort(logits_RV, dim=-1, descending=True, stable=True)
    return own_R, ids_RV[:, :MOST_LOGPROBS].int(), top_RV[:, :MOST_LOGPROBS] - total_R[:, None]


def _tensors(x: Any, device: torch.device) -> Any:
    """`Orders` with tensors in place of its arrays."""
    if isinstance(x, tuple):
        leaves = [_tensors(leaf, device) for leaf in x]
        return type(x)(*leaves) if hasattr(x, "_fields") else tuple(leaves)
    array = np.asarray(x)
    narrow = device.type == "mps" and array.dtype == np.float64  # which Apple's GPUs do not have
    return torch.as_tensor(array.astype(np.float32) if narrow else array).to(device)

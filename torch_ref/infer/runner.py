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
from jaxlm.infer.engine.runner import BURST, Drawn, Orders, Scored
from torch_ref.infer import rows as row_ops
from torch_ref.infer.draw import State, draw, log_probs
from torch_ref.models.decoder import Cache, Decoder
from torch_ref.numerics import wide


class TorchRunner:
    """Rows of a decoder on the decoder's device. Not for several threads at once.

    Args:
        slots: the longest text of a row.
        widths: tokens of the pieces of a prompt, rising; the last is the chunk.
        speculates: windows get room for tokens that are taken back, which `verify` needs.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        rows: int,
        slots: int,
        widths: Sequence[int] = (16, 64, 256),
        speculates: bool = False,
    ) -> None:
        self.decoder = decoder.eval()
        self.rows, self.length, self.widths = rows, slots, tuple(widths)
        self.vocab, self.speculates, self.shared = decoder.config.vocab_size, speculates, False
        self.programs: dict[str, str] = {}
        self._device = decoder.embed.weight.device
        self.clear()

    def clear(self) -> None:
        """Empty all rows."""
        room = BURST if self.speculates else 0
        self._cache: Cache = row_ops.empty_rows(self.decoder, self.rows, self.length + self.widths[-1], room)
        self.has_states = row_ops.has_states(self._cache)
        self.state = State.empty(self.rows, self.vocab, wide(self.decoder.policy.compute), self._device)

    def update(self, params: Mapping[str, Tensor]) -> None:
        """Take other weights, by the names of `state_dict`.

        Raises:
            UserError: a name or a shape differs.
        """
        try:
            self.decoder.load_state_dict(dict(params), strict=True)
        except RuntimeError as error:
            raise UserError(f"the new weights are not those of the engine: {' '.join(str(error).split())}") from None

    def prefill(self, row: int, tokens: Sequence[int] | np.ndarray, start: int, width: int) -> None:
        """Put a piece of a prompt into a row, at `start`: ids, or vectors [C, D] in place of their embeddings."""
        self._run_chunk(row, tokens, start)

    @torch.inference_mode()
    def score(self, row: int, tokens: Sequence[int], targets: Sequence[int], start: int, width: int) -> Scored:
        """As `prefill`, with the log-probabilities of the tokens that follow."""
        logits_CV = self.decoder.unembed(self._run_chunk(row, tokens, start))[0]
        return Scored(*(x.cpu().numpy() for x in log_probs(logits_CV, torch.tensor(targets, device=self._device))))

    @torch.inference_mode()
    def decode(self, orders: Orders) -> Drawn:
        """Draw in every running row until `orders.until` tokens, or until a row ends."""
        given: Any = _tensors(orders, self._device)
        active_R, token_R = given.active != 0, given.token
        drawn: list[tuple[Tensor, ...]] = []
        for step in range(int(given.until)):
            inputs = token_R[:, None], (given.position + step)[:, None], active_R.int()[:, None], self._cache
            hidden_R1D, self._cache = self.decoder.hidden(*inputs)  # pyright: ignore[reportAttributeAccessIssue]
            token_R, bad_R, *scored = draw(self.state, self.decoder.unembed(hidden_R1D)[:, 0], given, step, active_R)
            drawn.append((token_R, bad_R, *scored))
            if (active_R & ((token_R[:, None] == given.ends).any(dim=-1) | bad_R)).any():
                break
        return _drawn(drawn, torch.full_like(given.token, len(drawn)))

    @torch.inference_mode()
    def verify(self, orders: Orders, guess: np.ndarray, masks: np.ndarray) -> Drawn:
        """Draw in every running row while its guesses [N, R] are drawn, and one token more; -1: no guess.

        Args:
            masks: in place of `orders.mask`, one for each token [N, R, W].
        """
        given: Any = _tensors(orders, self._device)
        guess_NR, masks_NRW = (torch.as_tensor(array, device=self._device) for array in (guess, masks))
        guesses_R = (guess_NR >= 0).int().cumprod(dim=0).sum(dim=0)
        tokens_RN = torch.cat([given.token[None], guess_NR[:-1].clamp(min=0)]).T
        alive_R, before = given.active != 0, self._cache
        hidden_RND, after = self._feed(tokens_RN, given, guesses_R + 1, before)
        logits_RNV, taken_R, drawn = self.decoder.unembed(hidden_RND), torch.zeros_like(given.token), []
        for step in range(len(guess)):
            masked = given._replace(mask=masks_NRW[step])
            drawn.append(draw(self.state, logits_RNV[:, step], masked, step, alive_R))
            (token_R, bad_R, *_), taken_R = drawn[-1], taken_R + alive_R.int()
            over_R = (token_R[:, None] == given.ends).any(dim=-1) | bad_R | (token_R != guess_NR[step])
            alive_R = alive_R & ~over_R
            if not alive_R.any():
                break

        # Of slots by position, guesses that were wrong are overwritten. States are computed again, from before.
        if row_ops.has_states(after) and ((given.active != 0) & (taken_R != guesses_R + 1)).any():
            after = self._feed(tokens_RN, given, taken_R, row_ops.before_states(before, after))[1]
        self._cache = after
        return _drawn(drawn, taken_R)

    @torch.inference_mode()
    def reset(self, row: int, *, scrub: bool = False) -> None:
        """Empty a row; `scrub` also overwrites numbers that are none."""
        row_ops.reset_row(self._cache, row, scrub)

    def penalise(self, row: int, seen_V: np.ndarray, counts_V: np.ndarray, bias_V: np.ndarray) -> None:
        """Set what the penalties of a row count, and its bias."""
        for ours, values_V in zip(self.state, (seen_V, counts_V, bias_V), strict=True):
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

    def warm_up(self, *, draft: bool = False) -> None:
        """Do nothing: there is nothing to compile."""

    def _feed(self, tokens_RN: Tensor, given: Any, count_R: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """The first so many tokens of each row that draws; returns what the head would see [R, N, D]."""
        index_1N = torch.arange(tokens_RN.shape[1], dtype=torch.int32, device=self._device)[None]
        real_RN = (given.active != 0)[:, None] & (index_1N < count_R[:, None])
        positions_RN = given.position[:, None] + torch.where(real_RN, index_1N, 0)
        hidden_RND, after = self.decoder.hidden(tokens_RN, positions_RN, real_RN.int(), cache)
        assert after is not None
        return hidden_RND, after

    @torch.inference_mode()
    def _run_chunk(self, row: int, tokens: Sequence[int] | np.ndarray, start: int) -> Tensor:
        """A piece of one row's prompt; returns what the head would see [1, C, D]."""
        vectors = isinstance(tokens, np.ndarray) and tokens.ndim == 2
        tokens_1C = torch.as_tensor(tokens if vectors else np.asarray(tokens, np.int32), device=self._device)[None]
        positions_1C = torch.arange(start, start + len(tokens), dtype=torch.int32, device=self._device)[None]
        part = row_ops.one_row(self._cache, row)
        hidden_1CD, after = self.decoder.hidden(tokens_1C, positions_1C, torch.ones_like(positions_1C), part)
        assert after is not None
        row_ops.put_row(part, after)
        return hidden_1CD


def _drawn(drawn: Sequence[tuple[Tensor, ...]], steps_R: Tensor) -> Drawn:
    arrays = [torch.stack(values).cpu().numpy() for values in zip(*drawn, strict=True)]
    return Drawn(*arrays, steps=steps_R.cpu().numpy())


def _tensors(x: Any, device: torch.device) -> Any:
    """`Orders` with tensors in place of its arrays."""
    if isinstance(x, tuple):
        leaves = [_tensors(leaf, device) for leaf in x]
        return type(x)(*leaves) if hasattr(x, "_fields") else tuple(leaves)
    array = np.asarray(x)
    narrow = device.type == "mps" and array.dtype == np.float64  # which Apple's GPUs do not have
    return torch.as_tensor(array.astype(np.float32) if narrow else array).to(device)

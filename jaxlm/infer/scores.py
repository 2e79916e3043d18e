"""A reward model or a verifier in use: the score of an answer to a prompt.

    scorer = Scorer.open("runs/polite-reward")
    scorer.score([("Fix: freind", "The right spelling is friend.")])     # [N], higher is better

Shapes: N answers, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxlm.errors import UserError
from jaxlm.infer.generate import bucket
from jaxlm.infer.load import load
from jaxlm.infer.model import Model
from jaxlm.numerics import precision
from jaxlm.text.chat import Chat, encode
from jaxlm.text.completion import right_padded


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """A model with the head `reward` or `verifier`, and the chat template of its training."""

    model: Model
    chat: Chat

    @classmethod
    def open(cls, path: str | Path) -> Scorer:
        """The reward model of a run or a folder.

        Raises:
            UserError: there is no model, it has another head, or no tokenizer.
        """
        model = load(path)
        if model.config.model.head not in ("reward", "verifier"):
            raise UserError(f"{path}: model.head = {model.config.model.head!r} is no reward model", "recipe=reward")
        if model.tokenizer is None:
            raise UserError(f"{path}: a reward model without a tokenizer", "jaxlm convert --tokenizer FILE")
        return cls(model, Chat.of(model.tokenizer, model.config.preference.template, Path(path)))

    def score(self, answers: Sequence[tuple[str, str]]) -> Float[np.ndarray, " n"]:
        """The score of each (prompt, answer), as its training saw it: the token that ends the turn is not read.

        A verifier returns the probability that the answer is right.

        Raises:
            UserError: an answer is longer than the model has positions for.
        """
        rows = [self._ids(*answer) for answer in answers]
        longest, most = max(map(len, rows)), self.model.config.model.max_seq_len
        if most and longest > most:
            raise UserError(f"an answer of {longest} tokens exceeds model.max_seq_len = {most} of {self.model.path}")
        places = right_padded(rows, min(bucket(longest), most or longest), 0)[:3]
        with precision(self.model.config.numerics):
            scores_NM1 = self._compiled(self.model.params, *(jnp.asarray(x) for x in places))
            scores_N = scores_NM1[:, 0, 0]
            return np.asarray(scores_N if self.model.config.model.head == "reward" else jax.nn.sigmoid(scores_N))

    def _ids(self, prompt: str, answer: str) -> list[int]:
        turns: Any = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return encode(self.chat, turns, train_on="last").ids[:-1].tolist()

    @functools.cached_property
    def _compiled(self) -> Any:
        def scores(params: Any, *places: Any) -> Any:
            return self.model.decoder.apply({"params": params}, *places, 1, method="score_documents")[0]

        return jax.jit(scores)

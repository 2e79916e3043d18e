"""What both frameworks are shown: rows that find bugs, the same in every run.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from jaxlm import config
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.models.decoder import Decoder, Params, abstract_params

ROW = 512
"""Tokens of a row: longer than the blocks of the attention kernels, and than the bugs of short prompts."""
STEP_ROW = 64
"""Tokens of a row of the optimiser steps, of which there are many."""
NEW_TOKENS = 64
PROMPTS = (12, 5, 1)
"""Lengths of the prompts of one batch."""

TEXT = '''def mean(values):
    """The arithmetic mean of a sequence, 0.0 when it is empty."""
    total = 0.0
    for value in values:
        total += value
    return total / len(values) if values else 0.0


class Stack(list):
    def push(self, item):
        self.append(item)

    def __repr__(self):
        return f"Stack({', '.join(map(repr, self))})"


A language model gives each text a probability, one token at a time: the product of what it gives to every token after \
all that went before. Training raises the probability of the texts that people wrote. Nothing else is asked of it, and \
yet grammar, facts and a little arithmetic come along, because each of them makes the next word easier to guess.

In 1948 Claude Shannon let people guess English letter by letter and found about 1.3 bits in each. "We have seen," he \
wrote, "that the redundancy is high." Ein naïver Test: √2 ≈ 1.41, 10⁻³ m, 東京, Привет, λx.x, 🙂\tand tabs.

SELECT name, COUNT(*) FROM runs WHERE loss < 1.70 GROUP BY name ORDER BY 2 DESC;
{"steps": [100, 200, 300], "best": {"loss": 2.381, "step": 300}, "done": true}
'''


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The rows of the forward and the gradient, those of the optimiser steps, and the prompts to continue greedily."""

    rows: Mapping[str, np.ndarray]
    step_rows: Mapping[str, np.ndarray]
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    text: str
    """Where the tokens come from, in words."""
    stream: Int[np.ndarray, " n"]
    vocab_size: int

    def other_rows(self, number: int) -> Mapping[str, np.ndarray]:
        """Rows of the shape of `rows`, of the same tokens in another order."""
        shuffled = np.random.default_rng(number).permutation(self.stream)
        return packed(shuffled, self.rows["tokens"].shape[1], self.vocab_size)


def make_inputs(model: config.Model, tokenizer_path: Path | None = None) -> Inputs:
    """Built-in text in the run's own tokens, or random ids over the whole vocabulary when there is no tokenizer.

    Rows are as long as the table of positions, when there is one and it is shorter than 512.
    """
    if tokenizer_path is not None:
        stream = np.array(Tokenizer.from_file(tokenizer_path).encode(TEXT), np.int32)
        text = f"{len(stream)} tokens of built-in text by {tokenizer_path.name}"
    else:
        stream = np.random.default_rng(0).integers(0, model.vocab_size, 4 * ROW, dtype=np.int32)
        text = "random ids"
    longest = model.max_seq_len if model.positions in ("learned", "sinusoidal") else ROW
    lengths = [max(1, min(n, longest // 4)) for n in PROMPTS]
    prompts = [tuple(np.roll(stream, -29 * i)[:n].tolist()) for i, n in enumerate(lengths[:-1])]
    return Inputs(
        packed(stream, min(ROW, longest), model.vocab_size),
        packed(stream[::-1], min(STEP_ROW, longest), model.vocab_size),
        (*prompts, (model.vocab_size - 1,) * lengths[-1]),
        max(1, min(NEW_TOKENS, longest - max(lengths))),
        text,
        stream,
        model.vocab_size,
    )


def packed(stream: Int[np.ndarray, " n"], t: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Two rows [2, T]: padding on both sides of three documents, one of them a single token; two documents, padding.

    The four highest ids of the vocabulary are sprinkled over both.
    """
    segments, positions = np.zeros((2, t), np.int32), np.zeros((2, t), np.int32)
    for row, (start, documents) in enumerate([(t // 39, (t // 3, 1, t // 2)), (0, (t // 5, 3 * t // 4))]):
        for number, length in enumerate(documents, start=1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    tokens = np.resize(stream, (2, t + 1)).astype(np.int32)
    tokens[:, 5::29] = vocab_size - 1 - np.arange(tokens[:, 5::29].size).reshape(2, -1) % min(4, vocab_size)
    following = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return {
        "tokens": np.where(segments > 0, tokens[:, :-1], 0).astype(np.int32),
        "targets": np.where(segments > 0, tokens[:, 1:], 0).astype(np.int32),
        "positions": positions,
        "segments": segments,
        "weights": ((segments > 0) & (segments == following)).astype(np.float32),
    }


def random_params(model: config.Model, seed: int = 0) -> Params:
    """Float32 values of their own in every leaf, norms and biases too: no swap can hide. Activations are of order 1."""
    random = np.random.default_rng(seed)

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        values = random.standard_normal(shape.shape, np.float32)
        kind = path[-1].key
        if kind == "scale":
            return 1 + np.float32(0.3) * values
        return values * np.float32(1.2 * model.d_model**-0.5 if kind == "kernel" else 0.4)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(Decoder(model))[0])

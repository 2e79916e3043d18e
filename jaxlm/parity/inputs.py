"""What both frameworks are shown: rows that find bugs, the same in every run.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, Params, abstract_params
from jaxlm.text.tokenizer import Tokenizer

ROW = 512
"""Tokens of a row: longer than the blocks of the attention kernels, and than the bugs of short prompts."""
STEP_ROW = 64
"""Tokens of a row of the optimiser steps, of which there are many."""
NEW_TOKENS = 64
LEVELS = ("config", "weights", "forward", "loss", "gradients", "update", "routing", "generation")
"""What two models are compared by, in this order."""
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
    levels: tuple[str, ...] = LEVELS
    """What is wanted."""
    plain: bool = False
    """Each row is one document without padding."""
    sprinkled: bool = True
    """Whether the highest ids of the vocabulary are among the tokens wherever these come from."""

    def wants(self, *levels: str) -> bool:
        """Whether any of these levels is wanted."""
        return any(level in self.levels for level in levels)

    def other_rows(self, number: int) -> Mapping[str, np.ndarray]:
        """Rows of the shape of `rows`, of the same tokens in another order."""
        shuffled = np.random.default_rng(number).permutation(self.stream)
        sprinkled = self.vocab_size if self.sprinkled else 0
        return (alone if self.plain else packed)(shuffled, self.rows["tokens"].shape[1], sprinkled)


def make_inputs(
    model: config.Model,
    tokenizer_path: Path | None = None,
    *,
    text: str = "",
    prompt: str = "",
    levels: Sequence[str] = LEVELS,
    plain: bool = False,
) -> Inputs:
    """Built-in text in the run's own tokens, or random ids over the whole vocabulary when there is no tokenizer.

    Rows are as long as the table of positions, when there is one and it is shorter than 512.

    Args:
        text, prompt: the user's, instead; a prompt is continued as a whole. Text that is too short is repeated.
        levels: what is wanted; a model with another head than `lm` generates nothing.
        plain: rows without padding and of one document, for a side that cannot separate several.

    Raises:
        UserError: the user's text is empty, or there is no tokenizer for it.
    """
    # Random ids reach every row of the embedding, text does not. But text has the statistics on which a trained model
    # is confident, so its logits are large and errors show.
    user = prompt or text
    if tokenizer_path is not None:
        stream = np.array(Tokenizer.from_file(tokenizer_path).encode(user or TEXT), np.int32)
        origin = f"{len(stream)} tokens of {'your' if user else 'built-in'} text by {tokenizer_path.name}"
    elif user:
        raise UserError("there is no tokenizer.json for your text", "leave --text and --prompt away: random ids")
    else:
        stream = np.random.default_rng(0).integers(0, model.vocab_size, 4 * ROW, dtype=np.int32)
        origin = "random ids"
    longest = model.max_seq_len if model.positions in ("learned", "sinusoidal") else ROW
    # Prompts of three lengths in one batch, the last a single token of the highest id: left padding, ragged ends, and
    # the end of the embedding table are all hit.
    lengths = [max(1, min(n, longest // 4)) for n in PROMPTS]
    prompts = [tuple(np.roll(stream, -29 * i)[:n].tolist()) for i, n in enumerate(lengths[:-1])]
    prompts = [*prompts, (model.vocab_size - 1,) * lengths[-1]]
    if prompt:
        prompts = [tuple(stream[: longest // 2].tolist())]
    # The highest ids are sprinkled into built-in text, since a tokenizer's text seldom reaches the last rows of the
    # tables; a user's text is left as it is.
    lay, sprinkled = alone if plain else packed, 0 if user else model.vocab_size
    return Inputs(
        lay(stream, min(ROW, longest), sprinkled),
        lay(stream[::-1], min(STEP_ROW, longest), sprinkled),
        tuple(prompts),
        max(1, min(NEW_TOKENS, longest - max(map(len, prompts)))),
        origin,
        stream,
        model.vocab_size,
        tuple(level for level in levels if level != "generation" or model.head == "lm"),
        plain,
        not user,
    )


def alone(stream: Int[np.ndarray, " n"], t: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Two rows [2, T] of one document each, without padding; ids are sprinkled as in `packed`."""
    segments = np.ones((2, t), np.int32)
    return _laid(stream, segments, np.tile(np.arange(t, dtype=np.int32), (2, 1)), vocab_size)


def packed(stream: Int[np.ndarray, " n"], t: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Two rows [2, T]: padding on both sides of three documents, one of them a single token; two documents, padding.

    The four highest ids of the vocabulary are sprinkled over both, unless `vocab_size` is 0.
    """
    # Fractions of T and not round numbers: no boundary then falls on a multiple of a kernel's block, so a kernel that
    # looks at whole blocks is found out.
    segments, positions = np.zeros((2, t), np.int32), np.zeros((2, t), np.int32)
    for row, (start, documents) in enumerate([(t // 39, (t // 3, 1, t // 2)), (0, (t // 5, 3 * t // 4))]):
        for number, length in enumerate(documents, start=1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    return _laid(stream, segments, positions, vocab_size)


def _laid(stream: np.ndarray, segments: np.ndarray, positions: np.ndarray, vocab_size: int) -> dict[str, np.ndarray]:
    t = segments.shape[1]
    tokens = np.resize(stream, (2, t + 1)).astype(np.int32)
    if vocab_size:
        # 29 and 5 have no factor in common with rows, blocks or heads.
        tokens[:, 5::29] = vocab_size - 1 - np.arange(tokens[:, 5::29].size).reshape(2, -1) % min(4, vocab_size)
    # The last token of a document has no target within it, so it counts nothing in the loss; neither does padding.
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
        # Scales around 1 and other tensors around 0, each value its own. Kernels are a little larger than usual for
        # their width, so that every nonlinearity leaves its linear part.
        if kind == "scale":
            return 1 + np.float32(0.3) * values
        return values * np.float32(1.2 * model.d_model**-0.5 if kind == "kernel" else 0.4)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(Decoder(model))[0])

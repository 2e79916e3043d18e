"""Judges that several stages share. Neutral: no JAX, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.train.recipe import DataSource, Judge


def language_judge(source: DataSource) -> Judge:
    """Loss of the next token, nats, perplexity and accuracy; of a corpus of text, bits a byte and the unigram loss.

    `source.corpus`, where there is one, knows the bytes of a token and the entropy of single tokens.
    """
    corpus: Any = getattr(source, "corpus", None)
    bytes_per_token = corpus.statistics["validation"].bytes_per_token if corpus else math.nan
    baseline = corpus.unigram_entropy if corpus and math.isfinite(corpus.unigram_entropy) else None

    def figures(sums: Mapping[str, float]) -> dict[str, float]:
        loss = sums["nll"] / sums["weight"]
        row = {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700))}
        if math.isfinite(bytes_per_token):
            row["validation_bits_per_byte"] = loss / math.log(2) / bytes_per_token
        return row | {"validation_accuracy": sums["accuracy"] / sums["weight"]}

    def describe(row: Mapping[str, float]) -> str:
        words = [f"validation loss {row['validation_loss']:.4f} nats/token"]
        if "validation_bits_per_byte" in row:
            words.append(f"{row['validation_bits_per_byte']:.3f} bits/byte")
        if baseline is not None:
            words.append(against_unigram(row["validation_loss"], baseline))
        return ", ".join(words)

    return Judge(figures, describe=describe, baseline=baseline, baseline_name="unigram baseline")


def against_unigram(loss: float, baseline: float) -> str:
    """How far a loss lies below, or above, that of the unigram model, in words."""
    gain = 1 - loss / baseline
    return f"{abs(gain):.0%} {'below' if gain >= 0 else 'above'} the unigram model"

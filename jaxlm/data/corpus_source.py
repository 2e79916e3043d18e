"""A prepared corpus as the data of a training stage: packed rows by number, held-out rows, and an identity."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.data.pipeline import Corpus, make_train_iterator, prepare
from jaxlm.data.rows.inspect import Report, inspect_corpus
from jaxlm.data.rows.validation import HeldOut, held_out_sets
from jaxlm.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class CorpusSource:
    """Packed rows of a corpus; see `train.recipe.DataSource`."""

    cfg: config.Config
    corpus: Corpus
    updates_per_phase: int = 1

    @classmethod
    def open(cls, cfg: config.Config, tokenizer: Tokenizer | None) -> CorpusSource:
        """Prepare the corpus of `[data]`; a run that resumes hands in its tokenizer.

        Raises:
            UserError: see `pipeline.prepare`.
        """
        return cls(cfg, prepare(cfg, tokenizer))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the shards."""
        return self.corpus.tokenizer

    def identity(self) -> dict[str, str]:
        """Fingerprints of the tokenizer and of all tokens."""
        return {"tokenizer": self.corpus.tokenizer.fingerprint(), "corpus": self.corpus.fingerprint}

    def batches(self, *, batch_size: int, rows: np.ndarray | None) -> Any:
        """See `pipeline.make_train_iterator`."""
        return make_train_iterator(self.cfg.data, self.corpus, batch_size=batch_size, seed=self.cfg.seed, rows=rows)

    def held_out(self, *, batch_size: int, rows: np.ndarray | None, max_batches: int) -> list[HeldOut]:
        """All held-out rows, and by corpus, language and middles what the config asks for."""
        return held_out_sets(
            self.cfg.data,
            self.corpus,
            batch_size=batch_size,
            rows=rows,
            max_batches=max_batches,
            by_language=self.cfg.eval.by_language,
        )

    def inspect(self, *, step: int = 1, rows: int = 1) -> Report:
        """See `rows.inspect.inspect_corpus`."""
        return inspect_corpus(self.cfg, step=step, rows=rows, corpus=self.corpus)

    def begin_phase(self, number: int, engine: Any) -> None:
        """Nothing comes before an update."""

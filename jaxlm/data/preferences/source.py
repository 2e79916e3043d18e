"""Pairs of answers as the data of a training stage: read, split by their prompts, encoded, packed into rows."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import Config
from jaxlm.data.preferences.formats import Labelled, Pair
from jaxlm.data.preferences.inspect import PairReport, ShownPairs
from jaxlm.data.preferences.pairs import (
    Pairs,
    Read,
    encode_pairs,
    labelled_pairs,
    read_preferences,
    sides_of,
    split,
)
from jaxlm.data.preferences.reference_file import ReferenceFile
from jaxlm.data.preferences.rows import PairRows
from jaxlm.data.rows.copies import warn_of_copies
from jaxlm.data.rows.epochs import Batch, NumberedBatches
from jaxlm.data.rows.validation import HeldOut
from jaxlm.data.stage_tokenizer import stage_tokenizer, template_folder
from jaxlm.data.turns.inspect import rows_of_step
from jaxlm.errors import UserError
from jaxlm.text.chat import Chat
from jaxlm.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
Compute = Callable[[Iterator[Batch]], Iterator[np.ndarray]]
_HELD_OUT_SEED = 0  # not the run's seed: runs that differ in it are judged on the same rows


@dataclasses.dataclass(frozen=True)
class PreferenceSource:
    """The pairs of `data.source` in packed rows; see `train.recipe.DataSource`.

    Held-out rows are all that is held out, once: labelled answers where those are trained, then pairs.
    """

    cfg: Config
    tokenizer: Tokenizer
    train: Pairs
    validation: tuple[Pairs, ...]
    updates_per_phase: int = 1
    template: str = ""
    """Where the template of the chat is from."""
    other_prompt: int = 0
    """Records left out: their sides are not answers to one prompt."""
    reference: dict[str, np.ndarray] = dataclasses.field(default_factory=dict[str, np.ndarray])
    """Of each set of `_sets` the log-probability of each answer under the reference, where that is cached."""

    @classmethod
    def open(
        cls, cfg: Config, tokenizer: Tokenizer | None, *, labelled: bool = False, ties: bool = False
    ) -> PreferenceSource:
        """Read the pairs of `data.source`; a run that resumes hands in its tokenizer.

        Args:
            labelled: train on answers that are each wanted or not (KTO).
            ties: keep pairs that are equally good, for a reward model.

        Raises:
            UserError: a row, the template or an option is not usable, or no pair is left to train on.
        """
        tokenizer = stage_tokenizer(cfg, tokenizer)
        chat = Chat.of(tokenizer, cfg.preference.template, template_folder(cfg), key="preference.template")
        options: dict[str, Any] = {"truncate": cfg.preference.too_long == "truncate"}
        options |= {"system": cfg.preference.system, "ties": ties}
        encode = functools.partial(encode_pairs, chat=chat, seq_len=cfg.data.seq_len, **options)
        read = read_preferences(*cfg.data.sources)
        if read.labelled and not labelled:
            where = read.labelled[0].where
            raise UserError(f"{where}: an answer with a label is no pair", "preference.loss=kto trains on labels")
        train, held_out = split(read, cfg.data.validation_fraction)
        if cfg.data.validation_source:
            train, held_out = read, read_preferences(cfg.data.validation_source)
            warn_of_copies("preferences", *(map(_content, side.pairs + side.labelled) for side in (train, held_out)))
        trained = encode(labelled_pairs(train) if labelled else sides_of(train.pairs))
        _tell(cfg, read, trained)
        sets = [encode(sides_of(held_out.pairs))]
        if labelled and held_out.pairs + held_out.labelled:
            sets = [encode(labelled_pairs(held_out)), *sets]
        found: dict[str, Any] = {"template": chat.template.where, "other_prompt": read.other_prompt}
        return cls(cfg, tokenizer, trained, tuple(one for one in sets if len(one)), **found)

    def identity(self) -> dict[str, str]:
        """Fingerprints of the tokenizer and of all pairs as they are laid out."""
        prints = [one.fingerprint for one in (self.train, *self.validation)]
        pairs = " ".join([*prints, str(self.cfg.preference.pairs_per_row)])
        return {"tokenizer": self.tokenizer.fingerprint(), "pairs": hashlib.sha256(pairs.encode()).hexdigest()}

    def batches(self, *, batch_size: int, rows: np.ndarray | None) -> NumberedBatches:
        """Batches of packed pairs, in another order in each epoch."""
        share = np.arange(batch_size) if rows is None else rows
        return NumberedBatches(self._rows("train", self.train, self.cfg.seed), batch_size, share)

    def held_out(self, *, batch_size: int, rows: np.ndarray | None, max_batches: int) -> list[HeldOut]:
        """One set: every held-out pair once."""
        share = np.arange(batch_size) if rows is None else rows

        def batches() -> Iterator[Batch]:
            for name, pairs in list(self._sets.items())[1:]:
                yield from self._rows(name, pairs, _HELD_OUT_SEED).once(batch_size, share, max_batches)

        return [HeldOut("", True, batches)] if self.validation else []

    def begin_phase(self, number: int, engine: Any) -> None:
        """Nothing comes before an update."""

    def inspect(self, *, step: int = 1, rows: int = 1) -> PairReport:
        """Count what is trained on, and show the first rows of one step.

        Raises:
            UserError: the step lies beyond the run.
        """
        cfg, examples = self.cfg, self.train.examples
        numbers = rows_of_step(cfg.train, step, rows)
        packed = self._rows("train", self.train, cfg.seed)
        laid = packed[numbers] if len(numbers) else {}
        places = packed.rows_per_epoch * cfg.data.seq_len
        return PairReport(
            source=", ".join(cfg.data.sources),
            template=self.template,
            counts=self.train.counts,
            other_prompt=self.other_prompt,
            held_out=sum(map(len, self.validation)),
            trained=examples.trained / len(examples.ids),
            seq_len=cfg.data.seq_len,
            rows_per_epoch=packed.rows_per_epoch,
            padding=1 - float((np.diff(examples.offsets) - 1).sum()) / places,
            tokenizer=self.tokenizer,
            rows=tuple(
                ShownPairs(number, {name: x[i].tolist() for name, x in laid.items()})
                for i, number in enumerate(numbers.tolist())
            ),
        )

    def cache(self, facts: Mapping[str, str], compute: Compute, engine: Any) -> None:
        """Give each answer its log-probability under the reference; see `train.recipe.CachingSource`.

        Raises:
            UserError: the file of these facts is damaged or holds other numbers, or it cannot be written.
        """
        prints = " ".join(pairs.fingerprint for pairs in self._sets.values())
        facts = {**facts, "pairs": hashlib.sha256(prints.encode()).hexdigest()}
        file = ReferenceFile.of(Path(self.cfg.data.cache_dir), facts)
        own = file.read({name: 2 * len(pairs) for name, pairs in self._sets.items()})
        found = own
        if not all(engine.gather(float(own is not None))):  # all processes compute, or none does
            found = {name: self.by_answer(name, compute, engine) for name in self._sets}
            if own is None:  # each host may have a cache of its own
                file.write(found)
        self.reference.update(found or {})

    def by_answer(
        self, name: str, compute: Compute, engine: Any, *, batches: int = 0, swapped: bool = False
    ) -> np.ndarray:
        """The numbers [2 x pairs] that `compute` has of each answer of a set, `train` or `held_out_0`.

        Args:
            batches: at most so many, 0: all; answers beyond them are NaN.
            swapped: the second answer of a pair lies before the first.
        """
        size = self.cfg.train.batch_size
        rows = self._rows(name, self._sets[name], _HELD_OUT_SEED, swapped=swapped)
        share = np.arange(size) if engine.rows is None else engine.rows
        return rows.by_answer(compute(rows.once(size, share, batches)))

    @property
    def _sets(self) -> dict[str, Pairs]:
        """All pairs by name: those of training first."""
        return {"train": self.train, **{f"held_out_{i}": pairs for i, pairs in enumerate(self.validation)}}

    def _rows(self, name: str, pairs: Pairs, seed: int, *, swapped: bool = False) -> PairRows:
        sizes: dict[str, Any] = {"pad": self.tokenizer.pad, "most": self.cfg.preference.pairs_per_row}
        numbers: dict[str, Any] = {"reference": self.reference.get(name), "swapped": swapped}
        return PairRows(pairs, self.cfg.data.seq_len, seed=seed, **numbers, **sizes)


def _content(preference: Pair | Labelled) -> bytes:
    """A preference without its place."""
    return repr(preference._replace(where="")).encode("utf-8", "surrogatepass")


def _tell(cfg: Config, read: Read, pairs: Pairs) -> None:
    """One line about what was left out of the training pairs.

    Raises:
        UserError: nothing is left.
    """
    other = [f"{read.other_prompt} whose sides are not answers to one prompt"] if read.other_prompt else []
    why = ", ".join([*other, *filter(None, [pairs.counts.left_out])])
    if not len(pairs):
        hint = (
            f'data.seq_len above {cfg.data.seq_len}, or preference.too_long="truncate"' if pairs.counts.too_long else ""
        )
        where = ", ".join(cfg.data.sources)
        raise UserError(f"{where}: no pair is left to train on: {why or 'there is none'}", hint or "other data")
    if why:
        _log.warning("warning: %d pairs to train on; left out: %s", len(pairs), why)

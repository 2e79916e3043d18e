"""Conversations as the data of a training stage: read, encoded with their masks, split, packed into rows by number."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import Config
from jaxlm.data.rows.copies import warn_of_copies
from jaxlm.data.rows.epochs import NumberedBatches
from jaxlm.data.rows.validation import HeldOut
from jaxlm.data.turns.formats import conversations
from jaxlm.data.turns.inspect import ConversationReport, rows_of_step, shown_rows
from jaxlm.data.turns.rows import ConversationRows, Examples, collect, split
from jaxlm.errors import UserError
from jaxlm.text.chat import Chat, Example, encode
from jaxlm.text.tokenizer import Tokenizer

_HELD_OUT_SEED = 0  # not the run's seed: runs that differ in it are judged on the same rows


@dataclasses.dataclass(frozen=True)
class ConversationSource:
    """Whole conversations in packed rows, with a weight for each target; see `train.recipe.DataSource`."""

    cfg: Config
    tokenizer: Tokenizer
    chat: Chat
    train: Examples
    validation: Examples
    updates_per_phase: int = 1

    @classmethod
    def open(cls, cfg: Config, tokenizer: Tokenizer | None) -> ConversationSource:
        """Read the conversations of `data.source`; a run that resumes hands in its tokenizer.

        Raises:
            UserError: a row, the template or an option is not usable, or no example is left to train on.
        """
        tokenizer = tokenizer or _tokenizer(cfg)
        beside = Path(cfg.tokenizer.path).parent if cfg.tokenizer.path else None
        chat = Chat.of(tokenizer, cfg.sft.template, beside)
        train = _examples(cfg, cfg.data.sources, chat)
        if cfg.data.validation_source:
            held_out = _examples(cfg, (cfg.data.validation_source,), chat)
            warn_of_copies("conversations", train.contents(), held_out.contents())
            return cls(cfg, tokenizer, chat, train, held_out)
        return cls(cfg, tokenizer, chat, *split(train, cfg.data.validation_fraction))

    @property
    def side_files(self) -> dict[str, bytes]:
        """What lies in the run beside the tokenizer: the template that was trained with, and the ids that end a text.

        Other files of the base decide about ids too, so they go along as they are.
        """
        folder = Path(self.cfg.tokenizer.path).parent if self.cfg.tokenizer.path else None
        names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        files = {name: (folder / name).read_bytes() for name in names if folder and (folder / name).is_file()}
        ends = json.dumps({"eos_token_id": sorted(self.chat.ends)}, indent=2) + "\n"
        files |= {"generation_config.json": ends.encode()} if self.chat.ends else {}
        return {**files, "chat_template.jinja": self.chat.template.source.encode()}

    def identity(self) -> dict[str, str]:
        """Fingerprints of the tokenizer and of all examples with their weights."""
        examples = f"{self.train.fingerprint} {self.validation.fingerprint} {self.cfg.sft.pack}"
        return {
            "tokenizer": self.tokenizer.fingerprint(),
            "conversations": hashlib.sha256(examples.encode()).hexdigest(),
        }

    def batches(self, *, batch_size: int, rows: np.ndarray | None) -> NumberedBatches:
        """Batches of packed examples, in another order in each epoch."""
        share = np.arange(batch_size) if rows is None else rows
        return NumberedBatches(self._rows(self.train, self.cfg.seed), batch_size, share)

    def held_out(self, *, batch_size: int, rows: np.ndarray | None, max_batches: int) -> list[HeldOut]:
        """One set: every held-out example once."""
        share = np.arange(batch_size) if rows is None else rows
        batches = lambda: self._rows(self.validation, _HELD_OUT_SEED).once(batch_size, share, max_batches)  # noqa: E731
        return [HeldOut("", True, batches)] if len(self.validation) else []

    def begin_phase(self, number: int, engine: Any) -> None:
        """Nothing comes before an update."""

    def inspect(self, *, step: int = 1, rows: int = 1) -> ConversationReport:
        """What is trained, and the first rows of one step.

        Raises:
            UserError: the step lies beyond the run.
        """
        cfg = self.cfg
        numbers = rows_of_step(cfg.train, step, rows)
        packed = self._rows(self.train, cfg.seed)
        return ConversationReport(
            source=", ".join(cfg.data.sources),
            template=self.chat.template.where,
            counts=self.train.counts,
            held_out=len(self.validation),
            trained=self.train.trained / len(self.train.ids),
            seq_len=cfg.data.seq_len,
            rows_per_epoch=packed.rows_per_epoch,
            padding=packed.padding,
            tokenizer=self.tokenizer,
            rows=shown_rows(packed[numbers], numbers) if len(numbers) else (),
        )

    def _rows(self, examples: Examples, seed: int) -> ConversationRows:
        pack, pad = self.cfg.sft.pack, self.tokenizer.pad
        return ConversationRows(examples, self.cfg.data.seq_len, seed=seed, pad=pad, pack=pack)


def _tokenizer(cfg: Config) -> Tokenizer:
    options = cfg.tokenizer
    if options.kind == "bytes":
        return Tokenizer.bytes_level(specials=options.specials)
    if options.kind == "file" and options.path:
        return Tokenizer.from_file(options.path)
    raise UserError("a stage of conversations trains no tokenizer", "tokenizer.kind=file tokenizer.path=FILE")


def _examples(cfg: Config, sources: tuple[str, ...], chat: Chat) -> Examples:
    sft = cfg.sft
    read = functools.partial(conversations, format=sft.format, fields=sft.fields, system=sft.system)

    def encoded() -> Iterator[Example]:
        found = [talk for one in sources for talk in read(one)]
        if sft.max_examples:
            order = np.random.default_rng([cfg.seed, 4]).permutation(len(found))
            found = [found[i] for i in np.sort(order[: sft.max_examples])]
        for talk in found:
            try:
                train_on, weight = sft.train_on, sft.prompt_weight
                yield encode(chat, talk.messages, tools=talk.tools, train_on=train_on, prompt_weight=weight)
            except UserError as error:
                raise UserError(f"{talk.where}: {error.message}", error.hint) from None

    return collect(encoded(), cfg.data.seq_len, sft.too_long, ", ".join(sources))

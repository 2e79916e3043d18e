"""A public layout: rows for its weights, settings for its config.json."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import config, config_file
from jaxlm.convert.rows import Row
from jaxlm.convert.settings import Fixed, Key, Setting, require_same, tree
from jaxlm.errors import UserError

COMMON: tuple[Setting, ...] = (Fixed("quantization_config", None),)
"""Settings of every layout."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One layout, both ways."""

    name: str
    """`model_type` of config.json."""
    architecture: str
    """The class of transformers."""
    rows: Callable[[config.Model], Sequence[Row]]
    """The rows of a model; those of parameters that it does not have are left out by `rows.expand`."""
    settings: tuple[Setting, ...]
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    ignored: str = ""
    """Pattern of tensors that old files carry and that say nothing."""
    old_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Spellings of old files that transformers still reads, and what they are now."""

    def config_to_hf(
        self, cfg: config.Model, *, dtype: str, bos: int | None = None, eos: int | None = None, pad: int | None = None
    ) -> dict[str, Any]:
        """The config.json of a model, which transformers 4 and 5 read.

        Args:
            dtype: of the stored tensors, e.g. `bfloat16`.
            bos, eos, pad: ids of begin of text (None: no token stands before a text), end of text, padding.

        Raises:
            UserError: an option of `[model]` that the layout cannot express.
        """
        hf: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        for setting in (*COMMON, *self.settings):
            hf |= setting.out(cfg)
        # Only a note for the way back, where it makes the round trip exact; transformers keeps and ignores it.
        hf |= {"jaxlm_rope_layout": cfg.rope_layout} if cfg.rope_layout != "half" else {}
        try:
            back = self.config_from_hf(hf)
        except UserError as error:
            raise UserError(f"the {self.name} layout has no place for this model: {error}") from None
        require_same(cfg, back, self.name)
        hf |= {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
        return hf | {"torch_dtype": dtype, "dtype": dtype}  # transformers 4 and 5

    def config_from_hf(self, hf: Mapping[str, Any], where: str = "config.json") -> config.Model:
        """`[model]` of a config.json. Keys that are absent have the defaults of transformers.

        Raises:
            UserError: a key is missing, or says what jaxlm cannot express.
        """
        options: list[Mapping[str, Any]] = [{"rope_layout": hf.get("jaxlm_rope_layout", "half")}]
        for setting in (*COMMON, *self.settings):
            try:
                options.append(setting.back(hf))
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None
            except (TypeError, AttributeError, KeyError) as error:
                raise UserError(f"{where}: {type(setting).__name__} is ill-formed: {error}") from None
        return config_file.from_dict({"model": tree(options)}, where).model

    def rows_for(self, cfg: config.Model, tensors: Collection[str]) -> list[Row]:
        """The rows, with the spellings of a file."""
        spelled = lambda row: tuple(self._spelled(name, tensors) for name in row.theirs)  # noqa: E731
        return [Row(row.ours, spelled(row), *row.transforms) for row in self.rows(cfg)]

    def _spelled(self, name: str, tensors: Collection[str]) -> str:
        old = (old for old, new in self.old_names.items() if new == name and old in tensors)
        return name if name in tensors else next(old, name)

    def extras(self, tensors: Mapping[str, np.ndarray], cfg: config.Model) -> set[str]:
        """Stored tensors that say nothing: constants of old files, a second copy of the embedding of a tied model.

        Raises:
            UserError: a tied model has a head that is not the embedding.
        """
        found = {name for name in tensors if self.ignored and re.fullmatch(self.ignored, name)}
        embedding = self._spelled(self.embedding, tensors)
        if cfg.tie_embeddings and {self.head, embedding} <= tensors.keys():
            if not np.array_equal(tensors[self.head], tensors[embedding]):
                hint = "config.json says tie_word_embeddings: which is right?"
                raise UserError(f"{self.head} differs from {embedding}", hint)
            found.add(self.head)
        return found


def sizes(**ours: str) -> tuple[Setting, ...]:
    """Settings for keys that config.json must have: theirs = ours."""
    return tuple(Key(theirs, mine) for theirs, mine in ours.items())

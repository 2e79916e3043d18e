"""A public layout: rows for its weights, settings for its config.json."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert.canonical import DEQUANTISE
from jaxlm.convert.rows import Row
from jaxlm.convert.settings import Setting, key, nothing, require_same, tree
from jaxlm.convert.tensors import Tensors, tensors_of
from jaxlm.errors import UserError


def _unquantised(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Weights are stored in a float dtype."""
    if found := hf.get("quantization_config"):
        method = found.get("quant_method")
        hint = DEQUANTISE
        if method == "mxfp4":
            hint = "from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(...)"
        raise ValueError(f"quantization_config = {found!r}: jaxlm reads no quantised weights", hint)
    return {}


_log = logging.getLogger(__name__)

COMMON: tuple[Setting, ...] = (Setting(nothing, _unquantised, "quantization_config"),)
"""Settings of every layout."""

INERT = re.compile(
    "_.*|jaxlm_.*|architectures|model_type|transformers_version|torch_dtype|dtype|use_cache|use_return_dict|return_dict|"
    "output_.*|.*_token_id|.*drop(out)?(_rate|_prob)?|initializer_.*|pretraining_tp|tokenizer_class|id2label|label2id|"
    "problem_type|task_specific_params|summary_.*|n_ctx|chunk_size_feed_forward|is_encoder_decoder|is_decoder|"
    "finetuning_task|torchscript|use_bfloat16|prefix|pruned_heads|tie_encoder_decoder"
)
"""Keys of config.json that say nothing of what a decoder computes."""


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
    inert: tuple[str, ...] = ()
    """Keys of its config.json that say nothing of what the weights compute."""
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
        if cfg.head != "lm":
            where = f"the {self.name} layout has no place for model.head = {cfg.head!r}"
            raise UserError(where, "--to torch takes every model")
        hf: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        for setting in (*COMMON, *self.settings):
            hf |= setting.out(cfg)
        # Only a note for the way back, where it makes the round trip exact; transformers keeps and ignores it.
        hf |= {"jaxlm_rope_layout": cfg.rope_layout} if cfg.rope_layout != "half" else {}
        try:
            back = self.config_from_hf(hf, "its config.json")
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
        asked = Asked(hf)
        options: list[Mapping[str, Any]] = [{"rope_layout": hf.get("jaxlm_rope_layout", "half")}]
        for setting in (*COMMON, *self.settings):
            asked.now.clear()
            try:
                options.append(setting.back(asked))
            except ValueError as error:
                raise UserError(f"{where}: {error.args[0]}", *error.args[1:]) from None
            except KeyError as error:
                raise UserError(f"{where}: {error.args[0]} is missing") from None
            except (TypeError, AttributeError, ArithmeticError):
                values = ", ".join(f"{key} = {hf[key]!r}" for key in asked.now if key in hf)
                raise UserError(f"{where}: ill-formed: {values}") from None
        silent = asked.ever | {*self.inert}
        if unknown := sorted(key for key in hf.keys() - silent if not INERT.fullmatch(key)):
            _log.warning("%s: unknown keys %s are ignored", where, ", ".join(unknown))
        model = tree(options)
        learned = {"data": {"seq_len": model["max_seq_len"]}} if model.get("positions") == "learned" else {}
        return toml.from_dict({"model": model, **learned}, where).model

    def nearest(self, hf: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """config.json without the keys whose values jaxlm cannot express, so that they have their defaults; and these.

        Only keys that name one of a few values are left out, such as an activation: they change no tensor.
        """
        refused: dict[str, Any] = {}
        for setting in self.settings:
            if setting.few and setting.name in hf:
                try:
                    setting.back(hf)
                except ValueError:
                    refused[setting.name] = hf[setting.name]
        return {key: value for key, value in hf.items() if key not in refused}, refused

    def tensors(self, stored: Mapping[str, np.ndarray], cfg: config.Model) -> Named:
        """Stored tensors by the names of the layout, without those that say nothing.

        Files of the model without its head (`GPT2Model`, as the public GPT-2) lack the first part of every name.

        Raises:
            UserError: see `extras`.
        """
        prefix = self.embedding.partition(".")[0] + "."
        bare = not any(name.startswith(prefix) for name in stored)
        names: dict[str, str] = {}
        for old in stored:
            name = prefix + old if bare and old != self.head else old
            name = self.old_names.get(name, name)
            if name in names:
                raise UserError(f"{old} and {names[name]} are the same tensor, {name}")
            names[name] = old
        full = Named(stored, names)
        return full.without(self.extras(full, cfg))

    def extras(self, tensors: Mapping[str, np.ndarray], cfg: config.Model) -> set[str]:
        """Stored tensors that say nothing: constants of old files, a second copy of the embedding of a tied model.

        Raises:
            UserError: a tied model has a head that is not the embedding.
        """
        found = {name for name in tensors if self.ignored and re.fullmatch(self.ignored, name)}
        if cfg.tie_embeddings and {self.head, self.embedding} <= tensors.keys():
            if not np.array_equal(tensors[self.head], tensors[self.embedding]):
                hint = "config.json says tie_word_embeddings: which is right?"
                raise UserError(f"{self.head} differs from {self.embedding}", hint)
            found.add(self.head)
        return found


class Asked(Mapping[str, Any]):
    """A config.json that knows which of its keys were asked for."""

    def __init__(self, hf: Mapping[str, Any]) -> None:
        self._hf, self.ever = hf, set[str]()
        self.now: dict[str, None] = {}
        """Since it was last cleared, in order."""

    def __getitem__(self, key: str) -> Any:
        self.ever.add(key)
        self.now[key] = None
        return self._hf[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hf)

    def __len__(self) -> int:
        return len(self._hf)


class Named(Tensors):
    """Tensors under other names, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, np.ndarray], stored: Mapping[str, str]) -> None:
        self._tensors, self._stored = tensors_of(tensors), stored

    def without(self, names: set[str]) -> Named:
        """The same tensors but for `names`."""
        return Named(self._tensors, {name: old for name, old in self._stored.items() if name not in names})

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it if the folder knows."""
        return self._tensors.shape(self._stored[name])

    def dtype(self, name: str) -> str:
        """The same for its dtype, by numpy's name."""
        return self._tensors.dtype(self._stored[name])

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._stored[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def sizes(**ours: str) -> tuple[Setting, ...]:
    """Settings for keys that config.json must have: theirs = ours."""
    return tuple(key(theirs, mine) for theirs, mine in ours.items())

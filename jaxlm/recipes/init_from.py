"""Where the parameters of a new run come from, if not from its seed: `train.init_from`."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxlm import config
from jaxlm.convert.canonical import fill
from jaxlm.convert.open_model import Opened, open_model
from jaxlm.convert.settings import function_of
from jaxlm.errors import UserError
from jaxlm.models.decoder import Params
from jaxlm.text.tokenizer import Tokenizer


def initial_params(cfg: config.Config, tokenizer: Tokenizer) -> Params:
    """The parameters of the model at `train.init_from`, as the live tree of `cfg.model` in numpy arrays.

    Raises:
        UserError: there is no model, it computes another function than `cfg.model` (but RoPE may be stretched from the
            length that it had), or it was trained with another tokenizer than `tokenizer`.
    """
    opened = open_model(cfg.train.init_from)
    where = f"train.init_from = {cfg.train.init_from!r}"
    _require_same_function(cfg.model, opened, where)
    if opened.tokenizer_path and Tokenizer.from_file(opened.tokenizer_path).fingerprint() != tokenizer.fingerprint():
        hint = f"tokenizer.kind=file tokenizer.path={opened.tokenizer_path}"
        raise UserError(f"{where}: its tokenizer is another than that of [tokenizer]", hint)
    params = fill(opened.parameters, cfg.model, str(opened.path))
    return _cast(params, np.dtype(cfg.numerics.params))


def read_params(path: str, model: config.Model, dtype: str) -> Params:
    """The parameters of the model at `path`, as the live tree of `model` in numpy arrays.

    Raises:
        UserError: there is no model, or it computes another function than `model`.
    """
    opened = open_model(path)
    _require_same_function(model, opened, path)
    return _cast(fill(opened.parameters, model, str(opened.path)), np.dtype(dtype))


def _require_same_function(model: config.Model, opened: Opened, where: str) -> None:
    before = opened.config.model
    if model.rope_scaling.original_max_seq_len == (before.max_seq_len or None):  # a stage of longer texts
        before = dataclasses.replace(before, rope_scaling=model.rope_scaling, max_seq_len=model.max_seq_len)
    mine, theirs = function_of(model), function_of(before)
    for name in [*dict.fromkeys([*mine, *theirs])]:
        if mine.get(name) != theirs.get(name):
            toml = opened.path / "config.toml"
            hint = f"[model] of {toml} fits" if toml.is_file() else ""
            raise UserError(f"{where}: {name} is {theirs.get(name)!r} there and {mine.get(name)!r} here", hint)


def _cast(tree: Params, dtype: np.dtype) -> Params:
    return {
        name: _cast(leaf, dtype) if isinstance(leaf, dict) else np.asarray(leaf, dtype) for name, leaf in tree.items()
    }

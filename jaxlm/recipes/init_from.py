"""Where the parameters of a new run come from, if not from its seed: `train.init_from`.

Shapes: D width, C numbers that a head gives for a token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm import config
from jaxlm.convert import adapters, native
from jaxlm.convert.base import base_digest, cast, takes_the_trunk, with_head
from jaxlm.convert.canonical import fill
from jaxlm.convert.open_model import Opened, open_model
from jaxlm.convert.settings import function_of
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, Params
from jaxlm.numerics import Policy
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train.adapters import new_adapters, targets
from jaxlm.train.recipe import Trained

FREE = ("dropout", "remat", "attention_impl", "layer_loop")
"""Options of `[model]` that a run sets for itself when it takes the model of `train.init_from`."""
HEAD = ("head", "classes", "pooling")
"""Those that it may set: where it says nothing the head is that of `train.init_from`."""


def initial_params(cfg: config.Config, tokenizer: Tokenizer, path: str, model: config.Model) -> Params:
    """The parameters of the model at `path`, as the live tree of `model` in numpy arrays.

    A model that scores may begin with one of another head: it takes the trunk, and its own head is drawn from the seed,
    the same in both frameworks.

    Raises:
        UserError: there is no model, it computes another function than `model` (but RoPE may be stretched from the
            length that it had), or it was trained with another tokenizer than `tokenizer`.
    """
    opened = open_model(path)
    where = f"train.init_from = {path!r}" if path == cfg.train.init_from else path
    require_same_function(model, opened, where)
    _require_same_tokenizer(tokenizer, opened, where)
    parameters = with_head(opened.parameters, model, opened.config.model, cfg.seed)
    params = fill(parameters, model)
    return cast(params, np.dtype(cfg.numerics.params))


def read_params(path: str, model: config.Model, dtype: str, tokenizer: Tokenizer | None = None) -> Params:
    """The parameters of the model at `path`, as the live tree of `model` in numpy arrays.

    Raises:
        UserError: there is no model, it computes another function than `model`, or it was trained with another
            tokenizer than `tokenizer`, if that is given.
    """
    opened = open_model(path)
    require_same_function(model, opened, path)
    if tokenizer is not None:
        _require_same_tokenizer(tokenizer, opened, path)
    return cast(fill(opened.parameters, model), np.dtype(dtype))


def function_digest(*models: config.Model) -> str:
    """sha256 (hex) of what decides the functions that models compute, beside their parameters."""
    return hashlib.sha256(json.dumps([function_of(model) for model in models], default=str).encode()).hexdigest()


def with_base(cfg: config.Config) -> config.Config:
    """The config with `[model]` and `[tokenizer]` of `train.init_from`, where it has none of its own.

    Raises:
        UserError: there is no model.
    """
    asked = [name for name in HEAD if getattr(cfg.model, name) != getattr(config.Model(), name)]
    own = {name: getattr(cfg.model, name) for name in (*FREE, *asked)}
    if dataclasses.replace(config.Model(max_seq_len=cfg.model.max_seq_len), **own) != cfg.model:
        return cfg
    opened = open_model(cfg.train.init_from)
    changes: dict[str, Any] = {"model": dataclasses.replace(opened.config.model, **own)}
    if cfg.tokenizer == config.Tokenizer() and opened.tokenizer_path:
        changes["tokenizer"] = config.Tokenizer(kind="file", path=str(opened.tokenizer_path))
    return dataclasses.replace(cfg, **changes)


class ParameterLayout(NamedTuple):
    """How an engine takes parameters."""

    parameters: Callable[[Params, config.Model], Any]
    """Of the live tree of a model."""
    adapters: Callable[[Params, Trained, config.Config], Any]
    """The first adapters of a tree, for its base."""
    maps: Callable[[Params], Any]
    """The first values of linear maps that are no model."""


def _first_adapters(base: Params, tree: Trained, cfg: config.Config) -> Params:
    return new_adapters(Decoder(tree.model, Policy.from_config(cfg.numerics)), _options(tree), base, cfg.seed)


def _first_adapters_by_name(base: Params, tree: Trained, cfg: config.Config) -> dict[str, Any]:
    with jax.enable_x64(True):  # the shapes of float64, which PyTorch always has
        sites = targets(Decoder(tree.model, Policy.from_config(cfg.numerics)), _options(tree))
        return dict(adapters.to_torch(_first_adapters(base, tree, cfg), sites, tree.model))


def _options(tree: Trained) -> config.LoRA:
    assert tree.adapters is not None, "only trees with adapters are asked for some"
    return tree.adapters


LIVE = ParameterLayout(lambda params, model: params, _first_adapters, lambda maps: maps)
BY_NAME = ParameterLayout(
    lambda params, model: dict(native.to_torch(params, model)),
    _first_adapters_by_name,
    lambda maps: dict(native.maps_to_torch(maps)),
)
"""By the names of torch_ref."""


def _require_same_tokenizer(tokenizer: Tokenizer, opened: Opened, where: str) -> None:
    theirs = opened.tokenizer_path
    if theirs and Tokenizer.from_file(theirs).fingerprint() != tokenizer.fingerprint():
        hint = f"tokenizer.kind=file tokenizer.path={theirs}"
        raise UserError(f"{where}: its tokenizer is another than that of [tokenizer]", hint)


def require_same_function(model: config.Model, opened: Opened, where: str) -> None:
    """Refuse a model that computes another function than `model`; a head may be new, and RoPE stretched.

    Raises:
        UserError: names the first option that differs, with both values.
    """
    before = opened.config.model
    if model.head == "lm" != before.head:
        hint = "a model that scores is no language model: name the one that it began with"
        raise UserError(f"{where}: head is {before.head!r} there and 'lm' here", hint)
    if takes_the_trunk(model, before):
        before = dataclasses.replace(before, head=model.head, classes=model.classes, pooling=model.pooling)
    if model.rope_scaling.original_max_seq_len == (before.max_seq_len or None):  # a stage of longer texts
        before = dataclasses.replace(before, rope_scaling=model.rope_scaling, max_seq_len=model.max_seq_len)
    mine, theirs = function_of(model), function_of(before)
    for name in [*dict.fromkeys([*mine, *theirs])]:
        if mine.get(name) != theirs.get(name):
            toml = opened.path / "config.toml"
            hint = f"[model] of {toml} fits" if toml.is_file() else ""
            raise UserError(f"{where}: {name} is {theirs.get(name)!r} there and {mine.get(name)!r} here", hint)


__all__ = [
    "BY_NAME",
    "LIVE",
    "ParameterLayout",
    "base_digest",
    "function_digest",
    "initial_params",
    "read_params",
    "require_same_function",
    "with_base",
]

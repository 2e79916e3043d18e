"""One file a training stage: a function from a config to its `Recipe`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from jaxlm import config
from jaxlm.errors import UserError, did_you_mean
from jaxlm.train.recipe import Recipe

RECIPES = {
    "pretrain": "jaxlm.recipes.pretrain:recipe",
    "sft": "jaxlm.recipes.sft:recipe",
    "answers": "jaxlm.recipes.answers:recipe",
    "dpo": "jaxlm.recipes.dpo:recipe",
    "distill": "jaxlm.recipes.distill:recipe",
    "grpo": "jaxlm.recipes.grpo:recipe",
    "ppo": "jaxlm.recipes.ppo:recipe",
    "reward": "jaxlm.recipes.reward:recipe",
}
"""The stages by name, as `module:function`; a config may also name a `module:function` of its own."""


def make_recipe(cfg: config.Config) -> Recipe:
    """The stage that `cfg.recipe` names.

    Raises:
        UserError: there is no such recipe, or its module cannot be imported.
    """
    where = RECIPES.get(cfg.recipe, cfg.recipe)
    module, colon, name = where.partition(":")
    if not colon:
        raise UserError(f"recipe = {cfg.recipe!r}: no such recipe", did_you_mean(cfg.recipe, RECIPES))
    try:
        build: Callable[[config.Config], Recipe] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"recipe = {cfg.recipe!r}: {error}", "name MODULE:FUNCTION as Python imports it") from None
    recipe = build(cfg)
    if cfg.lora.rank and not any(tree.adapters for tree in recipe.models.trained.values()):
        raise UserError(f"lora.rank = {cfg.lora.rank}: the recipe {cfg.recipe!r} trains no adapters", "lora.rank=0")
    return recipe

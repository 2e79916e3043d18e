"""Supervised fine-tuning: next-token cross-entropy on what an assistant says in conversations.

jaxlm train runs/base/config.toml recipe=sft train.init_from=runs/base data.source=examples.jsonl out_dir=runs/sft
"""

from __future__ import annotations

from jaxlm import config
from jaxlm.data.turns.source import ConversationSource
from jaxlm.recipes.pretrain import objective
from jaxlm.train.judges import language_judge
from jaxlm.train.recipe import LM_COLUMNS, MODEL, Models, Objective, Recipe, model_of_run, twin


def recipe(cfg: config.Config) -> Recipe:
    """Fine-tuning of `cfg.model` on the conversations of `data.source`, by the options of `[sft]`.

    The objective is that of pre-training; the weights of the rows say which tokens count.
    """
    cfg.model.require_language_model("the recipe sft")
    return Recipe(
        columns=LM_COLUMNS,
        models=Models({MODEL: model_of_run(cfg)}),
        objective=Objective(objective, twin("torch_ref.recipes.pretrain")),
        data=lambda tokenizer: ConversationSource.open(cfg, tokenizer),
        judge=language_judge,
    )

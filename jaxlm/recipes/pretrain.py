"""Pretraining: next-token cross-entropy on packed documents.

jaxlm train configs/quickstart.toml
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxlm import config
from jaxlm.data.corpus_source import CorpusSource
from jaxlm.recipes.forward import forward, with_routing
from jaxlm.train.judges import language_judge
from jaxlm.train.recipe import LM_COLUMNS, MODEL, Models, Objective, Recipe, model_of_run, twin

if TYPE_CHECKING:
    from jaxlm.models.decoder import Decoder
    from jaxlm.train.step import LossFn


def recipe(cfg: config.Config) -> Recipe:
    """Pretraining of `cfg.model` on the corpus of `[data]`."""
    cfg.model.require_language_model("the recipe pretrain")
    return Recipe(
        columns=LM_COLUMNS,
        models=Models({MODEL: model_of_run(cfg)}),
        objective=Objective(objective, twin("torch_ref.recipes.pretrain")),
        data=lambda tokenizer: CorpusSource.open(cfg, tokenizer),
        judge=language_judge,
    )


def objective(modules: Mapping[str, Decoder], cfg: config.Config) -> LossFn:
    """Cross-entropy of the model, for `train.step`."""
    return loss_fn(modules[MODEL], cfg.train)


def loss_fn(decoder: Decoder, train: config.Train) -> LossFn:
    """The language-model objective of `decoder`: the sum over targets, balancing terms of experts included."""
    from jaxlm.mesh import over_rows
    from jaxlm.objectives.lm import lm_loss

    loss = functools.partial(
        lm_loss, z_loss=train.z_loss, label_smoothing=train.label_smoothing, block=train.loss_block
    )

    def compute(params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        hidden_BTD, head, routed = forward(decoder, params, batch, key)
        # each device sums over its own rows, and the sums are added once
        terms = over_rows(
            lambda head, rows: loss(rows[0], *head, *rows[1:]),
            head,
            (hidden_BTD, batch["targets"], batch["weights"]),
        )
        sums = {"loss": terms.loss, "nll": terms.nll, "accuracy": terms.correct, "weight": terms.weight}
        found = with_routing(sums, routed)
        return found["loss"], found

    return compute

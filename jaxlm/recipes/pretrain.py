"""Pretraining: next-token cross-entropy on packed documents.

jaxlm train configs/quickstart.toml
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxlm import config
from jaxlm.data.corpus_source import CorpusSource
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
    """The language-model objective of `decoder`: the mean over targets, balancing terms of experts included."""
    from jaxlm.mesh import over_rows
    from jaxlm.models import adapted
    from jaxlm.objectives.lm import lm_loss
    from jaxlm.train.expert_balance import collect

    options: Any = {"z_loss": train.z_loss, "label_smoothing": train.label_smoothing, "block": train.loss_block}

    def compute(params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        variables, rows = adapted.variables(params), (batch["tokens"], batch["positions"], batch["segments"])
        random = decoder.config.random or isinstance(params, adapted.Adapted)
        rngs = {} if key is None or not random else {"dropout": key}
        applied: Any = decoder.apply(variables, *rows, method="hidden", rngs=rngs, mutable=["routing"])
        (hidden_BTD, _), collections = applied
        unembedding: Any = decoder.apply(variables, method="unembedding")
        # each device sums over its own rows, and the sums are added once
        terms = over_rows(
            lambda head, rows: lm_loss(rows[0], *head, *rows[1:], **options),
            unembedding,
            (hidden_BTD, batch["targets"], batch["weights"]),
        )
        sums = {"loss": terms.loss, "nll": terms.nll, "accuracy": terms.correct, "weight": terms.weight}
        if decoder.config.moes:
            routed = collect(collections["routing"], decoder.config)
            sums |= {name: term * terms.weight for name, term in routed.means.items()} | routed.counts
            sums["loss"] = terms.loss + routed.loss * terms.weight
        return sums["loss"], sums

    return compute

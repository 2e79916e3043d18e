"""A reward model from pairs: a score of the last token of each answer (Stiennon et al. 2020; Ouyang et al. 2022).

    jaxlm train configs/preference/reward.toml

Shapes: B rows, T tokens, M segments, P = M / 2 pairs of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxlm import config
from jaxlm.data.preferences.source import PreferenceSource
from jaxlm.errors import UserError
from jaxlm.recipes.dpo import pair_columns
from jaxlm.recipes.forward import with_routing
from jaxlm.run.pair_scores import PairScores
from jaxlm.train.recipe import MODEL, Judge, Models, Objective, Recipe, RowFunction, model_of_run, twin


def recipe(cfg: config.Config) -> Recipe:
    """The stage `reward`: `cfg.model` learns which of two answers was chosen.

    Raises:
        UserError: the model has another head than `reward`.
    """
    if cfg.model.head != "reward":
        raise UserError(f"the recipe reward: model.head = {cfg.model.head!r} scores no answer", 'model.head = "reward"')
    return Recipe(
        columns=pair_columns(cfg.preference.pairs_per_row),
        models=Models({MODEL: model_of_run(cfg)}),
        objective=Objective(objective, twin("torch_ref.recipes.reward")),
        data=lambda own: PreferenceSource.open(cfg, own, ties=True),
        judge=lambda source: Judge(
            figures,
            "validation_accuracy",
            lower_is_better=False,
            examine=functools.partial(examine, cfg, source),
            describe=described,
            loss_unit="a pair",
        ),
    )


def figures(sums: Mapping[str, float]) -> dict[str, float]:
    """How often the chosen answer of held-out pairs scores higher, and how often it is the longer one."""
    names = {"loss": "loss", "correct": "accuracy", "longer": "longer", "chosen": "chosen", "rejected": "rejected"}
    means = {f"validation_{name}": sums[ours] / max(sums["weight"], 1) for ours, name in names.items()}
    return means | {"validation_pairs": sums["weight"]}


def described(values: Mapping[str, float]) -> str:
    """One line for the terminal."""
    return (
        f"{values['validation_accuracy']:.1%} of {values['validation_pairs']:,.0f} pairs right (the longer answer: "
        f"{values['validation_longer']:.1%}), AUC {values['validation_auc']:.3f}, calibration error "
        f"{values['validation_ece']:.3f}, loss {values['validation_loss']:.4f} a pair"
    )


def examine(cfg: config.Config, source: Any, engine: Any) -> dict[str, float]:
    """Score the held-out pairs of the first `eval.batches` batches, in both orders of the answers of each.

    The run keeps the scores for its report page. `validation_unscored` counts the pairs that have none: those of later
    batches, and those whose score is no finite number.
    """
    (pairs,) = source.validation
    compute, most = functools.partial(engine.map_rows, SCORES), cfg.eval.batches
    scores, swapped = (
        source.by_answer("held_out_0", compute, engine, batches=most, swapped=order) for order in (False, True)
    )
    found = PairScores.of(scores, swapped, pairs.lengths, pairs.ties)
    if engine.process_index == 0:
        found.write(Path(cfg.out_dir))
    beside = {name: value for name, value in found.figures().items() if name not in ("accuracy", "longer")}
    beside["unscored"] = float(len(pairs) - len(found.chosen))
    return {f"validation_{name}": value for name, value in beside.items()}


def document_scores(modules: Mapping[str, Any], cfg: config.Config) -> Callable[..., Any]:
    """`(params, frozen, batch) -> [B, M]`: the score of each answer."""
    from jaxlm.models import adapted

    decoder = modules[MODEL]

    def compute(params: Any, frozen: Any, batch: Mapping[str, Any]) -> Any:
        places, documents = (batch["tokens"], batch["positions"], batch["segments"]), 2 * batch["margins"].shape[1]
        return decoder.apply(adapted.variables(params), *places, documents, method="score_documents")[0][..., 0]

    return compute


SCORES = RowFunction(document_scores, twin("torch_ref.recipes.reward", "document_scores"))


def objective(modules: Mapping[str, Any], cfg: config.Config) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`(params, frozen, batch, key) -> (sum, sums)`: the loss of Bradley and Terry's model on the pairs of each row."""
    import jax.numpy as jnp

    from jaxlm.models import adapted
    from jaxlm.objectives.reward import reward_loss
    from jaxlm.train.expert_balance import collect

    decoder, options = modules[MODEL], cfg.reward.loss_options

    def compute(params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        random: Any = decoder.config.random or isinstance(params, adapted.Adapted)
        rngs: Any = {"dropout": key} if random and key is not None else {}
        places, documents = (batch["tokens"], batch["positions"], batch["segments"]), 2 * batch["margins"].shape[1]
        (scores_BM1, present_BM), collections = decoder.apply(
            adapted.variables(params), *places, documents, method="score_documents", rngs=rngs, mutable=["routing"]
        )
        scores_BM = scores_BM1[..., 0]
        terms = reward_loss(scores_BM, present_BM, batch["margins"].astype(scores_BM.dtype), batch["ties"], **options)
        found = dict(terms._asdict())
        # The trivial judge beside it, who takes the longer answer: half a point where both are as long.
        lengths_BM = (batch["segments"][..., None] == jnp.arange(1, documents + 1)).sum(1)
        longer_BP = 0.5 * (1 + jnp.sign(lengths_BM[:, 0::2] - lengths_BM[:, 1::2]))
        found["longer"] = (longer_BP * (present_BM[:, 0::2] & present_BM[:, 1::2])).sum().astype(scores_BM.dtype)
        routed = collect(collections["routing"], decoder.config) if decoder.config.moes else None
        found = with_routing(found, routed)
        return found["loss"], found

    return compute

"""A reward model from pairs: a score of the last token of each answer (Stiennon et al. 2020; Ouyang et al. 2022).

    jaxlm train configs/preference/reward.toml

Shapes: B rows, T tokens, M segments, P = M / 2 pairs of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxlm import config
from jaxlm.data.preferences.source import PreferenceSource
from jaxlm.errors import UserError
from jaxlm.recipes.dpo import pair_columns
from jaxlm.recipes.forward import with_routing
from jaxlm.train.recipe import MODEL, Judge, Models, Objective, Recipe, Trained, twin


def recipe(cfg: config.Config) -> Recipe:
    """The stage `reward`: `cfg.model` learns which of two answers was chosen.

    Raises:
        UserError: the model has another head than `reward`.
    """
    if cfg.model.head != "reward":
        raise UserError(f"the recipe reward: model.head = {cfg.model.head!r} scores no answer", 'model.head = "reward"')
    return Recipe(
        columns=pair_columns(cfg.preference.pairs_per_row),
        models=Models({MODEL: Trained(cfg.model, cfg.train)}),
        objective=Objective(objective, twin("torch_ref.recipes.reward")),
        data=lambda own: PreferenceSource.open(cfg, own, ties=True),
        judge=lambda _: Judge(figures, "validation_accuracy", lower_is_better=False, describe=described),
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
        f"{values['validation_longer']:.1%}), loss {values['validation_loss']:.4f} a pair"
    )


def objective(modules: Mapping[str, Any], cfg: config.Config) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`(params, frozen, batch, key) -> (sum, sums)`: the loss of Bradley and Terry's model on the pairs of each row."""
    import jax.numpy as jnp

    from jaxlm.objectives.reward import reward_loss
    from jaxlm.train.expert_balance import collect

    decoder, options = modules[MODEL], cfg.reward.loss_options

    def compute(params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        random: Any = {} if key is None or not decoder.config.random else {"dropout": key}
        places, documents = (batch["tokens"], batch["positions"], batch["segments"]), 2 * batch["margins"].shape[1]
        (scores_BM1, present_BM), collections = decoder.apply(
            {"params": params}, *places, documents, method="score_documents", rngs=random, mutable=["routing"]
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

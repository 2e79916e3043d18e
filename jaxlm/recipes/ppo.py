"""Proximal policy optimisation with a value model (Schulman et al. 2017; Ouyang et al. 2022).

    jaxlm train configs/rl/ppo-add.toml

The value model has the head `value` and begins with the trunk of the policy, or of `rl.value_from`, such as a reward
model. With `rl.value_trunk = "shared"` it is a linear map of the policy's hidden states, which both losses then move.

Shapes: B samples, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.recipes import grpo
from jaxlm.recipes.forward import forward
from jaxlm.recipes.rollouts.jax_actor import JaxActor
from jaxlm.recipes.rollouts.phases import Batch, Drawn, Phases
from jaxlm.recipes.rollouts.source import MEASURES, RolloutData, Stage
from jaxlm.train.recipe import MODEL, Judge, Maps, Models, Objective, Recipe, Trained, model_of_run, twin

VALUE, HEAD = "value", "head"
CREDIT = ("advantages", "returns", "old_values")
"""What a phase knows of each token beside its log-probabilities."""


def recipe(cfg: config.Config) -> Recipe:
    """The stage `ppo`.

    Raises:
        UserError: nothing rewards a sample, or the divergence from the start is asked for and there is no start.
    """
    cfg.model.require_language_model("the recipe ppo")
    if not cfg.rl.rewards:
        raise UserError("PPO without a reward: rl.rewards is empty", 'rl.rewards = ["exact_text"]')
    return Recipe(
        columns=grpo.columns(cfg, STAGE),
        models=models(cfg),
        objective=Objective(
            objective,
            twin("torch_ref.recipes.ppo"),
            update_if=cfg.rl.stays_near if cfg.rl.stop_kl else None,
            divisors={**grpo.BY_TOKENS, "value_clip_share": "tokens", "squared_error": "tokens"},
        ),
        data=lambda own: RolloutData(cfg, own, STAGE),
        judge=lambda _: Judge(grpo.figures, "answer_nll", describe=grpo.described, loss_unit=""),
    )


def models(cfg: config.Config) -> Models:
    """The policy, its value model or the map from its hidden states, and its reference."""
    trained, value = {MODEL: model_of_run(cfg)}, value_tree(cfg)
    if cfg.rl.value_trunk == "own":
        return Models({**trained, VALUE: value}, grpo.references(cfg))
    return Models(trained, grpo.references(cfg), {VALUE: Maps({HEAD: (cfg.model.d_model, 1)}, value.train)})


def value_tree(cfg: config.Config) -> Trained:
    """The value model: the policy's architecture with a head of its own, and a learning rate of its own.

    With `[lora]` its trunk has adapters as the policy's has, over a base of its own; its head is trained whole.
    """
    rate = cfg.rl.value_learning_rate or cfg.train.learning_rate
    model = dataclasses.replace(cfg.model, head="value")
    train = dataclasses.replace(cfg.train, learning_rate=rate)
    saved = tuple(name for name in cfg.lora.modules_to_save if name != "head")
    lora = dataclasses.replace(cfg.lora, modules_to_save=saved) if cfg.lora.rank else None
    return Trained(model, train, path=cfg.rl.value_from or cfg.train.init_from, adapters=lora)


def objective(modules: Mapping[str, Any], cfg: config.Config) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`(trained, frozen, batch, key) -> (sum, sums)`: policy and value loss, both divided by what `rl.divisor` says."""
    from jaxlm.objectives.value import value_loss

    policy, rl, models = grpo.of_hidden_states(cfg), cfg.rl, (modules[MODEL], modules.get(VALUE))

    def compute(trained: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        hidden_BTD, head, routed = forward(modules[MODEL], trained[MODEL], batch, key)
        loss, found = policy(hidden_BTD, head, routed, batch)
        values_BT = values_of(models, trained, batch, hidden_BTD)
        weights_BT = batch["weights"].astype(values_BT.dtype)
        terms = value_loss(values_BT, batch["old_values"], batch["returns"], weights_BT, clip=rl.value_clip)
        found |= {"value_loss": terms.loss, "value_clip_share": terms.clipped, "squared_error": terms.squared_error}
        found["loss"] = loss + rl.value_weight * terms.loss
        return found["loss"], found

    return compute


def values_of(
    modules: tuple[Any, Any], params: Mapping[str, Any], batch: Mapping[str, Any], hidden_BTD: Any = None
) -> Any:
    """The value of the state after each token [B, T].

    Args:
        modules: the policy and its value model, from which nothing is dropped out. None in its place: the policy's
            hidden states are mapped.
        hidden_BTD: those states; None: they are computed, and nothing is dropped out.
    """
    from jaxlm.models.adapted import variables

    policy, value = modules
    if value is None:
        known = hidden_BTD is not None
        return mapped(hidden_BTD if known else forward(policy, params[MODEL], batch, None)[0], params[VALUE])
    applied: Any = value.apply(variables(params[VALUE]), batch["tokens"], batch["positions"], batch["segments"])
    return applied[0][..., 0]


def mapped(hidden_BTD: Any, maps: Any) -> Any:
    """The value of each hidden state [B, T], float32 or wider."""
    from jaxlm.numerics import wide

    width = wide(hidden_BTD.dtype)
    return (hidden_BTD.astype(width) @ maps[HEAD]["kernel"].astype(width))[..., 0]


class CriticPhases(Phases):
    """Phases whose advantages come from values."""

    def credit(self, actor: Any, batch: Batch, samples: Sequence[Drawn]) -> Batch:
        rewards_B = np.array([sample.reward or 0.0 for sample in samples], np.float64)
        cut_B = np.array([sample.ended == "length" for sample in samples])
        last_B = np.array([len(sample.prompt_ids) + len(sample.ids) - 1 for sample in samples])
        return actor.credit(batch, rewards_B, cut_B, last_B, self.kl_weight)

    def measured(self, batch: Batch) -> dict[str, float]:
        """How much of the returns the value model knew: 1 - var(G - V) / var(G), 0 where all returns are equal."""
        drawn_BT = batch["weights"] > 0
        returns, values = batch["returns"][drawn_BT], batch["old_values"][drawn_BT]
        variance = float(returns.var()) if returns.size else 0.0
        return {"explained_variance": 1 - float((returns - values).var()) / variance if variance else 0.0}


class JaxCritic(JaxActor):
    """Policy and value model in JAX."""

    def __init__(self, engine: Any, cfg: config.Config, *, eos_id: int, pad: int) -> None:
        policy = engine.tree(MODEL)
        reference, whole = grpo.reference_of(engine, policy), engine.params
        super().__init__(engine.decoder, policy, reference, cfg, eos_id=eos_id, pad=pad, whole=whole)
        self.modules = engine.decoder, engine.program.modules.get(VALUE)
        self.trained = {MODEL: policy, VALUE: engine.tree(VALUE)}

    def credit(
        self, batch: Batch, rewards_B: np.ndarray, cut_B: np.ndarray, last_B: np.ndarray, kl_weight: float
    ) -> Batch:
        """Advantages (whitened), returns and values of every drawn token."""
        import jax

        names = ("tokens", "positions", "segments", "weights", *self.config.rl.columns)
        arrays = {name: batch[name] for name in names}
        compute: Any = jax.jit(_credit, static_argnums=(0, 1))
        with jax.default_matmul_precision(self.config.numerics.matmul):  # as in the step
            found = compute(self.modules, self.config.rl, self.trained, arrays, rewards_B, cut_B, last_B, kl_weight)
        return {name: np.asarray(x) for name, x in zip(CREDIT, found, strict=True)}


def actor_of(engine: Any, cfg: config.Config, **ends: int) -> JaxCritic:
    """Policy and value model of an engine as they stand."""
    return JaxCritic(engine, cfg, **ends)


STAGE = Stage("ppo", actor_of, CriticPhases, CREDIT, (*MEASURES, "explained_variance"))


def _credit(
    modules: Any, rl: config.RL, params: Any, batch: Any, rewards_B: Any, cut_B: Any, last_B: Any, kl_weight: Any
) -> Any:
    import jax.numpy as jnp

    from jaxlm.objectives.advantages import gae, token_rewards, whiten

    values_BT = values_of(modules, params, batch)
    weights_BT = batch["weights"].astype(values_BT.dtype)
    reference = batch["reference_logps"] if rl.kl == "reward" else None
    spoken = batch.get("old_logps", values_BT)
    rewards_BT = token_rewards(spoken, reference, rewards_B.astype(values_BT.dtype), weights_BT, kl_weight=kl_weight)
    after_B = jnp.take_along_axis(values_BT, last_B[:, None], axis=1)[:, 0]
    credit = gae(rewards_BT, values_BT, weights_BT, jnp.where(cut_B, after_B, 0), discount=rl.discount, lam=rl.lam)
    return whiten(credit.advantages, weights_BT), credit.returns, values_BT

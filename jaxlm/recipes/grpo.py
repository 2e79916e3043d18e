"""Group-relative policy optimisation and its relatives: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO by switches of `[rl]`.

    jaxlm train configs/rl/grpo-add.toml

Shapes: B samples, T tokens, C drawn tokens of a sample at most, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.recipes.forward import drawn_tokens, forward, with_routing
from jaxlm.recipes.rollouts.jax_actor import JaxActor
from jaxlm.recipes.rollouts.source import RolloutData, Stage
from jaxlm.train.recipe import LM_COLUMNS, MODEL, Column, Frozen, Judge, Models, Objective, Recipe, model_of_run, twin

REFERENCE = "reference"
BY_TOKENS: dict[str, str] = dict.fromkeys(
    ("logp", "clip_share", "kl_old", "kl_reference", "entropy", "mismatch", "mismatch_kl"), "tokens"
)
"""Metrics that are means over trained tokens, whatever `rl.divisor` divides the loss by."""


def recipe(cfg: config.Config) -> Recipe:
    """The stage `grpo`.

    Raises:
        UserError: the divergence from the start is asked for, and there is no start.
    """
    rl = cfg.rl
    cfg.model.require_language_model("the recipe grpo")
    if rl.group < 2:
        raise UserError("rl.group = 1: a sample alone has nothing to be measured against", "rl.group=8")
    return Recipe(
        columns=columns(cfg, STAGE),
        models=Models({MODEL: model_of_run(cfg)}, references(cfg)),
        objective=Objective(
            objective,
            twin("torch_ref.recipes.grpo"),
            update_if=rl.stays_near if rl.stop_kl else None,
            divisors=BY_TOKENS,
        ),
        data=lambda own: RolloutData(cfg, own, STAGE),
        judge=lambda _: Judge(figures, "answer_nll", describe=described, loss_unit=""),
    )


def columns(cfg: config.Config, stage: Stage) -> dict[str, Column]:
    """What the batches of a stage hold."""
    beside = dict.fromkeys((*stage.credit, *cfg.rl.columns), Column("float32", ("batch", "seq")))
    return LM_COLUMNS | beside | dict.fromkeys((*stage.measures, *cfg.rl.measures), Column("float32", ()))


def references(cfg: config.Config) -> dict[str, Frozen]:
    """Where the policy started, if the divergence from it is asked for and no base of adapters is it.

    Raises:
        UserError: it is, and the policy starts nowhere.
    """
    if cfg.rl.kl == "none":
        return {}
    if not cfg.train.init_from:
        where = f"rl.kl = {cfg.rl.kl!r} holds the model near its start, and there is none"
        raise UserError(where, "train.init_from=RUN")
    if cfg.lora.keeps_base:
        return {}
    return {REFERENCE: Frozen(cfg.model, cfg.train.init_from, cfg.numerics.params)}


def figures(sums: Mapping[str, float]) -> dict[str, float]:
    """How likely the model finds the right answers to held-out prompts."""
    nll = -sums["logp"] / max(sums["tokens"], 1)
    return {"validation_loss": nll, "answer_nll": nll, "validation_entropy": sums["entropy"] / max(sums["tokens"], 1)}


def described(values: Mapping[str, float]) -> str:
    """One line for the terminal."""
    return f"right answers: {values['answer_nll']:.4f} nats a token"


def objective(modules: Mapping[str, Any], cfg: config.Config) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`(params, frozen, batch, key) -> (sum, sums)`: the clipped policy gradient, for `train.step`."""
    decoder, policy = modules[MODEL], of_hidden_states(cfg)

    def compute(params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        return policy(*forward(decoder, params, batch, key), batch)

    return compute


def of_hidden_states(cfg: config.Config) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`(hidden [B, T, D], head, routed, batch) -> (sum, sums)`: the same, of what `recipes.forward` returns."""
    from jax.lax import stop_gradient

    from jaxlm.objectives.logprobs import token_logps
    from jaxlm.objectives.policy import correction_weights, mismatch, policy_loss

    rl = cfg.rl
    speak = functools.partial(token_logps, temperature=rl.temperature, block=cfg.train.loss_block)

    def compute(hidden_BTD: Any, head: Any, routed: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        hidden_BCD, batch = drawn_tokens(hidden_BTD, batch, rl.max_new_tokens)
        kernel_DV, bias_V = head
        spoken = speak(hidden_BCD, kernel_DV, bias_V, batch["targets"])
        programs = stop_gradient(batch.get("old_logps", spoken.logps)), batch["sampler_logps"], batch["weights"]
        programs = tuple(x_BT.astype(spoken.logps.dtype) for x_BT in programs)
        correction_BT = correction_weights(*programs, **rl.correction_options) if rl.correction != "none" else None
        arrays = (*policy_arrays(batch, rl), spoken.entropy, correction_BT)
        terms = policy_loss(spoken.logps, *arrays, **rl.policy_options)
        found = with_routing(reported(terms, spoken.logps, batch), routed)
        found |= dict(zip(("mismatch", "mismatch_kl"), mismatch(*programs), strict=True))
        return found["loss"], found

    return compute


def policy_arrays(batch: Mapping[str, Any], rl: config.RL) -> tuple[Any, Any, Any, Any]:
    """What `policy_loss` takes after the log-probabilities, up to the reference."""
    reference = batch.get("reference_logps") if rl.kl == "loss" else None
    return batch.get("old_logps"), batch["advantages"], batch["weights"], reference


def reported(terms: Any, logps_BT: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The sums of a step; the numbers of the phase go along, times the weight that divides them."""
    names = {"clipped": "clip_share", "kl_old": "kl_old", "kl_reference": "kl_reference", "entropy": "entropy"}
    found = {name: getattr(terms, field) for field, name in names.items()}
    found |= {name: value * terms.weight for name, value in batch.items() if value.ndim == 0}
    return {"loss": terms.loss, "weight": terms.weight, "tokens": terms.tokens, **found} | {
        "logp": (logps_BT * batch["weights"]).sum()
    }


def actor_of(engine: Any, cfg: config.Config, **ends: int) -> JaxActor:
    """The policy of an engine as it stands."""
    policy = engine.tree(MODEL)
    return JaxActor(engine.decoder, policy, reference_of(engine, policy), cfg, whole=engine.params, **ends)


def reference_of(engine: Any, policy: Any) -> Any:
    """Where the policy started: a frozen tree, or the base under its adapters; None where no loss compares with it."""
    from jaxlm.models.adapted import Adapted, base_of

    return engine.frozen.get(REFERENCE) or (base_of(policy) if isinstance(policy, Adapted) else None)


STAGE = Stage("grpo", actor_of)

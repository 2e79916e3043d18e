"""Learning from pairs of answers without a reward model: DPO and its family, by `preference.loss`.

    jaxlm train configs/preference/dpo.toml

Shapes: B rows, T tokens, M segments, P = M / 2 pairs of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxlm import config
from jaxlm.data.preferences.rows import DIVERGENCE, REFERENCE_LOGPS
from jaxlm.data.preferences.source import PreferenceSource
from jaxlm.errors import UserError
from jaxlm.recipes.forward import forward, with_routing
from jaxlm.train.recipe import (
    LM_COLUMNS,
    MODEL,
    Column,
    Frozen,
    Judge,
    Models,
    Objective,
    Recipe,
    RowFunction,
    model_of_run,
    twin,
)

REFERENCE = "reference"


def recipe(cfg: config.Config) -> Recipe:
    """The stage `dpo`.

    Raises:
        UserError: the loss compares with where the run starts, and it starts from nothing.
    """
    options = cfg.preference
    cfg.model.require_language_model("the recipe dpo")
    path = options.reference or cfg.train.init_from
    if options.needs_reference and not path:
        raise UserError(
            f"preference.loss = {options.loss!r} compares with the model that the run starts from, and there is none",
            'train.init_from=RUN, or preference.loss="simpo" or "orpo"',
        )
    if options.cached_reference and any(moe.capacity_factor for moe in cfg.model.moes):
        message = "preference.cached_reference: with moe.capacity_factor an answer depends on the others of its batch"
        raise UserError(message, "model.moe.capacity_factor=0, or preference.cached_reference=false")
    apart = options.needs_reference and not _base_is_reference(cfg)
    frozen = {REFERENCE: Frozen(cfg.model, path, cfg.numerics.params)} if apart else {}
    cached = RowFunction(reference_logps, twin("torch_ref.recipes.dpo", "reference_logps"), frozen)
    return Recipe(
        columns=pair_columns(options.pairs_per_row) | (_reference_column(cfg) if options.cached_reference else {}),
        models=Models({MODEL: model_of_run(cfg)}, {} if options.cached_reference else frozen),
        objective=Objective(
            objective,
            twin("torch_ref.recipes.dpo"),
            jax_whole=whole_divergence if options.loss == "kto" else None,
            torch_whole=twin("torch_ref.recipes.dpo", "whole_divergence") if options.loss == "kto" else None,
            cached=cached if options.cached_reference else None,
        ),
        data=lambda own: PreferenceSource.open(cfg, own, labelled=options.loss == "kto"),
        judge=lambda _: Judge(
            figures,
            "validation_accuracy",
            lower_is_better=False,
            describe=described,
            loss_unit="an answer" if options.loss == "kto" else "a pair",
        ),
    )


def _base_is_reference(cfg: config.Config) -> bool:
    """Whether the reference is the base under the adapters of the policy, of which there is then no second copy."""
    return cfg.lora.keeps_base and not cfg.preference.reference


def pair_columns(pairs_per_row: int) -> dict[str, Column]:
    """Rows of tokens, and what belongs to each pair of a row, as `data.preferences.rows` lays them."""
    dtypes = {"margins": "float32", "ties": "bool", "labels": "int32"}
    return {**LM_COLUMNS, **{name: Column(dtype, ("batch", None), pairs_per_row) for name, dtype in dtypes.items()}}


def _reference_column(cfg: config.Config) -> dict[str, Column]:
    """Log-probabilities of the answers under the reference, as wide as the loss computes."""
    dtype = "float64" if cfg.numerics.compute == "float64" else "float32"
    return {REFERENCE_LOGPS: Column(dtype, ("batch", None), 2 * cfg.preference.pairs_per_row)}


def figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over the held-out pairs. Of KTO the loss is that of labelled answers; with pairs, these are ordered too."""
    weight, counted = max(sums["weight"], 1), ("loss", "weight", "desirable", "pairs")
    means = {name: value / weight for name, value in sums.items() if name not in counted}
    if "pairs" in sums:
        sides = {"desirable_reward": sums["desirable"], "undesirable_reward": sums["weight"] - sums["desirable"]}
        means |= {name: sums[name] / max(count, 1) for name, count in sides.items()}
        paired = {name.removeprefix("pair_"): sums[name] / max(sums["pairs"], 1) for name in sums if "pair_" in name}
        means = {name: value for name, value in means.items() if "pair_" not in name}
        means |= paired if sums["pairs"] else {}
    loss = sums["loss"] / weight
    return {"validation_loss": loss, **{f"validation_{name}": value for name, value in means.items()}}


def described(values: Mapping[str, float]) -> str:
    """One line for the terminal."""
    line = f"loss {values['validation_loss']:.4f}, {values['validation_accuracy']:.1%} right"
    if "validation_margin" not in values:
        return line
    chosen = f"log-probability of the chosen {values['validation_chosen_logp']:.2f}"
    return f"{line}, margin {values['validation_margin']:.4f}, {chosen}"


def objective(modules: Mapping[str, Any], cfg: config.Config) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`(params, frozen, batch, key) -> (sum, sums)`; `frozen` holds the reference where the loss has one."""
    from jaxlm.objectives.kto import KTODivergence, labelled_sums
    from jaxlm.objectives.preference import pair_sums, preference_loss

    decoder, options, reference = modules[MODEL], cfg.preference, _reference_of(modules, cfg)

    def compute(params: Any, frozen: Mapping[str, Any], batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        logps_BM, counts_BM, routed = answer_sums(decoder, params, batch, key if options.dropout else None, cfg)
        reference_BM: Any = None
        if options.needs_reference:
            reference_BM = reference(params, frozen, batch)
        if options.loss == "kto":
            whole = [KTODivergence(*(batch[name] for name in DIVERGENCE))] if DIVERGENCE[0] in batch else []
            answers = logps_BM, counts_BM, reference_BM, batch["labels"]
            found = labelled_sums(*answers, *whole, judged=key is None, **options.loss_options)
        else:
            found = pair_sums(preference_loss(logps_BM, counts_BM, reference_BM, **options.loss_options))
        found = with_routing(found, routed)
        return found["loss"], found

    return compute


def whole_divergence(modules: Mapping[str, Any], cfg: config.Config) -> Callable[..., dict[str, Any]]:
    """`(params, frozen, batch) -> sums` of KTO's divergence, for batches that are cut into microbatches."""
    from jaxlm.objectives.kto import kto_divergence, of_labelled

    reference = _reference_of(modules, cfg)

    def compute(params: Any, frozen: Mapping[str, Any], batch: Any) -> dict[str, Any]:
        logps_BM, counts_BM, _ = answer_sums(modules[MODEL], params, batch, None, cfg)
        reference_BM = reference(params, frozen, batch)
        sums = kto_divergence(logps_BM, of_labelled(counts_BM, batch["labels"]), reference_BM)
        return dict(zip(DIVERGENCE, sums, strict=True))

    return compute


def _reference_of(modules: Mapping[str, Any], cfg: config.Config) -> Callable[..., Any]:
    """`(params, frozen, batch) -> [B, M]`: what the reference thinks of the answers, now or from before training."""
    if cfg.preference.cached_reference:
        return lambda params, frozen, batch: batch[REFERENCE_LOGPS]
    return reference_logps(modules, cfg)


def reference_logps(modules: Mapping[str, Any], cfg: config.Config) -> Callable[..., Any]:
    """`(params, frozen, batch) -> [B, M]`: log-probabilities of the answers under a frozen tree, or under the policy
    without its adapters."""
    from jax.lax import stop_gradient

    from jaxlm.models.adapted import base_of

    def compute(params: Any, frozen: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        if REFERENCE in modules:
            return answer_sums(modules[REFERENCE], frozen[REFERENCE], batch, None, cfg)[0]
        return stop_gradient(answer_sums(modules[MODEL], base_of(params), batch, None, cfg)[0])

    return compute


def answer_sums(
    decoder: Any, params: Any, batch: Mapping[str, Any], key: Any, cfg: config.Config
) -> tuple[Any, Any, Any]:
    """Log-probabilities of the answers and their lengths, [B, M] each, and what the routers did."""
    import jax.numpy as jnp

    from jaxlm.objectives.logprobs import segment_sums, token_logps

    hidden_BTD, (kernel_DV, bias_V), routed = forward(decoder, params, batch, key)
    logps_BT = token_logps(hidden_BTD, kernel_DV, bias_V, batch["targets"], block=cfg.train.loss_block).logps
    where = batch["weights"].astype(logps_BT.dtype), batch["segments"], 2 * batch["labels"].shape[1]
    return segment_sums(logps_BT, *where), segment_sums(jnp.ones_like(logps_BT), *where), routed

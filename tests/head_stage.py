"""A stage that only tests have: a model with a head of its own learns the labels of documents, or of their tokens.

`recipe = "tests.head_stage:recipe"` names it in a config; `model.head` says which head.
"""

from __future__ import annotations

from typing import Any

from jaxlm.train.recipe import LM_COLUMNS, Column, Models, Objective, Recipe, Trained
from tests.toy_stage import DOCUMENTS, JUDGE, Pairs


def recipe(cfg: Any) -> Recipe:
    columns = {**LM_COLUMNS, "labels": Column("float32", ("batch", None), DOCUMENTS)}
    models = Models({"model": Trained(cfg.model, cfg.train)})
    return Recipe(columns, models, Objective(jax_objective, torch_objective), lambda _: Pairs(cfg), lambda _: JUDGE)


def jax_objective(modules: Any, cfg: Any) -> Any:
    """Squared distance of every number of the head from the label of its document."""
    import jax.numpy as jnp

    def compute(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        rows = batch["tokens"], batch["positions"], batch["segments"]
        apply = lambda *args, **how: modules["model"].apply({"params": params}, *rows, *args, **how)[0]  # noqa: E731
        if cfg.model.head in ("reward", "classes"):
            scores, labels = apply(DOCUMENTS, method="score_documents"), batch["labels"]
        else:
            scores, labels = apply(), jnp.take_along_axis(batch["labels"], batch["segments"] - 1, axis=1)
        nll = ((scores - labels[..., None]) ** 2).sum()
        return nll, {"loss": nll, "nll": nll, "weight": jnp.asarray(scores.size, nll.dtype)}

    return compute


def torch_objective(modules: Any, cfg: Any) -> Any:
    """The twin of `jax_objective`."""
    import torch

    def compute(batch: Any) -> Any:
        rows = batch["tokens"], batch["positions"], batch["segments"]
        if cfg.model.head in ("reward", "classes"):
            scores, labels = modules["model"].score_documents(*rows, DOCUMENTS)[0], batch["labels"]
        else:
            scores = modules["model"](*rows)[0]
            labels = batch["labels"].gather(1, batch["segments"].long() - 1)
        nll = ((scores - labels[..., None]) ** 2).sum()
        return nll, {"loss": nll, "nll": nll, "weight": torch.tensor(float(scores.numel()))}

    return compute

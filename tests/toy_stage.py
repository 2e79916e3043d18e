"""A stage that only tests have: two documents a row, a label for each, a teacher of another shape, two trained trees.

`recipe = "tests.toy_stage:recipe"` names it in a config. The model learns the labels and follows a frozen teacher; a
smaller tree learns the labels too. What lies outside of the layers moves in the model, nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np

from jaxlm.data.rows.validation import HeldOut
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train.recipe import LM_COLUMNS, Column, Frozen, Judge, Models, Objective, Recipe, Trained

DOCUMENTS = 2


def recipe(cfg: Any) -> Recipe:
    """Labels of documents, one tree frozen but for its end, one small tree, one teacher drawn from the seed."""
    small = dataclasses.replace(cfg.model, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=16)
    slow = dataclasses.replace(cfg.train, learning_rate=cfg.train.learning_rate / 2, clip_norm=0.5)
    trained = {
        "model": Trained(cfg.model, cfg.train, lambda name: not name.startswith("layers.")),
        "value": Trained(small, slow),
    }
    twin = lambda *args: importlib.import_module("tests.toy_stage_torch").objective(*args)  # noqa: E731
    columns = {**LM_COLUMNS, "labels": Column("float32", ("batch", None), DOCUMENTS)}
    models = Models(trained, {"teacher": Frozen(dataclasses.replace(small, d_model=12, n_heads=3), "")})
    return Recipe(columns, models, Objective(objective, twin), lambda _: Pairs(cfg), lambda _: JUDGE)


def outside_of_layers(name: str) -> bool:
    return not name.startswith("layers.")


def objective(modules: Any, cfg: Any) -> Any:
    """Squared error of each document's mean logit of token 0, for both trees; the teacher's beside it."""
    import jax.numpy as jnp

    def compute(trained: Any, frozen: Any, batch: Any, key: Any) -> Any:
        def score(name: str, params: Any) -> Any:  # [B, M]
            rows = batch["tokens"], batch["positions"], batch["segments"]
            logits_BT = modules[name].apply({"params": params}, *rows)[0][..., 0]
            of_BTM = (batch["segments"][..., None] == jnp.arange(1, DOCUMENTS + 1)) * 1.0
            return (logits_BT[..., None] * of_BTM).sum(1) / of_BTM.sum(1)

        teacher, labels = score("teacher", frozen["teacher"]), batch["labels"]
        model, value = score("model", trained["model"]), score("value", trained["value"])
        nll = ((model - labels) ** 2 + (value - labels) ** 2 + 0.1 * (model - teacher) ** 2).sum()
        return nll, {"loss": nll, "nll": nll, "weight": jnp.asarray(labels.size, nll.dtype)}

    return compute


class Pairs:
    """Row r of step t is a function of (seed, t, r)."""

    updates_per_phase = 2

    def __init__(self, cfg: Any) -> None:
        self.cfg, self.tokenizer, self.next_index = cfg, Tokenizer.bytes_level(), 0

    def identity(self) -> dict[str, str]:
        return {"pairs": "drawn"}

    def begin_phase(self, number: int, engine: Any) -> None:
        assert number * self.updates_per_phase == self.next_index

    def batches(self, *, batch_size: int, rows: Any) -> Any:
        self.share = np.arange(batch_size) if rows is None else rows
        return self

    def held_out(self, *, batch_size: int, rows: Any, max_batches: int) -> Any:
        share = np.arange(batch_size) if rows is None else rows
        make = lambda: (draw(self.cfg, 10**6 + number, share) for number in range(max_batches or 1))  # noqa: E731
        return [HeldOut("", True, make)]

    def __next__(self) -> Any:
        self.next_index += 1
        return draw(self.cfg, self.next_index - 1, self.share)

    def get_state(self) -> dict[str, int]:
        return {"next_index": self.next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self.next_index = state["next_index"]


def draw(cfg: Any, step: int, rows: Any) -> dict[str, Any]:
    """Two documents of half a row each; the label says which begins with the larger token."""
    length = cfg.data.seq_len
    tokens = np.stack([np.random.default_rng([cfg.seed, step, row]).integers(0, 256, length) for row in rows])
    half = np.arange(length) % (length // 2), 1 + np.arange(length) // (length // 2)
    first = tokens[:, [0, length // 2]]
    whole = lambda x: np.broadcast_to(x, tokens.shape).astype(np.int32)  # noqa: E731
    batch = {"tokens": whole(tokens), "targets": whole(tokens), "positions": whole(half[0]), "segments": whole(half[1])}
    labels = (first == first.max(1, keepdims=True)).astype(np.float32)
    return batch | {"weights": np.ones(tokens.shape, np.float32), "labels": labels}


JUDGE = Judge(lambda sums: {"validation_error": sums["nll"] / sums["weight"]}, "validation_error")

"""Distillation: the mirror of `jaxlm.recipes.distill`.

Shapes: B rows, T tokens, D width of the student, E of the teacher, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jaxlm import config
from jaxlm.data.rows.teacher_cache import COLUMNS
from torch_ref.models.decoder import Decoder
from torch_ref.objectives.distill import States, distill_loss, states_loss
from torch_ref.objectives.teacher import LikeliestTokens, Teacher
from torch_ref.recipes.forward import with_routing
from torch_ref.train.expert_balance import collect
from torch_ref.train.step import Batch, LossFn, Sums


def objective(modules: Mapping[str, Any], cfg: config.Config) -> LossFn:
    """`batch -> (sum, sums)` of the decoder `model`, beside the frozen one `teacher`."""
    return _of_states(modules, cfg) if cfg.distill.of_states else _of_distributions(modules, cfg)


def _of_states(modules: Mapping[str, Any], cfg: config.Config) -> LossFn:
    student, teacher, maps = modules["model"], modules["teacher"], modules["projection"]
    pairs = cfg.distill.pairs(student.config.n_layers, teacher.config.n_layers)
    loss_of = functools.partial(states_loss, hard_weight=cfg.distill.hard_weight, block=cfg.train.loss_block)

    def compute(batch: Batch) -> tuple[Tensor, Sums]:
        rows = (batch["tokens"], batch["positions"], batch["segments"])
        student_states: dict[int, Any] = dict.fromkeys(ours for ours, _ in pairs.values())
        teacher_states: dict[int, Any] = dict.fromkeys(theirs for _, theirs in pairs.values())
        hidden_BTD, _ = student.hidden(*rows, outputs=student_states)
        with torch.no_grad():
            teacher.eval().hidden(*rows, outputs=teacher_states)
        states = [
            States(student_states[ours], teacher_states[theirs], maps[name].weight.T.to(student.policy.compute))
            for name, (ours, theirs) in pairs.items()
        ]
        kernel_DV, bias_V = student.unembedding()
        found = sums_of(loss_of(hidden_BTD, kernel_DV, bias_V, states, batch["targets"], batch["weights"]))
        found = with_routing(found, collect(student) if student.config.moes else None)
        return found["loss"], found

    return compute


def _of_distributions(modules: Mapping[str, Decoder], cfg: config.Config) -> LossFn:
    student, teacher = modules["model"], modules.get("teacher")
    common = min(tree.config.vocab_size for tree in (student, teacher) if tree is not None)
    loss_of = functools.partial(distill_loss, block=cfg.train.loss_block, **cfg.distill.loss_options)

    def thoughts(batch: Batch) -> Teacher | LikeliestTokens:
        if teacher is None:
            logps_BTK, ids_BTK, rest_BT = (batch[name] for name in COLUMNS.values())
            return LikeliestTokens(logps_BTK, ids_BTK.long(), rest_BT)
        with torch.no_grad():
            taught_BTE, _ = teacher.eval().hidden(batch["tokens"], batch["positions"], batch["segments"])
            return Teacher(taught_BTE, *common_tokens(*teacher.unembedding(), common))

    def compute(batch: Batch) -> tuple[Tensor, Sums]:
        hidden_BTD, _ = student.hidden(batch["tokens"], batch["positions"], batch["segments"])
        head = common_tokens(*student.unembedding(), common)
        terms = loss_of(hidden_BTD, *head, thoughts(batch), batch["targets"], batch["weights"])
        found = sums_of(terms)
        found = with_routing(found, collect(student) if student.config.moes else None)
        return found["loss"], found

    return compute


def common_tokens(kernel_DV: Tensor, bias_V: Tensor | None, common: int) -> tuple[Tensor, Tensor | None]:
    """The output matrix and its bias of the tokens that both vocabularies have: the first `common`."""
    if kernel_DV.shape[1] == common:
        return kernel_DV, bias_V
    return kernel_DV[:, :common], None if bias_V is None else bias_V[:common]


def sums_of(terms: Any) -> Sums:
    """The sums by their names in `metrics.jsonl`."""
    found = dict(terms._asdict())
    return found | {"accuracy": found.pop("correct")}

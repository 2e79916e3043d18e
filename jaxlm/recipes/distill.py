"""Distillation: a student learns what a frozen teacher thinks of every token, beside the token itself.

    jaxlm train configs/finetune/distill.toml

The teacher is any model with the same tokenizer, of any shape. Its parameters are read from `distill.teacher`; a
checkpoint holds their path and sha256, and a resumed run with another teacher is refused. With `distill.cache` it is
not in memory: its likeliest tokens come from files, as columns of the batch (`recipes/teach.py`). With `distill.layers`
hidden states are compared, through projections that are trained beside the student.

Shapes: B rows, T tokens, D width of the student, E of the teacher, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm import config
from jaxlm.data.corpus_source import CorpusSource
from jaxlm.data.pipeline import train_tokenizer
from jaxlm.data.rows.teacher_cache import COLUMNS
from jaxlm.data.stage_tokenizer import stage_tokenizer
from jaxlm.data.turns.source import ConversationSource
from jaxlm.errors import UserError
from jaxlm.recipes import teach
from jaxlm.recipes.forward import forward, forward_with_layers, with_routing
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train.judges import language_judge
from jaxlm.train.recipe import (
    LM_COLUMNS,
    MODEL,
    DataSource,
    Frozen,
    Judge,
    Maps,
    Models,
    Objective,
    Recipe,
    model_of_run,
    twin,
)

TEACHER, PROJECTION = "teacher", "projection"
BLOCKS = {"forward": 5, "reverse": 4, "jsd": 6}
"""How many blocks of logits of both models, and of their logarithms, stand side by side in the CPU's compiled step."""
_log = logging.getLogger(__name__)


def recipe(cfg: config.Config) -> Recipe:
    """The stage `distill`, by the options of `[distill]`.

    Raises:
        UserError: there is no teacher, or it cannot teach this student.
    """
    from jaxlm.convert.open_model import open_model

    cfg.model.require_language_model("the recipe distill")
    path = cfg.distill.teacher
    if not path:
        raise UserError("the recipe distill has no teacher", "distill.teacher=RUN, or a Hugging Face folder")
    opened = open_model(path)
    teacher = opened.config.model
    teacher.require_language_model(f"distill.teacher = {path!r}")
    if teacher.positions == "learned" and cfg.data.seq_len > teacher.max_seq_len:
        longest = f"distill.teacher = {path!r} has learned positions up to {teacher.max_seq_len}"
        raise UserError(f"{longest}, data.seq_len is {cfg.data.seq_len}", f"data.seq_len={teacher.max_seq_len}")
    words = Tokenizer.from_file(opened.tokenizer_path) if opened.tokenizer_path else None

    cached = bool(cfg.distill.cache)

    def data(own: Tokenizer | None) -> DataSource:
        with_words = _with_tokenizer(cfg, str(opened.tokenizer_path or ""))
        ours = own or _tokenizer(with_words)
        _require_same_vocabulary(cfg, ours, words, teacher.vocab_size)  # before a corpus is read for it
        source = (CorpusSource if cfg.distill.rows == "corpus" else ConversationSource).open(with_words, ours)
        return teach.with_cache(cfg, source, teacher) if cached else source

    frozen = {} if cached else {TEACHER: Frozen(teacher, path, cfg.numerics.params)}
    maps, kept = {}, 0 if cached else teacher.d_model
    blocks = 1 if cached or cfg.distill.of_states else BLOCKS[cfg.distill.divergence]
    if cfg.distill.of_states:
        width, pairs = (cfg.model.d_model, teacher.d_model), cfg.distill.pairs(cfg.model.n_layers, teacher.n_layers)
        maps = {PROJECTION: Maps(dict.fromkeys(pairs, width), cfg.train)}
        # Of each pair the states of student and teacher; the distance takes the place of the latter.
        kept = len(pairs) * sum(width)
    return Recipe(
        columns={**LM_COLUMNS, **(teach.columns(cfg, teacher) if cached else {})},
        models=Models({MODEL: model_of_run(cfg)}, frozen, maps),
        objective=Objective(objective, twin("torch_ref.recipes.distill"), kept=kept, blocks=blocks),
        data=data,
        judge=functools.partial(judge, states=cfg.distill.of_states),
    )


def _with_tokenizer(cfg: config.Config, teachers: str) -> config.Config:
    """A config without a tokenizer takes the teacher's."""
    if cfg.tokenizer != config.Tokenizer() or not teachers:
        return cfg
    return dataclasses.replace(cfg, tokenizer=config.Tokenizer(kind="file", path=teachers))


def _tokenizer(cfg: config.Config) -> Tokenizer:
    return train_tokenizer(cfg) if cfg.distill.rows == "corpus" else stage_tokenizer(cfg)


def _require_same_vocabulary(cfg: config.Config, ours: Tokenizer, theirs: Tokenizer | None, taught: int) -> None:
    """Refuse a teacher of other tokens; ids that only fill up a vocabulary may differ in number."""
    path, size = cfg.distill.teacher, cfg.model.vocab_size or ours.vocab_size
    if theirs is not None and theirs.fingerprint() != ours.fingerprint():
        hint = "train the student with it: leave [tokenizer] out of the config"
        raise UserError(f"distill.teacher = {path!r}: its tokenizer is another than the student's", hint)
    if taught < ours.vocab_size:
        ids = f"its vocabulary has {taught} tokens, the tokenizer {ours.vocab_size} ids"
        raise UserError(f"distill.teacher = {path!r}: {ids}")
    if theirs is None and taught != size:
        raise UserError(f"distill.teacher = {path!r}: its vocabulary has {taught} tokens, the student's {size}")
    if taught != size and not cfg.distill.of_states:
        common = min(taught, size)
        text = "warning: vocabularies of %d (teacher) and %d (student) tokens: the first %d of both are compared"
        _log.warning(text, taught, size, common)


def judge(source: DataSource, *, states: bool = False) -> Judge:
    """That of a language model, and the divergence beside it.

    Runs with and without a teacher compare, unless the student has more ids than its teacher: then the first ids, which
    both have, are all that is judged.
    """
    language = language_judge(source)

    def figures(sums: Mapping[str, float]) -> dict[str, float]:
        return language.figures(sums) | {"validation_divergence": sums["divergence"] / sums["weight"]}

    def describe(row: Mapping[str, float]) -> str:
        apart = f"{row['validation_divergence']:.4f}"
        what, unit = ("square distance", "") if states else ("divergence", " nats/token")
        return f"{language.describe(row)}, {what} from the teacher {apart}{unit}"

    # The loss of states is part nats, part square distance: a number without a unit.
    return language._replace(figures=figures, describe=describe, loss_unit="" if states else language.loss_unit)


def objective(modules: Mapping[str, Any], cfg: config.Config) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`(params, frozen, batch, key) -> (sum, sums)`: see `objectives.distill`."""
    return _of_states(modules, cfg) if cfg.distill.of_states else _of_distributions(modules, cfg)


def _of_states(modules: Mapping[str, Any], cfg: config.Config) -> Callable[..., tuple[Any, dict[str, Any]]]:
    from jax.lax import stop_gradient

    from jaxlm.mesh import over_rows
    from jaxlm.objectives.distill import States, states_loss

    student, teacher = modules[MODEL], modules[TEACHER]
    pairs = cfg.distill.pairs(student.config.n_layers, teacher.config.n_layers)
    ours, theirs = zip(*pairs.values(), strict=True)
    loss_of = functools.partial(states_loss, hard_weight=cfg.distill.hard_weight, block=cfg.train.loss_block)

    def loss(whole: Any, rows: Any) -> Any:
        (kernel_DV, bias_V), maps = whole
        hidden_BTD, student_states, teacher_states, targets_BT, weights_BT = rows
        states = [States(*pair) for pair in zip(student_states, teacher_states, maps, strict=True)]
        return loss_of(hidden_BTD, kernel_DV, bias_V, states, targets_BT, weights_BT)

    def compute(trained: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        hidden_BTD, head, routed, student_states = forward_with_layers(student, trained[MODEL], batch, key, ours)
        teacher_states = stop_gradient(forward_with_layers(teacher, frozen[TEACHER], batch, None, theirs)[3])
        maps = [trained[PROJECTION][name]["kernel"].astype(student.policy.compute) for name in pairs]
        rows = (hidden_BTD, student_states, teacher_states, batch["targets"], batch["weights"])
        found = with_routing(sums_of(over_rows(loss, (head, maps), rows)), routed)
        return found["loss"], found

    return compute


def _of_distributions(modules: Mapping[str, Any], cfg: config.Config) -> Callable[..., tuple[Any, dict[str, Any]]]:
    from jax.lax import stop_gradient

    from jaxlm.mesh import over_rows
    from jaxlm.objectives.distill import distill_loss
    from jaxlm.objectives.teacher import LikeliestTokens, Teacher

    student, teacher = modules[MODEL], modules.get(TEACHER)
    common = min(tree.config.vocab_size for tree in (student, teacher) if tree is not None)
    loss_of = functools.partial(distill_loss, block=cfg.train.loss_block, **cfg.distill.loss_options)

    def loss(heads: Any, rows: Any) -> Any:
        (kernel_DV, bias_V), taught_head = heads
        hidden_BTD, taught, targets_BT, weights_BT = rows
        taught = LikeliestTokens(*taught) if teacher is None else Teacher(*taught, *taught_head)
        return loss_of(hidden_BTD, kernel_DV, bias_V, taught, targets_BT, weights_BT)

    def thoughts(frozen: Any, batch: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What stands at each place of the teacher, by rows, and its output matrix."""
        if teacher is None:
            return tuple(batch[name] for name in COLUMNS.values()), ()
        taught_BTE, taught_head, _ = stop_gradient(forward(teacher, frozen[TEACHER], batch, None))
        return (taught_BTE,), common_tokens(*taught_head, common)

    def compute(params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        hidden_BTD, head, routed = forward(student, params, batch, key)
        taught, taught_head = thoughts(frozen, batch)
        # Each device sums over its own rows, and the sums are added once.
        terms = over_rows(
            loss,
            (common_tokens(*head, common), taught_head),
            (hidden_BTD, taught, batch["targets"], batch["weights"]),
        )
        found = with_routing(sums_of(terms), routed)
        return found["loss"], found

    return compute


def common_tokens(kernel_DV: Any, bias_V: Any, common: int) -> tuple[Any, Any]:
    """The output matrix and its bias of the tokens that both vocabularies have: the first `common`."""
    if kernel_DV.shape[1] == common:
        return kernel_DV, bias_V
    return kernel_DV[:, :common], None if bias_V is None else bias_V[:common]


def sums_of(terms: Any) -> dict[str, Any]:
    """The sums by their names in `metrics.jsonl`."""
    found = dict(terms._asdict())
    return found | {"accuracy": found.pop("correct")}

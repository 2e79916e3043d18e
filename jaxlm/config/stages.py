"""Options of the training stages after pretraining: `[sft]` conversations, `[lora]` adapters, `[distill]` a teacher."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from jaxlm.config.model_parts import STRICT, require
from jaxlm.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SFT:
    """Conversations, and what of them is trained. `data.source` names the file, the folder or the dataset."""

    format: str = ""
    """A name of `data.turns.formats.FORMATS`, such as `alpaca`; empty: by the keys of each record."""
    fields: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    """Our key = the key of the source, where it has another: `prompt = "question"`."""
    system: str = ""
    """A system message for conversations that have none."""
    template: str = "auto"
    """`jaxlm`, `chatml`, `llama2`, `vicuna`, `alpaca`, `plain`, a Jinja file, or `auto`: the model's own, else ours."""
    train_on: Literal["assistant", "last", "completion", "all"] = "assistant"
    """Every assistant's turn, the last one, all that follows the first prompt, or everything."""
    prompt_weight: NonNegativeFloat = 0.0
    """Weight of the tokens that are not trained on otherwise; 0: none."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What becomes of a conversation of more than `data.seq_len` tokens; one that is cut has no end."""
    pack: bool = True
    """Several conversations in a row, which do not see each other; else one a row."""
    max_examples: NonNegativeInt = 0
    """Take this many conversations, chosen by chance; 0: all."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Distill:
    """A frozen teacher, and how near its distributions the student shall come; docs/finetuning.md has the formulas."""

    teacher: str = ""
    """Any run, Hugging Face folder or GGUF file, with the same tokenizer."""
    rows: Literal["conversations", "corpus"] = "conversations"
    """What is trained on: conversations by the options of `[sft]`, or the corpus of `[data]` as in pretraining."""
    divergence: Literal["forward", "reverse", "jsd", "hidden"] = "forward"
    """KL(teacher || student), KL(student || teacher), the generalised Jensen-Shannon divergence by `beta`, or the mean
    square distance of hidden states by `layers`."""
    beta: PositiveFloat = 0.5
    """Of `jsd`, between 0 (forward) and 1 (reverse)."""
    hard_weight: NonNegativeFloat = 0.5
    """Weight of the target itself; the teacher's distribution has the rest. 0: the teacher alone."""
    temperature: PositiveFloat = 1.0
    """Divides the logits of both in the divergence."""
    layers: tuple[tuple[int, int], ...] = ((-1, -1),)
    """Pairs of a layer of the student and one of the teacher whose outputs `hidden` compares; 0 is the first
    layer, -1 the last."""
    cache: str = ""
    """Folder of what `jaxlm data teach` wrote of the teacher, which then need not be in memory; empty: it is."""
    cache_size: PositiveInt = 64
    """Likeliest tokens of each place in the cache; all others are one outcome."""

    def __post_init__(self) -> None:
        require(self.hard_weight < 1, f"distill.hard_weight = {self.hard_weight} leaves the teacher no weight: below 1")
        require(self.beta < 1, f"distill.beta = {self.beta} must be below 1", 'distill.divergence = "reverse" is 1')
        if not self.of_states:
            given = f"distill.layers = {self.layers} without hidden states"
            require(self.layers == ((-1, -1),), given, 'distill.divergence = "hidden"')
            return
        hidden = 'distill.divergence = "hidden"'
        require(bool(self.layers), f"{hidden}: distill.layers has no pair", "distill.layers = [[-1, -1]]")
        cached = f"{hidden} with distill.cache: a cache has no hidden states"
        require(not self.cache, cached, 'distill.cache = "" keeps the teacher in memory')
        hot = f"{hidden} with distill.temperature = {self.temperature}: hidden states have no logits to divide"
        require(self.temperature == 1, hot, "distill.temperature = 1.0")

    @property
    def of_states(self) -> bool:
        """Whether hidden states are compared, and not distributions."""
        return self.divergence == "hidden"

    def pairs(self, student: int, teacher: int) -> dict[str, tuple[int, int]]:
        """The pairs of `layers` by name, counted from 0, for models of so many layers: `1_to_3`.

        Raises:
            UserError: a model has no such layer, or a pair stands there twice.
        """
        found: dict[str, tuple[int, int]] = {}
        for pair in self.layers:
            for layer, count, whose in zip(pair, (student, teacher), ("student", "teacher"), strict=True):
                if not -count <= layer < count:
                    last = f"there are 0 to {count - 1}, or -1 to -{count}"
                    raise UserError(f"distill.layers: the {whose} has no layer {layer}", last)
            ours, theirs = pair[0] % student, pair[1] % teacher
            if (name := f"{ours}_to_{theirs}") in found:
                raise UserError(f"distill.layers: {[ours, theirs]} is there twice")
            found[name] = ours, theirs
        return found

    @property
    def loss_options(self) -> dict[str, Any]:
        """The options of `objectives.distill.distill_loss`, in both frameworks."""
        beta = {"forward": 0.0, "reverse": 1.0, "jsd": self.beta}[self.divergence]
        return {"beta": beta, "hard_weight": self.hard_weight, "temperature": self.temperature}


SCORE = "score"
"""The head of a model that scores."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoRA:
    """Adapters: low-rank updates that are trained while the base is frozen."""

    rank: NonNegativeInt = 0
    """Of each adapter; 0: there are none, all parameters are trained."""
    alpha: PositiveFloat = 16.0
    """The update is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the magnitude of each output besides (DoRA, Liu et al. 2024)."""
    dropout: NonNegativeFloat = 0.0
    """Share of the adapter's inputs that are dropped while training."""
    targets: tuple[str, ...] = ("mixer.*", "ffn.*")
    """Patterns of the linear maps that have one: `q_proj`, `mixer.*`, `ffn.down`, `layers.3.*`."""
    rank_pattern: dict[str, PositiveInt] = dataclasses.field(default_factory=dict[str, PositiveInt])
    """Other ranks, by pattern; the first that matches."""
    alpha_pattern: dict[str, PositiveFloat] = dataclasses.field(default_factory=dict[str, PositiveFloat])
    """Other alphas, by pattern."""
    modules_to_save: tuple[str, ...] = ()
    """Modules outside the layers that are trained whole beside the adapters: `embed`, `head`, `final_norm`. The head of
    a model that scores always is."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4`: the frozen linear maps lie in memory in four bits (QLoRA, Dettmers et al. 2023)."""
    double_quantize: bool = True
    """Their scales in eight bits."""

    def __post_init__(self) -> None:
        require(self.dropout < 1, f"lora.dropout = {self.dropout} must be below 1")
        require(
            self.quantize == "none" or self.rank > 0,
            f"lora.quantize = {self.quantize!r} needs adapters: lora.rank = 16",
        )

    def adapted(self, names: Iterable[str]) -> set[str]:
        """Those of these linear maps, by canonical names, that have an adapter.

        Raises:
            UserError: a pattern of `targets` matches none.
        """
        known = list(names)
        for key, patterns in (("targets", self.targets), ("rank_pattern", self.rank_pattern)):
            for pattern in patterns:
                if not any(matches(pattern, name) for name in known):
                    short = sorted({_inside(name) for name in known})
                    raise UserError(f"lora.{key}: {pattern!r} matches no linear map", did_you_mean(pattern, short))
        return {name for name in known if any(matches(pattern, name) for pattern in self.targets)}

    def saved(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of these modules outside the layers that are trained whole.

        Raises:
            UserError: a name of `modules_to_save` is none of them.
        """
        known = sorted(names)
        for name in self.modules_to_save:
            if name not in known:
                hint = did_you_mean(name, known) or f"there is: {', '.join(known)}"
                raise UserError(f"lora.modules_to_save: {name!r} is no module outside the layers", hint)
        return tuple(dict.fromkeys((*self.modules_to_save, *(name for name in known if name == SCORE))))

    def trains(self, name: str) -> bool:
        """Whether a parameter, by its name in torch_ref, is one of an adapter or of a module that is trained whole."""
        return ".adapter." in name or name.split(".")[0] in (*self.modules_to_save, SCORE)

    @property
    def keeps_base(self) -> bool:
        """Whether the model without its adapters is the one that the run began with."""
        return bool(self.rank) and not self.modules_to_save

    def rank_of(self, name: str) -> int:
        """The rank of the adapter of a linear map, by its canonical name."""
        return next((rank for pattern, rank in self.rank_pattern.items() if matches(pattern, name)), self.rank)

    def scale_of(self, name: str) -> float:
        """What the update is multiplied by: alpha / r, or alpha / sqrt(r)."""
        alpha = next((alpha for pattern, alpha in self.alpha_pattern.items() if matches(pattern, name)), self.alpha)
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a linear map: by its whole path, its path within a block, or its last name.

    `mixer.*`, `ffn.down`, `q_proj` and `layers.3.*` are patterns; `_proj` at the end may be left out.
    """
    names = (name, _inside(name), name.rsplit(".", 1)[-1])
    return any(fnmatch.fnmatchcase(one, pattern) for one in (*names, *(n.removesuffix("_proj") for n in names)))


def _inside(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("layers.") and name.count(".") > 1 else name


__all__ = ["SFT", "Distill", "LoRA", "matches"]

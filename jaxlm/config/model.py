"""What a model is: the section `[model]` and its parts. A block is a token mixer and a channel mixer.

    pattern = ["attention(window=1024)+mlp", "mamba", "attention+moe(n_experts=16)"]

A block is `MIXER` or `MIXER+FFN`; each half may set options of its own in parentheses, and has those of `[model]`
otherwise. This module imports neither jax nor torch, so both backends share it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from jaxlm.config.model_parts import FLOAT32_TINY, STRICT, Mamba, MoE, RopeScaling, require
from jaxlm.config.pattern import FIELDS, parse_block
from jaxlm.errors import UserError


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """The architecture: the model repeats `pattern`."""

    pattern: tuple[str, ...] = ("attention+mlp",)
    """Blocks of one repeat, each `MIXER` or `MIXER+FFN`; `n_layers` is a multiple of its length."""
    vocab_size: NonNegativeInt = 0
    """Number of token ids V; 0 takes the tokenizer's."""
    d_model: PositiveInt = 256
    """Width D of the residual stream."""
    n_layers: PositiveInt = 4
    """Number of blocks L."""
    n_heads: PositiveInt = 4
    """Query heads N."""
    n_kv_heads: NonNegativeInt = 0
    """Key and value heads K, a divisor of `n_heads`: N is MHA, 1 is MQA; 0 takes `n_heads`."""
    head_dim: NonNegativeInt = 0
    """Width H of one head; 0 takes `d_model / n_heads`."""
    d_ff: NonNegativeInt = 0
    """Width F of the feed-forward; 0 takes 8/3 D rounded up to 64 for SwiGLU and 4 D otherwise."""
    max_seq_len: NonNegativeInt = 0
    """Longest context, in tokens; 0 takes `data.seq_len`. The table size of learned positions."""
    activation: Literal["swiglu", "swiglu_clamped", "gelu", "gelu_tanh", "relu", "silu"] = "swiglu"
    """Feed-forward: gated SwiGLU with three matrices, or two matrices around one function (`gelu` is the erf form)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation of the residual stream."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance (mean square) before the root."""
    norm_position: Literal["pre", "post"] = "pre"
    """`pre`: x + f(norm(x)). `post`: norm(x + f(x)), as in Vaswani et al. 2017."""
    final_norm: bool = True
    """Normalise once more before the head."""
    qk_norm: bool = False
    """RMS-normalise queries and keys over each head before the rotation."""
    positions: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    """How a token knows its place: rotated queries and keys, a learned table, fixed sines, or not at all."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_layout: Literal["half", "interleaved"] = "half"
    """Rotary pairs: (i, i + H/2) as in Hugging Face's Llama, or (2i, 2i + 1) as in the paper and in Meta's Llama."""
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    rotary_fraction: PositiveFloat = 1.0
    """Share of each head that is rotated, its first elements."""
    window: NonNegativeInt = 0
    """Tokens that a query sees, itself included; 0: all before it."""
    keep_first: NonNegativeInt = 0
    """With a window: the first tokens of a document that stay visible (StreamingLLM, Xiao et al. 2023).

    Once they have left the window, their distance is that of a cache without gaps: `window + keep_first - 1` at most.
    """
    sink_logits: bool = False
    """A learned logit for each head takes part in the softmax and has no value (gpt-oss)."""
    sink_tokens: NonNegativeInt = 0
    """Learned vectors of each layer that every query sees as keys and values without a position."""
    softcap: NonNegativeFloat = 0.0
    """Bounds attention logits: cap * tanh(logits / cap) (Gemma 2); 0: unbounded."""
    moe: MoE = dataclasses.field(default_factory=MoE)
    mamba: Mamba = dataclasses.field(default_factory=Mamba)
    biases: tuple[Literal["qkv", "attention_out", "mlp", "head", "router", "experts"], ...] = ()
    """Which linear maps have a bias."""
    tie_embeddings: bool = True
    """Use the embedding as the output matrix."""
    head: Literal["lm", "value", "reward", "classes", "verifier"] = "lm"
    """What the model says: `lm`, the next token; `value` and `verifier`, a number at each token (the return from there
    on, the logit that the answer is right); `reward`, a number for each document; `classes`, their logits."""
    classes: PositiveInt = 2
    """Of the head `classes`."""
    pooling: Literal["last", "mean"] = "last"
    """What the head `classes` sees of a document: its last token, or the mean of all. `reward` sees the last."""
    dropout: NonNegativeFloat = 0.0
    """Rate after the embedding and after each mixer and feed-forward, while training."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of kernels and embeddings; `residual_std` for those that write into the residual stream."""
    attention_impl: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = "auto"
    """Attention kernel; `auto` picks for the hardware. All compute the same function."""
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    """`scan` compiles one repeat at any depth, `unroll` runs faster; `auto` unrolls 8 layers at most, without remat."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or the whole block.

    XLA on a CPU undoes it where layers are unrolled.
    """

    def __post_init__(self) -> None:
        fill = {
            "n_kv_heads": self.n_heads,
            "head_dim": self.d_model // self.n_heads,
            "d_ff": 64 * -(-8 * self.d_model // 192) if self.gated else 4 * self.d_model,
        }
        attends = any(parse_block(kind).mixer == "attention" for kind in self.pattern)
        if not self.head_dim and attends:
            require(
                self.d_model % self.n_heads == 0,
                f"model.n_heads = {self.n_heads} does not divide model.d_model = {self.d_model}",
            )
        for name, value in fill.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_kv_heads = {self.n_kv_heads} does not divide model.n_heads = {self.n_heads}",
        )
        # Numbers that no float holds are refused before they are multiplied with a fraction.
        for name in ("d_model", "head_dim"):
            require(getattr(self, name) < 2**31, f"model.{name} = {getattr(self, name)} is above 2^31 - 1")
        require(self.rotary_fraction <= 1, f"model.rotary_fraction = {self.rotary_fraction} is above 1")
        require(
            self.rotary_dim % 2 == 0 or self.positions != "rope" or not attends,
            f"model.head_dim = {self.head_dim}: rotary positions need pairs, {self.rotary_dim} elements are odd",
        )
        require(
            self.rotary_dim > 0 or self.positions != "rope",
            f"model.rotary_fraction = {self.rotary_fraction} rotates {self.rotary_dim} of {self.head_dim} elements",
        )
        require(
            self.window > 0 or not self.keep_first,
            f"model.keep_first = {self.keep_first} needs a window, model.window is 0",
            "a block may have both: attention(window=1024, keep_first=4)",
        )
        scaling = self.rope_scaling
        require(
            scaling.kind == "none" or scaling.factor > 0 or not 0 < self.max_seq_len < scaling.original_max_seq_len,
            f"model.max_seq_len = {self.max_seq_len} is below model.rope_scaling.original_max_seq_len = "
            f"{scaling.original_max_seq_len}",
        )
        require(self.dropout < 1, f"model.dropout = {self.dropout} must be below 1")
        require(self.norm_eps >= FLOAT32_TINY, f"model.norm_eps = {self.norm_eps} is zero in float32, of all norms")
        require(self.head != "classes" or self.classes > 1, "model.classes = 1: a head of classes has two at least")
        require(
            not (self.tie_embeddings and "head" in self.biases),
            "model.biases has 'head', which a tied head does not have",
        )
        require(len(self.pattern) > 0, "model.pattern is empty")
        for kind in self.pattern:
            if "(" in kind:
                self.halves(kind)
            elif parse_block(kind).mixer == "mamba2":
                self.mamba.check_heads(self.d_model)
        require(
            self.n_layers % len(self.pattern) == 0,
            f"model.n_layers = {self.n_layers} is not a multiple of the {len(self.pattern)} blocks of model.pattern",
        )

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for a token: V, the classes, or one."""
        return {"lm": self.vocab_size, "classes": self.classes}.get(self.head, 1)

    def require_language_model(self, purpose: str) -> None:
        """Refuse a model that does not say the next token.

        Args:
            purpose: what needs it, as the beginning of a sentence: "generation".

        Raises:
            UserError: it has another head.
        """
        if self.head != "lm":
            hint = 'this model scores; name one with head = "lm", such as the one that it began with'
            raise UserError(f"model.head = {self.head!r}: {purpose} needs a language model", hint)

    @property
    def repeats(self) -> int:
        """How often the pattern is repeated, R."""
        return self.n_layers // len(self.pattern)

    @property
    def scanned(self) -> bool:
        """Whether the layers are one scan over stacked parameters."""
        return self.layer_loop == "scan" or (self.layer_loop == "auto" and (self.n_layers > 8 or self.remat != "none"))

    @property
    def gated(self) -> bool:
        """Whether the activation joins two projections."""
        return self.activation in ("swiglu", "swiglu_clamped")

    @property
    def moes(self) -> tuple[MoE, ...]:
        """The experts' options of each block of the pattern that has experts."""
        halves = (self.halves(kind) for kind in self.pattern)
        return tuple(half.ffn.moe for half in halves if half.ffn_name == "moe")

    @property
    def random(self) -> bool:
        """Whether the forward pass of training draws random numbers."""
        return self.dropout > 0 or any(moe.noisy for moe in self.moes)

    @property
    def rotary_dim(self) -> int:
        """Leading elements of each head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def rope(self) -> Rope | None:
        """The rotation of queries and keys, None without one."""
        return None if self.positions != "rope" else Rope(self.rotary_dim, self.rope_theta, self.resolved_scaling)

    @property
    def resolved_scaling(self) -> RopeScaling:
        """`rope_scaling` with its factor filled in."""
        scaling = self.rope_scaling
        if scaling.kind == "none" or scaling.factor:
            return scaling
        return dataclasses.replace(scaling, factor=self.max_seq_len / scaling.original_max_seq_len)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotations of the attention blocks of the pattern."""
        halves = (self.halves(kind) for kind in self.pattern)
        found = (half.mixer.rope for half in halves if half.mixer_name == "attention")
        return tuple(dict.fromkeys(rope for rope in found if rope is not None))

    @property
    def streams(self) -> bool:
        """Whether a text may go on for ever: no position ends, no block remembers all of it or looks back further than
        it was trained to."""
        if self.positions in ("learned", "sinusoidal"):
            return False
        blocks = (half.mixer for half in map(self.halves, self.pattern) if half.mixer_name == "attention")
        return all(0 < block.window <= self.max_seq_len - block.keep_first for block in blocks)

    @property
    def residual_std(self) -> float:
        """Standard deviation of the maps of a half that write into the residual stream: `init_std / sqrt(b L)`.

        b are the branches of its block, 2 with a feed-forward and 1 without (GPT-2, section 2.3; Mamba does the same).
        """
        return self.init_std / ((1 + ("+" in self.pattern[0])) * self.n_layers) ** 0.5

    @property
    def portable(self) -> Model:
        """This model with kernels chosen by the platform where one was named that not every platform has: a run that
        was trained on a TPU is used on a CPU."""
        impl = self.attention_impl if self.attention_impl in ("xla", "blockwise") else "auto"
        moe = dataclasses.replace(self.moe, impl="auto") if self.moe.impl == "megablox" else self.moe
        return dataclasses.replace(self, attention_impl=impl, moe=moe)

    def halves(self, kind: str) -> Halves:
        """The two halves of a block of the pattern, each with the options that hold for it."""
        return _halves(self, kind)


class Rope(NamedTuple):
    """One rotation: rotated elements of a head, base, scaling."""

    dim: int
    theta: float
    scaling: RopeScaling


class Halves(NamedTuple):
    """A block: the names of its mixer and feed-forward (empty: none), and `[model]` as each of them sees it."""

    mixer_name: str
    mixer: Model
    ffn_name: str
    ffn: Model


_SECTION = {"mamba": "mamba", "mamba2": "mamba", "moe": "moe"}


@functools.lru_cache(maxsize=4096)
def _halves(model: Model, kind: str) -> Halves:
    parsed = parse_block(kind)
    require(
        parsed.mixer_options.get("positions") in (None, "rope", "none"),
        f"model.pattern: positions in {kind!r} is neither 'rope' nor 'none'",
    )
    plain = "+".join(filter(None, (parsed.mixer, parsed.ffn)))
    changes: dict[str, Any] = {"pattern": (plain,)}
    mixer_options = parsed.mixer_options
    if _SECTION.get(parsed.mixer) == "mamba":
        mamba = dataclasses.replace(model.mamba, **mixer_options)
        changes["mamba"], mixer_options = mamba.filled(parsed.mixer, model.d_model), {}
    base = dataclasses.replace(model, **changes)
    sides = [(parsed.mixer, mixer_options), (parsed.ffn, parsed.ffn_options)]
    mixer, ffn = (_with(base, _SECTION.get(name), options) for name, options in sides)
    return Halves(parsed.mixer, mixer, parsed.ffn, ffn)


def _with(model: Model, section: str | None, options: dict[str, Any]) -> Model:
    """`model` with options of a half: those of its section, and those of `[model]`."""
    if section:
        part = getattr(model, section)
        inside = {key: value for key, value in options.items() if key in FIELDS[type(part)]}
        options = {key: value for key, value in options.items() if key not in inside}
        options |= {section: dataclasses.replace(part, **inside)} if inside else {}
    return dataclasses.replace(model, **options) if options else model

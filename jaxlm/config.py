"""Every option of a run: one tree of frozen dataclasses, read by `config_file`.

This module imports neither jax nor torch, so both backends share it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import (
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.dataclasses import dataclass

from jaxlm.errors import did_you_mean

_STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

Backend = Literal["jax", "torch"]
MIXERS = ("attention",)
FFNS = ("mlp",)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Model:
    """The architecture. A block is a token mixer and a channel mixer; the model repeats `pattern`."""

    pattern: tuple[str, ...] = ("attention+mlp",)
    """Blocks of one repeat, each `MIXER+FFN`; `n_layers` is a multiple of its length."""
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
    activation: Literal["swiglu", "gelu", "gelu_tanh", "relu", "silu"] = "swiglu"
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
    biases: tuple[Literal["qkv", "attention_out", "mlp", "head"], ...] = ()
    """Which linear maps have a bias."""
    tie_embeddings: bool = True
    """Use the embedding as the output matrix."""
    dropout: NonNegativeFloat = 0.0
    """Rate after the embedding and after each mixer and feed-forward, while training."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of kernels and embeddings; the two output projections of a block get std / sqrt(2 L)."""
    attention_impl: Literal["auto", "xla", "blockwise", "cudnn"] = "auto"
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
            "d_ff": 64 * -(-8 * self.d_model // 192) if self.activation == "swiglu" else 4 * self.d_model,
        }
        if not self.head_dim:
            _require(
                self.d_model % self.n_heads == 0,
                f"model.n_heads = {self.n_heads} does not divide model.d_model = {self.d_model}",
            )
        for name, value in fill.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        _require(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_kv_heads = {self.n_kv_heads} does not divide model.n_heads = {self.n_heads}",
        )
        _require(
            self.head_dim % 2 == 0 or self.positions != "rope",
            f"model.head_dim = {self.head_dim} is odd, rotary positions need pairs",
        )
        _require(self.dropout < 1, f"model.dropout = {self.dropout} must be below 1")
        _require(
            not (self.tie_embeddings and "head" in self.biases),
            "model.biases has 'head', which a tied head does not have",
        )
        _require(len(self.pattern) > 0, "model.pattern is empty")
        for block in self.pattern:
            parse_block(block)
        _require(
            self.n_layers % len(self.pattern) == 0,
            f"model.n_layers = {self.n_layers} is not a multiple of the {len(self.pattern)} blocks of model.pattern",
        )

    @property
    def repeats(self) -> int:
        """How often the pattern is repeated, R."""
        return self.n_layers // len(self.pattern)

    @property
    def scanned(self) -> bool:
        """Whether the layers are one scan over stacked parameters."""
        return self.layer_loop == "scan" or (self.layer_loop == "auto" and (self.n_layers > 8 or self.remat != "none"))


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Tokenizer:
    """Text to token ids."""

    kind: Literal["bpe", "bytes", "file"] = "bpe"
    """`bpe`: byte-level BPE trained on the corpus. `bytes`: one id a byte. `file`: the `tokenizer.json` at `path`."""
    path: str = ""
    """The `tokenizer.json` of kind `file`."""
    vocab_size: PositiveInt = 4096
    """Size to train to (kind `bpe`), special tokens included."""
    specials: bool = True
    """Have special tokens (end of text, padding, FIM, chat roles, reserved). Without them `bytes` has 256 ids."""
    train_bytes: PositiveInt = 8_000_000
    """How much of the training text the BPE trainer reads, spread evenly over the corpus."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Data:
    """The corpus and the rows made of it."""

    source: str = "stdlib"
    """`"stdlib"` (the interpreter's, without its tests and tables), a file, a folder, or a Hugging Face dataset."""
    seq_len: PositiveInt = 256
    """Context length T, in tokens."""
    text_key: str = "text"
    """Field or column that holds the text in `.jsonl` and `.parquet`."""
    extensions: tuple[str, ...] = ()
    """Read only files with these endings from a folder, e.g. [".py", ".md"]; empty: every text file."""
    validation_fraction: float = 0.05
    """Share of the files (or of the documents of a single file) held out, chosen by a hash of the name."""
    validation_source: str = ""
    """A corpus of its own for validation; `validation_fraction` is then unused."""
    max_bytes: NonNegativeInt = 0
    """Stop reading the corpus after this many bytes; 0: all of it."""
    cache_dir: str = ".cache/jaxlm"
    """Where tokenised shards are kept, a folder for each fingerprint of corpus and tokenizer, and compiled programs."""
    workers: NonNegativeInt = 0
    """Threads that tokenise; 0: one a core."""
    prefetch: PositiveInt = 8
    """Batches prepared ahead of the step."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.validation_fraction < 1,
            f"data.validation_fraction = {self.validation_fraction} must lie in [0, 1)",
        )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Train:
    """The training loop and the optimiser."""

    steps: PositiveInt = 1000
    """Optimiser updates."""
    batch_size: PositiveInt = 32
    """Rows of `data.seq_len` tokens in one update, over all devices and microbatches."""
    microbatches: PositiveInt = 1
    """Split each batch into this many parts and add up their gradients: the same update in less memory."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; `wsd` holds the peak and falls linearly over the last `decay_fraction`."""
    warmup_steps: NonNegativeInt = 50
    """Linear rise from 0 to the peak."""
    final_lr_fraction: NonNegativeFloat = 0.1
    """Learning rate at the last step as a share of the peak."""
    decay_fraction: PositiveFloat = 0.2
    """Share of the steps over which `wsd` decays."""
    beta1: NonNegativeFloat = 0.9
    """AdamW first-moment decay."""
    beta2: NonNegativeFloat = 0.95
    """AdamW second-moment decay."""
    eps: PositiveFloat = 1e-8
    """AdamW epsilon, added outside the root."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of kernels and embeddings (never of norms and biases)."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 clips nothing."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-partition penalty (PaLM, section 5)."""
    label_smoothing: NonNegativeFloat = 0.0
    """Share of the target probability spread over the vocabulary."""
    loss_block: PositiveInt = 1024
    """Tokens whose float32 logits exist at one time."""
    max_skips: PositiveInt = 10
    """Stop after this many non-finite updates in a row, keeping the last good state."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Eval:
    """Validation while training."""

    every: NonNegativeInt = 100
    """Steps between two validations; 0: only at the end."""
    batches: PositiveInt = 16
    """Batches of the held-out rows, always the same ones."""
    patience: NonNegativeInt = 0
    """Stop when the loss has not improved for this many validations; 0: never."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Sample:
    """Texts generated while training, kept in `samples/`."""

    every: NonNegativeInt = 0
    """Steps between two samples; 0: only at the end."""
    prompts: tuple[str, ...] = ("def ",)
    """What to complete."""
    max_new_tokens: PositiveInt = 96
    """Length of a completion."""
    temperature: NonNegativeFloat = 0.7
    """0 is greedy."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Checkpoint:
    """Saving and resuming."""

    every: NonNegativeInt = 200
    """Steps between two checkpoints; 0: only at the end."""
    keep: PositiveInt = 3
    """How many of the newest to keep; the best by validation loss is kept besides."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Log:
    """Progress and metrics."""

    every: PositiveInt = 10
    """Steps between two lines of `metrics.jsonl`."""
    tensorboard: bool = False
    """Write TensorBoard events into the run (extra `tensorboard`)."""
    wandb: str = ""
    """Weights & Biases project to report to (extra `wandb`)."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Numerics:
    """Dtypes and matrix-product precision, the same in both frameworks."""

    params: Literal["float32", "float64"] = "float32"
    """Dtype of parameters and optimiser state."""
    compute: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype of activations and matrix products. Norms, softmax, rotary angles and the loss stay in float32 or wider."""
    matmul: Literal["default", "high", "highest"] = "default"
    """Matrix-product precision on hardware that has several; parity always uses `highest`."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Mesh:
    """Devices along each of the five axes; one of them may be -1: all that are left."""

    data: int = -1
    """Replicas that split the batch."""
    fsdp: int = 1
    """Splits the batch, and the parameters and optimiser state along the embedding axis."""
    expert: int = 1
    """Splits the experts."""
    context: int = 1
    """Splits the sequence."""
    tensor: int = 1
    """Splits heads, feed-forward and vocabulary."""

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(size >= 1 or size == -1, f"mesh.{name} = {size} must be positive or -1")
        _require(list(sizes.values()).count(-1) <= 1, f"more than one axis of [mesh] is -1: {sizes}")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Torch:
    """Options of `--backend torch`."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    autocast: bool = False
    """Use `torch.autocast` for `numerics.compute`, instead of casting where jaxlm casts."""
    compile: bool = False
    """Compile the step with `torch.compile`."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """A whole run."""

    recipe: Literal["pretrain"] = "pretrain"
    """The training stage."""
    out_dir: str = ""
    """The run directory; empty: `runs/` and the name of the config file."""
    seed: NonNegativeInt = 0
    """Seeds parameters, data order, dropout and sampling."""
    model: Model = dataclasses.field(default_factory=Model)
    tokenizer: Tokenizer = dataclasses.field(default_factory=Tokenizer)
    data: Data = dataclasses.field(default_factory=Data)
    train: Train = dataclasses.field(default_factory=Train)
    eval: Eval = dataclasses.field(default_factory=Eval)
    sample: Sample = dataclasses.field(default_factory=Sample)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    log: Log = dataclasses.field(default_factory=Log)
    numerics: Numerics = dataclasses.field(default_factory=Numerics)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    torch: Torch = dataclasses.field(default_factory=Torch)

    def __post_init__(self) -> None:
        _require(
            self.train.batch_size % self.train.microbatches == 0,
            f"train.microbatches = {self.train.microbatches} does not divide "
            f"train.batch_size = {self.train.batch_size}",
        )
        if not self.model.max_seq_len:
            object.__setattr__(self, "model", dataclasses.replace(self.model, max_seq_len=self.data.seq_len))
        _require(
            self.model.positions != "learned" or self.data.seq_len <= self.model.max_seq_len,
            f"data.seq_len = {self.data.seq_len} exceeds the {self.model.max_seq_len} learned positions "
            "of model.max_seq_len",
        )


def parse_block(block: str) -> tuple[str, str]:
    """Split `"attention+mlp"` into its token mixer and channel mixer."""
    mixer, _, ffn = block.partition("+")
    _require(mixer in MIXERS, f"model.pattern: unknown mixer {mixer!r} in {block!r}", did_you_mean(mixer, MIXERS))
    _require(ffn in FFNS, f"model.pattern: unknown feed-forward {ffn!r} in {block!r}", did_you_mean(ffn, FFNS))
    return mixer, ffn


def _require(condition: bool, message: str, hint: str = "") -> None:
    if not condition:
        raise ValueError(message if not hint else f"{message} ({hint})")

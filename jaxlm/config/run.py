"""Every option of a run: one tree of frozen dataclasses, read by `jaxlm.config.toml`.

This module imports neither jax nor torch, so both backends share it.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.dataclasses import dataclass

from jaxlm.config.data import Data as Data
from jaxlm.config.model import Model as Model
from jaxlm.config.model_parts import FLOAT32_TINY, STRICT, require
from jaxlm.config.model_parts import Mamba as Mamba
from jaxlm.config.model_parts import MoE as MoE
from jaxlm.config.model_parts import RopeScaling as RopeScaling
from jaxlm.config.preference import Preference as Preference
from jaxlm.config.preference import Reward as Reward
from jaxlm.config.reinforcement import RL as RL
from jaxlm.config.stages import SFT as SFT
from jaxlm.config.stages import Distill as Distill
from jaxlm.config.stages import LoRA as LoRA

Backend = Literal["jax", "torch"]
LARGEST_SEED = 2**63 - 1
AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Axes of the mesh, the fastest links last."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
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
    fim_marks: bool = False
    """Give a tokenizer of kind `file` the marks of fill-in-the-middle that it lacks, behind its vocabulary."""
    train_bytes: PositiveInt = 8_000_000
    """How much of the training text the BPE trainer reads, spread evenly over the corpus."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Train:
    """The training loop and the optimiser."""

    steps: PositiveInt = 1000
    """Optimiser updates."""
    init_from: str = ""
    """Take only the parameters of this model (a run, a torch_ref or Hugging Face folder); all else begins anew."""
    batch_size: PositiveInt = 32
    """Rows of `data.seq_len` tokens in one update, over all devices and microbatches."""
    microbatches: PositiveInt = 1
    """Split each batch into this many parts and add up their gradients: the same update in less memory.

    Balancing terms and capacities of experts alone are those of each part."""
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
    """Tokens whose float32 logits exist at one time on a device."""
    max_skips: PositiveInt = 10
    """Stop after this many non-finite updates in a row, keeping the last good state."""
    profile_steps: str = ""
    """Steps to profile, first and last, such as `10:13`; TensorBoard and XProf read `profile/` of the run."""

    @property
    def profiled(self) -> tuple[int, int] | None:
        """First and last step of `profile_steps`."""
        found = re.fullmatch(r"(\d+):(\d+)", self.profile_steps)
        return (int(found[1]), int(found[2])) if found else None

    def __post_init__(self) -> None:
        window = self.profiled
        require(
            not self.profile_steps or (window is not None and 1 <= window[0] <= window[1]),
            f"train.profile_steps = {self.profile_steps!r} is not FIRST:LAST, such as 10:13",
        )
        for name in ("beta1", "beta2", "label_smoothing"):
            most = 1 - 2**-24  # the last float32 below 1
            require(getattr(self, name) <= most, f"train.{name} = {getattr(self, name)} must lie in [0, 1), in float32")
        require(self.decay_fraction <= 1, f"train.decay_fraction = {self.decay_fraction} must lie in (0, 1]")
        require(self.eps >= FLOAT32_TINY, f"train.eps = {self.eps} is zero in float32: at least {FLOAT32_TINY}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Eval:
    """Validation while training."""

    every: NonNegativeInt = 100
    """Steps between two validations; 0: only at the end."""
    batches: PositiveInt = 16
    """Batches of the held-out rows, always the same ones."""
    patience: NonNegativeInt = 0
    """Stop when the loss has not improved for this many validations; 0: never."""
    target: NonNegativeFloat = 0.0
    """Stop when the headline of the held-out rows is this good, such as a loss of 0.4; 0: never."""
    watch: str = ""
    """What `patience`, `target` and the best checkpoint go by: the loss of a corpus of the mixture, of a language, or
    of `fim`; empty: the headline over all."""
    by_language: bool = False
    """Measure the loss on the held-out documents of each language too."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Checkpoint:
    """Saving and resuming."""

    every: NonNegativeInt = 200
    """Steps between two checkpoints; 0: only at the end."""
    minutes: NonNegativeFloat = 10.0
    """Save also when this long has passed since the last save; 0: never. Many processes go by the first one's clock."""
    keep: PositiveInt = 3
    """How many of the newest to keep; the best by validation loss is kept besides."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Log:
    """Progress and metrics."""

    every: PositiveInt = 10
    """Steps between two lines of `metrics.jsonl`."""
    tensorboard: bool = False
    """Write TensorBoard events into the run (extra `tensorboard`)."""
    wandb: str = ""
    """Weights & Biases project to report to (extra `wandb`)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Numerics:
    """Dtypes and matrix-product precision, the same in both frameworks."""

    params: Literal["float32", "float64"] = "float32"
    """Dtype of parameters and optimiser state."""
    compute: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype of activations and matrix products. Norms, softmax, rotary angles and the loss stay in float32 or wider."""
    matmul: Literal["default", "high", "highest"] = "default"
    """Matrix-product precision on hardware that has several; parity always uses `highest`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dcn:
    """The part of each axis that crosses slices, over the data-centre network; one may be -1: all the slices there are.

    In all, an axis is as long as this part times its part in `[mesh]`.
    """

    data: int = 1
    """Replicas in different slices."""
    fsdp: int = 1
    """Parts of the parameters in different slices: each layer is then gathered over the slow network."""
    expert: int = 1
    """Parts of the experts in different slices."""
    context: int = 1
    """Parts of the sequence in different slices."""
    tensor: int = 1
    """Parts of the heads in different slices."""

    def __post_init__(self) -> None:
        _check_axes(self.sizes, "mesh.dcn")

    @property
    def sizes(self) -> dict[str, int]:
        """The five sizes by axis."""
        return {axis: getattr(self, axis) for axis in AXES}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mesh:
    """Devices of one slice along each of the five axes; one of them may be -1: all that are left.

    Without `[mesh.dcn]` all devices are one slice. `mesh = "zero3"` takes all of this from `configs/mesh/zero3.toml`.
    """

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
    dcn: Dcn = dataclasses.field(default_factory=Dcn)
    rules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict[str, tuple[str, ...]])
    """The mesh axes of a logical axis, where they are not those of `RULES` in `jaxlm/mesh.py`: `heads = []` splits no
    heads, `embed = ["fsdp", "context"]` splits the width over both."""
    optimizer_rules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict[str, tuple[str, ...]])
    """The same, on top of `rules`, for optimiser state that does not lie where its parameters do (ZeRO-1)."""

    def __post_init__(self) -> None:
        _check_axes(self.sizes, "mesh")

    @property
    def sizes(self) -> dict[str, int]:
        """The five sizes within a slice, by axis."""
        return {axis: getattr(self, axis) for axis in AXES}


def _check_axes(sizes: dict[str, int], section: str) -> None:
    for name, size in sizes.items():
        require(size >= 1 or size == -1, f"{section}.{name} = {size} must be positive or -1")
    require(list(sizes.values()).count(-1) <= 1, f"more than one axis of [{section}] is -1: {sizes}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Distributed:
    """The processes of one run. What launchers say by environment variables stands in `jaxlm.processes.meet`."""

    coordinator: str = ""
    """`HOST:PORT` of process 0, as every process reaches it; empty: `JAXLM_COORDINATOR`, else what the cluster says."""
    processes: NonNegativeInt = 0
    """How many processes; 0: `JAXLM_PROCESSES`, else what the cluster says, else one."""
    process_id: int = -1
    """Which of them this one is, from 0; -1: `JAXLM_PROCESS_ID`, else what the cluster says."""
    cluster: Literal["auto", "none", "slurm", "ompi", "mpi4py", "gketpu", "gcetpu", "k8s"] = "auto"
    """The cluster manager that fills in missing settings; `auto`: SLURM, Open MPI or Cloud TPU, where one is found."""
    init_timeout: PositiveInt = 300
    """Seconds until all processes must have met."""
    heartbeat_timeout: PositiveInt = 100
    """Seconds of silence after which a process counts as dead, and the others end."""
    hang_seconds: NonNegativeFloat = 3600.0
    """Seconds without a finished step, the first one's compilation included, after which a process ends; 0: never."""

    def __post_init__(self) -> None:
        require(self.process_id >= -1, f"distributed.process_id = {self.process_id} must be -1, 0 or more")
        host, _, port = self.coordinator.rpartition(":")
        require(
            not self.coordinator or (bool(host) and port.isdecimal()),
            f"distributed.coordinator = {self.coordinator!r} is not HOST:PORT",
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Torch:
    """Options of `--backend torch`."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    autocast: bool = False
    """Use `torch.autocast` for `numerics.compute`, instead of casting where jaxlm casts."""
    compile: bool = False
    """Compile the step with `torch.compile`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A whole run."""

    recipe: str = "pretrain"
    """The training stage: a name of `jaxlm.recipes.RECIPES`, or `MODULE:FUNCTION` from a config to a recipe."""
    aliases: tuple[str, ...] = ()
    """Other names of this config, if it is one of `configs/models`, such as the one that its source gave it."""
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
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    torch: Torch = dataclasses.field(default_factory=Torch)
    rl: RL = dataclasses.field(default_factory=RL)
    sft: SFT = dataclasses.field(default_factory=SFT)
    preference: Preference = dataclasses.field(default_factory=Preference)
    reward: Reward = dataclasses.field(default_factory=Reward)
    distill: Distill = dataclasses.field(default_factory=Distill)
    lora: LoRA = dataclasses.field(default_factory=LoRA)

    def __post_init__(self) -> None:
        self.data.check_steps(self.train.steps)
        require(
            self.train.batch_size % self.train.microbatches == 0,
            f"train.microbatches = {self.train.microbatches} does not divide "
            f"train.batch_size = {self.train.batch_size}",
        )
        require(self.seed <= LARGEST_SEED, f"seed = {self.seed} is above {LARGEST_SEED}")
        require(
            not self.lora.rank or bool(self.train.init_from),
            f"lora.rank = {self.lora.rank}: adapters need a base",
            "train.init_from names a run or a folder with a model",
        )
        require(bool(self.data.source), "data.source is empty", "name a file, a folder or a data set")
        require(bool(self.data.cache_dir), "data.cache_dir is empty", "name a folder")
        if not self.model.max_seq_len:
            object.__setattr__(self, "model", dataclasses.replace(self.model, max_seq_len=self.data.seq_len))
        require(
            self.model.positions != "learned" or self.data.seq_len <= self.model.max_seq_len,
            f"data.seq_len = {self.data.seq_len} exceeds the {self.model.max_seq_len} learned positions "
            "of model.max_seq_len",
        )

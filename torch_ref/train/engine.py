"""The PyTorch engine of the training loop: decoder, optimiser and checkpoints on one device.

jaxlm train configs/quickstart.toml --backend torch
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jaxlm import config
from jaxlm.counts.flops import flops_per_token
from jaxlm.errors import UserError
from jaxlm.run.metrics import PEAK_FLOPS, memory_of_process, plain
from jaxlm.run.peak import peak_flops
from jaxlm.text.sampling import Sampling
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train.recipe import MODEL, Recipe, RowFunction, Trained, base_name, parameter_name
from torch_ref.models import attach_lora
from torch_ref.models.decoder import Decoder, init_params
from torch_ref.models.layers import linear_maps
from torch_ref.numerics import Policy
from torch_ref.train.checkpoint import Checkpointer
from torch_ref.train.optim import make_optimizer
from torch_ref.train.step import Part, TrainState, make_eval, make_steps


class TorchEngine:
    """Trains the models of a recipe on one device. See `jaxlm.train.backend.Engine`."""

    process_index, process_count = 0, 1
    rows: np.ndarray | None = None

    def __init__(self, cfg: config.Config, recipe: Recipe) -> None:
        _require_one_device(cfg.mesh)
        self.config, self.device, self.state = cfg, pick_device(cfg.torch.device), TrainState()
        policy = Policy.from_config(cfg.numerics)
        if self.device.type == "mps" and torch.float64 in (policy.params, policy.compute):
            raise UserError("numerics: this device has no float64", "torch.device=cpu")
        if policy.matmul != "default":
            torch.set_float32_matmul_precision(policy.matmul)
        narrow = policy.compute if cfg.torch.autocast else None
        if narrow:
            policy = dataclasses.replace(policy, compute=policy.params)
        self._policy, self._narrow = policy, narrow
        models, self.recipe = recipe.models, recipe
        self.modules: dict[str, Any] = {
            name: init_params(Decoder(tree.model, policy), cfg.seed + number).to(self.device)
            for number, (name, tree) in enumerate({**models.trained, **models.frozen}.items())
        }
        for name in models.frozen:
            self.modules[name].requires_grad_(False).eval()
        self.decoder = self.modules[MODEL]
        self.parts = [_part(name, tree, self.modules[name]) for name, tree in models.trained.items()]
        for name, tree in models.maps.items():  # their first values are given
            self.modules[name] = module = linear_maps(tree.shapes, policy).to(self.device)
            self.parts.append(Part(name, tree.train, make_optimizer(module, tree.train), module))

        objective = recipe.objective.torch(self.modules, cfg)
        if narrow:
            objective = _autocast(objective, self.device, narrow)
        if cfg.torch.compile:
            objective = torch.compile(objective)
        whole = recipe.objective.torch_whole(self.modules, cfg) if recipe.objective.torch_whole else None
        options: dict[str, Any] = {"update_if": recipe.objective.update_if, "divisors": recipe.objective.divisors}
        parts, seed = cfg.train.microbatches, cfg.seed
        self._step = make_steps(objective, self.parts, parts, seed=seed, whole=whole, **options)
        self._eval = make_eval(objective)
        self._checkpointer = Checkpointer(cfg.out_dir, cfg.checkpoint.keep)
        adapted = sum(x.numel() for n, x in self.decoder.named_parameters() if n.endswith((".adapter.a", ".adapter.b")))
        multiplied, saved = matmul_params(self.decoder), saved_params(self.decoder) if adapted else 0
        self.flops_per_token: float = flops_per_token(cfg.model, multiplied, cfg.data.seq_len, adapted, saved)
        self._peak_flops = 0.0
        self._profiler: Any = None

    def peak_flops(self, reached: float) -> float:
        """Of the device: the vendor's figure where it is known, else products timed here."""
        if self.device.type == "cuda" and (known := PEAK_FLOPS.get(torch.cuda.get_device_name(self.device))):
            return known
        if self._peak_flops < max(reached, 1.0):
            self._peak_flops = measured_flops(self.config.data.cache_dir, self.device, reached)
        return self._peak_flops

    def checkpoints(self) -> list[int]:
        return self._checkpointer.steps()

    def restore(self, warn: Callable[[str], None]) -> dict[str, Any]:
        self.state, run = self._checkpointer.restore(self.parts, warn)
        return run

    def adopt(self, tensors: Mapping[str, np.ndarray], name: str = MODEL) -> None:
        """Let a trained module begin with these parameters, or adapters, by the names of its `state_dict`."""
        values = {key: torch.tensor(np.array(array)) for key, array in tensors.items()}
        tree = self.recipe.models.trained.get(name)
        if tree is not None and tree.adapters:
            attach_lora.load(self.modules[name], values)
        else:
            self.modules[name].load_state_dict(values, strict=True)

    def freeze(self, name: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Give a frozen module its parameters, by the names of its `state_dict`, or a trained one those under its
        adapters."""
        for trained, tree in self.recipe.models.trained.items():
            if tree.adapters and name == base_name(trained):
                module = self.modules[trained]
                attach_lora.load_base(module, {key: torch.tensor(np.array(x)) for key, x in tensors.items()})
                if tree.adapters.quantize == "nf4":
                    attach_lora.quantize(module, double=tree.adapters.double_quantize)
                return
        self.modules[name].load_state_dict({key: torch.tensor(array) for key, array in tensors.items()}, strict=True)

    def step(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        self._training(True)
        self.state, metrics = self._step(self.state, self._place(batch))
        return metrics

    def fetch(self, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [plain(one) for one in metrics]

    def evaluate(self, batches: Iterator[Mapping[str, np.ndarray]]) -> dict[str, float]:
        self._training(False)
        totals: dict[str, float] = collections.defaultdict(float)
        for batch in batches:
            for name, value in self._eval(self._place(batch)).items():
                totals[name] += float(value)
        return dict(totals)

    def map_rows(
        self,
        function: RowFunction,
        batches: Iterator[Mapping[str, np.ndarray]],
        frozen: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    ) -> Iterator[np.ndarray]:
        self._training(False)
        modules = dict(self.modules)
        for name, tensors in (frozen or {}).items():
            modules[name] = Decoder(function.frozen[name].model, self._policy).to(self.device).eval()
            modules[name].load_state_dict({key: torch.tensor(np.array(x)) for key, x in tensors.items()}, strict=True)
        compute = function.torch(modules, self.config)
        if self._narrow:
            compute = _autocast(compute, self.device, self._narrow)
        for batch in batches:
            with torch.no_grad():
                numbers = compute(self._place(batch))
            yield numbers.cpu().numpy()

    def complete(self, prompts: Sequence[str], sample: config.Sample, check: Callable[[], None]) -> list[str]:
        from torch_ref.infer.generate import Generator

        generator = Generator(self.decoder, Tokenizer.from_file(Path(self.config.out_dir) / "tokenizer.json"))
        sampling, length = Sampling(temperature=sample.temperature), sample.max_new_tokens
        completions = generator.complete(
            prompts, sampling, max_new_tokens=length, seed=self.config.seed, stream=lambda *_: check()
        )
        return [completion.text for completion in completions]

    def save(self, run: dict[str, Any], validation_loss: float | None) -> None:
        self._checkpointer.save(self.parts, self.state, run, validation_loss)

    def stops_at(self, point: int) -> bool:
        return False  # there is one process

    def part(self) -> None:
        """There is nobody to part from."""

    def of_first(self, value: bool) -> bool:
        return value

    def gather(self, value: float) -> list[float]:
        return [value]

    def memory(self) -> dict[str, int]:
        if self.device.type != "cuda":
            return memory_of_process()
        used = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        return dict(zip(("memory_bytes", "memory_peak_bytes"), used, strict=True))

    def profile(self, folder: Path | None) -> None:
        if folder:
            handler = torch.profiler.tensorboard_trace_handler(str(folder))
            self._profiler = torch.profiler.profile(on_trace_ready=handler)
            self._profiler.start()
        elif self._profiler:
            self._profiler.stop()
            self._profiler = None

    def close(self) -> None:
        """Nothing else is under way: `save` returns when all is written."""
        self.profile(None)

    def _training(self, on: bool) -> None:
        for name in self.recipe.models.trained:
            self.modules[name].train(on)

    def _place(self, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {name: torch.tensor(array, device=self.device) for name, array in batch.items()}


def _part(name: str, tree: Trained, module: Decoder) -> Part:
    if tree.adapters:
        attach_lora.attach(module, tree.adapters)
        return Part(
            name,
            tree.train,
            make_optimizer(module, tree.train, attach_lora.moves(tree.adapters)),
            module,
            adapters=True,
        )
    for path, parameter in module.named_parameters():
        parameter.requires_grad_(tree.moves is None or tree.moves(parameter_name(path)))
    return Part(name, tree.train, make_optimizer(module, tree.train, tree.moves), module)


def pick_device(name: str) -> torch.device:
    """The device of `torch.device`; `auto` takes the first of CUDA, MPS and the CPU that is there.

    Raises:
        UserError: the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    if not there[name]:
        found = ", ".join(kind for kind, found in there.items() if found)
        raise UserError(f"torch.device = {name!r}: PyTorch finds no such device", f"there is: {found}")
    return torch.device(name)


def matmul_params(decoder: Decoder) -> int:
    """Parameters in matrix products for one token: all kernels, of experts the `top_k` that it passes, and the head."""
    cfg = decoder.config
    total = decoder.embed.weight.numel() if cfg.tie_embeddings and cfg.head == "lm" else 0
    for name, parameter in decoder.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or parameter.ndim < 2 or "conv" in module or module in ("embed", "position_embed"):
            continue
        if parameter.ndim == 3:  # a stack of experts
            moe = cfg.halves(cfg.pattern[int(name.split(".")[1]) % len(cfg.pattern)]).ffn.moe
            total += parameter.numel() * moe.top_k // moe.n_experts
        else:
            total += parameter.numel()
    return total


def saved_params(decoder: Decoder) -> int:
    """Parameters in matrix products of modules that are trained whole beside adapters: see `jaxlm.train.adapters`."""
    outputs = {"head.weight", "score.weight"} | ({"embed.weight"} if decoder.config.tie_embeddings else set())
    return sum(x.numel() for name, x in decoder.named_parameters() if name in outputs and x.requires_grad)


def measured_flops(folder: str | Path, device: torch.device, reached: float) -> float:
    """FLOP/s of a device, a peak for where none is published; see `jaxlm.run.peak`."""

    def multiply(a: np.ndarray, b: np.ndarray) -> Callable[[], Any]:
        x, y = torch.tensor(a, device=device), torch.tensor(b, device=device)
        return lambda: (x @ y)[0, 0].item()  # waits for the device

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "" if device.type == "cpu" else device.type
    return peak_flops(folder, name, f"torch {torch.__version__}", multiply, reached)


def _require_one_device(mesh: config.Mesh) -> None:
    for axis, size in {**mesh.sizes, **{f"dcn.{axis}": size for axis, size in mesh.dcn.sizes.items()}}.items():
        if size not in (1, -1):
            raise UserError(f"mesh.{axis} = {size}: the torch backend trains on one device", f"mesh.{axis}=1")


def _autocast(function: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    def compute(batch: Mapping[str, Tensor]) -> Any:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype == torch.bfloat16):
            return function(batch)

    return compute

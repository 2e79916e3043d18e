"""What a model costs, counted from shapes alone: parameters, FLOPs, memory of one device. Nothing is allocated."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from jaxlm import config
from jaxlm.counts.activation_memory import activations
from jaxlm.counts.flops import forward_flops
from jaxlm.counts.kernels import kernels_of
from jaxlm.mesh import Axes, Layout
from jaxlm.models.decoder import Decoder, abstract_params, init_cache
from jaxlm.numerics import Policy


@dataclasses.dataclass(frozen=True)
class Account:
    """Exact counts of a configuration, and an estimate of its activations. Bytes are those of one device."""

    total: int
    """Parameters."""
    active: int
    """Parameters without the experts that a token does not pass, as the literature counts (Jiang et al. 2024)."""
    embedding: int
    """Parameters in look-up tables: token embedding and learned positions."""
    matmul: int
    """Parameters in matrix products for one token: active kernels, and a tied embedding as the head."""
    forward_flops: int
    """FLOP of the forward pass for one token at the training context: see `jaxlm.counts.flops`."""
    train_flops: int
    """FLOP of forward and backward for one token."""
    devices: int
    parameter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int
    """Estimate: what the backward pass keeps of one microbatch, one block at work and one block of logits."""
    cache_bytes_per_token: int
    """What the cache of one row grows by with each token: keys and values of attention without a window."""
    cache_bytes_fixed: int
    """What the cache of one row has whatever its length: windows, convolution and SSM state."""
    kernels: str
    """Which kernels a training step uses on the devices of this process: see `jaxlm.counts.kernels`."""

    @property
    def bytes(self) -> int:
        """Memory of one device while training."""
        return self.parameter_bytes + self.optimizer_bytes + self.gradient_bytes + self.activation_bytes

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("count", "value", show_header=False)
        for label, value in (
            ("parameters", f"{self.total:,}"),
            ("  active for a token", f"{self.active:,}"),
            ("  embedding tables", f"{self.embedding:,}"),
            ("FLOP a token, forward", f"{self.forward_flops:,.0f}"),
            ("FLOP a token, training", f"{self.train_flops:,.0f}"),
            (f"memory a device, of {self.devices}", _mib(self.bytes)),
            ("  parameters", _mib(self.parameter_bytes)),
            ("  optimiser", _mib(self.optimizer_bytes)),
            ("  gradients", _mib(self.gradient_bytes)),
            ("  activations, estimated", _mib(self.activation_bytes)),
            ("cache of a row, for each token", f"{self.cache_bytes_per_token:,} B"),
            ("  and at any length", f"{self.cache_bytes_fixed:,} B"),
            ("kernels here", self.kernels),
        ):
            table.add_row(label, value)
        table.columns[1].justify = "right"
        return table


def account(cfg: config.Config) -> Account:
    """Count everything about a run; an axis of the mesh that is -1 counts as 1."""
    model, policy = cfg.model, Policy.from_config(cfg.numerics)
    decoder = Decoder(model, policy)
    leaves = _leaves(decoder)
    layout = Layout.abstract(cfg.mesh)
    embedding = sum(leaf.size for path, leaf, _ in leaves if path[-1] == "embedding")
    total, active = parameters(model)
    matmul = matmul_params(decoder)
    forward = forward_flops(model, matmul, cfg.data.seq_len)
    local = sum(_local_size(leaf, axes, layout) for _, leaf, axes in leaves)
    moments = 2 * sum(_local_size(leaf, axes, layout.optimizer) for _, leaf, axes in leaves)
    width = policy.params.itemsize
    growing, fixed = _cache_bytes(decoder, cfg.data.seq_len)
    return Account(
        total=total,
        active=active,
        embedding=embedding,
        matmul=matmul,
        forward_flops=forward,
        train_flops=3 * forward,
        devices=layout.mesh.size,
        parameter_bytes=local * width,
        optimizer_bytes=moments * width,
        gradient_bytes=local * width,
        activation_bytes=sum(activations(cfg, layout)),
        cache_bytes_per_token=growing,
        cache_bytes_fixed=fixed,
        kernels=kernels_of(cfg, layout.platform),
    )


def parameters(model: config.Model) -> tuple[int, int]:
    """Parameters of a model: all, and those that one token meets."""
    counted = [*_counted(Decoder(model))]
    return sum(size for _, size, _ in counted), sum(active for *_, active in counted)


def matmul_params(decoder: Decoder) -> int:
    """Parameters in matrix products for one token: all kernels, of experts the `top_k` that it passes, and the head."""
    model = decoder.config
    kernels = (
        active
        for path, _, active in _counted(decoder)
        if path[-1] == "kernel" and not any("conv" in name for name in path)  # `jaxlm.counts.flops` has the convolution
    )
    tied = model.tie_embeddings and model.head == "lm"
    return sum(kernels) + (model.vocab_size * model.d_model if tied else 0)


def _counted(decoder: Decoder) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Path, size in all layers, and how much of it one token meets, of every parameter.

    Blocks of one kind are traced once: a pattern may be as long as the model, such as that of one dense layer before
    61 with experts.
    """
    model = decoder.config
    kinds = collections.Counter(model.pattern)
    short = dataclasses.replace(model, pattern=tuple(kinds), n_layers=len(kinds))
    for path, leaf, axes in _leaves(decoder.clone(config=short)):
        times = model.repeats * kinds[short.pattern[_slot(path)]] if path[0] == "layers" else 1
        yield path, times * leaf.size, times * _active(path, leaf.size, axes, short)


def _slot(path: tuple[str, ...]) -> int:
    """The place in the pattern of the block that a parameter belongs to."""
    return int(path[1].removeprefix("slot_"))


def _leaves(decoder: Decoder) -> list[tuple[tuple[str, ...], Any, Axes]]:
    """Path, shape and axes of every parameter; the layers are stacked, so that depth costs no time."""
    decoder = decoder.clone(config=dataclasses.replace(decoder.config, layer_loop="scan"))
    shapes, axes = abstract_params(decoder)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    names = tree.flatten_up_to(axes)
    return [(tuple(key.key for key in path), leaf, at) for (path, leaf), at in zip(leaves, names, strict=True)]


def _active(path: tuple[str, ...], size: int, axes: Axes, model: config.Model) -> int:
    """How many of the parameters of a leaf one token meets: of a stack of experts, the `top_k` that it passes."""
    if "experts" not in axes:
        return size
    moe = model.halves(model.pattern[_slot(path)]).ffn.moe
    return size * moe.top_k // moe.n_experts


def _cache_bytes(decoder: Decoder, seq_len: int) -> tuple[int, int]:
    """Bytes that the cache of one row has for each token, and those that it has at any length past all windows."""

    def row(slots: int) -> int:
        one, two = (jax.tree.leaves(jax.eval_shape(lambda n=n: init_cache(decoder, n, slots))) for n in (1, 2))
        return sum((b.size - a.size) * a.dtype.itemsize for a, b in zip(one, two, strict=True))

    model = decoder.config
    windows = (half.window + half.keep_first for half in (model.halves(kind).mixer for kind in model.pattern))
    long = 2 * max(seq_len, model.max_seq_len, *windows)
    growing = (row(2 * long) - row(long)) // long
    return growing, row(long) - growing * long


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _local_size(leaf: Any, axes: Axes, layout: Layout) -> int:
    return -(-leaf.size // math.prod(layout.parts(axis) for axis in axes))

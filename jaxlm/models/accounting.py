"""What a model costs, counted from shapes alone: parameters, FLOPs, memory of one device. Nothing is allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxlm import config
from jaxlm.mesh import AXES, RULES, Axes
from jaxlm.models.decoder import Decoder, abstract_params
from jaxlm.numerics import Policy


@dataclasses.dataclass(frozen=True)
class Account:
    """Exact counts of a configuration, and an estimate of its activations. Bytes are those of one device."""

    total: int
    """Parameters."""
    active: int
    """Parameters that take part in computing one token: all but the unused rows of look-up tables."""
    embedding: int
    """Parameters in look-up tables: token embedding and learned positions."""
    matmul: int
    """Parameters in matrix products for each token: all kernels, and a tied embedding as the head."""
    forward_flops: int
    """FLOP of the forward pass for one token at the training context, causal attention counted as half."""
    train_flops: int
    """FLOP of forward and backward for one token."""
    devices: int
    parameter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int
    """Estimate: what the backward pass keeps of one microbatch, and one block of logits."""
    cache_bytes_per_token: int
    """KV cache of one token of one row."""

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
            ("KV cache a token", f"{self.cache_bytes_per_token:,} B"),
        ):
            table.add_row(label, value)
        table.columns[1].justify = "right"
        return table


def account(cfg: config.Config) -> Account:
    """Count everything about a run; an axis of the mesh that is -1 counts as 1."""
    model, policy = cfg.model, Policy.from_config(cfg.numerics)
    shapes, axes = abstract_params(Decoder(model, policy))
    sizes = {name: max(size, 1) for name, size in dataclasses.asdict(cfg.mesh).items()}
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    total = sum(leaf.size for _, leaf in leaves)
    tables = {path: leaf.size for path, leaf in leaves if path[-1].key == "embedding"}
    embedding = sum(tables.values())
    matmul = matmul_params(shapes, model)
    local = sum(_local_size(leaf, names, sizes) for leaf, names in _pairs(shapes, axes))
    width = policy.params.itemsize
    attention = 2 * model.n_layers * cfg.data.seq_len * model.n_heads * model.head_dim
    forward = 2 * matmul + attention
    return Account(
        total=total,
        active=total - embedding + (model.vocab_size * model.d_model if model.tie_embeddings else 0),
        embedding=embedding,
        matmul=matmul,
        forward_flops=forward,
        train_flops=3 * forward,
        devices=math.prod(sizes[axis] for axis in AXES),
        parameter_bytes=local * width,
        optimizer_bytes=2 * local * width,
        gradient_bytes=local * width,
        activation_bytes=_activations(cfg, sizes),
        cache_bytes_per_token=2 * model.n_layers * model.n_kv_heads * model.head_dim * policy.compute.itemsize,
    )


def matmul_params(shapes: Mapping[str, Any], model: config.Model) -> int:
    """Parameters that take part in matrix products for each token."""
    flat = jax.tree_util.tree_flatten_with_path(shapes)[0]
    kernels = sum(leaf.size for path, leaf in flat if path[-1].key == "kernel")
    return kernels + (model.vocab_size * model.d_model if model.tie_embeddings else 0)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _activations(cfg: config.Config, sizes: Mapping[str, int]) -> int:
    """Elements that one token leaves behind in each layer, by the remat policy, times the tokens of a microbatch."""
    model = cfg.model
    inner = (2 * model.n_heads + 3 * model.n_kv_heads) * model.head_dim  # q, k before and after rotation, v, mixed
    mlp = (3 if model.gated else 2) * model.d_ff
    kept = {"none": 4 * model.d_model + inner + mlp, "dots": 2 * model.d_model + inner + mlp, "full": model.d_model}
    tokens = cfg.train.batch_size * cfg.data.seq_len // cfg.train.microbatches
    local = tokens // math.prod(sizes[axis] for axis in ("data", "fsdp", "expert", "context"))
    width = Policy.from_config(cfg.numerics).compute.itemsize
    logits = min(cfg.train.loss_block, local) * model.vocab_size // sizes["tensor"] * 4
    return local * model.n_layers * kept[model.remat] * width // sizes["tensor"] + 2 * logits


def _pairs(shapes: Any, axes: Any) -> list[tuple[Any, Axes]]:
    leaves, tree = jax.tree.flatten(shapes)
    return list(zip(leaves, tree.flatten_up_to(axes), strict=True))


def _local_size(leaf: Any, names: Axes, sizes: Mapping[str, int]) -> int:
    parts = 1
    for name in names:
        entry = RULES[name] if name else None
        parts *= math.prod(sizes[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))
    return -(-leaf.size // parts)

"""Counts the memory that decoding takes of one device, and the fastest that a step can be, from shapes and the layout.

A step reads every weight once, and of every row the keys, values and states of all its tokens. So the memory bandwidth
bounds it ("How to Scale Your Model", Austin et al. 2025, chapter 7). Collectives and latencies are not counted.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax

from jaxlm import config
from jaxlm.counts.flops import forward_flops
from jaxlm.counts.parameters import matmul_params
from jaxlm.errors import UserError
from jaxlm.infer.engine.on_jax import programs
from jaxlm.infer.engine.on_jax.joined import second_copy
from jaxlm.infer.engine.on_jax.rows import row_axes
from jaxlm.infer.engine.on_jax.runner import WIDTHS, rounded_slots, whole_rows
from jaxlm.infer.memory import context_of
from jaxlm.mesh import Layout
from jaxlm.models.cache import RowCache
from jaxlm.models.decoder import Decoder, abstract_params
from jaxlm.numerics import Policy
from jaxlm.plan.report import USABLE, gib
from jaxlm.plan.topology import Topology


class Load(NamedTuple):
    """The size of an engine."""

    rows: int
    context: int
    """Tokens of a row; 0: as many as the model was trained with."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """An engine on a topology whose rows are all full. Bytes and seconds are those of one device and one step."""

    config: str
    topology: str
    rows: int
    context: int
    weights: int
    """Parameters that a device holds."""
    copied: int
    """Those that it holds a second time for decoding, as long as the model that was loaded stays."""
    cache: int
    """Its part of the rows."""
    counters: int
    """Of each row and id: whether it was in the prompt, how often in the text, its bias."""
    weights_read: int
    """Also those that other devices hold along `fsdp`; of experts those that so many rows are expected to need."""
    cache_read: int
    hbm: int
    memory_seconds: float
    compute_seconds: float

    @property
    def bytes(self) -> int:
        """Bytes held between two steps."""
        return self.weights + self.copied + self.cache + self.counters

    @property
    def tokens_per_second(self) -> float:
        """At most, of all rows together."""
        return self.rows / max(self.memory_seconds, self.compute_seconds)

    @property
    def verdict(self) -> str:
        """One sentence."""
        fits = "fits" if self.bytes <= USABLE * self.hbm else "does not fit"
        limit = "memory bandwidth" if self.memory_seconds >= self.compute_seconds else "compute"
        rate = f"At most {self.tokens_per_second:,.0f} tokens a second, bound by {limit}; links are not counted."
        return f"{fits}: {gib(self.bytes)} of {gib(self.hbm)} GiB a device. {rate}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with what follows from them."""
        return {**dataclasses.asdict(self), "bytes": self.bytes, "tokens_per_second": self.tokens_per_second}

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("of a device", "held, GiB", "read in a step, GiB")
        table.add_row("weights", gib(self.weights), gib(self.weights_read))
        table.add_row("their second copy", gib(self.copied), "")
        table.add_row("cache", gib(self.cache), gib(self.cache_read))
        table.add_row("counters", gib(self.counters), "")
        table.add_row("together", gib(self.bytes), gib(self.weights_read + self.cache_read), style="bold")
        head = f"{self.config} on {self.topology}: {self.rows:,} rows of {self.context:,} tokens"
        return Group(Text(head), table, Text(self.verdict, style="bold"))


def parse(text: str) -> Load:
    """`rows=64,context=8192`; without a context that of training.

    Raises:
        UserError: a key is unknown or a value is no positive number.
    """
    found = re.fullmatch(r"rows=(\d+)(?:,context=(\d+))?", text)
    if found is None:
        problem = f"--decode {text!r} does not say how many rows of how many tokens"
        raise UserError(problem, "write rows=64,context=8192")
    load = Load(int(found[1]), int(found[2] or 0))
    if load.rows < 1:
        raise UserError(f"rows = {load.rows} must be positive")
    return load


def plan_decoding(cfg: config.Config, topology: Topology, load: Load, name: str) -> Decoding:
    """Count an engine on a topology, by the mesh of the config.

    Raises:
        UserError: the mesh does not fit the devices, a size does not divide, or the model has fewer positions.
    """
    layout = whole_rows(Layout.abstract(cfg.mesh, topology.devices, topology.slices))
    decoder, context = Decoder(cfg.model, Policy.from_config(cfg.numerics)), context_of(cfg.model, load.context)
    shapes = jax.eval_shape(
        lambda: programs.make_state(programs.Placed(decoder), load.rows, rounded_slots(context, WIDTHS[-1]))
    )
    counters = sum(leaf.size * leaf.dtype.itemsize for leaf in (shapes.seen_RV, shapes.counts_RV, shapes.bias_RV))
    weights, weights_read = _weights(decoder, layout, load.rows)
    cache, cache_read = _cache(decoder, layout, shapes.cache, context)
    # A token at the end of a full row sees twice the keys of the average one. Rows are whole on each device: only what
    # splits a product makes it less work.
    flops = load.rows * forward_flops(cfg.model, matmul_params(decoder), 2 * context) / layout.parts("heads")
    chip = topology.chip
    return Decoding(
        config=name,
        topology=str(topology),
        rows=load.rows,
        context=context,
        weights=weights,
        copied=second_copy(decoder, layout if topology.devices > 1 else None),
        cache=cache,
        counters=counters,
        weights_read=weights_read,
        cache_read=cache_read,
        hbm=chip.hbm,
        memory_seconds=(weights_read + cache_read) / chip.hbm_bandwidth,
        compute_seconds=flops / chip.flops,
    )


def _weights(decoder: Decoder, layout: Layout, rows: int) -> tuple[int, int]:
    """Bytes of parameters that a device holds, and that it reads in a step."""
    model, held, read = decoder.config, 0, 0.0
    shapes, axes = abstract_params(decoder)
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    for (path, leaf), names in zip(flat, tree.flatten_up_to(axes), strict=True):
        name, size = jax.tree_util.keystr(path, simple=True, separator="."), leaf.size * leaf.dtype.itemsize
        layout.spec(names, leaf.shape, name)
        held += size // math.prod(layout.parts(axis) for axis in names)
        # What `fsdp` splits is gathered before it is used; tensor and expert axes leave a device with its part.
        split = math.prod(layout.parts(axis) for axis in names if "fsdp" not in layout.along(axis))
        share = 1.0
        if name.endswith("embedding"):  # a table that is looked up, unless it is the head too
            share = float(model.tie_embeddings)
        elif "experts" in names:
            share = 1 - (1 - model.moe.top_k / model.moe.n_experts) ** rows
        read += share * size / split
    return held, int(read)


def _cache(decoder: Decoder, layout: Layout, cache: Any, context: int) -> tuple[int, int]:
    """Bytes of rows that a device holds, and that it reads and writes in a step when all are full."""
    held, read = 0, 0.0
    for layer, names in zip(cache, row_axes(decoder, cache), strict=True):
        sizes = [
            leaf.size * leaf.dtype.itemsize // math.prod(layout.parts(axis) for axis in axes)
            for leaf, axes in zip(jax.tree.leaves(layer), jax.tree.leaves(names, is_leaf=_is_axes), strict=True)
        ]
        held += sum(sizes)
        if isinstance(layer, RowCache):  # of the slots those that hold a token
            read += sum(sizes) * context / layer.keys.shape[-1]
        else:
            states = not hasattr(layer, "window")  # a state is read and written anew
            read += sum(sizes) * (2 if states else 1)
    return held, int(read)


def _is_axes(leaf: Any) -> bool:
    return type(leaf) is tuple

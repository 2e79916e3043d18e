"""A plan: whether a run fits a machine, what limits it, what it takes and costs. As a table, or as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.plan.compile_elsewhere import Measured
from jaxlm.plan.memory import Memory
from jaxlm.plan.roofline import Times
from jaxlm.plan.topology import Topology

USABLE = 0.97
"""Share of a chip's memory that a program may have; the rest is the runtime's (15.75 of 16 GiB on a v5e)."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One config on one topology. Bytes and FLOP are those of one device, times those of one step."""

    config: str
    topology: str
    chip: str
    chips: int
    devices: int
    hosts: int
    mesh: dict[str, int]
    """Devices along each axis, over all slices."""
    remat: str
    microbatches: int
    batch_tokens: int
    """Tokens of one step, over all devices."""
    hbm: int
    estimate: Memory
    """Our own count."""
    measured: Measured | None
    """What the compiler says; None: it was not asked."""
    model_flops: int
    """What the mathematics needs: three forward passes (`jaxlm.counts.flops`)."""
    times: Times | None
    peak_flops: float
    price: float | None
    """USD for an hour of one chip."""
    tokens: float
    """The budget of the run."""

    @property
    def bytes(self) -> int:
        """Memory of one device, by the compiler if it was asked and is the chip's own, else by our count."""
        return self.estimate.bytes if self.measured is None or not self.of_chip else self.measured.bytes

    @property
    def of_chip(self) -> bool:
        """Whether the compiler was that of the chip."""
        return self.measured is not None and not self.measured.note

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        refused = self.measured is not None and self.measured.used_when_refused > 0
        return not refused and self.bytes <= USABLE * self.hbm

    @property
    def limit(self) -> str:
        """What binds: memory if it does not fit, else what takes longest."""
        return "memory" if not self.fits else self.times.limit if self.times else "unknown"

    def mfu(self, seconds: float) -> float:
        """Share of the peak that goes into what the mathematics needs."""
        return self.model_flops / seconds / self.peak_flops

    def hours(self, seconds: float) -> float:
        """Hours for the budget."""
        return self.tokens / self.batch_tokens * seconds / 3600

    def cost(self, seconds: float) -> float | None:
        """USD for the budget."""
        return None if self.price is None else self.hours(seconds) * self.chips * self.price

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with what follows from them."""
        derived: dict[str, Any] = {"bytes": self.bytes, "fits": self.fits, "limit": self.limit}
        if self.times:
            for name, seconds in (("best", self.times.best), ("worst", self.times.worst)):
                derived[name] = {
                    "step_seconds": seconds,
                    "tokens_per_second": self.batch_tokens / seconds,
                    "mfu": self.mfu(seconds),
                    "hours": self.hours(seconds),
                    "cost": self.cost(seconds),
                }
        return {**dataclasses.asdict(self), **derived}

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        parts = [self._head(), self._memory()]
        if self.measured and self.times:
            parts += [self._work()] + ([self._links()] if self.measured.traffic else []) + [self._outcome()]
        notes = [self.measured.note] if self.measured and self.measured.note else []
        if self.measured and self.measured.unknown_loops:
            notes.append(f"{self.measured.unknown_loops} loops depend on data; each is counted as one turn")
        return Group(*parts, *(Text(f"note: {note}") for note in notes), Text(self.verdict, style="bold"))

    @property
    def verdict(self) -> str:
        """One sentence."""
        need, have = gib(self.bytes), gib(self.hbm)
        if not self.fits:
            short = gib(self.bytes - USABLE * self.hbm)
            return f"does not fit: {need} of {have} GiB a device, {short} too many. What binds is memory."
        return f"fits: {need} of {have} GiB a device. What binds is {self.limit}."

    def _head(self) -> Any:
        from rich.text import Text

        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        hosts = f"{self.hosts} host{'s' if self.hosts > 1 else ''}"
        parts = f", {self.microbatches} microbatches" if self.microbatches > 1 else ""
        return Text(
            f"{self.config} on {self.topology}: {self.chips} chips, {hosts}; mesh {axes}\n"
            f"{self.batch_tokens:,} tokens a step{parts}, remat {self.remat}"
        )

    def _memory(self) -> Any:
        table = _table("memory of a device", "our count, GiB", "compiler, GiB")
        # A compiler that refused for want of memory names one number only, what it would need: the table then shows the
        # sum and leaves its parts empty.
        own, compiled = self.estimate, self.measured
        measured = compiled is not None and not compiled.used_when_refused
        rows = [("parameters", own.parameters), ("optimiser", own.optimizer), ("batch", own.batch)]
        for name, size in rows:
            table.add_row(name, gib(size), "")
        table.add_row("state and batch", gib(own.state), gib(compiled.argument_bytes) if compiled and measured else "")
        for name, size in (("gradients", own.gradients), ("activations", own.activations), ("working", own.working)):
            table.add_row(name, gib(size), "")
        besides = own.gradients + own.activations + own.working
        table.add_row("temporaries", gib(besides), gib(compiled.temporary_bytes) if compiled and measured else "")
        table.add_row("together", gib(own.bytes), gib(compiled.bytes) if compiled else "", style="bold")
        table.add_row(f"a {self.chip} has", gib(self.hbm), "")
        return table

    def _work(self) -> Any:
        compiled, times = self.measured, self.times
        assert compiled is not None and times is not None
        table = _table("work of a device in a step", "amount", "seconds")
        table.add_row("FLOP", f"{compiled.flops:.4g}", f"{times.compute:.4f}")
        table.add_row("  needed by the model", f"{self.model_flops:.4g}", "")
        table.add_row("  recomputed (remat)", f"{compiled.recomputed_flops:.4g}", "")
        table.add_row("memory traffic, GB", f"{compiled.memory_traffic / 1e9:,.1f}", f"{times.memory:.4f}")
        table.add_row("operations one by one", "", f"{times.busy:.4f}")
        return table

    def _links(self) -> Any:
        assert self.measured is not None
        table = _table("collectives of a step", "axes", "runs", "GB sent", "GB/s", "seconds")
        for one in self.measured.traffic:
            speed, sent = one.bandwidth, one.bytes
            row = ("+".join(one.axes), f"{one.runs:,}", f"{sent / 1e9:,.3f}", f"{speed / 1e9:,.0f}")
            table.add_row(one.kind, *row, f"{sent / speed:.4f}")
        return table

    def _outcome(self) -> Any:
        assert self.times is not None
        table = _table("a step", "all overlaps", "nothing overlaps")
        both = (self.times.best, self.times.worst)
        table.add_row("seconds", *(f"{seconds:.4f}" for seconds in both))
        table.add_row("tokens a second", *(f"{self.batch_tokens / seconds:,.0f}" for seconds in both))
        table.add_row("MFU", *(f"{100 * self.mfu(seconds):.1f} %" for seconds in both))
        table.add_row(f"hours for {self.tokens:.3g} tokens", *(f"{self.hours(seconds):,.1f}" for seconds in both))
        if self.price is not None:
            label = f"USD at {self.price:.2f} a chip and hour"
            table.add_row(label, *(f"{self.cost(seconds):,.0f}" for seconds in both))
        return table


def gib(size: int | float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:,.2f}"


def price_of(topology: Topology, price: float | None) -> float | None:
    """USD for an hour of one chip: the user's, else the list price if there is one."""
    listed = topology.chip.price
    return price if price is not None else listed


def _table(first: str, *others: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True, min_width=26)
    for name in others:
        table.add_column(name, justify="right")
    return table

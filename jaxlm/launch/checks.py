"""What the preflight concludes from what the processes have seen: pure functions of their records, in order of process.

Imports no JAX.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

MAX_SKEW = 1.0
"""Seconds by which clocks may differ: more, and times of files and logs of the hosts cannot be compared."""
SLOW = 0.5
"""A pair of processes with less than this share of the median bandwidth is named."""
SLOW_LINKS = {"PHB", "NODE", "SYS"}
"""Of `nvidia-smi topo -m`: through the host bridge of a CPU, between its bridges, or between CPUs."""

Record = Mapping[str, Any]
Verdict = Literal["ok", "warn", "FAIL"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the preflight."""

    name: str
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:4}  {self.name:10}  {self.text}"


def same(name: str, records: Sequence[Record]) -> Check:
    """Every key of the records has one value in all processes; those that differ from the most frequent are named."""
    differing = []
    for key in dict.fromkeys(key for record in records for key in record):
        values = [str(record.get(key)) for record in records]
        usual = collections.Counter(values).most_common(1)[0][0]
        odd = [f"process {index} has {value}" for index, value in enumerate(values) if value != usual]
        if odd:
            differing.append(f"{key} {usual}, but {', '.join(odd)}")
    text = ", ".join(f"{key} {value}" for key, value in records[0].items())
    return Check(name, "FAIL", "; ".join(differing)) if differing else Check(name, "ok", text)


def devices(records: Sequence[Record], expected: int) -> Check:
    """As many devices of one kind in each process, and in all as many as expected (0: any number)."""
    equal = same("devices", [{"local": record["count"], "kind": record["kind"]} for record in records])
    total = sum(record["count"] for record in records)
    seen = f"{total} ({records[0]['kind']}), processes: {len(records)}"
    if equal.verdict != "ok":
        return Check("devices", "FAIL", f"{total} in all; {equal.text}")
    if expected and total != expected:
        return Check("devices", "FAIL", f"{seen}, {expected} expected")
    return Check("devices", "ok", seen)


def storage(folder: str, records: Sequence[Record], needed: int) -> Check:
    """Every process has written, and has read what process 0 wrote, and process 0 what they wrote; there is room.

    A record: `error` (why writing failed, or ""), `read` (whether process 0's file was there), `seen` (by process 0:
    the processes whose files were there), `free` (bytes).
    """
    wrong = [
        f"process {index} cannot write: {record['error']}" for index, record in enumerate(records) if record["error"]
    ]
    unshared = [
        index
        for index, record in enumerate(records)
        if not record["error"] and not (record["read"] and index in records[0]["seen"])
    ]
    if unshared and not records[0]["error"]:
        wrong.append(f"not shared: process {', '.join(map(str, unshared))} and process 0 do not see each other's files")
    free = min((record["free"] for record in records if not record["error"]), default=0)
    if not wrong and free < needed:
        wrong.append(f"{free / 1e9:.1f} GB free, the checkpoints need {needed / 1e9:.1f} GB")
    return Check("storage", "FAIL" if wrong else "ok", f"{folder}: {'; '.join(wrong) or f'{free / 1e9:.1f} GB free'}")


def clocks(times: Sequence[Sequence[float]]) -> Check:
    """Clocks read at the same moments, a few times by each process: the least difference to process 0 counts."""
    skews = [min((mine - first for mine, first in zip(own, times[0], strict=True)), key=abs) for own in times]
    off = [f"process {index} by {skew:+.1f} s" for index, skew in enumerate(skews) if abs(skew) > MAX_SKEW]
    if off:
        return Check("clocks", "FAIL", f"off against process 0: {', '.join(off)}")
    return Check("clocks", "ok", f"within {max(map(abs, skews)) * 1e3:.0f} ms")


def all_reduce(rows: Sequence[Record], wrong: Sequence[int]) -> Check:
    """Right sums, and the bus bandwidth of each size. A row: `bytes` of each device, `seconds`, `gb_per_second`."""
    if wrong:
        return Check("all-reduce", "FAIL", f"wrong sums in process {', '.join(map(str, wrong))}")
    sizes = ", ".join(f"{row['bytes'] / 1e6:.0f} MB at {row['gb_per_second']:.2f} GB/s" for row in rows)
    return Check("all-reduce", "ok", sizes or "one device: nothing to reduce")


def pairs(rows: Sequence[Record]) -> Check | None:
    """Neighbouring processes, whose link is slow beside the others. A row: `processes`, `hosts`, `gb_per_second`."""
    if len(rows) < 2:
        return None
    median = statistics.median(row["gb_per_second"] for row in rows)
    slow = [row for row in rows if row["gb_per_second"] < SLOW * median]
    named = [
        f"{row['processes'][0]}-{row['processes'][1]} ({' and '.join(row['hosts'])}) {row['gb_per_second']:.2f} GB/s"
        for row in slow
    ]
    text = f"median {median:.2f} GB/s" + (f", slow: {', '.join(named)}" if slow else "")
    return Check("pairs", "warn" if slow else "ok", text)


def links(hosts: Mapping[str, str]) -> Check | None:
    """GPUs of a host that reach each other through its CPUs only, from its `nvidia-smi topo -m`."""
    slow, counted = [], 0
    for host, text in hosts.items():
        rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
        gpus = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
        for index, row in enumerate(gpus):
            for other, link in enumerate(row[1 : index + 1]):
                counted += 1
                if link in SLOW_LINKS:
                    slow.append(f"{host} GPU{other}-GPU{index} {link}")
    if not counted:
        return None
    return Check("links", "warn" if slow else "ok", f"slow: {', '.join(slow)}" if slow else f"{counted} pairs of GPUs")

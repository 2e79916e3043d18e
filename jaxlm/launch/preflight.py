"""Before the first step is paid for: are the machines of a run what it takes them for?

Every process runs this, under any launcher:

    jaxlm launch local --processes 4 -- launch preflight configs/quickstart.toml

They tell each other what they see through the key-value store of `jax.distributed`, which works when devices and links
do not, and all come to the same conclusion.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # no public name for the client of the key-value store
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import __version__, config
from jaxlm.config import toml
from jaxlm.launch import checks
from jaxlm.launch.checks import Check
from jaxlm.mesh import Layout
from jaxlm.processes import meet

PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain", "libtpu", "jax-cuda12-plugin", "nvidia-nccl-cu12")
PATIENCE = 120
"""Seconds to wait for an answer of another process."""
VISIBLE_WITHIN = 10.0
"""Seconds: a network file system may show a new file late."""
MEGABYTES = {"cpu": (1, 4)}
"""What each device reduces, by platform; where it is not listed, `ALL_MEGABYTES`."""
ALL_MEGABYTES = (1, 8, 64)
TRIES = 5


def preflight(cfg: config.Config, *, devices: int = 0, out: Path | None = None) -> bool:
    """Check all, print a line for each check in process 0, and write them as JSON; returns whether nothing failed.

    Args:
        devices: how many there should be in all processes together; 0: any number.
        out: the JSON file; None: `preflight.json` in the run directory.

    Raises:
        UserError: the processes do not find each other, or the mesh does not fit.
    """
    meet.initialize(cfg.distributed)
    try:
        found, seen = _all(cfg, devices)
    except Silent as silent:
        print(Check("answers", "FAIL", str(silent)), flush=True)
        meet.leave(1)  # a shutdown would wait for those that do not answer
        return False
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    passed = all(check.verdict != "FAIL" for check in found)
    if not seen["process"]:
        for check in found:
            print(check, flush=True)
        report = {"passed": passed, "checks": [dataclasses.asdict(check) for check in found], **seen}
        with contextlib.suppress(OSError):  # storage that cannot be written has failed above
            path = out or Path(cfg.out_dir) / "preflight.json"
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(f"      {path}", flush=True)
    if passed:  # as many devices as there should be: then a mesh that does not fit them is a mistake to mend
        Layout.from_config(cfg.mesh)
    return passed


def _all(cfg: config.Config, expected: int) -> tuple[list[Check], dict[str, Any]]:
    """Every check in order, and the figures behind them."""
    talk = Talk()
    versions = talk.exchange("versions", own_versions(cfg))
    found = [checks.same("versions", versions)]
    hosts = talk.exchange("hosts", socket.gethostname())
    clocks = talk.exchange("clocks", [talk.now(f"clock-{index}") for index in range(TRIES)])
    local = jax.local_devices()  # all processes at once: what is first to use a device waits for the others
    needed = checkpoint_bytes(cfg) if talk.process == 0 else 0
    for label, folder, room in (("run", cfg.out_dir, needed), ("cache", cfg.data.cache_dir, 0)):
        found.append(checks.storage(folder, shared_folder(talk, label, Path(folder)), room))
    found.append(checks.clocks(clocks))
    counts = talk.exchange("devices", {"count": len(local), "kind": local[0].device_kind})
    found.append(checks.devices(counts, expected))
    rows, right = reduce_all(jax.devices())
    wrong = [index for index, one in enumerate(talk.exchange("sums", right)) if not one]
    found.append(checks.all_reduce(rows, wrong))
    neighbours = _pairs(talk, hosts)
    topologies = talk.exchange("links", _nvidia_topology())
    several = [checks.pairs(neighbours), checks.links(dict(zip(hosts, topologies, strict=True)))]
    found += [check for check in several if check]
    figures = {"hosts": hosts, "versions": versions, "devices": counts, "all_reduce": rows, "pairs": neighbours}
    return found, {"process": talk.process, **figures}


class Silent(Exception):
    """A process did not answer in time."""


class Talk:
    """What the processes tell each other, through the coordinator."""

    def __init__(self) -> None:
        self.process = global_state.process_id or 0
        self.processes = global_state.num_processes or 1
        self._client: Any = global_state.client

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Everybody's value, in order of process; any JSON.

        Raises:
            Silent: a process did not tell its own.
        """
        if self._client is None:
            return [value]
        self._client.key_value_set(f"preflight/{key}/{self.process}", json.dumps(value))
        return [self._answer_of(key, index) for index in range(self.processes)]

    def _answer_of(self, key: str, index: int) -> Any:
        try:
            return json.loads(self._client.blocking_key_value_get(f"preflight/{key}/{index}", PATIENCE * 1000))
        except jax.errors.JaxRuntimeError:
            raise Silent(f"process {index} did not tell its {key} in {PATIENCE} s; see its log") from None

    def now(self, key: str) -> float:
        """This host's clock at a moment that is the same for all, within the time of a message."""
        self.meet(key)
        return time.time()

    def meet(self, key: str) -> None:
        """Wait until all are here.

        Raises:
            Silent: not all came.
        """
        if self._client is not None:
            try:
                self._client.wait_at_barrier(f"preflight/{key}", PATIENCE * 1000)
            except jax.errors.JaxRuntimeError:
                raise Silent(f"not all processes came to {key} in {PATIENCE} s; see their logs") from None


def own_versions(cfg: config.Config) -> dict[str, str]:
    """Versions of what must be equal everywhere, and the digest of the resolved config."""
    versions = {"python": platform.python_version(), "jaxlm": __version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    anyone = dataclasses.replace(cfg.distributed, coordinator="", processes=0, process_id=-1)
    resolved = toml.to_toml(dataclasses.replace(cfg, distributed=anyone, out_dir=""))
    return versions | {"config": hashlib.sha256(resolved.encode()).hexdigest()[:12]}


def checkpoint_bytes(cfg: config.Config) -> int:
    """What the checkpoints take on disk: parameters and two moments, `keep` of them, the best one and one under way."""
    from jaxlm.counts.parameters import parameters

    vocab_size = cfg.model.vocab_size or cfg.tokenizer.vocab_size
    total, _ = parameters(dataclasses.replace(cfg.model, vocab_size=vocab_size))
    return 3 * total * np.dtype(cfg.numerics.params).itemsize * (cfg.checkpoint.keep + 2)


def shared_folder(talk: Talk, label: str, folder: Path) -> list[dict[str, Any]]:
    """Each process writes a file and reads that of process 0, which reads all: records for `checks.storage`."""
    word = talk.exchange(f"{label}-word", uuid.uuid4().hex)[0]
    names = [folder / f".preflight-{word}-{index}" for index in range(talk.processes)]
    own: dict[str, Any] = {"error": "", "read": False, "seen": [], "free": 0}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names[talk.process].write_text(word, encoding="utf-8")
        own["free"] = shutil.disk_usage(folder).free
    except OSError as error:
        own["error"] = error.strerror or str(error)
    written = [not error for error in talk.exchange(f"{label}-written", own["error"])]
    own["read"] = written[0] and _reads(names[0], word)
    if talk.process == 0:
        own["seen"] = [index for index, name in enumerate(names) if written[index] and _reads(name, word)]
    talk.meet(f"{label}-read")
    with contextlib.suppress(OSError):
        names[talk.process].unlink(missing_ok=True)
    return talk.exchange(f"{label}-record", own)


def _reads(path: Path, word: str) -> bool:
    """Whether `path` holds `word`, or soon does."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    while True:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == word:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def reduce_all(devices: Sequence[Any], megabytes: Sequence[int] | None = None) -> tuple[list[dict[str, float]], bool]:
    """Time an all-reduce over `devices`, in float32: a row for each size, and whether this process has the right sums.

    Bandwidth is bytes that cross each link, 2 (n - 1) / n of the size, by the best time of a few.
    """
    count = len(devices)
    if count == 1:
        return [], True
    mesh = Mesh(np.array(devices), ("all",))
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("all"), PartitionSpec()))
    reduce = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole)
    rows, right = [], True
    for size in megabytes or MEGABYTES.get(devices[0].platform, ALL_MEGABYTES):
        x = _numbered(count, size * 250_000, split)
        total = reduce(x)
        sums = np.asarray(total.addressable_shards[0].data)
        right = right and bool((sums == count * (count + 1) / 2).all())
        times = []
        for _ in range(TRIES):
            start = time.perf_counter()
            reduce(x).block_until_ready()
            times.append(time.perf_counter() - start)
        moved = 2 * (count - 1) / count * size * 1e6
        rows.append({"bytes": size * 1e6, "seconds": min(times), "gb_per_second": moved / min(times) / 1e9})
    return rows, right


def _numbered(count: int, length: int, split: NamedSharding) -> jax.Array:
    """[count, length] on as many devices: the rows are 1, 2, 3, ..."""

    def row(index: Any) -> np.ndarray:
        return np.full((1, length), 1 + (index[0].start or 0), np.float32)

    return jax.make_array_from_callback((count, length), split, row)


def _pairs(talk: Talk, hosts: Sequence[str]) -> list[dict[str, Any]]:
    """The all-reduce of each two neighbouring processes, half of them at a time; a TPU slice has no such parts."""
    platform_ = jax.devices()[0].platform
    if talk.processes < 3 or platform_ == "tpu":
        return []
    rows = []
    for first in (0, 1):
        talk.meet(f"pairs-{first}")
        mine = talk.process - (talk.process - first) % 2
        pair = (mine, mine + 1)
        row = None
        if mine >= 0 and pair[1] < talk.processes:
            members = [device for device in jax.devices() if device.process_index in pair]
            measured, _ = reduce_all(members, MEGABYTES.get(platform_, ALL_MEGABYTES)[-1:])
            row = {"processes": pair, "hosts": [hosts[one] for one in pair], **measured[0]}
        answers = talk.exchange(f"pairs-{first}", row if talk.process == mine else None)
        rows += [row for row in answers if row]
    return sorted(rows, key=lambda row: row["processes"][0])


def _nvidia_topology() -> str:
    """`nvidia-smi topo -m`; empty where there is none."""
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""

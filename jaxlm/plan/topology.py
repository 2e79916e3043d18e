"""Machines that are not here: `v5p:4x4x4`, `2*v6e:16x16`, `h100:512`, `cpu:8` as devices that a step is compiled for.

Where the compiler of the chip is installed (extras `plan-tpu` and `plan-gpu`), the devices are its abstract ones.
Otherwise they are virtual CPU devices: the partitioner is the same, memory and traffic are those of the CPU's compiler.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxlm.errors import UserError, did_you_mean
from jaxlm.plan import cuda
from jaxlm.plan.chips import CHIPS, Chip
from jaxlm.processes.libtpu_silence import NO_CLOUD

MAX_DEVICES = 2**16
_FORM = re.compile(r"(?:(\d+)\*)?([a-z0-9-]+):(\d+(?:x\d+)*)")
_QUIET = {
    **NO_CLOUD,
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is held, so several processes may compile
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # jax asks the driver, which is not here
}
_SHAPES = {3: "4x4x4", 2: "8x8", 0: "64"}


class Topology(NamedTuple):
    """Slices of equal shape; chips of one slice are joined by their own links, slices by the network."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension of the torus; one number for GPUs and CPUs."""
    slices: int = 1

    def __str__(self) -> str:
        many = f"{self.slices}*" if self.slices > 1 else ""
        return f"{many}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Packages, as they are counted in the name."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Devices of JAX: a v7x chip has two."""
        return self.chips * self.per_chip

    @property
    def per_chip(self) -> int:
        """Devices of one chip."""
        return 2 if self.chip.name == "v7x" else 1

    @property
    def hosts(self) -> int:
        """Machines."""
        return max(1, -(-self.devices // self.chip.host))


class Target(NamedTuple):
    """Devices to compile for, and whose compiler it is."""

    devices: Sequence[Any]
    compiler: str
    """`tpu`, `gpu` or `cpu`."""
    note: str
    """What the figures are worth; empty: they are those of the chip."""


def parse(text: str, slices: int = 1) -> Topology:
    """Read `CHIP:SHAPE` or `SLICES*CHIP:SHAPE`.

    Raises:
        UserError: an unknown chip, or a shape that the chip does not come in.
    """
    found = _FORM.fullmatch(text.strip().lower())
    if found is None:
        raise UserError(f"topology {text!r}", "write CHIP:SHAPE, such as v5p:4x4x4, v6e:16x16, h100:512, 2*v5p:8x8x8")
    # The vendor sells slices of certain shapes only. Refusing others here costs nothing; the compiler would refuse them
    # after a minute with a message of its own.
    many, name, shape_text = found.groups()
    if name not in CHIPS:
        raise UserError(f"topology {text!r}: unknown chip {name!r}", did_you_mean(name, CHIPS))
    chip, shape = CHIPS[name], tuple(int(side) for side in shape_text.split("x"))
    topology = Topology(chip, shape, slices=max(int(many or 1), slices))
    if len(shape) != max(chip.dims, 1) or not all(shape) or not topology.slices:
        sides = f"{chip.dims} sides" if chip.dims else "a number"
        raise UserError(f"topology {text!r}: {name} takes {sides}", f"such as {name}:{_SHAPES[chip.dims]}")
    if chip.platform == "tpu" and math.prod(shape) > 1 and any(side % 2 for side in shape[:2]):
        raise UserError(f"topology {text!r}: a host has 2x2 chips", "let the first two sides be even")
    if chip.largest and math.prod(shape) > chip.largest:
        hint = f"a slice has {chip.largest:,} at most: write SLICES*{name}:SHAPE"
        raise UserError(f"topology {text!r}: {math.prod(shape):,} chips in one slice", hint)
    if topology.devices > MAX_DEVICES:
        raise UserError(f"topology {text!r}: {topology.devices:,} devices", f"{MAX_DEVICES:,} are the most")
    return topology


def has_tpu_compiler() -> bool:
    """Whether libtpu, the TPU compiler, is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compiler(topology: Topology) -> str:
    """Whose compiler compiles for it here: `tpu`, `gpu` or `cpu`."""
    platform = topology.chip.platform
    installed = (platform == "tpu" and has_tpu_compiler()) or (
        platform == "gpu" and cuda.has_cuda_compiler(topology.chip.name)
    )
    return platform if installed else "cpu"


@contextlib.contextmanager
def environment(topology: Topology) -> Iterator[None]:
    """What must stand in the environment when JAX is imported and until its devices are made, as before afterwards.

    Nothing is asked of a cloud, and logs are quiet.
    """
    before = dict(os.environ)
    # JAX reads these once, at import. Without them libtpu asks the metadata server of a cloud and waits for an answer
    # that does not come.
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if compiler(topology) == "cpu":
        kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
        os.environ["XLA_FLAGS"] = " ".join([*kept, f"--xla_force_host_platform_device_count={topology.devices}"])
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def target(topology: Topology) -> Target:
    """The devices of a topology, within its `environment`.

    Raises:
        UserError: the compiler refuses the shape, or this process has too few virtual devices.
    """
    import jax

    if compiler(topology) == "tpu":
        return Target(_tpu_devices(topology), "tpu", "")
    if compiler(topology) == "gpu":
        return Target(cuda.cuda_devices(topology.chip.name, topology.devices), "gpu", "")
    devices = jax.devices("cpu")[: topology.devices]
    if len(devices) < topology.devices:
        have = f"{len(devices)} virtual CPU devices of this process"
        raise UserError(f"{topology} needs {topology.devices} devices, more than the {have}")
    notes = {
        "tpu": "compiled for virtual CPU devices: install the extra plan-tpu for the compiler of the chip",
        "gpu": "compiled for virtual CPU devices: install the extra plan-gpu for the compiler of the chip",
        "cpu": "",
    }
    return Target(devices, "cpu", notes[topology.chip.platform])


def _tpu_devices(topology: Topology) -> Sequence[Any]:
    from jax.experimental import topologies

    # Names as libtpu has them: v4 compiles for both cores of a chip together, and a single chip needs bounds of its
    # own, since a host has four.
    name, shape = topology.chip.name, "x".join(map(str, topology.shape))
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if name == "v4":
        options["chip_config_name"] = "megacore"
    if topology.devices == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        full = f"{'tpu7x' if name == 'v7x' else name}:{shape}"
        devices = topologies.get_topology_desc(platform="tpu", topology_name=full, **options).devices
    except Exception as error:  # libtpu raises errors of several kinds, all plain
        raise UserError(f"{topology}: the TPU compiler refuses it: {str(error).splitlines()[0]}") from None
    if len(devices) != topology.devices:
        raise UserError(f"{topology}: the TPU compiler has {len(devices)} devices, {topology.devices} were expected")
    return devices

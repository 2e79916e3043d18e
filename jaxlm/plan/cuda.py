"""NVIDIA GPUs that are not here: CUDA's compiler in XLA, which needs neither driver nor device (extra `plan-gpu`).

The target is given by XLA's `GpuTargetConfigProto`. The figures are those of the CUDA runtime
(`cudaDeviceProp`) on the SXM boards, as XLA keeps them in xla/backends/gpu/target_config/specs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from jaxlm.errors import UserError
from jaxlm.plan.chips import CHIPS

_HOPPER: dict[str, Any] = {
    "compute_capability": 9,
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "l2_cache_size": 52_428_800,
    "shared_memory_per_core": 233_472,
    "shared_memory_per_block_optin": 232_448,
}
_BOARDS: dict[str, dict[str, Any]] = {
    "a100": {
        "compute_capability": 8,
        "core_count": 108,
        "fpus_per_core": 64,
        "clock_rate_ghz": 1.41,
        "l2_cache_size": 41_943_040,
        "shared_memory_per_core": 167_936,
        "shared_memory_per_block_optin": 166_912,
        "memory_bandwidth": 2_039_040_000_000,
        "device_memory_size": 85_100_068_864,
        "name": "NVIDIA A100-SXM4-80GB",
    },
    "h100": _HOPPER
    | {
        "memory_bandwidth": 3_352_320_000_000,
        "device_memory_size": 84_942_979_072,
        "name": "NVIDIA H100 80GB HBM3",
    },
    "h200": _HOPPER
    | {
        "memory_bandwidth": 4_800_000_000_000,
        "device_memory_size": 151_397_597_184,
        "name": "NVIDIA H200 141GB HBM3e",
    },
    "b200": {
        "compute_capability": 10,
        "core_count": 148,
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.965,
        "l2_cache_size": 132_644_864,
        "shared_memory_per_core": 233_472,
        "shared_memory_per_block_optin": 232_448,
        "memory_bandwidth": 7_672_320_000_000,
        "device_memory_size": 191_514_411_008,
        "name": "NVIDIA B200",
    },
}
_BOARDS["a100-80"] = _BOARDS["a100"]
_ALL = {  # CUDA's limits, the same on all of them
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "shared_memory_per_block": 49_152,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
}
_CUDNN = "major: 9 minor: 8"  # the oldest that jax takes


def has_cuda_compiler(chip: str) -> bool:
    """Whether jax's CUDA plugin is installed, with cuDNN for attention, and the chip is one that is described here."""
    return chip in _BOARDS and all(map(_installed, ("jax_plugins.xla_cuda12", "nvidia.cudnn")))


def target_config(chip: str) -> str:
    """What the compiler must know of a chip, in the text form of `GpuTargetConfigProto`."""
    board = dict(_BOARDS[chip])
    name, capability = board.pop("name"), board.pop("compute_capability")
    limits = " ".join(f"{key}: {value}" for key, value in (_ALL | board).items())
    return (
        f"gpu_device_info {{ {limits} cuda_compute_capability {{ major: {capability} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ {_CUDNN} }} device_description_str: "{name}"'
    )


def cuda_devices(chip: str, count: int) -> Sequence[Any]:
    """Abstract devices of so many GPUs, on hosts of the usual size; see `topology.environment`.

    Raises:
        UserError: the compiler refuses them.
    """
    from jax.experimental import topologies

    # The shape decides which devices XLA takes to be joined by NVLink: those of one host.
    per_host = min(count, CHIPS[chip].host)
    shape = f"1x{-(-count // per_host)}x{per_host}"  # slices, hosts, devices of a host
    try:
        name = f"{chip}x{count}"
        return topologies.get_topology_desc(name, "cuda", target_config=target_config(chip), topology=shape).devices
    except Exception as error:  # XLA raises its own, whose class is private
        raise UserError(f"{chip}:{count}: the CUDA compiler refuses it: {str(error).splitlines()[0]}") from None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is its parent
        return False

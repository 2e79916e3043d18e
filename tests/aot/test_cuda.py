"""What the CUDA compiler makes of the training step; no GPU is needed, but the extra plan-gpu (`make plan-gpu`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from jaxlm import config
from jaxlm.plan import chips, cuda, topology


@pytest.mark.parametrize("chip", ["a100", "a100-80", "h100", "h200", "b200"])
def test_the_compiler_is_told_what_the_vendor_says(chip: str) -> None:
    """Memory and bandwidth agree with the table of chips: the driver keeps and counts a little differently."""
    found = dict(re.findall(r"(\w+): (\d+)", cuda.target_config(chip)))
    known = chips.CHIPS[chip]
    assert abs(int(found["memory_bandwidth"]) / known.hbm_bandwidth - 1) < 0.05
    assert abs(int(found["device_memory_size"]) / known.hbm - 1) < 0.08
    text = cuda.target_config(chip)
    assert text.count("{") == text.count("}") == 3


def test_without_the_compiler_a_gpu_is_a_virtual_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_installed", lambda module: module != "nvidia.cudnn")
    machine = topology.parse("h100:8")
    assert topology.compiler(machine) == "cpu"
    monkeypatch.setattr(cuda, "_installed", lambda module: True)
    assert topology.compiler(machine) == "gpu"
    assert topology.compiler(topology.parse("a100-40:8")) == "cpu"  # a board that is not described


def test_the_step_of_a_dense_model_runs_cudnn(compiled: Callable[..., Any]) -> None:
    machine = topology.parse("h100:8")
    if topology.compiler(machine) != "gpu":
        pytest.skip("the compiler for GPUs is not installed: pip install 'jaxlm[plan-gpu]'")
    sizes: Any = {"vocab_size": 256, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64}
    cfg = config.Config(
        model=config.Model(max_seq_len=256, layer_loop="scan", **sizes),
        data=config.Data(seq_len=256),
        train=config.Train(batch_size=8),
        numerics=config.Numerics(compute="bfloat16"),
        mesh=config.Mesh(data=1, fsdp=4, tensor=2),
    )
    with topology.environment(machine):
        text = compiled(cfg, topology.target(machine).devices).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text

"""What a benchmark cannot measure is refused before anything is measured: one line, exit code 2."""

from __future__ import annotations

import importlib
import os

import pytest


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("checkpoint --rounds 0", "--rounds: '0' is no whole number above 0"),
        ("compile_time --rounds x", "--rounds: 'x' is no whole number above 0"),
        ("convert --rounds -1", "--rounds: '-1' is no whole number above 0"),
        ("decode --only llama", "--only: there is no 'llama'; there are: "),
        ("decode --only jaxlm", "--only needs --out FILE"),
        ("decode_long --rounds 0", "--rounds: '0'"),
        ("distill --seeds 0", "--seeds: '0' is no whole number above 0"),
        ("engine --only 1,3", "--only: there is no '3'; there are: 1, 4, 5"),
        ("engine --requests 0", "--requests: '0'"),
        ("expert_exchange --steps 0", "--steps: '0'"),
        ("fim --steps 0", "--steps: '0'"),
        ("finetune --only word", "--only: there is no 'word'; there are: words, zero-shot"),
        ("finetune --minutes soon", "--minutes: 'soon' is no number of minutes"),
        ("gpu --rows 0", "--rows: '0'"),
        ("lora_step --rounds 0", "--rounds: '0'"),
        ("mamba_decode --rounds 0", "--rounds: '0'"),
        ("mamba_step --rounds 0", "--rounds: '0'"),
        ("moe_step --rounds 0", "--rounds: '0'"),
        ("packing --width 0", "--width: '0'"),
        ("rl --only reverse", "--only: there is no 'reverse'; there are: reverse-grpo"),
        ("rl --only ,", "--only: it names nothing"),
        ("rl --seeds 0;1", "--seeds: '0;1' is no list of seeds, such as 0,1,2"),
        ("rl_gradients runs/answers-add --phases 0", "--phases: '0'"),
        ("sandbox --programs 0", "--programs: '0'"),
        ("scaling --steps 0", "--steps: '0'"),
        ("sst2 runs/sst2 --only all", "--only: there is no 'all'; there are: words, tuned, base, template"),
        ("startup --rounds 0", "--rounds: '0'"),
        ("stopping --config configs/quickstart.toml", "name a file of configs/finetune"),
        ("train_memory --steps 0", "--steps: '0'"),
        ("train_step --rounds 1.5", "--rounds: '1.5'"),
        ("verdicts --times 0", "--times: '0'"),
    ],
)
def test_mistakes(command: str, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})  # some modules set what JAX reads when it starts
    name, *options = command.split()
    monkeypatch.setattr("sys.argv", [f"benchmarks.{name}", *options])
    with pytest.raises(SystemExit) as refused:
        importlib.import_module(f"benchmarks.{name}").main()
    assert refused.value.code == 2
    assert line in " ".join(capsys.readouterr().err.splitlines()[-1].split())

"""`jaxlm compare`: what it measures, what it leaves, what it refuses, and that it repeats nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.cli import main
from jaxlm.config import toml
from jaxlm.counts.parameters import parameters
from jaxlm.errors import UserError
from jaxlm.eval import compare as module
from jaxlm.eval.compare import BUDGET, DEFAULTS, compare, largest_rise
from tests.child_flags import with_devices

CONFIG = """
[model]
d_model = 32
n_layers = 1
n_heads = 2
d_ff = {d_ff}
activation = "{activation}"
[tokenizer]
kind = "bytes"
[data]
source = "{corpus}"
cache_dir = "{cache}"
seq_len = 32
validation_fraction = 0.2
[train]
steps = 9
batch_size = 4
[eval]
batches = 2
[log]
every = 2
[sample]
prompts = ["def "]
max_new_tokens = 4
"""


@pytest.fixture
def configs(tmp_path: Path) -> list[str]:
    """Two tiny configs of one size over one corpus."""
    (tmp_path / "corpus").mkdir()
    for i in range(20):
        (tmp_path / "corpus" / f"{i}.py").write_text(f"def add_{i}(a, b):\n    return a + b + {i}\n\n" * 4)
    for name, d_ff, activation in (("gated", 64, "swiglu"), ("plain", 96, "gelu")):
        text = CONFIG.format(corpus=tmp_path / "corpus", cache=tmp_path / "cache", d_ff=d_ff, activation=activation)
        (tmp_path / f"{name}.toml").write_text(text)
    return [str(tmp_path / "gated.toml"), str(tmp_path / "plain.toml")]


def test_two_models_side_by_side(configs, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("XLA_FLAGS", with_devices())
    monkeypatch.setattr(sys, "argv", ["jaxlm", "compare", *configs, "--steps", "4", "--out", str(out), "seed=3"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("gated", "plain", "bits/byte", "report.html"))

    found = json.loads((out / "compare.json").read_text())["rows"]
    assert [row["name"] for row in found] == ["gated", "plain"]
    for row in found:
        cfg = toml.load(out / row["name"] / "config.toml")
        assert (cfg.train.steps, cfg.seed) == (4, 3)
        assert (row["parameters"], row["active"]) == parameters(cfg.model)
        assert row["tokens"] == 4 * 4 * 32
        assert 3 < row["validation_loss"] < 7 and row["bits_per_byte"] > 3
        assert row["tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0 and 0 < row["mfu"] < 1.5
        assert 100 < row["peak_memory"] / 2**20 < 4000
    report = (out / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4 and "<td>plain" in report and "src=http" not in report
    assert {path.name for path in (out / "plots").iterdir()} == {
        "loss.png",
        "tokens_per_second.png",
        "memory.png",
        "decode.png",
    }

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("what is finished was done again"))
    again = compare(configs, ["seed=3"], out=out, steps=4)
    assert json.loads((out / "compare.json").read_text())["rows"] == found
    assert again.spread == 0 and again.warning == ""


def test_what_is_not_comparable_is_refused(configs, tmp_path) -> None:
    with pytest.raises(UserError, match=r"two configs are called 'gated'"):
        compare([configs[0], configs[0]], out=tmp_path / "out")
    text = Path(configs[1]).read_text()
    for change, message in [
        (("seq_len = 32", "seq_len = 64"), "gated and plain differ in data.seq_len: 32 and 64"),
        (("steps = 9", "steps = 8"), "gated and plain differ in train.steps: 9 and 8"),
        (('kind = "bytes"', "vocab_size = 300"), "gated and plain differ in tokenizer: "),
    ]:
        Path(configs[1]).write_text(text.replace(*change))
        with pytest.raises(UserError, match=message):
            compare(configs, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_training_that_fails_is_one_line(configs, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "argv", ["jaxlm", "compare", configs[0], "--out", str(tmp_path), "data.source=nowhere"])
    assert main() == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines[-1] == "error: gated: training failed (see above; the same command continues)"
    assert "nowhere" in lines[0]


def test_the_memory_of_a_process_is_its_own() -> None:
    """Linux counts the parent at the time of the fork as the child's, so the parent must load no framework."""
    code = """
import sys
from jaxlm.eval.compare import _process
print(*(_process(["-c", f"x = bytearray({n}); x[::4096] = x[::4096]"], "x") for n in (1, 2**28)))
print({"jax", "torch", "numpy", "matplotlib"} & sys.modules.keys() or "none")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    light, heavy, loaded = done.stdout.split()
    assert 0.6 * 2**28 < int(heavy) - int(light) < 1.2 * 2**28 and int(light) < 2**27
    assert loaded == "none"


def test_a_process_that_only_finds_a_finished_run_does_not_lower_the_peak(tmp_path) -> None:
    assert [module._peak(tmp_path, memory) for memory in (5, 9, 2)] == [5, 9, 9]


def test_a_spike_is_seen() -> None:
    assert largest_rise([5.0, 4.0, 3.0]) == 0
    assert largest_rise([5.0, 4.0, 3.0, 6.0, 3.5, 3.0], width=2) == 1.25  # means 4.5, 3.5, 4.5, 4.75, 3.25
    noise = [4.0, 4.3, 3.9, 4.2, 3.8, 4.1, 3.7, 4.0, 3.6]
    assert largest_rise(noise) < 0.05 < 1 < largest_rise([*noise, 9.0, 10.0, 9.0])


def test_the_four_of_the_repository_have_one_budget() -> None:
    """Parameters within 5 % of each other, and the same data, tokens and optimiser."""
    loaded = [toml.load(module._default(name)) for name in DEFAULTS]
    totals = [parameters(cfg.model)[0] for cfg in loaded]
    assert max(totals) / min(totals) - 1 <= BUDGET
    module._check_equal(DEFAULTS, loaded)
    assert len({(cfg.train, cfg.data, cfg.eval) for cfg in loaded}) == 1

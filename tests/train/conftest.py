"""A tiny corpus and tiny runs, in this process on one device or as a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.recipes import start
from jaxlm.run.metrics import OF_THE_MACHINE
from jaxlm.train.loop import Progress
from tests.child_flags import with_devices
from tests.waiting import HANGS

RUN = """
[model]
d_model = 16
n_layers = 2
n_heads = 2
n_kv_heads = 1
d_ff = 32
dropout = 0.1
[tokenizer]
kind = "bytes"
[data]
source = "{corpus}"
cache_dir = "{cache}"
seq_len = 16
validation_fraction = 0.2
[train]
steps = 12
batch_size = 4
microbatches = 2
warmup_steps = 4
[eval]
every = 5
batches = 2
[sample]
prompts = []
[checkpoint]
every = 3
[log]
every = 2
"""


SPREAD = (  # options of a run that many meshes can carry, in float64
    *("numerics.params=float64", "numerics.compute=float64", "numerics.matmul=highest"),
    *("model.n_heads=4", "model.n_kv_heads=4", 'model.pattern=["attention+moe"]', "model.d_ff=16"),
    *("train.microbatches=1", "train.batch_size=8", "train.steps=8", "eval.every=0", "log.every=1"),
)


class Runs:
    """Makes configs of tiny runs, trains them and reads what they leave."""

    def __init__(self, folder: Path) -> None:
        corpus = folder / "corpus"
        corpus.mkdir()
        words = ["def", "return", "if", "else", "for", "while", "class", "self", "import", "print", "lambda", "yield"]
        random = np.random.default_rng(0)
        for i in range(20):
            (corpus / f"{i:02}.py").write_text(" ".join(random.choice(words, 80)) + "\n")
        self.corpus, self.toml = corpus, folder / "tiny.toml"
        self.toml.write_text(RUN.format(corpus=corpus, cache=folder / "cache"))

    def config(self, out: Path, *overrides: str) -> config.Config:
        """The config of a run in `out`."""
        return toml.load(self.toml, [f'out_dir="{out}"', *overrides])

    def train(self, out: Path, *overrides: str, resume: bool = False) -> Progress:
        """Train in this process."""
        return start.run(self.config(out, *overrides), resume=resume)

    def command(self, out: Path, *overrides: str, resume: bool = False) -> list[str]:
        """The command line of a run on one device."""
        options = ["--resume"] if resume else []
        return [sys.executable, "-m", "jaxlm", "train", str(self.toml), f'out_dir="{out}"', *overrides, *options]

    def start(self, out: Path, *overrides: str, resume: bool = False, **options: Any) -> subprocess.Popen[str]:
        """Start a training process on one device."""
        environment = os.environ | {"XLA_FLAGS": with_devices(), "PYTHONUNBUFFERED": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.command(out, *overrides, resume=resume), env=environment, **pipes | options)

    def launch(
        self, out: Path, *overrides: str, processes: int, devices: int, resume: bool = False, restarts: int = 0
    ) -> subprocess.Popen[str]:
        """Start several processes with so many virtual devices each; what they print is in OUT/logs."""
        _, _, *command = self.command(out, *overrides, resume=resume)
        launcher = ["-m", "jaxlm", "launch", "local", f"--processes={processes}", f"--devices-per-process={devices}"]
        words = [sys.executable, *launcher, f"--restarts={restarts}", "--", *command[1:]]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(words, **pipes)

    def launched(self, out: Path, *overrides: str, **options: Any) -> None:
        """As `launch`; waits for the end, which must be a good one."""
        process = self.launch(out, *overrides, **options)
        said, _ = process.communicate(timeout=HANGS)
        assert process.returncode == 0, said

    def refused(self, out: Path, *overrides: str, resume: bool = False, **options: Any) -> str:
        """Run a process that must end with exit code 2 and one line on stderr besides progress; returns the line."""
        process = self.start(out, *overrides, resume=resume, **options)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2, errors
        lines = [line for line in errors.splitlines() if not line.startswith("step ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), errors
        return lines[0]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Configs and processes of tiny runs, over one corpus."""
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def spread() -> tuple[str, ...]:
    """Options of a run that many meshes can carry, in float64."""
    return SPREAD


@pytest.fixture(scope="session")
def two_processes(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with the options of `spread`, of two processes with two devices each, that nobody disturbs."""
    out = tmp_path_factory.mktemp("two")
    runs.launched(out, *SPREAD, "checkpoint.every=4", "checkpoint.keep=9", processes=2, devices=2)
    return out


@pytest.fixture(scope="session")
def leaves() -> Callable[[Path], dict[str, np.ndarray]]:
    """A function from a run directory to every array of its newest checkpoint, read without jaxlm."""

    def read(run: Path) -> dict[str, np.ndarray]:
        import orbax.checkpoint as ocp

        newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
        found: dict[str, np.ndarray] = {"": np.array(int(newest.name))}
        for item in ("params", "optimizer"):
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                known: Any = reader.metadata(newest / item).item_metadata
                numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), known.tree)  # whatever mesh
                tree = reader.restore(newest / item, args=ocp.args.PyTreeRestore(restore_args=numpy))
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
        return found

    return read


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[dict[str, Any]]]:
    """A function from a run directory to its metrics, less the timings."""

    def read(run: Path) -> list[dict[str, Any]]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not OF_THE_MACHINE.fullmatch(k)} for line in lines]

    return read

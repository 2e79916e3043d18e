"""Train several architectures on the same data, tokens and budget of parameters, and measure them side by side.

    jaxlm compare                                            the four of configs/compare
    jaxlm compare a.toml b.toml --steps 100 --out runs/ab train.batch_size=4

Each training is a process of its own, so that its peak memory is its own; this one loads no framework. What is finished
is not done again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxlm import config
from jaxlm.config import registry, toml
from jaxlm.errors import UserError
from jaxlm.report.comparison_page import write_page
from jaxlm.run.metrics import read_metrics

DEFAULTS = ("dense", "moe", "mamba", "hybrid")
BUDGET = 0.05
"""Share by which the parameters of two models may differ before the report speaks of it."""
EQUAL = ("data.source", "data.seq_len", "data.validation_fraction", "data.max_bytes", "train.steps", "train.batch_size")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One architecture, trained. Losses in nats a token, speeds in tokens a second, memory in bytes."""

    name: str
    pattern: tuple[str, ...]
    parameters: int
    active: int
    train_flops: int
    """FLOP of forward and backward for one token."""
    tokens: int
    """Tokens trained on."""
    loss: float
    """Of training, at the last step."""
    largest_rise: float
    """How far the training loss, the mean of five reports, ever stood above its lowest before: a spike shows here."""
    validation_loss: float
    bits_per_byte: float
    tokens_per_second: float
    """Median over the reports of the run after the first, which holds the compilation."""
    mfu: float
    """Of the highest peak that any of the runs measured: they ran on one machine."""
    peak_flops: float
    """FLOP/s of the machine, as this run found it."""
    peak_memory: int
    """Largest resident set of the training process."""
    decode_tokens_per_second: float
    """One row, greedy: see `decode_speed`."""
    cache_bytes_per_token: int
    cache_bytes_fixed: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All of them, in the order asked for."""

    rows: tuple[Measured, ...]
    out: Path

    @property
    def spread(self) -> float:
        """How much larger the largest model is than the smallest."""
        sizes = [row.parameters for row in self.rows]
        return max(sizes) / min(sizes) - 1

    @property
    def warning(self) -> str:
        """What is not equal."""
        return f"parameters differ by {self.spread:.0%}" if self.spread > BUDGET else ""

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        caption = "loss: held out, nats a token. GiB: peak of training. decode/s: tokens of one row."
        table = Table(title=self.warning or None, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for label, _, _ in COLUMNS:
            table.add_column(label, justify="left" if label == "model" else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(text(row) for _, _, text in COLUMNS))
        return table


Columns = tuple[tuple[str, str, Callable[[Measured], str]], ...]
COLUMNS: Columns = (
    ("model", "model", lambda row: row.name),
    ("parameters", "parameters", lambda row: f"{row.parameters / 1e6:,.2f}M"),
    ("active", "active", lambda row: f"{row.active / 1e6:,.2f}M"),
    ("loss", "validation loss", lambda row: f"{row.validation_loss:.3f}"),
    ("bits/byte", "bits/byte", lambda row: f"{row.bits_per_byte:.3f}"),
    ("tokens/s", "tokens/s", lambda row: f"{row.tokens_per_second:,.0f}"),
    ("MFU", "MFU", lambda row: f"{row.mfu:.1%}"),
    ("GiB", "peak memory, GiB", lambda row: f"{row.peak_memory / 2**30:,.2f}"),
    ("decode/s", "decode, tokens/s", lambda row: f"{row.decode_tokens_per_second:,.0f}"),
)
"""What a table shows: its heading on a terminal and on the page, and the text of a cell."""


def compare(
    configs: Sequence[str] = (), overrides: Sequence[str] = (), *, out: Path = Path("runs/compare"), steps: int = 0
) -> Comparison:
    """Train each of `configs` into OUT/NAME, measure it, and write `compare.json`, `plots/` and `report.html` to OUT.

    Args:
        configs: files or names; none: the four of `configs/compare`.
        overrides: `section.key=value`, for all of them.
        steps: of training; 0: as the configs say.

    Raises:
        UserError: a config is not usable, two have one name, they differ in data or tokens, or a training failed.
    """
    paths = [registry.find(name) for name in configs] or [_default(name) for name in DEFAULTS]
    overrides = [*overrides, *([f"train.steps={steps}"] if steps else [])]
    names = [path.stem for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two configs are called {name!r}", "the name of a file is that of its run")
    loaded = [toml.load(path, overrides) for path in paths]
    _check_equal(names, loaded)
    rows = [_one(path, name, overrides, out / name) for path, name in zip(paths, names, strict=True)]
    peak = max(row.peak_flops for row in rows)
    rows = [dataclasses.replace(row, mfu=row.tokens_per_second * row.train_flops / peak) for row in rows]
    comparison = Comparison(tuple(rows), out)
    write_page(comparison, COLUMNS)
    record = {"rows": [dataclasses.asdict(row) for row in rows], "parameter_spread": comparison.spread}
    (out / "compare.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return comparison


def largest_rise(losses: Sequence[float], width: int = 5) -> float:
    """How far the mean of `width` losses ever stood above the lowest before it; 0 for one that only falls."""
    means = [statistics.fmean(losses[max(0, i - width) : i]) for i in range(min(width, len(losses)), len(losses) + 1)]
    lowest, rise = float("inf"), 0.0
    for mean in means:
        rise, lowest = max(rise, mean - lowest), min(lowest, mean)
    return rise


def _default(name: str) -> Path:
    return registry.FOLDER.parent / "compare" / f"{name}.toml"


def _check_equal(names: Sequence[str], loaded: Sequence[config.Config]) -> None:
    """Data, tokenizer and tokens are the same for all."""
    first = toml.to_dict(loaded[0])
    for name, cfg in zip(names[1:], loaded[1:], strict=True):
        other = toml.to_dict(cfg)
        for key in ("tokenizer", *EQUAL):
            section, _, field = key.partition(".")
            was, now = (tree[section][field] if field else tree[section] for tree in (first, other))
            if was != now:
                raise UserError(f"{names[0]} and {name} differ in {key}: {was!r} and {now!r}", f"set {key}=... for all")


def _one(path: Path, name: str, overrides: Sequence[str], run: Path) -> Measured:
    """Train and measure one config, or read what was measured."""
    overrides = [*overrides, f"out_dir={json.dumps(str(run))}"]
    wanted = json.loads(json.dumps(toml.to_dict(toml.load(path, overrides))))
    kept = run / "measured.json"
    if kept.is_file():
        record = json.loads(kept.read_text(encoding="utf-8"))
        if record["config"] == wanted:
            return Measured(**record["measured"] | {"pattern": tuple(record["measured"]["pattern"])})
    print(f"{name}: training", file=sys.stderr, flush=True)
    memory = _peak(run, _process(["-m", "jaxlm", "train", str(path), *overrides, "--resume"], name))
    print(f"{name}: decoding", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "jaxlm.eval.decode_speed", str(run)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{name}: decoding failed", f"see above; {run} is kept")
    measured = _measured(name, wanted["model"]["pattern"], run, memory, json.loads(done.stdout.splitlines()[-1]))
    record = {"config": wanted, "measured": dataclasses.asdict(measured)}
    kept.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return measured


def _process(arguments: Sequence[str], name: str) -> int:
    """Run Python and return its largest resident set, in bytes."""
    process = subprocess.Popen([sys.executable, *arguments])
    while True:
        try:
            _, status, usage = os.wait4(process.pid, 0)
            break
        except KeyboardInterrupt:  # the child has it too and saves
            time.sleep(0.1)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{name}: training failed", "see above; the same command continues")
    return _bytes(usage)


def _peak(run: Path, memory: int) -> int:
    """The largest of all processes that trained a run: one that only finds it finished uses little."""
    kept = run / "peak_memory.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else 0
    kept.write_text(json.dumps(max(before, memory)), encoding="utf-8")
    return max(before, memory)


def _bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _measured(name: str, pattern: Sequence[str], run: Path, memory: int, decoded: dict[str, Any]) -> Measured:
    rows = read_metrics(run / "metrics.jsonl")
    training = [row for row in rows if row.get("loss") is not None]
    validation = [row for row in rows if row.get("validation_loss") is not None]
    if not training or not validation:
        raise UserError(f"{run}: no {'validation' if training else 'training'} loss", "is there enough text?")
    timed = training[1:] or training
    return Measured(
        name=name,
        pattern=tuple(pattern),
        parameters=decoded["total"],
        active=decoded["active"],
        train_flops=decoded["train_flops"],
        tokens=training[-1]["tokens"],
        loss=training[-1]["loss"],
        largest_rise=largest_rise([row["loss"] for row in training]),
        validation_loss=validation[-1]["validation_loss"],
        bits_per_byte=validation[-1]["validation_bits_per_byte"],
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in timed),
        mfu=statistics.median(row["mfu"] for row in timed),
        peak_flops=timed[-1]["tokens_per_second"] * decoded["train_flops"] / timed[-1]["mfu"],
        peak_memory=memory,
        decode_tokens_per_second=decoded["decode_tokens_per_second"],
        cache_bytes_per_token=decoded["cache_bytes_per_token"],
        cache_bytes_fixed=decoded["cache_bytes_fixed"],
    )

"""The whole proof: open a model, trace both frameworks in every dtype, judge, report."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxlm import config, config_file, registry
from jaxlm.compilation import enable_compilation_cache
from jaxlm.convert.load import Model, load
from jaxlm.errors import UserError
from jaxlm.models.decoder import Params
from jaxlm.parity.compare import Finding, compare_by_ratio, compare_exact, compare_tokens, look_again
from jaxlm.parity.inputs import Inputs, make_inputs, random_params
from jaxlm.parity.report import Report, describe
from jaxlm.parity.trace import DTYPES, JaxSide, Side, Trace

PARTS = 3
"""How often a side tells what it is doing in one dtype."""

Told = Callable[[str, str, str], None]
"""Called with the side, the dtype and what begins."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model to prove, and where it came from."""

    name: str
    settings: config.Config
    params: Params
    tokenizer_path: Path | None
    folder: Path | None
    """Where the report belongs."""


def check(
    model: str | Path | Model,
    other: str | Path | Model | None = None,
    *,
    out: str | Path | None = None,
    show: bool = False,
) -> Report:
    """Compare jaxlm, holding `model`, with torch_ref, holding `other` (default: the same weights, converted).

    Args:
        model, other: a run, a torch_ref folder, a Hugging Face folder, a config (random weights), or a loaded model.
        out: folder for `parity.json` and `parity.html`; by default a run's own, and nowhere for anything else.
        show: print progress and the table.

    Raises:
        UserError: torch is missing, or `model` or `out` cannot be used.
    """
    mirror = _mirror()
    began = time.monotonic()
    subject = _open(model)
    enable_compilation_cache(subject.settings.data.cache_dir)
    inputs = make_inputs(subject.settings.model, subject.tokenizer_path)
    second = subject if other is None else _open(other)
    settings = dataclasses.replace(subject.settings, model=second.settings.model)
    sides = JaxSide(subject.settings, subject.params), mirror.of(settings, second.params)
    with _progress(show) as told:
        findings, seconds = compare_sides(sides, inputs, told=told)
    seconds["all"] = time.monotonic() - began
    name = subject.name if other is None else f"{subject.name} and {second.name}"
    report = Report(name, describe(subject.settings.model), inputs.text, tuple(findings), seconds)
    folder = Path(out) if out is not None else subject.folder
    written = report.write(folder) if folder is not None else []
    if show:
        from rich.console import Console

        Console().print(report)
        for path in written:
            print(path)
    return report


def assert_parity(model: str | Path | Model, other: str | Path | Model | None = None) -> None:
    """Raise AssertionError with the first differing tensor unless both frameworks compute the same model: for tests."""
    report = check(model, other)
    if not report.same:
        raise AssertionError(report.verdict)


def compare_sides(
    sides: tuple[Side, Side],
    inputs: Inputs,
    dtypes: Sequence[str] = DTYPES,
    told: Told = lambda side, dtype, part: None,
) -> tuple[list[Finding], dict[str, float]]:
    """All findings, float64 first, each dtype in the order of computation; and the seconds that each part took.

    Both sides work at the same time, for one of them is often compiling.
    """
    findings: list[Finding] = []
    seconds: dict[str, float] = defaultdict(float)
    golden: Trace | None = None

    def trace(side: Side, dtype: str) -> Trace:
        with _timed(side.name, dtype, seconds, told) as part:
            return side.trace(dtype, inputs, part)

    with ThreadPoolExecutor(len(sides)) as pool:
        for dtype in ("float64", *(dtype for dtype in dtypes if dtype != "float64")):
            ours, theirs = pool.map(trace, sides, [dtype] * len(sides))
            if golden is None:
                golden = ours
                findings += compare_exact(ours, theirs, [side.name for side in sides])
            else:
                found = [*compare_by_ratio(dtype, golden, ours, theirs)]
                sound = all(one.ok for one in findings if one.dtype == "float64")
                findings += look_again(dtype, found, inputs, sides) if sound else found
            findings += compare_tokens(dtype, inputs, sides, (ours, theirs))
    return findings, dict(seconds)


@contextlib.contextmanager
def _timed(side: str, dtype: str, seconds: dict[str, float], told: Told) -> Iterator[Callable[[str], None]]:
    """A function that is told what begins, and adds the seconds of what has ended."""
    now: list[Any] = ["", time.monotonic()]

    def part(name: str) -> None:
        seconds[f"{side}, {now[0]}"] += time.monotonic() - now[1]
        now[:] = name, time.monotonic()
        if name:
            told(side, dtype, name)

    yield part
    part("")
    seconds.pop(f"{side}, ", None)


def _mirror() -> Any:
    """torch_ref's side; the only place that imports torch."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError("jaxlm parity needs PyTorch", "pip install 'jaxlm[torch]'") from None
    from jaxlm.parity.mirror import TorchSide

    return TorchSide


def _open(model: str | Path | Model) -> Subject:
    if isinstance(model, Model):
        return Subject(f"{model.kind} in memory", model.config, model.params, model.tokenizer_path, None)
    path = Path(model) if Path(model).exists() else registry.find(model)
    if path.suffix == ".toml":
        settings = config_file.load(path)
        if not settings.model.vocab_size:
            sized = dataclasses.replace(settings.model, vocab_size=settings.tokenizer.vocab_size)
            settings = dataclasses.replace(settings, model=sized)
        return Subject(f"{path}, random weights", settings, random_params(settings.model), None, None)
    loaded = load(path)
    folder = path if loaded.kind == "run" else None
    return Subject(str(path), loaded.config, loaded.params, loaded.tokenizer_path, folder)


@contextlib.contextmanager
def _progress(show: bool) -> Iterator[Told]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as progress:
        tasks: dict[str, Any] = {}

        def told(side: str, dtype: str, part: str) -> None:
            if side not in tasks:
                tasks[side] = progress.add_task(side, total=PARTS * len(DTYPES))
            else:
                progress.advance(tasks[side])
            progress.update(tasks[side], description=f"{side:<9} {dtype:<8} {part:<20}")

        yield told

"""Golden files: the present behaviour of a model, frozen, for the regression tests of other people.

    jaxlm parity MODEL --golden write tests/golden/model.json.gz
    jaxlm parity MODEL --golden check tests/golden/model.json.gz

float64 is judged by the estimated relative error of each tensor (`sketch`), at the bound of `jaxlm parity`. float32 and
bfloat16 are judged by how far they lie from the float64 of the same run, at most twice as far as when the file was
written: no sketch is needed, for float64 is the same as then or the check has failed already.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.convert.open_model import Model
from jaxlm.errors import UserError
from jaxlm.parity.check import progress_bars
from jaxlm.parity.golden.comparison import compare, explanations_of
from jaxlm.parity.golden.content import Progress, freeze
from jaxlm.parity.golden.file import Golden, read_golden
from jaxlm.parity.inputs import make_inputs
from jaxlm.parity.report import Report, describe
from jaxlm.parity.sides.jax_side import JaxSide
from jaxlm.parity.subject import open_subject
from jaxlm.parity.trace import DTYPES, Side
from jaxlm.processes.compile_cache import enable_compilation_cache


def write_golden(
    model: str | Path | Model,
    path: str | Path,
    *,
    computed_by: str = "jaxlm",
    dtypes: Sequence[str] = DTYPES,
    show: bool = False,
) -> Golden:
    """Freeze the behaviour of a model in a file.

    Args:
        model: a run, a torch_ref folder, a Hugging Face folder, a config (random weights), or a loaded model.
        path: the file, by custom NAME.json.gz; it is replaced.
        computed_by: `jaxlm` or `torch`.
        dtypes: float64, and those of float32 and bfloat16 that are wanted.
        show: print progress and the size.

    Raises:
        UserError: the model cannot be used, computes NaN, or the file cannot be written.
    """
    subject = open_subject(model)
    enable_compilation_cache(subject.settings.data.cache_dir)
    inputs = make_inputs(subject.settings.model, subject.tokenizer_path)
    with progress_bars(show) as progress:
        side = _side(subject, computed_by)
        golden = freeze(side, subject.settings, inputs, dtypes, functools.partial(progress, side.name))
    size = golden.save(path)
    if show:
        count = sum(len(names) for names in golden.levels.values())
        print(f"{path}: {count} tensors in {', '.join(golden.dtypes)}, {size / 1e3:.1f} kB")
    return golden


def check_golden(
    model: str | Path | Model,
    path: str | Path,
    *,
    computed_by: str = "jaxlm",
    out: str | Path | None = None,
    show: bool = False,
) -> Report:
    """Compare a model with a golden file; the arguments are those of `write_golden`, `out` is a folder for the report.

    Raises:
        UserError: the file or the model cannot be used.
    """
    began, golden = time.monotonic(), read_golden(path)
    subject = open_subject(model)
    enable_compilation_cache(subject.settings.data.cache_dir)
    seconds: dict[str, float] = {}
    with progress_bars(show) as progress:
        side = _side(subject, computed_by)
        findings = compare(golden, side, subject.settings, _timed(seconds, functools.partial(progress, side.name)))
    seconds["all"] = time.monotonic() - began
    report = Report(
        f"{subject.name} and {path}",
        describe(subject.settings.model),
        golden.shown.text,
        tuple(findings),
        seconds,
        who=f"{side.name} against {path}, written by {golden.computed_by} {golden.versions['jaxlm']}",
        explanations=explanations_of(findings),
    )
    written = report.write(out) if out is not None else []
    if show:
        from rich.console import Console

        Console().print(report)
        for file in written:
            print(file)
    return report


def assert_golden(model: str | Path | Model, path: str | Path, *, computed_by: str = "jaxlm") -> None:
    """Raise AssertionError with the first differing tensor unless the model behaves as the file says: for tests."""
    report = check_golden(model, path, computed_by=computed_by)
    if not report.same:
        raise AssertionError(report.verdict)


def _timed(seconds: dict[str, float], progress: Progress) -> Progress:
    """`progress`, which also adds the seconds of a part to `seconds` when the next one begins."""
    # The part at work and when it began. Two empty words at the end close the last part without opening another.
    now: list[Any] = []

    def part(dtype: str, name: str) -> None:
        if now:
            seconds[now[0]] = seconds.get(now[0], 0.0) + time.monotonic() - now[1]
        now[:] = f"{dtype}, {name}", time.monotonic()
        if name:
            progress(dtype, name)

    return part


def _side(subject: Any, computed_by: str) -> Side:
    if computed_by == "jaxlm":
        return JaxSide(subject.settings, subject.params)
    if computed_by != "torch":
        raise UserError(f"--with {computed_by}: a golden file is computed by jaxlm or by torch")
    try:
        from jaxlm.parity.sides.torch_side import TorchSide
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError("--with torch needs PyTorch", "pip install 'jaxlm[torch]'") from None
    return TorchSide.of(subject.settings, subject.params)

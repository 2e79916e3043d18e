"""The whole proof: open a model, trace both frameworks in every dtype, judge, report."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlm import config
from jaxlm.convert.open_model import Model as LoadedModel
from jaxlm.errors import UserError, did_you_mean
from jaxlm.infer.model import Model
from jaxlm.parity.bisect import Part, Replayed
from jaxlm.parity.both_sides import Progress, compare_sides
from jaxlm.parity.compare import (
    STORED,
    Finding,
    compare_config,
    compare_weights,
)
from jaxlm.parity.inputs import LEVELS, Inputs, make_inputs
from jaxlm.parity.report import Report, describe
from jaxlm.parity.sides.jax_side import JaxSide
from jaxlm.parity.subject import Subject, open_subject
from jaxlm.parity.trace import DTYPES, Side, without_balancing
from jaxlm.processes.compile_cache import enable_compilation_cache
from jaxlm.processes.settings import settings_restored

PARTS = 3
"""Parts of the work of a side in one dtype, each of which it announces."""


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two implementations and what they are shown."""

    subject: Subject
    second: Subject | None
    """The other model; None: the second side computes the same weights."""
    sides: tuple[Side, Side]
    inputs: Inputs
    notes: tuple[str, ...]
    """For the report: who computes what, and what is left out."""

    @property
    def names(self) -> list[str]:
        return [side.name for side in self.sides]


@settings_restored()
def check(
    model: str | Path | Model | LoadedModel,
    other: str | Path | Model | LoadedModel | None = None,
    *,
    out: str | Path | None = None,
    show: bool = False,
    computed_by: str | None = None,
    text: str = "",
    prompt: str = "",
    levels: Sequence[str] = LEVELS,
    dtypes: Sequence[str] = DTYPES,
) -> Report:
    """Compare jaxlm, holding `model`, with another implementation, holding `other` (default: the same weights).

    Args:
        model, other: a run, a torch_ref folder, a Hugging Face folder, a config (random weights), or a loaded model.
        out: folder for `parity.json` and `parity.html`; by default a run's own, and nowhere for anything else.
        show: print progress and the table.
        computed_by: what computes the other: `jaxlm`, `torch` or `hf`; by default transformers where it is installed
            and the model is a Hugging Face folder, else torch_ref.
        text, prompt: what to show them instead of the built-in text; see `inputs.make_inputs`.
        levels, dtypes: some of `inputs.LEVELS` and `trace.DTYPES`.

    Raises:
        UserError: torch is missing, or `model`, `out` or another argument cannot be used.
    """
    _require_known("level", levels, LEVELS)
    _require_known("dtype", dtypes, DTYPES)
    if computed_by != "jaxlm":
        _require_installed("torch", "torch")
    began = time.monotonic()
    pair = _opened(model, other, computed_by, levels, text, prompt)
    subject, sides, inputs = pair.subject, pair.sides, pair.inputs
    folder, seconds = Path(out) if out is not None else subject.folder, defaultdict[str, float](float)
    # Options and weights come first and cost nothing. The list keeps the order of the levels, and the verdict names the
    # first finding that is not the same.
    findings = _of_what_is_stored(pair)
    with progress_bars(show) as progress:
        compared: list[Finding] = []
        for some in compare_sides(sides, inputs, dtypes, progress, subject.settings.model, seconds):
            compared += some
            # A large model takes an hour: what is known lies in the folder should the process be killed.
            if folder is not None:
                _report(pair, (*findings, *compared), seconds, notes=pair.notes, unfinished=True).write(folder)
        findings += compared
        if other is None and sides[1].mirrors and inputs.wants("update"):
            findings += _of_stage(subject, progress)
        parts = _bisected(compared, Replayed(sides, inputs, subject.settings.model), seconds, progress)
        explanations = _explained(findings, pair, seconds, progress)
    notes = (*pair.notes, *_left_out(dtypes, compared, parts))
    seconds["all"] = time.monotonic() - began
    report = _report(pair, tuple(findings), seconds, tuple(parts), explanations, notes)
    _deliver(report, folder, show)
    return report


def _opened(
    model: str | Path | Model | LoadedModel,
    other: str | Path | Model | LoadedModel | None,
    computed_by: str | None,
    levels: Sequence[str],
    text: str,
    prompt: str,
) -> _Pair:
    """Open both models, make their sides, and rows that both can be shown; see `check`."""
    subject = open_subject(model, nearest=other is None)
    enable_compilation_cache(subject.settings.data.cache_dir)
    second = subject if other is None else open_subject(other, nearest=True)
    # Ids and positions must exist in both models: rows are made for the smaller of the two.
    sides, notes, plain = _sides(subject, second, computed_by)
    inputs = make_inputs(
        _smaller(subject.settings.model, second.settings.model),
        subject.tokenizer_path or second.tokenizer_path,
        text=text,
        prompt=prompt,
        levels=levels,
        plain=plain,
    )
    return _Pair(subject, second if other is not None else None, sides, inputs, notes)


def _of_what_is_stored(pair: _Pair) -> list[Finding]:
    """Compare two configs, and the weights of two models; a mirror of the first model has its config and weights."""
    findings: list[Finding] = []
    for key, value in (pair.second or pair.subject).refused.items():  # whatever levels are wanted: it is no mirror
        note = f"{value!r}, which {pair.names[1]} computes and jaxlm cannot express"
        findings.append(Finding(STORED, "config", key, math.inf, 0.0, note=note))
    if pair.second is not None and pair.inputs.wants("config"):
        findings += compare_config(pair.subject.settings.model, pair.second.settings.model, ("A", "B"))
    if (pair.second is not None or not pair.sides[1].mirrors) and pair.inputs.wants("weights"):
        findings += compare_weights(pair.sides[0].weights(), pair.sides[1].weights(), pair.names)
    return findings


def _report(
    pair: _Pair,
    findings: tuple[Finding, ...],
    seconds: dict[str, float],
    parts: tuple[Part, ...] = (),
    explanations: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
    unfinished: bool = False,
) -> Report:
    subject, second = pair.subject, pair.second
    return Report(
        subject.name if second is None else f"{subject.name} and {second.name}",
        describe(subject.settings.model),
        ("plain rows of one document, " if pair.inputs.plain else "packed rows of documents with padding, ")
        + pair.inputs.text,
        findings,
        seconds,
        who=_who(subject, second or subject, pair.names),
        parts=parts,
        explanations=explanations,
        notes=notes,
        unfinished=unfinished,
    )


def _left_out(dtypes: Sequence[str], compared: Sequence[Finding], parts: Sequence[Part]) -> Iterator[str]:
    """Name the dtypes that were not compared: a table with fewer columns would look like a proof."""
    left_out = [dtype for dtype in dtypes if compared and dtype not in {finding.dtype for finding in compared}]
    if left_out and parts:
        yield f"{', '.join(left_out)}: not compared, for the outputs differ in {parts[0].dtype}"


def _deliver(report: Report, folder: Path | None, show: bool) -> None:
    """Write the report into `folder`, if there is one; print it and the paths, if `show`."""
    written = report.write(folder) if folder is not None else []
    if not show:
        return
    from rich.console import Console

    Console().print(report)
    for path in written:
        print(path)


def assert_parity(
    model: str | Path | Model | LoadedModel, other: str | Path | Model | LoadedModel | None = None
) -> None:
    """Raise AssertionError with the first differing tensor unless both frameworks compute the same model: for tests."""
    report = check(model, other)
    if not report.same:
        raise AssertionError(report.verdict)


def _of_stage(subject: Subject, progress: Progress) -> Iterator[Finding]:
    """The objective and the updates of the stage, where it is another than that of a plain config."""
    if subject.settings.recipe == config.Config().recipe:
        return
    from jaxlm.parity.stage import compare_stage

    progress("both", "float64", "the training stage")
    yield from compare_stage(subject.settings, subject.params)


def _bisected(
    findings: Sequence[Finding], replayed: Replayed, seconds: dict[str, float], progress: Progress
) -> list[Part]:
    """Every operation on the same input, in the first dtype in which the outputs differ."""
    dtype = next((one.dtype for one in findings if one.level == "forward" and not one.ok), None)
    if dtype is None:
        return []
    progress("both", dtype, "bisection")
    began = time.monotonic()
    parts = replayed.parts(dtype)
    seconds["both, bisection"] = time.monotonic() - began
    return parts


def _explained(
    findings: Sequence[Finding], pair: _Pair, seconds: dict[str, float], progress: Progress
) -> tuple[str, ...]:
    """Why stored weights or float64 outputs differ, if they do."""
    # A search for the cause makes sense for exact differences alone. Options that differ are explained by themselves,
    # and differences below float64 alone are rounding.
    if all(one.ok or one.level == "config" or one.dtype not in ("float64", STORED) for one in findings):
        return ()
    if importlib.util.find_spec("torch") is None:
        return ()
    from jaxlm.parity.diagnose.search import explain

    progress("both", "float64", "explanation")
    began = time.monotonic()
    theirs = pair.second.settings.model if pair.second else None
    found = explain(*pair.sides, pair.subject.settings, theirs, pair.inputs)
    seconds["both, explanation"] = time.monotonic() - began
    return tuple(map(str, found))


def _sides(
    subject: Subject, second: Subject, computed_by: str | None
) -> tuple[tuple[Side, Side], tuple[str, ...], bool]:
    """Return the two sides, the notes for the report, and whether the second side needs plain rows."""
    # A public folder is judged by the implementation it was published for; weights of our own layouts can only be
    # judged by the mirror.
    chosen, notes = computed_by, ()
    if chosen is None and second.public is not None:
        chosen = "hf" if importlib.util.find_spec("transformers") else "torch"
        notes = () if chosen == "hf" else ("transformers is not installed: torch_ref computes the converted weights",)
    chosen = chosen or "torch"
    _require_known("implementation", [chosen], ("jaxlm", "torch", "hf"))
    settings = dataclasses.replace(subject.settings, model=second.settings.model)
    if second.refused and chosen != "hf":
        refused = ", ".join(f"{key} = {value!r}" for key, value in second.refused.items())
        raise UserError(f"{second.name}: jaxlm cannot express {refused} yet", "--with hf computes it by transformers")
    if chosen == "jaxlm":
        return (JaxSide(subject.settings, subject.params), JaxSide(settings, second.params, "jaxlm of B")), notes, False
    if chosen == "torch":
        from jaxlm.parity.sides.torch_side import TorchSide

        return (JaxSide(subject.settings, subject.params), TorchSide.of(settings, second.params)), notes, False
    if second.public is None:
        raise UserError(f"{second.name}: transformers only computes a Hugging Face folder", "jaxlm convert --to FAMILY")
    _require_installed("transformers", "hf")
    from jaxlm.parity.sides.transformers_side import HuggingFaceSide

    # transformers has other balancing losses than we have, and they are part of the training loss: both sides leave
    # them out, so that the rest can be compared.
    ours, settings = without_balancing(subject.settings), without_balancing(settings)
    if ours.model.moes and ours != subject.settings:
        notes = (*notes, "the balancing losses of the routers are left out: transformers has others")
    theirs = HuggingFaceSide(settings, second.public, ours.model.rope_layout)
    plain = not theirs.tells_documents_apart
    if plain:
        notes = (*notes, "transformers cannot separate documents in this model: rows of one document")
    return (JaxSide(ours, subject.params), theirs), notes, plain


def _require_installed(package: str, extra: str) -> None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        needed = {"torch": "PyTorch", "transformers": "transformers"}[package]
        raise UserError(f"jaxlm parity needs {needed}", f"pip install 'jaxlm[{extra}]'") from None


def _require_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{what} {name!r} is not known", did_you_mean(name, known))
    if not names:
        raise UserError(f"no {what} is named", f"known: {', '.join(known)}")


def _smaller(one: config.Model, other: config.Model) -> config.Model:
    """The first model with only the ids and positions that both have."""
    # Ids and positions beyond what one of the two has would be an error there and no difference.
    sizes = {name: min(getattr(one, name), getattr(other, name)) for name in ("vocab_size", "max_seq_len")}
    return dataclasses.replace(one, **sizes)


def _who(subject: Subject, second: Subject, names: Sequence[str]) -> str:
    if second is subject:
        return f"{names[0]} against {names[1]}"
    return f"A: {subject.name}, computed by {names[0]}; B: {second.name}, computed by {names[1].partition(' ')[0]}"


@contextlib.contextmanager
def progress_bars(show: bool) -> Iterator[Progress]:
    """Yield a function that moves one bar for each side; the bars are drawn only if `show`."""
    from rich import progress as rich_progress
    from rich.console import Console

    # The bars are drawn on stderr: stdout is the report, which may be piped.
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TimeElapsedColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bars:
        tasks: dict[str, Any] = {}

        def progress(side: str, dtype: str, part: str) -> None:
            if side not in tasks:
                tasks[side] = bars.add_task(side, total=PARTS * len(DTYPES))
            else:
                bars.advance(tasks[side])
            bars.update(tasks[side], description=f"{side:<12} {dtype:<8} {part:<20}")

        yield progress

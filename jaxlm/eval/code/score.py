"""Judge samples of a code task and add up the verdicts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.eval.code import kept
from jaxlm.eval.code.estimate import Estimate, interval, pass_at_k
from jaxlm.eval.code.metrics import MetricReport, isolation, marks, shown
from jaxlm.eval.code.problems import Problem
from jaxlm.eval.code.programs import cut, sanitise
from jaxlm.eval.code.samples import Sample, records, write_whole
from jaxlm.sandbox import HarnessError, Limits, Sandbox, Tests, Verdict, grade_many

SLOWER = 5.0
"""An answer may take so many times the processor time of the reference, but always 3 s."""
REFERENCE_SECONDS = 100.0
WITHOUT_REFERENCE = 10.0
KEPT = "references.jsonl"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CodeReport:
    """The scores of one task."""

    task: str
    problems: int
    samples: int
    passed: int
    verdicts: dict[str, int]
    cut_off: int
    """Samples that ended because they may be no longer."""
    raw: dict[int, Estimate]
    """pass@k of the programs as they are."""
    sanitised: dict[int, Estimate]
    """pass@k of the sanitised programs."""
    challenge: dict[int, Estimate]
    """pass@k by the challenge tests as well, where the set has some."""
    sandbox: str
    beside: Mapping[str, Estimate] = field(default_factory=dict)
    """Other figures of the task and trivial baselines, by name."""

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""

        def table(scores: dict[int, Estimate]) -> dict[str, Any]:
            return {f"pass@{k}": score._asdict() for k, score in scores.items()}

        counts = {"task": self.task, "problems": self.problems, "n": self.samples, "passed": self.passed}
        scores = {"raw": table(self.raw), "sanitised": table(self.sanitised)}
        extra = {"challenge": table(self.challenge)} if self.challenge else {}
        extra |= {"beside": {name: one._asdict() for name, one in self.beside.items()}} if self.beside else {}
        verdicts = {"verdicts": self.verdicts, "cut_off": self.cut_off}
        return {**counts, **verdicts, **scores, **extra, **isolation(self.sandbox)}

    def __rich__(self) -> Any:
        from rich.table import Table

        counted = f"{self.task}: {self.samples:,} samples of {self.problems:,} problems"
        title = f"{counted}, judged in {self.sandbox}{marks(self.sandbox)}"
        table = Table(title=title, title_justify="left")
        for name in ("", "raw", "sanitised", *(["with challenge tests"] if self.challenge else [])):
            table.add_column(name, justify="right")
        for k, score in self.raw.items():
            row = [score, self.sanitised[k], *([self.challenge[k]] if self.challenge else [])]
            table.add_row(f"pass@{k}", *map(shown, row))
        for name, one in self.beside.items():
            table.add_row(name, shown(one))
        table.add_section()
        for kind, count in self.verdicts.items():
            table.add_row(kind, f"{count:,}")
        if self.cut_off:
            table.add_row("cut off by length", f"{self.cut_off:,}")
        return table


def reference_times(
    problems: Sequence[Problem], sandbox: Sandbox, progress: Progress | None = None
) -> dict[str, float]:
    """Run each reference once on this machine, and keep its processor time in seconds.

    Raises: UserError for a reference that fails here: then the task is out of order, not the model. In a sandbox whose
        scores are lower bounds it counts as any other failure, and has no time.
    """
    times = kept.read(KEPT)
    with_one = [problem for problem in problems if problem.reference]
    keys = {problem.task_id: kept.key(problem, [problem.reference], sandbox) for problem in with_one}
    missing = [problem for problem in with_one if keys[problem.task_id] not in times]
    limits = Limits(cpu_seconds=REFERENCE_SECONDS)
    verdicts = grade_many(((one.reference, one.tests, limits) for one in missing), sandbox)
    for number, (problem, verdict) in enumerate(zip(missing, without_faults(verdicts), strict=True), 1):
        if not verdict.passed and sandbox.backend.lower_bound:
            continue
        if not verdict.passed:
            reason = f"{verdict.kind} {verdict.text}".strip()
            raise UserError(f"the reference of {problem.task_id} fails here: {reason}", "the task is out of order")
        times[keys[problem.task_id]] = verdict.cpu_seconds
        kept.add(KEPT, keys[problem.task_id], verdict.cpu_seconds)
        if progress:
            progress(number, len(missing))
    return {task_id: times[key] for task_id, key in keys.items() if key in times}


def without_faults(verdicts: Iterator[Verdict]) -> Iterator[Verdict]:
    """Pass verdicts on; a fault of the judge itself stops the evaluation with one line."""
    try:
        yield from verdicts
    except HarnessError as error:
        raise UserError(f"the judge failed, and no verdict was counted: {error}", "see `jaxlm sandbox`") from None


def limits_of(problem: Problem, times: Mapping[str, float]) -> Limits:
    """The limits for answers to a problem."""
    if problem.task_id not in times:
        return Limits(cpu_seconds=WITHOUT_REFERENCE)
    return Limits(cpu_seconds=max(3.0, float(round(SLOWER * times[problem.task_id], 1))))


def programs_of(problem: Problem, sample: Sample) -> dict[str, tuple[str, Tests]]:
    """The programs of a sample with their tests: raw, sanitised, and raw with the challenge tests."""
    text = cut(sample.completion, problem.stops) if problem.always_stop else sample.completion
    raw = problem.program(text)
    both = {"raw": (raw, problem.tests)}
    both["sanitised"] = (sanitise(raw) if problem.tests.language == "python" else raw, problem.tests)
    if problem.challenge:
        both["challenge"] = (raw, problem.challenge)
    return both


def judge_samples(
    task: str,
    problems: Mapping[str, Problem],
    samples: Sequence[Sample],
    out: Path,
    sandbox: Sandbox,
    ks: Sequence[int] = (1,),
    workers: int = 0,
    progress: Progress | None = None,
) -> CodeReport:
    """Judge samples, append a record of each to `out`, and report.

    The same command after a kill goes on behind the last whole record, and ends with the same file.

    Raises: UserError for a faulty reference, a fault of the judge, records of other samples, a k larger than n.
    """
    counts = Counter(sample.task_id for sample in samples)
    for task_id, n in counts.items():
        if n < max(ks):
            raise UserError(f"pass@{max(ks)} needs {max(ks)} samples of each problem, {task_id} has {n}", "--k")
    used = [problems[task_id] for task_id in counts]
    with records(out) as opened:
        done = len(opened.known)
        for sample, known in zip(samples, opened.known, strict=False):
            if (known.get("task_id"), known.get("digest")) != (sample.task_id, sample.digest):
                raise UserError(f"{out} has records of other samples", "remove it, or name another --out")
        if done > len(samples) or (done and opened.known[0].get("sandbox") != sandbox.name):
            raise UserError(
                f"{out} has records of other samples or of another sandbox", "remove it, or name another --out"
            )
        rest = samples[done:]
        times = reference_times(used, sandbox, progress) if rest else {}
        for number, record in enumerate(_records(problems, rest, times, sandbox, workers), done + 1):
            opened.append(record)
            opened.known.append(record)
            if progress:
                progress(number, len(samples))
        return report(task, opened.known, ks, sandbox.name)


def _records(
    problems: Mapping[str, Problem],
    samples: Sequence[Sample],
    times: Mapping[str, float],
    sandbox: Sandbox,
    workers: int,
) -> Iterator[dict]:
    """Judge every different program once, and make the record of each sample when its verdicts are there."""
    verdicts: dict[tuple[str, str, str], Verdict] = {}
    wanted: list[tuple[str, str, str]] = []
    work = []
    for sample in samples:
        problem = problems[sample.task_id]
        for name, (program, tests) in programs_of(problem, sample).items():
            key = (sample.task_id, "challenge" if name == "challenge" else "", program)
            if key not in verdicts:
                verdicts[key] = Verdict("")
                wanted.append(key)
                work.append((program, tests, limits_of(problem, times)))
    judged = without_faults(grade_many(work, sandbox, workers))
    coming = iter(wanted)
    for sample in samples:
        record: dict[str, Any] = {"task_id": sample.task_id, "sample": sample.number, "digest": sample.digest}
        for name, (program, _) in programs_of(problems[sample.task_id], sample).items():
            key = (sample.task_id, "challenge" if name == "challenge" else "", program)
            while not verdicts[key].kind:
                verdicts[next(coming)] = next(judged)
            verdict = verdicts[key]
            record |= {name: verdict.kind}
            if name == "raw":
                record |= {"text": verdict.text, "details": verdict.details}
        yield {**record, "cut_off": sample.cut_off, "sandbox": sandbox.name}


def report(task: str, judged: Sequence[dict], ks: Sequence[int], sandbox: str) -> CodeReport:
    """Add up records."""

    def scores(passes: Callable[[dict], bool]) -> dict[int, Estimate]:
        n = Counter(record["task_id"] for record in judged)
        c = Counter(record["task_id"] for record in judged if passes(record))
        return {k: interval([pass_at_k(n[task_id], c[task_id], k) for task_id in n]) for k in ks}

    kinds = Counter(record["raw"] for record in judged)
    hard = any("challenge" in record for record in judged)
    return CodeReport(
        task=task,
        problems=len({record["task_id"] for record in judged}),
        samples=len(judged),
        passed=kinds["passed"],
        verdicts=dict(kinds.most_common()),
        cut_off=sum(bool(record["cut_off"]) for record in judged),
        raw=scores(lambda record: record["raw"] == "passed"),
        sanitised=scores(lambda record: record["sanitised"] == "passed"),
        challenge=scores(lambda record: record["raw"] == record.get("challenge", "passed") == "passed") if hard else {},
        sandbox=sandbox,
    )


def write_report(made: CodeReport | MetricReport, folder: Path) -> Path:
    """Write a report as JSON. Returns its path."""
    file = folder / f"{made.task}.json"
    write_whole(file, json.dumps(made.to_json(), indent=1) + "\n")
    return file

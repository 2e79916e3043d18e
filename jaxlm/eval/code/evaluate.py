"""Code tasks as one call each: judge a file of samples, or make samples with a model and judge them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxlm.errors import UserError, did_you_mean
from jaxlm.eval.code.estimate import check_counts
from jaxlm.eval.code.generation import Generation, ModelCompleter, make_samples
from jaxlm.eval.code.problems import Problem
from jaxlm.eval.code.programs import from_chat
from jaxlm.eval.code.samples import Sample, read_samples
from jaxlm.eval.code.score import CodeReport, judge_samples, write_report
from jaxlm.eval.tasks import humaneval, humaneval_sh, infilling, mbpp
from jaxlm.sandbox import choose

TASKS = ("humaneval", "mbpp", "humaneval-infilling", "humaneval-sh")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """Options of code tasks; those of generation are in `generation`."""

    data: Path | None = None
    """File of the set; by default under `JAXLM_DATA`."""
    ks: tuple[int, ...] = (1,)
    """The k of pass@k."""
    sandbox: str = "auto"
    python: str = ""
    """Python of the boxes."""
    every: bool = False
    """MBPP: all 974 problems, not only the test part."""
    shots: int = 3
    """MBPP: solved examples in the prompt."""
    part: str = "single-line"
    """Infilling: which of the four sets."""
    chat: bool = False
    """Completions of a file are answers of a chat model: code is taken from their fences."""
    out: Path | None = None
    """Where records go; by default beside the samples, or in RUN/eval."""
    workers: int = 0
    generation: Generation = field(default_factory=Generation)


def problems_of(task: str, options: CodeOptions) -> list[Problem]:
    """Read the problems of a task. Raises: UserError."""
    if task == "humaneval":
        return humaneval.problems(options.data)
    if task == "mbpp":
        return mbpp.problems(options.data, shots=options.shots, every=options.every)
    if task == "humaneval-infilling":
        return infilling.problems(options.data, part=options.part)
    if task == "humaneval-sh":
        return humaneval_sh.problems(options.data)
    raise UserError(f"unknown task {task!r}", did_you_mean(task, TASKS))


def from_answers(problems: Sequence[Problem], samples: Sequence[Sample]) -> tuple[list[Problem], list[Sample]]:
    """Take programs out of a chat model's answers. Returns problems whose completions are whole programs, and these."""
    if any(problem.suffix or problem.tests.language != "python" for problem in problems):
        raise UserError("--chat is for humaneval and mbpp", "leave it out")
    table = {problem.task_id: problem for problem in problems}
    programs = [
        sample._replace(completion=from_chat(sample.completion, one.before, one.entry))
        for sample in samples
        for one in [table[sample.task_id]]
    ]
    return [replace(problem, before="", stops=()) for problem in problems], programs


def judge_file(task: str, path: Path, options: CodeOptions, progress: Progress | None = None) -> CodeReport:
    """Judge anybody's samples of a task; no model is needed. Verdicts go to `FILE.verdicts.jsonl`, or to `options.out`.

    Raises: UserError.
    """
    sandbox = choose(options.sandbox, options.python)
    problems = problems_of(task, options)
    samples = read_samples(path, {problem.task_id for problem in problems})
    if options.chat:
        problems, samples = from_answers(problems, samples)
    out = options.out or path.with_name(f"{path.name.removesuffix('.gz').removesuffix('.jsonl')}.verdicts.jsonl")
    table = {problem.task_id: problem for problem in problems}
    step = _stage(progress, "judged")
    return judge_samples(task, table, samples, out, sandbox, options.ks, options.workers, step)


def measure(
    run: Path | str, tasks: Sequence[str], options: CodeOptions, progress: Progress | None = None
) -> list[CodeReport]:
    """Let a model solve the problems of tasks, and judge its samples. Everything is kept in RUN/eval/TASK.

    The isolation is chosen before anything is generated.

    Raises: UserError.
    """
    how = options.generation
    check_counts(how.samples, options.ks, how.temperature)
    sandbox = choose(options.sandbox, options.python)
    listed = [(task, problems_of(task, options)) for task in tasks]
    root = options.out or (Path(run) / "eval" if Path(run).is_dir() else Path("eval") / Path(run).name)
    reports = []
    for task, problems in listed:
        model = ModelCompleter(run, problems[0].stops, how)
        samples = make_samples(problems, model, how, root / task, _stage(progress, f"{task}: samples"))
        table = {problem.task_id: problem for problem in problems}
        step = _stage(progress, f"{task}: judged")
        file = root / task / "verdicts.jsonl"
        report = judge_samples(task, table, samples, file, sandbox, options.ks, options.workers, step)
        write_report(report, root)
        reports.append(report)
    return reports


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return (lambda done, all_of_it: progress(name, done, all_of_it)) if progress else None

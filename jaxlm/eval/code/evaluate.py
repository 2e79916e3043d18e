"""Code tasks as one call each: judge a file of samples, or make samples with a model and judge them."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxlm import config
from jaxlm.errors import UserError, did_you_mean
from jaxlm.eval.code import bugs, generation
from jaxlm.eval.code.estimate import Estimate, check_counts
from jaxlm.eval.code.generation import Generation, ModelCompleter, make_samples
from jaxlm.eval.code.metrics import MetricReport
from jaxlm.eval.code.problems import NO_TESTS, Problem, rows
from jaxlm.eval.code.samples import Sample, digest_of, from_answers, is_of, read_samples, records
from jaxlm.eval.code.score import CodeReport, judge_samples, limits_of, reference_times, write_report
from jaxlm.eval.tasks import (
    bug_detection,
    humaneval,
    humaneval_explain,
    humaneval_fix,
    humaneval_sh,
    infilling,
    mbpp,
    next_line,
)
from jaxlm.sandbox import Sandbox, choose

_log = logging.getLogger(__name__)
TASKS = (
    "humaneval", "mbpp", "humaneval-infilling", "humaneval-sh", "humaneval-fix", "humaneval-explain", "bug-detection",
    "next-line",
)  # fmt: skip
Progress = Callable[[str, int, int], None]
Report = CodeReport | MetricReport
LIKELIER = "the likelier of yes and no"
WRITTEN = "the first yes or no of the answer"
NEEDS = {"next-line": "rapidfuzz", "humaneval-explain": "sacrebleu"}
"""Packages that compare texts."""


@dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """Options of code tasks; those of generation are in `generation`."""

    data: Path | None = None
    """File of the set; by default under `JAXLM_DATA`. Next line: a file or folder of text instead of the run's own."""
    limit: int = 0
    """Only so many problems, the first of the set; of next line, lines (0: 500)."""
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

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise UserError(f"--limit {self.limit} takes nothing", "a number of problems; 0: all")
        if min(self.ks) < 1:
            raise UserError(f"--k {min(self.ks)} is no number of samples", "at least 1, such as 1,10")


def problems_of(task: str, options: CodeOptions) -> list[Problem]:
    """Read the problems of a task; of one that is made from HumanEval, those of HumanEval. Raises: UserError."""
    if task in ("humaneval", "humaneval-fix", "humaneval-explain", "bug-detection"):
        made = humaneval.problems(options.data)
    elif task == "mbpp":
        made = mbpp.problems(options.data, shots=options.shots, every=options.every)
    elif task == "humaneval-infilling":
        made = infilling.problems(options.data, part=options.part)
    elif task == "humaneval-sh":
        made = humaneval_sh.problems(options.data)
    else:
        raise UserError(f"unknown task {task!r}", did_you_mean(task, TASKS))
    if not made:
        raise UserError(f"{options.data or task} has no problem", "is this the file of the set?")
    return made[: options.limit or None]


def check_language(problems: Sequence[Problem], sandbox: Sandbox) -> None:
    """Refuse a sandbox that does not speak a task's language. Raises: UserError."""
    for language in {problem.tests.language for problem in problems} - sandbox.backend.languages:
        raise UserError(f"the sandbox {sandbox.name} runs no {language}", "name another one by --sandbox")


def built(task: str, right: Sequence[Problem], sandbox: Sandbox, progress: Progress | None = None) -> list[Problem]:
    """Make the problems of a task from those of its set: plant bugs, or take references apart."""
    check_language(right, sandbox)
    if task == "humaneval-explain":
        return [humaneval_explain.take_apart(problem).problem for problem in right]
    if task not in ("humaneval-fix", "bug-detection"):
        return list(right)
    times = reference_times(right, sandbox, _stage(progress, f"{task}: references"))
    # Where the reference itself fails, as in a Python that is not all of Python, whatever fails is no bug.
    right = [problem for problem in right if problem.task_id in times]
    limits = {problem.task_id: limits_of(problem, times) for problem in right}
    planted = bugs.plant(right, sandbox, limits, _stage(progress, f"{task}: bugs"))
    return (humaneval_fix if task == "humaneval-fix" else bug_detection).problems(right, planted)


def judge_file(task: str, path: Path, options: CodeOptions, progress: Progress | None = None) -> Report:
    """Judge anybody's samples of a task; no model is needed. Verdicts go to `FILE.verdicts.jsonl`, or to `options.out`.

    Raises: UserError.
    """
    if task == "next-line":
        _require(task)
        if options.chat:
            raise UserError("next-line asks no question", "leave --chat out")
        where, texts = _texts(None, options)
        lines = next_line.lines(texts, options.limit or next_line.LINES)
        answers = {one.task_id: one.completion for one in read_samples(path, {line.task_id for line in lines})}
        if missing := [line.task_id for line in lines if line.task_id not in answers]:
            raise UserError(f"{path} has no completion of {missing[0]}", "every line needs one, also with --limit")
        return next_line.report(lines, [answers[line.task_id] for line in lines], where)
    explained: list[tuple[str, str]] = []
    if task == "humaneval-explain":
        # Rows that are no objects are refused below, where samples are read.
        named = [row for row in rows(path) if isinstance(row, dict) and "explanation" in row]
        explained = [(str(row["task_id"]), str(row["explanation"])) for row in named]
        if explained:
            _require(task)
    sandbox = choose(options.sandbox, options.python)
    right = problems_of(task, options)
    problems = built(task, right, sandbox, progress)
    samples = read_samples(path, {problem.task_id for problem in problems})
    if task == "bug-detection":
        answered = {sample.task_id for sample in samples}
        if missing := [one.task_id for one in problems if one.task_id not in answered]:
            raise UserError(f"{path} has no answer on {missing[0]}", "every program needs one, also with --limit")
        return bug_detection.report(samples, WRITTEN, sandbox.name)
    if options.chat:
        problems, samples = from_answers(problems, samples)
    out = options.out or path.with_name(f"{path.name.removesuffix('.gz').removesuffix('.jsonl')}.verdicts.jsonl")
    made = _judged(task, problems, samples, out, sandbox, options, progress)
    return replace(made, beside=_chrf(right, explained)) if explained else made


def _require(task: str) -> None:
    """Raises: UserError where a task's package is missing; before anything is generated or judged."""
    if task in NEEDS and importlib.util.find_spec(NEEDS[task]) is None:
        raise UserError(f"{task} needs {NEEDS[task]}", "pip install 'jaxlm[eval]'")


def _judged(
    task: str,
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    out: Path,
    sandbox: Sandbox,
    options: CodeOptions,
    progress: Progress | None,
) -> CodeReport:
    table = {problem.task_id: problem for problem in problems}
    step = _stage(progress, f"{task}: judged")
    return judge_samples(task, table, samples, out, sandbox, options.ks, options.workers, step)


def measure(
    run: Path | str, tasks: Sequence[str], options: CodeOptions, progress: Progress | None = None
) -> list[Report]:
    """Let a model solve the problems of tasks, and judge its samples. Everything is kept in RUN/eval/TASK.

    The isolation is chosen before anything is generated, and what can be refused is refused then.

    Raises: UserError.
    """
    how = options.generation
    check_counts(how.samples, options.ks, how.temperature)
    for task in tasks:
        _require(task)
    if "next-line" in tasks and (how.temperature or how.chat):
        raise UserError("next-line is greedy and asks no question", "leave --temperature and --chat out")
    sandbox = None if set(tasks) <= {"next-line"} else choose(options.sandbox, options.python)
    listed = [(task, [] if task == "next-line" else problems_of(task, options)) for task in tasks]
    root = options.out or (Path(run) / "eval" if Path(run).is_dir() else Path("eval") / Path(run).name)
    model = ModelCompleter(run, how)
    for task, right in listed:
        if task == "next-line":
            _texts(model, options)
        elif sandbox is not None and right:
            check_language(right, sandbox)
            generation.prompt_of(right[0], model, how)
    reports: list[Report] = []
    for task, right in listed:
        each = Measured(task, root / task, sandbox, options, progress, model)
        made = each.next_line() if sandbox is None or task == "next-line" else each.of(right, sandbox)
        write_report(made, root)
        reports.append(made)
    return reports


@dataclass(frozen=True)
class Measured:
    """One task of one model, and where its records go."""

    task: str
    folder: Path
    sandbox: Sandbox | None
    options: CodeOptions
    progress: Progress | None
    model: ModelCompleter

    @property
    def how(self) -> Generation:
        return self.options.generation

    def step(self, name: str) -> Callable[[int, int], None] | None:
        """A reporter of one stage."""
        return _stage(self.progress, f"{self.task}: {name}")

    def of(self, right: Sequence[Problem], sandbox: Sandbox) -> Report:
        """Make the problems of the task from those of its set, and measure."""
        problems = built(self.task, right, sandbox, self.progress)
        if self.task == "bug-detection":
            return self.detection(problems)
        return self.explained(right) if self.task == "humaneval-explain" else self.programs(problems)

    def programs(
        self, problems: Sequence[Problem], folder: Path | None = None, asked: dict | None = None
    ) -> CodeReport:
        """Let the model write programs, and judge them; `asked` holds the problem of each sample, where they differ."""
        folder = folder or self.folder
        table = asked or {(one.task_id, n): one for one in problems for n in range(self.how.samples)}
        prompts = {key: generation.prompt_of(one, self.model, self.how) for key, one in table.items()}
        model = self.model.stopping_at(problems[0].stops)
        samples = make_samples(problems, model, self.how, folder, self.step("samples"), prompts)
        if self.how.chat:
            problems, samples = from_answers(problems, samples)
        assert self.sandbox is not None
        file = folder / "verdicts.jsonl"
        return _judged(self.task, problems, samples, file, self.sandbox, self.options, self.progress)

    def explained(self, right: Sequence[Problem]) -> CodeReport:
        """Explain and write the code again; beside, the same without an explanation, and chrF."""
        explained = [humaneval_explain.take_apart(problem) for problem in right]
        asks, model = [one.ask() for one in explained], self.model.stopping_at(humaneval_explain.STOPS)
        texts = make_samples(asks, model, self.how, self.folder / "explanations", self.step("explanations"))
        problems = [one.problem for one in explained]
        with_, without = (humaneval_explain.second_steps(explained, texts, empty) for empty in (False, True))
        made = self.programs(problems, asked=with_)
        baseline = self.programs(problems, self.folder / "unexplained", without)
        table = {one.problem.task_id: one for one in explained}
        cleaned = [(one.task_id, table[one.task_id].cleaned(one.completion)) for one in texts]
        scores = {f"pass@{k} without an explanation": score for k, score in baseline.raw.items()}
        return replace(made, beside={**scores, **_chrf(right, cleaned)})

    def detection(self, problems: Sequence[Problem]) -> MetricReport:
        """Ask of each program whether it is right; appended answer by answer."""
        answers = bug_detection.CHAT_ANSWERS if self.how.chat else bug_detection.ANSWERS
        step = self.step("answers")
        prompts = [generation.prompt_of(problem, self.model, self.how) for problem in problems]
        answered = (prompt + max(answers, key=len) for prompt in prompts)
        self.model.check(dict(zip(answered, (one.task_id for one in problems), strict=True)), 1)
        generation.same_settings(self.folder, self.how)
        with records(self.folder / "samples.jsonl") as opened:
            for place, record in enumerate(opened.known):
                if place >= len(problems) or not is_of(record, problems[place].task_id, prompts[place]):
                    raise UserError(f"{opened.path} has answers on other programs", "remove it, or name another --out")
            for place in range(len(opened.known), len(problems)):
                chosen = self.model.choose(prompts[place], answers)
                record = {"task_id": problems[place].task_id, "completion": answers[chosen]}
                record["prompt_digest"] = digest_of(prompts[place])
                opened.append(record)
                opened.known.append(record)
                if step:
                    step(len(opened.known), len(problems))
            samples = [Sample(one["task_id"], 0, one["completion"]) for one in opened.known]
        return bug_detection.report(samples, LIKELIER, self.sandbox.name if self.sandbox else "")

    def next_line(self) -> MetricReport:
        """Let the model write the next lines of held-out files."""
        where, texts = _texts(self.model, self.options)
        lines = next_line.lines(texts, self.options.limit or next_line.LINES)
        problems = [Problem(line.task_id, line.prompt, NO_TESTS, "") for line in lines]
        model = self.model.stopping_at((), min(self.how.max_new_tokens, next_line.MAX_TOKENS))
        samples = make_samples(problems, model, self.how, self.folder, self.step("lines"))
        return next_line.report(lines, [sample.completion for sample in samples], where)


def _texts(model: ModelCompleter | None, options: CodeOptions) -> tuple[str, Iterator[tuple[str, str]]]:
    """Held-out text: where it comes from, and names and texts: `--data`, else what the run holds out of its corpora.

    Raises: UserError where there is neither.
    """
    if options.data:
        return str(options.data), iter(next_line.texts_of(options.data))
    if model is None:
        raise UserError("--from knows no corpus", "next-line needs --data FILE_OR_FOLDER")
    cfg, kind = model.model.config, model.model.kind
    if kind not in ("run", "torch"):
        raise UserError(f"a model of {kind} comes without its corpus", "next-line needs --data FILE_OR_FOLDER")
    if cfg.recipe != "pretrain" and not (cfg.recipe == "distill" and cfg.distill.rows == "corpus"):
        raise UserError(f"the recipe {cfg.recipe} reads no corpus of text", "next-line needs --data FILE_OR_FOLDER")
    from jaxlm.data.pipeline import corpora_of

    path = model.model.path or Path()
    if cfg.data.source == config.Data().source and not cfg.data.mixture and not (path / "metrics.jsonl").is_file():
        untrained = "warning: %s has no record of a training: its lines are those of the standard library, %s"
        _log.warning(untrained, path, "the default of data.source (--data names other text)")
    corpora = corpora_of(cfg.data)

    def held_out() -> Iterator[tuple[str, str]]:
        for name, documents in corpora:
            for side, document in documents:
                if side == "validation":
                    yield f"{name}/{document.name}" if name else document.name, document.text

    return "; ".join(", ".join(documents.where) for _, documents in corpora), held_out()


def _chrf(right: Sequence[Problem], explanations: Sequence[tuple[str, str]]) -> dict[str, Estimate]:
    """chrF of explanations against docstrings, beside that of the docstring of another problem and of the code."""
    explained = [humaneval_explain.take_apart(problem) for problem in right]
    docstrings = {one.problem.task_id: one.docstring for one in explained}
    name, score = humaneval_explain.chrf([(task, text, docstrings[task]) for task, text in explanations])
    others = dict(zip(docstrings, [*list(docstrings.values())[1:], next(iter(docstrings.values()))], strict=True))
    code = {one.problem.task_id: one.code for one in explained}
    made = {name: score}
    for title, texts in (("the docstring of another problem", others), ("the code itself", code)):
        pairs = [(task, texts[task], docstrings[task]) for task in docstrings]
        made[f"chrF2 of {title}"] = humaneval_explain.chrf(pairs)[1]
    return made


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return (lambda done, all_of_it: progress(name, done, all_of_it)) if progress else None

"""A pool of processes that judge samples. A grader that raises, hangs or dies costs its sample, never the run.

    with GraderPool(rewards, limit_s=5.0) as pool:
        grades = pool.grade(samples)            # one list of Grade for each sample, in the order of the rewards

Samples go to a worker as lines of JSON, and its grades come back so. A worker that gives no answer in time is killed
with all its children, and another takes its place.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.errors import UserError
from jaxlm.recipes.rollouts.rewards import QUICK, TOGETHER, Reward

MOST_LOST = 0.2
"""Of the grades of a step; if more are missing, the graders are broken."""
NOTHING = "it returned None"
"""The reason of a reward that says that there is nothing to judge."""
MEMORY = 4 << 30
"""Bytes of address space that a worker may have."""
_WORKER = "from jaxlm.recipes.rollouts.graders import serve; serve()"


class Sample(NamedTuple):
    """What a grader sees."""

    prompt: str
    completion: str
    row: Mapping[str, Any]


class Grade(NamedTuple):
    """A number, or the reason why there is none."""

    value: float | None
    reason: str = ""


class GraderPool:
    """Workers that are started when they are first needed and end with the `with` block, or with the pool."""

    def __init__(self, rewards: Sequence[Reward], *, workers: int = 2, limit_s: float = 10.0) -> None:
        self.rewards, self.limit_s = list(rewards), limit_s
        self.idle: list[_Worker] = []
        self.workers = workers
        weakref.finalize(self, _end, self.idle)

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        _end(self.idle)

    def grade(self, samples: Sequence[Sample]) -> list[list[Grade]]:
        """Each sample by each reward.

        Raises:
            UserError: more than a fifth of the grades are missing; with the reason of one.
        """
        grades: list[list[Grade]] = [[Grade(None)] * len(self.rewards) for _ in samples]
        jobs: deque[_Job] = deque()
        for place, reward in enumerate(self.rewards):
            if reward.name in QUICK:
                for number, grade in enumerate(judged_here(reward, samples)):
                    grades[number][place] = grade
            else:
                jobs.extend(_Job(number, place, reward, sample) for number, sample in enumerate(samples))
        for job, grade in self._in_workers(jobs):
            grades[job.number][job.place] = grade
        self._check(grades)
        return grades

    def try_rewards(self, samples: Sequence[Sample]) -> None:
        """Grade right answers by every reward but a model, before anything is sampled.

        Raises:
            UserError: a reward raises, hangs or returns no number on all of them.
        """
        for reward in self.rewards:
            if reward.name in TOGETHER:  # a model, which was opened before
                continue
            if reward.name in QUICK:
                grades = judged_here(reward, samples)
            else:
                jobs = deque(_Job(number, 0, reward, sample) for number, sample in enumerate(samples))
                grades = [grade for _, grade in self._in_workers(jobs)]
            reasons = [grade.reason for grade in grades]
            if all(reason not in ("", NOTHING) for reason in reasons):
                raise UserError(
                    f"the reward {reward.name} fails on right answers of the task: {reasons[0]}",
                    "mend it, or let it return a number for every answer",
                )

    def _check(self, grades: Sequence[Sequence[Grade]]) -> None:
        for place, reward in enumerate(self.rewards):
            lost = [row[place].reason for row in grades if row[place].value is None]
            if len(lost) > MOST_LOST * len(grades):
                raise UserError(
                    f"the reward {reward.name} gave no number for {len(lost)} of {len(grades)} samples: {lost[0]}",
                    "mend it, or let it return a number for every answer",
                )

    def _in_workers(self, jobs: deque[_Job]) -> Iterator[tuple[_Job, Grade]]:
        """Hand out one job a worker at a time; each has `limit_s` seconds."""
        busy: dict[_Worker, tuple[_Job, float]] = {}
        while jobs or busy:
            while jobs and len(busy) < self.workers:
                worker = self.idle.pop() if self.idle else _Worker()
                job = jobs.popleft()
                busy[worker] = job, time.monotonic() + self.limit_s
                worker.send(job)
            for worker, (job, deadline) in list(busy.items()):
                grade = worker.receive(max(0.0, min(0.05, deadline - time.monotonic())))
                late = grade is None and time.monotonic() >= deadline
                if late:
                    grade = Grade(None, f"no answer within {self.limit_s:g} s")
                if grade is None:
                    continue
                del busy[worker]
                if late or worker.dead:
                    worker.kill()
                else:
                    self.idle.append(worker)
                yield job, grade


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


START_SECONDS = 120.0
"""How long a worker may take to start."""


class _Job(NamedTuple):
    number: int
    place: int
    reward: Reward
    sample: Sample


class _Worker:
    """A process that judges one sample after the other."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _WORKER]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, start_new_session=True, env=environment, **pipes)
        self.questions: Any = self.process.stdin
        self.answers: Any = self.process.stdout
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.answers, selectors.EVENT_READ)
        # Its first line says that it has started: starting is no part of a sample's time.
        self.dead = not self.selector.select(START_SECONDS) or not self.answers.readline()

    def send(self, job: _Job) -> None:
        """Give it a sample; a worker that is dead already is noticed by `receive`."""
        reward, sample = job.reward, job.sample
        message = {"reward": [reward.name, dict(reward.options)], "sample": [*sample[:2], dict(sample.row)]}
        try:
            self.questions.write(json.dumps(message, default=str) + "\n")
            self.questions.flush()
        except BrokenPipeError:
            self.dead = True

    def receive(self, seconds: float) -> Grade | None:
        """Its answer, if there is one within this time."""
        if not self.selector.select(seconds):
            return None
        line = self.answers.readline()
        if not line.endswith("\n"):
            self.dead = True
            return Grade(None, f"its process died (exit code {self.process.wait()})")
        return Grade(*json.loads(line))

    def kill(self) -> None:
        """End it and its children."""
        with contextlib.suppress(ProcessLookupError):  # it may be gone already
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.selector.close()
        for pipe in (self.questions, self.answers):
            with contextlib.suppress(BrokenPipeError):  # what it was sent last is lost with it
                pipe.close()


def judged_here(reward: Reward, samples: Sequence[Sample]) -> list[Grade]:
    """The grades of samples in this process: at once where the reward can, else, or if that fails, one by one."""
    if reward.name in TOGETHER:
        with contextlib.suppress(Exception):  # one by one each sample has its own reason
            values = TOGETHER[reward.name]([sample[:2] for sample in samples], **reward.options)
            return [_grade(value) for value in values]
    return [judged(reward, sample) for sample in samples]


def judged(reward: Callable[..., Any], sample: Sample) -> Grade:
    """The grade of one sample: anything but a finite number is none, with the reason."""
    try:
        value = reward(*sample)
    except Exception as error:  # a reward is the code of whoever trains: a sample it fails on has no grade
        return Grade(None, f"{type(error).__name__}: {error}")
    return _grade(value)


def _grade(value: Any) -> Grade:
    if value is None:
        return Grade(None, NOTHING)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Grade(float(value)) if isinstance(value, bool) else Grade(None, f"it returned {type(value).__name__}")
    return Grade(float(value)) if math.isfinite(value) else Grade(None, f"it returned {value}")


def serve() -> None:
    """What a worker does: read samples from stdin and write their grades to where stdout was; prints go to stderr."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        message = json.loads(line)
        (name, options), (prompt, completion, row) = message["reward"], message["sample"]
        answers.write(json.dumps(judged(Reward(name, options), Sample(prompt, completion, row))) + "\n")
        answers.flush()

"""The training loop: what happens when, for both backends. It imports neither jax nor torch.

An `Engine` owns the model and computes; the loop feeds it batches, validates, samples, saves, reports, and leaves in
order when the user or the machine says stop. What the loop needs to resume is the `run` record of a checkpoint; arrays
lie beside it, and frozen models stay in their own files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import config
from jaxlm.config import toml
from jaxlm.data.rows.validation import check_watch, measure
from jaxlm.errors import UserError
from jaxlm.processes.stop_signals import Interrupted, Stopped, StopRequest
from jaxlm.report.run_page import write_report
from jaxlm.run.alerts import Alerts
from jaxlm.run.clock import Clock, stragglers
from jaxlm.run.directory import FROZEN, write_run
from jaxlm.run.metrics import SECONDS, MetricsLog, read_metrics
from jaxlm.run.progress import Display, tell
from jaxlm.train.backend import Engine
from jaxlm.train.recipe import DataSource, Recipe

_NEXT = "next_index"  # in the state of grain's iterator: the number of the next batch


class FrozenFile(NamedTuple):
    """Where the parameters of a frozen tree come from, and what they were; each checkpoint records both."""

    path: str
    sha256: str
    """Of names, dtypes, shapes and values; `seed N` for a drawn tree. A run resumes with the same one, at any path."""


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved in each checkpoint."""

    step: int = 0
    best: float = math.inf
    stale: int = 0
    """Validations since the best one."""
    evaluated: int = -1
    """Step of the last validation."""
    sampled: int = -1
    """Step of the last sample."""


def train(
    cfg: config.Config,
    recipe: Recipe,
    source: DataSource,
    engine: Engine,
    *,
    resume: bool,
    frozen: Mapping[str, FrozenFile] | None = None,
) -> Progress:
    """Train until `train.steps`, a stop signal, or an early stop; the last state is always saved.

    A signal before the first update of this process ends it at once: there is nothing to save.

    Raises:
        Stopped: after a stop signal, with the exit code.
        UserError: the checkpoint belongs to other data or to another frozen tree, which is named; too many updates in a
            row were not finite; or the disk is full.
    """
    with _writing(Path(cfg.out_dir)):
        run = _Run(cfg, recipe, source, engine, resume, frozen or {})
        with run.display, run.stop:
            try:
                run.until_the_end()
            finally:
                run.close()
    if run.stop.stopped:
        engine.part()
        raise Stopped(run.stop.signal_name)
    return run.progress


class _Run:
    """One training run: the state of the loop around the engine."""

    def __init__(
        self,
        cfg: config.Config,
        recipe: Recipe,
        source: DataSource,
        engine: Engine,
        resume: bool,
        frozen: Mapping[str, FrozenFile],
    ) -> None:
        self.cfg, self.source, self.engine, self.frozen = cfg, source, engine, frozen
        self.judge = recipe.judge(source)
        self.dir, self.first = Path(cfg.out_dir), engine.process_index == 0
        self.progress, self.saved, self.score = Progress(), Progress(), None
        self.clock = Clock()
        batch_size = cfg.train.batch_size
        self.data = source.batches(batch_size=batch_size, rows=engine.rows)
        self.last = int(min(cfg.train.steps, getattr(self.data, "count", math.inf)))  # a mixture may end before
        self.held_out = source.held_out(batch_size=batch_size, rows=engine.rows, max_batches=cfg.eval.batches)
        check_watch(cfg.eval.watch, self.held_out)
        logged = read_metrics(self.dir / "metrics.jsonl")
        if resume and engine.checkpoints():
            self._resume(max((row["step"] for row in logged), default=0))
        self.validated = {row["step"] for row in logged if "validation_loss" in row} & {self.progress.step}
        if self.first:
            write_run(cfg, source.tokenizer, {**getattr(source, "side_files", {}), **_frozen_file(self.frozen)})
        self.display = Display(cfg.train.steps, self.progress.step, quiet=not self.first)
        self.log = MetricsLog(self.dir, cfg.log, toml.to_dict(cfg), self.progress.step, writes=self.first)
        self.stop = StopRequest(engine.stops_at if engine.process_count > 1 else None, self._leave)
        self.pending: list[tuple[int, Mapping[str, Any]]] = []
        self.alerts = Alerts(getattr(source, "ends", ()), getattr(source, "updates_per_phase", 1))
        self.saved_at, self.starting, self.save_due = time.monotonic(), True, False

    def _resume(self, reached: int) -> None:
        record = self.engine.restore(lambda message: self._tell(f"warning: {message}"))
        for name, file in self.frozen.items():
            before = record.get("frozen", {}).get(name, {})
            if before.get("sha256") != file.sha256:
                raise UserError(
                    f"{self.dir}: the frozen {name}, {file.path or 'drawn from the seed'}, is not the one of the "
                    f"checkpoint, {before.get('path')!r} with sha256 {before.get('sha256')}",
                    "restore it, or choose another out_dir",
                )
        for key, now in self.source.identity().items():
            if record.get(key) != now:
                raise UserError(
                    f"{self.dir}: the {key} is not the one of the checkpoint ({record.get(key)} then, {now} now)",
                    "restore the original data and tokenizer, or choose another out_dir",
                )
        self.progress, self.saved = Progress(**record["progress"]), Progress(**record["progress"])
        self.data.set_state(_position(record, self.cfg))
        if "clock" in record:
            self.clock.resume(record["clock"])
        step = self.progress.step
        again = f"; steps {step + 1} to {reached} are done again" if reached > step else ""
        self._tell(f"resuming {self.dir} from step {step}{again}")

    def _tell(self, message: str) -> None:
        """Print a line, of several processes once."""
        if self.first:
            tell(message)

    def until_the_end(self) -> None:
        """Step after step, with all that is due in between, until the last one or a stop."""
        try:
            self._steps()
        except Interrupted:
            self._alert(*self._fetch())
            self._save()
            self.display.say(f"{self.stop.signal_name}: saved step {self.progress.step}; continue with --resume")
        except UserError:  # such as samples that nobody can grade: what was trained before is kept
            if self.engine.process_count == 1 and self.progress.step:
                self._save()  # within a phase it does nothing
                if self.saved.step:
                    self.display.say(f"step {self.saved.step} is saved; continue with --resume")
            raise

    def _steps(self) -> None:
        cfg, progress = self.cfg, self.progress
        if progress.step:
            self._after_step()  # what the run before did not come to
        while progress.step < self.last and not self._enough():
            self._step()
            self.stop.nothing_to_save = False
            self.display.advance(progress.step)
            self._after_step()
        if self.last < cfg.train.steps and not self._enough():
            self.display.say(f"step {self.last}: the mixture ends, every corpus is through (max_epochs, stop_with)")
        elif progress.step < cfg.train.steps:
            self._alert(*self._fetch())
            self._save()
            self.display.say(f"early stop: {self._enough()}")

    def _step(self) -> None:
        """One update; the first of a phase is preceded by what the phase needs."""
        number = self.progress.step + 1
        if self._phase_ends(self.progress.step):
            with self.clock.spent("startup" if self.starting else "rollouts"):
                self.source.begin_phase(self.progress.step // self.source.updates_per_phase, self.engine)
        first, last = self.cfg.train.profiled or (0, 0)
        if number == first:
            self.engine.profile(self.dir / "profile")
        with self.clock.spent("data_wait"):
            batch = next(self.data)
        with self.clock.spent("startup") if self.starting else contextlib.nullcontext():
            self.pending.append((number, self.engine.step(batch)))
        if number == last:
            self.engine.profile(None)
        self.progress.step, self.starting = number, False

    def _after_step(self) -> None:
        """All that is due at this step and not done. What `progress` does not count is done again after a stop here."""
        cfg, progress = self.cfg, self.progress
        last = progress.step >= self.last
        self.save_due |= _due(cfg.checkpoint.every, progress.step, last)
        if report := self.pending and (_due(cfg.log.every, progress.step, last) or progress.step == 1):
            self._report()
        if not self._phase_ends(progress.step):
            return
        self.stop.check()
        validates = _due(cfg.eval.every, progress.step, last) and progress.evaluated != progress.step
        improved = validates and self._validate()
        if _due(cfg.sample.every, progress.step, last) and progress.sampled != progress.step:
            self._sample()
        if self.save_due or improved or self._long_unsaved(bool(report)):
            self._save()
        self.stop.check()

    def _phase_ends(self, step: int) -> bool:
        """Whether no phase is under way after this step; only then is there something to go on from."""
        return step % self.source.updates_per_phase == 0 or step >= self.last

    def _long_unsaved(self, reported: bool) -> bool:
        """Whether `checkpoint.minutes` are over: by the first process's clock, asked where all wait for metrics."""
        if not self.cfg.checkpoint.minutes:
            return False
        over = time.monotonic() - self.saved_at >= 60 * self.cfg.checkpoint.minutes
        return over if self.engine.process_count == 1 else reported and self.engine.of_first(over)

    def _leave(self, signal_name: str) -> None:
        """End the process from another thread, before there is anything to save."""
        self.display.__exit__()
        step = self.progress.step
        where = f"step {step} is saved" if step else "nothing is trained yet"
        self.display.say(f"{signal_name}: left before the first update, {where}; continue with --resume")
        sys.stdout.flush()
        os._exit(int(str(Stopped(signal_name).code)))

    def _enough(self) -> str:
        """Why the run ends before `train.steps`; empty: it does not."""
        asked, progress = self.cfg.eval, self.progress
        if 0 < asked.patience <= progress.stale:
            return f"no improvement in {progress.stale} validations"
        return "eval.target is reached" if self.judge.reaches(progress.best, asked.target) else ""

    def close(self) -> None:
        """Leave files that are whole."""
        try:
            self.engine.close()
        finally:
            self.log.close()
        if self.first:
            named = {"baseline_name": self.judge.baseline_name, "loss_unit": self.judge.loss_unit}
            write_report(self.cfg, read_metrics(self.log.path), self.judge.baseline, **named)

    def _report(self) -> None:
        """Write the newest metrics, and speak of skipped updates since the last report."""
        steps, fetched = self._fetch()
        tokens = self.cfg.train.batch_size * self.cfg.data.seq_len
        window = self.clock.window()
        rate = len(steps) * tokens / window.stepping
        reached = rate * self.engine.flops_per_token
        late = stragglers(self.engine.gather(window.before_steps), window.total)
        row = {
            "step": steps[-1],
            **fetched[-1],
            "tokens": steps[-1] * tokens,  # a recipe may count tokens of its own for its means
            "tokens_per_second": rate,
            "mfu": reached / self.engine.peak_flops(reached),
            "step_seconds": window.stepping / len(steps),
            **{SECONDS + kind: seconds for kind, seconds in window.seconds.items()},
            "goodput": window.goodput,
            **self.engine.memory(),
            **self._delivered(),
        }
        for process, seconds in late.items():
            waited = f"{seconds:.1f} s of the last {window.total:.1f} s for its data and checkpoints"
            self.display.say(f"step {steps[-1]}: process {process} kept the others waiting, {waited}")
            row[f"late_process_{process}"] = seconds
        self.log.write(row)
        self.display.status(row)
        self._alert(steps, fetched)

    def _delivered(self) -> dict[str, float]:
        """The share of each corpus of a mixture in the tokens that carried loss since the last report."""
        tokens = {name: sum(self.engine.gather(n)) for name, n in getattr(self.data, "delivered", dict)().items()}
        return {f"share_{name}": count / max(1.0, sum(tokens.values())) for name, count in tokens.items()}

    def _fetch(self) -> tuple[list[int], list[dict[str, Any]]]:
        """Steps and metrics since the last report, brought to the host."""
        pending, self.pending = self.pending, []
        return [step for step, _ in pending], self.engine.fetch([metrics for _, metrics in pending])

    def _alert(self, steps: list[int], fetched: list[dict[str, Any]]) -> None:
        """Speak of skipped updates; stop after too many in a row. The state has kept the last good parameters."""
        for step, metrics in zip(steps, fetched, strict=True):
            for line in self.alerts.look(step, metrics):
                self.display.say(line)
            if metrics["skipped"]:
                self.display.say(f"step {step}: loss or gradient not finite, update skipped")
            if metrics["skipped"] >= self.cfg.train.max_skips:
                self._save()
                raise UserError(
                    f"{self.dir}: {int(metrics['skipped'])} updates in a row were not finite, up to step {step}",
                    "the last good parameters are saved; lower train.learning_rate or look at the data",
                )

    def _validate(self) -> bool:
        """Judge the held-out rows; returns whether they are the best so far."""
        with self.clock.spent("evaluation"):
            sums, losses = measure(self.held_out, lambda batches: self.engine.evaluate(self.stop.between(batches)))
            self.progress.evaluated = self.progress.step
            if not sums.get("weight"):
                return False
            figures = self.judge.figures(sums) | self.judge.examine(self.engine)
        score = self.score = losses.get(self.cfg.eval.watch, self.judge.score(figures))
        by_set = {f"validation_loss_{name}": value for name, value in losses.items()}
        if self.progress.step not in self.validated:  # by a process that was killed before it could save
            self.log.write({"step": self.progress.step, **figures, **by_set})
        if line := self.judge.describe(figures):
            parts = "".join(f"; {name} {value:.4f}" for name, value in losses.items())
            self.display.say(f"step {self.progress.step}: {line}{parts}")
        improved = score < self.progress.best
        self.progress.best = min(score, self.progress.best)
        self.progress.stale = 0 if improved else self.progress.stale + 1
        return improved

    def _sample(self) -> None:
        prompts = self.cfg.sample.prompts if self.cfg.model.head == "lm" else ()
        texts = []
        with self.clock.spent("sampling"):
            try:
                texts = self.engine.complete(prompts, self.cfg.sample, self.stop.check) if prompts else []
            except UserError as error:  # a prompt that does not fit is no reason to stop training
                self.display.say(f"step {self.progress.step}: no sample: {error}")
        self.progress.sampled = self.progress.step
        if texts and self.first:
            path = self.dir / "samples" / f"{self.progress.step:08d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = map("".join, zip(prompts, texts, strict=True))
            path.write_text("\n\n----\n\n".join(whole) + "\n", encoding="utf-8")

    def _save(self) -> None:
        if self.saved == self.progress or not self._phase_ends(self.progress.step):
            return
        self.stop.nothing_to_save = False  # for a save under way is not to be cut off
        with self.clock.spent("checkpoint"):
            data = {"data": self.data.get_state(), "batch_size": self.cfg.train.batch_size} | self.source.identity()
            record = {**data, "progress": dataclasses.asdict(self.progress), "clock": self.clock.state()}
            if self.frozen:
                record["frozen"] = {name: file._asdict() for name, file in self.frozen.items()}
            self.engine.save(record, self.score if self.progress.evaluated == self.progress.step else None)
        self.save_due = False
        self.saved, self.saved_at = dataclasses.replace(self.progress), time.monotonic()


def _frozen_file(frozen: Mapping[str, FrozenFile]) -> dict[str, bytes]:
    """The file that says what the frozen trees of a run are, if it has some."""
    content = {name: {**file._asdict(), "path": _absolute(file.path)} for name, file in frozen.items()}
    return {FROZEN: json.dumps(content, indent=2).encode() + b"\n"} if frozen else {}


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def _due(every: int, step: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


@contextlib.contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    """A full or vanished disk is no fault of the program."""
    try:
        yield
    except OSError as error:
        where = error.filename or run_dir
        raise UserError(f"{where}: {error.strerror or error}", "mend it, then continue with --resume") from error


def _position(record: Mapping[str, Any], cfg: config.Config) -> dict[str, Any]:
    """The number of the next batch: the rows that a checkpoint has read, in batches of the present size.

    Raises:
        UserError: the rows that were read are no whole number of these batches.
    """
    state, now = record["data"], cfg.train.batch_size
    before = record.get("batch_size", now)
    if before == now or _NEXT not in state:
        return state
    rows = state[_NEXT] * before
    if rows % now:
        fitting = [size for size in range(1, 2 * now) if rows % size == 0]
        raise UserError(
            f"train.batch_size = {now}: the checkpoint has read {rows} rows, which is no whole number of batches",
            f"sizes that continue with the next row: {', '.join(map(str, fitting[-4:]))}",
        )
    return {**state, _NEXT: rows // now}

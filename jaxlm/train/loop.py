"""The training loop: what happens when, for both backends. It imports neither jax nor torch.

An `Engine` owns the model and computes; the loop feeds it batches, validates, samples, saves, reports, and leaves in
order when the user or the machine says stop. All that a resumed run needs is in the checkpoint's `run` record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlm import config, config_file
from jaxlm.data.pipeline import Corpus, make_train_iterator, make_validation_batches
from jaxlm.errors import UserError
from jaxlm.train.metrics import Display, MetricsLog, plot_loss, read_metrics
from jaxlm.train.report import write_report
from jaxlm.train.run import write_run

Batch = Mapping[str, np.ndarray]


@runtime_checkable
class Engine(Protocol):
    """A model with its optimiser, in one framework."""

    flops_per_token: float
    process_index: int
    process_count: int
    rows: np.ndarray | None
    """The rows of each batch that this process makes; None: all."""

    @property
    def peak_flops(self) -> float:
        """Of all devices together, FLOP/s."""
        ...

    def checkpoints(self) -> list[int]:
        """Steps that can be resumed from."""
        ...

    def restore(self, warn: Any) -> dict[str, Any]:
        """Load the newest intact checkpoint and return its `run` record."""
        ...

    def step(self, batch: Batch) -> Mapping[str, Any]:
        """One update; the metrics may still be under way on the device."""
        ...

    def fetch(self, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Wait for metrics and bring them to the host: floats, and lists of numbers."""
        ...

    def evaluate(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Sums of the objective over batches, without dropout."""
        ...

    def complete(self, prompts: Sequence[str], sample: config.Sample) -> list[str]:
        """Continue texts with the current parameters."""
        ...

    def save(self, run: dict[str, Any], validation_loss: float | None) -> None:
        """Start to write a checkpoint."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved in each checkpoint."""

    step: int = 0
    best: float = math.inf
    stale: int = 0
    """Validations since the best one."""
    evaluated: int = -1
    """Step of the last validation."""


def train(cfg: config.Config, corpus: Corpus, engine: Engine, *, resume: bool) -> Progress:
    """Train until `train.steps`, a stop signal, or an early stop; the last state is always saved.

    Raises:
        UserError: the checkpoint belongs to other data, too many updates in a row were not finite, or the disk is full.
    """
    with _writing(Path(cfg.out_dir)):
        run = _Run(cfg, corpus, engine, resume)
        with run.display, _stop_signals() as stopped:
            try:
                run.until(stopped)
            finally:
                run.close()
    return run.progress


class _Run:
    """One training run: the state of the loop around the engine."""

    def __init__(self, cfg: config.Config, corpus: Corpus, engine: Engine, resume: bool) -> None:
        self.cfg, self.corpus, self.engine = cfg, corpus, engine
        self.dir, self.first = Path(cfg.out_dir), engine.process_index == 0
        self.progress, self.validation_loss = Progress(), None
        size: Any = {"batch_size": cfg.train.batch_size, "rows": engine.rows}
        self.data = make_train_iterator(cfg.data, corpus, seed=cfg.seed, **size)
        self.held_out = {"max_batches": cfg.eval.batches, **size}
        if resume and engine.checkpoints():
            self._resume()
        if self.first:
            write_run(cfg, corpus)
        self.display = Display(cfg.train.steps, self.progress.step, quiet=not self.first)
        self.log = MetricsLog(self.dir, cfg.log, config_file.to_dict(cfg), self.progress.step, writes=self.first)
        self.pending: list[tuple[int, Mapping[str, Any]]] = []
        self.clock, self.idle = time.monotonic(), 0.0

    def _resume(self) -> None:
        record = self.engine.restore(lambda message: self._tell(f"warning: {message}"))
        for key, now in self._identity().items():
            if record.get(key) != now:
                raise UserError(
                    f"{self.dir}: the {key} is not the one of the checkpoint ({record.get(key)} then, {now} now)",
                    "restore the original data and tokenizer, or choose another out_dir",
                )
        self.data.set_state(record["data"])
        self.progress = Progress(**record["progress"])
        self._tell(f"resuming {self.dir} from step {self.progress.step}")

    def _tell(self, message: str) -> None:
        """Print a line, of several processes once."""
        if self.first:
            print(message, flush=True)

    def _identity(self) -> dict[str, str]:
        return {"tokenizer": self.corpus.tokenizer.fingerprint(), "corpus": self.corpus.fingerprint}

    def until(self, stopped: list[str]) -> None:
        """Step after step, with all that is due in between."""
        cfg, progress = self.cfg, self.progress
        while progress.step < cfg.train.steps and not self._stale():
            self.pending.append((progress.step + 1, self.engine.step(next(self.data))))
            progress.step += 1
            self.display.advance(progress.step)
            last = progress.step == cfg.train.steps
            if _due(cfg.log.every, progress.step, last) or progress.step == 1:
                self._report()
            improved = self._validate() if _due(cfg.eval.every, progress.step, last) else False
            if _due(cfg.checkpoint.every, progress.step, last) or improved:
                self._save()
            if _due(cfg.sample.every, progress.step, last):
                self._sample()
            if stopped:
                self._judge(*self._fetch())
                self._save()
                self.display.say(f"{stopped[0]}: saved step {progress.step}; continue with --resume")
                return
        if progress.step < cfg.train.steps:
            self._judge(*self._fetch())
            self._save()
            self.display.say(f"early stop: no improvement in {progress.stale} validations")

    def _stale(self) -> bool:
        return 0 < self.cfg.eval.patience <= self.progress.stale

    def close(self) -> None:
        """Leave files that are whole."""
        try:
            self.engine.close()
        finally:
            self.log.close()
        if self.first:
            rows = read_metrics(self.log.path)
            plot_loss(rows, self.dir / "plots" / "loss.png", self.corpus.unigram_entropy)
            write_report(self.cfg, rows, self.corpus.unigram_entropy)

    def _report(self) -> None:
        """Write the newest metrics, and speak of skipped updates since the last report."""
        steps, fetched = self._fetch()
        tokens = self.cfg.train.batch_size * self.cfg.data.seq_len
        rate = len(steps) * tokens / max(time.monotonic() - self.clock - self.idle, 1e-9)
        self.clock, self.idle = time.monotonic(), 0.0
        row = {
            "step": steps[-1],
            "tokens": steps[-1] * tokens,
            **fetched[-1],
            "tokens_per_second": rate,
            "mfu": rate * self.engine.flops_per_token / self.engine.peak_flops,
        }
        self.log.write(row)
        self.display.status(row)
        self._judge(steps, fetched)

    def _fetch(self) -> tuple[list[int], list[dict[str, Any]]]:
        """Steps and metrics since the last report, brought to the host."""
        pending, self.pending = self.pending, []
        return [step for step, _ in pending], self.engine.fetch([metrics for _, metrics in pending])

    def _judge(self, steps: list[int], fetched: list[dict[str, Any]]) -> None:
        """Speak of skipped updates; stop after too many in a row. The state has kept the last good parameters."""
        for step, metrics in zip(steps, fetched, strict=True):
            if metrics["skipped"]:
                self.display.say(f"step {step}: loss or gradient not finite, update skipped")
            if metrics["skipped"] >= self.cfg.train.max_skips:
                self._save()
                raise UserError(
                    f"{self.dir}: {int(metrics['skipped'])} updates in a row were not finite, up to step {step}",
                    "the last good parameters are saved; lower train.learning_rate or look at the data",
                )

    def _validate(self) -> bool:
        """Measure the held-out loss; whether it is the best so far."""
        with self._aside():
            sums = self.engine.evaluate(make_validation_batches(self.cfg.data, self.corpus, **self.held_out))
        if not sums.get("weight"):
            return False
        loss = self.validation_loss = sums["nll"] / sums["weight"]
        bytes_per_token = self.corpus.statistics["validation"].bytes_per_token
        row = {
            "step": self.progress.step,
            "validation_loss": loss,
            "validation_perplexity": math.exp(min(loss, 700)),
            "validation_bits_per_byte": loss / math.log(2) / bytes_per_token,
            "validation_accuracy": sums["accuracy"] / sums["weight"],
        }
        self.log.write(row)
        share = 1 - loss / self.corpus.unigram_entropy
        self.display.say(
            f"step {self.progress.step}: validation loss {loss:.4f} nats/token, "
            f"{row['validation_bits_per_byte']:.3f} bits/byte, {share:.0%} below the unigram model"
        )
        improved = loss < self.progress.best
        self.progress.best = min(loss, self.progress.best)
        self.progress.stale = 0 if improved else self.progress.stale + 1
        self.progress.evaluated = self.progress.step
        return improved

    def _sample(self) -> None:
        prompts = self.cfg.sample.prompts
        if not prompts:
            return
        with self._aside():
            try:
                texts = self.engine.complete(prompts, self.cfg.sample)
            except UserError as error:  # a prompt that does not fit is no reason to stop training
                self.display.say(f"step {self.progress.step}: no sample: {error}")
                return
        if self.first:
            path = self.dir / "samples" / f"{self.progress.step:08d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            pairs = zip(prompts, texts, strict=True)
            path.write_text("\n\n----\n\n".join(prompt + text for prompt, text in pairs) + "\n", encoding="utf-8")

    def _save(self) -> None:
        with self._aside():
            record = {"data": self.data.get_state(), "progress": dataclasses.asdict(self.progress), **self._identity()}
            evaluated = self.progress.evaluated == self.progress.step
            self.engine.save(record, self.validation_loss if evaluated else None)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Time that is not training, kept out of tokens per second."""
        start = time.monotonic()
        yield
        self.idle += time.monotonic() - start


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


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """SIGTERM and Ctrl-C ask the loop to save and leave; a second Ctrl-C leaves at once."""
    received: list[str] = []

    def note(number: int, _: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

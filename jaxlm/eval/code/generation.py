"""Samples from a model: prompts of a task, completions on disk as they come, and the verdicts on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxlm.errors import UserError, did_you_mean
from jaxlm.eval.code.estimate import check_counts
from jaxlm.eval.code.problems import Problem
from jaxlm.eval.code.samples import Sample, records

ORDERS = ("psm", "spm", "prompt")
CHUNK = 16
"""Completions of one batch.

A batch is a function of the seed and its number, so it must not change in a resumed run.
"""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How samples are made."""

    samples: int = 1
    """Completions of each problem."""
    temperature: float = 0.0
    """0 is greedy, which makes one sample."""
    max_new_tokens: int = 512
    seed: int = 0
    fim: str = "psm"
    """Infilling: `psm` or `spm`, the order of prefix, suffix and middle; `prompt`: the suffix is a comment instead."""

    def __post_init__(self) -> None:
        if self.fim not in ORDERS:
            raise UserError(f"no order of infilling {self.fim!r}", did_you_mean(self.fim, ORDERS))


@runtime_checkable
class Completer(Protocol):
    """A model that completes texts."""

    def complete(self, prompts: Sequence[str], seed: int) -> list[tuple[str, bool]]:
        """Complete prompts. Returns each text, and whether it was cut off by its length."""
        ...

    def spelling(self, special: str) -> str | None:
        """The text of a special token (`fim_prefix`), None where the tokenizer has none."""
        ...


class ModelCompleter:
    """A model of jaxlm, by its path."""

    def __init__(self, path: Path | str, stops: Sequence[str], how: Generation) -> None:
        """Open a model. Raises: UserError."""
        import jax

        from jaxlm.convert.files.side_files import no_tokenizer
        from jaxlm.convert.open_model import load
        from jaxlm.infer.text import Generator
        from jaxlm.models.decoder import Decoder
        from jaxlm.numerics import Policy
        from jaxlm.processes.compile_cache import enable_compilation_cache
        from jaxlm.text.tokenizer import Tokenizer

        model = load(path)
        if model.tokenizer_path is None:
            raise no_tokenizer(Path(path))
        enable_compilation_cache(model.config.data.cache_dir)
        self.stops, self.how = stops, how
        self.wide = "float64" in (model.config.numerics.params, model.config.numerics.compute)
        self.tokenizer = Tokenizer.from_file(model.tokenizer_path)
        with jax.enable_x64(self.wide or jax.config.read("jax_enable_x64")):
            decoder = Decoder(model.config.model.portable, Policy.from_config(model.config.numerics))
            self.generator = Generator(decoder, jax.device_put(model.params), self.tokenizer)

    def complete(self, prompts: Sequence[str], seed: int) -> list[tuple[str, bool]]:
        """Complete prompts in one batch."""
        import jax

        from jaxlm.text.sampling import GREEDY, Sampling

        limit, eot = self.how.max_new_tokens, self.tokenizer.eot
        sampling = Sampling(temperature=self.how.temperature) if self.how.temperature else GREEDY
        with jax.enable_x64(self.wide or jax.config.read("jax_enable_x64")):
            done = self.generator.complete(prompts, sampling, max_new_tokens=limit, stop=self.stops, seed=seed)
        return [(one.text, len(one.tokens) >= limit and one.tokens[-1] != eot) for one in done]

    def spelling(self, special: str) -> str | None:
        """The text of a special token."""
        known = self.tokenizer.specials
        return self.tokenizer.decode([known[special]]) if special in known else None


def prompt_of(problem: Problem, model: Completer, how: Generation) -> str:
    """The text that the model continues. Raises: UserError for infilling without FIM tokens."""
    if not problem.suffix:
        return problem.prompt
    if how.fim == "prompt":
        comment = "".join(f"# {line}\n" for line in problem.suffix.splitlines())
        return f"# The code ends with:\n{comment}\n{problem.prompt}"
    prefix, middle, suffix = (model.spelling(f"fim_{part}") for part in ("prefix", "middle", "suffix"))
    if prefix is None or middle is None or suffix is None:
        raise UserError(
            "infilling needs the tokens fim_prefix, fim_middle and fim_suffix, which the tokenizer lacks",
            "--fim prompt puts the suffix into the prompt",
        )
    if how.fim == "spm":
        return f"{prefix}{suffix}{problem.suffix}{middle}{problem.prompt}"
    return f"{prefix}{problem.prompt}{suffix}{problem.suffix}{middle}"


def make_samples(
    problems: Sequence[Problem],
    model: Completer,
    how: Generation,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Complete every problem, append each sample to `folder/samples.jsonl`, and return all.

    A killed run goes on behind the last whole line, and ends with the same file.

    Raises: UserError for counts that make no estimate, or a folder with samples of other settings.
    """
    check_counts(how.samples, [1], how.temperature)
    _same_settings(folder, how)
    wanted = [(problem, number) for problem in problems for number in range(how.samples)]
    prompts = {problem.task_id: prompt_of(problem, model, how) for problem in problems}
    with records(folder / "samples.jsonl") as opened:
        for number, record in enumerate(opened.known):
            if number >= len(wanted) or record.get("task_id") != wanted[number][0].task_id:
                raise UserError(f"{opened.path} has samples of other problems", "remove it, or name another --out")
        chunks = range(len(opened.known) // CHUNK, -(-len(wanted) // CHUNK)) if len(opened.known) < len(wanted) else ()
        for chunk in chunks:
            batch = wanted[chunk * CHUNK : (chunk + 1) * CHUNK]
            texts = model.complete([prompts[problem.task_id] for problem, _ in batch], how.seed * 1_000_003 + chunk)
            for place, ((problem, number), (text, cut_off)) in enumerate(zip(batch, texts, strict=True)):
                if chunk * CHUNK + place < len(opened.known):
                    continue
                record = {"task_id": problem.task_id, "sample": number, "completion": text}
                record["cut_off"] = cut_off
                opened.append(record)
                opened.known.append(record)
            if progress:
                progress(len(opened.known), len(wanted))
        known = opened.known
    return [Sample(one["task_id"], one["sample"], one["completion"], one["cut_off"]) for one in known]


def _same_settings(folder: Path, how: Generation) -> None:
    file, settings = folder / "settings.json", asdict(how)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists() and json.loads(file.read_text()) != settings:
            raise UserError(f"{folder} has samples of other settings", "remove it, or name another --out")
        file.write_text(json.dumps(settings) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}", "--out names another place") from None

"""Samples from a model: prompts of a task, completions on disk as they come, and the verdicts on them."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxlm.errors import UserError, did_you_mean
from jaxlm.eval.code.estimate import check_counts
from jaxlm.eval.code.problems import Problem
from jaxlm.eval.code.samples import Sample, digest_of, is_of, records, write_whole
from jaxlm.text.completion import check_prompts, encode_prompts

if TYPE_CHECKING:
    from jaxlm.text.chat import Chat

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
    chat: bool = False
    """Ask through the model's chat template, and take code out of the fences of its answers."""

    def __post_init__(self) -> None:
        if self.fim not in ORDERS:
            raise UserError(f"no order of infilling {self.fim!r}", did_you_mean(self.fim, ORDERS))


@runtime_checkable
class Completer(Protocol):
    """A model that completes texts."""

    def complete(self, prompts: Sequence[str], seed: int) -> list[tuple[str, bool]]:
        """Complete prompts. Returns each text, and whether it was cut off by its length."""
        ...

    def check(self, names: Mapping[str, str]) -> None:
        """Refuse prompts, each with the name of its problem, of which the longest leaves no room. Raises: UserError."""
        ...

    def spelling(self, special: str) -> str | None:
        """The text of a special token (`fim_prefix`), None where the tokenizer has none."""
        ...

    def turn(self, question: str) -> str:
        """The text of a conversation up to where the model answers a question."""
        ...


class ModelCompleter:
    """A model of jaxlm, by its path."""

    def __init__(self, path: Path | str, how: Generation, stops: Sequence[str] = ()) -> None:
        """Open a model. Raises: UserError."""
        from jaxlm.convert.files.side_files import no_tokenizer
        from jaxlm.infer.load import load
        from jaxlm.processes.compile_cache import enable_compilation_cache

        self.model = load(path)
        if self.model.tokenizer is None:
            raise no_tokenizer(Path(path))
        enable_compilation_cache(self.model.config.data.cache_dir)
        self.how, self.stops = how, stops
        self.tokenizer = self.model.tokenizer

    def stopping_at(self, stops: Sequence[str], max_new_tokens: int = 0) -> ModelCompleter:
        """The same model in memory, whose completions end before some strings."""
        other = copy.copy(self)
        other.stops = stops
        other.how = replace(self.how, max_new_tokens=max_new_tokens or self.how.max_new_tokens)
        return other

    def complete(self, prompts: Sequence[str], seed: int) -> list[tuple[str, bool]]:
        """Complete prompts in one batch."""
        from jaxlm.text.sampling import GREEDY, Sampling

        sampling = Sampling(temperature=self.how.temperature) if self.how.temperature else GREEDY
        limit, stops = self.how.max_new_tokens, () if self.how.chat else self.stops
        done = self.model.generate(list(prompts), sampling=sampling, max_new_tokens=limit, stop=stops, seed=seed)
        return [(one.text, one.finish == "length") for one in done]

    def check(self, names: Mapping[str, str], new_tokens: int = 0) -> None:
        """Refuse prompts, each with the name of its problem, of which the longest leaves no room for a completion."""
        ids = encode_prompts(self.tokenizer, list(names))
        longest, name = max(zip(map(len, ids), names.values(), strict=True))
        try:
            check_prompts(self.model.config.model, [[0] * longest], new_tokens or self.how.max_new_tokens)
        except UserError as error:
            raise UserError(f"{name}: {error.message}", error.hint) from None

    def choose(self, prompt: str, answers: Sequence[str]) -> int:
        """The answer that is likeliest behind a prompt, by its number; the first of those that are equal."""
        rows = self.model.log_probs([prompt + answer for answer in answers])
        return int(max(range(len(rows)), key=lambda number: float(rows[number].sum())))

    def spelling(self, special: str) -> str | None:
        """The text of a special token."""
        known = self.tokenizer.specials
        return self.tokenizer.decode([known[special]]) if special in known else None

    def turn(self, question: str) -> str:
        """The text of a conversation up to where the model answers a question."""
        return self._chat.render([{"role": "user", "content": question}], generation_prompt=True).text

    @functools.cached_property
    def _chat(self) -> Chat:
        from jaxlm.text.chat import Chat

        own = self.model.tokenizer_path
        return Chat.of(self.tokenizer, beside=own.parent if own else None)


def prompt_of(problem: Problem, model: Completer, how: Generation) -> str:
    """The text that the model continues.

    Raises: UserError for infilling without FIM tokens, and for a chat with a task that asks no question.
    """
    if how.chat:
        if not problem.question:
            raise UserError(f"--chat: {problem.task_id} asks no question, it is for base models", "leave --chat out")
        return model.turn(problem.question)
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
    prompts: Mapping[tuple[str, int], str] | None = None,
) -> list[Sample]:
    """Complete every problem, append each sample to `folder/samples.jsonl`, and return all.

    A killed run goes on behind the last whole line, and ends with the same file.

    Args:
        prompts: the prompt of each sample, by problem and number, where it is not the problem's own.

    Raises: UserError for counts that make no estimate, a prompt without room behind it, or a folder with samples of
        other settings.
    """
    check_counts(how.samples, [1], how.temperature)
    wanted = [(problem, number) for problem in problems for number in range(how.samples)]
    prompts = prompts or {(one.task_id, number): prompt_of(one, model, how) for one, number in wanted}
    model.check({prompt: task_id for (task_id, _), prompt in prompts.items()})
    same_settings(folder, how)
    with records(folder / "samples.jsonl") as opened:
        for number, record in enumerate(opened.known):
            task_id, place = (wanted[number][0].task_id, wanted[number][1]) if number < len(wanted) else ("", 0)
            if not task_id or not is_of(record, task_id, prompts[task_id, place]):
                raise UserError(f"{opened.path} has samples of other problems", "remove it, or name another --out")
        chunks = range(len(opened.known) // CHUNK, -(-len(wanted) // CHUNK)) if len(opened.known) < len(wanted) else ()
        for chunk in chunks:
            batch = wanted[chunk * CHUNK : (chunk + 1) * CHUNK]
            asked = [prompts[problem.task_id, number] for problem, number in batch]
            texts = model.complete(asked, how.seed * 1_000_003 + chunk)
            for place, ((problem, number), (text, cut_off)) in enumerate(zip(batch, texts, strict=True)):
                if chunk * CHUNK + place < len(opened.known):
                    continue
                record: dict[str, object] = {"task_id": problem.task_id, "sample": number, "completion": text}
                record |= {"cut_off": cut_off, "prompt_digest": digest_of(asked[place])}
                opened.append(record)
                opened.known.append(record)
            if progress:
                progress(len(opened.known), len(wanted))
        known = opened.known
    return [Sample(one["task_id"], one["sample"], one["completion"], one["cut_off"]) for one in known]


def same_settings(folder: Path, how: Generation) -> None:
    """Keep the settings beside the samples. Raises: UserError where a folder has those of others."""
    file, settings = folder / "settings.json", asdict(how)
    try:
        known = {**asdict(Generation()), **json.loads(file.read_text())} if file.exists() else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: {error}", "--out names another place") from None
    if known is None:
        write_whole(file, json.dumps(settings) + "\n")
    elif known != settings:
        raise UserError(f"{folder} has samples of other settings", "remove it, or name another --out")

"""The next line: what stands in held-out files of a run's corpus, line by line, as an editor would complete it.

The prompt is the text up to the end of the line before, without its line end: tokenizers join a line end with the
indentation behind it. The answer is what the model writes between the next two line ends. Lines are drawn by a hash of
file and number, so the same lines come whatever else is in the corpus.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlm.errors import UserError
from jaxlm.eval.code.estimate import Estimate, ratio
from jaxlm.eval.code.metrics import MetricReport

LINES = 500
MAX_TOKENS = 64
"""Of a line with the line end before it."""
CONTEXT = 2_000
"""Characters before the line that the model sees, from the beginning of a line on."""


class Line(NamedTuple):
    """A line to guess."""

    task_id: str
    file: str
    prompt: str
    wanted: str
    guesses: tuple[str, str]
    """The line before, and the most frequent line before it."""


def texts_of(path: Path) -> list[tuple[str, str]]:
    """Read a file or the files of a folder, with their names. Raises: UserError."""
    if not path.exists():
        raise UserError(f"{path} is neither file nor folder", "--data names held-out text")
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    texts = []
    for file in files:
        try:
            texts.append((str(file.relative_to(path)) if path.is_dir() else file.name, file.read_text("utf-8")))
        except (OSError, UnicodeDecodeError):
            continue  # no text
    return texts


def lines(texts: Iterable[tuple[str, str]], limit: int = LINES) -> list[Line]:
    """Draw lines that are not blank and have a line before them. Raises: UserError where there is none."""
    kept: list[tuple[str, Line]] = []
    for name, text in texts:
        whole = text.splitlines()
        drawn = ((_draw(name, number), number) for number in range(1, len(whole)) if whole[number].strip())
        for key, number in heapq.nsmallest(limit, drawn):
            kept.append((key, _line(name, whole, number)))
        kept = heapq.nsmallest(limit, kept)
    if not kept:
        raise UserError("the held-out text has no second line", "next-line needs files of several lines")
    return [line for _, line in sorted(kept, key=lambda one: one[1].task_id)]


def _draw(name: str, number: int) -> str:
    return hashlib.blake2b(f"{name}\0{number}".encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _line(name: str, whole: Sequence[str], number: int) -> Line:
    before, size = [], 0
    for text in reversed(whole[:number]):
        size += len(text) + 1
        if before and size > CONTEXT:
            break
        before.append(text[-CONTEXT:])
    counts = Counter(text for text in whole[:number] if text.strip())
    frequent = counts.most_common(1)[0][0] if counts else ""
    prompt = "\n".join(reversed(before))
    return Line(f"{name}:{number + 1}", name, prompt or "\n", whole[number], (whole[number - 1], frequent))


def guess_of(completion: str) -> str:
    """The line that a completion writes, between its first two line ends; nothing if it continues the line before."""
    before, found, rest = completion.partition("\n")
    return rest.split("\n", 1)[0] if found and not before.strip() else ""


def scores(listed: Sequence[Line], guesses: Sequence[str]) -> dict[str, Estimate]:
    """Exact match, prefix match and edit similarity, each with an interval over files. Raises: UserError."""
    try:
        from rapidfuzz import fuzz
        from rapidfuzz.distance import Prefix
    except ModuleNotFoundError:
        raise UserError("next-line needs rapidfuzz", "pip install 'jaxlm[eval]'") from None
    # The share of the line that is right before the first mistake is the prefix match.
    figures = {
        "exact match": lambda guess, wanted: float(guess == wanted),
        "prefix match": lambda guess, wanted: Prefix.similarity(guess, wanted) / len(wanted),
        "edit similarity": lambda guess, wanted: fuzz.ratio(guess, wanted) / 100,
    }
    files = {line.file for line in listed}
    made = {}
    for name, figure in figures.items():
        above, below = defaultdict[str, float](float), Counter[str]()
        for number, (line, guess) in enumerate(zip(listed, guesses, strict=True)):
            # Lines of one file belong together; a single file leaves only its lines to draw.
            group = line.file if len(files) > 1 else str(number)
            above[group] += figure(guess.rstrip(), line.wanted.rstrip())
            below[group] += 1
        made[name] = ratio([above[group] for group in below], [float(count) for count in below.values()])
    return made


def report(listed: Sequence[Line], completions: Sequence[str], where: str) -> MetricReport:
    """Compare completions with the lines of `where`, beside two guesses without a model."""
    baselines = {
        name: scores(listed, [line.guesses[place] for line in listed])
        for place, name in enumerate(("the line before", "the most frequent line so far"))
    }
    files = len({line.file for line in listed})
    protocol = "greedy, blanks at the end of a line do not count; edit similarity: rapidfuzz.fuzz.ratio"
    return MetricReport(
        "next-line", len(listed), f"lines of {files:,} files", scores(listed, list(map(guess_of, completions))),
        baselines, f"held out of {where}; {protocol}",
    )  # fmt: skip

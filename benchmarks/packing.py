"""Best fit against stream, and repositories against files: held-out loss of small models at equal tokens.

    python -m benchmarks.packing                 goes on where it stopped; about 12 minutes

The standard library as folders: its packages, and one folder of single modules. Some packages are held out. Three
models of one shape see the same number of tokens: files packed as a stream, files by best fit, repositories by best
fit. They are compared on the same tokens of the held-out files, each file alone; the third also on whole repositories,
where the files that are imported stand before, against the second on files alone. Intervals are over files and seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jaxlm
from benchmarks import small_runs
from benchmarks.small_runs import Sequences
from jaxlm.config import Data, toml
from jaxlm.data import repository
from jaxlm.data.pipeline import prepare
from jaxlm.data.sources import open_source
from jaxlm.text.tokenizer import Tokenizer

HELD_OUT = ("concurrent", "http", "json", "logging", "urllib", "wsgiref", "zoneinfo")
ARMS: dict[str, dict[str, Any]] = {
    "stream": {},
    "best_fit": {"packing": "best_fit"},
    "repository": {"packing": "best_fit", "unit": "repository"},
}


def folders(root: Path) -> None:
    """Write the standard library as folders of repositories: `train` and `held_out`."""
    if (root / "whole").is_file():
        return
    for document in open_source("stdlib", Data()).documents():
        name = document.name if "/" in document.name else f"modules/{document.name}"
        side = "held_out" if name.split("/")[0] in HELD_OUT else "train"
        path = root / side / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text, encoding="utf-8", newline="")
    (root / "whole").touch()


def settings(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """The config of one model."""
    root = options.folder / "stdlib"
    own = options.folder / "tokenizer.json"
    data = {"source": str(root / "train"), "validation_source": str(root / "held_out"), **ARMS[arm]}
    tokenizer = {"kind": "file", "path": str(own)} if own.is_file() else {"vocab_size": 2048}
    return small_runs.config_of(options, seed, tokenizer, data)


class Form(NamedTuple):
    """Held-out text as sequences of ids, and of each id the number of its token among all texts; -1: it is no text."""

    ids: list[list[int]]
    numbers: list[np.ndarray]


class HeldOut(NamedTuple):
    """The held-out files, each alone and within its repository; `documents` says of each token whose it is [N]."""

    alone: Form
    within: Form
    documents: np.ndarray


def held_out_files(root: Path, tokenizer: Tokenizer, seq_len: int) -> HeldOut:
    """Sequences of at most `seq_len` ids of the files below `root`, a folder for each repository."""
    marks, end = repository.marks_of(tokenizer), [tokenizer.special("eot")]
    alone, within = Form([], []), Form([], [])
    texts: list[int] = []
    documents: list[int] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        other: list[int] = []

        def aside(ids: list[int], other: list[int] = other) -> list[int]:
            """Negative numbers for ids that are no text."""
            other += ids
            return list(range(len(ids) - len(other) - 1, -len(other) - 1, -1))

        head, pairs = aside([marks.name, *tokenizer.encode(folder.name)]), []
        files = {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*.py"))}
        for path in repository.reading_order(repository.dependencies(files)):
            ids = tokenizer.encode(files[path])
            numbers = np.arange(len(texts), len(texts) + len(ids))
            documents += [documents[-1] + 1 if documents else 0] * len(ids)
            texts += ids
            pairs.append((aside([marks.file, *tokenizer.encode(f"{path}\n")]), numbers.tolist()))
            for start in range(0, len(ids), seq_len):
                alone.ids.append(ids[start : start + seq_len])
                alone.numbers.append(numbers[start : start + seq_len])
        # Rows are made of numbers instead of ids, so that each token is known again.
        for row in repository.rows_of_files(head, pairs, aside(end), seq_len):
            within.ids.append([texts[n] if n >= 0 else other[-1 - n] for n in row.tolist()])
            within.numbers.append(np.maximum(row, -1))
    return HeldOut(alone, within, np.asarray(documents))


def score(model: jaxlm.Model, form: Form, tokens: int) -> np.ndarray:
    """Negative log-likelihood of each token of the texts [N]; NaN where it is the first of a sequence."""
    counts = [(numbers >= 0) & (np.arange(len(numbers)) > 0) for numbers in form.numbers]
    out = np.full(tokens, np.nan)
    numbers = np.concatenate([own[count] for own, count in zip(form.numbers, counts, strict=True)])
    out[numbers] = small_runs.scored(model, Sequences(form.ids, counts)).nll
    return out


def _scores(tree: dict[str, Any], run: Path, held_out: HeldOut) -> dict[str, np.ndarray]:
    model, tokens = small_runs.trained(tree, run), len(held_out.documents)
    return {"alone": score(model, held_out.alone, tokens), "within": score(model, held_out.within, tokens)}


def main() -> None:
    """Train what is missing, and print a line for each comparison."""
    defaults = {"steps": 250, "batch": 4, "seq_len": 512, "width": 64, "layers": 2}
    options = small_runs.parser("packing", __doc__, **defaults).parse_args()
    folders(options.folder / "stdlib")
    first = prepare(toml.from_dict(settings(options, "stream", 0)))
    first.tokenizer.save(options.folder / "tokenizer.json")
    held_out = held_out_files(options.folder / "stdlib" / "held_out", first.tokenizer, options.seq_len)

    make = lambda arm, seed, run: _scores(settings(options, arm, seed), run, held_out)  # noqa: E731
    found = small_runs.by_arm(options, ARMS, make, "alone")

    comparisons = {
        "best fit against stream, files alone": (("best_fit", "alone"), ("stream", "alone")),
        "repository against files, files alone": (("repository", "alone"), ("best_fit", "alone")),
        "repository, within, against files, alone": (("repository", "within"), ("best_fit", "alone")),
        "repository, within, against alone": (("repository", "within"), ("repository", "alone")),
    }
    results = {}
    for name, (ours, theirs) in comparisons.items():
        pair = [[one[form] for one in found[arm]] for arm, form in (ours, theirs)]
        both = np.isfinite(pair[0][0]) & np.isfinite(pair[1][0])
        chosen = [[row[both] for row in rows] for rows in pair]
        results[name] = small_runs.compared(chosen[0], chosen[1], held_out.documents[both])
        small_runs.printed(name, results[name])
    small_runs.saved("packing", options, comparisons=results)


if __name__ == "__main__":
    main()

"""Fill-in-the-middle, learned: names used below but not above, by models with and without it at equal tokens.

    python -m benchmarks.fim                     goes on where it stopped; about 12 minutes

A place is the first use of a name in a held-out file, where the text shown below has it again. The model with
`[data.fim]` reads both sides, in the order of training (PSM), the model without reads what stands above. Both are
judged on the same tokens, those of the name. Beside them: the loss from left to right on whole files, and HumanEval's
single-line infilling, where a line is right if every token of it is the likeliest one; that is what greedy decoding
writes, spelled with the tokens of the reference. Intervals are over files and seeds, of shares those of Wilson (1927).
"""

from __future__ import annotations

import argparse
import builtins
import keyword
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import jaxlm
from benchmarks import small_runs
from benchmarks.small_runs import Sequences
from benchmarks.sst2 import wilson
from jaxlm.config import toml
from jaxlm.data import fim
from jaxlm.data.pipeline import prepare
from jaxlm.data.rows.build import marks_of
from jaxlm.data.sources import Documents
from jaxlm.eval.tasks import infilling
from jaxlm.text.tokenizer import Tokenizer

ARMS: dict[str, dict[str, Any]] = {"without": {}, "with": {"fim": {"rate": 0.5}}}
_NAME = re.compile(r"\b[A-Za-z_]\w{3,}\b")
_ORDINARY = {*keyword.kwlist, *keyword.softkwlist, *dir(builtins)}


class Place(NamedTuple):
    """A gap in a text, and the number of the file that it is of."""

    before: str
    middle: str
    after: str
    document: int


def settings(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """The config of one model."""
    data = {"source": "stdlib", "validation_fraction": 0.1, **ARMS[arm]}
    return small_runs.config_of(options, seed, {"vocab_size": 2048}, data)


def named_places(texts: Sequence[str], room: int, wanted: int) -> list[Place]:
    """First uses of names that come again within `room` characters: so many, evenly of all texts, by chance.

    What stands before begins at the start of a line, what stands after ends at the end of one; a blank before a name
    belongs to it, as words are cut.
    """
    random = np.random.default_rng(0)
    by_text: list[list[Place]] = []
    for number, text in enumerate(texts):
        first = {match[0]: match for match in reversed(list(_NAME.finditer(text))) if match[0] not in _ORDINARY}
        places = []
        for name, match in first.items():
            start, end = match.span()
            above, below = max(0, start - room), min(len(text), end + room)
            above = text.find("\n", above, start) + 1 or above if above else 0
            below = text.rfind("\n", end, below) + 1 or below
            if re.search(rf"\b{name}\b", text[end:below]):
                start -= text[start - 1 : start] == " "
                places.append(Place(text[above:start], text[start:end], text[end:below], number))
        random.shuffle(places)
        by_text.append(places)
    out: list[Place] = []
    while len(out) < wanted and any(by_text):
        out += [places.pop() for places in by_text if places]
    return out[:wanted]


def gaps(tokenizer: Tokenizer, places: Sequence[Place], limit: int, *, both_sides: bool) -> Sequences:
    """Each place as ids up to its middle, which counts; too long, it is shortened at its far ends."""
    marks, ids, counts = marks_of(tokenizer), [], []
    for place in places:
        before, middle, after = tokenizer.encode_batch([place.before, place.middle, place.after])
        room = limit - len(middle) - 4
        after = after[: max(room // 2, room - len(before))]
        before = before[-max(1, room - len(after)) :]
        head = fim.arrange(marks, before, [], after, spm=False)[0][:-1] if both_sides else before
        ids.append([*head, *middle])
        counts.append(np.arange(len(ids[-1])) >= max(1, len(head)))
    return Sequences(ids, counts)


def left_to_right(tokenizer: Tokenizer, texts: Sequence[str], seq_len: int, pieces: int) -> tuple[Sequences, list[int]]:
    """The first `pieces` of `seq_len` ids of each text, and the text of each counted token."""
    ids, counts, documents = [], [], []
    for number, text in enumerate(texts):
        whole = tokenizer.encode(text)
        for start in range(0, min(len(whole), pieces * seq_len), seq_len):
            ids.append(whole[start : start + seq_len])
            counts.append(np.arange(len(ids[-1])) > 0)
            documents += [number] * (len(ids[-1]) - 1)
    return Sequences(ids, counts), documents


def of_tokens(sequences: Sequences, numbers: Sequence[int]) -> np.ndarray:
    """The number of the sequence that each counted token is of [N]."""
    return np.repeat(np.asarray(numbers), [int(count.sum()) for count in sequences.counts])


class Judged(NamedTuple):
    """What the models are judged on, by name, and the file of each token of names and of whole texts."""

    sequences: dict[str, Sequences]
    name_files: np.ndarray
    text_files: np.ndarray
    lines: int


def judged(options: argparse.Namespace) -> Judged:
    """Names, lines and whole texts."""
    cfg = toml.from_dict(settings(options, "without", 0))
    tokenizer, limit = prepare(cfg).tokenizer, options.seq_len
    texts = [document.text for side, document in Documents(cfg.data) if side == "validation"]
    places = named_places(texts, 3 * limit // 2, options.places)
    problems = infilling.problems() if options.problems else []
    problems = problems[:: max(1, len(problems) // max(1, options.problems))][: options.problems]
    lines = [Place(p.before, p.reference[len(p.before) : -len(p.suffix) or None], p.suffix, 0) for p in problems]
    whole, text_files = left_to_right(tokenizer, texts, limit, 6)
    above = gaps(tokenizer, places, limit, both_sides=False)
    sequences = {"whole": whole, "names, above": above}
    sequences["names, both sides"] = gaps(tokenizer, places, limit, both_sides=True)
    if lines:
        sequences["lines, above"] = gaps(tokenizer, lines, limit, both_sides=False)
        sequences["lines, both sides"] = gaps(tokenizer, lines, limit, both_sides=True)
    name_files = of_tokens(above, [place.document for place in places])
    return Judged(sequences, name_files, np.asarray(text_files), len(lines))


def score(model: jaxlm.Model, of: Judged) -> dict[str, np.ndarray]:
    """Negative log-likelihoods by name, and of lines which are right."""
    found = {name: small_runs.scored(model, sequences) for name, sequences in of.sequences.items()}
    out = {name: one.nll for name, one in found.items()}
    for name in found:
        if name.startswith("lines"):
            wrong_N = np.bincount(of_tokens(of.sequences[name], range(of.lines)), ~found[name].likeliest)
            out[f"{name}, right"] = wrong_N == 0
    return out


def comparisons(found: dict[str, list[dict[str, np.ndarray]]], of: Judged) -> dict[str, Any]:
    """The figures, each printed."""
    results: dict[str, Any] = {}
    for name, ours, form, theirs, other, files in (
        ("names, with FIM against without", "with", "names, both sides", "without", "names, above", of.name_files),
        (
            "names, with FIM, both sides against above",
            "with",
            "names, both sides",
            "with",
            "names, above",
            of.name_files,
        ),
        ("left to right, with FIM against without", "with", "whole", "without", "whole", of.text_files),
    ):
        results[name] = small_runs.compared(
            [one[form] for one in found[ours]], [one[other] for one in found[theirs]], files
        )
        small_runs.printed(name, results[name])
        print(f"{'':44} {results[name]['difference'] / results[name]['theirs']:+.2%}")
    for arm, form in (("with", "lines, both sides"), ("with", "lines, above"), ("without", "lines, above")):
        if of.lines:
            right = np.concatenate([one[f"{form}, right"] for one in found[arm]])
            name, count = f"HumanEval infilling, exact: {arm} FIM, {form}", int(right.sum())
            results[name] = {"right": count, "of": len(right), "interval": wilson(count, len(right))}
            print(f"{name}: {count} of {len(right)}", flush=True)
    return results


def main() -> None:
    """Train what is missing, and print a line for each comparison."""
    defaults = {"steps": 400, "batch": 8, "seq_len": 256, "width": 96, "layers": 2}
    asked = small_runs.parser("fim", __doc__, **defaults, places=500)
    asked.add_argument("--problems", type=int, default=300, help="of HumanEval infilling, under JAXLM_DATA; 0: none")
    options = asked.parse_args()
    of = judged(options)
    make = lambda arm, seed, run: score(small_runs.trained(settings(options, arm, seed), run), of)  # noqa: E731
    found = small_runs.by_arm(options, ARMS, make, "whole")
    small_runs.saved("fim", options, figures=comparisons(found, of))


if __name__ == "__main__":
    main()

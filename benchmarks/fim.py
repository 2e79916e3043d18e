"""Fill-in-the-middle, learned: names used below but not above, by models with and without it at equal tokens.

    JAXLM_DATA=../shared/data python -m benchmarks.fim     goes on where it stopped; 4 to 8 minutes of a core a model

A place is the first use of a name in a held-out file, where the text shown below has it again. The model with
`[data.fim]` reads both sides, in both orders of training: PSM (the gap last) and SPM (the suffix first, so that what
stands above runs on into the gap). The model without reads what stands above, and, as a baseline of mere nearness, the
text below before the text above. All are judged on the same tokens, those of the name; a place counts only if both
sides fit, and if the name is made of tokens that the whole text has, so that no model meets a cut it never saw. Beside
them: the loss from left to right on whole files, and HumanEval's single-line infilling, where a line is right if every
token of it is the likeliest one; that is what greedy decoding writes, spelled with the tokens of the reference.
Intervals are over files and seeds, of shares those of Wilson (1927).

The blocks of the models see four tokens and all tokens in turn: a block that can see little else finds the token
before sooner, and with it the copying of what stood behind the same token (Olsson et al. 2022, Argument 2).
"""

from __future__ import annotations

import argparse
import builtins
import keyword
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

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
PATTERN = ("attention(window=4)+mlp", "attention+mlp")
Order = Literal["above", "below, above", "PSM", "SPM"]
"""How a place is shown: the text above alone; the text below and then that above, as one text; or with the marks."""
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
    data = {"source": "stdlib", "validation_fraction": 0.1, "packing": "best_fit", **ARMS[arm]}
    tree = small_runs.config_of(options, seed, {"vocab_size": options.vocabulary}, data)
    tree["model"]["pattern"] = PATTERN
    return tree


def first_uses(text: str, number: int, room: int) -> list[Place]:
    """First uses of names that come again within `room` characters.

    What stands before begins at the start of a line, what stands after ends at the end of one; a blank before a name
    belongs to it, as words are cut.
    """
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
    return places


def fits(tokenizer: Tokenizer, place: Place, limit: int) -> bool:
    """True if a place is shown whole within `limit` ids, and its name is made of tokens of the text around it."""
    before, middle, after, joined = tokenizer.encode_batch([*place[:3], place.before + place.middle])
    return bool(before) and len(before + middle + after) + 4 <= limit and before + middle == joined


def named_places(tokenizer: Tokenizer, texts: Sequence[str], limit: int, wanted: int) -> list[Place]:
    """So many places, evenly of all texts, by chance."""
    characters = sum(map(len, texts)) / sum(map(len, tokenizer.encode_batch(texts)))
    random = np.random.default_rng(0)

    def drawn(text: str, number: int) -> Iterator[Place]:
        places = first_uses(text, number, int(0.4 * limit * characters))
        random.shuffle(places)
        return (place for place in places if fits(tokenizer, place, limit))

    waiting, out = [drawn(text, number) for number, text in enumerate(texts)], []
    while waiting and len(out) < wanted:
        turn = [(places, next(places, None)) for places in waiting]
        waiting = [places for places, place in turn if place]
        out += [place for _, place in turn if place]
    return out[:wanted]


def gaps(tokenizer: Tokenizer, places: Sequence[Place], limit: int, order: Order) -> Sequences:
    """Each place as ids up to its middle, which counts; too long, it is shortened at its far ends."""
    marks, ids, counts = marks_of(tokenizer), [], []
    for place in places:
        before, middle, after = tokenizer.encode_batch([place.before, place.middle, place.after])
        room = limit - len(middle) - 4
        after = after[: max(room // 2, room - len(before))]
        before = before[-max(1, room - len(after)) :]
        if order in ("PSM", "SPM"):
            head = fim.arrange(marks, before, [], after, spm=order == "SPM")[0][:-1]
        else:
            head = [*after, *before] if order == "below, above" else before
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
    places = named_places(tokenizer, texts, limit, options.places)
    problems = infilling.problems() if options.problems else []
    problems = problems[:: max(1, len(problems) // max(1, options.problems))][: options.problems]
    lines = [Place(p.before, p.reference[len(p.before) : -len(p.suffix) or None], p.suffix, 0) for p in problems]
    whole, text_files = left_to_right(tokenizer, texts, limit, 6)
    sequences = {"whole": whole}
    for order in get_args(Order):
        sequences[f"names, {order}"] = gaps(tokenizer, places, limit, order)
        if lines:
            sequences[f"lines, {order}"] = gaps(tokenizer, lines, limit, order)
    name_files = of_tokens(sequences["names, above"], [place.document for place in places])
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


COMPARISONS = {
    "names, with FIM (SPM) against without": (("with", "names, SPM"), ("without", "names, above")),
    "names, with FIM (PSM) against without": (("with", "names, PSM"), ("without", "names, above")),
    "names, with FIM (SPM) against without, below": (("with", "names, SPM"), ("without", "names, below, above")),
    "names, without FIM, below, against above": (("without", "names, below, above"), ("without", "names, above")),
    "names, with FIM, SPM against above": (("with", "names, SPM"), ("with", "names, above")),
    "left to right, with FIM against without": (("with", "whole"), ("without", "whole")),
}
LINES = (("with", "SPM"), ("with", "PSM"), ("with", "above"), ("without", "above"))


def comparisons(found: dict[str, list[dict[str, np.ndarray]]], of: Judged) -> dict[str, Any]:
    """The figures, each printed."""
    results: dict[str, Any] = {}
    for name, ((ours, form), (theirs, other)) in COMPARISONS.items():
        files = of.text_files if form == "whole" else of.name_files
        results[name] = small_runs.compared(
            [one[form] for one in found[ours]], [one[other] for one in found[theirs]], files
        )
        small_runs.printed(name, results[name])
        print(f"{'':44} {results[name]['difference'] / results[name]['theirs']:+.2%}")
    for arm, order in LINES if of.lines else ():
        right = np.concatenate([one[f"lines, {order}, right"] for one in found[arm]])
        name, count = f"HumanEval infilling, exact: {arm} FIM, {order}", int(right.sum())
        results[name] = {"right": count, "of": len(right), "interval": wilson(count, len(right))}
        print(f"{name}: {count} of {len(right)}", flush=True)
    return results


def main() -> None:
    """Train what is missing, and print a line for each comparison."""
    defaults = {"steps": 3000, "batch": 8, "seq_len": 128, "width": 96, "layers": 4, "vocabulary": 1024}
    asked = small_runs.parser("fim", __doc__, **defaults, places=500)
    asked.add_argument("--problems", type=int, default=300, help="of HumanEval infilling, under JAXLM_DATA; 0: none")
    options = asked.parse_args()
    of = judged(options)
    make = lambda arm, seed, run: score(small_runs.trained(settings(options, arm, seed), run), of)  # noqa: E731
    found = small_runs.by_arm(options, ARMS, make, "whole")
    small_runs.saved("fim", options, figures=comparisons(found, of))


if __name__ == "__main__":
    main()

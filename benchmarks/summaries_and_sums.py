"""Summaries of dialogues (SAMSum) and word problems (MAWPS) by SmolLM2 with adapters, beside what costs nothing.

    make pretrained && python -m benchmarks.summaries_and_sums            # goes on where it stopped
    python -m benchmarks.summaries_and_sums --only samsum-training        # at most `--minutes` of training

It trains `configs/finetune/samsum.toml` and `mawps.toml`. Of SAMSum the first 200 test dialogues are asked: F-measure
of ROUGE-1, -2 and -L (`rouge-score`, with stems), beside the first three lines of the dialogue (lead-3) and the model
as it comes. Of MAWPS all 238: the answer is an equation, which a calculator works out, beside the most frequent
operator of the training equations between the first two numbers, and the model as it comes, asked as in training and
with an instruction. For it an answer is right also if its last number is. The model as it comes is asked by its own
template. Intervals (95 %): of shares Wilson's (1927), of ROUGE and its differences a bootstrap over dialogues.
"""

from __future__ import annotations

import argparse
import ast
import collections
import hashlib
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.asked import listed, minutes
from benchmarks.finetune import Measure, trained
from benchmarks.rl import share
from benchmarks.stopping import greedy
from jaxlm.data.turns.formats import FORMATS
from jaxlm.text.tokenizer import Tokenizer

DIALOGUES, LONGEST_SUMMARY, LONGEST_EQUATION, LONGEST_ANSWER = 200, 64, 48, 128
JUDGED = {"samsum-training": "samsum", "mawps-training": "mawps"}
FIGURES = (
    *("samsum-lead", "samsum-zero-shot", "samsum-training", "samsum"),
    *("mawps-operator", "mawps-zero-shot", "mawps-instructed", "mawps-training", "mawps"),
)
INSTRUCTION = "Answer with an equation of numbers, such as X=3+4, and nothing else."
RESAMPLES = 4000
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
_OPERATORS: Mapping[type[ast.AST], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def worked_out(equation: str) -> float | None:
    """The value of the first side of an equation that is arithmetic of numbers; None: there is none."""
    for side in equation.split("="):
        try:
            return _value(ast.parse(side.strip(), mode="eval").body)
        except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError):
            continue
    return None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")


def is_answer(found: float | None, answer: Any) -> bool:
    """True if a number is the answer of a record, to the three digits that the set has."""
    return found is not None and math.isclose(found, float(answer), rel_tol=1e-3, abs_tol=1e-3)


def last_number(text: str) -> float | None:
    """The last number that stands in a text."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def most_frequent_operator(train: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first two numbers of each question, joined by the operator that is most frequent in training."""
    count = collections.Counter(sign for record in train for sign in re.findall(r"[-+*/]", str(record["equation"])))
    sign, right = count.most_common(1)[0][0], 0
    for record in test:
        numbers = _NUMBER.findall(record["question"])[:2]
        right += len(numbers) == 2 and is_answer(worked_out(sign.join(numbers)), record["answer"])
    return share(right, len(test)) | {"operator": sign}


def equations(path: Path, test: Sequence[Mapping[str, Any]], instruction: str, *, lenient: bool) -> dict[str, Any]:
    """How many answers of a model come to the right number.

    Args:
        instruction: behind the question, instead of "Equation:"; empty: as in training.
        lenient: count an answer also if its last number is right.
    """
    asked = [FORMATS["mawps"].messages(record)[:1] for record in test]
    if instruction:
        asked = [[{"role": "user", "content": f"{record['question'].strip()}\n{instruction}"}] for record in test]
    answers = texts(path, asked, LONGEST_ANSWER if lenient else LONGEST_EQUATION)
    right = 0
    for answer, record in zip(answers, test, strict=True):
        first_line = answer.strip().partition("\n")[0]
        right += is_answer(worked_out(first_line), record["answer"]) or (
            lenient and is_answer(last_number(answer), record["answer"])
        )
    references = sum(is_answer(worked_out(record["equation"]), record["answer"]) for record in test)
    return share(right, len(test)) | {"references": references / len(test), "examples": answers[:3]}


def texts(path: Path, asked: Sequence[Sequence[Mapping[str, Any]]], longest: int) -> list[str]:
    """The texts that a model answers by the likeliest tokens, without special tokens."""
    tokenizer = Tokenizer.from_file(path / "tokenizer.json")
    special = set(tokenizer.specials.values())
    return [
        tokenizer.decode([token for token in ids if token not in special]).strip()
        for ids in greedy(path, asked, longest)
    ]


def rouge(summaries: Sequence[str], test: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean F-measures against the references, the interval of ROUGE-L, and ROUGE-L of each dialogue."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    pairs = [(record["summary"], summary) for record, summary in zip(test, summaries, strict=True)]
    found = [{name: one.fmeasure for name, one in scorer.score(*pair).items()} for pair in pairs]
    means = {name: float(np.mean([one[name] for one in found])) for name in ("rouge1", "rouge2", "rougeL")}
    scores = [one["rougeL"] for one in found]
    return means | {"interval": interval(scores), "scores": scores, "examples": list(summaries[:2])}


def interval(values: Sequence[float]) -> list[float]:
    """95 % of the means of resamples."""
    rows = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return np.quantile(np.asarray(values)[rows].mean(axis=1), (0.025, 0.975)).tolist()


def with_differences(figures: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures without scores of single dialogues; the tuned model has its differences to what costs nothing."""
    out = {name: {key: one[key] for key in one if key != "scores"} for name, one in figures.items()}
    for name in ("samsum-lead", "samsum-zero-shot"):
        if {name, "samsum"} <= figures.keys() and len(figures[name]["scores"]) == len(figures["samsum"]["scores"]):
            apart = np.subtract(figures["samsum"]["scores"], figures[name]["scores"]).tolist()
            found = {"rougeL": float(np.mean(apart)), "interval": interval(apart)}
            print(f"samsum minus {name}: {json.dumps(found)}", flush=True)
            out["samsum"][f"minus {name}"] = found
    return out


def main() -> None:
    """Measure what is missing, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/summaries-and-sums"))
    parser.add_argument("--base", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", type=listed(FIGURES), default=[*FIGURES], help="which figures")
    parser.add_argument("--minutes", type=minutes, default=45.0)
    parser.add_argument("--asked", type=int, default=0, help="ask only the first so many, to try; 0: all")
    parser.add_argument("--set", nargs="*", default=[], help="options of the configs, such as train.steps=2")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/summaries_and_sums.json")
    options = parser.parse_args()

    def records(name: str, count: int | None = None) -> list[dict[str, Any]]:
        lines = (options.data / name).read_text(encoding="utf-8").splitlines()[: options.asked or count]
        return [json.loads(line) for line in lines]

    dialogues, problems = records("samsum/test.jsonl", DIALOGUES), records("mawps/test.jsonl")
    asked = [FORMATS["samsum"].messages(record)[:1] for record in dialogues]
    lead = [" ".join(record["dialogue"].strip().split("\n")[:3]) for record in dialogues]

    def train(name: str) -> dict[str, Any]:
        ends = {"samsum": ("train.jsonl.gz", "validation.jsonl"), "mawps": ("train.jsonl", "valid.jsonl")}[name]
        keys = zip(("data.source", "data.validation_source"), ends, strict=True)
        own = [f'{key}="{options.data / name / end}"' for key, end in keys]
        base = f'train.init_from="{options.base}"'
        config = Path(f"configs/finetune/{name}.toml")
        return trained(config, options.runs / name, measure.left(), *own, base, *options.set)

    def equations_of(path: Path, instruction: str = "", *, lenient: bool = True) -> dict[str, Any]:
        return equations(path, problems, instruction, lenient=lenient)

    measure = Measure(options.runs / "figures.json", options.minutes, JUDGED)
    figures: dict[str, Callable[[], dict[str, Any]]] = {
        "samsum-lead": lambda: rouge(lead, dialogues),
        "samsum-zero-shot": lambda: rouge(texts(options.base, asked, LONGEST_SUMMARY), dialogues),
        "samsum-training": lambda: train("samsum"),
        "samsum": lambda: rouge(texts(options.runs / "samsum", asked, LONGEST_SUMMARY), dialogues),
        "mawps-operator": lambda: most_frequent_operator(records("mawps/train.jsonl"), problems),
        "mawps-zero-shot": lambda: equations_of(options.base),
        "mawps-instructed": lambda: equations_of(options.base, INSTRUCTION),
        "mawps-training": lambda: train("mawps"),
        "mawps": lambda: equations_of(options.runs / "mawps", lenient=False),
    }
    for name in (name for name in FIGURES if name in options.only):
        config = Path(f"configs/finetune/{name.partition('-')[0]}.toml").read_bytes()
        shown = {"base": str(options.base), "asked": options.asked, "set": options.set}
        measure.figure(name, {**shown, "config": hashlib.sha256(config).hexdigest()}, figures[name])
    peers.save_figures("summaries_and_sums", with_differences(measure.kept.figures), options.out, without=measure.old)


if __name__ == "__main__":
    main()

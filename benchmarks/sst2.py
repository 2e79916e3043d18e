"""Sentiment of the 1,821 test sentences of SST-2: a fine-tuned run, its base as it is, and a bag of words.

    python -m benchmarks.sst2 runs/sst2 --base runs/smollm2 --out runs/sst2/eval/sst2.json

A sentence is positive when " positive" is the likelier next token after the prompt of the run's own template. The base
is asked in two ways: with its own template, and with the plain text. Intervals are those of Wilson (1927), 95 %.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxlm
from benchmarks.asked import listed
from jaxlm.text.chat import Chat

LABELS = (" negative", " positive")
BATCH = 32
FIGURES = ("words", "tuned", "base", "template")


def sentences(path: Path) -> tuple[list[str], np.ndarray]:
    """The sentences of a file of SST-2 and their labels."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["sentence"].strip() for row in rows], np.array([int(row["label"]) for row in rows])


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share, by Wilson (1927)."""
    share, square = right / total, z * z / total
    middle, half = share + square / 2, z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


def chat_prompts(run: Path) -> Callable[[str], list[int]]:
    """Ids of a review up to the assistant's answer, by the template that lies in a run."""
    from jaxlm.text.tokenizer import Tokenizer

    chat = Chat.of(Tokenizer.from_file(run / "tokenizer.json"), beside=run)
    return lambda text: chat.prompt([{"role": "user", "content": f"Review: {text}\nSentiment:"}])


def last_hidden(model: Any, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """The last hidden state at the end of each prompt [N, D]. Texts of like length share a batch; padding comes behind
    them.
    """
    order = np.argsort([len(ids) for ids in prompts], kind="stable")
    order = np.concatenate([order, np.repeat(order[-1:], -len(order) % BATCH)])
    found_ND = np.zeros((len(prompts), model.config.model.d_model), np.float32)
    for rows in order.reshape(-1, BATCH):
        ends = np.array([len(prompts[row]) - 1 for row in rows])
        tokens_BT = np.zeros((BATCH, -(-(ends.max() + 1) // 16) * 16), np.int32)
        for tokens_T, row in zip(tokens_BT, rows, strict=True):
            tokens_T[: len(prompts[row])] = prompts[row]
        found_ND[rows] = np.asarray(model.hidden(tokens_BT))[np.arange(BATCH), ends]
    return found_ND


def predictions(model: Any, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """1 where " positive" is the likelier next token."""
    labels = [model.encode(word)[-1] for word in LABELS]
    kernel_DV = model.decoder.apply({"params": model.params}, method="unembedding")[0]
    logits_N2 = last_hidden(model, prompts) @ np.asarray(kernel_DV[:, np.array(labels)], np.float32)
    return (logits_N2[:, 1] > logits_N2[:, 0]).astype(np.int64)


def linear_probe(model: Any, folder: Path, test: Sequence[str], count: int = 700, words: int = 8) -> np.ndarray:
    """Logistic regression on the frozen model: the hidden state behind "Sentiment:", of `count` phrases and labels.

    Args:
        words: that a phrase has at least; most phrases of the training file are pieces of sentences.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    texts, labels = sentences(folder / "train.tsv")
    long_enough = [i for i, text in enumerate(texts) if len(text.split()) >= words]
    chosen = np.random.default_rng(0).permutation(long_enough)[:count]
    asked = [model.encode(f"Review: {text}\nSentiment:") for text in [*(texts[i] for i in chosen), *test]]
    hidden_ND = last_hidden(model, asked)
    # How much the weights are held down is chosen by five folds of the same labels.
    held_down = {"logisticregression__C": np.logspace(-5, 0, 11)}
    probe = GridSearchCV(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), held_down, cv=5)
    return probe.fit(hidden_ND[: len(chosen)], labels[chosen]).predict(hidden_ND[len(chosen) :])


def bag_of_words(folder: Path, test: Sequence[str]) -> np.ndarray:
    """Logistic regression on the words of all training phrases."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, labels = sentences(folder / "train.tsv")
    words = CountVectorizer(token_pattern=r"\S+", binary=True)
    model = LogisticRegression(max_iter=300).fit(words.fit_transform(texts), labels)
    return model.predict(words.transform(test))


def main() -> None:
    """Print a line for each classifier."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--base", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2"))
    parser.add_argument("--only", type=listed(FIGURES), default=[*FIGURES], help="which of these")
    parser.add_argument("--sentences", type=int, default=0, help="only so many, drawn by chance; 0: all")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    test, labels = sentences(options.data / "test.tsv")
    if options.sentences:
        chosen = np.sort(np.random.default_rng(0).permutation(len(test))[: options.sentences])
        test, labels = [test[i] for i in chosen], labels[chosen]
    results = {}

    def report(name: str, found: np.ndarray, began: float) -> None:
        right = int((found == labels).sum())
        low, high = wilson(right, len(labels))
        results[name] = {"right": right, "of": len(labels), "accuracy": right / len(labels), "interval": [low, high]}
        seconds = time.perf_counter() - began
        print(f"{name:28} {right / len(labels):6.2%}  [{low:.2%}, {high:.2%}]  {seconds:.0f} s", flush=True)

    if "words" in options.only:
        began = time.perf_counter()
        report("bag of words", bag_of_words(options.data, test), began)
    if "tuned" in options.only:
        began = time.perf_counter()
        prompt = chat_prompts(options.run)
        report("fine-tuned", predictions(jaxlm.load(options.run), [prompt(text) for text in test]), began)
    if {"base", "template"} & set(options.only):
        base = jaxlm.load(options.base)
    if "base" in options.only:
        began = time.perf_counter()
        plain = [base.encode(f"Review: {text}\nSentiment:") for text in test]
        report("zero-shot, plain text", predictions(base, plain), began)
    if "template" in options.only:
        began = time.perf_counter()
        prompt = chat_prompts(options.base)
        report("zero-shot, its template", predictions(base, [prompt(text) for text in test]), began)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Whether answers end by themselves: greedy answers to instructions that no training shows.

    python -m benchmarks.stopping                                         # 1M parameters from nothing, 5 minutes
    python -m benchmarks.stopping --config configs/finetune/instruct.toml # SmolLM2 with adapters

Of `instruction_data_1100` 200 records are held out, by chance; the config is trained on the others by `jaxlm train`. An
answer ends by itself where the model writes one of its ends within 128 tokens. The interval is that of Wilson (1927);
beside it stands the share of the reference answers that are short enough.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxlm
from benchmarks import peers
from benchmarks.kept import Kept
from benchmarks.rl import share, train
from benchmarks.small_runs import own_words
from jaxlm.config import toml
from jaxlm.data.turns.formats import FORMATS
from jaxlm.infer.generate import generate
from jaxlm.text.chat import Chat
from jaxlm.text.sampling import GREEDY
from jaxlm.text.tokenizer import Tokenizer

ASKED, LONGEST, ROWS = 200, 128, 25


def split(source: Path, folder: Path) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    """The file of the records that are trained on, these records, and those that are asked."""
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    records = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    path = folder / "train.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records[ASKED:]), encoding="utf-8")
    return path, records[ASKED:], records[:ASKED]


def greedy(path: Path, asked: Sequence[Sequence[Mapping[str, Any]]], longest: int) -> list[list[int]]:
    """Ids of the likeliest answer of a model to each conversation: `longest`, or up to its first end, included."""
    model = jaxlm.load(path)
    tokenizer = Tokenizer.from_file(path / "tokenizer.json")
    chat = Chat.of(tokenizer, beside=path)
    prompts = [chat.prompt(messages) for messages in asked]
    options = {"max_new_tokens": longest, "eos_id": max(chat.ends), "pad_id": tokenizer.pad}
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable").tolist()
    found: list[list[int]] = [[]] * len(prompts)
    for first in range(0, len(order), ROWS):
        rows = order[first : first + ROWS]
        drawn = generate(model.decoder, model.params, [prompts[row] for row in rows], GREEDY, **options)
        for row, ids in zip(rows, drawn, strict=True):
            end = next((place + 1 for place, token in enumerate(ids) if token in chat.ends), len(ids))
            found[row] = ids[:end]
    return found


def answers(path: Path, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """How many greedy answers of a model end, how long they are, and how many of the references are short enough."""
    tokenizer = Tokenizer.from_file(path / "tokenizer.json")
    ends = Chat.of(tokenizer, beside=path).ends
    turns = [FORMATS["alpaca"].messages(record) for record in asked]
    found = greedy(path, [messages[:-1] for messages in turns], LONGEST)
    short = [len(tokenizer.encode(messages[-1]["content"])) < LONGEST for messages in turns]
    return share(sum(ids[-1] in ends for ids in found), len(found)) | {
        "mean_length": float(np.mean([len(ids) for ids in found])),
        "short_references": float(np.mean(short)),
    }


def main() -> None:
    """Train and ask, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/finetune/instruct-small.toml"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/instruct/instruction_data_1100.jsonl"))
    parser.add_argument("--runs", type=Path, default=Path("runs/stopping"))
    parser.add_argument("--set", nargs="*", default=[], help="options of the config, such as train.steps=80")
    parser.add_argument("--base", type=Path, help="ask this model too, as it is")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/stopping.json")
    options = parser.parse_args()
    if options.config.resolve().parent != Path("configs/finetune").resolve():
        parser.error(f"--config {options.config}: name a file of configs/finetune")
    source, trained_on, asked = split(options.data, options.runs)
    name = options.config.stem
    run, kept = options.runs / name, Kept(options.runs / "figures.json")
    digest = hashlib.sha256(options.config.read_bytes()).hexdigest()

    def measure() -> dict[str, Any]:
        words = (f"{record['instruction']}\n\n{record['output']}" for record in trained_on)
        own = () if toml.load(options.config).train.init_from else own_words(words, 1024, options.runs / "words")
        cost = train(f"finetune/{name}", run, f'data.source="{source}"', *own, *options.set)
        return cost | answers(run, asked)

    figures = {name: measure} | ({str(options.base): lambda: answers(options.base, asked)} if options.base else {})
    for figure, make in figures.items():
        found = kept.measured(figure, {"set": options.set, "data": str(options.data), "config": digest}, make)
        print(figure, json.dumps(found), flush=True)
        peers.save_figures("stopping", kept.figures, options.out)


if __name__ == "__main__":
    main()

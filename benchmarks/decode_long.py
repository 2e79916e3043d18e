"""Decoding behind a long prompt on the CPU, one row: milliseconds a token from 4,096 tokens on, against transformers.

python -m benchmarks.decode_long

Each peer completes the prompt with one new token and with 65, by turns with the others; the difference is 64 tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.asked import positive
from benchmarks.decode import transformers_decode
from benchmarks.peers import Peer
from benchmarks.train_step import VOCAB

PROMPT, NEW = 4096, 64
OURS = "jaxlm engine"
PEERS = (
    Peer(OURS),
    Peer("transformers eager"),
    Peer("transformers eager, best", best=True),
    Peer("transformers compiled, best", best=True),
)


def prompt() -> list[int]:
    """Random ids."""
    return np.random.default_rng(0).integers(0, VOCAB, PROMPT).tolist()


def engine_decode(new: int) -> Callable[[], Any]:
    """The prompt in pieces and so many tokens."""
    from benchmarks.engine import ask, engine

    made = engine(1, PROMPT + 2 * NEW)
    return lambda: [[*reply.ids] for reply in ask(made, [prompt()], [new], 1)]


def child(name: str, new: int) -> None:
    """Be one of the peers."""
    if name == OURS:
        peers.serve(lambda: engine_decode(new), peak_flops=peers.jax_peak, warm_up=1)
    else:
        make = lambda: transformers_decode([prompt()], new, "compiled" in name)  # noqa: E731
        peers.serve(make, peak_flops=peers.torch_peak, warm_up=1)


def run(rounds: int, out: Path | None) -> None:
    """Time all peers with one new token and with more; print and write milliseconds a token."""
    timed = {new: peers.compare("benchmarks.decode_long", PEERS, rounds, ["--new", str(new)]) for new in (1, NEW + 1)}
    results: dict[str, Any] = {"rounds": rounds, "prompt": PROMPT, "new": NEW, "ms_a_token": {}, "prompt_s": {}}
    for peer in PEERS:
        short, long = (timed[new][peer.name]["median_s"] for new in timed)
        results["ms_a_token"][peer.name] = 1000 * (long - short) / NEW
        results["prompt_s"][peer.name] = short
    ours, others = results["ms_a_token"][OURS], [results["ms_a_token"][peer.name] for peer in PEERS[1:]]
    results["over_stock"], results["over_best"] = ours / others[0], ours / min(others)
    print(json.dumps(results, indent=1))
    peers.save("decode_long", results, out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_long", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=5, help="completions of each peer")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/decode_long.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--new", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.new)
    else:
        run(arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()

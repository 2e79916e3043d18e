"""The engine on the CPU: against the loop it replaced, against batches in order, and what programs, known prefixes,
guesses, grammars and a long prompt beside others cost.

python -m benchmarks.engine

Figures bear the numbers of docs/engine.md. Whatever is compared takes turns, round after round, in one process. The
model is that of `benchmarks.decode` with random weights, so texts end by their length alone. The file of results is
written after each figure, with the load that the machine had; after `--minutes` no further figure is begun.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import peers
from benchmarks.asked import listed, minutes, positive
from benchmarks.engine_costs import (
    PATTERNS,
    bandwidth,
    capacity,
    in_turns,
    pages,
    prefill_memory,
    ratio,
    runner,
    sampler,
)
from benchmarks.kept import merged, now, this_command
from benchmarks.train_step import jaxlm_model

NEW, PROMPT, WARM_UP = 64, 64, "--warm-up"
NOT_HERE = {
    3: "python -m benchmarks.decode, where litgpt and llama.cpp are installed",
    13: "tests/infer/test_engine.py and parity_tests/test_speculation.py, more of them by make soak",
    14: "parity_tests/test_engine.py and parity_tests/test_speculation.py",
    15: "tests/infer/test_engine_mesh.py",
}
"""Figures that are measured elsewhere, or not at all."""


def engine(rows: int, context: int, *, name: str = "attention", memory: int = 0, **options: Any) -> Any:
    """A warm engine on the model with this pattern, which makes its steps when asked."""
    from jaxlm.infer.engine import Engine

    made = runner(rows, context, name, speculates="speculate" in options)
    return Engine(made, prefix_memory=memory, threaded=False, **options)


def ids(rng: np.random.Generator, length: int) -> list[int]:
    """A random prompt."""
    return rng.integers(0, jaxlm_model().vocab_size, length).tolist()


def ask(made: Any, prompts: list[list[int]], new: list[int], together: int, **options: Any) -> list[Any]:
    """Answer all prompts, so many at once: the next come when these have ended."""
    from jaxlm.infer.engine import Request
    from jaxlm.text.sampling import GREEDY

    options, results = {"sampling": GREEDY, **options}, []
    for first in range(0, len(prompts), together):
        pairs = [*zip(prompts, new, strict=True)][first : first + together]
        replies = [made.submit(Request(one, max_new_tokens=count, **options)) for one, count in pairs]
        results += [reply.result() for reply in replies]
    return results


def static_loop(rounds: int, _: int) -> dict[str, Any]:
    """1: the engine over the loop of `generate`, whose maps stay apart; one row and eight."""
    import jax

    from jaxlm.infer.generate import generate, unrolled_for_decoding
    from jaxlm.models.decoder import init_params
    from jaxlm.text.sampling import GREEDY

    found: dict[str, Any] = {}
    for rows in (1, 8):
        prompts, made = [ids(np.random.default_rng(i), PROMPT) for i in range(rows)], engine(rows, 256)
        model = unrolled_for_decoding(made.runner.original, init_params(made.runner.original, jax.random.key(0)))
        works = {
            "engine": lambda prompts=prompts, made=made, rows=rows: ask(made, prompts, [NEW] * rows, rows),
            "loop": lambda prompts=prompts, model=model: generate(*model, prompts, GREEDY, max_new_tokens=NEW),
        }
        times = in_turns(works, 3 * rounds)
        found[f"{rows} rows"] = times | {"engine_over_loop": ratio(times, "loop", "engine")}
    return found


def arrivals(_: int, count: int) -> dict[str, Any]:
    """2: requests all there at once, eight rows: as rows fall free, in batches of eight in order, one by one."""
    rng, made = np.random.default_rng(0), engine(8, 1024)
    prompts = [ids(rng, int(length)) for length in rng.integers(16, 513, count)]
    new = np.clip(rng.geometric(1 / 96, count), 8, 256).tolist()
    works = {
        name: lambda together=together: ask(made, prompts, new, together)
        for name, together in (("engine", count), ("batches", 8), ("one by one", 1))
    }
    times = in_turns(works, 1, warm_up=0)
    found: dict[str, Any] = {"requests": count, "new_tokens": sum(new), "times": times}
    return found | {f"over {name}": ratio(times, name, "engine") for name in ("batches", "one by one")}


def programs(_: int, count: int) -> dict[str, Any]:
    """7: programs of an engine, how many more random requests compile, and seconds of a warm-up, cold and cached."""
    import jax

    from jaxlm.infer.engine import Request
    from jaxlm.text.sampling import Sampling

    made, rng, compiled = engine(8, 512), np.random.default_rng(0), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    replies = []
    for _ in range(count):
        options = {
            "temperature": rng.choice([0.0, 0.7]),
            "top_p": rng.uniform(0.1, 1),
            "top_k": int(rng.integers(0, 99)),
        }
        prompt = ids(rng, int(rng.integers(1, 300)))
        new = int(rng.integers(1, 12))
        replies.append(made.submit(Request(prompt, sampling=Sampling(**options), max_new_tokens=new)))
    for reply in replies:
        reply.result()
    found: dict[str, Any] = {"programs": len(made.programs), "requests": count, "compiled_after_warm_up": len(compiled)}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "from the cache"):
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
            environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            command = [sys.executable, "-m", "benchmarks.engine", WARM_UP]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found[f"warm_up_s {name}"] = float(done.stdout.split()[-1])
    return found


def known(rounds: int, _: int) -> dict[str, Any]:
    """9: the first token of a prompt of 2,048 of which 1,920 are known over one that is not; n = 8 over n = 1."""
    from jaxlm.infer.engine import Request

    found: dict[str, Any] = {}
    for name in PATTERNS:
        made, rng = engine(8, 2304, name=name, memory=1 << 30), np.random.default_rng(0)
        shared = ids(rng, 1920)

        def first(prompt: list[int], n: int = 1, made: Any = made) -> None:
            made.submit(Request(prompt, max_new_tokens=1, n=n)).result()

        works = {
            "unknown": lambda rng=rng, first=first: first(ids(rng, 2048)),
            "known": lambda rng=rng, first=first, shared=shared: first([*shared, *ids(rng, 128)]),
            "n = 1 of 1,024": lambda rng=rng, first=first: first(ids(rng, 1024)),
            "n = 8 of 1,024": lambda rng=rng, first=first: first(ids(rng, 1024), 8),
        }
        times = in_turns(works, rounds)
        ratios = {"known_over_unknown": ratio(times, "known", "unknown")}
        found[name] = {"times": times} | ratios | {"eight_over_one": ratio(times, "n = 8 of 1,024", "n = 1 of 1,024")}
    return found


def guesses(rounds: int, _: int) -> dict[str, Any]:
    """10: tokens a second with guesses over without, one row: where a text repeats itself, where it does not, and with
    the model as its own draft, which is twice the work."""
    from jaxlm.text.sampling import Sampling

    prompt, new = ids(np.random.default_rng(0), 64), 192
    engines = {
        "plain": engine(1, 512),
        "lookup": engine(1, 512, speculate=7),
        "draft": engine(1, 512, speculate=7, draft=runner(1, 512, speculates=True)),
    }
    texts: dict[str, dict[str, Any]] = {
        "repeats": {"logit_bias": {token: 100.0 for token in (5, 6)}, "sampling": Sampling(temperature=0.0)},
        "does not": {"sampling": Sampling(temperature=1.0)},
    }
    found: dict[str, Any] = {}
    for text, options in texts.items():
        usage: dict[str, Any] = {}

        def work(name: str, options: dict[str, Any] = options, usage: dict[str, Any] = usage) -> None:
            (usage[name],) = ask(engines[name], [prompt], [new], 1, **options)

        works = {name: lambda name=name, work=work: work(name) for name in engines}
        times = in_turns(works, 2 * rounds)
        counts = {name: vars(one.usage) for name, one in usage.items()}
        found[text] = {"times": times, "usage": counts, "same": len({one.ids for one in usage.values()}) == 1}
        found[text] |= {f"{name} over plain": ratio(times, "plain", name) for name in ("lookup", "draft")}
    return found


def grammar(rounds: int, _: int) -> dict[str, Any]:
    """11: eight rows that follow a grammar over eight that do not; of 8,192 ids most are forbidden."""
    from jaxlm.infer.engine import Engine, Grammar
    from jaxlm.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.bytes_level()
    made = Engine(runner(8, 512), tokenizer, ends=[tokenizer.special("eot")], threaded=False)
    prompts = [ids(np.random.default_rng(i), 16) for i in range(8)]
    rule = Grammar(regex="[a-z ]{300}")
    works = {
        "grammar": lambda: ask(made, prompts, [NEW] * 8, 8, grammar=rule),
        "none": lambda: ask(made, prompts, [NEW] * 8, 8),
    }
    times = in_turns(works, rounds)
    return {"times": times, "grammar_over_none": ratio(times, "grammar", "none")}


def longest_gap(rounds: int, _: int) -> dict[str, Any]:
    """12: the longest wait of a running row while 4,096 tokens are prefilled, over the median wait."""
    from jaxlm.infer.engine import Request
    from jaxlm.text.sampling import GREEDY

    made, rng, waits = engine(8, 4352), np.random.default_rng(0), {"alone": [], "beside": []}
    for _ in range(rounds):
        running = [made.submit(Request(ids(rng, 32), sampling=GREEDY, max_new_tokens=400)) for _ in range(7)]
        while any(not one.growing[0].ids for one in running):
            made.step()
        for name in waits:
            long = made.submit(Request(ids(rng, 4096), sampling=GREEDY, max_new_tokens=1)) if name == "beside" else None
            for _ in range(20):
                made_before, start = len(running[0].growing[0].ids), time.perf_counter()
                made.step()
                tokens = len(running[0].growing[0].ids) - made_before
                waits[name].append((time.perf_counter() - start) / (max(tokens, 1) if name == "alone" else 1))
                if long is not None and long.done:
                    break
        for one in running:
            one.cancel()
        made.step()
    alone, longest = statistics.median(waits["alone"]), max(waits["beside"])
    middle = statistics.median(waits["beside"])
    return {
        "median_alone_s": alone,
        "longest_s": longest,
        "over_alone": longest / alone,
        "over_median": longest / middle,
    }


def leak(_: int, count: int) -> dict[str, Any]:
    """16: resident memory that many small requests add after the first tenth, prefixes kept; a model of two layers."""
    from jaxlm.infer.engine import Engine, Request

    small = runner(8, 256, n_layers=2, d_model=64, n_heads=2, n_kv_heads=1, d_ff=128)
    made = Engine(small, prefix_memory=1 << 22, threaded=False)
    rng, process = np.random.default_rng(0), psutil.Process()
    resident = []
    for _ in range(10):
        for _ in range(count // 8):
            replies = [
                made.submit(Request(ids(rng, length), max_new_tokens=new, seed=new))
                for length, new in rng.integers(1, (200, 9), (8, 2)).tolist()
            ]
            for reply in replies:
                reply.result()
        resident.append(process.memory_info().rss)
    return {"requests": 10 * (count // 8) * 8, "added_mib": (max(resident[1:]) - resident[0]) / 2**20}


FIGURES: dict[int, Callable[[int, int], dict[str, Any]]] = {
    1: static_loop,
    4: bandwidth,
    5: capacity,
    6: prefill_memory,
    8: sampler,
    10: guesses,
    11: grammar,
    12: longest_gap,
    9: known,
    2: arrivals,
    7: programs,
    16: leak,
    17: pages,
}


def earlier(path: Path) -> dict[str, Any]:
    """The figures of a file, each with the command that it is of: a command that measures some leaves the others."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    figures = {name: figure for name, figure in record.items() if name.startswith("figure_")}
    return merged({**record, "figures": figures}, {})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument(
        "--requests", type=positive, default=96, help="of figures 2 and 7; figure 16 has ten times as many"
    )
    parser.add_argument("--only", type=listed(FIGURES), default=[], help="figures, as 1,5; default: all")
    parser.add_argument("--minutes", type=minutes, default=10, help="after which no further figure is begun")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/engine.json")
    parser.add_argument(WARM_UP, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    if arguments.warm_up:
        engine(8, 512)
        print(time.perf_counter() - begun)
        return
    path = arguments.out or peers.RESULTS / "engine.json"
    left_out = {f"figure_{number}": why for number, why in NOT_HERE.items()}
    wanted = [int(one) for one in arguments.only] or [*FIGURES]
    before = earlier(path) if arguments.only else {}
    left_out |= {f"figure_{number}": "the command was ended before" for number in wanted}
    left_out = {figure: why for figure, why in left_out.items() if figure not in before}
    results: dict[str, Any] = {"rounds": arguments.rounds, "not_measured": left_out, **before}
    for number in wanted:
        start, figure, load = time.perf_counter(), f"figure_{number}", os.getloadavg()[0]
        if start - begun > 60 * arguments.minutes:
            if figure not in before:
                left_out[figure] = f"{arguments.minutes:g} minutes were over"
            continue
        title = " ".join((FIGURES[number].__doc__ or "").split())
        found = FIGURES[number](arguments.rounds, arguments.requests)
        # More load than our own figures make is somebody else's: only ratios of what took turns mean anything then.
        took = {"title": title, "load_before": load, "seconds": time.perf_counter() - start}
        results[figure] = took | found | {"measured": {"command": this_command(), "time": now()}}
        left_out.pop(figure, None)
        print(title, results[figure], flush=True)
        peers.save("engine", results, path)
    peers.save("engine", results, path)


if __name__ == "__main__":
    main()

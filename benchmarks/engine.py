"""The engine on the CPU: against the loop it replaced, against batches in order, and what a step, a program, a sampler,
a known prefix and a long prompt beside others cost.

python -m benchmarks.engine

Figures bear the numbers of docs/engine.md. Whatever is compared takes turns, round after round, in one process. The
model is that of `benchmarks.decode` with random weights, so texts end by their length alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.train_step import jaxlm_model

PATTERNS = {
    "attention": ("attention+mlp",),
    "window": ("attention(window=256)+mlp",),
    "mamba": ("mamba",),
    "mamba2": ("mamba2",),
}
NEW, PROMPT, WARM_UP = 64, 64, "--warm-up"


def engine(rows: int, context: int, *, name: str = "attention", memory: int = 0, speculate: int = 0) -> Any:
    """A warm engine on the model with this pattern, which makes its steps when asked."""
    import jax

    from jaxlm.infer.engine import Engine
    from jaxlm.infer.engine.runner_jax import JaxRunner
    from jaxlm.models.decoder import Decoder, init_params

    decoder = Decoder(dataclasses.replace(jaxlm_model(), pattern=PATTERNS[name], max_seq_len=context))
    params = init_params(decoder, jax.random.key(0))
    runner = JaxRunner(decoder, params, rows=rows, slots=context, speculates=speculate > 0)
    return Engine(runner, prefix_memory=memory, speculate=speculate, threaded=False)


def in_turns(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each, taking turns; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: {"median_s": statistics.median(all_), "min_s": min(all_)} for name, all_ in times.items()}


def ids(rng: np.random.Generator, length: int) -> list[int]:
    """A random prompt."""
    return rng.integers(0, jaxlm_model().vocab_size, length).tolist()


def ask(made: Any, prompts: list[list[int]], new: list[int], together: int) -> None:
    """Answer all prompts, so many at once: the next come when these have ended."""
    from jaxlm.infer.engine import Request
    from jaxlm.text.sampling import GREEDY

    for first in range(0, len(prompts), together):
        pairs = [*zip(prompts, new, strict=True)][first : first + together]
        for reply in [made.submit(Request(one, sampling=GREEDY, max_new_tokens=count)) for one, count in pairs]:
            reply.result()


def static_loop(rounds: int, _: int) -> dict[str, Any]:
    """1: the engine over the loop of `generate`, one row and eight."""
    from jaxlm.infer.generate import generate
    from jaxlm.text.sampling import GREEDY

    found: dict[str, Any] = {}
    for rows in (1, 8):
        prompts, made = [ids(np.random.default_rng(i), PROMPT) for i in range(rows)], engine(rows, 256)
        runner = made.runner
        works = {
            "engine": lambda prompts=prompts, made=made, rows=rows: ask(made, prompts, [NEW] * rows, rows),
            "loop": lambda prompts=prompts, runner=runner: generate(
                runner.decoder, runner.params, prompts, GREEDY, max_new_tokens=NEW
            ),
        }
        times = in_turns(works, rounds)
        found[f"{rows} rows"] = times | {"engine_over_loop": times["loop"]["median_s"] / times["engine"]["median_s"]}
    return found


def arrivals(rounds: int, count: int) -> dict[str, Any]:
    """2: requests all there at once, eight rows: as rows fall free, in batches of eight in order, one by one."""
    rng, made = np.random.default_rng(0), engine(8, 1024)
    prompts = [ids(rng, int(length)) for length in rng.integers(16, 513, count)]
    new = np.clip(rng.geometric(1 / 96, count), 8, 256).tolist()
    works = {
        name: lambda together=together: ask(made, prompts, new, together)
        for name, together in (("engine", count), ("batches", 8), ("one by one", 1))
    }
    times = in_turns(works, min(rounds, 2))
    rates = {name: sum(new) / one["median_s"] for name, one in times.items()}
    found: dict[str, Any] = {"requests": count, "new_tokens": sum(new), "times": times, "tokens_per_s": rates}
    return found | {f"over {name}": rates["engine"] / rates[name] for name in ("batches", "one by one")}


def capacity(rounds: int, _: int) -> dict[str, Any]:
    """5: a step at 200 tokens with room for 8,192 over one with room for 512."""
    from jaxlm.infer.engine.runner import BURST, Orders

    works: dict[str, Callable[[], Any]] = {}
    for context in (512, 8192):
        runner = engine(1, context).runner
        orders = Orders.empty(1, runner.vocab)
        orders.active[:], orders.position[:] = 1, 200
        orders = orders._replace(until=np.asarray(BURST, np.int32))
        works[str(context)] = lambda runner=runner, orders=orders: runner.decode(orders)
    times = in_turns(works, 8 * rounds)
    return {"times": times, "ratio": times["8192"]["median_s"] / times["512"]["median_s"]}


def programs(_: int, count: int) -> dict[str, Any]:
    """7: programs of an engine, how many more random requests compile, and seconds of a warm-up, cold and cached."""
    import jax

    from jaxlm.infer.engine import Request
    from jaxlm.text.sampling import Sampling

    made, rng, compiled = engine(8, 512), np.random.default_rng(0), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    for _ in range(count):
        options = {
            "temperature": rng.choice([0.0, 0.7]),
            "top_p": rng.uniform(0.1, 1),
            "top_k": int(rng.integers(0, 99)),
        }
        prompt = ids(rng, int(rng.integers(1, 300)))
        made.submit(Request(prompt, sampling=Sampling(**options), max_new_tokens=int(rng.integers(1, 12)))).result()
    found: dict[str, Any] = {"programs": len(made.programs), "requests": count, "compiled_after_warm_up": len(compiled)}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "from the cache"):
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
            environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            command = [sys.executable, "-m", "benchmarks.engine", WARM_UP]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found[f"warm_up_s {name}"] = float(done.stdout.split()[-1])
    return found


def sampler(rounds: int, _: int) -> dict[str, Any]:
    """8: milliseconds of the sampler with top-p alone."""
    import jax
    import jax.numpy as jnp

    from jaxlm.ops import sampling as ops

    @jax.jit
    def draw(logits_BV: Any, uniform_B: Any, top_p_B: Any) -> Any:
        one_B, none_B = jnp.ones_like(top_p_B), jnp.zeros_like(top_p_B)
        knobs = ops.Knobs(one_B, none_B.astype(jnp.int32), one_B, top_p_B, none_B, one_B, none_B, none_B)
        return ops.draw(ops.filtered_rows(logits_BV, knobs), uniform_B)

    works = {}
    for vocab in (50_257, 151_936):
        for rows in (1, 8):
            logits = jnp.asarray(np.random.default_rng(0).standard_normal((rows, vocab)) * 3, jnp.float32)
            arrays = logits, jnp.full(rows, 0.4), jnp.full(rows, 0.9)
            works[f"{vocab} ids, {rows} rows"] = lambda arrays=arrays: draw(*arrays).block_until_ready()
    times = in_turns(works, 5 * rounds)
    return {name: {key.replace("_s", "_ms"): 1000 * value for key, value in one.items()} for name, one in times.items()}


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
        times = {key: one["median_s"] for key, one in in_turns(works, rounds).items()}
        ratios = {"known_over_unknown": times["known"] / times["unknown"]}
        found[name] = {"times": times} | ratios | {"eight_over_one": times["n = 8 of 1,024"] / times["n = 1 of 1,024"]}
    return found


def longest_gap(rounds: int, _: int) -> dict[str, Any]:
    """12: the longest wait of a running row while 4,096 tokens are prefilled, over its median wait without."""
    from jaxlm.infer.engine import Request
    from jaxlm.text.sampling import GREEDY

    made, rng, waits = engine(8, 4352), np.random.default_rng(0), {"alone": [], "beside": []}
    for _ in range(rounds):
        running = [made.submit(Request(ids(rng, 32), sampling=GREEDY, max_new_tokens=400)) for _ in range(7)]
        while any(not one.growing[0].ids for one in running):
            made.step()
        for name in waits:
            if name == "beside":
                long = made.submit(Request(ids(rng, 4096), sampling=GREEDY, max_new_tokens=1))
            for _ in range(20):
                made_before, start = len(running[0].growing[0].ids), time.perf_counter()
                made.step()
                tokens = len(running[0].growing[0].ids) - made_before
                waits[name].append((time.perf_counter() - start) / (max(tokens, 1) if name == "alone" else 1))
                if name == "beside" and long.done:
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


FIGURES = {1: static_loop, 2: arrivals, 5: capacity, 7: programs, 8: sampler, 9: known, 12: longest_gap}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=640, help="of figures 2 and 7")
    parser.add_argument("--only", default="", help="figures, as 1,5")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/engine.json")
    parser.add_argument(WARM_UP, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.warm_up:
        start = time.perf_counter()
        engine(8, 512)
        print(time.perf_counter() - start)
        return
    results: dict[str, Any] = {"rounds": arguments.rounds}
    wanted = [int(number) for number in arguments.only.split(",") if number] or [*FIGURES]
    for number in wanted:
        results[f"figure_{number}"] = FIGURES[number](arguments.rounds, arguments.requests)
        print(number, FIGURES[number].__doc__, results[f"figure_{number}"], flush=True)
    peers.save("engine", results, arguments.out)


if __name__ == "__main__":
    main()

"""Parts of the engine by themselves: what a step reads and copies, what a piece of a prompt needs, what a draw takes.

`python -m benchmarks.engine` runs them; figures bear the numbers of docs/engine.md.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.train_step import jaxlm_model

PATTERNS = {
    "attention": ("attention+mlp",),
    "window": ("attention(window=256)+mlp",),
    "mamba": ("mamba",),
    "mamba2": ("mamba2",),
}


def runner(rows: int, context: int, name: str = "attention", *, speculates: bool = False, **sizes: Any) -> Any:
    """Rows of the model with this pattern, with random weights."""
    import jax

    from jaxlm.infer.engine.on_jax.runner import JaxRunner
    from jaxlm.models.decoder import Decoder, init_params

    cfg = dataclasses.replace(jaxlm_model(), pattern=PATTERNS[name], max_seq_len=context, **sizes)
    decoder = Decoder(cfg)
    params = init_params(decoder, jax.random.key(0))
    return JaxRunner(decoder, params, rows=rows, slots=context, speculates=speculates)


def in_turns(works: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, dict[str, float]]:
    """Seconds of each on the clock and on the processors, taking turns; the first `warm_up` rounds do not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for round_ in range(rounds + warm_up):
        for name, work in works.items():
            start, cpu = time.perf_counter(), time.process_time()
            work()
            if round_ >= warm_up:
                times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return {
        name: {
            "median_s": statistics.median(wall for wall, _ in all_),
            "min_s": min(wall for wall, _ in all_),
            "cpu_s": statistics.median(cpu for _, cpu in all_),
        }
        for name, all_ in times.items()
    }


def ratio(times: Mapping[str, Mapping[str, float]], over: str, under: str) -> dict[str, float]:
    """Seconds of the first over those of the second, on the clock and of the processors."""
    return {name.removesuffix("_s"): times[over][name] / times[under][name] for name in ("median_s", "min_s", "cpu_s")}


def step(made: Any, position: int) -> Callable[[], Any]:
    """A burst of greedy tokens in every row, at a position."""
    from jaxlm.infer.engine.runner import BURST, Orders

    orders = Orders.empty(made.rows, made.vocab)
    orders.active[:], orders.position[:] = 1, position
    orders = orders._replace(until=np.asarray(BURST, np.int32))
    return lambda: made.decode(orders)


def bandwidth(rounds: int, _: int) -> dict[str, Any]:
    """4: weights that are read in a second at one row, over what a copy moves; whole caches that a step copies."""
    import jax

    from jaxlm.infer.engine.on_jax import programs
    from jaxlm.infer.engine.runner import BURST, Orders

    made = runner(1, 256)
    source = np.ones(2**25, np.float32)
    target = np.empty_like(source)
    times = in_turns({"burst": step(made, 96), "copy": lambda: np.copyto(target, source)}, 8 * rounds)
    looked_up = made.params["embed"]["embedding"]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(made.params)) - looked_up.nbytes
    read, copied = weights * BURST / times["burst"]["min_s"], 2 * source.nbytes / times["copy"]["min_s"]
    orders = Orders.empty(made.rows, made.vocab)
    lowered = programs.decode.lower(programs.Placed(made.decoder), made.params, made.state, orders)
    text = lowered.compile().as_text() or ""
    cfg = made.decoder.config
    shapes = "|".join(f"{a},{b}" for a, b in ((cfg.head_dim, made.slots), (made.slots, cfg.head_dim)))
    copies = len(re.findall(rf"= f32\[{made.rows},{cfg.n_kv_heads},({shapes})\]\S* copy\(", text))
    found = {"read_bytes_per_s": read, "copy_bytes_per_s": copied, "ratio": read / copied}
    return {"times": times, **found, "whole_cache_copies": copies}


def capacity(rounds: int, _: int) -> dict[str, Any]:
    """5: a step at 200 tokens with room for 8,192 over one with room for 512."""
    works = {str(context): step(runner(1, context), 200) for context in (512, 8192)}
    times = in_turns(works, 8 * rounds)
    return {"times": times, "ratio": ratio(times, "8192", "512")}


def prefill_memory(_: int, __: int) -> dict[str, Any]:
    """6: temporaries of a prompt's largest program, in rows of 4,096 and 16,384 tokens."""
    from jaxlm.infer.engine.on_jax import programs

    found = {}
    for context in (4096, 16384):
        made = runner(1, context)
        tokens = np.zeros((1, made.widths[-1]), np.int32)
        placed = programs.Placed(made.decoder)
        lowered = programs.prefill.lower(placed, made.params, made.state, programs.Chunk(0, tokens, 0, 1))
        memory: Any = lowered.compile().memory_analysis()
        found[f"{context} tokens"] = memory.temp_size_in_bytes / 2**20
    return {"temporaries_mib": found}


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


def attend_pages(q_RKGH: Any, key_pages: Any, value_pages: Any, table: Any, last: Any) -> Any:
    """`attend_slots` of a query a row: block i of row r is page `table[r, i]` of [P, K, H, S] and [P, K, S, H]."""
    import jax.numpy as jnp
    from jax import lax

    size = key_pages.shape[-1]

    def read(block: Any, sums: Any) -> Any:
        top, total, out = sums
        page_R = lax.dynamic_index_in_dim(table, block, 1, keepdims=False)
        scores = jnp.matmul(q_RKGH, key_pages[page_R]) * q_RKGH.shape[-1] ** -0.5
        scores = jnp.where(block * size + jnp.arange(size) <= last, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        weights, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        out = out * shrink[..., None] + jnp.matmul(weights, value_pages[page_R])
        return new_top, total * shrink + weights.sum(-1), out

    zero = jnp.zeros(q_RKGH.shape[:3])
    _, total, out = lax.fori_loop(0, last // size + 1, read, (zero - jnp.inf, zero, jnp.zeros_like(q_RKGH)))
    return out / total[..., None]


def pages(rounds: int, _: int) -> dict[str, Any]:
    """17: attention of a step of eight rows over pages that a table names, over that of rows of one size."""
    import jax
    import jax.numpy as jnp

    from jaxlm.ops.attention.slots import attend_slots, block_of
    from jaxlm.ops.attention.visible import Places

    cfg, rows, rng = jaxlm_model(), 8, np.random.default_rng(0)
    kv, size, found = cfg.n_kv_heads or cfg.n_heads, cfg.head_dim, {}
    for tokens in (200, 4096):
        page = block_of(tokens + 1)
        count = -(-(tokens + 1) // page)
        order = rng.permutation(rows * count)  # the pages of a row lie anywhere
        table = jnp.asarray(np.argsort(order).reshape(rows, count))
        key_pages, value_pages = (
            jnp.asarray(rng.standard_normal(shape), jnp.float32)
            for shape in ((rows * count, kv, size, page), (rows * count, kv, page, size))
        )
        keys, values = (
            jnp.concatenate([pool[table[:, i]] for i in range(count)], axis)
            for pool, axis in ((key_pages, -1), (value_pages, -2))
        )
        q = jnp.asarray(rng.standard_normal((rows, 1, cfg.n_heads, size)), jnp.float32)
        last, places = jnp.int32(tokens), Places(jnp.full((rows, 1), tokens), jnp.ones((rows, 1), jnp.int32))
        by_rows = jax.jit(lambda q, k, v, places=places: attend_slots(q, k, v, places, jnp.int32(0)).out)
        q_RKGH = q.reshape(rows, kv, -1, size)
        by_pages = jax.jit(attend_pages)
        np.testing.assert_allclose(
            by_rows(q, keys, values).ravel(), by_pages(q_RKGH, key_pages, value_pages, table, last).ravel(), atol=1e-5
        )
        works = {
            "rows": lambda f=by_rows, a=(q, keys, values): f(*a).block_until_ready(),
            "pages": lambda f=by_pages, a=(q_RKGH, key_pages, value_pages, table, last): f(*a).block_until_ready(),
        }
        times = in_turns(works, 30 * rounds)
        found[f"{tokens} tokens"] = {"times": times, "pages_over_rows": ratio(times, "pages", "rows")}
    return found

"""Requests among neighbours and alone: the same tokens and log-probabilities, bit for bit; ends, cancels, errors."""

from __future__ import annotations

import asyncio
import operator
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.infer.engine.engine import Engine
from jaxlm.infer.engine.on_jax.runner import JaxRunner
from jaxlm.infer.engine.reply import Reply
from jaxlm.infer.engine.request import Choice, Grammar, LogProb, Request, Result
from jaxlm.infer.generate import generate
from jaxlm.models.decoder import Decoder, Params, abstract_params
from jaxlm.text.sampling import GREEDY, Sampling
from jaxlm.text.tokenizer import Tokenizer

V = 300
WARM = Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.2)
PATTERNS = {
    "attention and window": ("attention+mlp", "attention(window=12, keep_first=2)+mlp"),
    "mamba and mamba2": ("mamba", "mamba2"),
}
PROMPTS = [[5], [9, 8, 7, 6], [*range(10, 31)], [*range(40, 80)], [*range(10, 50)], [1, 2] * 25]


def random_params(decoder: Decoder, seed: int = 0) -> Params:
    """Large enough that the next token depends on the whole context."""
    shapes, _ = abstract_params(decoder)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray((rng.standard_normal(leaf.shape) * 0.4).astype(leaf.dtype)), shapes)


@pytest.fixture(scope="module", params=PATTERNS)
def runner(request: pytest.FixtureRequest) -> JaxRunner:
    mamba = config.Mamba(head_dim=8, d_state=5)
    sizes: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 96}
    decoder = Decoder(config.Model(vocab_size=V, pattern=PATTERNS[request.param], mamba=mamba, **sizes))
    return JaxRunner(decoder, random_params(decoder), rows=3, slots=96, widths=(4, 16))


@pytest.fixture
def engine(runner: JaxRunner) -> Engine:
    runner.clear()
    return Engine(runner, Tokenizer.bytes_level(), threaded=False, warm_up=not runner.programs)


def run(engine: Engine, requests: list[Request]) -> list[Result]:
    replies = [engine.submit(request) for request in requests]
    return [reply.result() for reply in replies]


def test_the_same_as_the_static_loop(engine: Engine, runner: JaxRunner) -> None:
    requests = [Request(prompt, sampling=WARM, max_new_tokens=20, sample=i) for i, prompt in enumerate(PROMPTS)]
    static = generate(runner.decoder, runner.params, PROMPTS, WARM, max_new_tokens=20)
    for alone, result in zip(static, run(engine, requests), strict=True):
        assert [*result.ids] == alone and result.finish == "length"
    assert engine.in_use == 0


def random_request(rng: np.random.Generator) -> Request:
    """Prompts that often begin alike, options of every kind."""
    base = [*range(60, 60 + 48)] if rng.random() < 0.6 else rng.integers(0, V, 48).tolist()
    chance = lambda value, other: value if rng.random() < 0.3 else other  # noqa: E731
    sampling = Sampling(
        temperature=chance(0.0, 0.9),
        top_k=chance(30, 0),
        top_p=chance(0.9, 1.0),
        typical_p=chance(0.8, 1.0),
        min_p=chance(0.02, 0.0),
        repetition_penalty=chance(1.3, 1.0),
        presence_penalty=chance(0.4, 0.0),
    )
    return Request(
        base[: int(rng.integers(1, 49))],
        sampling=sampling,
        max_new_tokens=int(rng.integers(1, 24)),
        seed=int(rng.integers(0, 50)),
        n=chance(2, 1),
        logprobs=chance(3, 0),
        processed=chance(True, False),
        stop_ids=chance((7, 8, 9), ()),
        min_new_tokens=chance(6, 0),
        logit_bias=chance({5: 3.0}, {}),
        forbidden=chance((1, 2, 3), ()),
        priority=int(rng.integers(0, 2)),
    )


def schedule(
    engine: Engine,
    seed: int,
    count: int = 8,
    same: Callable[[Choice, Choice], bool] = operator.eq,
    plain: Engine | None = None,
) -> None:
    """A random life: arrivals, cancels, choices, reuse; what was not cancelled is as it is alone, bit for bit.

    Args:
        plain: another engine on which requests are alone.
    """
    rng = np.random.default_rng(seed)
    running: list[tuple[Request, Reply]] = []
    for _ in range(count):
        request = random_request(rng)
        running.append((request, engine.submit(request)))
        for _ in range(int(rng.integers(0, 4))):
            engine.step()
        if rng.random() < 0.25:
            running[int(rng.integers(0, len(running)))][1].cancel()
    results = [(request, reply.result()) for request, reply in running]
    engine.prefixes.clear()
    for request, result in results:
        alone = (plain or engine).submit(request).result()
        for one, other in zip(result.choices, alone.choices, strict=True):
            if one.finish == "cancelled":
                assert one.ids == other.ids[: len(one.ids)]
            else:
                assert same(one, other), (seed, request)


@pytest.mark.parametrize("seed", range(4))
def test_random_schedules(engine: Engine, seed: int) -> None:
    """Trap 29, 4, 12: no neighbour, no row, no known prefix changes a bit."""
    engine.prefixes.memory = 1 << 20
    schedule(engine, seed)
    assert engine.prefixes.counts.hits or seed > 0


@pytest.mark.soak
def test_many_random_schedules(engine: Engine) -> None:
    engine.prefixes.memory = 1 << 18
    for seed in range(100, 300):
        schedule(engine, seed)


def test_nothing_compiles_after_warm_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 19: whatever requests ask for, no program is made."""
    from jax._src import compiler

    assert len(engine.programs) <= 16

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("compiled after warm-up")

    monkeypatch.setattr(compiler, "compile_or_get_cached", refuse)
    rng = np.random.default_rng(1)
    engine.prefixes.memory = 1 << 18
    results = run(engine, [random_request(rng) for _ in range(40)])
    results += run(engine, [Request([1, 2, 3] * 9, echo=True, logprobs=2, max_new_tokens=3, n=3, best_of=4)])
    assert {one.finish for result in results for one in result.choices} <= {"length", "stop"}


def test_choices_are_single_requests(engine: Engine) -> None:
    """Trap 5: n choices differ, share one prefill, and each can be asked for alone."""
    request: dict[str, Any] = {"sampling": WARM, "max_new_tokens": 10, "seed": 3}
    together = engine.submit(Request(PROMPTS[3], n=5, **request)).result()
    alone = run(engine, [Request(PROMPTS[3], sample=i, **request) for i in range(5)])
    assert [one.ids for one in together.choices] == [one.ids for one in alone]
    assert len({one.ids for one in together.choices}) == 5
    assert together.usage.reused == 4 * (len(PROMPTS[3]) - 1) and together.usage.completion == 50

    best = engine.submit(Request(PROMPTS[3], n=2, best_of=5, logprobs=0, **request)).result()
    scored = engine.submit(Request(PROMPTS[3], n=5, logprobs=0, **request)).result()
    means = sorted((-np.mean([p.log_prob for p in one.log_probs]), one.ids) for one in scored.choices)
    assert [one.ids for one in best.choices] == [ids for _, ids in means[:2]]
    assert [one.index for one in best.choices] == [0, 1]


def test_a_bias_leaves_with_its_text(engine: Engine) -> None:
    """The next text of the row does not have it, not even beside a row with one."""
    plain = [Request([9, 8, i], sampling=GREEDY, max_new_tokens=6) for i in range(3)]
    alone = [result.choices for result in run(engine, plain)]
    run(engine, [Request([4, i], logit_bias={77: 1000.0}, max_new_tokens=3) for i in range(3)])
    biased = Request([4, 5], logit_bias={78: 1000.0}, max_new_tokens=12)
    first, *others = run(engine, [biased, *plain])
    assert set(first.ids) == {78} and [result.choices for result in others] == alone


def uncached(runner: JaxRunner, ids: list[int]) -> np.ndarray:
    """Log-probabilities of every next token by one forward without a cache [T, V]."""
    tokens = jnp.asarray([ids])
    places = jnp.arange(len(ids))[None]
    logits: Any = runner.decoder.apply({"params": runner.params}, tokens, places, jnp.ones_like(tokens))[0]
    return np.asarray(jax.nn.log_softmax(logits[0]))


def test_log_probabilities(engine: Engine, runner: JaxRunner) -> None:
    """Trap 15: raw ones are those of the forward; `processed` those of the draw; of prompts too."""
    prompt, sampling = PROMPTS[2], Sampling(temperature=0.7, top_k=5)
    request: dict[str, Any] = {"sampling": sampling, "max_new_tokens": 8, "logprobs": 3, "seed": 2}
    raw = engine.submit(Request(prompt, echo=True, **request)).result()
    expected = uncached(runner, [*prompt, *raw.ids])

    def check(one: LogProb, row: np.ndarray) -> None:
        assert one.log_prob == pytest.approx(row[one.token], abs=2e-5)
        assert [token for token, _ in one.top] == np.argsort(-row, kind="stable")[:3].tolist()
        np.testing.assert_allclose([value for _, value in one.top], np.sort(row)[::-1][:3], atol=2e-5)

    assert [one.token for one in raw.prompt_log_probs] == prompt[1:]
    for one, row in zip((*raw.prompt_log_probs, *raw.choices[0].log_probs), expected, strict=False):
        check(one, row)

    processed = engine.submit(Request(prompt, processed=True, **request)).result()
    assert processed.ids == raw.ids
    for one, row in zip(processed.choices[0].log_probs, expected[len(prompt) - 1 :], strict=False):
        five = np.sort(row)[::-1][:5] / 0.7
        assert one.log_prob == pytest.approx(row[one.token] / 0.7 - np.log(np.exp(five).sum()), abs=2e-5)


def test_ends(engine: Engine) -> None:
    """Trap 30: every end id ends a text, the first token too; the reason is told."""
    free = engine.submit(Request(PROMPTS[2], sampling=WARM, max_new_tokens=30, seed=5)).result().ids
    other = lambda **options: engine.submit(Request(PROMPTS[2], sampling=WARM, seed=5, **options)).result()  # noqa: E731
    first = other(max_new_tokens=30, stop_ids=(free[0],)).choices[0]
    assert (first.ids, first.finish, first.ended_by) == (free[:1], "stop", free[0])
    engine.intake.ends = (V - 1, free[6])
    cut = free.index(free[6])
    ended = other(max_new_tokens=30).choices[0]
    assert (ended.ids, ended.finish, ended.ended_by) == (free[: cut + 1], "stop", free[6])
    assert other(max_new_tokens=30, ignore_eos=True).ids == free
    late = other(max_new_tokens=30, min_new_tokens=20).ids
    assert free[6] not in late[:20]
    assert other(max_new_tokens=4, ignore_eos=True).finish == "length"
    longest = other(ignore_eos=True)
    assert longest.finish == "context" and len(longest.ids) == 96 - len(PROMPTS[2])
    forced = other(max_new_tokens=12, forced=(11, 12, 13), ignore_eos=True).ids
    assert forced[:3] == (11, 12, 13) and len(forced) == 12
    engine.intake.ends = ()
    with pytest.raises(UserError, match="nothing ends the text"):
        other()


def test_stop_strings_and_parts(engine: Engine) -> None:
    """What streams is what comes back; a stop string is never shown, however it is cut into tokens."""
    request: dict[str, Any] = {"sampling": WARM, "max_new_tokens": 40, "seed": 4}
    whole = engine.submit(Request("def add", **request)).result()
    stop = whole.text[9:12]
    reply = engine.submit(Request("def add", stop=(stop, "never there"), **request))
    parts = [*reply]
    result = reply.result()
    assert "".join(part.text for part in parts) == result.text == whole.text[: whole.text.index(stop)]
    assert (result.finish, result.choices[0].ended_by) == ("stop", stop)
    assert tuple(token for part in parts for token in part.ids) == result.ids
    assert [part.finish for part in parts][-1] == "stop" and {part.finish for part in parts[:-1]} <= {None}


def test_cancel_and_deadline(engine: Engine) -> None:
    """In the queue and in a row: free after one step, the others unharmed."""
    long = [Request(PROMPTS[5], max_new_tokens=40, seed=i) for i in range(5)]
    alone = engine.submit(long[1]).result()
    replies = [engine.submit(request) for request in long]
    engine.step()
    for index in (0, 4):
        replies[index].cancel()
    engine.step()
    assert replies[0].done and replies[4].done and not replies[1].done
    assert replies[0].result().finish == "cancelled"
    assert replies[1].result().choices == alone.choices
    timed = engine.submit(Request(PROMPTS[5], max_new_tokens=40, deadline=1e-9))
    assert timed.result().finish == "deadline"
    assert [replies[i].result().finish for i in (2, 3)] == ["length"] * 2 and engine.in_use == 0


def test_a_row_that_is_not_finite(engine: Engine, runner: JaxRunner) -> None:
    """Trap 17, 13: the row ends with `error`; neither a neighbour nor the row's next text sees it."""
    clean = run(engine, [Request(prompt, sampling=WARM, max_new_tokens=12, seed=1) for prompt in PROMPTS[1:4]])
    poisoned = jax.tree.map(jnp.array, runner.params)
    poisoned["embed"]["embedding"] = poisoned["embed"]["embedding"].at[299].set(jnp.nan)
    whole, runner.params = runner.params, poisoned
    forbidden: dict[str, Any] = {"sampling": WARM, "max_new_tokens": 12, "seed": 1}
    try:
        results = run(engine, [Request([299, 5, 6], **forbidden), *(Request(p, **forbidden) for p in PROMPTS[1:4])])
        after = run(engine, [Request(p, **forbidden) for p in PROMPTS[1:4]])
    finally:
        runner.params = whole
    assert results[0].finish == "error" and results[0].ids == () and "not finite" in str(results[0].choices[0].ended_by)
    for one, two, three in zip(results[1:], after, clean, strict=True):
        if one.finish == "length":  # tied embeddings make every logit of the poisoned id none
            assert one.choices == two.choices == three.choices


def test_an_exception_in_a_step(engine: Engine, runner: JaxRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts in the rows end with one line and the engine goes on; twice in a row ends it."""
    broken = {"left": 1}
    decode = runner.decode

    def sometimes(orders: Any) -> Any:
        if broken["left"]:
            broken["left"] -= 1
            raise RuntimeError("the device is gone")
        return decode(orders)

    monkeypatch.setattr(runner, "decode", sometimes)
    replies = [engine.submit(Request([4, 5], max_new_tokens=4, seed=i)) for i in range(4)]
    results = [reply.result() for reply in replies]
    assert [result.finish for result in results] == ["error"] * 3 + ["length"]
    assert results[0].choices[0].ended_by == "RuntimeError: the device is gone"
    broken["left"] = 2
    results = run(engine, [Request([4, 5], max_new_tokens=4) for _ in range(8)])
    assert [result.finish for result in results] == ["error"] * 8
    with pytest.raises(UserError, match="engine has ended"):
        engine.submit(Request([4]))


def test_other_weights(engine: Engine, runner: JaxRunner) -> None:
    """A swap of weights keeps the programs and forgets the prefixes."""
    engine.prefixes.memory = 1 << 20
    request = Request(PROMPTS[3], sampling=GREEDY, max_new_tokens=10)
    before, whole = engine.submit(request).result(), runner.params
    other = random_params(runner.original, seed=9)
    try:
        engine.update(other)
        (expected,) = generate(runner.original, other, [PROMPTS[3]], GREEDY, max_new_tokens=10)
        assert [*engine.submit(request).result().ids] == expected != [*before.ids]
        reply = engine.submit(request)
        with pytest.raises(UserError, match="under way"):
            engine.update(other)
        engine.close()
        assert reply.result().finish == "cancelled"
    finally:
        runner.params = whole


def test_threads_and_asyncio(runner: JaxRunner) -> None:
    """Any thread may submit; `close` ends what is under way."""
    runner.clear()
    requests = [Request(prompt, sampling=WARM, max_new_tokens=15, seed=i) for i, prompt in enumerate(PROMPTS)]
    quiet = Engine(runner, threaded=False, warm_up=not runner.programs)
    expected = [result.choices for result in run(quiet, requests)]
    found: dict[int, Any] = {}
    with Engine(runner, warm_up=False) as engine:

        def ask(index: int) -> None:
            found[index] = engine.submit(requests[index]).result().choices

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[index] for index in range(len(requests))] == expected

        async def listen() -> list[int]:
            return [token async for part in engine.submit(requests[2]) for token in part.ids]

        assert tuple(asyncio.run(listen())) == expected[2][0].ids
        last = engine.submit(Request([1], max_new_tokens=90))
    assert last.result().finish in ("cancelled", "length")
    with pytest.raises(UserError, match="closed"):
        engine.submit(requests[0])


def test_grammars_among_neighbours(engine: Engine) -> None:
    """A text follows its grammar; one of which every token is forbidden ends with an error, and never draws token 0."""
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    engine.intake.ends, options = (256,), {"sampling": Sampling(temperature=1.5), "max_new_tokens": 5}
    grammars = [Grammar(choices=("yes", "no")), None, Grammar(choices=("q",))]
    asked = [Request("a", grammar=one, forbidden=(ord("q"),), **options) for one in grammars]  # pyright: ignore
    results = run(engine, asked)
    assert results[0].text in ("yes", "no") and results[0].finish == "stop"
    assert (results[1].finish, results[2].finish, results[2].ids) == ("length", "error", ())
    assert results[0].choices == engine.submit(asked[0]).result().choices


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"prompt": ()}, "no token"),
        ({"prompt": [1] * 96}, "96 tokens.*room for 96"),  # trap 18
        ({"prompt": [1, V]}, f"{V}.*0 to {V - 1}"),
        ({"forced": [V]}, "forced has ids"),
        ({"logit_bias": {V: 1.0}}, "logit_bias"),
        ({"n": 0}, "n = 0"),
        ({"n": 129}, "n = 129"),
        ({"n": 3, "best_of": 2}, "best_of = 2"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"logit_bias": dict.fromkeys(range(1_000_000), 0.0)}, "1000000 ids"),
        ({"logit_bias": {1: float("nan")}}, "not finite"),
        ({"stop": ("",)}, "stop string is empty"),
        ({"stop": ("x" * 10_000,)}, "10000 characters"),
        ({"stop": ("x",) * 17}, "17 strings"),
        ({"deadline": -1.0}, "past"),
        ({"forced": [1] * 4096}, "4096 ids"),
        ({"logprobs": 21}, "logprobs = 21"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(options: dict[str, Any], line: str, engine: Engine) -> None:
    with pytest.raises(UserError, match=line):
        engine.submit(Request(**{"prompt": [1], **options}))

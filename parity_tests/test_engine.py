"""The engine on torch_ref: texts and log-probabilities of the engine on JAX, and of the forward without a cache."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from jaxlm.errors import UserError
from jaxlm.infer.engine import Choice, Engine, Request, Result
from jaxlm.infer.engine.on_jax.runner import JaxRunner
from jaxlm.infer.engine.runner import Orders
from jaxlm.text.sampling import Sampling
from jaxlm.text.tokenizer import Tokenizer
from parity_tests.options import small
from parity_tests.pairs import Pair, model, pair, random_params
from parity_tests.test_generation import VARIANTS
from parity_tests.tolerances import FLOAT64
from tests.infer.test_engine import PROMPTS, WARM, V, random_request, run, schedule
from torch_ref.infer.runner import TorchRunner

EVERY = ("attention(window=5, keep_first=1)+mlp", "mamba", "mamba2", "attention+mlp")
NAMES = ["base", "learned", "sinusoidal", "interleaved", "window", "sinks", "mamba", "mamba2", "jamba", "moe"]
SIZES: dict[str, Any] = {"rows": 3, "slots": 96, "widths": (16,)}
LONG = pytest.mark.soak


@pytest.fixture(scope="module")
def models() -> Callable[[str], Pair]:
    """Both decoders of a variant, with the same weights."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            options = (
                VARIANTS[NAMES.index(name)] if name in NAMES else {"pattern": EVERY, "n_layers": 4, "mamba": small()}
            )
            cfg = model(**options, vocab_size=V)
            made[name] = pair(cfg, random_params(cfg, np.random.default_rng(7)))
        return made[name]

    return get


def torch_engine(models: Pair, memory: int = 0) -> Engine:
    runner = TorchRunner(models.torch, **SIZES)
    return Engine(runner, Tokenizer.bytes_level(), prefix_memory=memory, threaded=False)


def compare(ours: list[Result], theirs: list[Result], what: str) -> None:
    """Equal texts, and log-probabilities within the bound."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.usage == other.usage
        values = [list(one.prompt_log_probs), list(other.prompt_log_probs)]
        for choice, twin in zip(one.choices, other.choices, strict=True):
            assert (choice.ids, choice.text, choice.finish) == (twin.ids, twin.text, twin.finish)
            values[0] += choice.log_probs
            values[1] += twin.log_probs
        for mine, twin in zip(*values, strict=True):
            assert [token for token, _ in mine.top] == [token for token, _ in twin.top]
            pairs = [
                (mine.log_prob, twin.log_prob),
                *((x, y) for (_, x), (_, y) in zip(mine.top, twin.top, strict=True)),
            ]
            for x, y in pairs:
                assert x == y or abs(x - y) <= FLOAT64.allowed * max(1, abs(y)), (what, x, y)


@pytest.mark.parametrize("name", ["every mixer", *(pytest.param(name, marks=LONG) for name in NAMES)])
def test_the_same_texts_in_both(models: Callable[[str], Pair], name: str) -> None:
    """Random requests with options of every kind, reuse on and off; the JAX engine draws on rows of its own."""
    rng = np.random.default_rng(3)
    requests = [random_request(rng) for _ in range(7)]
    requests += [Request(PROMPTS[3], echo=True, logprobs=4, max_new_tokens=5, seed=9)]
    both = models(name)
    theirs = run(Engine(JaxRunner(both.jax, both.params, **SIZES), Tokenizer.bytes_level(), threaded=False), requests)
    compare(run(torch_engine(both), requests), theirs, name)
    known = torch_engine(both, 1 << 24)
    run(known, [dataclasses.replace(request, max_new_tokens=1) for request in requests])
    texts = run(known, requests)
    assert known.prefixes.counts.hits > 5
    assert [[choice.ids for choice in one.choices] for one in texts] == [
        [choice.ids for choice in one.choices] for one in theirs
    ]


@pytest.mark.parametrize("name", ["every mixer", *(pytest.param(name, marks=LONG) for name in NAMES)])
def test_the_forward_without_a_cache(models: Callable[[str], Pair], name: str) -> None:
    """Raw log-probabilities of prompts and texts, in pieces, with neighbours, known or not."""
    decoder = models(name).torch
    engine = torch_engine(models(name), 1 << 24)
    options: dict[str, Any] = {"sampling": WARM, "max_new_tokens": 7, "logprobs": 3}
    prompts = [PROMPTS[1], PROMPTS[3], PROMPTS[5]]
    cold = run(engine, [Request(prompt, echo=True, seed=i, **options) for i, prompt in enumerate(prompts)])
    run(engine, [Request(prompt, max_new_tokens=1) for prompt in prompts])
    warm = run(engine, [Request(prompt, seed=i, **options) for i, prompt in enumerate(prompts)])
    assert [result.ids for result in warm] == [result.ids for result in cold]
    assert engine.prefixes.counts.hits > 0
    for result in (*cold, *warm):
        ids = torch.tensor([[*result.prompt_ids, *result.ids]], dtype=torch.int32)
        places = torch.arange(ids.shape[1], dtype=torch.int32)[None]
        with torch.inference_mode():
            logits, _ = decoder(ids, places, torch.ones_like(places))
        rows = logits[0].log_softmax(dim=-1)[:-1].numpy()
        scored = [*result.prompt_log_probs, *result.choices[0].log_probs]
        for one, row in zip(scored, rows[len(rows) - len(scored) :], strict=True):
            FLOAT64.check(abs(one.log_prob - row[one.token]), name)
            assert [token for token, _ in one.top] == np.argsort(-row, kind="stable")[:3].tolist()


def test_vectors_in_place_of_embeddings(models: Callable[[str], Pair]) -> None:
    """A prompt as the rows of the embedding, as an image would come, is the prompt as ids, bit for bit, in both."""
    both = models("every mixer")
    table = both.torch.embed.weight.detach().numpy()
    orders = Orders.empty(SIZES["rows"], V)
    orders.active[0], orders.token[0], orders.position[0], orders.scored[0] = 1, 9, 13, 1
    orders = orders._replace(until=np.asarray(4, np.int32))
    found = []
    for runner in (JaxRunner(both.jax, both.params, **SIZES), TorchRunner(both.torch, **SIZES)):
        drawn = []
        for prompt in (PROMPTS[3][:13], table[PROMPTS[3][:13]], table[PROMPTS[4][:13]]):
            runner.reset(0)
            runner.prefill(0, prompt, 0, 16)
            drawn.append(runner.decode(orders))
        as_ids, as_vectors, others = ((one.tokens[:, 0].tolist(), one.log_probs[:, 0].tolist()) for one in drawn)
        assert as_ids == as_vectors != others
        found.append(as_vectors)
    (ours, our_logps), (theirs, their_logps) = found
    assert ours[:4] == theirs[:4]
    FLOAT64.check(float(np.abs(np.subtract(our_logps[:4], their_logps[:4])).max()), "log-probabilities")


def nearly(one: Choice, other: Choice) -> bool:
    """The sums of PyTorch depend on how long the longest row is, so bits differ."""
    pairs = zip(one.log_probs, other.log_probs, strict=True)
    near = all(x.log_prob == y.log_prob or abs(x.log_prob - y.log_prob) <= FLOAT64.allowed for x, y in pairs)
    return near and (one.ids, one.text, one.finish) == (other.ids, other.text, other.finish)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=LONG) for seed in range(1, 8))])
def test_random_schedules(models: Callable[[str], Pair], seed: int) -> None:
    """As on JAX: arrivals, cancels, choices, reuse; each request as it is alone."""
    schedule(torch_engine(models("every mixer"), 1 << 20), seed, 4 if seed == 0 else 12, nearly)


def test_a_row_that_is_not_finite(models: Callable[[str], Pair]) -> None:
    """It ends with `error`, and its row's next text does not see it (trap 17)."""
    both = models("every mixer")
    engine = torch_engine(both)
    options: dict[str, Any] = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 3}
    clean = [Request(prompt, **options) for prompt in PROMPTS[1:4]]
    before = [result.choices for result in run(engine, clean)]
    weight = both.torch.embed.weight
    row, bad = weight.data[V - 1].clone(), V - 1
    weight.data[bad] = torch.nan
    try:
        (ended,) = run(engine, [Request([bad, 5, 6], **options)])
    finally:
        weight.data[bad] = row
    assert ended.finish == "error" and ended.ids == ()
    assert [result.choices for result in run(engine, clean)] == before


def test_other_weights(models: Callable[[str], Pair]) -> None:
    engine = torch_engine(models("base"))
    names = engine.runner.decoder.state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    engine.update(names)
    with pytest.raises(UserError, match=r"the new weights are not those of the engine: .*embed.weight"):
        engine.update({name: tensor for name, tensor in names.items() if name != "embed.weight"})


def test_no_jax_is_imported() -> None:
    """Scheduler, texts, prefix table and grammar import neither framework; the runner imports torch alone."""
    code = """
import sys
import jaxlm.infer.engine, jaxlm.infer.engine.structured
print(*sorted({"jax", "flax", "torch"} & sys.modules.keys()))
import torch_ref.infer.runner
print(*sorted({"jax", "flax"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n\n", "")

"""The compiled loop: rows, seeds, ends, scanned and unrolled layers, and what its HLO does with the cache."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.infer import generate as infer
from jaxlm.infer.generate import bucket, draws, generate
from jaxlm.infer.text import Generator
from jaxlm.models.decoder import Decoder, Params, abstract_params
from jaxlm.text.completion import STREAM_BLOCK
from jaxlm.text.sampling import GREEDY, Sampling
from jaxlm.text.tokenizer import Tokenizer

V = 300
PROMPTS = [[5, 6, 7, 8, 9], [10], [255, 3, 4] * 6]
WARM = Sampling(temperature=0.9, top_k=40, repetition_penalty=1.2)


def model(**options: object) -> Decoder:
    base = {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64}
    return Decoder(config.Model(**{**base, **options}))  # pyright: ignore[reportArgumentType]


def random_params(decoder: Decoder) -> Params:
    """Large enough that the next token depends on the whole context."""
    shapes, _ = abstract_params(decoder)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray((rng.standard_normal(leaf.shape) * 0.4).astype(leaf.dtype)), shapes)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return model()


@pytest.fixture(scope="module")
def params(decoder: Decoder) -> Params:
    return random_params(decoder)


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "none"])
@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_greedy_is_the_argmax_without_a_cache(positions: str, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if loop == "scan" and positions == "learned":
        monkeypatch.setattr(infer, "MAX_UNROLLED", 1)  # stays scanned, caches stacked
    decoder = model(positions=positions, layer_loop=loop)
    params = random_params(decoder)
    new = generate(decoder, params, PROMPTS, GREEDY, max_new_tokens=12)
    for prompt, row in zip(PROMPTS, new, strict=True):
        ids = jnp.asarray([prompt + row])
        logits, _ = decoder.apply({"params": params}, ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
        assert row == logits[0, len(prompt) - 1 : -1].argmax(axis=-1).tolist()


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_row_does_not_see_its_neighbours(decoder: Decoder, params: Params, sampling: Sampling) -> None:
    together = generate(decoder, params, PROMPTS, sampling, max_new_tokens=10, seed=3)
    others = generate(decoder, params, [[1] * 30, PROMPTS[1]], sampling, max_new_tokens=10, seed=3)
    assert others[1] == together[1]
    assert generate(decoder, params, PROMPTS[:1], sampling, max_new_tokens=10, seed=3)[0] == together[0]


def test_seeds(decoder: Decoder, params: Params) -> None:
    prompts = [PROMPTS[0]] * 2
    first = generate(decoder, params, prompts, WARM, max_new_tokens=10, seed=1)
    assert generate(decoder, params, prompts, WARM, max_new_tokens=10, seed=1) == first
    assert generate(decoder, params, prompts, WARM, max_new_tokens=10, seed=2) != first
    assert first[0] != first[1]
    longer = generate(decoder, params, prompts, WARM, max_new_tokens=14, seed=1)
    assert [row[:10] for row in longer] == first


def test_a_row_ends_at_eos(decoder: Decoder, params: Params) -> None:
    free = generate(decoder, params, PROMPTS, WARM, max_new_tokens=20, seed=5)
    eos = free[2][4]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    ended = generate(decoder, params, PROMPTS, WARM, max_new_tokens=20, seed=5, eos_id=eos)
    assert ended == expected
    assert ended[2][-1] == eos and len(ended[2]) <= 5
    first = generate(decoder, params, PROMPTS[:1], GREEDY, max_new_tokens=1)[0]
    assert generate(decoder, params, PROMPTS[:1], GREEDY, max_new_tokens=20, eos_id=first[0]) == [first]


def test_the_loop_ends_with_the_last_row(decoder: Decoder, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """No log-probability is written behind the longest row."""
    (free,) = draws(decoder, params, PROMPTS[:1], 0.8, max_new_tokens=20, seed=5).ids
    complete, written = infer._complete, []
    monkeypatch.setattr(infer, "_complete", lambda *a, **k: written.append(complete(*a, **k)) or written[-1])
    (ended,) = draws(decoder, params, PROMPTS[:1], 0.8, max_new_tokens=20, seed=5, eos_id=free[4]).ids
    ((_, logps_1N),) = written
    assert len(ended) <= 5
    assert (logps_1N[0, : len(ended)] < 0).all() and not logps_1N[0, len(ended) :].any()


def test_repetition_counts_the_prompt_and_the_new_tokens(decoder: Decoder, params: Params) -> None:
    never = Sampling(temperature=0.0, repetition_penalty=1e9)
    for prompt, row in zip(PROMPTS, generate(decoder, params, PROMPTS, never, max_new_tokens=30), strict=True):
        assert len({*prompt, *row}) == len({*prompt}) + 30


def test_few_shapes() -> None:
    assert [bucket(length) for length in (1, 16, 17, 64, 65, 128, 129, 257)] == [16, 16, 32, 64, 128, 128, 256, 384]


def test_the_loop_copies_no_cache(decoder: Decoder, params: Params) -> None:
    """In the compiled body each cache is written by one update in place: no copy, no transposition, no scatter."""
    captured = {}

    def capture(*args: object, **options: object) -> object:
        captured["text"] = complete.lower(*args, **options).compile().as_text()
        return complete(*args, **options)

    complete = infer._complete
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer, "_complete", capture)
        generate(decoder, params, PROMPTS, GREEDY, max_new_tokens=40)
    text = captured["text"]
    slots = bucket(max(map(len, PROMPTS))) + 40
    buffers = rf"f32\[{len(PROMPTS)},2,({slots},8|8,{slots})\]"
    assert not re.search(rf"= {buffers}\S* (copy|transpose|scatter)\(", text)
    assert re.search(rf"= {buffers}\S* dynamic-update-slice\(", text)


@pytest.mark.parametrize("stop", [(), ("e",)])
def test_streaming_shows_the_same_text(decoder: Decoder, params: Params, stop: tuple[str, ...]) -> None:
    generator = Generator(decoder, params, Tokenizer.bytes_level())
    pieces = ["", ""]

    def stream(row: int, piece: str) -> None:
        pieces[row] += piece

    prompts, new = ["def add", ""], 3 * STREAM_BLOCK + 1
    silent = generator.complete(prompts, WARM, max_new_tokens=new, stop=stop, seed=1)
    shown = generator.complete(prompts, WARM, max_new_tokens=new, stop=stop, seed=1, stream=stream)
    assert shown == silent
    assert [done.text for done in shown] == pieces
    assert [done.prompt for done in shown] == prompts
    assert not stop or all(stop[0] not in done.text for done in shown)

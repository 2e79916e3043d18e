"""Windows and sinks of a whole model: caches of fixed size, chunks, padding, and what positions mean to sinks."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import numpy as np
import pytest
import torch

from jaxlm.infer import generate as jax_generate
from jaxlm.models import decoder as jax_decoder
from jaxlm.text.sampling import GREEDY
from parity_tests.pairs import Pair, error, model, pair, random_params
from parity_tests.tolerances import FLOAT64
from torch_ref.infer import generate as torch_generate
from torch_ref.models import decoder as torch_decoder
from torch_ref.models.attention import Attention
from torch_ref.ops.attention.attend import Places
from torch_ref.ops.rope import apply_rope, rope_table_of

WINDOW, FIRST = 7, 2
VARIANTS: dict[str, dict[str, Any]] = {
    "window": {"window": WINDOW, "n_layers": 2},
    "first tokens": {"window": WINDOW, "keep_first": FIRST, "n_layers": 2, "layer_loop": "unroll"},
    "every sink": {
        "window": WINDOW,
        "keep_first": FIRST,
        "sink_tokens": 2,
        "sink_logits": True,
        "softcap": 3.0,
        "rotary_fraction": 0.5,
        "n_layers": 2,
        "layer_loop": "unroll",
    },
    "another window in each block": {
        "pattern": ("attention(window=5)+mlp", "attention(window=11, keep_first=1)+mlp"),
        "n_layers": 2,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16},
    },
}


@functools.partial(jax.jit, static_argnums=0)
def _jax_apply(decoder: jax_decoder.Decoder, params: Any, arrays: Any, cache: Any) -> Any:
    return decoder.apply({"params": params}, *arrays, cache)


def jax_apply(models: Pair, arrays: tuple[np.ndarray, ...], cache: Any = None) -> tuple[np.ndarray, Any]:
    logits, cache = _jax_apply(models.jax, models.params, arrays, cache)
    return np.asarray(logits), cache


def torch_apply(models: Pair, arrays: tuple[np.ndarray, ...], cache: Any = None) -> tuple[np.ndarray, Any]:
    with torch.inference_mode():
        logits, cache = models.torch(*map(torch.tensor, arrays), cache)
    return logits.numpy(), cache


FRAMEWORKS = {
    "jax": (jax_apply, lambda models, rows, slots: jax_decoder.init_cache(models.jax, rows, slots)),
    "torch": (torch_apply, lambda models, rows, slots: torch_decoder.init_cache(models.torch, rows, slots)),
}


def pair_of(options: dict[str, Any]) -> Pair:
    cfg = model(**options)
    return pair(cfg, random_params(cfg, np.random.default_rng(7)))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", list(VARIANTS)[1:])
def test_ten_windows_in_chunks_with_padding_anywhere(name: str, framework: str, rng: np.random.Generator) -> None:
    """Rows that start late, pause, and get chunks of any length: each logit of each token is that of one whole pass."""
    models, (apply, init_cache) = pair_of(VARIANTS[name]), FRAMEWORKS[framework]
    rows, total = 4, 10 * WINDOW + 40
    tokens = rng.integers(0, models.jax.config.vocab_size, (rows, total), dtype=np.int32)
    places = np.broadcast_to(np.arange(total, dtype=np.int32), tokens.shape)
    whole, _ = apply(models, (tokens, places, np.ones_like(places)))

    done, cache, worst = np.zeros(rows, int), init_cache(models, rows, total), 0.0
    widths = [19, 1, 1, 1, 1, 19, 1, 1, 1, 19, *[1] * 24, 19]
    for number, width in enumerate(widths):
        before = np.array([0, number % 3 * (width > 1), 0, 3 * (width > 1)])  # padding on the left
        after = np.array([0, 0, number % 4 * (width > 1), 2 * (width > 1)])  # and on the right
        lengths = np.maximum(width - before - after, 0)
        lengths[[row for row in range(1, rows) if width == 1 and (number + row) % 3 == 0]] = 0  # some rows pause
        lengths = np.minimum(lengths, total - done)
        column = np.arange(width) - before[:, None]
        real = (column >= 0) & (column < lengths[:, None])
        at = np.where(real, done[:, None] + column, 0)
        now = np.take_along_axis(tokens, at, axis=1), at.astype(np.int32), real.astype(np.int32)
        logits, cache = apply(models, now, cache)
        expected = np.take_along_axis(whole, at[..., None], axis=1)
        worst = max(worst, float(np.abs(logits - expected)[real].max()))
        done += lengths
    assert done.max() > 10 * WINDOW and len(set(done.tolist())) > 2
    FLOAT64.check(worst, "logits")


@pytest.mark.parametrize("options", [VARIANTS["window"], VARIANTS["every sink"]])
def test_memory_is_the_window(options: dict[str, Any]) -> None:
    models = pair_of(options)

    def bytes_of(slots: int) -> tuple[int, int]:
        ours = jax.eval_shape(lambda: jax_decoder.init_cache(models.jax, 3, slots))
        theirs = jax.tree.leaves(torch_decoder.init_cache(models.torch, 3, slots))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(ours)), sum(x.nbytes for x in theirs)

    assert bytes_of(100) == bytes_of(100_000)
    assert bytes_of(4)[0] < bytes_of(100)[0]
    cfg = models.jax.config
    slots = WINDOW + cfg.keep_first
    a_slot = cfg.n_layers * (2 * cfg.n_kv_heads * cfg.head_dim * 8 + 4)
    assert bytes_of(100) == (3 * slots * a_slot,) * 2


def test_the_cost_of_a_prompt_is_linear_in_its_length() -> None:
    """Attention of 8,192 tokens to a cache of 64 and to one another."""
    decoder = jax_decoder.Decoder(model(window=64, n_layers=1, layer_loop="unroll", attention_impl="auto"))
    shapes, _ = jax_decoder.abstract_params(decoder)

    def flops(t: int) -> float:
        rows = jax.ShapeDtypeStruct((1, t), np.int32)
        cache = jax.eval_shape(lambda: jax_decoder.init_cache(decoder, 1, t))
        return jax.jit(decoder.apply).lower({"params": shapes}, rows, rows, rows, cache).cost_analysis()["flops"]

    assert flops(8192) < 2.1 * flops(4096)


def test_text_without_end(caplog: pytest.LogCaptureFixture) -> None:
    """Eight times the training length, the same tokens in both frameworks, no refusal and no warning."""
    models = pair_of(VARIANTS["first tokens"] | {"max_seq_len": 16})
    with caplog.at_level(logging.WARNING):
        ours = jax_generate.generate(models.jax, models.params, [[5, 9, 2], [4] * 11], GREEDY, max_new_tokens=128)
        assert torch_generate.generate(models.torch, [[5, 9, 2], [4] * 11], GREEDY, max_new_tokens=128) == ours
    assert not caplog.records


@pytest.mark.parametrize("options", [VARIANTS["every sink"] | {"keep_first": 0}, {"sink_tokens": 3, "n_layers": 1}])
def test_sink_tokens_have_no_position(options: dict[str, Any], rng: np.random.Generator) -> None:
    """All positions moved by as much: nothing changes."""
    models = pair_of(options)
    tokens = rng.integers(0, models.jax.config.vocab_size, (2, 30), dtype=np.int32)
    positions, ones = np.broadcast_to(np.arange(30, dtype=np.int32), tokens.shape), np.ones_like(tokens)
    for apply, _ in FRAMEWORKS.values():
        FLOAT64.check(
            error(apply(models, (tokens, positions + 1000, ones))[0], apply(models, (tokens, positions, ones))[0]),
            "logits of moved positions",
        )


@pytest.mark.parametrize("scaling", [{}, {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16}}])
def test_first_tokens_stand_as_in_a_cache_without_gaps(scaling: dict[str, Any], rng: np.random.Generator) -> None:
    """StreamingLLM as it is written: evict, then number what is in the cache from 0, rotate, attend; token by token."""
    models = pair_of({"window": WINDOW, "keep_first": FIRST, "n_layers": 1} | scaling)
    mixer, cfg, t = models.torch.get_submodule("layers.0.mixer"), models.jax.config, 4 * WINDOW
    assert isinstance(mixer, Attention) and cfg.rope is not None
    x = torch.tensor(rng.standard_normal((1, t, cfg.d_model)))
    places = Places(torch.arange(t)[None], torch.ones(1, t, dtype=torch.int32))
    with torch.inference_mode():
        got, _ = mixer(x, places, rope_table_of(places.positions, cfg.rope, torch.float64), None)
        q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
        for now in range(t):
            held = [i for i in range(now + 1) if i < FIRST or i > now - WINDOW]
            table = rope_table_of(torch.arange(len(held))[None], cfg.rope, torch.float64)
            keys = apply_rope(k[:, held], *table, layout="half").repeat_interleave(2, dim=2)
            last = rope_table_of(torch.tensor([[len(held) - 1]]), cfg.rope, torch.float64)
            query = apply_rope(q[:, now : now + 1], *last, layout="half")
            weights = torch.softmax(torch.einsum("btnh,bsnh->bnts", query, keys) * cfg.head_dim**-0.5, dim=-1)
            mixed = torch.einsum("bnts,bsnh->btnh", weights, v[:, held].repeat_interleave(2, dim=2))
            FLOAT64.check(error(got[:, now : now + 1].numpy(), mixer.o_proj(mixed).numpy()), f"token {now}")


@pytest.mark.parametrize("fault", ["one slot too few", "stale distance"])
def test_a_planted_fault_is_seen(fault: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that forgets the oldest token that is still seen; retained tokens at the distance that they have."""
    models = pair_of({"window": WINDOW, "keep_first": FIRST, "n_layers": 1})
    t = 5 * WINDOW
    tokens = rng.integers(0, models.jax.config.vocab_size, (1, t), dtype=np.int32)
    places = np.arange(t, dtype=np.int32)[None]
    whole, _ = torch_apply(models, (tokens, places, np.ones_like(places)))
    cache = torch_decoder.init_cache(models.torch, 1, t if fault == "stale distance" else WINDOW - 1)
    if fault == "stale distance":
        original = Attention._first

        def stale(self: Any, bare: Any, own: Any, places: Places, cache: Any) -> Any:
            table = rope_table_of(places.positions, self.config.rope, bare.dtype)
            return original(self, bare, own, places, cache)._replace(q=apply_rope(bare, *table, layout="half"))

        monkeypatch.setattr(Attention, "_first", stale)
    worst = 0.0
    for i in range(t):
        now = tokens[:, i : i + 1], places[:, i : i + 1], np.ones((1, 1), np.int32)
        logits, cache = torch_apply(models, now, cache)
        worst = max(worst, float(np.abs(logits - whole[:, i : i + 1]).max()))
    with pytest.raises(AssertionError, match="logits: error"):
        FLOAT64.check(worst, "logits")

"""Rungs 3 and 4: logits, loss and the gradient of every parameter, for every option of the model.

float64 first: the same mathematics agrees to 1e-10. Then float32 and bfloat16 by ratio: each framework's error against
float64 is at most twice the other's. Each planted fault is seen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch

from jaxlm import config
from jaxlm.models import decoder as jax_decoder
from parity_tests import pairs
from parity_tests.options import MIXTURES, OPTIONS, quick
from parity_tests.tolerances import COSINE64, COSINES, FLOAT64, FLOORS, RATIO
from torch_ref.models import decoder as torch_decoder


def split(options: dict[str, Any]) -> tuple[config.Model, dict[str, float]]:
    """The model and the options of the loss."""
    options = dict(options)
    loss = options.pop("loss", {})
    return pairs.model(**options), loss


def check_same(ours: pairs.Result, theirs: pairs.Result) -> None:
    """Logits, sums and gradients agree to float64's rounding."""
    check_logits(ours, theirs)
    for name, value in theirs.sums.items():
        FLOAT64.check(pairs.error(ours.sums[name], value), name)
    check_gradients(ours, theirs)


def check_gradients(ours: pairs.Result, theirs: pairs.Result) -> None:
    """The gradients alone."""
    for name, distance, angle in pairs.differences(ours.gradients, theirs.gradients):
        FLOAT64.check(distance, f"gradient of {name}")
        COSINE64.check(angle, f"angle of the gradient of {name}")


def check_logits(ours: pairs.Result, theirs: pairs.Result) -> None:
    """Logits alone."""
    FLOAT64.check(pairs.error(ours.logits, theirs.logits), "logits")


@pytest.mark.parametrize(
    "name", [name if name in quick() else pytest.param(name, marks=pytest.mark.soak) for name in OPTIONS | MIXTURES]
)
def test_float64(name: str, rng: np.random.Generator) -> None:
    cfg, loss = split((OPTIONS | MIXTURES)[name])
    pair, batch = pairs.pair(cfg, pairs.random_params(cfg, rng)), pairs.packed_batch(cfg, rng)
    check_same(pairs.run_torch(pair.torch, batch, **loss), pairs.run_jax(pair.jax, pair.params, batch, **loss))


def test_every_option_is_tried() -> None:
    """A new field of `Model` or of a section differs in one of OPTIONS, or stands here with the reason why not."""
    untried = set(fields_of(config.Model())) - {
        name
        for options in OPTIONS.values()
        for model in halves_of(split(options)[0])
        for name, value in fields_of(model).items()
        if value != fields_of(pairs.model())[name]
    }
    sizes, training = {"vocab_size", "max_seq_len"}, {"dropout", "init_std"}
    begin = {"mamba.dt_min", "mamba.dt_max", "mamba.dt_floor"}  # where the step sizes start, and no more
    layout = {"moe.exchange"}  # how tokens travel between devices: tests/ops/test_exchange.py
    heads = {"head", "classes", "pooling"}  # parity_tests/test_heads.py
    assert untried == sizes | training | begin | layout | heads


def halves_of(cfg: config.Model) -> Iterator[config.Model]:
    """The model, and what each half of its blocks sees."""
    yield cfg
    for kind in cfg.pattern:
        halves = cfg.halves(kind)
        yield from (halves.mixer, halves.ffn)


def fields_of(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every option by its dotted name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        name = prefix + field.name
        found |= fields_of(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_narrow_errors_are_alike(name: str, rng: np.random.Generator) -> None:
    """float32 and bfloat16: the error against float64 of one framework is at most twice that of the other."""
    cfg, loss = split(MIXTURES[name])
    values, batch = pairs.random_params(cfg, rng), pairs.packed_batch(cfg, rng)
    pair = pairs.pair(cfg, values)
    golden = pairs.run_jax(pair.jax, pair.params, batch, **loss)
    for compute, floor in FLOORS.items():
        pair = pairs.pair(cfg, values, "float32", compute)
        ours = dict(errors(pairs.run_torch(pair.torch, batch, **loss), golden))
        theirs = dict(errors(pairs.run_jax(pair.jax, pair.params, batch, **loss), golden))
        for tensor, (distance, angle) in ours.items():
            other, other_angle = theirs[tensor]
            low, high = sorted((distance, other))
            RATIO.check(high / max(low, floor.allowed), f"{compute} {tensor}: {distance:.2e} and {other:.2e}, ratio")
            COSINES[compute].check(max(angle, other_angle), f"{compute} angle of {tensor}")


def errors(result: pairs.Result, golden: pairs.Result) -> Iterator[tuple[str, tuple[float, float]]]:
    """Error and cosine distance of the logits, the loss and every gradient."""
    yield "logits", (pairs.error(result.logits, golden.logits), pairs.cosine_distance(result.logits, golden.logits))
    yield "loss", (pairs.error(result.sums["loss"], golden.sums["loss"]), 0.0)
    for name, distance, angle in pairs.differences(result.gradients, golden.gradients):
        if np.linalg.norm(golden.gradients[name]) > pairs.ZERO:  # else it is zero but for rounding
            yield f"gradient of {name}", (distance, angle)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["xla", "blockwise"])
def test_documents_do_not_see_each_other(impl: str, dtype: str, rng: np.random.Generator) -> None:
    """Other tokens in the first document: bit for bit the same logits in the others, in both frameworks."""
    cfg = pairs.model(attention_impl=impl, n_layers=2)
    pair, batch = pairs.pair(cfg, pairs.random_params(cfg, rng), "float32", dtype), pairs.packed_batch(cfg, rng)
    first = batch["segments"] == 1
    changed = batch | {"tokens": np.where(first, (batch["tokens"] + 1) % cfg.vocab_size, batch["tokens"])}
    for logits in (jax_logits, torch_logits):
        before, after = logits(pair, batch), logits(pair, changed)
        np.testing.assert_array_equal(before[batch["segments"] > 1], after[batch["segments"] > 1])
        assert (before[first] != after[first]).any(axis=-1).all()


def jax_logits(pair: pairs.Pair, batch: pairs.Arrays) -> np.ndarray:
    apply = jax.jit(pair.jax.apply)
    return np.asarray(apply({"params": pair.params}, batch["tokens"], batch["positions"], batch["segments"])[0])


def torch_logits(pair: pairs.Pair, batch: pairs.Arrays) -> np.ndarray:
    arrays = pairs.tensors(batch)
    with torch.no_grad():
        return pair.torch(arrays["tokens"], arrays["positions"], arrays["segments"])[0].numpy()


@pytest.mark.parametrize("options", [{}, MIXTURES["all else"], {"positions": "learned", "layer_loop": "unroll"}])
def test_cached_decoding(options: dict[str, Any], rng: np.random.Generator) -> None:
    """Prefill of prompts padded on the left and steps, with the caches of both, give the logits of one whole pass."""
    cfg, _ = split(options)
    pair = pairs.pair(cfg, pairs.random_params(cfg, rng))
    t, prompt, lengths = 24, 17, np.array([[24], [15]])  # the second row starts with 9 tokens of padding
    tokens = rng.integers(0, cfg.vocab_size, (2, t), dtype=np.int32)
    positions = np.maximum(np.arange(t, dtype=np.int32) - (t - lengths), 0).astype(np.int32)
    segments = (np.arange(t) >= t - lengths).astype(np.int32)
    whole = torch_logits(pair, {"tokens": tokens, "positions": positions, "segments": segments})

    ours, theirs = torch_decoder.init_cache(pair.torch, 2, t), jax_decoder.init_cache(pair.jax, 2, t)
    step = jax.jit(pair.jax.apply)
    for now in [slice(0, prompt), *(slice(i, i + 1) for i in range(prompt, t))]:
        rows = [x[:, now] for x in (tokens, positions, segments)]
        with torch.no_grad():
            a, ours = pair.torch(*map(torch.tensor, rows), ours)
        b, theirs = step({"params": pair.params}, *rows, theirs)
        FLOAT64.check(pairs.error(a.numpy(), np.asarray(b)), f"logits of {now}")
        FLOAT64.check(pairs.error(a.numpy(), whole[:, now]), f"logits of {now} and of the whole pass")
    repeats = range(cfg.repeats if cfg.scanned else 1)
    layers = [jax.tree.map(lambda x, r=r: x[r] if cfg.scanned else x, slot) for r in repeats for slot in theirs]
    for i, (mine, other) in enumerate(zip(ours, layers, strict=True)):
        for name, a, b in zip(mine._fields, mine, other, strict=True):
            FLOAT64.check(pairs.error(a.numpy(), np.asarray(b)), f"{name} of layer {i}")


# Planted faults: what the torch side is told, given the truth. Each returns model, state dict and batch.
Fault = Callable[[config.Model, dict[str, torch.Tensor], pairs.Arrays], tuple[config.Model, dict, pairs.Arrays]]


def options_are(**wrong: Any) -> Fault:
    """Another config."""
    return lambda cfg, state, batch: (dataclasses.replace(cfg, **wrong), state, batch)


def batch_is(**wrong: Callable[[pairs.Arrays], np.ndarray]) -> Fault:
    """Another batch."""
    return lambda cfg, state, batch: (cfg, state, batch | {key: make(batch) for key, make in wrong.items()})


def swapped_gate_and_up(cfg: config.Model, state: dict, batch: pairs.Arrays) -> tuple:
    gate, up = "layers.1.ffn.gate_proj.weight", "layers.1.ffn.up_proj.weight"
    return cfg, state | {gate: state[up], up: state[gate]}, batch


def transposed_kernel(cfg: config.Model, state: dict, batch: pairs.Arrays) -> tuple:
    name = "layers.2.mixer.q_proj.weight"
    assert state[name].shape == state[name].T.shape
    return cfg, state | {name: state[name].T}, batch


def missing_tie(cfg: config.Model, state: dict, batch: pairs.Arrays) -> tuple:
    """A head of its own that starts as a copy: the logits are right, the gradient is not."""
    return dataclasses.replace(cfg, tie_embeddings=False), state | {"head.weight": state["embed.weight"]}, batch


FAULTS: dict[str, tuple[str, Fault]] = {
    "rope layout": ("base", options_are(rope_layout="interleaved")),
    "swapped gate and up": ("base", swapped_gate_and_up),
    "transposed kernel": ("base", transposed_kernel),
    "eps": ("base", options_are(norm_eps=1e-6)),
    "no document mask": ("base", batch_is(segments=lambda batch: np.minimum(batch["segments"], 1))),
    "missing tie": ("base", missing_tie),
    "gelu tanh for erf": ("gelu", options_are(activation="gelu_tanh")),
    "positions off by one": ("learned", batch_is(positions=lambda batch: batch["positions"] + 1)),
}


@pytest.fixture(scope="module")
def truth() -> Callable[[str], tuple[config.Model, pairs.Params, pairs.Arrays, pairs.Result]]:
    """The model, batch and result of one of OPTIONS, computed once."""

    @functools.cache
    def make(name: str) -> tuple[config.Model, pairs.Params, pairs.Arrays, pairs.Result]:
        (cfg, _), rng = split(OPTIONS[name]), np.random.default_rng(7)
        values, batch = pairs.random_params(cfg, rng), pairs.packed_batch(cfg, rng)
        pair = pairs.pair(cfg, values)
        return cfg, values, batch, pairs.run_jax(pair.jax, pair.params, batch)

    return make


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, truth: Callable) -> None:
    """By the logits (but for the tie, whose copy gives the same) and by the gradients, each on its own."""
    name, plant = FAULTS[fault]
    cfg, values, batch, right = truth(name)
    healthy = pairs.pair(cfg, values)
    check_same(pairs.run_torch(healthy.torch, batch), right)

    wrong_cfg, state, wrong_batch = plant(cfg, pairs.state_dict(healthy.params, cfg), batch)
    decoder = torch_decoder.Decoder(wrong_cfg, healthy.torch.policy)
    decoder.load_state_dict(state)
    wrong = pairs.run_torch(decoder, wrong_batch)
    if fault == "missing tie":
        check_logits(wrong, right)
        wrong.gradients.pop("head.weight")
    else:
        with pytest.raises(AssertionError, match="logits: error"):
            check_logits(wrong, right)
    with pytest.raises(AssertionError, match=r"gradient of .*: error"):
        check_gradients(wrong, right)

"""Architectures drawn at random: any pattern of any blocks with any options is the same model in both frameworks.

Of each: logits, loss, every gradient (a first moment is 1 - beta1 times it) and one update; float64, packed rows of
512.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from jaxlm import config
from parity_tests import pairs, test_generation, test_logits_gradients, test_optimiser
from parity_tests.options import OPTIONS
from parity_tests.test_logits_gradients import split

QUICK, PARTS, EXAMPLES = (2, 4, 5), 6, 2  # twelve in all, in six tests so that workers share them; `make soak` runs all
TRAIN = config.Train(batch_size=2, steps=10, warmup_steps=0, learning_rate=1e-2, z_loss=1e-3)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a small model: one to three blocks, repeated once or twice."""
    pattern = tuple(draw(st.lists(blocks(), min_size=1, max_size=3)))
    one_of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    tied, scaling = draw(st.booleans()), one_of("none", "linear", "ntk", "llama3", "yarn")
    biases = draw(st.sets(st.sampled_from(["qkv", "attention_out", "mlp", "router", "experts"])))
    return dict(
        pattern=pattern,
        n_layers=len(pattern) * one_of(1, 2),
        norm=one_of("rmsnorm", "layernorm"),
        norm_position=one_of("pre", "pre", "post"),
        activation=one_of("swiglu", "swiglu_clamped", "gelu", "relu"),
        positions=one_of("rope", "rope", "learned", "sinusoidal", "none"),
        rope_layout=one_of("half", "interleaved"),
        rotary_fraction=one_of(1.0, 0.5),
        rope_scaling={"kind": scaling, "factor": 4.0, "original_max_seq_len": 128},
        biases=(*sorted(biases), *(() if tied else ("head",))),
        tie_embeddings=tied,
        moe=draw(experts()),
        mamba=draw(state_spaces()),
        attention_impl=one_of("xla", "blockwise", "auto"),
        layer_loop=one_of("scan", "unroll"),
    )


@st.composite
def blocks(draw: st.DrawFn) -> str:
    """One entry of a pattern."""
    mixer = draw(st.sampled_from(["attention", "attention", "mamba", "mamba2"]))
    if mixer == "attention":
        options = {
            "n_kv_heads": draw(st.sampled_from([1, 2, 4])),
            "softcap": draw(st.sampled_from([0.0, 4.0])),
            "sink_logits": draw(st.booleans()),
            "sink_tokens": draw(st.sampled_from([0, 2])),
            "qk_norm": draw(st.booleans()),
        }
        if draw(st.booleans()):
            options |= {"window": draw(st.integers(1, 200)), "keep_first": draw(st.sampled_from([0, 3]))}
        mixer += f"({', '.join(f'{key}={str(value).lower()}' for key, value in options.items())})"
    ffn = draw(st.sampled_from(["+mlp", "+moe", ""]))
    return mixer + ffn


@st.composite
def experts(draw: st.DrawFn) -> dict[str, Any]:
    """Options of the mixture of experts."""
    grouped = draw(st.booleans())
    return dict(
        n_experts=6,
        top_k=draw(st.integers(1, 3)),
        d_ff=24,
        n_shared=draw(st.integers(0, 2)),
        router=draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalize=draw(st.booleans()),
        route_scale=draw(st.sampled_from([1.0, 2.5])),
        n_groups=3 if grouped else 1,
        top_groups=2 if grouped else 1,
        capacity_factor=draw(st.sampled_from([0.0, 0.0, 1.0])),
        balance_loss=draw(st.sampled_from([0.0, 0.1])),
        importance_loss=draw(st.sampled_from([0.0, 0.1])),
        z_loss=draw(st.sampled_from([0.0, 0.1])),
        selection_bias=draw(st.booleans()),
        bias_update_rate=0.01,
    )


@st.composite
def state_spaces(draw: st.DrawFn) -> dict[str, Any]:
    """Options of the state-space mixers."""
    return dict(
        d_state=draw(st.sampled_from([4, 8])),
        expand=draw(st.integers(1, 2)),
        d_conv=draw(st.integers(2, 4)),
        head_dim=8,
        n_groups=draw(st.integers(1, 2)),
        conv_bias=draw(st.booleans()),
        proj_bias=draw(st.booleans()),
        inner_norms=draw(st.booleans()),
        chunk=draw(st.sampled_from([16, 48, 64])),
    )


def check(cfg: config.Model) -> None:
    """Everything about one model."""
    rng = np.random.default_rng(0)
    pair, batch = pairs.pair(cfg, pairs.random_params(cfg, rng)), pairs.packed_batch(cfg, rng)
    places = tuple(batch[name] for name in ("tokens", "positions", "segments"))
    logits = [apply(pair, places)[0] for apply, _ in test_generation.FRAMEWORKS.values()]
    test_logits_gradients.FLOAT64.check(pairs.error(*logits), "logits")
    options: dict[str, Any] = {"train": TRAIN, "batches": [batch]}
    test_optimiser.check_same(test_optimiser.run_torch(pair, **options), test_optimiser.run_jax(pair, **options))


@pytest.mark.parametrize("part", [n if n in QUICK else pytest.param(n, marks=pytest.mark.soak) for n in range(PARTS)])
def test_models_drawn_at_random(part: int) -> None:
    calm = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @seed(part)
    @settings(max_examples=EXAMPLES, derandomize=False, database=None, suppress_health_check=calm)
    @given(models())
    def each(options: dict[str, Any]) -> None:
        check(pairs.model(**options))

    each()


NOISE = "bias qkv, no positions"  # softmax ignores the bias of such keys: its gradient is rounding, made a full update


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != NOISE and not split(OPTIONS[name])[0].random])
def test_updates_of_every_option_alone(name: str) -> None:
    """Where the step draws random numbers, each framework has its own; `test_moe.py` compares noise that is given."""
    check(split(OPTIONS[name])[0])

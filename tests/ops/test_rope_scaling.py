"""Rotations: a score depends on the distance alone, whatever the scaling; and what each scaling does to frequencies.

Shapes: T length, H head dim, P rotated pairs.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import Model, RopeScaling
from jaxlm.ops.rope import apply_rope, rope_frequencies, rope_table_of, rope_temperature

LINEAR = RopeScaling(kind="linear", factor=4.0)
NTK = RopeScaling(kind="ntk", factor=4.0)
LLAMA3 = RopeScaling(kind="llama3", factor=4.0, original_max_seq_len=256)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=256)
SCALINGS = [RopeScaling(), LINEAR, NTK, LLAMA3, YARN]
H, THETA = 32, 1e4


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.kind)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_score_depends_on_the_distance_alone(scaling: RopeScaling, layout, fraction: float) -> None:
    """And a rotation keeps the length of a vector, but for YaRN's temperature; what is not rotated passes through."""
    model = Model(d_model=H, n_heads=1, rope_scaling=scaling, rope_theta=THETA, rotary_fraction=fraction)
    assert model.rope is not None
    random = np.random.default_rng(0)
    positions = np.arange(0, 900, 31)
    with jax.enable_x64(True):
        table = rope_table_of(jnp.asarray(positions)[None], model.rope, jnp.float64)
        q, k = (np.broadcast_to(random.standard_normal(H), (1, len(positions), 1, H)) for _ in range(2))
        turned_q, turned_k = (np.asarray(apply_rope(jnp.asarray(x), *table, layout=layout))[0, :, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in (0, 1, 7):
        np.testing.assert_allclose(np.diagonal(scores, -distance), scores[distance, 0], rtol=1e-10, atol=1e-11)
    dim, temperature = model.rotary_dim, rope_temperature(scaling)
    np.testing.assert_array_equal(turned_q[:, dim:], q[0, :, 0, dim:])
    lengths = np.linalg.norm(turned_q[:, :dim], axis=1) / np.linalg.norm(q[0, :, 0, :dim], axis=1)
    np.testing.assert_allclose(lengths, temperature, rtol=1e-12)
    assert len(set(np.round(scores[:, 0], 6))) > 20  # it does depend on it


def test_linear_and_ntk() -> None:
    plain = rope_frequencies(H, THETA)
    np.testing.assert_allclose(rope_frequencies(H, THETA, LINEAR), plain / 4)
    ntk = rope_frequencies(H, THETA, NTK)
    np.testing.assert_allclose([ntk[0], ntk[-1]], [plain[0], plain[-1] / 4])  # from extrapolation to interpolation
    assert (np.diff(ntk / plain) < 0).all()


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    plain = rope_frequencies(H, THETA)
    waves, ratio = 2 * math.pi / plain, rope_frequencies(H, THETA, LLAMA3) / plain
    np.testing.assert_array_equal(ratio[waves < 256 / 4], 1)
    np.testing.assert_allclose(ratio[waves > 256], 1 / 4)
    between = (waves > 256 / 4) & (waves < 256)
    assert between.any()
    smooth = (256 / waves[between] - 1) / (4 - 1)
    np.testing.assert_allclose(ratio[between], smooth + (1 - smooth) / 4)


def test_yarn_at_the_trained_and_at_the_target_length() -> None:
    """Switched on by the two lengths alone: at the trained one it is plain RoPE, at four times that it is not."""
    model = Model(
        d_model=H, n_heads=1, max_seq_len=256, rope_scaling=RopeScaling(kind="yarn", original_max_seq_len=256)
    )
    plain = rope_frequencies(H, THETA)
    assert model.rope is not None
    np.testing.assert_allclose(rope_frequencies(*model.rope), plain, rtol=1e-15)
    assert rope_temperature(model.rope.scaling) == 1
    model = dataclasses.replace(model, max_seq_len=1024)
    assert model.rope is not None and model.rope.scaling.factor == 4
    ratio, turns = rope_frequencies(*model.rope) / plain, 256 * plain / (2 * math.pi)
    assert rope_temperature(model.rope.scaling) == pytest.approx(0.1 * math.log(4) + 1)
    np.testing.assert_allclose(ratio[turns > 32], 1)  # many turns: seen in full while training, so kept
    np.testing.assert_allclose(ratio[turns < 0.5], 1 / 4)  # never a full turn: interpolated
    assert (np.diff(ratio) <= 0).all() and ((ratio > 0.26) & (ratio < 0.99)).sum() >= 3


@pytest.mark.parametrize("low, high", [("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")])
def test_bounds_in_the_wrong_order_are_refused(low: str, high: str) -> None:
    with pytest.raises(ValueError, match=f"model.rope_scaling.{low} = 50.0 is not below model.rope_scaling.{high}"):
        RopeScaling(kind="yarn", original_max_seq_len=8, **{low: 50.0})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"kind": "linear", "factor": 0.5}, "model.rope_scaling.factor = 0.5 is below 1"),
        ({"kind": "linear"}, "kind = 'linear' with factor = 0.0 needs model.rope_scaling.original_max_seq_len"),
        ({"kind": "yarn", "factor": 2.0}, "kind = 'yarn' with factor = 2.0 needs"),
        ({"kind": "llama3", "factor": 2.0}, "kind = 'llama3' with factor = 2.0 needs"),
    ],
)
def test_scalings_that_say_too_little_are_refused(scaling: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**scaling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_first": 4}, "model.keep_first = 4 needs a window, model.window is 0"),
        ({"rotary_fraction": 1.5}, "model.rotary_fraction = 1.5 is above 1"),
        ({"rotary_fraction": 0.01}, "model.rotary_fraction = 0.01 rotates 0 of 64 elements"),
        ({"pattern": ("attention(keep_first=4)+mlp",)}, "model.keep_first = 4 needs a window"),
        ({"pattern": ("attention(positions=learned)+mlp",)}, "is neither 'rope' nor 'none'"),
        (
            {"max_seq_len": 64, "rope_scaling": RopeScaling(kind="yarn", original_max_seq_len=128)},
            "model.max_seq_len = 64 is below model.rope_scaling.original_max_seq_len = 128",
        ),
    ],
)
def test_attention_that_does_not_exist_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(**options)


def test_a_text_may_go_on_for_ever_if_no_block_looks_back_further_than_in_training() -> None:
    window = Model(max_seq_len=64, window=60, keep_first=4)
    assert window.streams
    assert not dataclasses.replace(window, keep_first=5).streams
    assert not dataclasses.replace(window, positions="learned").streams
    assert not dataclasses.replace(window, pattern=("attention+mlp", "attention(window=0, keep_first=0)+mlp")).streams
    assert dataclasses.replace(window, pattern=("mamba", "attention+mlp")).streams

"""Numbers of a config: what would make parameters NaN, or what no framework takes, is refused with its range."""

import dataclasses
import json
import math
import typing

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.config import Config, toml
from jaxlm.config.run import LARGEST_SEED
from jaxlm.errors import UserError
from jaxlm.text.sampling import Sampling, uniforms


def number_keys(cls: type = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            keys += number_keys(hint, f"{prefix}{name}.")
        elif getattr(hint, "__origin__", hint) in (int, float):
            keys.append(prefix + name)
    return keys


@pytest.mark.parametrize(
    "override",
    [
        "train.beta1=1.0",
        "train.beta2=1.0",
        "train.beta2=1.5",
        "train.learning_rate=inf",
        "train.weight_decay=inf",
        "train.final_lr_fraction=inf",
        "train.label_smoothing=1.0",
        "train.label_smoothing=2.0",
        "train.eps=1e-50",
        "train.clip_norm=nan",
        "train.decay_fraction=1.5",
        "model.norm_eps=1e-50",
        "model.moe.z_loss=inf",
        "sample.temperature=nan",
        "seed=-1",
        f"seed={2**64 - 1}",
        f"seed={LARGEST_SEED + 1}",
        "data.validation_fraction=nan",
    ],
)
def test_out_of_range_is_refused_by_name(tmp_path, override):
    path = tmp_path / "c.toml"
    path.write_text("")
    with pytest.raises(UserError) as error:
        toml.load(path, [override])
    assert override.partition("=")[0].rpartition(".")[2] in str(error.value)
    assert "\n" not in str(error.value)


def test_not_finite_is_refused_everywhere(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("")
    keys = number_keys()
    assert len(keys) > 60 and "train.learning_rate" in keys
    for key in keys:
        for text in ("inf", "nan", "-inf"):
            with pytest.raises(UserError):
                toml.load(path, [f"{key}={text}"])


NUMBERS = st.floats() | st.integers() | st.sampled_from([2**63 - 1, 2**63, 2**64, 1e-320, 1e308, -0.0, 10**400])


@settings(max_examples=400, deadline=None)
@given(key=st.sampled_from(number_keys()), number=NUMBERS)
@example(key="model.rotary_fraction", number=1e308)
@example(key="model.head_dim", number=10**400)
@example(key="model.d_model", number=10**400)
def test_any_number_is_taken_or_refused_in_a_line(tmp_path_factory, key, number):
    path = tmp_path_factory.getbasetemp() / "c.toml"
    path.write_text("")
    try:
        config = toml.load(path, [f"{key}={number}"])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        numbers = json.dumps(toml.to_dict(config))
        assert "NaN" not in numbers and "Infinity" not in numbers


@given(seed=st.integers())
def test_any_seed_draws_or_is_refused(seed):
    try:
        drawn = uniforms(seed, 1, 2)
    except UserError:
        assert not 0 <= seed <= LARGEST_SEED
    else:
        assert 0 <= drawn.min() <= drawn.max() < 1


@given(st.dictionaries(st.sampled_from(["temperature", "top_p", "min_p", "repetition_penalty"]), st.floats()))
def test_options_of_sampling_are_finite_or_refused(options):
    try:
        sampling = Sampling(**options)
    except UserError:
        return
    assert all(math.isfinite(value) for value in dataclasses.astuple(sampling))

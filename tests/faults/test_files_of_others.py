"""Whatever stands in a config.json, a config or the environment: it is taken, or refused in one line that names it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert.families import FAMILIES
from jaxlm.errors import UserError
from jaxlm.processes.meet import Place, find_place
from tests.convert.test_experts import PUBLISHED
from tests.convert.test_families import PUBLIC
from tests.convert.test_families_ssm import CODESTRAL, JAMBA, MAMBA_130M

FEW = st.none() | st.booleans() | st.sampled_from([-1, 0, 1, 3, 2**31, 2**70, 0.5, -0.0, 1e308, "", "gelu", "x", "1"])
VALUES = st.recursive(
    FEW,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
EXAMPLES = {family: said for family, _, said in PUBLIC.values()} | {
    **{family: said for family, said, *_ in PUBLISHED.values()},
    **{"mamba": MAMBA_130M, "mamba2": CODESTRAL, "jamba": JAMBA},
}


def read(family: str, said: dict[str, Any]) -> None:
    try:
        model = FAMILIES[family].config_from_hf(said, "config.json")
    except UserError as error:
        assert "\n" not in str(error) and "config.json" in str(error)
    else:
        assert isinstance(model, config.Model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_config_json_with_every_kind_of_value(family, caplog):
    for key in (*EXAMPLES[family], "head_dim", "layer_types", "quantization_config", "n_inner"):
        for value in (0, -1, None, True, 1.5, "x", [], [0], {}, {"a": 1}):
            read(family, EXAMPLES[family] | {key: value})


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_several_keys_of_config_json_at_once(data):
    family = data.draw(st.sampled_from(sorted(EXAMPLES)))
    keys = st.sampled_from(sorted(EXAMPLES[family]))
    read(family, EXAMPLES[family] | data.draw(st.dictionaries(keys, VALUES, min_size=2, max_size=4)))


WORDS = st.sampled_from(
    [
        "[model]",
        "d_model",
        "=",
        "1",
        "\n",
        '"',
        "[",
        "]",
        "{",
        "é",
        "\x00",
        "train.steps",
        "[[",
        "nan",
        "#",
        "\r",
        "\ufeff",
    ]
)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=60) | st.lists(WORDS, max_size=14).map(lambda words: " ".join(words).encode()))
def test_any_bytes_as_a_config(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    try:
        assert isinstance(toml.load(path), config.Config)
    except UserError as error:
        assert "\n" not in str(error) and "any.toml" in str(error)


NAMES = [
    "JAXLM_COORDINATOR",
    "JAXLM_PROCESSES",
    "JAXLM_PROCESS_ID",
    "JAX_COORDINATOR_ADDRESS",
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_STEP_NUM_NODES",
    "OMPI_COMM_WORLD_SIZE",
]
SETTINGS = st.sampled_from(
    ["", "0", "1", "2", "4", "-1", "x", "host:1", "host", ":", "node[3-4]", "node[", "1e3", " 2"]
)


@settings(max_examples=300, deadline=None)
@given(environment=st.dictionaries(st.sampled_from(NAMES), SETTINGS))
def test_any_environment_says_who_this_process_is_or_is_refused(environment):
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            place = find_place(config.Distributed(init_timeout=1), environment)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert place is None or (isinstance(place, Place) and 0 <= place.process_id < place.processes)

"""Refusals that say what a thing is and what to do about it."""

import json
from pathlib import Path

import pytest

from jaxlm.config.run import Distributed
from jaxlm.convert.canonical import Problems
from jaxlm.convert.files.side_files import content
from jaxlm.convert.open_model import open_model
from jaxlm.convert.write_model import Summary
from jaxlm.errors import UserError
from jaxlm.launch.job import Job
from jaxlm.processes.meet import find_place

INTERACTIVE = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
}


def test_a_step_of_one_task_trains_alone(capsys, monkeypatch):
    for name, value in INTERACTIVE.items():
        monkeypatch.setenv(name, value)
    assert find_place(Distributed(), INTERACTIVE) is None
    told = capsys.readouterr().err
    assert "SLURM_STEP_NUM_TASKS=1" in told and "SLURM_NTASKS=4" in told
    place = find_place(Distributed(), {**INTERACTIVE, "SLURM_STEP_NUM_TASKS": "4"})
    assert place is not None and place.processes == 4
    place = find_place(Distributed(), {**INTERACTIVE, "SLURM_STEP_NUM_TASKS": "2"})
    assert place is not None and place.processes == 2, "the step's, not the allocation's"


@pytest.mark.parametrize(
    "config, name",
    [("2024_run.toml", "run-2024-run"), ("a/B c.toml", "b-c"), ("7.toml", "run-7"), ("x" * 60 + ".toml", "x" * 40)],
)
def test_the_name_of_a_job_is_made_to_fit(config, name):
    assert Job(config).name == name


def test_a_file_without_ascii_needs_a_name():
    with pytest.raises(UserError, match="--name"):
        Job("実験.toml")
    assert Job("実験.toml", name="trial").name == "trial"


def test_an_adapter_is_called_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(UserError, match=r"an adapter of org/base, which cannot be opened: .*merge it"):
        open_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(UserError, match="names itself as the base"):
        open_model(tmp_path)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "generation_config.json"
    path.write_text("{}")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(UserError, match=r"generation_config.json: cannot be read: Permission denied"):
        content(path)


@pytest.mark.parametrize(
    ("kinds", "hint"),
    [
        ({"no float": ["a F8_E4M3"], "not expected": ["a_scale"]}, "dequantise them first"),
        ({"missing": ["a"]}, "does the config belong to these weights?"),
        ({"NaN or infinite": ["a"]}, "take an earlier checkpoint"),
        ({"in another dtype than b": ["a float16"]}, "in one dtype"),
    ],
)
def test_a_hint_is_about_the_fault(kinds: dict[str, list[str]], hint: str) -> None:
    problems = Problems()
    for kind, names in kinds.items():
        problems.add(kind, names)
    with pytest.raises(UserError) as caught:
        problems.refuse("model")
    assert caught.value.hint is not None and hint in caught.value.hint


def test_only_large_conversions_have_a_rate() -> None:
    small, large = (str(Summary(Path("x"), "llama", 3, size, 2.0)) for size in (10_000, 4_000_000_000))
    assert small == "x: llama, 3 tensors, 0.0 MB in 2.0 s" and large.endswith("in 2.0 s, 2.00 GB/s")

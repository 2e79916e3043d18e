"""Kubernetes manifests: what the API's published models accept, and what the files of `launch/` show."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import yaml

from jaxlm.errors import UserError
from jaxlm.launch.job import FOLDER, Job
from jaxlm.launch.jobset import Kubernetes, jobset

IMAGE = "us-docker.pkg.dev/my-project/jaxlm/jaxlm"
GPU = Kubernetes(f"{IMAGE}:gpu", nodes=2, gpus=8, claim="runs")
TPU = Kubernetes(f"{IMAGE}:tpu", topology="v5p:4x4x4", slices=2, claim="runs")
JOB = Job("configs/quickstart.toml", storage="/mnt/jaxlm")
ODD = ('sample.prompts=["a: b"]', "seed=1")
CASES = {
    "gpu": (JOB, GPU),
    "tpu": (JOB, TPU),
    "cpu": (Job("configs/quickstart.toml", ODD, "cpu", restarts=0), Kubernetes("jaxlm:x")),
    "spot": (JOB, Kubernetes(f"{IMAGE}:tpu", topology="v6e:4x8", spot=True)),
}


def manifest(job: Job, asked: Kubernetes) -> Any:
    return yaml.safe_load(jobset(job, asked))


def of_slice(tree: Any) -> Any:
    """The specification of the Job of one slice."""
    return tree["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(job: Job, asked: Kubernetes) -> Any:
    return of_slice(manifest(job, asked))["template"]["spec"]


def rejected(tree: Any) -> list[str]:
    """What the models of JobSet v1alpha2 and Kubernetes, generated from their OpenAPI schemas, do not take."""
    try:
        models = importlib.import_module("kubeflow_trainer_api.models")
    except ModuleNotFoundError:
        pytest.skip("kubeflow-trainer-api, with the schemas of JobSet, is not installed (extra dev)")
    try:
        taken = models.JobsetV1alpha2JobSet.from_dict(tree).to_dict()
    except ValueError as error:
        return [str(error)]
    return [] if taken == tree else [f"unknown keys: {taken} is left of {tree}"]


@pytest.mark.parametrize("case", CASES)
def test_the_published_schemas_accept_it(case: str) -> None:
    assert rejected(manifest(*CASES[case])) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("completionmode", "Indexed"),
        ("podFailurePolicy", {"rules": [{"onExitCodes": {"operator": "In", "values": [2]}}]}),
        ("completions", "two"),
        ("template", {"spec": {"containers": [{"image": "x"}]}}),
    ],
)
def test_the_schemas_refuse_a_planted_fault(key: str, value: Any) -> None:
    tree = manifest(JOB, GPU)
    of_slice(tree)[key] = value
    assert rejected(tree)


@pytest.mark.parametrize(("file", "asked"), [("jobset-gpu.yaml", GPU), ("jobset-tpu.yaml", TPU)])
def test_the_files_to_take_by_hand_are_what_the_command_writes(file: str, asked: Kubernetes) -> None:
    comments, text = (FOLDER / file).read_text().split("\n\n", 1)
    assert all(line.startswith("#") for line in comments.splitlines())
    assert text == jobset(JOB, asked)


def test_a_mistake_fails_at_once_and_all_else_is_started_again() -> None:
    """Exit code 2 makes the Job fail for the reason PodFailurePolicy, and only that reason fails the JobSet."""
    tree = manifest(JOB, GPU)
    mistake = {"containerName": "train", "operator": "In", "values": [2]}
    assert of_slice(tree)["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": mistake}]
    rule = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert tree["spec"]["failurePolicy"] == {"maxRestarts": 20, "rules": [rule]}
    assert of_slice(tree)["backoffLimit"] == 0
    assert pod(JOB, GPU)["restartPolicy"] == "Never"  # what podFailurePolicy needs


def test_the_processes_find_each_other() -> None:
    """The first pod's name is JOBSET-REPLICATEDJOB-0-0, under the subdomain of the headless service."""
    tree = manifest(JOB, GPU)
    variables = {one["name"]: one for one in pod(JOB, GPU)["containers"][0]["env"]}
    assert tree["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": "quickstart"}
    assert variables["JAXLM_COORDINATOR"]["value"] == "quickstart-worker-0-0.quickstart:8476"
    assert variables["JAXLM_PROCESSES"]["value"] == "2" == str(of_slice(tree)["completions"])
    assert of_slice(tree)["completionMode"] == "Indexed"
    assert "job-completion-index" in variables["JAXLM_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]


def test_a_tpu_topology_says_hosts_and_chips() -> None:
    tree = manifest(JOB, TPU)
    assert (of_slice(tree)["completions"], of_slice(tree)["parallelism"]) == (16, 16)
    assert tree["spec"]["replicatedJobs"][0]["replicas"] == 2
    container = pod(JOB, TPU)["containers"][0]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert "--devices 128" in container["command"][2]
    assert "env" not in container  # JAX reads GKE's variables
    one_host = Kubernetes("x", topology="v6e:1x1")
    assert pod(JOB, one_host)["containers"][0]["resources"]["limits"] == {"google.com/tpu": 1}


def test_the_command_is_the_contract() -> None:
    shell, flag, line = pod(JOB, GPU)["containers"][0]["command"]
    told = "configs/quickstart.toml distributed.init_timeout=1800 out_dir=/mnt/jaxlm/runs/quickstart"
    told += " data.cache_dir=/mnt/jaxlm/cache"
    assert (shell, flag) == ("sh", "-c")
    assert line == f"jaxlm launch preflight {told} --devices 16 && exec jaxlm train {told} --resume"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Kubernetes("x", topology="v5p:4x4"), r"--topology v5p:4x4 is not of the form v5p:4x4x4"),
        (Kubernetes("x", topology="v6e:4x4x4"), r"not of the form v6e:4x4$"),
        (Kubernetes("x", topology="v5:4x4"), r"unknown TPU 'v5'"),
        (Kubernetes("x", topology="v5p:1x1x6"), r"6 chips are no whole number of hosts of 4"),
        (Kubernetes("x", topology="v5p:4x4x4", gpus=8), r"TPUs or GPUs"),
        (Kubernetes("x\nkind: Pod"), r"--image"),
        (Kubernetes("x", claim="a b"), r"--claim"),
    ],
)
def test_what_is_refused(asked: Kubernetes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        jobset(JOB, asked)


def test_a_claim_needs_a_folder() -> None:
    with pytest.raises(UserError, match="give --storage"):
        jobset(Job("a.toml"), GPU)

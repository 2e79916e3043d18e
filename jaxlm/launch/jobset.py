"""A run as a Kubernetes JobSet: one pod a node, all of them started again together when one fails.

API: jobset.sigs.k8s.io, v1alpha2; the rule on exit codes needs JobSet 0.6 or newer and Kubernetes 1.31 or newer.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from typing import Any

import yaml

from jaxlm.errors import UserError, did_you_mean
from jaxlm.launch.job import IMAGE, Job, checked

TPUS = {
    "v4": ("tpu-v4-podslice", 3, 4),
    "v5e": ("tpu-v5-lite-podslice", 2, 4),
    "v5p": ("tpu-v5p-slice", 3, 4),
    "v6e": ("tpu-v6e-slice", 2, 4),
}
"""GKE's name of a TPU, the dimensions of its torus, and the chips of one host of a slice of many hosts."""
PORT = 8476
USERS_MISTAKE = 2
SPOT = "cloud.google.com/gke-spot"
PODS_COME_IN = "distributed.init_timeout=1800"
"""Machines may be made for the pods, one after another."""


@dataclasses.dataclass(frozen=True)
class Kubernetes:
    """What is asked of the cluster."""

    image: str
    nodes: int = 1
    """Pods with GPUs, or with CPUs alone; for TPUs the topology says it."""
    gpus: int = 0
    """Of each pod."""
    topology: str = ""
    """A TPU slice, as `jaxlm plan` takes it: v5p:4x4x4, v6e:8x8."""
    slices: int = 1
    claim: str = ""
    """A PersistentVolumeClaim (ReadWriteMany) that is mounted at the storage folder."""
    grace: int = 300
    """Seconds from SIGTERM to SIGKILL."""
    spot: bool = False
    """On machines that may be taken away (GKE)."""


def jobset(job: Job, asked: Kubernetes) -> str:
    """The manifest, as YAML.

    Raises:
        UserError: a value is not of its form, or accelerators of two kinds are asked for.
    """
    checked("--image", asked.image, IMAGE)
    if asked.topology and asked.gpus:
        raise UserError(f"--topology {asked.topology} and --gpus {asked.gpus}", "TPUs or GPUs")
    if asked.claim and not job.storage:
        raise UserError(f"--claim {asked.claim} is to be mounted, but not where", "give --storage /mnt/run")
    pods, limits, selector, devices = _machines(asked)
    job = dataclasses.replace(job, devices=job.devices or devices)
    if not any(one.startswith("distributed.init_timeout=") for one in job.overrides):
        job = dataclasses.replace(job, overrides=(*job.overrides, PODS_COME_IN))
    annotations = {}
    if asked.topology:
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, **({"annotations": annotations} if annotations else {})},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name},
            "failurePolicy": {
                "maxRestarts": job.restarts,
                "rules": [  # the only reason of this kind below is the user's mistake
                    {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [
                {
                    "name": "worker",
                    "replicas": asked.slices if asked.topology else 1,
                    "template": {"spec": _slice(job, asked, pods, limits, selector)},
                }
            ],
        },
    }
    return yaml.safe_dump(manifest, sort_keys=False, width=120)


def _slice(job: Job, asked: Kubernetes, pods: int, limits: dict[str, int], selector: dict[str, str]) -> dict[str, Any]:
    """The Job of one slice: it fails when one of its pods does."""
    mistake = {"containerName": "train", "operator": "In", "values": [USERS_MISTAKE]}
    return {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mistake}]},
        "template": {"spec": _pod(job, asked, pods, limits, selector)},
    }


def _pod(job: Job, asked: Kubernetes, pods: int, limits: dict[str, int], selector: dict[str, str]) -> dict[str, Any]:
    mounts, volumes = [{"name": "shm", "mountPath": "/dev/shm"}], [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    if asked.claim:
        mounts.append({"name": "storage", "mountPath": job.storage})
        claim = {"claimName": checked("--claim", asked.claim, r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")}
        volumes.append({"name": "storage", "persistentVolumeClaim": claim})
    container = {
        "name": "train",
        "image": asked.image,
        "command": ["sh", "-c", f"{_line(job.preflight)} && exec {_line(job.train)}"],
        "env": [] if asked.topology else _environment(job, pods),
        "resources": {"limits": limits},
        "volumeMounts": mounts,
    }
    if asked.topology:  # GKE tells the processes of a slice, and of many slices, who they are
        container["securityContext"] = {"privileged": True, "runAsUser": 0}  # for the TPU's device files
    if not limits:
        del container["resources"]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": asked.grace,
        "containers": [{key: value for key, value in container.items() if value != []}],
        "volumes": volumes,
    }
    if not asked.topology:
        pod["securityContext"] = {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}
    if asked.spot:
        selector = selector | {SPOT: "true"}
    taints = [*limits, *([SPOT] if asked.spot else [])]
    if taints:  # nodes with accelerators turn other pods away
        pod["tolerations"] = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in taints]
    return pod | ({"nodeSelector": selector} if selector else {})


def _environment(job: Job, pods: int) -> list[dict[str, Any]]:
    """Who a process is: process 0 is the first pod, which the headless service of the JobSet names."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "JAXLM_COORDINATOR", "value": f"{job.name}-worker-0-0.{job.name}:{PORT}"},
        {"name": "JAXLM_PROCESSES", "value": str(pods)},
        {"name": "JAXLM_HOSTS", "value": str(pods)},
        {"name": "JAXLM_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def _machines(asked: Kubernetes) -> tuple[int, dict[str, int], dict[str, str], int]:
    """Pods of a slice, accelerators of a pod, the nodes that have them, and accelerators in all."""
    if not asked.topology:
        limits = {"nvidia.com/gpu": asked.gpus} if asked.gpus else {}
        return asked.nodes, limits, {}, asked.nodes * asked.gpus
    kind, _, shape = asked.topology.partition(":")
    if kind not in TPUS:
        raise UserError(f"--topology {asked.topology}: unknown TPU {kind!r}", did_you_mean(kind, TPUS))
    accelerator, dimensions, of_host = TPUS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{dimensions - 1}}}", shape):
        example = "x".join("4" * dimensions)
        raise UserError(f"--topology {asked.topology} is not of the form {kind}:{example}")
    chips = math.prod(map(int, shape.split("x")))
    of_host = chips if chips < of_host else of_host
    if chips % of_host:
        raise UserError(f"--topology {asked.topology}: {chips} chips are no whole number of hosts of {of_host}")
    selector = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": shape}
    return chips // of_host, {"google.com/tpu": of_host}, selector, chips * asked.slices


def _line(words: list[str]) -> str:
    return shlex.join(["jaxlm", *words])

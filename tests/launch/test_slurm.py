"""A real SLURM on this machine: munged, slurmctld and one slurmd of Debian's packages, under a folder in /tmp.

A job of two tasks trains the quickstart. It is told to stop, saves, queues itself again, resumes and finishes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxlm.launch.job import Job
from jaxlm.launch.slurm import Slurm, sbatch
from tests.waiting import HANGS

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONF = """
ClusterName=here
SlurmctldHost={host}
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=20
JobRequeue=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=gpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

pytestmark = pytest.mark.soak


class Cluster:
    """One node, controller and worker in one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        self.environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def state(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        return dict(word.split("=", 1) for word in self.call("scontrol", "show", "job", job).split() if "=" in word)

    def until(self, what: str, reached: Callable[[], Any], seconds: float = HANGS) -> None:
        """Wait until `reached`."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"{what}: not in {seconds} s\n{self.logs()}"
            time.sleep(0.5)

    def logs(self) -> str:
        return "\n".join(f"== {log}\n{log.read_text()[-4000:]}" for log in self.folder.glob("*.log"))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    missing = [name for name in PROGRAMS if not shutil.which(name, path="/usr/sbin:/usr/bin")]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid():
        pytest.skip("slurmd starts tasks as their user, which needs root")
    with tempfile.TemporaryDirectory(prefix="jaxlm-slurm-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        for part in ("state", "spool"):
            (folder / part).mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge.key").chmod(0o400)
        ports = {"controller": free_port(), "daemon": free_port()}
        conf = CONF.format(host=socket.gethostname().split(".")[0], folder=folder, cpus=os.cpu_count(), **ports)
        (folder / "slurm.conf").write_text(conf)
        cluster = Cluster(folder)
        paths = [
            f"--{kind}={folder}/munge.{kind.split('-')[0]}" for kind in ("socket", "key-file", "pid-file", "seed-file")
        ]
        stack.enter_context(started(cluster, "munged", "--foreground", "--force", *paths))
        cluster.until("munged", (folder / "munge.socket").exists, 30)
        stack.enter_context(started(cluster, "slurmctld", "-D"))
        stack.enter_context(started(cluster, "slurmd", "-D"))
        cluster.until("slurmd", lambda: "idle" in sinfo(cluster), 60)
        yield cluster
        subprocess.run(["scancel", "--user=root"], env=cluster.environment, timeout=60)
        time.sleep(1)


def sinfo(cluster: Cluster) -> str:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=cluster.environment, capture_output=True, text=True, timeout=30
    )
    return done.stdout


@contextlib.contextmanager
def started(cluster: Cluster, program: str, *options: str) -> Iterator[None]:
    """A daemon in the foreground, for as long as it is entered."""
    environment = {**cluster.environment, "PATH": f"/usr/sbin:{os.environ['PATH']}"}
    with (cluster.folder / f"{program}.log").open("wb") as log:
        process = subprocess.Popen([program, *options], env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(15)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def submit(cluster: Cluster, folder: Path, *overrides: str, port: int = 0, **asked: Any) -> tuple[str, Path]:
    """Generate the script of the quickstart, ask SLURM whether it would run it, and submit it: job id and log.

    With a `port`, processes are told who they are, as where one has several GPUs.
    """
    job = Job("configs/quickstart.toml", overrides, storage=str(folder), restarts=3)
    path = folder / "run.sbatch"
    text = sbatch(job, Slurm(processes=2, partition="gpu", python=sys.executable, **asked))
    path.write_text(text.replace("coordinator_port=0", f"coordinator_port={port}"))
    log = folder / "job.log"
    print(cluster.call("sbatch", "--test-only", str(path)))
    answer = cluster.call("sbatch", f"--output={log}", str(path))
    return answer.split()[-1], log


def steps(folder: Path) -> list[int]:
    rows = (folder / "runs/quickstart/metrics.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, rows) if "step" in row]


SHORT = ("train.steps=400", "train.batch_size=2", "data.seq_len=64", "log.every=1", "data.max_bytes=400_000")
SMALLER = ("tokenizer.kind=bytes", "model.n_layers=2", "eval.every=0", "eval.batches=1", "checkpoint.every=5")


@pytest.mark.parametrize("stopped_by", ["scancel", "time limit", "kill -9"])
def test_a_job_of_two_tasks_is_requeued_and_resumes(cluster: Cluster, tmp_path: Path, stopped_by: str) -> None:
    many = "train.steps=100_000" if stopped_by == "time limit" else "train.steps=400"
    asked = {"time": "00:03:00", "save_before": 60} if stopped_by == "time limit" else {}
    job, log = submit(cluster, tmp_path, *SHORT, *SMALLER, many, "sample.prompts=[]", **asked)
    metrics = tmp_path / "runs/quickstart/metrics.jsonl"
    cluster.until("the first steps", lambda: metrics.exists() and len(steps(tmp_path)) > 5)
    if stopped_by == "scancel":
        cluster.call("scancel", "--signal=TERM", job)  # as for a preemption: to the tasks
    if stopped_by == "kill -9":
        os.kill(task(cluster, job, "1"), signal.SIGKILL)
    cluster.until("the requeue", lambda: int(cluster.state(job)["Restarts"]) > 0)
    text = log.read_text()
    if stopped_by == "kill -9":
        assert re.search(r"exit code (?!75|2\b)\d+: queued again \(1 of 3\)", text)
        saved = r"\d+"
    else:
        assert "exit code 75: queued again (1 of 3)" in text
        saved = re.search(r"SIGTERM: saved step (\d+)", text)[1]  # pyright: ignore[reportOptionalSubscript]
    if stopped_by != "time limit":
        cluster.until("the end", lambda: cluster.state(job)["JobState"] not in {"PENDING", "RUNNING", "COMPLETING"})
        assert cluster.state(job)["JobState"] == "COMPLETED", log.read_text()
        assert sorted(set(steps(tmp_path))) == list(range(1, 401))
    cluster.until("the resumption", lambda: re.search(f"resuming .* from step {saved}", log.read_text()))
    text = log.read_text()
    assert "devices     2 (cpu), processes: 2" in text
    print(text)


def task(cluster: Cluster, job: str, number: str) -> int:
    """The process of one task of a job's training."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        environ = Path("/proc", pid, "environ")
        with contextlib.suppress(OSError):
            variables = environ.read_bytes().split(b"\0")
            mine = f"SLURM_CONF={cluster.folder}/slurm.conf".encode() in variables
            command = environ.with_name("cmdline").read_bytes().split(b"\0")
            if mine and f"SLURM_PROCID={number}".encode() in variables and b"train" in command:
                return int(pid)
    raise AssertionError(f"no task {number} of job {job}")


def test_a_mistake_is_not_started_again(cluster: Cluster, tmp_path: Path) -> None:
    job, log = submit(cluster, tmp_path, *SHORT, *SMALLER, "mesh.data=3", port=free_port())
    cluster.until("the end", lambda: cluster.state(job)["JobState"] in {"FAILED", "COMPLETED"})
    state, text = cluster.state(job), log.read_text()
    print(text)
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", "2:0"), text
    assert "devices     2 (cpu), processes: 2" in text and "exit code 2, a mistake to mend: not started again" in text

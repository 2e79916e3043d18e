"""`jaxlm launch slurm|jobset|tpu|ssh|preflight`: other machines, and what is checked before the first step."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file or a name.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Options that differ from the file.")
]
Out = Annotated[Path, typer.Option(help="The file to write.", show_default=False)]
Name = Annotated[str, typer.Option(help="Of the job and of the run; default: from the config.")]
Storage = Annotated[str, typer.Option(help="A folder that all hosts share, for the run and the cache.")]
Restarts = Annotated[int, typer.Option(min=0, help="How often to start again after a preemption or a failure.")]
Image = Annotated[str, typer.Option(help="The container image; see launch/Dockerfile.", show_default=False)]


class Capacity(StrEnum):
    """How machines are paid for."""

    on_demand = "on-demand"
    spot = "spot"
    reserved = "reserved"


@app.command()
def slurm(
    config: Config,
    out: Out,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each node; 0: none are asked for.")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="On each node; 0: one for each GPU, or one.")] = 0,
    cpus: Annotated[int, typer.Option(min=0, help="CPUs of each process; 0: the cluster's default.")] = 0,
    time: Annotated[str, typer.Option(help="Time limit of one start, as [D-]HH:MM:SS.")] = "1-00:00:00",
    partition: Annotated[str, typer.Option(help="Partition.")] = "",
    account: Annotated[str, typer.Option(help="Account.")] = "",
    image: Annotated[str, typer.Option(help="A container, started by pyxis.")] = "",
    apptainer: Annotated[bool, typer.Option("--apptainer", help="Start the container by apptainer.")] = False,
    python: Annotated[str, typer.Option(help="An interpreter that has jaxlm; default: jaxlm on the PATH.")] = "",
    save_before: Annotated[int, typer.Option(min=30, help="Seconds before the time limit to save and leave.")] = 300,
    name: Name = "",
    storage: Storage = "",
    restarts: Restarts = 20,
) -> None:
    """Write a script for sbatch that trains CONFIG, one process for each GPU."""
    from jaxlm.launch.job import Job, write
    from jaxlm.launch.slurm import Slurm, sbatch

    job = Job(config, tuple(overrides or ()), name, storage, restarts=restarts)
    asked = Slurm(nodes, gpus, processes, cpus, time, partition, account, image, apptainer, python, save_before)
    job.check_config()
    write(sbatch(job, asked), out, "sbatch")


@app.command()
def jobset(
    config: Config,
    out: Out,
    image: Image,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Pods, unless a topology says it.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each pod.")] = 0,
    topology: Annotated[str, typer.Option(help="A TPU slice: v5p:4x4x4, v6e:8x8, v5e:4x4, v4:2x2x4.")] = "",
    slices: Annotated[int, typer.Option(min=1, help="TPU slices.")] = 1,
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim to mount at the storage folder.")] = "",
    grace: Annotated[int, typer.Option(min=1, help="Seconds from SIGTERM to SIGKILL.")] = 300,
    spot: Annotated[bool, typer.Option("--spot", help="On spot machines (GKE).")] = False,
    name: Name = "",
    storage: Storage = "",
    restarts: Restarts = 20,
) -> None:
    """Write a Kubernetes JobSet that trains CONFIG, one process in each pod."""
    from jaxlm.launch.job import Job, write
    from jaxlm.launch.jobset import Kubernetes
    from jaxlm.launch.jobset import jobset as manifest

    job = Job(config, tuple(overrides or ()), name, storage, restarts=restarts)
    asked = Kubernetes(image, nodes, gpus, topology, slices, claim, grace, spot)
    job.check_config()
    write(manifest(job, asked), out, "kubectl apply -f")


@app.command()
def tpu(
    config: Config,
    out: Out,
    accelerator: Annotated[str, typer.Option(help="As v5p-64 or v6e-16.", show_default=False)],
    image: Image,
    zone: Annotated[str, typer.Option(help="As us-east5-a.", show_default=False)],
    project: Annotated[str, typer.Option(help="The Google Cloud project.", show_default=False)],
    nfs: Annotated[str, typer.Option(help="SERVER:/EXPORT to mount at the storage folder.", show_default=False)],
    overrides: Overrides = None,
    queued: Annotated[bool, typer.Option("--queued", help="As a queued resource.")] = False,
    capacity: Annotated[Capacity, typer.Option(help="How the machines are paid for.")] = Capacity.on_demand,
    name: Name = "",
    storage: Storage = "/mnt/jaxlm",
    restarts: Restarts = 20,
) -> None:
    """Write a script of gcloud commands that trains CONFIG on a Cloud TPU slice."""
    from jaxlm.launch.job import Job, write
    from jaxlm.launch.tpu import CloudTpu, script

    job = Job(config, tuple(overrides or ()), name, storage, restarts=restarts)
    asked = CloudTpu(accelerator, image, zone, project, nfs, "" if capacity == "on-demand" else capacity.value)
    job.check_config()
    write(script(job, asked, queued=queued), out, "bash", executable=True)


Hosts = Annotated[Path, typer.Argument(metavar="HOSTS", help="A file with a host on each line.", show_default=False)]
Words = Annotated[list[str], typer.Argument(metavar="-- VERB ...", help="What runs on each: train CONFIG ...")]
Coordinator = Annotated[str, typer.Option(help="Process 0's address for the others; default: the first host.")]
RemotePython = Annotated[str, typer.Option(help="An interpreter there that has jaxlm; default: jaxlm.")]
RemoteFolder = Annotated[str, typer.Option(help="Where to start there; default: the folder current here.")]
Ssh = Annotated[str, typer.Option(help="The command, with options of its own.")]
Grace = Annotated[int, typer.Option(min=1, help="Seconds from SIGTERM to SIGKILL.")]


@app.command()
def ssh(
    hosts: Hosts,
    words: Words,
    coordinator: Coordinator = "",
    python: RemotePython = "",
    folder: RemoteFolder = "",
    ssh: Ssh = "ssh",
    grace: Grace = 300,
    restarts: Annotated[int, typer.Option(min=0, help="Start again so often after a failure, with --resume.")] = 0,
    logs: Annotated[Path, typer.Option(help="Folder of process-N.log.")] = Path("logs"),
) -> None:
    """Start a verb on hosts that ssh reaches, one process a line of HOSTS; all are stopped when one fails."""
    from jaxlm.launch.ssh import Remote, launch_remotely

    remote = Remote(hosts, coordinator, python, folder, ssh, grace)
    if code := launch_remotely(remote, words, restarts=restarts, logs=logs):
        raise typer.Exit(code)


@app.command(hidden=True)
def on_host(
    hosts: Hosts,
    words: Words,
    coordinator: Coordinator = "",
    python: RemotePython = "",
    folder: RemoteFolder = "",
    ssh: Ssh = "ssh",
    grace: Grace = 300,
) -> None:
    """One of the processes of `launch ssh`."""
    from jaxlm.launch.ssh import Remote
    from jaxlm.launch.ssh import on_host as start

    if code := start(Remote(hosts, coordinator, python, folder, ssh, grace), words):
        raise typer.Exit(code)


@app.command()
def preflight(
    config: Config,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=0, help="Devices that there should be in all; 0: any number.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The JSON; default: preflight.json in the run.")] = None,
) -> None:
    """Check versions, devices, storage, clocks and links in all processes of a run; exit code 1 if any is wrong."""
    from jaxlm.config import toml
    from jaxlm.launch.preflight import preflight as check

    if not check(toml.load(config, overrides or ()), devices=devices, out=out):
        raise typer.Exit(1)

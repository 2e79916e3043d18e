"""A run under SLURM: `launch/slurm.sbatch` with other values."""

from __future__ import annotations

import dataclasses
import re

from jaxlm.errors import UserError
from jaxlm.launch.job import FOLDER_PATH, IMAGE, WORD, Job, checked, filled

TIME = r"(\d+-)?\d{1,3}(:\d{1,2}){0,2}"
COORDINATOR_PORT = 8476


@dataclasses.dataclass(frozen=True)
class Slurm:
    """What is asked of SLURM. Empty: the cluster's default."""

    nodes: int = 1
    gpus: int = 0
    """Of each node; 0: no GPUs are asked for."""
    processes: int = 0
    """On each node; 0: one for each GPU, or one."""
    cpus: int = 0
    """Of each process; 0: SLURM's default."""
    time: str = "1-00:00:00"
    partition: str = ""
    account: str = ""
    image: str = ""
    """A container: with pyxis `registry#name:tag` or a .sqsh file, with apptainer a .sif file or a docker:// name."""
    apptainer: bool = False
    """Start the container by apptainer, not by pyxis."""
    python: str = ""
    """An interpreter that has jaxlm; empty: `jaxlm` as the shell of `sbatch` or the container finds it."""
    save_before: int = 300
    """Seconds before the time limit when the run receives the signal to save and leave."""

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.processes or self.gpus or 1


def sbatch(job: Job, asked: Slurm) -> str:
    """The script.

    Raises:
        UserError: a value is not of its form, or the GPUs do not divide among the processes.
    """
    checked("--time", asked.time, TIME)
    if asked.gpus and asked.tasks not in (1, asked.gpus):
        raise UserError(f"{asked.processes} processes for {asked.gpus} GPUs of a node", "one, or one for each GPU")
    together = asked.gpus > 1 and asked.tasks == 1
    step, container = _container(job, asked)
    text = filled(
        "slurm.sbatch",
        {
            "jaxlm": [checked("--python", asked.python, FOLDER_PATH), "-m", "jaxlm"] if asked.python else ["jaxlm"],
            "step": step,
            "container": container,
            "arguments": job.arguments,
            "devices": job.devices or asked.nodes * asked.gpus,
            "restarts": job.restarts,
            "coordinator_port": COORDINATOR_PORT if together else 0,
        },
    )
    directives = {
        "job-name": job.name,
        "nodes": asked.nodes,
        "ntasks-per-node": asked.tasks,
        "time": asked.time,
        "signal": f"TERM@{asked.save_before}",
        "cpus-per-task": asked.cpus,
        "gpus-per-node": asked.gpus,
        "partition": asked.partition and checked("--partition", asked.partition, WORD),
        "account": asked.account and checked("--account", asked.account, WORD),
    }
    for name, value in directives.items():
        line = f"#SBATCH --{name}={value}\n" if value else ""
        text, found = re.subn(rf"(?m)^#SBATCH --{name}=.*\n", line, text)
        if not found:
            text = text.replace("#SBATCH --requeue\n", f"#SBATCH --requeue\n{line}")
    return text


def _container(job: Job, asked: Slurm) -> tuple[list[str], list[str]]:
    """Options of srun (pyxis), and the words before the command (apptainer). The working folder is mounted as it is."""
    if not asked.image:
        return [], []
    image = checked("--image", asked.image, rf"(docker://)?({IMAGE})")
    storage = [job.storage] if job.storage else []
    if asked.apptainer:
        binds = [word for folder in storage for word in ("--bind", folder)]
        return [], ["apptainer", "exec", *(["--nv"] if asked.gpus else []), *binds, image]
    mounts = "".join(f",{folder}:{folder}" for folder in storage)
    return [f"--container-image={image}", f"--container-mounts=.:/run/job{mounts}", "--container-workdir=/run/job"], []

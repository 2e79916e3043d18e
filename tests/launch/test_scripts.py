"""The scripts of `launch/`: read by shellcheck and hadolint, and run by bash with schedulers that only take notes."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.launch.job import FOLDER, Job
from jaxlm.launch.slurm import Slurm, sbatch
from jaxlm.launch.tpu import CloudTpu, script

SCRIPTS = ("slurm.sbatch", "tpu-vm.sh", "queued-resource.sh")
TPU = CloudTpu("v5p-64", "us-docker.pkg.dev/p/jaxlm/jaxlm:tpu", "us-east5-a", "p", "10.0.0.2:/share", "spot")
HOSTILE = 'out_dir=a\'; touch pwned; $(touch pwned) `touch pwned` "x" \\'


def tool(name: str) -> str:
    """A linter of the extra dev, beside the interpreter or on the PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not found:
        pytest.skip(f"{name} is not installed (extra dev)")
    return found


def lint(command: list[str], text: str) -> int:
    """The exit code of a linter that reads standard input."""
    return subprocess.run([*command, "-"], input=text, capture_output=True, text=True, timeout=60).returncode


def notes(folder: Path, *names: str) -> Path:
    """Programs that note their arguments in `notes` and leave with the code that `codes` has next, or 0."""
    folder.mkdir(exist_ok=True)
    (folder / "sleep").unlink(missing_ok=True)
    (folder / "sleep").symlink_to("/bin/true")
    for name in names:
        body = f"""#!/bin/bash
printf '%s\\x1f' {name} "$@" >> "$NOTES/notes"; printf '\\x1e' >> "$NOTES/notes"
[ -e "$NOTES/codes" ] || exit 0
code=$(head -n 1 "$NOTES/codes"); sed -i 1d "$NOTES/codes"; exit "${{code:-0}}"
"""
        (folder / name).write_text(body)
        (folder / name).chmod(0o755)
    return folder


def run(text: str, folder: Path, *programs: str, codes: str = "", **variables: str) -> tuple[int, list[list[str]], str]:
    """Run a script in `folder` with programs that take notes: exit code, the commands they were, what it printed."""
    (folder / "codes").write_text("\n".join(codes.split()) + "\n" if codes else "")
    (folder / "notes").write_text("")
    path = f"{notes(folder / 'bin', *programs)}:/usr/bin:/bin"
    environment = {"PATH": path, "NOTES": str(folder), **variables}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(["bash", "-s"], input=text, **options)
    told = [command.split("\x1f")[:-1] for command in (folder / "notes").read_text().split("\x1e")[:-1]]
    return done.returncode, told, done.stdout + done.stderr


def gcloud(text: str, state: str) -> str:
    """A script for a gcloud that says `state` of a TPU; the one that takes notes prints nothing."""
    return text.replace("--format 'value(state)' 2> /dev/null", f"--format 'value(state)' && echo {state}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    assert lint([tool("shellcheck")], (FOLDER / name).read_text()) == 0


def test_shellcheck_finds_nothing_in_what_is_filled_in() -> None:
    job, pyxis = Job("configs/quickstart.toml", (HOSTILE,), storage="/shared/x"), Slurm(2, 8, image="nvcr.io#jaxlm:gpu")
    for text in (sbatch(job, pyxis), script(job, TPU, queued=False), script(job, TPU, queued=True)):
        assert lint([tool("shellcheck"), "--severity", "warning"], text) == 0  # dollars in quotes are meant


def test_shellcheck_finds_a_planted_fault() -> None:
    text = (FOLDER / "slurm.sbatch").read_text().replace('"${arguments[@]}"', "$arguments")
    assert lint([tool("shellcheck")], text) == 1


def test_hadolint_finds_nothing() -> None:
    assert lint([tool("hadolint")], (FOLDER / "Dockerfile").read_text()) == 0


def test_hadolint_finds_a_planted_fault() -> None:
    text = (FOLDER / "Dockerfile").read_text().replace("--no-cache-dir ", "")
    assert lint([tool("hadolint")], text) == 1


def test_nothing_in_an_override_becomes_a_command(tmp_path: Path) -> None:
    job = Job("configs/quickstart.toml", (HOSTILE,), storage="/shared/x")
    code, told, _ = run(sbatch(job, Slurm()), tmp_path, "srun", "scontrol", SLURM_JOB_ID="7")
    assert code == 0
    assert HOSTILE in told[-1]
    _, told, _ = run(gcloud(script(job, TPU, queued=False), "READY"), tmp_path, "gcloud")
    as_the_worker_runs_it = told[-1][told[-1].index("--command") + 1]
    _, told, _ = run(as_the_worker_runs_it, tmp_path, "sudo", "mountpoint")
    inside = told[-1][-1]
    _, told, _ = run(inside, tmp_path, "jaxlm")
    assert [command[1] for command in told] == ["launch", "train"] and all(HOSTILE in command for command in told)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("codes", "started", "exit_code", "requeued"),
    [
        ("0 0", 0, 0, False),
        ("0 75", 0, 75, True),  # told to stop, saved
        ("0 1", 3, 1, True),
        ("1", 0, 1, True),  # the preflight failed: on the next nodes it may not
        ("0 2", 0, 2, False),  # a mistake
        ("0 75", 20, 75, False),  # often enough
    ],
)
def test_slurm_queues_again(codes: str, started: int, exit_code: int, requeued: bool, tmp_path: Path) -> None:
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(started)} if started else {"SLURM_JOB_ID": "7"}
    text = sbatch(Job("configs/quickstart.toml"), Slurm())
    code, told, printed = run(text, tmp_path, "srun", "scontrol", codes=codes, **variables)
    assert code == exit_code, printed
    assert (["scontrol", "requeue", "7"] in told) == requeued
    steps = [command for command in told if command[0] == "srun"]
    assert ["preflight" in command for command in steps] == [True, False][: len(codes.split())]


def test_slurm_directives() -> None:
    asked = Slurm(2, 8, cpus=12, time="12:00:00", partition="gpu", account="lab", save_before=120)
    text = sbatch(Job("a/My Config.toml"), asked)
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    wanted = "job-name=my-config nodes=2 ntasks-per-node=8 gpus-per-node=8 cpus-per-task=12 time=12:00:00 partition=gpu"
    wanted += " account=lab signal=TERM@120 requeue open-mode=append output=%x-%j.log"
    assert sorted(lines) == sorted(f"--{one}" for one in wanted.split())
    assert "\ndevices=16\n" in text
    assert "\ncoordinator_port=0\n" in text  # JAX reads SLURM's variables


def test_slurm_one_process_for_the_gpus_of_a_node(tmp_path: Path) -> None:
    """JAX's own detection would give it the GPU with its local number only."""
    text = sbatch(Job("configs/quickstart.toml"), Slurm(2, 8, processes=1))
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
    code, told, _ = run(text, tmp_path, "srun", "scontrol", **variables)
    assert code == 0
    assert ["scontrol", "show", "hostnames", "n[1-2]"] in told
    tasks = [command for command in told if command[0] == "srun"]
    assert len(tasks) == 2 and all("JAXLM_PROCESS_ID=" in command[command.index("-c") + 1] for command in tasks)


def test_slurm_containers() -> None:
    job = Job("a.toml", storage="/shared/x")
    pyxis = sbatch(job, Slurm(gpus=8, image="nvcr.io#my/jaxlm:gpu"))
    assert "--container-image=nvcr.io#my/jaxlm:gpu" in pyxis and ",/shared/x:/shared/x" in pyxis
    apptainer = sbatch(job, Slurm(gpus=8, image="/images/jaxlm.sif", apptainer=True))
    assert "\ncontainer=(apptainer exec --nv --bind /shared/x /images/jaxlm.sif)\n" in apptainer
    assert "\nstep=()\n" in apptainer


@pytest.mark.parametrize(
    ("codes", "exit_code", "verbs"),
    [
        ("0 0", 0, "describe ssh"),
        ("0 75 0 0", 0, "describe ssh describe ssh"),
        ("0 2", 2, "describe ssh"),
        ("1 0 0", 0, "describe create ssh"),
        ("1 1 1 0 0", 0, "describe create describe create ssh"),  # no capacity at first
    ],
)
def test_tpu_vm_starts_again(codes: str, exit_code: int, verbs: str, tmp_path: Path) -> None:
    text = script(Job("configs/quickstart.toml", storage="/mnt/jaxlm"), TPU, queued=False)
    text = text.replace(
        "value(state)'", "value(state)' && echo READY"
    )  # what gcloud prints, which only takes notes here
    code, told, printed = run(text, tmp_path, "gcloud", codes=codes)
    assert code == exit_code, printed
    assert [command[4] for command in told] == verbs.split()


def test_tpu_vm_gives_up(tmp_path: Path) -> None:
    job = Job("configs/quickstart.toml", storage="/mnt/jaxlm", restarts=1)
    text = gcloud(script(job, TPU, queued=False), "READY")
    code, told, printed = run(text, tmp_path, "gcloud", codes="0 1 0 1 0 1")
    assert (code, printed.splitlines()[-1]) == (1, "given up after 1 restarts")
    assert [command[4] for command in told] == ["describe", "ssh"] * 2


def test_tpu_vm_replaces_what_was_preempted(tmp_path: Path) -> None:
    text = gcloud(script(Job("configs/quickstart.toml", storage="/mnt/jaxlm"), TPU, queued=False), "PREEMPTED")
    _, told, _ = run(text, tmp_path, "gcloud", codes="0 0 0 2")
    assert [command[4] for command in told] == ["describe", "delete", "create", "ssh"]
    assert "--spot" in told[2] and told[2][told[2].index("--version") + 1] == "v2-alpha-tpuv5"


def test_the_queued_resource_starts_the_run_at_boot(tmp_path: Path) -> None:
    """The startup script is run as a worker would: the container, again after a failure, not after a mistake."""
    text = script(Job("configs/quickstart.toml", ("seed=1 2",), storage="/mnt/jaxlm"), TPU, queued=True)
    text = text.replace("trap 'rm -f \"$startup\"' EXIT", "trap 'cp \"$startup\" startup' EXIT")
    code, told, printed = run(text, tmp_path, "gcloud", codes="1")
    assert code == 0, printed
    assert [command[4] for command in told] == ["describe", "create"]
    # mkdir, mountpoint, configure-docker, then rm and run of the container, twice
    programs = ("mkdir", "mountpoint", "mount", "gcloud", "docker")
    code, told, _ = run((tmp_path / "startup").read_text(), tmp_path, *programs, codes="0 0 0 0 75 0 2")
    runs = [command for command in told if command[:2] == ["docker", "run"]]
    assert len(runs) == 2
    inside = shlex.split(runs[0][-1])
    assert inside[:3] == ["jaxlm", "launch", "preflight"] and "seed=1 2" in inside and inside[-1] == "--resume"
    assert inside[inside.index("--devices") + 1] == "32"  # v5p-64 counts cores


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Job("a.toml", name="A b"), "--name"),
        (lambda: Job("a.toml", storage="relative"), "--storage"),
        (lambda: Job("-x.toml"), "no such config"),
        (lambda: sbatch(Job("a.toml"), Slurm(gpus=8, processes=3)), "3 processes for 8 GPUs"),
        (lambda: sbatch(Job("a.toml"), Slurm(partition="a\n#SBATCH --uid=0")), "--partition"),
        (lambda: sbatch(Job("a.toml"), Slurm(time="1 day")), "--time"),
        (lambda: sbatch(Job("a.toml"), Slurm(image="x --privileged")), "--image"),
        (lambda: sbatch(Job("a.toml"), Slurm(python="python -c 'x'")), "--python"),
        (lambda: script(Job("a.toml"), TPU, queued=False), "give --storage"),
    ],
)
def test_what_is_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"accelerator": "v5p-63"}, "counts cores"),
        ({"accelerator": "v9-8"}, "unknown TPU"),
        ({"accelerator": "v5p-8;x"}, "--accelerator"),
        ({"zone": "nowhere"}, "--zone"),
        ({"nfs": "10.0.0.2"}, "--nfs"),
        ({"project": "$(x)"}, "--project"),
    ],
)
def test_what_cloud_tpu_refuses(changed: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script(Job("a.toml", storage="/mnt/x"), dataclasses.replace(TPU, **changed), queued=True)


def test_a_config_that_is_here_is_checked_before_it_is_queued() -> None:
    with pytest.raises(UserError, match=r"unknown key 'train\.stepz'"):
        Job("configs/quickstart.toml", ("train.stepz=1",)).check_config()
    with pytest.raises(UserError, match="did you mean"):
        Job("dense-134mm").check_config()
    Job("/on/other/hosts.toml").check_config()


def test_what_the_user_overrides_goes_before_storage() -> None:
    job = Job("a.toml", ("out_dir=/mine",), storage="/shared")
    assert job.train == ["train", "a.toml", "out_dir=/mine", "data.cache_dir=/shared/cache", "--resume"]

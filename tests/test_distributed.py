"""Who a process is among others, and what is refused before it waits for them."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.processes import meet
from jaxlm.processes.meet import Place, difference, find_place, refuse_loopback

SAID = {"JAXLM_COORDINATOR": "node1:1234", "JAXLM_PROCESSES": "4", "JAXLM_PROCESS_ID": "3"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"}
SLURM |= {"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"
NONE = config.Distributed()


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ({}, {}, None),
        ({}, {"JAXLM_PROCESSES": "1"}, None),
        ({"processes": 1}, SAID, None),
        ({}, SAID, Place("node1:1234", 4, 3)),
        ({"coordinator": "a:1", "processes": 2, "process_id": 0}, SAID, Place("a:1", 2, 0)),
        ({}, {**SAID, "JAXLM_COORDINATOR": "", "JAX_COORDINATOR_ADDRESS": "b:2"}, Place("b:2", 4, 3)),
        ({"cluster": "none"}, SLURM, None),
        ({}, SLURM, Place("node3:61447", 4, 2, (1,))),
        ({"coordinator": "c:3"}, SLURM, Place("c:3", 4, 2, (1,))),
        ({}, {**SLURM, **SAID}, Place("node1:1234", 4, 3)),
    ],
)
def test_options_come_before_variables_and_variables_before_the_cluster(options, environment, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_place(dataclasses.replace(NONE, **options), environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAXLM_COORDINATOR": "a:1"}, r"not set: distributed.processes \(JAXLM_PROCESSES\), distributed.process_id"),
        ({**SAID, "JAXLM_PROCESS_ID": "4"}, "process_id 4 of 4 processes"),
        ({**SAID, "JAXLM_PROCESSES": "four"}, "JAXLM_PROCESSES='four' is not a number"),
        ({**SAID, "JAXLM_COORDINATOR": "node1"}, "'node1' is not HOST:PORT"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI started 2 processes"),
    ],
)
def test_what_is_said_in_part_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        find_place(NONE, environment)


@pytest.mark.parametrize("hosts", ["JAXLM_HOSTS", "SLURM_STEP_NUM_NODES", "SLURM_NNODES"])
@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "127.0.1.1:1", "[::1]:1"])
def test_a_loopback_coordinator_of_several_hosts_is_refused(hosts, address):
    refuse_loopback(Place(address, 2, 0), {hosts: "1"})
    if hosts != "JAXLM_HOSTS":  # `launch local` within a job of two nodes
        refuse_loopback(Place(address, 2, 0), {hosts: "2", "JAXLM_HOSTS": "1"})
    refuse_loopback(Place("192.0.2.1:1", 2, 0), {hosts: "2"})
    with pytest.raises(UserError, match="which on each of the 2 hosts is that host itself"):
        refuse_loopback(Place(address, 2, 0), {hosts: "2"})


def test_one_process_initialises_nothing(monkeypatch):
    monkeypatch.setattr(meet, "_reach", lambda *_: pytest.fail("waits"))
    assert meet.initialize(NONE) is None


@pytest.mark.parametrize(
    ("process_id", "message"),
    [
        (0, "process 0: not all 2 processes came to 127.0.0.1:"),
        (1, r"process 1: the coordinator 127.0.0.1:\d+ was not reached in 2 s: Connection refused"),
    ],
)
def test_a_peer_that_never_comes_ends_the_wait_in_one_line(process_id, message, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    me = [f"distributed.process_id={process_id}", "distributed.processes=2", "distributed.init_timeout=2"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxlm", "train", str(QUICKSTART), f"distributed.coordinator=127.0.0.1:{port}", *me],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=30,
    )
    (line,) = [line for line in done.stderr.splitlines() if "WARNING" not in line]
    assert done.returncode == 1  # another try may find it
    assert re.match("error: " + message, line), line


def test_what_differs_between_processes_is_told_with_who_has_what():
    facts = {"jax": "0.10.2", "corpus": "abc", "train.steps": 5}
    assert difference([facts, dict(facts), dict(facts)]) == ""
    other = {**facts, "corpus": "xyz"}
    expected = "the processes differ in corpus: abc on processes 0, 2; xyz on process 1"
    assert difference([facts, other, facts]) == expected
    assert difference([facts, {**facts, "new": 1}]).endswith("in new: absent on process 0; 1 on process 1")
    many = difference([facts, *[other] * 20])
    assert "in corpus: xyz on processes 1, 2, 3, 4, 5, 6, 7, 8 and 12 more; abc on process 0" in many

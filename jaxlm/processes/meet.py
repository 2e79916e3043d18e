"""Many processes, one program: how a process finds the others, and how it ends when it cannot.

`jax.distributed` does the work. A launcher that JAX does not know tells each process who it is, by options of
`[distributed]` or, as `jaxlm launch` does, by environment variables:

    JAXLM_COORDINATOR   HOST:PORT of process 0, as every process reaches it (JAX_COORDINATOR_ADDRESS serves too)
    JAXLM_PROCESSES     how many processes
    JAXLM_PROCESS_ID    which of them this one is, from 0
    JAXLM_HOSTS         on how many hosts they run, if known: a loopback coordinator is refused when it is above 1

Under SLURM, Open MPI and Cloud TPU no setting is needed. One process without any of these initialises nothing, and does
not even import JAX, which is loaded while the corpus is opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxlm import config
from jaxlm.errors import MissingPeersError, UserError

MARGIN = 60
"""Seconds that JAX may wait longer than we do: its own way to end is an abort with a C++ stack."""
_DAY = 24 * 3600 * 1000  # milliseconds: one may prepare the corpus while the others wait; the dead are noticed anyway
_FAREWELL = 10_000  # milliseconds
_CLUSTERS = ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
_joined = False  # whether `initialize` has met others
_meetings = 0  # calls of `agree` and `from_first`, the same on every process


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among the others. `devices`: the only local devices it uses; None: all."""

    coordinator: str
    processes: int
    process_id: int
    devices: tuple[int, ...] | None = None


def initialize(options: config.Distributed) -> Place | None:
    """Meet the other processes of the run; call it before the first use of a device. None: there are no others.

    Raises:
        UserError: the identity of this process is incomplete, or the coordinator cannot be right.
        MissingPeersError: the coordinator or another process was not there in time.
    """
    place = find_place(options, os.environ)
    if place is None or place.processes == 1:
        return None
    import jax

    refuse_loopback(place, os.environ)
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    deadline = time.monotonic() + options.init_timeout
    if place.process_id:
        _reach(place, options.init_timeout)
    with _bounded(deadline, _nobody_came(place, options.init_timeout)):
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process_id,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=options.init_timeout + MARGIN,
            heartbeat_timeout_seconds=options.heartbeat_timeout,
        )
    global _joined
    _joined = True
    _leave_after_exceptions()
    return place


def several() -> bool:
    """True if this process is one of several that run the same program."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def is_first() -> bool:
    """True if this process is the first of several, or alone: it alone writes files and speaks."""
    return not several() or sys.modules["jax"].process_index() == 0


def find_place(options: config.Distributed, environment: Mapping[str, str]) -> Place | None:
    """Who this process is: options first, then environment variables, then the cluster that JAX detects.

    Raises:
        UserError: the settings are incomplete or contradict one another.
    """
    coordinator = options.coordinator or environment.get("JAXLM_COORDINATOR", "")
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS", "")
    processes = options.processes or _number(environment, "JAXLM_PROCESSES", 0)
    process_id = options.process_id if options.process_id >= 0 else _number(environment, "JAXLM_PROCESS_ID", -1)
    if processes == 1:
        return None
    if found := _detected(options, environment) if not (coordinator and processes and process_id >= 0) else None:
        coordinator = coordinator or found.coordinator
        processes, process_id = processes or found.processes, process_id if process_id >= 0 else found.process_id
    if not coordinator and not processes and process_id < 0:
        return None
    settings = {"coordinator": coordinator, "processes": processes, "process_id": process_id + 1}
    missing = [name for name, value in settings.items() if not value]
    if missing:
        names = ", ".join(f"distributed.{name} (JAXLM_{name.upper()})" for name in missing)
        raise UserError(f"one of several processes, but not set: {names}", "`jaxlm launch local` sets all of them")
    if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"the coordinator {coordinator!r} is not HOST:PORT")
    if process_id >= processes:
        raise UserError(f"process_id {process_id} of {processes} processes", "they are counted from 0")
    return Place(coordinator, processes, process_id, found.devices if found else None)


def refuse_loopback(place: Place, environment: Mapping[str, str]) -> None:
    """A coordinator at 127.0.0.1 is another machine on every host, and all of them wait for ever.

    Raises:
        UserError: the coordinator resolves to a loopback address and the processes run on several hosts.
    """
    counts = (_number(environment, name, 0) for name in ("JAXLM_HOSTS", "SLURM_STEP_NUM_NODES", "SLURM_NNODES"))
    hosts = next(filter(None, counts), 1)
    if hosts > 1 and (address := _loopback(place.coordinator)):
        raise UserError(
            f"the coordinator {place.coordinator} is {address}, which on each of the {hosts} hosts is that host itself",
            "give an address of process 0 that the other hosts reach; see its /etc/hosts",
        )


def agree(facts: Mapping[str, Any]) -> None:
    """Compare what every process has; all wait here until all have come. One process alone agrees.

    There is no limit of time: heartbeats and the hang watch end a wait that is in vain.

    Raises:
        UserError: on every process, a fact on which they differ, and who has what.
        MissingPeersError: the coordinator, which process 0 is, answers no longer.
    """
    import jax

    if jax.process_count() == 1:
        return
    service = client()
    if service is None:
        raise UserError(
            f"{jax.process_count()} processes share the devices, and this one does not know the others",
            "set distributed.cluster, or JAXLM_COORDINATOR, JAXLM_PROCESSES and JAXLM_PROCESS_ID",
        )
    global _meetings
    _meetings += 1
    place, me = f"jaxlm/agree/{_meetings}", jax.process_index()
    try:
        service.key_value_set(f"{place}/{me}", json.dumps(facts))
        if me == 0:
            all_facts = [
                json.loads(service.blocking_key_value_get(f"{place}/{i}", _DAY)) for i in range(jax.process_count())
            ]
            service.key_value_set(f"{place}/verdict", difference(all_facts))
        verdict = service.blocking_key_value_get(f"{place}/verdict", _DAY)
    except jax.errors.JaxRuntimeError as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        hint = "see the logs of the others" if me == 0 else "see the log of process 0"
        raise MissingPeersError(f"process {me}: the coordinator answers no longer: {cause}", hint) from error
    if verdict:
        with contextlib.suppress(Exception):  # the first process, whom the others ask, must not leave before them
            service.wait_at_barrier(f"{place}/read", _FAREWELL)
        raise UserError(verdict, "all processes must run the same program on the same data, with one run directory")


def from_first(value: str) -> str:
    """Return what the first process has; the others wait for it. One process alone has its own.

    Raises:
        MissingPeersError: the first process ended before it said so.
    """
    service = client() if several() else None
    if service is None:
        return value
    global _meetings
    _meetings += 1
    place = f"jaxlm/first/{_meetings}"
    if is_first():
        service.key_value_set(place, value)
        return value
    try:
        return service.blocking_key_value_get(place, _DAY)
    except sys.modules["jax"].errors.JaxRuntimeError as error:
        raise MissingPeersError("process 0 ended before the others began", "see its log") from error


def difference(all_facts: Sequence[Mapping[str, Any]]) -> str:
    """The first fact on which processes differ, and who has what; empty if there is none."""
    for name in dict.fromkeys(name for facts in all_facts for name in facts):
        holders: dict[str, list[int]] = {}
        for process_id, facts in enumerate(all_facts):
            holders.setdefault(str(facts.get(name, "absent")), []).append(process_id)
        if len(holders) > 1:
            most = sorted(holders.items(), key=lambda held: -len(held[1]))
            return f"the processes differ in {name}: " + "; ".join(f"{value} on {_span(ids)}" for value, ids in most)
    return ""


def client() -> Any:
    """The distributed client of this process, None if it has none. JAX has no public name for it; Orbax does so too."""
    from jax._src import distributed

    return distributed.global_state.client


def leave(code: int) -> None:
    """End this process now if there are others: at a normal exit JAX would wait for them, and they for this one."""
    if not _joined:  # and JAX may just be being imported
        return
    import jax

    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _leave_after_exceptions() -> None:
    report = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report(kind, error, trace)
        leave(1)

    sys.excepthook = hook


def _detected(options: config.Distributed, environment: Mapping[str, str]) -> Place | None:
    """What JAX's own detection says of this process."""
    if options.cluster == "none":
        return None
    if options.cluster == "auto" and not any(name in environment for name in _CLUSTERS) and not _tpu_vm():
        return None
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 0)  # of this step; SLURM_NTASKS is of the allocation
    if options.cluster in ("auto", "slurm") and tasks == 1:
        if _number(environment, "SLURM_NTASKS", 1) > 1:
            print(
                "alone: SLURM_STEP_NUM_TASKS=1, though SLURM_NTASKS="
                f"{environment['SLURM_NTASKS']}; srun starts a process for each task",
                file=sys.stderr,
            )
        return None
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() calls; there is no public name

    method = None if options.cluster == "auto" else options.cluster
    try:
        coordinator, processes, process_id, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, method, options.init_timeout
        )
    except (RuntimeError, ValueError, OSError, KeyError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the cluster does not say who this process is: {first}", "set distributed.cluster") from error
    if coordinator is None or processes is None or process_id is None:
        if method:
            raise UserError(f"distributed.cluster = {method!r}: this process does not run under it")
        if (count := _number(environment, "OMPI_COMM_WORLD_SIZE", 1)) > 1:
            message = f"Open MPI started {count} processes, and JAX does not find out which one this is"
            raise UserError(message, "pip install mpi4py and set distributed.cluster=mpi4py: Open MPI 5 needs it")
        return None
    if tasks and environment.get("SLURM_NTASKS") == str(processes):
        processes = tasks
    return Place(coordinator, processes, process_id, tuple(devices) if devices is not None else None)


def _tpu_vm() -> bool:
    """Whether this is a Cloud TPU machine, whose metadata server JAX asks."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _span(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return f"process{'es' if len(ids) > 1 else ''} {shown}"


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "")
    if value and not value.isdecimal():
        raise UserError(f"{name}={value!r} is not a number")
    return int(value) if value else default


def _loopback(coordinator: str) -> str | None:
    """The loopback address that the coordinator's host resolves to."""
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return None
    return next((address for address in sorted(addresses) if ipaddress.ip_address(address).is_loopback), None)


def _reach(place: Place, seconds: float) -> None:
    """Wait until process 0 listens."""
    host, _, port = place.coordinator.rpartition(":")
    deadline, cause = time.monotonic() + seconds, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=left).close()
            return
        except OSError as error:  # not there yet, or its name is not known yet
            cause = error.strerror or str(error)
            time.sleep(min(0.2, max(left, 0)))
    who = f"process {place.process_id}: the coordinator {place.coordinator}"
    hint = "is process 0 running, is the address right as seen from here, is the port open?"
    if address := _loopback(place.coordinator):
        hint = f"{address} is this host itself: is process 0 running here?"
    raise MissingPeersError(f"{who} was not reached in {seconds:g} s: {cause}", hint)


def _nobody_came(place: Place, seconds: float) -> MissingPeersError:
    return MissingPeersError(
        f"process {place.process_id}: not all {place.processes} processes came to {place.coordinator} in {seconds:g} s",
        "are all of them running with the same coordinator and distributed.processes, each with its own process_id? "
        "See their logs; distributed.init_timeout is how long to wait",
    )


@contextlib.contextmanager
def _bounded(deadline: float, late: MissingPeersError) -> Iterator[None]:
    """Print `late` and end with its exit code if the work inside, which cannot be interrupted, outlasts `deadline`."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(max(deadline - time.monotonic(), 0)):
            print(f"error: {late}", file=sys.stderr, flush=True)
            os._exit(late.exit_code)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()

"""The values of the judge: what a box may use, what a problem's tests are, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

KINDS = (
    "passed", "failed", "exception", "syntax", "no_function", "not_plain", "cpu_time", "wall_time", "memory", "output",
    "violation", "crashed",
)  # fmt: skip
"""Every verdict on an answer. A fault of the machine or of the tests is a `HarnessError` instead."""

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a box may use, all its processes together."""

    cpu_seconds: float = 3.0
    """Time of the processor. A busy machine makes it no shorter."""
    idle_seconds: float = 10.0
    """Time in which nothing in either box computes: a sleep, a wait for input that never comes."""
    memory: int = 512 * MEGABYTE
    """Bytes in use."""
    processes: int = 1
    """Bash gets 32; Python answers cannot start any."""
    threads: int = 8
    """Beside the first."""
    files: int = 64
    """Open files of a process."""
    file_bytes: int = 16 * MEGABYTE
    """Bytes of one file."""
    disk_bytes: int = 32 * MEGABYTE
    """Bytes of all files."""
    names: int = 1_024
    """Files and folders."""
    output: int = MEGABYTE
    """Bytes printed."""

    @property
    def wall_seconds(self) -> float:
        """After this time a machine is too busy to judge at all."""
        return 40 * self.cpu_seconds + 6 * self.idle_seconds + 60

    def for_language(self, language: str) -> Limits:
        """The limits as they are for a language."""
        return replace(self, processes=max(self.processes, 32)) if language == "bash" else self


@dataclass(frozen=True)
class Tests:
    """The tests of a problem: a program in which `candidate(...)` calls the answer's function."""

    __test__ = False  # no class for pytest to collect

    source: str
    """Python or bash source; it raises AssertionError, or ends with a status, where an answer is wrong."""
    names: tuple[str, ...]
    """Functions of the answer that the source calls; `candidate` is the first."""
    prelude: str = ""
    """Source that runs before: what the prompt defines."""
    classes: tuple[str, ...] = ()
    """Classes among the names. Their objects stay in the answer's box, and the tests hold them by number."""
    language: str = "python"

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("tests name no function of the answer")


@dataclass(frozen=True)
class Verdict:
    """How one answer did, and how that is known."""

    kind: str
    """One of `KINDS`."""
    text: str = ""
    """In a few words, why."""
    details: dict = field(default_factory=dict)
    """For `failed`: call, got, wanted, assertion. For `exception`: type, line. For `violation`: tried."""
    sandbox: str = ""
    """The isolation that did it."""
    cpu_seconds: float = 0.0
    """Time of the processor that the answer used, to a hundredth."""

    @property
    def passed(self) -> bool:
        return self.kind == "passed"

    def record(self) -> dict:
        """The verdict as plain data, without what changes from run to run."""
        record = asdict(self)
        del record["cpu_seconds"]
        return record


@dataclass(frozen=True)
class Ran:
    """How one whole program ended."""

    kind: str
    """`finished`, or a kind of verdict: `cpu_time`, `memory`, `crashed` and so on."""
    status: int
    """Exit status; negative for a signal."""
    stdout: bytes
    stderr: bytes
    text: str
    sandbox: str
    cpu_seconds: float


class HarnessError(Exception):
    """The judge could not judge. Never counted as a failure of the answer."""

"""A run to be launched, whatever launches it: its command line, its storage, and how a script is filled in.

The scripts of `launch/` can be taken by hand: what is to be changed are assignments at their top. `filled` changes just
these, quoted for the shell, so that nothing in a config's name or an override can become a command.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxlm.config import registry, toml
from jaxlm.config.shipped import shipped
from jaxlm.errors import UserError

FOLDER = shipped("launch")

NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
"""A DNS label, short enough for Kubernetes to add `-worker-0-0-xxxxx` and stay within 63 characters."""
WORD = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
"""What schedulers call partitions, accounts, zones and claims."""
FOLDER_PATH = r"/[A-Za-z0-9._/+-]+"
IMAGE = r"[A-Za-z0-9][A-Za-z0-9._:/@#+-]*|/[A-Za-z0-9._/+-]+"
"""A container image: `registry/name:tag@sha256:...`, enroot's `registry#name:tag`, or a file."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: what every launcher starts is `train`, once in each process."""

    config: str
    """As `jaxlm train` takes it, where the processes run: a file, or a name of `jaxlm info`."""
    overrides: tuple[str, ...] = ()
    name: str = ""
    """Of the job and of the run; empty: from the config."""
    storage: str = ""
    """An absolute folder that all hosts share, for the run and the cache; empty: as the config says."""
    devices: int = 0
    """How many there should be in all, for the preflight; 0: however many there are."""
    restarts: int = 20
    """How often the run is started again after it was preempted or has failed."""

    def __post_init__(self) -> None:
        if self.config.startswith("-"):
            raise UserError(f"{self.config}: no such config file", "options come before or after CONFIG")
        object.__setattr__(self, "name", checked("--name", self.name or name_of(self.config), NAME))
        if self.storage:
            checked("--storage", self.storage, FOLDER_PATH)

    @property
    def arguments(self) -> list[str]:
        """CONFIG and overrides, for `train` and `preflight` alike; the user's overrides win over `--storage`."""
        shared = {"out_dir": f"{self.storage}/runs/{self.name}", "data.cache_dir": f"{self.storage}/cache"}
        given = {one.partition("=")[0] for one in self.overrides}
        stored = [f"{key}={value}" for key, value in shared.items() if self.storage and key not in given]
        return [self.config, *self.overrides, *stored]

    @property
    def preflight(self) -> list[str]:
        """What is run before the first step."""
        expected = ["--devices", str(self.devices)] if self.devices else []
        return ["launch", "preflight", *self.arguments, *expected]

    @property
    def train(self) -> list[str]:
        """The contract."""
        return ["train", *self.arguments, "--resume"]

    def check_config(self) -> None:
        """Load the config where it can be found here; in an image or on other hosts it may be what is not here.

        Raises:
            UserError: it is wrong, or it is a name that the registry does not have.
        """
        if registry.find(self.config).exists():
            toml.load(self.config, self.arguments[1:])


def name_of(config: str) -> str:
    """A name for the run of a config file: its own, in small ASCII letters, digits and dashes, from a letter on.

    Raises:
        UserError: the file's name has no letter or digit of ASCII.
    """
    name = re.sub(r"[^a-z0-9]+", "-", Path(config).stem.lower()).strip("-")
    if not name:
        raise UserError(f"{config}: no name of a job can be made of this", "give one with --name, such as --name run-1")
    return (name if name[0].isalpha() else f"run-{name}")[:40].strip("-")


def checked(option: str, value: str, pattern: str) -> str:
    """`value`, if all of it matches.

    Raises:
        UserError: it does not.
    """
    if not re.fullmatch(pattern, value):
        raise UserError(f"{option} {value!r} is not of the form {pattern}")
    return value


def filled(script: str, values: Mapping[str, str | int | Sequence[str]]) -> str:
    """A script of `launch/` with other values: each name is assigned on exactly one line of it.

    Words are quoted for bash; a list becomes an array.
    """
    text = (FOLDER / script).read_text(encoding="utf-8")
    for name, value in values.items():
        single = isinstance(value, str | int)
        written = _quoted(str(value)) if single else f"({' '.join(map(_quoted, value))})"
        text, count = re.subn(rf"(?m)^{name}=.*$", lambda _, line=f"{name}={written}": line, text)
        if count != 1:
            raise ValueError(f"{script} assigns {name} {count} times")
    return text


def _quoted(word: str) -> str:
    """As `shlex.quote`, with commas in quotes: in an array they look like a mistake."""
    return shlex.quote(word) if "," not in word or shlex.quote(word) != word else f"'{word}'"


def write(text: str, out: Path, submit: str, *, executable: bool = False) -> None:
    """Write a script or manifest and say how it is submitted."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    if executable:
        out.chmod(0o755)
    print(f"{out}: submit with `{submit} {shlex.quote(str(out))}`")

"""Seatbelt: the sandbox of macOS, by `sandbox-exec` and the profile `seatbelt.sb`.

Apple marks the program as deprecated; browsers and coding agents use it all the same. A Mac has no limit of address
space, so memory is only watched. Written without a Mac: the quick battery decides there whether it holds.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from jaxlm.sandbox.backends import INSIDE, Backend, Launch, Request, python_command

PROGRAM = "sandbox-exec"
PROFILE = Path(__file__).with_name("seatbelt.sb")


def profile(roots: tuple[str, ...]) -> str:
    """The profile, with leave to read the folders of the interpreter."""
    allow = '(allow file-read* file-map-executable (subpath (param "ROOT_{}")))'
    rules = [allow.format(number) for number in range(len(roots))]
    return "\n".join([PROFILE.read_text(encoding="utf-8"), *rules])


def launch(request: Request) -> Launch:
    """Describe a box of Seatbelt. Its rules see real paths: /tmp of a Mac is /private/tmp."""
    work, box = str((request.folder or Path()).resolve()), str(INSIDE.parent.resolve())
    roots = request.interpreter.roots
    python = Path(request.interpreter.executable)
    values = {"PYTHON": str(python), "BOX": box, "WORK": work, "LANGUAGE": request.language}
    values["FRAMEWORK_PYTHON"] = str(python.parents[1] / "Resources/Python.app/Contents/MacOS/Python")
    values |= {f"ROOT_{number}": root for number, root in enumerate(roots)}
    defined = [word for name, value in values.items() for word in ("-D", f"{name}={value}")]
    worker = python_command(request.interpreter.executable, box, "worker", request.job)
    command = (PROGRAM, "-p", profile(roots), *defined, *worker)
    return Launch(command=command, work=work, readable=(*roots, "/usr", "/System", "/dev"))


def problem() -> str:
    """Say why it cannot work here, or nothing."""
    if sys.platform != "darwin":
        return "Seatbelt is for macOS"
    return "" if shutil.which(PROGRAM) else f"{PROGRAM} is missing; macOS has it in /usr/bin"


BACKEND = Backend("seatbelt", problem, launch, owns_files=False)

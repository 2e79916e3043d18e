"""The kit of all report pages: templates, one stylesheet, what made the page. A page is one file without links."""

from __future__ import annotations

import base64
import functools
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jinja2 import Environment

PACKAGES = ("jaxlm", "jax", "flax", "torch", "numpy")


class Made(NamedTuple):
    """How a page came to be: every page ends with it."""

    command: str
    versions: str
    date: str


def render(template: str, title: str, **values: Any) -> str:
    """The page of a template of `report/templates`; every value is escaped.

    Args:
        template: a file name, such as `run.html`.
        title: of the window, and the heading unless the template has its own.
    """
    return _environment().get_template(template).render(title=title, made=made(), **values)


def made() -> Made:
    """The command of this process, the versions that matter, and the time in UTC."""
    program = Path(sys.argv[0]).name if sys.argv else "python"
    command = shlex.join(["jaxlm" if program in ("jaxlm", "__main__.py") else program, *sys.argv[1:]])
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Made(command, ", ".join(_versions()), date)


def inline(image: Path) -> str:
    """A PNG file as the source of an image; empty if there is no such file."""
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode() if image.exists() else ""


def newest_sample(run_dir: Path) -> str:
    """The text that the run at `run_dir` sampled last, empty if it never did."""
    samples = sorted((run_dir / "samples").glob("*.txt"))
    return samples[-1].read_text(encoding="utf-8") if samples else ""


def _versions() -> list[str]:
    found = [f"Python {sys.version.split()[0]}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(loader=PackageLoader("jaxlm.report"), autoescape=True, undefined=StrictUndefined)

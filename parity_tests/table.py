"""`python -m parity_tests.table`: measure every example of every family and write the table into docs/parity.md."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import track
from transformers.utils.logging import disable_progress_bar

from jaxlm.convert.families import FAMILIES
from parity_tests import families, families_moe, families_ssm
from parity_tests.families import Errors, Example, measure

EXAMPLES = (*families.EXAMPLES, *families_moe.EXAMPLES, *families_ssm.EXAMPLES)
"""Those of every family."""

PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
BEGIN, END = "<!-- begin: python -m parity_tests.table -->", "<!-- end -->"
PACKAGES = ("jax", "flax", "torch", "transformers")


def table(errors: Mapping[Example, Errors], date: datetime.date) -> str:
    """One row a family: the worst of its examples."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        f"{date.isoformat()}, {versions}, on the CPU.",
        "",
        "| family | class of transformers | models | float64 | float32 | bfloat16 |",
        "|---|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        found = [measured for one, measured in errors.items() if one.family == name]
        narrow = [_pair([getattr(one, dtype) for one in found]) for dtype in ("float32", "bfloat16")]
        exact = f"{max(one.float64 for one in found):.1e}"
        lines.append(f"| `{name}` | {' | '.join([family.architecture, str(len(found)), exact, *narrow])} |")
    return "\n".join(lines)


def _pair(errors: Sequence[tuple[float, float]]) -> str:
    return " / ".join(f"{max(side):.1e}" for side in zip(*errors, strict=True))


def written(page: str, new: str) -> str:
    """The page with another table between the markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has not the markers {BEGIN} and {END}")
    return f"{before}{begin}\n{new}\n{end}{after}"


def main() -> None:
    """Measure and write."""
    disable_progress_bar()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    errors = {one: measure(one) for one in track(EXAMPLES, "measuring", console=Console(stderr=True), transient=True)}
    new = table(errors, datetime.datetime.now(datetime.UTC).date())
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), new), encoding="utf-8")
    print(new)


if __name__ == "__main__":
    main()

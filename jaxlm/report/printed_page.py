"""What a verb prints, as a page: the same tables, for those who were not at the terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.report.page import render

WIDTH = 120


def write_printed(title: str, parts: Sequence[Any], path: Path) -> Path:
    """Write texts and rich tables, in their order, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render("printed.html", title=title, parts=[_as_html(part) for part in parts])
    path.write_text(page, encoding="utf-8")
    return path


def _as_html(part: Any) -> Any:
    from markupsafe import Markup
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=WIDTH)
    console.print(part, markup=False, highlight=False)
    return Markup(console.export_html(inline_styles=True, code_format="{code}"))

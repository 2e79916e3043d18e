"""`parity.html`: one self-contained page with the verdict, a heat map of layer by dtype, and every tensor."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from jaxlm.parity.compare import ALL, GENERATION, Finding, cell_text
from jaxlm.report.page import render

if TYPE_CHECKING:
    from jaxlm.parity.report import Report

ROWS = 12
"""How many wrong operations the page shows."""
WORDS = {
    "config": "the options that decide what a model computes",
    "weights": "every stored tensor",
    "routing": "the experts that each token chooses",
    "forward": "the output of every module",
    "loss": "the loss of the rows",
    "gradients": "the gradient of every parameter",
    GENERATION: "greedy tokens, each framework with its own cache",
}


def page(report: Report) -> str:
    """The whole page as text."""
    circumstances = [
        ("model", report.model),
        ("inputs", f"two {report.inputs}"),
        *(("note", note) for note in report.notes),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("machine", report.machine),
        ("date", report.date),
        ("time", report.slowest),
    ]
    return render(
        "parity.html",
        title=f"Parity of {report.subject}",
        report=report,
        verdict=_same(report) if report.same else report.verdict,
        levels=[_level(report, level) for level in report.levels],
        heat=_heat(report),
        bisection=_bisection(report),
        circumstances=circumstances,
    )


def _same(report: Report) -> str:
    count = len(report.findings)
    return f"Same: both compute the same model. All {count:,} comparisons keep their bounds."


def _bisection(report: Report) -> dict[str, Any] | None:
    """The operations around the first that is wrong on the right input; the others are in the JSON."""
    if not report.parts:
        return None
    wrong = [index for index, part in enumerate(report.parts) if not part.ok]
    near = {at for index in wrong[:ROWS] for at in (index - 1, index, index + 1)} & {*range(len(report.parts))}
    words = f"{len(wrong)} of {len(report.parts)} operations are wrong" if wrong else "No operation is wrong by itself"
    parts = [report.parts[index] for index in sorted(near)]
    return {"dtype": report.parts[0].dtype, "words": words, "parts": parts}


def _level(report: Report, level: str) -> dict[str, Any]:
    """A row of the table of levels: the finding nearest to its bound, for each dtype."""
    cells = []
    for dtype in report.dtypes:
        worst = report.worst(level, dtype)
        tensor = "" if worst is None or level == "config" else worst.name
        cells.append(worst and {"ok": worst.ok, "text": cell_text(worst), "tensor": tensor})
    return {"name": level, "words": WORDS.get(level, "how far the optimiser moved every parameter"), "cells": cells}


def _heat(report: Report) -> dict[str, Any]:
    """Rows are layers, columns are levels and dtypes."""
    worst: dict[tuple[str, str, str], Finding] = {}
    for finding in report.findings:
        if finding.name == ALL or finding.level in ("config", "loss", GENERATION):
            continue
        key = _layer(finding.name), finding.level, finding.dtype
        if key not in worst or finding.share > worst[key].share:
            worst[key] = finding
    layers = sorted({layer for layer, _, _ in worst}, key=_depth)
    columns = [(level, dtype) for level in report.levels for dtype in report.dtypes]
    columns = [column for column in columns if any(key[1:] == column for key in worst)]
    spans = {level: sum(column[0] == level for column in columns) for level, _ in columns}
    rows = [(layer, [_heat_cell(worst.get((layer, *column))) for column in columns]) for layer in layers]
    return {"columns": columns, "spans": list(spans.items()), "rows": rows}


def _heat_cell(finding: Finding | None) -> dict[str, str] | None:
    if finding is None:
        return None
    title = f"{finding.name}: {finding.error:.2e}, bound {finding.bound:.2e} {finding.note}".strip()
    text = f"{finding.error:.0e}" if math.isfinite(finding.error) else "✗"
    return {"title": title, "text": text, "colour": _colour(finding)}


def _colour(finding: Finding) -> str:
    """Pale green far below the bound, deeper and yellower towards it, red above."""
    if not finding.ok:
        return "hsl(6,75%,72%)"
    near = max(0.0, 1 + math.log10(max(finding.share, 1e-6)) / 6)  # 0 at a millionth of the bound, 1 at the bound
    return f"hsl({140 - 80 * near:.0f},{35 + 30 * near:.0f}%,{93 - 13 * near:.0f}%)"


def _layer(name: str) -> str:
    inside = re.match(r"layers\.\d+", name)
    return inside[0] if inside else name.split(".")[0]


def _depth(layer: str) -> tuple[int, int, str]:
    """The order of the decoder: embeddings, layers, final norm, head, logits."""
    if layer.startswith("layers."):
        return 1, int(layer.split(".")[1]), ""
    ends = ("final_norm", "head", "logits")
    return (2, ends.index(layer), "") if layer in ends else (0, 0, layer)

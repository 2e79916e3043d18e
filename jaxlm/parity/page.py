"""`parity.html`: one self-contained page with the verdict, a heat map of layer by dtype, and every tensor."""

from __future__ import annotations

import math
import re
from html import escape
from typing import TYPE_CHECKING

from jaxlm.parity.compare import ALL, GENERATION, Finding, cell_text

if TYPE_CHECKING:
    from jaxlm.parity.report import Report

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.4rem;margin-bottom:0}h2{font-size:1.1rem;margin-top:2rem}p{margin:.4rem 0}
.verdict{font-size:1.1rem;padding:.7rem 1rem;border-left:.4rem solid;margin:1rem 0}
.same{border-color:#2e8b57;background:#eef8f1}.differ{border-color:#c0392b;background:#fdf0ee}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .7rem;text-align:left}
th{font-weight:600;border-bottom:1px solid #ccc}.dim{color:#777}.bad{color:#c0392b;font-weight:600}
.heat td{border:2px solid #fff;text-align:center;font-size:13px;min-width:4.2rem}
.heat th{border:0;font-size:13px;text-align:center}.heat td:first-child,.heat th:first-child{text-align:left}
details table{font-size:13px}summary{cursor:pointer;margin-top:1.5rem}"""

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
    kind, words = ("same", _same(report)) if report.same else ("differ", report.verdict)
    told = [
        ("model", report.model),
        ("inputs", f"two {report.inputs}"),
        *(("note", note) for note in report.notes),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("machine", report.machine),
        ("date", report.date),
        ("time", report.slowest),
    ]
    return "\n".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>Parity of {escape(report.subject)}</title>",
            f"<style>{STYLE}</style><h1>{escape(report.subject)}</h1><p class=dim>{escape(report.who)}</p>",
            f'<div class="verdict {kind}">{escape(words)}</div>',
            *_explained(report),
            "<h2>Levels</h2>",
            _levels(report),
            "<p class=dim>Relative error and bound of the tensor nearest to its bound. float64: one framework against",
            "the other. float32, bfloat16: the larger error of the two against float64, at most twice the smaller;",
            "transformers rounds as it likes, so beside it the error of jaxlm, at most twice its own.</p>",
            "<h2>Layers</h2>",
            _heat(report),
            "<p class=dim>The worst relative error of a layer; the colour is its share of the bound, red when exceeded."
            "</p>",
            *_bisection(report),
            "<h2>Circumstances</h2><table>",
            *(f"<tr><td>{name}<td>{escape(text)}" for name, text in told),
            "</table>",
            _tensors(report),
            "</html>\n",
        ]
    )


def _same(report: Report) -> str:
    count = len(report.findings)
    return f"Same: both compute the same model. All {count:,} comparisons keep their bounds."


def _explained(report: Report) -> list[str]:
    if not report.explanations:
        return []
    return ["<h2>Explanation</h2><ul>", *(f"<li>{escape(one)}" for one in report.explanations), "</ul>"]


def _bisection(report: Report) -> list[str]:
    """The operations around the first that is wrong on the right input; the others are in the JSON."""
    if not report.parts:
        return []
    wrong = [index for index, part in enumerate(report.parts) if not part.ok]
    near = {at for index in wrong[:ROWS] for at in (index - 1, index, index + 1)} & {*range(len(report.parts))}
    rows = [
        f"<tr{'' if part.ok else ' class=bad'}><td>{escape(part.what)}<td>{escape(part.name)} {part.kind}"
        f"<td>{part.error:.1e}<td>{part.bound:.1e}"
        for part in (report.parts[index] for index in sorted(near))
    ]
    words = f"{len(wrong)} of {len(report.parts)} operations are wrong" if wrong else "No operation is wrong by itself"
    return [
        f"<h2>Bisection</h2><p>Each operation on the right input, in {report.parts[0].dtype}, so that no error",
        f"accumulates. {words}{f'; the first: <b>{escape(report.guilty.what)}</b>' if report.guilty else ''}.</p>",
        f"<table><tr><th>operation<th>judged by what<th>error<th>bound{''.join(rows)}</table>",
    ]


def _levels(report: Report) -> str:
    rows = [f"<tr><th>level<th>{'<th>'.join(report.dtypes)}"]
    for level in report.levels:
        cells = []
        for dtype in report.dtypes:
            worst = report.worst(level, dtype)
            if worst is None:
                cells.append("<td>")
            else:
                text = f"{'✓' if worst.ok else '✗'} {escape(cell_text(worst))}"
                name = "" if level == "config" else f"<br><span class=dim>{escape(worst.name)}</span>"
                cells.append(f"<td{'' if worst.ok else ' class=bad'}>{text}{name}")
        words = WORDS.get(level, "how far the optimiser moved every parameter")
        rows.append(f"<tr><td>{level}<br><span class=dim>{words}</span>{''.join(cells)}")
    return f"<table>{''.join(rows)}</table>"


def _heat(report: Report) -> str:
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
    rows = [
        "<tr><th>" + "".join(f"<th colspan={count}>{level}" for level, count in spans.items()),
        "<tr><th>" + "".join(f"<th>{dtype}" for _, dtype in columns),
        *(
            f"<tr><td>{escape(layer)}" + "".join(_heat_cell(worst.get((layer, *column))) for column in columns)
            for layer in layers
        ),
    ]
    return f"<table class=heat>{''.join(rows)}</table>"


def _heat_cell(finding: Finding | None) -> str:
    if finding is None:
        return "<td>"
    title = f"{finding.name}: {finding.error:.2e}, bound {finding.bound:.2e} {finding.note}".strip()
    text = f"{finding.error:.0e}" if math.isfinite(finding.error) else "✗"
    return f'<td title="{escape(title)}" style="background:{_colour(finding)}">{text}'


def _colour(finding: Finding) -> str:
    """Pale green far below the bound, deeper and yellower towards it, red above."""
    if not finding.ok:
        return "hsl(6,75%,72%)"
    near = max(0.0, 1 + math.log10(max(finding.share, 1e-6)) / 6)  # 0 at a millionth of the bound, 1 at the bound
    return f"hsl({140 - 80 * near:.0f},{35 + 30 * near:.0f}%,{93 - 13 * near:.0f}%)"


def _tensors(report: Report) -> str:
    rows = ["<tr><th>dtype<th>level<th>tensor<th>error<th>bound<th>1 - cos<th>A, B against float64<th>"]
    for finding in report.findings:
        both = "" if finding.errors is None else "{:.1e}, {:.1e}".format(*finding.errors)
        angle = "" if finding.cosine is None else f"{finding.cosine:.1e}"
        rows.append(
            f"<tr{'' if finding.ok else ' class=bad'}><td>{finding.dtype}<td>{finding.level}<td>{escape(finding.name)}"
            f"<td>{finding.error:.1e}<td>{finding.bound:.1e}<td>{angle}<td>{both}<td>{escape(finding.note)}"
        )
    return (
        f"<details><summary>All {len(report.findings):,} comparisons</summary><table>{''.join(rows)}</table></details>"
    )


def _layer(name: str) -> str:
    inside = re.match(r"layers\.\d+", name)
    return inside[0] if inside else name.split(".")[0]


def _depth(layer: str) -> tuple[int, int, str]:
    """The order of the decoder: embeddings, layers, final norm, head, logits."""
    if layer.startswith("layers."):
        return 1, int(layer.split(".")[1]), ""
    ends = ("final_norm", "head", "logits")
    return (2, ends.index(layer), "") if layer in ends else (0, 0, layer)

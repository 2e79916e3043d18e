"""Report pages: one kit, everything escaped, and the figures of a whole run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from jaxlm import config
from jaxlm.report.page import render
from jaxlm.report.plots import plot_loss, plot_measures, plot_time
from jaxlm.report.printed_page import write_printed
from jaxlm.report.run_page import whole_run, write_report
from jaxlm.run.rollouts import write_rollouts

ROWS: list[dict[str, Any]] = [
    {
        "step": 10,
        "tokens": 1000,
        "loss": 3.0,
        "tokens_per_second": 100.0,
        "mfu": 0.2,
        "reward": 0.1,
        "goodput": 0.5,
        "seconds_steps": 9.0,
    },
    {
        "step": 20,
        "tokens": 4000,
        "loss": 2.0,
        "tokens_per_second": 300.0,
        "mfu": 0.6,
        "reward": 0.4,
        "goodput": 0.9,
        "seconds_steps": 9.0,
    },
    {"step": 20, "validation_loss": 2.5},
]


def test_speed_is_that_of_the_whole_run() -> None:
    """1,000 tokens in 10 s and 3,000 in 10 s are 200 tokens/s, and so is the share of the peak."""
    assert whole_run(ROWS) == {"tokens_per_second": pytest.approx(200), "mfu": pytest.approx(0.4)}
    assert whole_run([]) == {}


def test_the_page_of_a_run(tmp_path: Path) -> None:
    """It has every figure with its unit, its plots inside, and how it was made; text of the run cannot break it."""
    cfg = dataclasses.replace(config.Config(), out_dir=str(tmp_path / "a<b>"))
    out = Path(cfg.out_dir)
    (out / "samples").mkdir(parents=True)
    (out / "samples" / "00000020.txt").write_text("def f(): return '<script>'")
    page = write_report(cfg, ROWS, baseline=4.0).read_text()
    rows = {
        "tokens per second": "200 tokens/s, whole run",
        "mfu": "40.0% of the peak, whole run",
        "validation loss": "2.5 nats a token",
        "unigram loss": "4 nats a token",
    }
    for name, value in rows.items():
        assert f"<td>{name}</td><td>{value}</td>" in page
    assert "<script>" not in page and "<b>" not in page
    assert page.count("data:image/png;base64,") == 3
    assert re.search(r"<footer><code>\S+.*</code><br>Python 3.*jax 0\..*<br>20\d\d-\d\d-\d\d", page)
    assert "prefers-color-scheme:dark" in page and "src=http" not in page


def test_a_loss_has_the_unit_of_its_stage(tmp_path: Path) -> None:
    cfg = dataclasses.replace(config.Config(), out_dir=str(tmp_path))
    page = write_report(cfg, ROWS, loss_unit="a pair").read_text()
    assert "<td>validation loss</td><td>2.5 a pair</td>" in page and "nats" not in page.partition("Config")[0]
    assert "<td>validation loss</td><td>2.5</td>" in write_report(cfg, ROWS, loss_unit="").read_text()


def drawn_by(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on, in place of their files."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    return drawn


@pytest.mark.parametrize(("unit", "panels"), [("nats a token", [2]), ("", [1, 1])])
def test_losses_of_one_unit_share_a_scale_and_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str, panels: list[int]
) -> None:
    """A policy's loss lies near 0, and the nats of right answers at 5: on one scale the first is a flat line."""
    drawn = drawn_by(monkeypatch)
    plot_loss(ROWS, tmp_path / "loss.png", unit=unit)
    assert [len(axes.lines) for axes in drawn[0].axes] == panels
    plot_loss(ROWS[:2], tmp_path / "loss.png", unit=unit)
    assert [len(axes.lines) for axes in drawn[1].axes] == [1], "no panel without a line"


def test_on_a_narrow_page_each_part_of_a_sample_has_its_name(tmp_path: Path) -> None:
    """There the table has no heading and a part a line, so that the page needs no scrolling sideways."""
    row = {"reward": 1.0, "advantage": 0.5, "grades": {"exact": 1.0}, "tokens": 3, "ended": "end", "prompt": "1+1="}
    write_rollouts(tmp_path, 1, [{**row, "text": "2" * 300}])
    page = write_report(dataclasses.replace(config.Config(), out_dir=str(tmp_path)), ROWS).read_text()
    table = re.search(r'<table class="samples">.*?</table>', page, re.DOTALL)
    assert table is not None
    headings = re.findall("<th>(.*?)</th>", table[0])
    assert re.findall(r'<td[^>]*data-name="(.*?)"', table[0]) == headings and table[0].count("<td") == len(headings)
    narrow = page.partition("@media(max-width:40rem){")[2]
    assert ".samples thead{display:none}" in narrow and ".samples .text{display:block" in narrow


def test_a_run_without_measures_has_no_plot_of_them(tmp_path: Path) -> None:
    plot_measures([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}], tmp_path / "measures.png")
    assert not (tmp_path / "measures.png").exists()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_measure_has_a_panel_and_no_panel_is_empty(tmp_path: Path, monkeypatch, count: int) -> None:
    drawn = drawn_by(monkeypatch)
    rows = [{"step": step, **{f"measure_{name}": float(step) for name in range(count)}} for step in (1, 2)]
    plot_measures(rows, tmp_path / "measures.png")
    shown = [axes for axes in drawn[0].axes if axes.axison]
    assert len(shown) == count and all(axes.lines for axes in shown)


def test_kinds_of_time_are_those_of_all_rows(tmp_path: Path) -> None:
    """A run that an older version began has rows with fewer kinds, or with others."""
    rows = [{"step": step, "goodput": 0.5, "seconds_compute": 1.0} for step in (1, 2)]
    rows[1]["seconds_rollouts"] = 1.0
    for number, order in enumerate((rows, rows[::-1])):
        plot_time(order, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").is_file()


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(Exception, match="'figures' is undefined"):
        render("run.html", title="x")


def test_what_is_printed_is_a_page(tmp_path: Path) -> None:
    from rich.table import Table

    table = Table("name", "value")
    table.add_row("a<b>", "[red]1[/red]")
    page = write_printed("Plan of x", ["a line & more", table], tmp_path / "new" / "plan.html").read_text()
    assert "a&lt;b&gt;" in page and "a line &amp; more" in page and "<b>" not in page and page.count("<pre>") == 2

"""Figures of held-out pairs: against all pairs one by one and by hand, and what the page shows of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxlm.config import Config
from jaxlm.recipes.reward import examine
from jaxlm.report.page import render
from jaxlm.report.stage_parts import pairs_of, samples_of
from jaxlm.run.pair_scores import FILE, PairScores, auc
from jaxlm.run.rollouts import write_rollouts

PAGE: dict[str, Any] = {"title": "x", "figures": [], "loss": "", "measures": "", "time": "", "sample": "", "config": ""}


def scores_of(difference: list[float], lengths: list[int] | None = None, ties: list[int] = []) -> PairScores:  # noqa: B006
    scores = np.array([[value / 2, -value / 2] for value in difference]).reshape(-1)
    of = np.array(lengths or [5] * len(scores))
    return PairScores.of(scores, scores.copy(), of, np.isin(np.arange(len(difference)), ties))


@pytest.mark.parametrize("rounded", [False, True])
def test_the_area_counts_every_pair(rounded: bool) -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(0.5, 1, 70), rng.normal(0, 1, 50)
    if rounded:  # many are equal
        positive, negative = positive.round(), negative.round()
    won = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
    assert auc(positive, negative) == pytest.approx(sum(won) / len(won), abs=1e-12)
    assert math.isnan(auc(positive, negative[:0]))


def test_calibration_by_hand() -> None:
    """Four pairs at a probability of 0.73, three of them right; one at 0.99; a tie has no order."""
    found = scores_of([1, 1, 1, -1, 5, 3], ties=[5]).calibration()
    sure = 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-5))
    assert found.counts.tolist() == [0, 0, 0, 0, 4, 0, 0, 0, 0, 1]
    assert found.sure[[4, 9]] == pytest.approx(sure) and found.right[[4, 9]].tolist() == [0.75, 1]
    assert found.error == pytest.approx((4 * abs(0.75 - sure[0]) + abs(1 - sure[1])) / 5)
    assert scores_of([0.0]).calibration().counts[0] == 1


def test_a_judge_of_length_is_seen() -> None:
    """It scores by length alone: right where the chosen is longer, never where it is shorter."""
    lengths = [9, 3, 8, 4, 2, 7, 6, 6]
    scores = PairScores.of(np.array(lengths, float), np.array(lengths, float) + 0.25, np.array(lengths), np.zeros(4))
    found = scores.figures()
    assert found["accuracy"] == 0.5 and found["longer"] == (2 + 0.5) / 4
    assert found["accuracy_where_shorter"] == 0 and found["length_correlation"] == pytest.approx(1)
    assert found["swap_drift"] == 0.25


def test_they_are_kept_and_shown(tmp_path: Path) -> None:
    """Pairs without a score are left out; a run of another stage shows nothing."""
    assert pairs_of(tmp_path) is None and PairScores.read(tmp_path) is None
    scores = scores_of([1.0, float("nan"), -2.0])
    scores.write(tmp_path)
    assert len((tmp_path / FILE).read_text().splitlines()) == 2
    for ours, theirs in zip(PairScores.read(tmp_path) or (), scores, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    page = render("run.html", pairs=pairs_of(tmp_path), phases=[], **PAGE)
    assert "<td>accuracy</td><td>50.0%</td>" in page and "of 2 pairs" in page and "base64," in page
    assert "<td>accuracy where shorter</td><td>-</td>" in page, "no chosen answer is shorter"
    assert (tmp_path / "plots" / "pairs.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_without_a_score_are_counted() -> None:
    """One of a later batch and one whose score is not finite, of five."""
    answers = {"lengths": np.full(10, 4), "ties": np.zeros(5, bool), "__len__": lambda _: 5}
    scores = np.array([1.0, 0, 2, 1, np.inf, 0, 3, 1, np.nan, np.nan])
    source = SimpleNamespace(validation=(type("Pairs", (), answers)(),), by_answer=lambda *_, **__: scores)
    engine = SimpleNamespace(process_index=1, map_rows=lambda *_: None)
    found = examine(Config(), source, engine)
    assert found["validation_unscored"] == 2 and found["validation_auc"] == 8 / 9


def test_samples_of_a_policy_on_its_page(tmp_path: Path) -> None:
    """The best and the worst of the first phase, of the last, and of one between; text cannot break the page."""
    assert samples_of(tmp_path) == []
    for step in range(1, 10, 2):
        rows = [
            {"prompt": f"{step}=", "answer": "x", "text": f"<b>{step}.{i}\n" + "o" * 500 * (i == 7), "tokens": i}
            | {"ended": "end", "grades": {"exact": float(i)}, "reward": None if i == 8 else float(i), "advantage": 0.0}
            for i in range(9)
        ]
        write_rollouts(tmp_path, step, json.loads(json.dumps(rows)))
    found = samples_of(tmp_path)
    assert [part.step for part in found] == [1, 5, 9] and found[0].reward == 3.5
    assert [row["reward"] for row in found[0].rows] == [7, 6, 5, 2, 1, 0]
    page = render("run.html", pairs=None, phases=found, **PAGE)
    assert page.count("Samples of update") == 3 and "&lt;b&gt;9.0" in page and "<b>" not in page
    assert "exact 7" in page and "o" * 400 not in page and "ended by" in page

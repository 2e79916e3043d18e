"""The scores that a reward model gives to the answers of held-out pairs, kept in `eval/pair_scores.jsonl` of its run.

    scores = PairScores.read(Path("runs/polite-reward"))
    scores.figures()["auc"], scores.calibration()

Shapes: P pairs, K bins.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

FILE = Path("eval") / "pair_scores.jsonl"
BINS = 10


class Calibration(NamedTuple):
    """Pairs by how sure the model is, K bins of equal width from 0.5 to 1; a bin without pairs is NaN."""

    edges: np.ndarray
    counts: np.ndarray
    sure: np.ndarray
    """Mean probability of the order that the model believes in."""
    right: np.ndarray
    """How often that order is right."""

    @property
    def error(self) -> float:
        """Expected calibration error: the mean over pairs of |right - sure| of their bins (Guo et al. 2017, eq. 3)."""
        some = self.counts > 0
        return float((np.abs(self.right - self.sure)[some] * self.counts[some]).sum() / max(self.counts.sum(), 1))


class PairScores(NamedTuple):
    """Arrays [P] of the held-out pairs."""

    chosen: np.ndarray
    rejected: np.ndarray
    swapped_chosen: np.ndarray
    """Scores of the same answers where the rejected one lies before the chosen."""
    swapped_rejected: np.ndarray
    chosen_length: np.ndarray
    """Tokens of the answer."""
    rejected_length: np.ndarray
    tie: np.ndarray
    """Both answers are equally good: such a pair has no right order."""

    @classmethod
    def of(cls, scores: np.ndarray, swapped: np.ndarray, lengths: np.ndarray, ties: np.ndarray) -> PairScores:
        """From arrays of answers [2 P], the chosen one of each pair first; pairs that have no score are left out."""
        there = np.isfinite(scores[0::2]) & np.isfinite(scores[1::2])
        sides = [np.asarray(x, np.float64)[side::2] for x in (scores, swapped) for side in (0, 1)]
        sides += [lengths[side::2] for side in (0, 1)]
        return cls(*(x[there] for x in (*sides, np.asarray(ties, bool))))

    def write(self, run_dir: Path) -> None:
        """Keep them in a run, a line of JSON for each pair, in place of earlier ones."""
        path = run_dir / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = zip(*(x.tolist() for x in self), strict=True)
        text = "".join(json.dumps(dict(zip(self._fields, row, strict=True))) + "\n" for row in rows)
        temporary = path.with_suffix(".partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def read(cls, run_dir: Path) -> PairScores | None:
        """Those of a run; None: it keeps none."""
        path = run_dir / FILE
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        return cls(*(np.array([row[name] for row in rows]) for name in cls._fields)) if rows else None

    def figures(self) -> dict[str, float]:
        """What the report page says of them; figures of order leave ties out.

        `accuracy`: how often the chosen answer scores higher; `longer`: how often it is the longer one, for half where
        both are as long.
        `auc`: how often any chosen answer scores higher than any rejected one, of whatever prompts. `ece`: see
        `Calibration.error`. `length_correlation`: of score and length over all answers. `accuracy_where_shorter`: where
        the chosen answer is the shorter one. `swap_drift`: the largest change of a score by the order in the row.
        """
        ordered = self._replace(**{name: x[~self.tie] for name, x in self._asdict().items()})
        shorter = ordered.chosen_length < ordered.rejected_length
        scores, lengths = np.concatenate(self[:2]), np.concatenate([self.chosen_length, self.rejected_length])
        drift = np.abs(np.concatenate(self[2:4]) - scores)
        longer = 0.5 * (1 + np.sign(ordered.chosen_length - ordered.rejected_length))
        return {
            "accuracy": _mean(ordered.chosen > ordered.rejected),
            "longer": _mean(longer),
            "auc": auc(ordered.chosen, ordered.rejected),
            "ece": self.calibration().error,
            "length_correlation": _correlation(scores, lengths),
            "accuracy_where_shorter": _mean(ordered.chosen[shorter] > ordered.rejected[shorter]),
            "swap_drift": float(drift.max()) if drift.size else 0.0,
        }

    def calibration(self) -> Calibration:
        """How often the model is right when it is so sure; s(difference of scores) is the probability of an order."""
        difference_P = (self.chosen - self.rejected)[~self.tie]
        sure_P, right_P = 1 / (1 + np.exp(-np.abs(difference_P))), difference_P > 0
        edges = np.linspace(0.5, 1, BINS + 1)
        place_P = np.clip(np.digitize(sure_P, edges) - 1, 0, BINS - 1)
        counts = np.bincount(place_P, minlength=BINS)
        with np.errstate(invalid="ignore"):
            means = [np.bincount(place_P, x, minlength=BINS) / counts for x in (sure_P, right_P)]
        return Calibration(edges, counts, *means)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The share of pairs (positive, negative) in which the positive is larger, equal ones for a half; NaN for none."""
    if not len(positive) or not len(negative):
        return float("nan")
    ordered = np.sort(negative)
    below = (np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")) / 2
    return float(below.mean() / len(negative))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary."""
    if x.size < 2 or not x.std() or not y.std():
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _mean(x: np.ndarray) -> float:
    return float(x.mean()) if x.size else float("nan")

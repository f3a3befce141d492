"""From out-of-fold scores to the Private leaderboard, by the submissions that have both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from melfold.kaggle.ledger import Row

if TYPE_CHECKING:
    import numpy as np

LEAST = 3  # submissions that a line needs


@dataclass(frozen=True)
class Line:
    """Private scores as a straight line of out-of-fold scores.

    Args:
        error: root mean square of the errors for each submission by the line of the others (leave one out).
        count: submissions behind it.
    """

    slope: float
    intercept: float
    error: float
    count: int

    def predict(self, oof: float) -> tuple[float, float, float]:
        """The Private score of an out-of-fold score, and its 95 % interval."""
        from scipy.stats import t

        value, margin = self.intercept + self.slope * oof, float(t.ppf(0.975, self.count - 2)) * self.error
        return value, max(0.0, value - margin), min(1.0, value + margin)

    def __str__(self) -> str:
        sign = "+" if self.intercept >= 0 else "-"
        line = f"Private = {self.slope:.3f} x OOF {sign} {abs(self.intercept):.5f}"
        return f"{line} (Theil-Sen, {self.count} submissions, leave-one-out error {self.error:.5f})"


def newest(rows: Sequence[Row]) -> list[Row]:
    """The submissions of the newest fold table that have an out-of-fold score: scores on other tables cannot be compared."""
    folds = max(rows, key=lambda row: row.time).folds if rows else ""
    return [row for row in rows if row.folds == folds and row.oof is not None]


def line_of(rows: Sequence[Row]) -> Line | None:
    """The robust line (Theil-Sen) through the submissions of the newest fold table.

    None with fewer than three different submissions that have both scores, or where all have the same out-of-fold score.
    """
    scores = _scores(rows)
    if len(scores) < LEAST or len({oof for oof, _ in scores}) < 2:
        return None
    import numpy as np

    points = np.array(scores)
    slope, intercept = _theil_sen(points)
    errors = []
    for out, (oof, private) in enumerate(points):
        a, b = _theil_sen(np.delete(points, out, axis=0))
        errors.append(private - b - a * oof)
    return Line(slope, intercept, float(np.sqrt(np.mean(np.square(errors)))), len(points))


def why_no_line(rows: Sequence[Row]) -> str:
    """Why there is no line, in a sentence."""
    if (count := len(_scores(rows))) < LEAST:
        need = f"it needs {LEAST} submissions of one fold table with OOF and Private"
        return f"No prediction of Private scores: {need}, not {count}."
    return "No prediction of Private scores: all submissions have the same OOF score."


def _scores(rows: Sequence[Row]) -> list[tuple[float | None, float]]:
    """Out-of-fold and Private score of each submission that has both, once."""
    return list({row.id: (row.oof, row.private) for row in newest(rows) if row.private is not None}.values())


def _theil_sen(points: np.ndarray) -> tuple[float, float]:
    """Slope and intercept; flat where all have the same out-of-fold score."""
    import numpy as np
    from scipy.stats import theilslopes

    if len(set(points[:, 0])) < 2:
        return 0.0, float(np.median(points[:, 1]))
    found = theilslopes(points[:, 1], points[:, 0], method="joint")  # the intercept is the median of what the slope leaves
    return float(found.slope), float(found.intercept)

"""The line from out-of-fold to Private scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from melfold.kaggle.board import line_of, why_no_line
from melfold.kaggle.ledger import Row

ROW = Row("t", "a", "2026-01-01T00:00:00Z", "", "a", "", "", "f1", "scratch", "", status="complete")


def rows_of(points: list[tuple[float, float]], folds: str = "f1") -> list[Row]:
    """Submissions, one each day, with these out-of-fold and Private scores."""
    return [
        replace(
            ROW,
            tag=f"t{i}",
            id=f"s{i}",
            time=f"2026-01-{i + 1:02}T00:00:00Z",
            folds=folds,
            oof_lwlrap=str(x),
            private_score=str(y),
        )
        for i, (x, y) in enumerate(points)
    ]


def test_a_line_predicts_private_from_oof_with_its_leave_one_out_error() -> None:
    line = line_of(rows_of([(0.80, 0.70), (0.84, 0.72), (0.90, 0.75)]))
    assert (line.slope, line.intercept, line.error) == pytest.approx((0.5, 0.3, 0), abs=1e-9)
    assert line.predict(0.88) == pytest.approx((0.74, 0.74, 0.74))
    rng = np.random.default_rng(0)
    points = [(x, 0.3 + 0.5 * x + rng.normal(0, 0.004)) for x in np.linspace(0.7, 0.9, 9)]
    line = line_of(rows_of(points))
    assert 0.002 < line.error < 0.008
    value, low, high = line.predict(0.8)
    assert low < value < high
    assert abs(value - 0.7) < 0.006


def test_one_odd_submission_hardly_moves_the_line() -> None:
    points = [(x, 0.3 + 0.5 * x) for x in np.linspace(0.7, 0.9, 7)]
    points[3] = (points[3][0], 0.2)
    line = line_of(rows_of(points))
    assert line.predict(0.8)[0] == pytest.approx(0.7, abs=0.005)
    assert line.error > 0.1, "the error says that one was far off"


def test_fewer_than_three_submissions_or_other_folds_give_no_line() -> None:
    two = rows_of([(0.8, 0.7), (0.9, 0.75)])
    assert line_of([]) is None
    assert line_of(two) is None
    assert line_of([*two, replace(two[0], tag="again")]) is None, "the same submission twice is one"
    assert "needs 3 submissions of one fold table with OOF and Private, not 2" in why_no_line(two)
    old = [replace(row, time="2025-01-01T00:00:00Z", id=f"old {row.id}") for row in rows_of([(0.7, 0.6), (0.75, 0.61)], "f2")]
    assert line_of([*two, *old]) is None
    assert line_of(rows_of([(0.8, 0.7), (0.8, 0.71), (0.8, 0.72)])) is None
    assert "the same OOF score" in why_no_line(rows_of([(0.8, 0.7), (0.8, 0.71), (0.8, 0.72)]))

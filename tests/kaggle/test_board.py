"""The line from out-of-fold to Private scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from melfold.cli.main import app
from melfold.files import Home
from melfold.kaggle.board import line_of, why_no_line
from melfold.kaggle.ledger import Ledger, Row
from melfold.report.ledger import draw_ledger

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


def test_ledger_show_prints_the_line_and_what_a_waiting_submission_may_expect(tmp_path: Path) -> None:
    home = Home(tmp_path)

    def shown() -> str:
        result = CliRunner().invoke(app, ["ledger", "show", "--home", str(tmp_path)])
        assert result.exit_code == 0, result.output
        return result.output

    *two, third = rows_of([(0.80, 0.70), (0.84, 0.722), (0.90, 0.75)])
    for row in two:
        Ledger.of(home).add(row)
    assert "No prediction of Private scores: it needs 3 submissions" in shown()
    Ledger.of(home).add(third)
    waits = replace(
        third, tag="t9", id="s9", time="2026-02-01T00:00:00Z", oof_lwlrap="0.88", private_score="", status="submitted"
    )
    Ledger.of(home).add(waits)
    found = shown()
    assert "Private = 0.500 x OOF + 0.30000 (Theil-Sen, 3 submissions, leave-one-out error 0.00" in found
    assert "s9: expect Private 0.74000 (95 % 0." in found
    assert "s0: expect" not in found


def test_the_plot_shows_the_line_where_there_is_one() -> None:
    for count, expected in ((2, False), (3, True)):
        figure = draw_ledger(rows_of([(0.80, 0.70), (0.84, 0.722), (0.90, 0.75)][:count]))
        names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert any("Private by OOF (leave-one-out error" in name for name in names) == expected

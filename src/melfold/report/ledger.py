"""The ledger as charts: out-of-fold against leaderboard scores, and the scores over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from melfold.errors import MelfoldError
from melfold.facts import facts_of
from melfold.files import atomic_path
from melfold.kaggle.board import line_of
from melfold.kaggle.ledger import Row
from melfold.report.charts import MEDALS, name_points, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOK = {"public": ("C1", "o"), "private": ("C0", "s")}
"""Colour and marker of a half."""

NEAR = 0.03
"""Medal lines this far beyond the scores are drawn too, in lwlrap."""

NAME_LENGTH = 40


def scored(rows: Sequence[Row], half: str) -> list[tuple[float, float, Row]]:
    """OOF score, score and row of the submissions that have both. `half`: `public` or `private`."""
    return [(row.oof, value, row) for row in rows if row.oof and (value := getattr(row, half)) is not None]


def plot_ledger(rows: Sequence[Row], path: Path) -> None:
    """Write the picture as a PNG, see `draw_ledger`.

    Raises:
        MelfoldError: fewer than two submissions have an OOF and a leaderboard score.
    """
    figure = draw_ledger(rows)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_ledger(rows: Sequence[Row]) -> Figure:
    """Left: out-of-fold against leaderboard scores. Right: scores over time.

    Points are numbered, and the names stand in a list, so that long ones do not hide anything.

    Raises:
        MelfoldError: fewer than two submissions have an OOF and a leaderboard score.
    """
    from matplotlib.figure import Figure

    rows = [row for row in sorted(rows, key=lambda row: row.time) if row.public is not None or row.private is not None]
    most = max(len(scored(rows, half)) for half in LOOK)
    if most < 2:
        raise MelfoldError("too little to draw", f"{most} submissions with OOF and leaderboard scores", "Submit more, then sync")
    numbers = {row.tag: str(number) for number, row in enumerate(rows, 1)}
    figure = Figure(figsize=(15, max(5.0, 1.2 + 0.2 * len(rows))), layout="constrained")
    left, right, names = figure.subplots(1, 3, width_ratios=[5, 4, 3])
    draw_scores(left, rows, lambda row: numbers[row.tag])
    draw_times(right, rows)
    ids = [row.id if len(row.id) <= NAME_LENGTH else f"{row.id[: NAME_LENGTH - 13]}…{row.id[-12:]}" for row in rows]
    listed = "\n".join(f"{number:>2}  {name}" for number, name in enumerate(ids, 1))
    names.text(0, 1, listed, transform=names.transAxes, va="top", fontsize=8, family="monospace", linespacing=1.4)
    names.axis("off")
    return figure


def draw_scores(axes: Axes, rows: Sequence[Row], name: Callable[[Row], str]) -> None:
    """OOF against Public and Private scores, with Spearman's rank correlation of each, the line that predicts Private (see
    `kaggle.board`), and the medals' lines. `name` gives what is written beside a submission's points.
    """
    from scipy.stats import spearmanr

    style_axes(axes, "out-of-fold lwlrap", "leaderboard lwlrap")
    axes.margins(0.12)
    points = []
    for half, (colour, marker) in LOOK.items():
        if found := scored(rows, half):
            oof, scores, _ = zip(*found, strict=True)
            told = f"{half.title()} (n = {len(found)}"
            if len(set(oof)) > 1 and len(set(scores)) > 1:
                told += f", rank correlation {spearmanr(oof, scores).statistic:.2f}"
            axes.scatter(oof, scores, color=colour, marker=marker, s=22, label=f"{told})")
            points += [(x, y, name(row)) for x, y, row in found]
    if line := line_of(rows):
        limits = axes.get_xlim(), axes.get_ylim()
        values, low, high = zip(*map(line.predict, limits[0]), strict=True)
        axes.plot(limits[0], values, color="C0", linewidth=1, label=f"Private by OOF (leave-one-out error {line.error:.4f})")
        axes.fill_between(limits[0], low, high, color="C0", alpha=0.12, linewidth=0)
        axes.set(xlim=limits[0], ylim=limits[1])  # an interval of few submissions is wide, and must not make all else small
    _draw_medals(axes, rows)
    name_points(axes, points)


def draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    """Public and Private scores by date, the best so far, and the medals' lines."""
    style_axes(axes, "", "leaderboard lwlrap")
    axes.margins(0.12)
    days = pd.to_datetime([row.time for row in rows], format="ISO8601", errors="coerce")
    for half, (colour, marker) in LOOK.items():
        known = [(day, getattr(row, half)) for day, row in zip(days, rows, strict=True) if not pd.isna(day)]
        if found := sorted((day.to_pydatetime(), value) for day, value in known if value is not None):
            times, scores = zip(*found, strict=True)
            axes.scatter(times, scores, color=colour, marker=marker, s=22)
            best = list(accumulate(scores, max))
            axes.step(times, best, where="post", color=colour, alpha=0.6, label=f"best {half.title()} so far")
    axes.tick_params(axis="x", labelrotation=30)
    _draw_medals(axes, rows)


def _draw_medals(axes: Axes, rows: Sequence[Row]) -> None:
    """The medals' lines, and the legend."""
    standings = facts_of(rows[-1].competition).standings
    low, high = axes.get_ylim()
    for medal, score in standings.lines.items() if standings else ():
        if low - NEAR < score < high + NEAR:
            axes.axhline(score, color=MEDALS[medal], linewidth=1, linestyle="--")
            axes.annotate(f"{medal} {score:.5f}", (0.005, score), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    axes.legend(fontsize=8, frameon=False)

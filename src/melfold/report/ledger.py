"""The ledger as a picture: out-of-fold against leaderboard scores, and the scores over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from melfold.errors import MelfoldError
from melfold.facts import facts_of
from melfold.files import atomic_path
from melfold.kaggle.ledger import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOK = {"public": ("#2b6cb0", "o"), "private": ("#c05621", "s")}
"""Colour and marker of a half."""

MEDAL_COLOURS = {"gold": "#b7791f", "silver": "#718096", "bronze": "#975a16"}
NEAR = 0.03
"""Medal lines this far beyond the scores are drawn too, in lwlrap."""

NAME_LENGTH = 40
OFFSETS = [(x * reach, y * reach) for reach in (7, 13, 20, 28) for x, y in ((1, 0.5), (-1.6, 0.5), (0, 1), (0, -1.6), (1, -1))]
"""Where a point's number may stand, in points from it; the first free place is taken."""


class Point(NamedTuple):
    """A submission in a plot; `number` is its place in the list of names."""

    number: int
    oof: float | None
    score: float
    time: datetime


def scored(rows: Sequence[Row], half: str) -> list[tuple[float, float, str]]:
    """(OOF score, score, id) of the submissions that have both. `half`: `public` or `private`."""
    return [(row.oof, value, row.id) for row in rows if row.oof and (value := getattr(row, half)) is not None]


def points_of(rows: Sequence[Row], half: str) -> list[Point]:
    """The submissions that have a score on a half (`public` or `private`)."""
    found = [(number, row, getattr(row, half)) for number, row in enumerate(rows, 1)]
    return [Point(n, row.oof, value, datetime.fromisoformat(row.time)) for n, row, value in found if value is not None]


def plot_ledger(rows: Sequence[Row], path: Path) -> None:
    """Write the picture, see `draw_ledger`.

    Raises:
        MelfoldError: fewer than two submissions have an OOF and a leaderboard score.
    """
    import matplotlib.pyplot as plt

    figure = draw_ledger(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def draw_ledger(rows: Sequence[Row]) -> Figure:
    """Left: OOF lwlrap against Public and Private scores, with Spearman's rank correlation of each. Right: scores over time.

    Points are numbered, and the names stand in a list, so that long ones do not hide anything. Lines show the medals.

    Raises:
        MelfoldError: fewer than two submissions have an OOF and a leaderboard score.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in sorted(rows, key=lambda row: row.time) if row.public is not None or row.private is not None]
    halves = {half: points_of(rows, half) for half in LOOK}
    most = max(sum(point.oof is not None for point in points) for points in halves.values())
    if most < 2:
        raise MelfoldError("too little to draw", f"{most} submissions with OOF and leaderboard scores", "Submit more, then sync")
    standings = facts_of(rows[-1].competition).standings
    medals = standings.lines if standings else {}
    height = max(5.0, 1.2 + 0.2 * len(rows))
    figure, (left, right, names) = plt.subplots(1, 3, figsize=(15, height), width_ratios=[5, 4, 3], constrained_layout=True)
    _draw_oof(left, halves)
    _draw_times(right, halves)
    for axes in (left, right):
        _draw_medals(axes, medals)
        axes.set_ylabel("leaderboard lwlrap")
        axes.grid(alpha=0.3)
    figure.canvas.draw()  # only now is it known where things are
    _number(left, [(point.oof, point.score, point.number) for points in halves.values() for point in points if point.oof])
    _list_names(names, rows)
    return figure


def _draw_oof(axes: Axes, halves: Mapping[str, Sequence[Point]]) -> None:
    from scipy.stats import spearmanr

    for half, (colour, marker) in LOOK.items():
        pairs = [(point.oof, point.score) for point in halves[half] if point.oof is not None]
        if not pairs:
            continue
        oof, scores = zip(*pairs, strict=True)
        rank = spearmanr(oof, scores).statistic if len(set(oof)) > 1 and len(set(scores)) > 1 else float("nan")
        told = f"rank correlation {rank:.2f}, n = {len(pairs)}" if rank == rank else f"n = {len(pairs)}"
        axes.scatter(oof, scores, color=colour, marker=marker, s=22, label=f"{half.title()} ({told})")
    axes.margins(0.12)
    axes.set_xlabel("out-of-fold lwlrap")
    axes.legend(fontsize=8)


def _draw_times(axes: Axes, halves: Mapping[str, Sequence[Point]]) -> None:
    """Scores by date, and the best so far."""
    for half, (colour, marker) in LOOK.items():
        points = sorted(halves[half], key=lambda point: point.time)
        if not points:
            continue
        times, best = [point.time for point in points], [max(p.score for p in points[: i + 1]) for i in range(len(points))]
        axes.scatter(times, [point.score for point in points], color=colour, marker=marker, s=22)
        axes.step(times, best, where="post", color=colour, alpha=0.6, label=f"best {half.title()} so far")
    axes.margins(0.12)
    axes.tick_params(axis="x", labelrotation=30)
    axes.legend(fontsize=8)


def _draw_medals(axes: Axes, medals: Mapping[str, float]) -> None:
    low, high = axes.get_ylim()
    for medal, score in medals.items():
        if low - NEAR < score < high + NEAR:
            axes.axhline(score, color=MEDAL_COLOURS.get(medal, "#444444"), linewidth=1, linestyle="--")
            axes.annotate(f"{medal} {score:.5f}", (0.005, score), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")


def _number(axes: Axes, points: Sequence[tuple[float, float, int]]) -> None:
    """Write each point's number beside it, where no other number is."""
    from matplotlib.transforms import Bbox

    taken: list[Bbox] = [text.get_window_extent() for text in axes.texts]
    for x, y, number in points:
        for offset in OFFSETS:
            text = axes.annotate(str(number), (x, y), xytext=offset, textcoords="offset points", fontsize=7)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            if offset != OFFSETS[-1]:
                text.remove()
        taken.append(box)


def _list_names(axes: Axes, rows: Sequence[Row]) -> None:
    axes.axis("off")
    names = [row.id if len(row.id) <= NAME_LENGTH else f"{row.id[: NAME_LENGTH - 13]}…{row.id[-12:]}" for row in rows]
    listed = "\n".join(f"{number:>2}  {name}" for number, name in enumerate(names, 1))
    axes.text(0, 1, listed, transform=axes.transAxes, va="top", fontsize=8, family="monospace", linespacing=1.4)

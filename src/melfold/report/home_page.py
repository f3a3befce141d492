"""The page of a home: every run, prediction and submission, and how far out-of-fold scores can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from melfold.artefacts import Artefact
from melfold.combine.oof import score
from melfold.combine.rebuild import label_of
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.kaggle.board import line_of, why_no_line
from melfold.kaggle.ledger import Ledger, Row
from melfold.learn.predictions import list_predictions
from melfold.learn.runs import FULL, list_runs
from melfold.report.charts import name_points, new_chart, svg
from melfold.report.ledger import draw_scores, draw_times, scored
from melfold.report.pages import write_page
from melfold.report.training import cost_of

NAME_LENGTH = 18
"""Of a name in a chart."""


def write_home_page(home: Home, path: Path) -> None:
    """Write the page of a home.

    Raises:
        MelfoldError: a ledger that cannot be read.
    """
    runs, problems = run_rows(home)
    ledger = Ledger.of(home).rows()
    scores, times = Markup(), Markup()
    if known := [row for row in ledger if row.public is not None or row.private is not None]:
        draw_scores(axes := new_chart("", ""), known, lambda row: row.id[:NAME_LENGTH])
        scores = svg(axes, "OOF against leaderboard scores, with the medals' lines")
        draw_times(axes := new_chart("", ""), known)
        times = svg(axes, "Leaderboard scores over time, with the medals' lines")
    submissions = submission_rows(home, ledger)
    charts = {"scores": scores, "times": times, "cost": cost_chart(runs)}
    told = trust_words(ledger)
    write_page(path, "home.html", name=home.root.name, runs=runs, problems=problems, submissions=submissions, told=told, **charts)


def run_rows(home: Home) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """A row for each prediction of each run, the best first; and the runs that cannot be shown, with the reason."""
    rows, problems = [], []
    for name, run in list_runs(home):
        if isinstance(run, MelfoldError):
            problems.append((name, str(run)))
            continue
        for prediction in list_predictions(run):
            folds = [fold for fold in run.done_folds() if fold != FULL]
            row = {"name": prediction.label, "run": run, "own": not prediction.name}
            row["folds"] = f"{len(folds)}/{run.recipe.folds.n_folds}" + (" + full" if FULL in run.done_folds() else "")
            try:
                rows.append(row | {"scores": score(prediction) if folds else None, "cost": cost_of(run)})
            except MelfoldError as error:
                problems.append((prediction.label, str(error)))
    return sorted(rows, key=lambda row: -(row["scores"].oof_lwlrap if row["scores"] else 0)), problems


def submission_rows(home: Home, ledger: Sequence[Row]) -> list[Row]:
    """The submissions of the ledger, the newest first, then those that were built but not submitted."""
    rows, known = list(reversed(ledger)), {row.id for row in ledger}
    for path in sorted(home.submissions.glob("*/manifest.json")):
        if path.parent.name not in known:
            try:
                content = Artefact(path).read()
            except MelfoldError:
                continue  # of another version: `melfold submission` tells what is wrong with it
            runs = "+".join(map(label_of, content["runs"]))
            track, oof = content.get("track", ""), str(content.get("oof_lwlrap") or "")
            rows.append(Row("", path.parent.name, "", "", runs, "", "", "", track, oof, status="not submitted"))
    return rows


def trust_words(ledger: Sequence[Row]) -> str:
    """How far Private scores are from out-of-fold scores, in words."""
    if not (pairs := scored(ledger, "private")):
        return "No submission has both an OOF and a Private score yet."
    gap = float(np.mean([oof - value for oof, value, _ in pairs]))
    side = "above" if gap >= 0 else "below"
    words = f"OOF scores are {abs(gap):.3f} {side} Private scores on average ({len(pairs)} submissions)."
    return f"{words} {line_of(ledger) or why_no_line(ledger)}"


def cost_chart(rows: Sequence[dict[str, Any]]) -> Markup:
    """What a run's training took against its OOF score; empty where nothing is known."""
    known = [row for row in rows if row["own"] and row["scores"] and row["cost"].seconds]
    points = [(row["cost"].seconds / 3600, row["scores"].oof_lwlrap, row["name"][:NAME_LENGTH]) for row in known]
    if not points:
        return Markup()
    axes = new_chart("hours of training, all folds", "OOF lwlrap")
    axes.margins(0.12)
    axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], color="C2", s=22)
    name_points(axes, points)
    return svg(axes, "OOF score against training time")

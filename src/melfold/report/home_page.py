"""The page of a home: every run, prediction and submission, and how far out-of-fold scores can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from melfold.artefacts import Artefact
from melfold.combine.oof import score
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.kaggle.ledger import Ledger, Row
from melfold.learn.predictions import Prediction, list_predictions
from melfold.learn.runs import FULL, Run, list_runs
from melfold.report.charts import Chart, Level, Line
from melfold.report.ledger import scored
from melfold.report.pages import write_page
from melfold.report.training import cost_of

WIDE = {"width": 410, "height": 270}
"""Pixels of this page's charts."""

PUBLIC, PRIVATE, OOF = 1, 0, 2
"""Numbers of colours."""


def write_home_page(home: Home, path: Path, *, medals: Mapping[str, float] | None = None) -> None:
    """Write the page of a home.

    Args:
        medals: names and Private scores of lines to draw, such as `{"gold": 0.744}`; the words gold, silver and bronze give
            their colours.

    Raises:
        MelfoldError: a ledger that cannot be read.
    """
    runs, problems = run_rows(home)
    ledger = Ledger.of(home).rows()
    levels = [Level(name, value, _medal(name)) for name, value in (medals or {}).items()]
    pairs = scored(ledger, "private")
    write_page(
        path,
        "home.html",
        name=home.root.name,
        runs=runs,
        problems=problems,
        submissions=submission_rows(home, ledger),
        trust=trust_chart(pairs, levels),
        trust_words=trust_words(pairs),
        over_time=time_chart(ledger, levels),
        cost=cost_chart(runs),
        medals=medals or {},
    )


def _medal(name: str) -> str:
    return next((medal for medal in ("gold", "silver", "bronze") if medal in name), "")


def run_rows(home: Home) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """A row for each prediction of each run, the best first; and the runs that cannot be shown, with the reason."""
    rows, problems = [], []
    for name, run in list_runs(home):
        if isinstance(run, MelfoldError):
            problems.append((name, str(run)))
            continue
        for prediction in list_predictions(run):
            try:
                rows.append(_run_row(prediction))
            except MelfoldError as error:
                problems.append((prediction.label, str(error)))
    return sorted(rows, key=lambda row: -(row["oof"] or 0)), problems


def _run_row(prediction: Prediction) -> dict[str, Any]:
    run = prediction.run
    scores = score(prediction) if any(fold != FULL for fold in run.done_folds()) else None
    cost = cost_of(run)
    return {
        "name": prediction.label,
        "competition": run.info.competition,
        "track": run.info.track,
        "model": run.recipe.model.name,
        "recipe": run.recipe.name,
        "oof": scores and scores.oof_lwlrap,
        "low": scores.low if scores else float("nan"),
        "high": scores.high if scores else float("nan"),
        "folds": _folds(run),
        "seconds": cost.seconds,
        "speed": cost.crops_per_second,
        "own": not prediction.name,
    }


def _folds(run: Run) -> str:
    done = [fold for fold in run.done_folds() if fold != FULL]
    return f"{len(done)}/{run.recipe.folds.n_folds}" + (" + full" if FULL in run.done_folds() else "")


def submission_rows(home: Home, ledger: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each submission of the ledger, the newest first, then those that were built but not submitted."""
    rows = [
        {
            "id": row.id,
            "time": row.time,
            "track": row.track,
            "runs": row.runs,
            "oof": row.oof,
            "public": row.public,
            "private": row.private,
            "status": row.status,
            "note": row.note,
        }
        for row in reversed(ledger)
    ]
    known = {row.id for row in ledger}
    for path in sorted(home.submissions.glob("*/manifest.json")):
        if path.parent.name not in known:
            try:
                rows.append(_built(path))
            except MelfoldError:
                continue  # of another version: `melfold submission` tells what is wrong with it
    return rows


def _built(path: Path) -> dict[str, Any]:
    content = Artefact(path).read()
    runs = " ".join(str(run.get("name", "")) for run in content.get("runs", []))
    shown = {"id": path.parent.name, "track": content.get("track", ""), "runs": runs, "oof": content.get("oof_lwlrap")}
    return shown | {"time": "", "public": None, "private": None, "status": "not submitted", "note": ""}


def fitted(pairs: Sequence[tuple[float, float, str]]) -> tuple[float, float] | None:
    """Slope and intercept of the least-squares line; none for fewer than three submissions, or if all OOF scores are equal."""
    oof, value = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    if len(pairs) < 3 or np.ptp(oof) < 1e-9:
        return None
    slope, intercept = np.polyfit(oof, value, 1)
    return float(slope), float(intercept)


def trust_chart(pairs: Sequence[tuple[float, float, str]], levels: Sequence[Level]) -> Markup:
    """OOF against Private scores, with medal lines and the fitted line."""
    if not pairs:
        return Markup("")
    oof = [p[0] for p in pairs]
    names = [f"{id}: OOF {o:.5f}, Private {v:.5f}" for o, v, id in pairs]
    ids = [p[2] for p in pairs]
    lines = [Line("submissions", oof, [p[1] for p in pairs], PRIVATE, dots=True, line=False, names=names, labels=ids)]
    if line := fitted(pairs):
        ends = [min(oof), max(oof)]
        lines.append(Line("fit", ends, [line[0] * x + line[1] for x in ends], PUBLIC))
    return Chart("OOF against Private scores", "OOF lwlrap", "Private lwlrap", lines, levels, **WIDE).svg()


def trust_words(pairs: Sequence[tuple[float, float, str]]) -> str:
    """What the chart says, in a sentence."""
    if not pairs:
        return "No submission has both an OOF and a Private score yet."
    gap = float(np.mean([oof - value for oof, value, _ in pairs]))
    words = (
        f"OOF scores are {abs(gap):.3f} {'above' if gap >= 0 else 'below'} Private scores on average ({len(pairs)} submissions)."
    )
    if line := fitted(pairs):
        from scipy.stats import spearmanr

        rank = spearmanr([p[0] for p in pairs], [p[1] for p in pairs]).statistic
        words += f" Fitted line: {line[0]:.2f} of Private for 1 of OOF"
        words += f"; rank correlation {rank:.2f}." if rank == rank else "."
    return words


def time_chart(rows: Sequence[Row], levels: Sequence[Level]) -> Markup:
    """Private and Public scores by the day of their submission, and the best Private score so far."""
    lines, days = [], []
    for half, style in (("private", PRIVATE), ("public", PUBLIC)):
        points = [(_day(row.time), getattr(row, half), row.id) for row in rows]
        known = sorted((day, value, id) for day, value, id in points if day is not None and value)
        days += [day for day, _, _ in known]
        names = [f"{id}: {half.title()} {value:.5f}" for _, value, id in known]
        lines.append(Line(half, [d for d, _, _ in known], [v for _, v, _ in known], style, dots=True, line=False, names=names))
        if half == "private" and len(known) > 1:
            best = list(np.maximum.accumulate([v for _, v, _ in known]))
            lines.append(Line("best so far", [d for d, _, _ in known], best, style))
    if not days:
        return Markup("")
    span = sorted({min(days), max(days)})
    texts = [(day, datetime.fromtimestamp(day * 86_400).strftime("%Y-%m-%d")) for day in span]
    return Chart("Scores over time", "time", "lwlrap", lines, levels, x_texts=texts, **WIDE).svg()


def _day(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() / 86_400
    except ValueError:
        return None


def cost_chart(rows: Sequence[dict[str, Any]]) -> Markup:
    """What a run's training took against its OOF score."""
    known = [row for row in rows if row["own"] and row["oof"] and row["seconds"]]
    if not known:
        return Markup("")
    hours, oof = [row["seconds"] / 3600 for row in known], [row["oof"] for row in known]
    names = [f"{row['name']}: {row['oof']:.5f}" for row in known]
    lines = [Line("runs", hours, oof, OOF, dots=True, line=False, names=names, labels=[row["name"] for row in known])]
    return Chart("OOF score against training time", "hours of training, all folds", "OOF lwlrap", lines, **WIDE).svg()

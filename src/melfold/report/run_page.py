"""The page of a run, or of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from melfold.combine.oof import OofScores, Together, read_together, score
from melfold.compute import Progress, silent
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.learn.predictions import Prediction
from melfold.learn.runs import Run
from melfold.metrics import paired_bootstrap
from melfold.probs import Probs
from melfold.report import diagnosis, training
from melfold.report.charts import GREY, new_chart, svg
from melfold.report.media import Media
from melfold.report.pages import write_page
from melfold.report.pictures import mel_ticks

LISTED = 6
"""Labels in a list of confusions."""


@dataclass(frozen=True)
class Side:
    """One of the predictions on a page, on the clips that all of them share."""

    label: str
    run: Run
    scores: OofScores
    probs: Probs
    pairs: pd.DataFrame
    labels: pd.DataFrame
    confusions: pd.DataFrame
    calibration: pd.DataFrame

    @classmethod
    def of(cls, prediction: Prediction, together: Together) -> Side:
        """Score a prediction and find its errors."""
        targets, probs = together.targets, together.tables[prediction.label]
        pairs = diagnosis.true_pairs(targets, probs)
        labels = diagnosis.scores_by(pairs["label"], pairs, together.groups).reindex(targets.columns)
        labels["clips"] = labels["clips"].fillna(0).astype(int)
        confusions, calibration = diagnosis.confusions(targets, probs), diagnosis.calibration(targets, probs)
        return cls(prediction.label, prediction.run, score(prediction), probs, pairs, labels, confusions, calibration)


def write_run_page(
    predictions: Sequence[Prediction],
    path: Path,
    *,
    competition: Competition | None = None,
    audio: bool = True,
    clips: int = 3,
    progress: Progress = silent,
) -> Media:
    """Write the page of one prediction, or of two side by side.

    Args:
        competition, audio: as in `Media`, which is returned.
        clips: how many of each label's worst clips are shown.

    Raises:
        MelfoldError: no trained fold, predictions that cannot be compared, or more than two.
    """
    if len(predictions) > 2:
        found = ", ".join(prediction.label for prediction in predictions)
        raise MelfoldError("a page shows one or two predictions", found, "Compare more with `melfold compare`")
    together = read_together(predictions, common=True)
    sides = [Side.of(prediction, together) for prediction in predictions]
    runs, names = [side.run for side in sides], [side.label for side in sides]
    media = Media(runs[0], competition, audio)
    labels = label_rows(sides, together, media, clips)
    media.make(progress)
    tables = pd.DataFrame([training.provenance(run) for run in runs])
    write_page(
        path,
        "run.html",
        names=names,
        sides=sides,
        facts=[training.facts(run) for run in runs],
        difference=paired_bootstrap(together.targets, sides[-1].probs, sides[0].probs, together.groups),
        clips=len(together.targets),
        competition=runs[0].info.competition,
        curves=training.learning_curves(runs),
        curve_keys=max((run.done_folds() for run in runs), key=len),
        labels=labels,
        pairs=[diagnosis.largest(side.confusions.stack(), 2 * LISTED) for side in sides],
        calibration=calibration_chart(sides),
        calibration_errors=[diagnosis.calibration_error(side.calibration) for side in sides],
        groups=_groups(sides, together, media.manifest),
        recipe=training.recipe_rows([prediction.recipe for prediction in predictions]),
        provenance=[(name, list(tables[name])) for name in tables if tables[name].any()],
        ticks=mel_ticks(runs[0].recipe.logmel),
        media=media,
    )
    return media


def label_rows(sides: Sequence[Side], together: Together, media: Media, clips: int) -> list[dict[str, Any]]:
    """A row for each label, the worst of the first prediction first, with what opens under it."""
    partners = diagnosis.together(together.targets)
    pairs = sides[0].pairs.sort_values(["precision", "prob", "fname"], kind="stable")
    rows = []
    for label in sides[0].labels.sort_values("lwlrap", kind="stable").index:
        scores = [side.labels.loc[label].to_dict() for side in sides]
        worst = pairs.loc[pairs["label"] == label, "fname"].head(clips)
        row = {
            "label": label,
            "clips": int(scores[0]["clips"]),
            "scores": scores,
            "difference": scores[-1]["lwlrap"] - scores[0]["lwlrap"],
            "above": [diagnosis.largest(side.confusions.loc[label], LISTED) for side in sides],
            "below": [diagnosis.largest(side.confusions[label], LISTED) for side in sides],
            "together": diagnosis.largest(partners.loc[label], LISTED),
            "worst": [media.card(fname, together.targets, [side.probs for side in sides]) for fname in worst],
        }
        rows.append(row)
    return rows


def calibration_chart(sides: Sequence[Side]) -> Markup:
    """Predicted against observed shares, a line for each prediction."""
    axes = new_chart("predicted probability", "share that is true")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
    for style, side in enumerate(sides):
        bins = side.calibration
        spread = [bins["observed"] - bins["low"], bins["high"] - bins["observed"]]
        axes.errorbar(bins["predicted"], bins["observed"], spread, color=f"C{style}", marker="o", markersize=4, linewidth=1.3)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return svg(axes, "Calibration. Points above the diagonal: labels are present more often than predicted")


def _groups(sides: Sequence[Side], together: Together, manifest: pd.DataFrame) -> list[tuple[str, list[dict[str, Any]]]]:
    """Scores by kind of clip, as rows of the templates' bars; length and flags only as far as the cache is here."""
    kinds = {"Number of labels": diagnosis.count_groups(together.targets)}
    if len(known := manifest.loc[manifest.index.intersection(together.targets.index)]):
        lengths, flags = diagnosis.length_groups(known["seconds"]), diagnosis.flag_groups(known["flags"])
        kinds = {"Length": lengths, **kinds, "Flags of the cache": flags}
    found = []
    for title, kind in (kinds | {"Held-out fold": together.folds}).items():
        tables = [diagnosis.scores_by(side.pairs["fname"].map(kind), side.pairs, together.groups) for side in sides]
        found.append((title, [{"name": name, "scores": [t.loc[name].to_dict() for t in tables]} for name in tables[0].index]))
    return found

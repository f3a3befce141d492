"""The page of a run, or of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from melfold.combine.oof import OofScores, Together, read_together, score
from melfold.compute import Progress, silent
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.learn.predictions import Prediction
from melfold.metrics import difference_of
from melfold.probs import Probs
from melfold.report import diagnosis, training
from melfold.report.cards import ClipSource, Media, card
from melfold.report.charts import Chart, Line
from melfold.report.pages import number, write_page
from melfold.report.pictures import mel_ticks

CLIPS = 3
"""Worst clips shown of each label."""

LISTED = 6
"""Labels in a list of confusions."""


@dataclass(frozen=True)
class Side:
    """One of the predictions on a page, on the clips that all of them share."""

    prediction: Prediction
    scores: OofScores
    probs: Probs
    pairs: pd.DataFrame
    labels: pd.DataFrame
    confusions: pd.DataFrame

    @classmethod
    def of(cls, prediction: Prediction, together: Together) -> Side:
        """Score a prediction and find its errors."""
        targets, probs = together.targets, together.tables[prediction.label]
        pairs = diagnosis.true_pairs(targets, probs)
        labels = diagnosis.by_label(pairs, targets.columns, together.groups)
        return cls(prediction, score(prediction), probs, pairs, labels, diagnosis.confusions(targets, probs))


def write_run_page(
    predictions: Sequence[Prediction],
    path: Path,
    *,
    competition: Competition | None = None,
    audio: bool = True,
    clips: int = CLIPS,
    progress: Progress = silent,
) -> Media:
    """Write the page of one prediction, or of two side by side.

    Args:
        competition: where the sounds come from; without, the page has none.
        audio: whether sounds become part of the page.
        clips: how many of each label's worst clips are shown.

    Returns:
        The pictures and sounds in it.

    Raises:
        MelfoldError: no trained fold, predictions that cannot be compared, or more than two.
    """
    if len(predictions) > 2:
        found = ", ".join(prediction.label for prediction in predictions)
        raise MelfoldError("a page shows one or two predictions", found, "Compare more with `melfold compare`")
    together = read_together(predictions, common=True)
    sides = [Side.of(prediction, together) for prediction in predictions]
    media = Media(ClipSource.of(predictions[0].run, competition, audio=audio))
    labels = label_rows(sides, together, media, clips)
    media.make(progress)
    write_page(
        path,
        "run.html",
        title=" and ".join(side.prediction.label for side in sides),
        names=[side.prediction.label for side in sides],
        sides=sides,
        facts=[training.facts(side.prediction.run) for side in sides],
        verdict=_verdict(sides, together),
        clips=len(together.targets),
        competition=sides[0].prediction.run.info.competition,
        folds=_folds(sides, together),
        curves=training.learning_curves([side.prediction.run for side in sides]),
        curve_keys=max((side.prediction.run.done_folds() for side in sides), key=len),
        labels=labels,
        pairs=[diagnosis.largest(side.confusions, 2 * LISTED) for side in sides],
        calibration=calibration_chart(sides, together),
        calibration_errors=[diagnosis.calibration(together.targets, side.probs).error for side in sides],
        groups=_groups(sides, together, media.source),
        recipe=training.recipe_rows([side.prediction.recipe for side in sides]),
        provenance=_beside([training.provenance(side.prediction.run) for side in sides]),
        ticks=mel_ticks(media.source.recipe.logmel),
        media=media,
    )
    return media


def _verdict(sides: Sequence[Side], together: Together) -> dict[str, Any] | None:
    """The paired difference of two predictions, the second less the first."""
    if len(sides) < 2:
        return None
    difference = difference_of(together.targets, sides[1].probs, sides[0].probs, together.groups)
    decided = difference.low > 0 or difference.high < 0
    return vars(difference) | {"decided": decided, "higher": sides[difference.value > 0].prediction.label}


def _folds(sides: Sequence[Side], together: Together) -> list[dict[str, Any]]:
    folds = together.folds.sort_values(kind="stable").astype(str)
    tables = [diagnosis.by_kind(together.targets, side.probs, folds, together.groups) for side in sides]
    return _bars(tables)


def _bars(tables: Sequence[pd.DataFrame]) -> list[dict[str, Any]]:
    """Tables of scores by group as rows of the templates' bars."""
    return [
        {"name": name, "clips": int(tables[0].at[name, "clips"]), "scores": [table.loc[name].to_dict() for table in tables]}
        for name in tables[0].index
    ]


def label_rows(sides: Sequence[Side], together: Together, media: Media, clips: int) -> list[dict[str, Any]]:
    """A row for each label, the worst of the first prediction first, with what opens under it."""
    pairs = diagnosis.together(together.targets)
    order = sides[0].labels.sort_values("lwlrap", kind="stable").index
    return [_label_row(label, sides, together, pairs.loc[label], media, clips) for label in order]


def _label_row(
    label: str, sides: Sequence[Side], together: Together, partners: pd.Series, media: Media, clips: int
) -> dict[str, Any]:
    scores = [side.labels.loc[label].to_dict() for side in sides]
    above = [_top(side.confusions.loc[label]) for side in sides]
    own = sides[0].pairs
    worst = own[own["label"] == label].sort_values(["precision", "prob", "fname"], kind="stable").head(clips)
    tables = [side.probs for side in sides]
    return {
        "label": label,
        "clips": int(scores[0]["clips"]),
        "scores": scores,
        "difference": scores[1]["lwlrap"] - scores[0]["lwlrap"] if len(scores) > 1 else None,
        "above": above,
        "below": [_top(side.confusions[label]) for side in sides],
        "together": _top(partners),
        "worst": [card(f, media, int(together.folds[f]), together.targets, tables) for f in worst["fname"]],
    }


def _top(counts: pd.Series) -> list[tuple[str, int]]:
    largest = counts.sort_values(ascending=False, kind="stable").head(LISTED)
    return [(name, int(count)) for name, count in largest.items() if count]


def calibration_chart(sides: Sequence[Side], together: Together) -> Any:
    """Predicted against observed shares, a line for each prediction."""
    lines = []
    for style, side in enumerate(sides):
        bins = diagnosis.calibration(together.targets, side.probs).bins
        names = [f"predicted {b.predicted:.2f}, true {b.observed:.2f}, {number(b.pairs)} pairs" for b in bins.itertuples()]
        columns: dict[str, Any] = {key: list(bins[key]) for key in ("low", "high")}
        lines.append(
            Line(side.prediction.label, list(bins["predicted"]), list(bins["observed"]), style, dots=True, names=names, **columns)
        )
    about = "Points above the diagonal: labels are present more often than predicted"
    unit = (0.0, 1.0)
    return Chart("Calibration", "predicted probability", "share that is true", lines, (), unit, unit, True, (), about).svg()


def _groups(sides: Sequence[Side], together: Together, source: ClipSource) -> list[tuple[str, list[dict[str, Any]]]]:
    """Scores by kind of clip; length and flags only as far as the cache is here."""
    kinds = [("Number of labels", diagnosis.count_groups(together.targets))]
    if source.manifest is not None:
        known = source.manifest.loc[source.manifest.index.intersection(together.targets.index)]
        if len(known):
            kinds.insert(0, ("Length", diagnosis.length_groups(known["seconds"])))
            kinds.append(("Flags of the cache", diagnosis.flag_groups(known["flags"])))

    def bars(kind: pd.Series) -> list[dict[str, Any]]:
        return _bars([diagnosis.by_kind(together.targets, side.probs, kind, together.groups) for side in sides])

    return [(name, bars(kind)) for name, kind in kinds]


def _beside(tables: Sequence[list[tuple[str, str]]]) -> list[tuple[str, list[str]]]:
    """Facts of several runs by name."""
    names = dict.fromkeys(name for table in tables for name, _ in table)
    return [(name, [dict(table).get(name, "–") for table in tables]) for name in names]

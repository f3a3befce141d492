"""Out-of-fold scores: of one prediction, and of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from melfold.artefacts import Artefact
from melfold.errors import MelfoldError
from melfold.learn.predictions import Prediction
from melfold.learn.runs import FULL
from melfold.metrics import bootstrap_interval, constant_lwlrap, lwlrap, per_label_lwlrap
from melfold.probs import Probs, align, write_probs


@dataclass(frozen=True)
class OofScores:
    """The out-of-fold scores of a prediction. `missing`: folds that are not trained."""

    oof_lwlrap: float
    low: float
    high: float
    mean_fold_lwlrap: float
    fold_lwlrap: dict[str, float]
    constant_lwlrap: float
    clips: int
    missing: list[int]
    per_label: pd.DataFrame


def score(prediction: Prediction) -> OofScores:
    """Pool the held-out predictions of the trained folds and score them. Both are kept in the prediction's folder.

    Raises:
        MelfoldError: no fold is trained, or a fold's predictions are missing, changed, or of other weights.
    """
    run = prediction.run
    pooled = prediction.read_oof()
    folds = [fold for fold in run.done_folds() if fold != FULL]
    made_from = {"folds": {fold: prediction.inputs(fold) for fold in folds}, "clips": run.info.clips_sha256}
    artefact = Artefact(prediction.scores, (prediction.oof,))
    if artefact.is_fresh(made_from):
        return _from_json(artefact.read()["scores"])
    held_out = {fold: run.targets(run.held_out(fold)) for fold in folds}
    fold_scores = {fold: lwlrap(own, pooled.loc[own.index]) for fold, own in held_out.items()}
    covered = run.targets(pooled.index)
    interval = bootstrap_interval(covered, pooled, run.clips["group"])
    scores = OofScores(
        oof_lwlrap=lwlrap(covered, pooled),
        **vars(interval),
        mean_fold_lwlrap=float(np.mean(list(fold_scores.values()))),
        fold_lwlrap=fold_scores,
        constant_lwlrap=constant_lwlrap(covered),
        clips=len(pooled),
        missing=run.missing_folds(),
        per_label=per_label_lwlrap(covered, pooled),
    )
    write_probs(prediction.oof, pooled)
    artefact.commit(made_from, scores=to_json(scores))
    return scores


def to_json(scores: OofScores) -> dict[str, Any]:
    """Scores as JSON holds them; `per_label` is a list of rows, null where a label has no clip."""
    table = scores.per_label.reset_index()
    return vars(scores) | {"per_label": table.astype(object).where(table.notna(), None).to_dict("records")}


def _from_json(values: dict[str, Any]) -> OofScores:
    per_label = pd.DataFrame(values["per_label"]).set_index("label").astype({"lwlrap": float})
    return OofScores(**values | {"per_label": per_label})


def prior_of(prediction: Prediction) -> pd.Series:
    """The mean out-of-fold probabilities by label, or the labels' frequencies if there is only a `full` model."""
    run = prediction.run
    if run.done_folds() == [FULL]:
        return run.targets(run.clips.index).mean()
    return prediction.read_oof().mean()


@dataclass(frozen=True)
class Together:
    """The out-of-fold predictions of several runs for the same held-out clips.

    `tables`: a prediction's label -> its probabilities. `folds`, `groups`: each clip's fold and group. Rows are in one order
    everywhere.
    """

    targets: pd.DataFrame
    folds: pd.Series
    groups: pd.Series
    tables: dict[str, Probs]


def read_together(predictions: Sequence[Prediction], *, common: bool = False) -> Together:
    """The out-of-fold predictions of runs that held out the same clips at the same time.

    Args:
        common: use only the clips that all of them cover; without, an unfinished run is an error.

    Raises:
        MelfoldError: other folds or labels, an unfinished run, a duplicate, or no clip in common.
    """
    first, labels = predictions[0], [prediction.label for prediction in predictions]
    if len(set(labels)) < len(labels):
        raise MelfoldError("a run is named twice", ", ".join(labels), "Name each once")
    for other in predictions[1:]:
        if other.run.info.clips_sha256 != first.run.info.clips_sha256:
            what, found = "runs with other folds or labels cannot be compared", f"{first.label} and {other.label}"
            raise MelfoldError(what, found, "Use one fold table")
    for prediction in () if common else predictions:
        if missing := prediction.run.missing_folds():
            fix = "Train them, leave the run out, or compare the clips in common with --common"
            raise MelfoldError(f"run {prediction.label} is not finished", f"folds missing: {', '.join(map(str, missing))}", fix)
    tables = {prediction.label: prediction.read_oof() for prediction in predictions}
    clips = sorted(set.intersection(*(set(t.index) for t in tables.values())))
    if not clips:
        raise MelfoldError("these runs have no trained fold in common", ", ".join(labels), "Train the same folds")
    targets = first.run.targets(clips)
    columns = list(targets.columns)
    table = first.run.clips.loc[clips]
    return Together(targets, table["fold"], table["group"], {n: align(t, clips, columns, n) for n, t in tables.items()})

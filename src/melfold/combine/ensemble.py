"""Combinations: the folds of a run, and runs with each other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from melfold.artefacts import Artefact, listed
from melfold.combine.oof import Together, read_together
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.learn.predictions import Prediction, list_predictions
from melfold.learn.runs import list_runs
from melfold.metrics import Difference, difference_of, interval_of, lwlrap, per_label_lwlrap
from melfold.probs import MEANS, Probs, align, mean_probs, read_probs, to_mean


def fold_mean(prediction: Prediction, folds: Sequence[str]) -> Probs:
    """The mean, of the prediction's kind, of the test probabilities of some folds.

    Raises:
        MelfoldError: one is missing, was changed, or was made with other weights or settings.
    """
    tables = []
    for fold in folds:
        path = prediction.fold_test(fold)
        if changes := Artefact.of(path).changes(prediction.inputs(fold)):
            fix = f"Run `melfold predict {prediction.label} --data DATA`"
            raise MelfoldError(f"{prediction.label} has no current test predictions", f"{path}: {listed(changes)}", fix)
        tables.append(read_probs(path))
    return mean_probs(tables, prediction.config.fold_mean)


def greedy_weights(targets: pd.DataFrame, tables: Sequence[Probs], kind: str, rounds: int = 20) -> np.ndarray:
    """Weights by greedy selection with replacement: each round adds the table that helps lwlrap most, ties to the first.

    Caruana et al., "Ensemble Selection from Libraries of Models" (2004); the best of all rounds is kept.

    Returns:
        One weight a table, summing to 1.
    """
    values = np.stack([align(t, targets.index, list(targets.columns), "predictions").to_numpy(np.float64) for t in tables])

    # Every kind of mean is linear in something, and what brings it back to 0..1 keeps the order, which is all lwlrap sees.
    linear = to_mean(values, kind)

    def score(counts: np.ndarray) -> float:
        mean = np.tensordot(counts / counts.sum(), linear, 1)
        return lwlrap(targets, pd.DataFrame(mean, targets.index, targets.columns))

    counts = np.zeros(len(tables))
    best, chosen = -1.0, counts
    for _ in range(rounds):
        steps = counts + np.eye(len(tables))
        scores = [score(step) for step in steps]
        counts = steps[int(np.argmax(scores))]
        if max(scores) > best + 1e-12:
            best, chosen = max(scores), counts
    return chosen / chosen.sum()


def nested_probs(together: Together, kind: str) -> Probs:
    """Every clip by weights that were fitted on the other folds' clips: its score is not the fitted one."""
    parts = []
    tables = list(together.tables.values())
    for fold in sorted(together.folds.unique()):
        inside = together.folds.index[together.folds == fold]
        others = together.folds.index[together.folds != fold]
        weights = greedy_weights(together.targets.loc[others], tables, kind)
        parts.append(mean_probs([t.loc[inside] for t in tables], kind, list(weights)))
    return pd.concat(parts).loc[together.targets.index]


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Suggestion:
    """A way to combine runs. `oof_lwlrap` is honest: with fitted weights it is the nested score, beside the `fitted` one.

    `gain`: over the best single run.
    """

    runs: list[str]
    mean: str
    weights: list[float] | None
    oof_lwlrap: float
    low: float
    high: float
    fitted: float | None
    gain: Difference
    clips: int


def suggest(predictions: Sequence[Prediction]) -> list[Suggestion]:
    """Single runs, all of them with equal weights, and all with fitted ones, by every kind of mean; the best OOF score first.

    Raises:
        MelfoldError: as `read_together`, or one run alone.
    """
    if len(predictions) < 2:
        found = ", ".join(p.label for p in predictions) or "no run with every fold trained"
        raise MelfoldError("an ensemble needs at least two runs", found, "Train another recipe or seed")
    together = read_together(predictions)
    targets, tables = together.targets, list(together.tables.values())
    singles = {name: lwlrap(targets, table) for name, table in together.tables.items()}
    best = together.tables[max(singles, key=lambda name: singles[name])]
    suggestions: list[Suggestion] = []

    def add(names: Sequence[str], kind: str, weights: np.ndarray | None, probs: Probs, fitted: float | None) -> None:
        interval = interval_of(targets, probs)
        gain = difference_of(targets, probs, best)
        given = None if weights is None else [round(float(w), 4) for w in weights]
        if given:  # a run without weight only costs time, and may change the track
            names, given = [n for n, w in zip(names, given, strict=True) if w], [w for w in given if w]
        score = lwlrap(targets, probs)
        suggestions.append(Suggestion(list(names), kind, given, score, interval.low, interval.high, fitted, gain, len(targets)))

    for name, table in together.tables.items():
        add([name], "-", None, table, None)
    for kind in MEANS:
        add(list(together.tables), kind, None, mean_probs(tables, kind), None)
        weights = greedy_weights(targets, tables, kind)
        fitted = lwlrap(targets, mean_probs(tables, kind, list(weights)))
        if len(together.folds.unique()) > 1:
            add(list(together.tables), kind, weights, nested_probs(together, kind), fitted)
    return sorted(suggestions, key=lambda s: -s.oof_lwlrap)


@dataclass(frozen=True)
class Compared:
    """Runs beside the first of them, on the clips that all cover.

    `runs`: indexed by name: `track, seed, oof_lwlrap, low, high, difference, d_low, d_high, better`. `labels`: lwlrap by label, a
    column a run, with the label's clips. `seeds`: runs that differ in nothing but their seed: names, mean and standard deviation.
    """

    clips: int
    runs: pd.DataFrame
    labels: pd.DataFrame
    seeds: list[tuple[list[str], float, float]]


def compare(predictions: Sequence[Prediction], *, common: bool = False) -> Compared:
    """Set runs side by side: intervals, paired differences from the first, labels, and the spread over seeds.

    Args:
        common: as in `read_together`.

    Raises:
        MelfoldError: as `read_together`.
    """
    together = read_together(predictions, common=common)
    targets, tables = together.targets, together.tables
    first = tables[predictions[0].label]
    rows, labels = {}, {}
    for prediction in predictions:
        table = tables[prediction.label]
        interval = interval_of(targets, table)
        row: dict[str, Any] = {"track": prediction.run.info.track, "seed": str(prediction.run.recipe.seed)}
        row |= {"oof_lwlrap": lwlrap(targets, table), "low": interval.low, "high": interval.high}
        if prediction is not predictions[0]:
            d = difference_of(targets, table, first)
            row |= {"difference": d.value, "d_low": d.low, "d_high": d.high, "better": d.better}
        rows[prediction.label] = row
        per_label = per_label_lwlrap(targets, table)
        labels["clips"] = per_label["clips"]
        labels[prediction.label] = per_label["lwlrap"]
    scores = {label: row["oof_lwlrap"] for label, row in rows.items()}
    table = pd.DataFrame.from_dict(rows, orient="index")
    return Compared(len(targets), table, pd.DataFrame(labels), _seeds(predictions, scores))


def _seeds(predictions: Sequence[Prediction], scores: dict[str, float]) -> list[tuple[list[str], float, float]]:
    alike: dict[tuple[str, str], list[Prediction]] = {}
    for prediction in predictions:
        recipe = prediction.run.recipe.model_copy(update={"seed": 0})
        alike.setdefault((recipe.fingerprint(), prediction.config.model_dump_json()), []).append(prediction)
    seeds = []
    for same in alike.values():
        if len({prediction.run.recipe.seed for prediction in same}) > 1:
            values = [scores[prediction.label] for prediction in same]
            seeds.append(([p.label for p in same], float(np.mean(values)), float(np.std(values, ddof=1))))
    return seeds


def predictions_alike(home: Home) -> list[Prediction]:
    """The runs of a home that hold out the same clips at the same time and have every fold trained.

    If there are several such families, the largest.
    """
    families: dict[str, list[Prediction]] = {}
    for name, run in list_runs(home):
        if isinstance(run, MelfoldError):
            log.warning("left out: run %s: %s", name, run)
        elif not run.missing_folds():
            families.setdefault(run.info.clips_sha256, []).extend(list_predictions(run))
    return max(families.values(), key=len, default=[])

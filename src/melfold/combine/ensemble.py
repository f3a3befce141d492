"""Combinations: the folds of a run, and runs with each other."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from melfold.artefacts import Artefact
from melfold.combine.oof import read_together
from melfold.combine.search import choose, nested_probs
from melfold.errors import MelfoldError
from melfold.facts import facts_of
from melfold.files import Home
from melfold.learn.predictions import Prediction, list_predictions
from melfold.learn.runs import list_runs
from melfold.metrics import Difference, bootstrap_interval, lwlrap, paired_bootstrap, per_label_lwlrap
from melfold.probs import MEANS, Probs, mean_probs

log = logging.getLogger(__name__)


def fold_mean(prediction: Prediction, folds: Sequence[str]) -> Probs:
    """The mean, of the prediction's kind, of the test probabilities of some folds.

    Raises:
        MelfoldError: one is missing, was changed, or was made with other weights or settings.
    """
    return mean_probs([prediction.read_fold_test(fold) for fold in folds], prediction.config.fold_mean)


@dataclass(frozen=True)
class Suggestion:
    """A way to combine runs.

    Args:
        weights: equal where not given.
        oof_lwlrap: honest: where runs, mean and weights were chosen by a search, each clip is scored by what was chosen without
            its fold. `low` to `high` is its interval.
        fitted: the score of the choice on the clips that it was chosen on; only of a search.
        gain: over the best single run.
        seconds: to predict the competition's test clips on the device whose speed was recorded; None if it was not.
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
    seconds: float | None


def suggest(predictions: Sequence[Prediction], budget: float | None = None) -> list[Suggestion]:
    """Single runs, all runs by every kind of mean, and the best pair and set of a search; the best OOF score first.

    Args:
        budget: leave out what takes more seconds.

    Raises:
        MelfoldError: as `read_together`; one run alone; a budget without recorded speeds, or one that no run fits.
    """
    if len(predictions) < 2:
        found = ", ".join(p.label for p in predictions) or "no run with every fold trained"
        raise MelfoldError("an ensemble needs at least two runs", found, "Train another recipe or seed")
    together = read_together(predictions)
    targets, tables, groups = together.targets, together.tables, together.groups
    seconds: dict[str, Any] = {prediction.label: inference_seconds(prediction) for prediction in predictions}
    if budget is not None:
        _check_budget(seconds, budget)
    best = tables[max(tables, key=lambda name: lwlrap(targets, tables[name]))]
    suggestions: list[Suggestion] = []

    def add(runs: Sequence[str], mean: str, probs: Probs, weights: Sequence[float] | None = None, fitted: Any = None) -> None:
        known = [seconds[run] for run in runs]
        cost: Any = None if None in known else sum(known)
        if budget is not None and cost > budget:
            return
        interval, gain = bootstrap_interval(targets, probs, groups), paired_bootstrap(targets, probs, best, groups)
        given = None if weights is None or len(set(weights)) == 1 else [round(w, 4) for w in weights]
        score = lwlrap(targets, probs)
        found = Suggestion(list(runs), mean, given, score, interval.low, interval.high, fitted, gain, len(targets), cost)
        if found not in suggestions:  # both searches may end the same way
            suggestions.append(found)

    for name, table in tables.items():
        add([name], "-", table)
    for kind in MEANS:
        add(list(tables), kind, mean_probs(list(tables.values()), kind))
    costs = None if budget is None else list(seconds.values())
    for most in (2, None) if len(together.folds.unique()) > 1 else ():
        search = partial(choose, most=most, costs=costs, budget=np.inf if budget is None else budget)
        choice = search(targets, tables)
        kind = choice.kind if len(choice.runs) > 1 else "-"
        add(choice.runs, kind, nested_probs(together, search), choice.weights, choice.fitted)
    return sorted(suggestions, key=lambda s: -s.oof_lwlrap)


def _check_budget(seconds: Mapping[str, Any], budget: float) -> None:
    if unknown := [name for name, cost in seconds.items() if cost is None]:
        fix = f"`melfold predict {unknown[0]} --data DATA` records it, or leave the run out"
        raise MelfoldError("the speed of a run was not recorded", ", ".join(unknown), fix)
    fastest = min(seconds, key=lambda name: seconds[name])
    if seconds[fastest] > budget:
        raise MelfoldError("no run fits the budget", f"{fastest} takes {seconds[fastest] / 60:.1f} minutes", "Give more minutes")


def inference_seconds(prediction: Prediction) -> float | None:
    """Seconds that all folds of a prediction take for the competition's test clips, from the recorded speed of each fold.

    None if it was not recorded.
    """
    facts, total = facts_of(prediction.run.info.labels), 0.0
    for fold in prediction.run.used_folds():
        stamps = (Artefact.of(path) for path in (prediction.fold_test(fold), prediction.fold_oof(fold)))
        speeds = [stamp.read().get("speed") for stamp in stamps if stamp.exists]
        if not any(speeds):
            return None
        total += facts.test_clips[-1] * facts.mean_test_seconds / next(filter(None, speeds))
    return total


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

    `common` and errors are as in `read_together`.
    """
    together = read_together(predictions, common=common)
    targets, groups = together.targets, together.groups
    rows, labels = {}, {}
    for prediction, table in zip(predictions, together.tables.values(), strict=True):
        interval = bootstrap_interval(targets, table, groups)
        row: dict[str, Any] = {"track": prediction.run.info.track, "seed": str(prediction.run.recipe.seed)}
        row |= {"oof_lwlrap": lwlrap(targets, table), **vars(interval)}
        if prediction is not predictions[0]:
            d = paired_bootstrap(targets, table, together.tables[predictions[0].label], groups)
            row |= {"difference": d.value, "d_low": d.low, "d_high": d.high, "better": d.better}
        rows[prediction.label] = row
        per_label = per_label_lwlrap(targets, table)
        labels["clips"] = per_label["clips"]
        labels[prediction.label] = per_label["lwlrap"]
    table = pd.DataFrame.from_dict(rows, orient="index")
    return Compared(len(targets), table, pd.DataFrame(labels), _seeds(predictions, table["oof_lwlrap"]))


def _seeds(predictions: Sequence[Prediction], scores: pd.Series) -> list[tuple[list[str], float, float]]:
    alike = defaultdict(list)
    for prediction in predictions:
        recipe = prediction.run.recipe.model_copy(update={"seed": 0})
        alike[recipe.fingerprint(), prediction.config.model_dump_json()].append(prediction)
    names = [[p.label for p in same] for same in alike.values() if len({p.run.recipe.seed for p in same}) > 1]
    return [(own, float(np.mean(scores[own])), float(np.std(scores[own], ddof=1))) for own in names]


def predictions_alike(home: Home) -> list[Prediction]:
    """The runs of a home that hold out the same clips at the same time and have every fold trained.

    If there are several such families, the largest.
    """
    families: dict[str, list[Prediction]] = defaultdict(list)
    for name, run in list_runs(home):
        if isinstance(run, MelfoldError):
            log.warning("left out: run %s: %s", name, run)
        elif not run.missing_folds():
            families[run.info.clips_sha256] += list_predictions(run)
    return max(families.values(), key=len, default=[])

"""Combinations: the folds of a run, and runs with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from melfold.errors import MelfoldError
from melfold.files import write_json
from melfold.learn.runs import FULL, Run
from melfold.metrics import Difference, bootstrap_interval, constant_lwlrap, lwlrap, paired_bootstrap, per_label_lwlrap
from melfold.probs import MEANS, Probs, align, mean_probs, read_probs, to_mean, write_probs


@dataclass(frozen=True)
class OofScores:
    """The out-of-fold scores of a run. `missing`: folds that are not trained."""

    oof_lwlrap: float
    low: float
    high: float
    mean_fold_lwlrap: float
    fold_lwlrap: dict[str, float]
    constant_lwlrap: float
    clips: int
    missing: list[int]
    per_label: pd.DataFrame


def pool_oof(run: Run) -> OofScores:
    """Pool the held-out predictions of the trained folds, score them, and leave both in the run's folder.

    Raises:
        MelfoldError: no fold is trained.
    """
    done = [f for f in run.done_folds() if f != FULL]
    if not done:
        raise MelfoldError(
            f"run {run.name} has no trained fold to score", ", ".join(run.done_folds()) or "none", "Run `melfold train`"
        )
    tables = {fold: read_probs(run.fold(fold).oof) for fold in done}
    fold_scores = {fold: lwlrap(run.targets(run.held_out(fold)), probs) for fold, probs in tables.items()}
    pooled = pd.concat(tables.values()).sort_index()
    covered = run.targets(pooled.index)
    interval = bootstrap_interval(covered, pooled, rng=np.random.default_rng(run.recipe.seed))
    scores = OofScores(
        oof_lwlrap=lwlrap(covered, pooled),
        low=interval.low,
        high=interval.high,
        mean_fold_lwlrap=float(np.mean(list(fold_scores.values()))),
        fold_lwlrap=fold_scores,
        constant_lwlrap=constant_lwlrap(covered),
        clips=len(pooled),
        missing=[k for k in range(run.recipe.folds.n_folds) if str(k) not in done],
        per_label=per_label_lwlrap(covered, pooled),
    )
    write_probs(run.oof, pooled)
    values: dict[str, Any] = {k: v for k, v in vars(scores).items() if k != "per_label"}
    table = scores.per_label.reset_index()
    values["per_label"] = table.astype(object).where(table.notna(), None).to_dict("records")
    write_json(run.scores, values)
    return scores


def prior_of(run: Run) -> pd.Series:
    """The mean out-of-fold probabilities by label, or the labels' frequencies where a run has none."""
    if run.done_folds() == [FULL]:
        return run.targets(run.clips.index).mean()
    pool_oof(run)
    return read_probs(run.oof).mean()


def fold_mean(run: Run, folds: list[str]) -> Probs:
    """The mean, of the recipe's kind, of the test predictions of some folds."""
    return mean_probs([read_probs(run.fold(fold).test) for fold in folds], run.recipe.predict.fold_mean)


@dataclass(frozen=True)
class Together:
    """The out-of-fold predictions of several runs for the same held-out clips.

    `tables`: a run's name -> its probabilities. `folds`: each clip's fold. Rows are in one order everywhere.
    """

    targets: pd.DataFrame
    folds: pd.Series
    tables: dict[str, Probs]


def read_together(runs: Sequence[Run]) -> Together:
    """The out-of-fold predictions of runs that held out the same clips at the same time, for the clips that all of them cover.

    Raises:
        MelfoldError: runs of other folds or labels, one that is named twice or has no trained fold, or no clip in common.
    """
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise MelfoldError("a run is named twice", ", ".join(names), "Name each once")
    for run in runs[1:]:
        if run.info.clips_sha256 != runs[0].info.clips_sha256:
            raise MelfoldError(
                "runs of other folds or labels cannot be set side by side", f"{runs[0].name} and {run.name}", "Use one fold table"
            )
    for run in runs:
        pool_oof(run)
    tables = {run.name: read_probs(run.oof) for run in runs}
    common = sorted(set.intersection(*(set(t.index) for t in tables.values())))
    if not common:
        raise MelfoldError("these runs have no trained fold in common", ", ".join(names), "Train the same folds")
    targets = runs[0].targets(common)
    labels = list(targets.columns)
    return Together(targets, runs[0].clips["fold"].loc[common], {n: align(t, common, labels, n) for n, t in tables.items()})


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


def suggest(runs: Sequence[Run]) -> list[Suggestion]:
    """Single runs, all of them with equal weights, and all with fitted ones, by every kind of mean; the best OOF score first.

    Raises:
        MelfoldError: as `read_together`, or one run alone.
    """
    if len(runs) < 2:
        raise MelfoldError(
            "an ensemble needs two runs", ", ".join(r.name for r in runs) or "none", "Train another recipe or seed"
        )
    together = read_together(runs)
    targets, tables = together.targets, list(together.tables.values())
    singles = {name: lwlrap(targets, table) for name, table in together.tables.items()}
    best = together.tables[max(singles, key=lambda name: singles[name])]
    found: list[Suggestion] = []

    def add(names: Sequence[str], kind: str, weights: np.ndarray | None, probs: Probs, fitted: float | None) -> None:
        rng = [np.random.default_rng(0) for _ in range(2)]
        interval = bootstrap_interval(targets, probs, rng=rng[0])
        gain = paired_bootstrap(targets, probs, best, rng=rng[1])
        given = None if weights is None else [round(float(w), 4) for w in weights]
        if given:  # a run of no weight only costs time, and may loosen the track
            names, given = [n for n, w in zip(names, given, strict=True) if w], [w for w in given if w]
        score = lwlrap(targets, probs)
        found.append(Suggestion(list(names), kind, given, score, interval.low, interval.high, fitted, gain, len(targets)))

    for name, table in together.tables.items():
        add([name], "-", None, table, None)
    for kind in MEANS:
        add(list(together.tables), kind, None, mean_probs(tables, kind), None)
        weights = greedy_weights(targets, tables, kind)
        fitted = lwlrap(targets, mean_probs(tables, kind, list(weights)))
        if len(together.folds.unique()) > 1:
            add(list(together.tables), kind, weights, nested_probs(together, kind), fitted)
    return sorted(found, key=lambda s: -s.oof_lwlrap)


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


def compare(runs: Sequence[Run]) -> Compared:
    """Set runs side by side: intervals, paired differences from the first, labels, and the spread over seeds.

    Raises:
        MelfoldError: as `read_together`.
    """
    together = read_together(runs)
    targets, tables = together.targets, together.tables
    first = tables[runs[0].name]
    rows, labels = {}, {}
    for run in runs:
        table = tables[run.name]
        interval = bootstrap_interval(targets, table, rng=np.random.default_rng(0))
        difference = paired_bootstrap(targets, table, first, rng=np.random.default_rng(0))
        row: dict[str, Any] = {"track": run.info.track, "seed": str(run.recipe.seed), "oof_lwlrap": lwlrap(targets, table)}
        row |= {"low": interval.low, "high": interval.high}
        if run is not runs[0]:
            row |= {
                "difference": difference.value,
                "d_low": difference.low,
                "d_high": difference.high,
                "better": difference.better,
            }
        rows[run.name] = row
        per_label = per_label_lwlrap(targets, table)
        labels["clips"] = per_label["clips"]
        labels[run.name] = per_label["lwlrap"]
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(run.recipe.model_copy(update={"seed": 0}).fingerprint(), []).append(run)
    seeds = []
    for same in alike.values():
        if len({run.recipe.seed for run in same}) > 1:
            scores = [rows[run.name]["oof_lwlrap"] for run in same]
            seeds.append(([run.name for run in same], float(np.mean(scores)), float(np.std(scores, ddof=1))))
    return Compared(len(targets), pd.DataFrame.from_dict(rows, orient="index"), pd.DataFrame(labels), seeds)

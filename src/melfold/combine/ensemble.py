"""Combinations: the folds of a run, and runs with each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from melfold.errors import MelfoldError
from melfold.files import digest, read_json, sha256_file, write_json
from melfold.learn.runs import FULL, Run
from melfold.metrics import bootstrap_interval, constant_lwlrap, lwlrap, per_label_lwlrap
from melfold.probs import Probs, mean_probs, read_probs, write_probs


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


def is_current(path: Path, key: Any) -> bool:
    """Whether a table of probabilities was made from just this key and has not changed since."""
    stamp = path.with_suffix(".json")
    if not (path.exists() and stamp.exists()):
        return False
    noted = read_json(stamp)
    return noted.get("key") == digest(key) and noted.get("sha256") == sha256_file(path)


def write_current(path: Path, probs: Probs, key: Any) -> None:
    """Write a table of probabilities, and beside it what `is_current` asks for."""
    write_probs(path, probs)
    write_json(path.with_suffix(".json"), {"key": digest(key), "sha256": sha256_file(path)})

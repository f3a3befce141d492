"""Made-up predictions, and an independent lwlrap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import label_ranking_average_precision_score

from melfold.data.competition import Competition
from melfold.files import Home, sha256_file, write_json
from melfold.learn.runs import Run, start_run
from melfold.probs import Probs, make_probs, write_current, write_probs
from melfold.recipes import load_recipe

LABELS = ("Bark", "Hiss_(air)", "Meow", "Tone")


def draw(fnames: Iterable[str], seed: int) -> Probs:
    """Random probabilities."""
    fnames = list(fnames)
    return make_probs(np.random.default_rng([7, seed]).random((len(fnames), len(LABELS)), np.float32), fnames, LABELS)


def oracle(targets: pd.DataFrame, probs: Probs) -> float:
    """lwlrap by scikit-learn: LRAP, each clip weighted by the number of its labels."""
    truth, scores = targets.to_numpy(int), probs.loc[targets.index, targets.columns].to_numpy()
    return float(label_ranking_average_precision_score(truth, scores, sample_weight=truth.sum(axis=1)))


@dataclass(frozen=True)
class MadeUp:
    """A competition without audio."""

    competition: Competition
    home: Home
    folds: Path

    def run(self, name: str = "one", *, folds: Iterable[int] = (0, 1, 2), seed: int = 0, sets: Iterable[str] = ()) -> Run:
        """A run that looks trained and, with its test table, predicted."""
        run = start_run(self.home, name, load_recipe("demo", sets), self.competition, self.folds)
        for fold in folds:
            self.train(run, fold, seed)
        test = draw(sorted(self.competition.test.index), seed)
        write_current(run.test, test, None, rests_on=run.weights_sha256(run.used_folds()))
        return run

    def train(self, run: Run, fold: int, seed: int = 0) -> None:
        """Leave what a trained fold leaves, weights aside."""
        folder = run.fold(fold)
        write_probs(folder.oof, draw(run.held_out(fold), 100 * seed + fold))
        write_probs(folder.test, draw(self.competition.test.index, 1000 + 100 * seed + fold))
        write_json(folder.result, {"weights_sha256": sha256_file(folder.oof)})

"""Made-up predictions, and an independent lwlrap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from melfold.data.competition import Competition
from melfold.files import Home
from melfold.learn.predictions import Prediction, own_prediction, write_current
from melfold.learn.runs import Run
from melfold.learn.start import start_run
from melfold.probs import Probs, make_probs
from melfold.recipes import load_recipe

LABELS = ("Bark", "Hiss_(air)", "Meow", "Tone")


def draw(fnames: Iterable[str], seed: int) -> Probs:
    """Random probabilities."""
    fnames = list(fnames)
    return make_probs(np.random.default_rng([7, seed]).random((len(fnames), len(LABELS)), np.float32), fnames, LABELS)


def oracle(targets: pd.DataFrame, probs: Probs) -> float:
    """lwlrap by scikit-learn: LRAP, each clip weighted by the number of its labels."""
    from sklearn.metrics import label_ranking_average_precision_score  # here, since loading it takes a second

    truth, scores = targets.to_numpy(int), probs.loc[targets.index, targets.columns].to_numpy()
    return float(label_ranking_average_precision_score(truth, scores, sample_weight=truth.sum(axis=1)))


@dataclass(frozen=True)
class MadeUp:
    """A competition without audio."""

    competition: Competition
    home: Home
    folds: Path

    def run(self, name: str = "one", *, folds: Iterable[int] = (0, 1, 2), seed: int = 0, sets: Iterable[str] = ()) -> Run:
        """A run that looks trained and predicted."""
        run = start_run(self.home, name, load_recipe("demo", sets), self.competition, self.folds)
        for fold in folds:
            self.train(run, fold, seed)
        self.predict(own_prediction(run), draw(sorted(self.competition.test.index), seed))
        return run

    def predict(self, prediction: Prediction, test: Probs) -> None:
        """Leave averaged test probabilities as `melfold predict` does."""
        write_current(prediction.test, test, prediction.test_inputs())

    def train(self, run: Run, fold: int, seed: int = 0) -> None:
        """Leave what a trained and predicted fold leaves; the weights are no weights."""
        folder, own = run.fold(fold), own_prediction(run)
        folder.path.mkdir(exist_ok=True)
        folder.weights.write_text(f"{run.name} {fold} {seed}")
        folder.artefact.commit({"fold": str(fold), **run.made_from})
        write_current(own.fold_oof(fold), draw(run.held_out(fold), 100 * seed + fold), own.inputs(fold))
        test = draw(self.competition.test.index, 1000 + 100 * seed + fold)
        write_current(own.fold_test(fold), test, own.inputs(fold))

"""Predictions: out-of-fold and test probabilities that a run's weights give under some views.

A run's own prediction follows its recipe and lies in the run's folder. Other predictions of the same weights have a name, and lie
in `runs/<run>/predictions/<name>`. On the command line they are called `RUN` and `RUN@NAME`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from melfold.artefacts import Artefact, differences, listed
from melfold.config import PredictConfig, Recipe
from melfold.errors import MelfoldError
from melfold.files import Home, read_json, write_json
from melfold.learn.runs import FULL, Run, open_run
from melfold.learn.start import NAME
from melfold.probs import Probs, align, read_probs, write_probs


@dataclass(frozen=True)
class Prediction:
    """What a run's weights give under some prediction settings. `name` is empty for the run's own prediction."""

    run: Run
    name: str
    config: PredictConfig

    @property
    def label(self) -> str:
        """`RUN` or `RUN@NAME`."""
        return f"{self.run.name}@{self.name}" if self.name else self.run.name

    @property
    def folder(self) -> Path:
        return self.run.folder / "predictions" / self.name if self.name else self.run.folder

    @property
    def recipe(self) -> Recipe:
        """The run's recipe with these prediction settings."""
        return self.run.recipe.model_copy(update={"predict": self.config})

    @property
    def oof(self) -> Path:
        """The pooled out-of-fold probabilities."""
        return self.folder / "oof.csv"

    @property
    def scores(self) -> Path:
        return self.folder / "scores.json"

    @property
    def test(self) -> Path:
        """The test probabilities, averaged over the folds."""
        return self.folder / "test.csv"

    def fold_oof(self, fold: int | str) -> Path:
        """One fold's probabilities for the clips it held out."""
        return self.folder / self.run.fold(fold).path.name / "oof.csv"

    def fold_test(self, fold: int | str) -> Path:
        """One fold's probabilities for the test clips."""
        return self.folder / self.run.fold(fold).path.name / "test.csv"

    def inputs(self, fold: int | str, clips: str = "", weights: str = "") -> dict[str, Any]:
        """What one fold's probabilities are made from.

        Args:
            clips: the digest of the clips and their audio; left out if not known.
            weights: the hash of the fold's weights, where its result is not written yet.
        """
        recipe = self.recipe
        views = [[view.length, view.shift, view.pad] for view in recipe.views]
        settings = {"views": views, "overlap": self.config.overlap, "batch_size": self.config.batch_size}
        weights = weights or self.run.fold(fold).weights_sha256()
        known = {"weights": weights, "logmel": recipe.logmel.fingerprint(), "predict": settings}
        return known | ({"clips": clips} if clips else {})

    def _read(self, path: Path, inputs: dict[str, Any], kind: str) -> Probs:
        if changes := Artefact.of(path).changes(inputs):
            fix = f"Run `melfold predict {self.label} --data DATA`"
            raise MelfoldError(f"{self.label} has no current {kind} predictions", f"{path}: {listed(changes)}", fix)
        return read_probs(path)

    def read_fold_oof(self, fold: int | str) -> Probs:
        """A fold's held-out probabilities, checked against its weights and its recorded hash.

        Raises:
            MelfoldError: they are missing, were changed, or were made with other weights or settings.
        """
        return self._read(self.fold_oof(fold), self.inputs(fold), "out-of-fold")

    def read_fold_test(self, fold: int | str) -> Probs:
        """A fold's test probabilities. Raises: as `read_fold_oof`."""
        return self._read(self.fold_test(fold), self.inputs(fold), "test")

    def read_test(self) -> Probs:
        """The averaged test probabilities. Raises: as `read_fold_oof`."""
        return self._read(self.test, self.test_inputs(), "test")

    def read_oof(self) -> Probs:
        """The pooled out-of-fold probabilities of the trained folds, sorted by clip.

        Raises:
            MelfoldError: no fold is trained, or a fold's probabilities cannot be used.
        """
        folds = [fold for fold in self.run.done_folds() if fold != FULL]
        if not folds:
            if self.run.fold(FULL).done:
                fix = "It learned from every clip; score the folds of another run of this recipe"
                raise MelfoldError(f"run {self.run.name} holds no clip out, so it has no out-of-fold score", "folds: full", fix)
            raise MelfoldError(f"run {self.run.name} has no trained fold", str(self.run.folder), "Run `melfold train` first")
        tables = [align(t := self.read_fold_oof(fold), t.index, self.run.info.labels, str(self.fold_oof(fold))) for fold in folds]
        return pd.concat(tables).sort_index()

    def test_inputs(self) -> dict[str, Any]:
        """What the averaged test probabilities are made from, as far as it is known without the test clips."""
        folds = self.run.used_folds()
        return {"folds": {fold: self.inputs(fold) for fold in folds}, "fold_mean": self.config.fold_mean}


def write_current(path: Path, probs: Probs, inputs: dict[str, Any], **facts: Any) -> None:
    """Write a table of probabilities and its stamp, with facts worth keeping."""
    write_probs(path, probs)
    Artefact.of(path).commit(inputs, **facts)


def own_prediction(run: Run) -> Prediction:
    """The prediction that a run's recipe asks for."""
    return Prediction(run, "", run.recipe.predict)


def start_prediction(run: Run, name: str, config: PredictConfig) -> Prediction:
    """Make a named prediction of a run's weights, or open it if it has these settings already.

    Raises:
        MelfoldError: a bad name, or a prediction of this name with other settings.
    """
    if not NAME.fullmatch(name):
        raise MelfoldError("a prediction's name is letters, digits, dots, dashes", repr(name), "Use --name NAME")
    path = Prediction(run, name, config).folder / "predict.json"
    values = config.model_dump(mode="json")
    if path.exists():
        if changes := differences(read_json(path), values):
            raise MelfoldError(f"prediction {run.name}@{name} has different settings", listed(changes), "Use another --name")
    else:
        write_json(path, values)
    return Prediction(run, name, config)


def open_prediction(home: Home, label: str) -> Prediction:
    """Open a prediction by `RUN` (a run's name or folder) or `RUN@NAME`. Raises: MelfoldError: no such run or prediction."""
    run_name, _, name = label.rpartition("@") if "@" in label else (label, "", "")
    run = open_run(home, run_name)
    if not name:
        return own_prediction(run)
    path = run.folder / "predictions" / name / "predict.json"
    if not path.exists():
        known = ", ".join(p.label for p in list_predictions(run)) or "none"
        raise MelfoldError("no such prediction", label, f"Known: {known}. `melfold predict {run_name} --name {name}` makes one")
    try:
        return Prediction(run, name, PredictConfig.model_validate(read_json(path)))
    except ValueError as error:
        raise MelfoldError(f"{path} holds no prediction settings", str(error).splitlines()[0], "Delete its folder") from None


def list_predictions(run: Run) -> list[Prediction]:
    """A run's own prediction and its named ones."""
    names = sorted(path.parent.name for path in run.folder.glob("predictions/*/predict.json"))
    return [own_prediction(run), *(open_prediction(run.home, f"{run.folder}@{name}") for name in names)]


def open_predictions(home: Home, labels: Iterable[str]) -> list[Prediction]:
    """Several predictions, each once. Raises: MelfoldError: one that does not exist, or that is named twice."""
    found = [open_prediction(home, label) for label in labels]
    names = [prediction.label for prediction in found]
    if len(set(names)) < len(names):
        raise MelfoldError("a run is named twice", ", ".join(names), "Name each once")
    return found

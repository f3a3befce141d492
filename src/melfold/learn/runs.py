"""Runs: one training of a recipe, in `runs/<name>`. Its files, and what all of its folds share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from melfold.artefacts import Artefact, differences, listed, summary
from melfold.config import Recipe
from melfold.data.cache import audio_digest
from melfold.data.competition import multi_hot
from melfold.errors import MelfoldError
from melfold.facts import split_labels
from melfold.files import Home, digest, locked, read_json
from melfold.probs import align, read_probs
from melfold.recipes import parse_recipe

FULL = "full"
"""The name, in place of a fold's number, of a model trained on every curated clip."""


@dataclass(frozen=True)
class RunInfo:
    """The facts of a run beside its recipe. Hashes are SHA-256 in hex, empty where there is nothing to hash."""

    competition: str
    labels: list[str]
    fold_table: str
    folds_sha256: str
    clips_sha256: str
    noisy_sha256: str
    first_weights: str
    """SHA-256 of the weights file, or the name and the fingerprint of the run, that it starts from."""
    teachers: list[str]
    """The name and the fingerprint of each teacher."""
    track: str
    """`scratch`: the competition's data alone. `open`: weights from elsewhere, here, in a teacher or behind a correction."""
    data: str
    """`curated`, or `curated and noisy`."""
    licence: str
    """Of the weights it starts from; `unknown` if neither the recipe nor timm names it."""
    seen: list[str]
    """The data sets that these weights, and those of its teacher, were trained on."""
    warnings: list[str]
    """Weights that may have seen this competition's test clips."""
    commit: str
    data_folder: str
    """The download it was started with."""

    def made_from(self) -> dict[str, Any]:
        """What must not change while a run is trained."""
        return {
            "competition": self.competition,
            "labels": digest(self.labels),
            "fold_table": self.folds_sha256,
            "clips": self.clips_sha256,
            "noisy_clips": self.noisy_sha256,
            "first_weights": self.first_weights,
            "teachers": self.teachers,
        }


class FoldFolder:
    """The files of one fold's model.

    Args:
        fold: a number or `full`.
        made_from: the run's part of what its weights must have been made from; not checked if not given.
    """

    def __init__(self, path: Path, fold: str, made_from: Mapping[str, str] | None = None) -> None:
        self.path, self.fold, self.made_from = path, fold, made_from or {}
        self.weights = path / "weights.safetensors"
        self.checkpoint = path / "checkpoint.pt"
        self.log = path / "log.jsonl"
        self.teacher_probs = path / "teacher_probs.csv"
        """This fold's predictions for a student's clips, once it has been a teacher."""
        self.pseudo_labels = path / "pseudo_labels.csv"
        """The clips that have targets from the teachers' models of this fold: the noisy ones they chose, and curated ones."""
        self.result = path / "result.json"
        """Written last: if it exists, the fold is done."""
        self.artefact = Artefact(self.result, (self.weights,))

    @property
    def done(self) -> bool:
        return self.result.exists()

    def weights_sha256(self) -> str:
        """The recorded hash of the weights.

        Raises:
            MelfoldError: a result that cannot be read, or that belongs to another fold or run.
        """
        return self._checked(self.artefact.read())["files"][self.weights.name]

    def verify(self) -> dict[str, Any]:
        """The result, after checking the weights against it.

        Raises:
            MelfoldError: weights that are missing, damaged, or of another fold or run.
        """
        return self._checked(self.artefact.verify())

    def _checked(self, content: dict[str, Any]) -> dict[str, Any]:
        wanted = {"fold": self.fold, **self.made_from}
        if changes := differences({key: content["made_from"].get(key) for key in wanted}, wanted):
            fix = f"Delete {self.path} and train it again"
            raise MelfoldError(f"{self.result} belongs to another fold or recipe", listed(changes), fix)
        return content

    def lock(self) -> AbstractContextManager[Any]:
        """Hold this fold for training. Raises: MelfoldError: another process holds it."""

        def busy() -> None:
            raise MelfoldError("another melfold is training this fold", str(self.path), "Wait for it, or stop it")

        return locked(self.path / ".lock", busy)


@dataclass(frozen=True)
class Run:
    """One training of a recipe."""

    folder: Path
    recipe: Recipe
    info: RunInfo

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def home(self) -> Home:
        return Home(self.folder.parents[1])

    def fold(self, fold: int | str) -> FoldFolder:
        """The folder of a fold by its number, or of `full`."""
        return FoldFolder(self.folder / (FULL if fold == FULL else f"fold{fold}"), str(fold), self.made_from)

    def first_fold(self, fold: int | str) -> FoldFolder | None:
        """The same fold of the run that this one starts from, if it starts from one.

        Raises:
            MelfoldError: that fold is not trained.
        """
        if not self.recipe.model.first_run:
            return None
        first = open_run(self.home, self.recipe.model.first_run)
        if not first.fold(fold).done:
            fix = f"melfold train ... --run {first.name} --folds {fold}"
            raise MelfoldError(f"{self.name} starts from {first.name}, where fold {fold} is not trained", str(first.folder), fix)
        return first.fold(fold)

    @cached_property
    def made_from(self) -> dict[str, str]:
        """What the weights of all folds are made from, and each fold's result must say."""
        return {"recipe": self.recipe.fingerprint(), "clips": self.info.clips_sha256, "noisy_clips": self.info.noisy_sha256}

    @cached_property
    def clips(self) -> pd.DataFrame:
        """`fold`, `group` (text) and `labels` (a tuple) of the curated clips that take part, indexed by `fname`, sorted."""
        table = _read_clips(self.folder / "clips.csv")
        table["fold"] = table["fold"].astype(int)
        return table.loc[~table.index.isin(self.recipe.data.exclude)]

    @cached_property
    def noisy(self) -> pd.Series:
        """The labels (a tuple) of the noisy clips that take part, by `fname`, sorted; empty if the recipe does not use them."""
        if not self.recipe.uses_noisy:
            return pd.Series([], index=pd.Index([], name="fname", dtype=str), dtype=object)
        labels = _read_clips(self.folder / "noisy.csv")["labels"]
        return labels.loc[~labels.index.isin(self.recipe.data.exclude)]

    def targets(self, fnames: Sequence[str]) -> pd.DataFrame:
        """Multi-hot `(clips, labels)` of some curated clips, to score by."""
        return multi_hot(self.clips["labels"].loc[list(fnames)], self.info.labels)

    def train_targets(self, fnames: Sequence[str]) -> pd.DataFrame:
        """As `targets`, to learn from: with the recipe's corrections."""
        own, corrections = self.clips["labels"].loc[list(fnames)], self.recipe.data.corrections
        labels = [corrections[fname].labels if fname in corrections else old for fname, old in own.items()]
        return multi_hot(pd.Series(labels, own.index, dtype=object), self.info.labels)

    def fold_targets(self, fold: int | str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """`(clips, labels)` in 0..1 of the curated and the noisy clips that a fold learns from: the tables' labels, with
        corrections, and with the teachers' soft targets where there are teachers.

        Raises:
            MelfoldError: the teachers' targets are missing or damaged.
        """
        curated = self.train_targets(self.trained_on(fold))
        if not self.recipe.noisy.teachers:
            return curated, multi_hot(self.noisy, self.info.labels)
        path = self.fold(fold).pseudo_labels
        if not path.exists():
            raise MelfoldError(f"fold {fold} of {self.name} has no pseudo labels", str(path), "`melfold train` makes them")
        Artefact.of(path).verify()
        soft = read_probs(path)
        soft = align(soft, soft.index, self.info.labels, str(path))
        noisy = soft.index.isin(self.noisy.index)
        curated.loc[soft.index[~noisy]] = soft[~noisy]
        return curated, soft[noisy]

    def held_out(self, fold: int | str) -> list[str]:
        """The clips a fold is scored on; none for `full`."""
        return [] if fold == FULL else list(self.clips.index[self.clips["fold"] == int(fold)])

    def trained_on(self, fold: int | str) -> list[str]:
        """The curated clips a fold learns from."""
        return list(self.clips.index if fold == FULL else self.clips.index[self.clips["fold"] != int(fold)])

    def training_audio(self, cache: Path) -> str:
        """The digest of the audio of all clips that take part.

        Args:
            cache: the folder of their log-mels.

        Raises:
            MelfoldError: a fold was trained on other audio.
        """
        audio = audio_digest(cache, [*self.clips.index, *self.noisy.index])
        for fold in self.done_folds():
            if self.fold(fold).artefact.read()["made_from"].get("training_audio") != audio:
                what = f"audio files have changed since fold {fold} of run {self.name} was trained"
                fix = "Put the old files back, or train all folds under another name: --run NAME"
                raise MelfoldError(what, f"log-mels in {cache}", fix)
        return audio

    def missing_folds(self) -> list[int]:
        """The folds that are not trained."""
        return [k for k in range(self.recipe.folds.n_folds) if not self.fold(k).done]

    def done_folds(self) -> list[str]:
        """The folds (and `full`) that are trained."""
        return [f for f in [*map(str, range(self.recipe.folds.n_folds)), FULL] if self.fold(f).done]

    def used_folds(self) -> list[str]:
        """The folds that predict: `full` only if there is no other."""
        done = self.done_folds()
        return [fold for fold in done if fold != FULL] or done

    def weights_sha256(self, folds: Sequence[str]) -> dict[str, str]:
        """The recorded hashes of some trained folds' weights."""
        return {fold: self.fold(fold).weights_sha256() for fold in folds}

    def has_data(self) -> bool:
        """Whether there is something to lose: a checkpoint or a trained fold."""
        return any(self.fold(f).done or self.fold(f).checkpoint.exists() for f in [*range(self.recipe.folds.n_folds), FULL])


def _read_clips(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, index_col="fname", dtype=str, keep_default_na=False)
    table["labels"] = pd.Series([split_labels(text) for text in table["labels"]], index=table.index, dtype=object)
    return table


def run_stamp(folder: Path, noisy: bool) -> Artefact:
    """The tables of a run and their stamp, `run.json`."""
    return Artefact(folder / "run.json", (folder / "clips.csv", *([folder / "noisy.csv"] if noisy else [])))


def open_run(home: Home, name: str | Path) -> Run:
    """Open a run by its name, or by its folder's path, after checking its files against their recorded hashes.

    Raises:
        MelfoldError: no such run, or one that was damaged, edited, or made by another version.
    """
    folder = Path(name) if (Path(name) / "run.json").exists() else home.runs / str(name)
    if not (folder / "run.json").exists():
        names = ", ".join(sorted(p.parent.name for p in home.runs.glob("*/run.json")))
        fix = f"Known: {names}" if names else "Give the right --home, or run `melfold train` first"
        raise MelfoldError("no such run", f"{name} in {home.runs}", fix)
    content = read_json(folder / "run.json")
    known = {each.name for each in fields(RunInfo)}
    info = content.get("info")
    if not isinstance(info, dict) or set(info) != known or not isinstance(content.get("made_from"), dict):
        fix = "Use that version to read it, or train again under another name"
        raise MelfoldError(f"run {folder.name} was made by another version of melfold", str(folder / "run.json"), fix)
    recipe = parse_recipe(read_json(folder / "recipe.json"), f"{folder}/recipe.json")
    run_stamp(folder, bool(info["noisy_sha256"])).verify()
    if changes := differences({k: content["made_from"].get(k) for k in recipe.training()}, summary(recipe.training())):
        raise MelfoldError(f"{folder}/recipe.json was changed after the run started", listed(changes), "Undo the change")
    return Run(folder.resolve(), recipe, RunInfo(**info))


def list_runs(home: Home) -> list[tuple[str, Run | MelfoldError]]:
    """Every run of a home by name, or the reason why it cannot be opened."""
    found: list[tuple[str, Run | MelfoldError]] = []
    for path in sorted(home.runs.glob("*/run.json")):
        try:
            found.append((path.parent.name, open_run(home, path.parent.name)))
        except MelfoldError as error:
            found.append((path.parent.name, error))
    return found

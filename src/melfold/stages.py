"""The stages in order. Each skips what is done, so that a repeated call continues where the last one stopped."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from melfold.artefacts import Artefact
from melfold.combine.ensemble import fold_mean
from melfold.combine.oof import OofScores, prior_of, score
from melfold.combine.submission import build_submission
from melfold.compute import Compute
from melfold.config import Recipe
from melfold.data.cache import build_cache, read_manifest, stop_workers, unreadable
from melfold.data.competition import SPLITS, Competition, load_competition, with_bad_clips
from melfold.data.folds import Balance, fold_table
from melfold.errors import MelfoldError
from melfold.files import Home, digest
from melfold.kaggle.ledger import Ledger
from melfold.learn.predictions import Prediction, own_prediction, write_current
from melfold.learn.runs import FULL, Run, open_run
from melfold.learn.start import check_recipe, refuse_changes, start_run
from melfold.probs import make_probs
from melfold.recipes import change_recipe

log = logging.getLogger(__name__)


def cache(competition: Competition, home: Home, recipe: Recipe, compute: Compute, *, verify: bool = False) -> Path:
    """Make the log-mels a recipe needs; `verify` checks those that exist. Returns: the cache's folder."""
    splits = SPLITS if recipe.uses_noisy else ("curated", "test")
    exclude = with_bad_clips(recipe, competition).data.exclude
    try:
        return build_cache(competition, recipe.logmel, home, splits=splits, exclude=exclude, compute=compute, verify=verify)
    finally:
        stop_workers()


def folds(competition: Competition, home: Home, recipe: Recipe) -> tuple[Path, Balance]:
    """Make a recipe's fold table, or check the existing one: see `data.folds.fold_table`."""
    return fold_table(competition, home, recipe.folds)


def start(competition: Competition, home: Home, recipe: Recipe, name: str, which: Sequence[int | str]) -> Run:
    """Find out in seconds, before an hour of log-mels, whether a run can be trained; then make its folder and fold table.

    Raises:
        MelfoldError: a recipe that does not fit the competition, a name that is taken, a teacher without the folds, or a model
            that cannot be made.
    """
    recipe = with_bad_clips(recipe, competition)
    check_recipe(recipe, competition)
    numbered = [fold for fold in which if fold != FULL]
    for other, needed in ((recipe.model.first_run, which), *((teacher, numbered) for teacher in recipe.noisy.teachers)):
        if other and (missing := [str(fold) for fold in needed if not open_run(home, other).fold(fold).done]):
            raise MelfoldError(f"run {other}, which this one learns from, lacks folds", ", ".join(missing), "Train them first")
    if (home.runs / name / "run.json").exists() and (run := open_run(home, name)).has_data():
        refuse_changes(run, recipe)
    else:
        from melfold.learn.model import try_model

        try_model(recipe, len(competition.labels), home)
    table, _ = folds(competition, home, recipe)
    return start_run(home, name, recipe, competition, table, which)


def train(competition: Competition, home: Home, recipe: Recipe, name: str, which: Sequence[int | str], compute: Compute) -> Run:
    """Train some folds of a run, after making the fold table and log-mels where they are missing."""
    run = start(competition, home, recipe, name, which)
    train_folds(run, competition, which, cache(competition, home, recipe, compute), compute)
    return run


def resume(home: Home, name: str, compute: Compute, data: Path | None = None) -> Run:
    """Train the missing folds of a run, or its model of all clips if that is all it has, with its own recipe and download.

    Args:
        data: where the download is now, if it was moved.
    """
    run = open_run(home, name)
    competition = _download_of(run, data)
    folds = range(run.recipe.folds.n_folds)
    only_full = run.fold(FULL).path.exists() and not any(run.fold(fold).path.exists() for fold in folds)
    return train(competition, home, run.recipe, run.name, [FULL] if only_full else folds, compute)


def _download_of(run: Run, data: Path | None) -> Competition:
    folder = data or Path(run.info.data_folder)
    if not folder.is_dir():
        raise MelfoldError(f"the download of run {run.name} is gone", str(folder), "Give its folder: --data DATA")
    return load_competition(folder, run.recipe.data.exclude)


def students(
    home: Home, names: Sequence[str], rounds: int, sets: Sequence[str], compute: Compute, data: Path | None = None
) -> list[Run]:
    """Train students of runs in rounds: in each, every run again, with all runs of the round before as its teachers.

    They are ordinary runs, named `RUN-r1`, `RUN-r2` and so on, and what is done is skipped.

    Args:
        sets: changes to each run's recipe; one that draws no noisy clips gets `train.clips = "both"` before.
        data: where the download is now, if it was moved.

    Returns:
        The students of the last round.

    Raises:
        MelfoldError: no such run, a teacher without all folds, or as `start`.
    """
    runs = [open_run(home, name) for name in names]
    competition = _download_of(runs[0], data)
    for number in range(rounds):
        teachers = json.dumps([run.name for run in runs])
        log.info("round %d of %d, teachers: %s", number + 1, rounds, ", ".join(run.name for run in runs))
        students: list[Run] = []
        for run in runs:
            clips = [] if run.recipe.uses_noisy else ["train.clips=both"]
            recipe = change_recipe(run.recipe, [*clips, f"noisy.teachers={teachers}", *sets])
            students.append(train(competition, home, recipe, _next_round(run.name), range(recipe.folds.n_folds), compute))
        runs = students
    return runs


def _next_round(name: str) -> str:
    """`open` -> `open-r1`, `open-r1` -> `open-r2`."""
    before = re.fullmatch(r"(.+)-r(\d+)", name)
    return f"{before[1]}-r{int(before[2]) + 1}" if before else f"{name}-r1"


def train_folds(run: Run, competition: Competition, which: Sequence[int | str], folder: Path, compute: Compute) -> None:
    """Train the folds that are not done, from log-mels that are there. Args: folder: of the log-mels."""
    if all(run.fold(fold).done for fold in which):
        return
    from melfold.learn import launch

    fronts = [open_run(run.home, name).recipe.logmel for name in run.recipe.noisy.teachers]
    folders = [cache(competition, run.home, run.recipe.model_copy(update={"logmel": front}), compute) for front in fronts]
    launch.train_folds(run, which, folder, compute, teacher_caches=folders)


def predict(prediction: Prediction, competition: Competition, home: Home, compute: Compute) -> Prediction:
    """Make out-of-fold and test probabilities of a run's weights, both with the same views.

    The test clips are predicted with every trained fold (with `full` if there is no other) and averaged. A test clip that cannot
    be read gets the mean out-of-fold probabilities, and a warning.

    Raises:
        MelfoldError: no trained fold, or another competition's labels.
    """
    run = prediction.run
    which = _folds_to_predict(run, competition)

    def stale(work: list[tuple[str, Path, list[str], str]]) -> list[tuple[str, Path, list[str], str]]:
        return [
            (fold, path, fnames, clips)
            for fold, path, fnames, clips in work
            if not Artefact.of(path).is_fresh(prediction.inputs(fold, clips))
        ]

    held_out = {fold: run.held_out(fold) for fold in run.done_folds() if fold != FULL}
    work = stale([(fold, prediction.fold_oof(fold), fnames, digest(fnames)) for fold, fnames in held_out.items()])
    if work:  # all folds of a new prediction, none of one that training left
        run.training_audio(cache(competition, home, run.recipe, compute))
    folder = build_cache(competition, run.recipe.logmel, home, splits=["test"], compute=compute)
    manifest = read_manifest(folder).loc[list(competition.test.index)]
    silent = unreadable(manifest)
    readable = list(manifest.index.difference(silent, sort=False))
    clips = digest(manifest[["size", "mtime_ns"]].reset_index().to_numpy().tolist())
    work += stale([(fold, prediction.fold_test(fold), readable, clips) for fold in which])
    if work:
        from melfold.learn.launch import predict_folds

        predict_folds(prediction, folder, work, compute)
    made_from = prediction.test_inputs() | {"clips": clips, "unreadable": silent}
    if not Artefact.of(prediction.test).is_fresh(made_from):
        probs = fold_mean(prediction, which)
        if silent:
            prior = prior_of(prediction).to_numpy()[None].repeat(len(silent), 0)
            probs = pd.concat([probs, make_probs(prior, silent, run.info.labels)])
        write_current(prediction.test, probs.loc[list(competition.test.index)], made_from)
    return prediction


def _folds_to_predict(run: Run, competition: Competition) -> list[str]:
    if list(competition.labels) != run.info.labels:
        odd = ", ".join(sorted(set(run.info.labels) ^ set(competition.labels))[:6]) or "another order"
        raise MelfoldError(f"run {run.name} was trained with other labels", odd, "Give the competition it was trained for")
    which = run.used_folds()
    if not which:
        raise MelfoldError(f"run {run.name} has no trained fold", str(run.folder), "Run `melfold train` first")
    if run.missing_folds() and which != [FULL]:
        log.warning("run %s is INCOMPLETE: predicting with fold %s only", run.name, ", ".join(which))
    if competition.name != run.info.competition:
        log.warning("run %s was trained on %s, this is %s", run.name, run.info.competition, competition.name)
    return which


def run(root: Path, home: Home, recipe: Recipe, name: str, compute: Compute) -> tuple[Prediction, OofScores, Path]:
    """All stages, from a download to a checked `submission.csv`, skipping what is done."""
    competition = load_competition(root, recipe.data.exclude)
    every = range(recipe.folds.n_folds)
    sizes = [len(table) for table in (competition.curated, competition.noisy, competition.test, competition.labels)]
    log.info("1/6 %s: %d curated, %d noisy, %d test clips, %d labels", competition.name, *sizes)
    started = start(competition, home, recipe, name, every)
    log.info("2/6 fold table %s", started.info.fold_table)
    folder = cache(competition, home, recipe, compute)
    log.info("3/6 log-mels in %s", folder)
    train_folds(started, competition, every, folder, compute)
    prediction = own_prediction(started)
    scores = score(prediction)
    log.info("4/6 %d folds trained, OOF lwlrap %.5f (%.5f to %.5f)", len(every), scores.oof_lwlrap, scores.low, scores.high)
    predict(prediction, competition, home, compute)
    log.info("5/6 test probabilities in %s", prediction.test)
    submitted = {row.id for row in Ledger.of(home).rows()}
    mean = recipe.predict.fold_mean
    path = build_submission(home, [prediction], competition, id=name, mean=mean, replace=name not in submitted)
    log.info("6/6 checked submission in %s", path)
    return prediction, scores, path

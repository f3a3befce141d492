"""The stages in order. Each skips what is done, so that a repeated call picks up where the last one stopped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from melfold.compute import Compute, Progress, remote, silent, spread
from melfold.config import Recipe
from melfold.data.cache import build_cache, read_manifest, stop_workers, unreadable
from melfold.data.competition import SPLITS, Competition, load_competition, with_bad_clips
from melfold.data.folds import fold_table, fold_table_path
from melfold.errors import MelfoldError
from melfold.files import Home, read_json
from melfold.probs import is_current, make_probs, write_current

if TYPE_CHECKING:
    from melfold.combine.ensemble import OofScores
    from melfold.learn.devices import Device
    from melfold.learn.runs import Run

log = logging.getLogger(__name__)


def cache(competition: Competition, home: Home, recipe: Recipe, *, jobs: int = -1, progress: Progress = silent) -> Path:
    """Make the log-mels a recipe needs. Returns the cache's folder."""
    try:
        splits = SPLITS if recipe.noisy.use else ("curated", "test")
        exclude = with_bad_clips(recipe, competition).data.exclude
        compute = Compute(jobs=jobs, progress=progress)
        return build_cache(competition, recipe.logmel, home, splits=splits, exclude=exclude, compute=compute)
    finally:
        stop_workers()


def folds_path(home: Home, competition: Competition, recipe: Recipe) -> Path:
    """The file of a recipe's fold table."""
    return fold_table_path(home, competition.name, recipe.folds)


def folds(competition: Competition, home: Home, recipe: Recipe) -> tuple[Path, int]:
    """Make a recipe's fold table, or check the one that exists: see `data.folds.fold_table`."""
    return fold_table(competition, home, recipe.folds)


def train(
    competition: Competition,
    home: Home,
    recipe: Recipe,
    name: str,
    which: Sequence[int | str],
    device: Device,
    *,
    names: Sequence[str] = ("auto",),
    jobs: int = -1,
    progress: Progress = silent,
) -> Run:
    """Train some folds of a run, making the log-mels and the fold table where they are missing.

    Args:
        device: where they train one after the other, here.
        names: of several devices here, on each of which a fold trains at a time; or, on a cluster, the device of every worker.
    """
    from melfold.learn.noisy import teach
    from melfold.learn.runs import open_run, start_run
    from melfold.learn.session import train_job, train_session
    from melfold.learn.train import train_fold

    recipe = with_bad_clips(recipe, competition)
    try_recipe(home, name, competition, recipe, which)
    table, _ = folds(competition, home, recipe)
    run = start_run(home, name, recipe, competition, table)
    folder = cache(competition, home, recipe, jobs=jobs, progress=progress)
    teacher = open_run(home, recipe.noisy.teacher) if recipe.noisy.teacher else None
    if teacher:
        as_heard = recipe.model_copy(update={"logmel": teacher.recipe.logmel})
        heard = cache(competition, home, as_heard, jobs=jobs, progress=progress)
    else:
        heard = None
    if remote():
        there = [(home.root, run.name, str(fold), folder, heard, names[0]) for fold in which]
        for done, _ in enumerate(spread(train_job, there)):
            progress(done + 1, len(there), f"{run.name}: folds trained")
        return run
    for fold in which:
        if teacher and heard:
            teach(run, teacher, fold, heard, device)
        if len(names) == 1:
            train_fold(run, fold, folder, device, progress=progress)
    if len(names) > 1:
        train_session(run, [str(fold) for fold in which], folder, names, amp=recipe.train.amp)
    return run


def try_recipe(home: Home, name: str, competition: Competition, recipe: Recipe, which: Sequence[int | str] = ()) -> None:
    """Find out before an hour of caching, not after, that a run's name is taken or that its model cannot be made."""
    from melfold.learn.model import build_model, feature_width
    from melfold.learn.runs import FULL, begun, check_corrections, check_noisy, open_run, refuse_changes

    recipe = with_bad_clips(recipe, competition)
    check_corrections(recipe, competition)
    if recipe.noisy.use:
        check_noisy(competition)
    if recipe.noisy.teacher:
        teacher = open_run(home, recipe.noisy.teacher)
        if missing := [str(fold) for fold in which if fold != FULL and not teacher.fold(fold).done]:
            raise MelfoldError(f"teacher {teacher.name} lacks folds", ", ".join(missing), "Train them first")

    if begun(home, name):
        refuse_changes(open_run(home, name), recipe)
    else:
        model = build_model(recipe.model, len(competition.labels), recipe.logmel.n_mels, recipe.crop_frames)
        for length in {view.length for view in recipe.views} - {recipe.crop_frames}:
            feature_width(model.backbone, recipe.model.name, recipe.logmel.n_mels, length)


def predict(
    run: Run, competition: Competition, home: Home, device: Device, *, name: str = "auto", progress: Progress = silent
) -> Path:
    """Predict the test clips with every trained fold (with `full` where there is no other), and average.

    A test clip that cannot be read gets the mean out-of-fold probabilities, and a warning.

    Args:
        device: where it is done, unless on a cluster.
        name: the device of every worker of a cluster.

    Returns:
        The table of the run's test probabilities.
    """
    from melfold.combine.ensemble import fold_mean, prior_of
    from melfold.data.clips import ClipStore
    from melfold.learn.predict import predict_probs
    from melfold.learn.runs import FULL
    from melfold.learn.session import predict_job
    from melfold.learn.train import load_fold

    recipe = run.recipe
    if list(competition.labels) != run.info.labels:
        raise MelfoldError(
            f"run {run.name} knows other labels than this data",
            ", ".join(sorted(set(run.info.labels) ^ set(competition.labels))[:6]) or "another order",
            "Give the competition it was trained for",
        )
    which = run.used_folds()
    if run.missing_folds() and which != [FULL]:
        log.warning("run %s is INCOMPLETE: predicting with folds %s alone", run.name, ", ".join(which))
    if competition.name != run.info.competition:
        log.warning("run %s was trained on %s, this is %s", run.name, run.info.competition, competition.name)
    if not which:
        raise MelfoldError(f"run {run.name} has no trained fold", str(run.folder), "Run `melfold train`")
    folder = build_cache(competition, recipe.logmel, home, splits=["test"], compute=Compute(progress=progress))
    manifest = read_manifest(folder).loc[list(competition.test.index)]
    lost = unreadable(manifest)
    readable = list(manifest.index.drop(lost))
    store = ClipStore(folder, readable, recipe.logmel.n_mels, recipe.logmel.top_db)
    key = [recipe.model_dump(mode="json"), manifest[["size", "mtime_ns"]].reset_index().to_numpy().tolist()]
    weights = run.weights_sha256(which)
    keys = {fold: [key, weights[fold]] for fold in which}
    if remote():
        left = [fold for fold in which if not is_current(run.fold(fold).test, keys[fold])]
        there = [(run.folder.parents[1], run.name, fold, folder, readable, keys[fold], name) for fold in left]
        for done, _ in enumerate(spread(predict_job, there)):
            progress(done + 1, len(left), f"{run.name}: folds predicted")
    for number, fold in enumerate(which):
        path = run.fold(fold).test
        if not is_current(path, keys[fold]):
            write_current(path, predict_probs(load_fold(run, fold, device), store, run.info.labels, recipe, device), keys[fold])
        progress(number + 1, len(which), f"{run.name}: predicting {len(readable)} test clips")
    prior = prior_of(run) if lost else None
    if not is_current(run.test, [keys, lost]):
        probs = fold_mean(run, which)
        if prior is not None:
            filler = make_probs(prior.to_numpy()[None].repeat(len(lost), 0), lost, run.info.labels)
            probs = pd.concat([probs, filler])
        write_current(run.test, probs.loc[list(competition.test.index)], [keys, lost], rests_on=weights)
    return run.test


def run_all(
    root: Path,
    home: Home,
    recipe: Recipe,
    name: str,
    device: Device,
    *,
    names: Sequence[str] = ("auto",),
    jobs: int = -1,
    progress: Progress = silent,
) -> tuple[Run, OofScores, Path]:
    """The whole road from a download to a checked `submission.csv`, skipping what is done."""
    from melfold.combine.ensemble import pool_oof
    from melfold.combine.submission import build_submission
    from melfold.kaggle.ledger import Ledger

    competition = load_competition(root)
    try_recipe(home, name, competition, recipe, range(recipe.folds.n_folds))
    log.info("1/6 %s: %d curated, %d noisy, %d test clips, %d labels", competition.name, *_sizes(competition))
    folder = cache(competition, home, recipe, jobs=jobs, progress=progress)
    log.info("2/6 log-mels in %s", folder)
    table, deviation = folds(competition, home, recipe)
    log.info("3/6 folds in %s (labels within %d clips of an even split)", table, deviation)
    every = range(recipe.folds.n_folds)
    run = train(competition, home, recipe, name, every, device, names=names, jobs=jobs, progress=progress)
    log.info("4/6 %d folds trained in %s", recipe.folds.n_folds, run.folder)
    scores = pool_oof(run)
    log.info("5/6 OOF lwlrap %.4f (%.3f to %.3f)", scores.oof_lwlrap, scores.low, scores.high)
    predict(run, competition, home, device, name=names[0], progress=progress)
    submitted = {row.id for row in Ledger.of(home).rows()}
    mean = recipe.predict.fold_mean
    path = build_submission(home, [run], competition, id=run.name, mean=mean, replace=run.name not in submitted)
    log.info("6/6 checked submission in %s", path)
    return run, scores, path


@dataclass(frozen=True)
class DryRun:
    """What a dry run found: `steps` of training a fold will take, and the `seconds` a fold took a step on this device."""

    folder: Path
    submission: Path
    steps: int
    seconds_per_step: float
    batch_size: int


def dry_run(root: Path, home: Home, recipe: Recipe, device: Device, *, jobs: int = -1, progress: Progress = silent) -> DryRun:
    """Every stage of a recipe with a few clips and steps, made anew in `build/dry-run`: does it run at all, and how fast?

    Model, crops, augmentation, losses and phases are the recipe's own; on a GPU its batch size too, so that memory is tried.
    """
    import shutil

    from melfold.combine.ensemble import pool_oof
    from melfold.combine.submission import build_submission
    from melfold.learn.runs import open_run
    from melfold.learn.train import phases_of

    whole = load_competition(root)
    recipe = with_bad_clips(recipe, whole)
    per_fold = 8
    few = replace(
        whole,
        curated=whole.curated.loc[~whole.curated.index.isin(recipe.data.exclude)].head(per_fold * recipe.folds.n_folds),
        noisy=whole.noisy.loc[~whole.noisy.index.isin(recipe.data.exclude)].head(2 * per_fold),
        test=whole.test.head(per_fold),
    )
    place = Home(home.root / "build" / "dry-run")
    shutil.rmtree(place.root, ignore_errors=True)
    recipes = [recipe]
    while recipes[0].noisy.teacher:
        recipes.insert(0, open_run(home, recipes[0].noisy.teacher).recipe)
    for number, each in enumerate(recipes):
        short = _shortened(each, few, f"try{number - 1}", device)
        run = train(few, place, short, f"try{number}", range(recipe.folds.n_folds), device, jobs=jobs, progress=progress)
        pool_oof(run)
    predict(run, few, place, device, progress=progress)
    path = build_submission(place, [run], few, id=run.name, mean=recipe.predict.fold_mean)
    results = [read_json(run.fold(fold).result) for fold in range(recipe.folds.n_folds)]
    kept = len(whole.noisy)
    if recipe.noisy.teacher:
        most = recipe.noisy.per_label * len(whole.labels)
        kept = min(kept, recipe.noisy.top or kept, most or kept)
    curated = len(whole.curated) * (recipe.folds.n_folds - 1) // recipe.folds.n_folds
    return DryRun(
        run.folder,
        path,
        phases_of(recipe, curated, kept)[-1].until,
        min(result["seconds"] / result["steps"] for result in results),
        short.train.batch_size,
    )


def _shortened(recipe: Recipe, few: Competition, teacher: str, device: Device) -> Recipe:
    """A recipe of three steps a phase (twenty on a GPU, whose first ones are slow), the last one without augmentation."""
    curated, noisy = len(few.curated) * (recipe.folds.n_folds - 1) // recipe.folds.n_folds, len(few.noisy)
    gpu = device.torch.type != "cpu"
    batch_size = recipe.train.batch_size if gpu else min(4, recipe.train.batch_size)
    rows = curated * recipe.noisy.curated_times + noisy if recipe.noisy.use else curated
    steps = (20 if gpu else 3) - 0.5  # rounded up
    last = batch_size / (curated if recipe.noisy.curated_epochs or not recipe.noisy.use else rows)
    epochs = steps * batch_size / rows
    alone: dict[str, Any] = {"teacher": teacher} if recipe.noisy.teacher else {}
    if recipe.noisy.curated_epochs:
        alone["curated_epochs"] = steps * batch_size / curated
    corrections = {f: c for f, c in recipe.data.corrections.items() if f in few.curated.index}
    changes = {"epochs": epochs, "warmup_epochs": epochs / 3, "batch_size": batch_size}
    changes |= {"validate_every": 0.0}  # the end is looked at in any case, and counts no time
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"corrections": corrections}),
            "train": recipe.train.model_copy(update=changes),
            "noisy": recipe.noisy.model_copy(update=alone),
            "augment": recipe.augment.model_copy(update={"off_epochs": last / 2}),
        }
    )


def runs_alike(home: Home) -> list[Run]:
    """The runs present that hold out the same clips at the same time and have out-of-fold predictions of every fold.

    Where there are several such families, the largest; ties to the one that began first by name.
    """
    from melfold.learn.runs import open_run

    families: dict[str, list[Run]] = {}
    for path in sorted(home.runs.glob("*/run.json")):
        try:
            run = open_run(home, path.parent.name)
        except MelfoldError as error:
            log.warning("passed over: %s", error)
            continue
        if not run.missing_folds():
            families.setdefault(run.info.clips_sha256, []).append(run)
    return max(families.values(), key=len, default=[])


def suggest_corrections(run: Run) -> pd.DataFrame:
    """Curated clips whose out-of-fold prediction contradicts their labels: see `learn.noisy.doubtful`."""
    from melfold.combine.ensemble import pool_oof
    from melfold.learn.noisy import doubtful
    from melfold.probs import read_probs

    pool_oof(run)
    oof = read_probs(run.oof)
    return doubtful(run.targets(oof.index), oof)


def _sizes(competition: Competition) -> tuple[int, int, int, int]:
    return len(competition.curated), len(competition.noisy), len(competition.test), len(competition.labels)

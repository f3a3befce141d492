"""A dry run: every stage of a recipe in seconds. Does it run at all, and how long will a fold take?"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from melfold import stages
from melfold.combine.oof import score
from melfold.combine.submission import build_submission
from melfold.compute import Compute
from melfold.config import Recipe
from melfold.data.competition import Competition, load_competition, with_bad_clips
from melfold.files import Home, read_json
from melfold.learn.predictions import own_prediction
from melfold.learn.runs import open_run


@dataclass(frozen=True)
class DryRun:
    """What a dry run found: the `steps` that training a fold will take, and the `seconds_per_step` measured on this device."""

    folder: Path
    submission: Path
    steps: int
    seconds_per_step: float
    batch_size: int


def dry_run(root: Path, home: Home, recipe: Recipe, compute: Compute) -> DryRun:
    """Run every stage of a recipe with a few clips and steps, from the start, in `build/dry-run`.

    Model, crops, augmentation, losses and phases are the recipe's own; on a GPU its batch size too, so that memory is tried.
    """
    from melfold.learn.devices import pick_device
    from melfold.learn.fetch import hub_file, share_weights
    from melfold.learn.fold_data import phases_of

    gpu = pick_device(compute.device).torch.type != "cpu"
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
    if any(hub_file(each.model) for each in recipes):
        share_weights(home, place)
    for number, each in enumerate(recipes):
        short = _shortened(each, few, f"try{number - 1}", gpu=gpu)
        run = stages.train(few, place, short, f"try{number}", range(recipe.folds.n_folds), compute)
        prediction = own_prediction(run)
        score(prediction)
    stages.predict(prediction, few, place, compute)
    path = build_submission(place, [prediction], few, id=run.name, mean=recipe.predict.fold_mean)
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


def _shortened(recipe: Recipe, few: Competition, teacher: str, *, gpu: bool) -> Recipe:
    """A recipe with three steps in each phase (twenty on a GPU, whose first ones are slow), the last one without augmentation."""
    curated, noisy = len(few.curated) * (recipe.folds.n_folds - 1) // recipe.folds.n_folds, len(few.noisy)
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
    changes |= {"validate_every": 0.0}  # the end is validated in any case, outside the time measured
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"corrections": corrections}),
            "train": recipe.train.model_copy(update=changes),
            "noisy": recipe.noisy.model_copy(update=alone),
            "augment": recipe.augment.model_copy(update={"off_epochs": last / 2}),
        }
    )

"""A recipe and a competition cut short: every stage in seconds, to try whether it runs at all."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from melfold.config import Recipe
from melfold.data.competition import Competition

CLIPS_PER_FOLD = 8


def few_clips(whole: Competition, n_folds: int, exclude: Collection[str] = ()) -> Competition:
    """The first clips of each split, those left out that `exclude` names."""
    curated = whole.curated.loc[~whole.curated.index.isin(list(exclude))]
    noisy = whole.noisy.loc[~whole.noisy.index.isin(list(exclude))]
    return replace(
        whole,
        curated=curated.head(CLIPS_PER_FOLD * n_folds),
        noisy=noisy.head(2 * CLIPS_PER_FOLD),
        test=whole.test.head(CLIPS_PER_FOLD),
    )


def shorten(recipe: Recipe, few: Competition, teacher: str, *, batch_size: int, steps: int) -> Recipe:
    """A recipe with a few steps in each phase, the last one without augmentation."""
    curated, noisy = len(few.curated) * (recipe.folds.n_folds - 1) // recipe.folds.n_folds, len(few.noisy)
    rows = curated * recipe.noisy.curated_times + noisy if recipe.noisy.use else curated
    wanted = steps - 0.5  # rounded up
    last = batch_size / (curated if recipe.noisy.curated_epochs or not recipe.noisy.use else rows)
    epochs = wanted * batch_size / rows
    alone: dict[str, Any] = {"teacher": teacher} if recipe.noisy.teacher else {}
    if recipe.noisy.curated_epochs:
        alone["curated_epochs"] = wanted * batch_size / curated
    corrections = {f: c for f, c in recipe.data.corrections.items() if f in few.curated.index}
    changes = {"epochs": epochs, "warmup_epochs": epochs / 3, "batch_size": batch_size}
    changes |= {"validate_every": 0.0}  # the end is validated in any case, outside the time measured
    model: dict[str, Any] = {}
    if recipe.model.first_run:  # other weights take no other time
        model = {"weights": "none", "normalise": "scalar"}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "data": recipe.data.model_copy(update={"corrections": corrections}),
            "train": recipe.train.model_copy(update=changes),
            "noisy": recipe.noisy.model_copy(update=alone),
            "augment": recipe.augment.model_copy(update={"off_epochs": last / 2}),
        }
    )

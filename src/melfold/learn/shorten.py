"""A recipe and a competition cut short: every stage in seconds, to try whether it runs at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from melfold.config import Recipe
from melfold.data.competition import Competition
from melfold.learn.phases import phases_of
from melfold.train_config import Phase

CLIPS_PER_FOLD = 8


def few_clips(whole: Competition, n_folds: int, exclude: Collection[str] = ()) -> Competition:
    """The first clips of each split, those left out that `exclude` names."""
    curated = whole.curated.loc[~whole.curated.index.isin(list(exclude))].head(CLIPS_PER_FOLD * n_folds)
    noisy = whole.noisy.loc[~whole.noisy.index.isin(list(exclude))].head(2 * CLIPS_PER_FOLD)
    return replace(whole, curated=curated, noisy=noisy, test=whole.test.head(CLIPS_PER_FOLD))


def shorten(recipe: Recipe, few: Competition, names: Mapping[str, str] | None = None, *, batch_size: int, steps: int) -> Recipe:
    """A recipe with a few steps in each phase. Args: names: of its teachers -> other names for them."""
    curated, noisy = len(few.curated) * (recipe.folds.n_folds - 1) // recipe.folds.n_folds, len(few.noisy)
    # The end is validated in any case, outside the time measured.
    train = recipe.train.model_copy(update={"batch_size": batch_size, "validate_every": 0.0})
    phases = []
    for phase, own in zip(recipe.phases or (Phase(),), phases_of(recipe, curated, noisy), strict=True):
        epochs = (steps - 0.5) * batch_size / max(1, len(own.rows))  # rounded up
        phases.append(phase.model_copy(update={"epochs": epochs, "warmup_epochs": epochs / 3}))
    corrections = {f: c for f, c in recipe.data.corrections.items() if f in few.curated.index}
    changes: dict[str, Any] = {"train": train, "phases": tuple(phases)}
    changes["data"] = recipe.data.model_copy(update={"corrections": corrections})
    if names:
        changes["noisy"] = recipe.noisy.model_copy(update={"teachers": tuple(names[name] for name in recipe.noisy.teachers)})
    if recipe.model.first_run:  # other weights take no other time
        changes["model"] = recipe.model.model_copy(update={"weights": "none", "normalise": "scalar"})
    return recipe.model_copy(update=changes)

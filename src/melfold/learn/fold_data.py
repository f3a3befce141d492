"""What one fold learns from and is scored on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from melfold.data.clips import ClipStore
from melfold.errors import MelfoldError
from melfold.learn.batches import Batch, train_batches
from melfold.learn.normalise import Level, statistics
from melfold.learn.phases import phases_of
from melfold.learn.runs import FULL, Run


class FoldData:
    """The clips of one fold.

    Args:
        cache: the folder of the log-mels.

    Raises:
        MelfoldError: a clip that is not in the cache, no clip to learn from, or audio that is not what the run's other folds
            were trained on.
    """

    def __init__(self, run: Run, fold: str, cache: Path) -> None:
        recipe, held_out = run.recipe, run.held_out(fold)
        self.recipe, self.fold = recipe, fold
        if not run.trained_on(fold):
            raise MelfoldError(f"fold {fold} has no clip to learn from", "every clip is excluded", "Check data.exclude")
        curated, noisy = run.fold_targets(fold)
        if recipe.uses_noisy and noisy.empty:
            raise MelfoldError("no noisy clip is left to learn from", run.name, "Check noisy.top and data.exclude")
        self.curated, self.noisy = len(curated), len(noisy)
        """How many clips of `train` are curated and noisy."""
        self.train = ClipStore(cache, [*curated.index, *noisy.index], recipe.logmel.n_mels, recipe.logmel.top_db)
        """Curated clips first, then noisy ones."""
        self.targets = np.concatenate([curated.to_numpy(), noisy.to_numpy()])
        """float32 `(clips, labels)` in 0..1, a row for each clip of `train`."""
        self.held_out = ClipStore(cache, held_out, recipe.logmel.n_mels, recipe.logmel.top_db)
        """The clips the fold is scored on, with `held_out_targets`; none for `full`."""
        self.held_out_targets = run.targets(held_out)
        self.training_audio = run.training_audio(cache)
        """The digest of the audio of the run's clips."""
        self.phases = phases_of(recipe, self.curated, self.noisy)
        self.steps = self.phases[-1].until
        self.seeds = recipe.seed, recipe.folds.n_folds if fold == FULL else int(fold)
        """What every random stream of this fold starts with."""

    def statistics(self) -> tuple[tuple[Level, Level] | None, tuple[Level, Level] | None]:
        """Mean and standard deviation in dB of the curated clips, unless they come with the weights; and of the noisy ones if
        they are to have their own."""
        kind = self.recipe.model.normalise
        own = None if kind == "checkpoint" else statistics(self.train.head(self.curated), bands=kind == "band")
        apart = self.noisy and self.recipe.noisy.own_norm
        return own, statistics(self.train.tail(self.noisy), bands=kind != "scalar") if apart else None

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The training batches from a step on."""
        length, seeds = self.recipe.crop_frames, self.seeds
        return train_batches(self.train, self.phases, length=length, seeds=seeds, first_step=first_step, first_noisy=self.curated)

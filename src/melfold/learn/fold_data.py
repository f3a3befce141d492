"""What one fold learns from and is scored on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from melfold.config import Recipe
from melfold.data.clips import ClipStore
from melfold.errors import MelfoldError
from melfold.learn.batches import Batch, train_batches
from melfold.learn.normalise import Level, statistics
from melfold.learn.phases import Phase, phases_of
from melfold.learn.runs import FULL, Run


@dataclass(frozen=True)
class FoldData:
    """The clips of one fold.

    Args:
        train: curated clips first, then noisy ones.
        targets: float32 `(clips, labels)` in 0..1, a row for each clip of `train`.
        curated: how many clips of `train` are curated.
        held_out: the clips the fold is scored on, with `held_out_targets`; none for `full`.
        training_audio: the digest of the audio of the run's clips.
    """

    recipe: Recipe
    fold: str
    train: ClipStore
    targets: np.ndarray
    curated: int
    held_out: ClipStore
    held_out_targets: pd.DataFrame
    training_audio: str

    @classmethod
    def read(cls, run: Run, fold: str, cache: Path) -> FoldData:
        """Args: cache: the folder of the log-mels.

        Raises:
            MelfoldError: a clip that is not in the cache, no clip to learn from, or audio that is not what the run's other
                folds were trained on.
        """
        recipe, front = run.recipe, run.recipe.logmel
        train, held_out = run.trained_on(fold), run.held_out(fold)
        if not train:
            raise MelfoldError(f"fold {fold} has no clip to learn from", "every clip is excluded", "Check data.exclude")
        curated, noisy = run.fold_targets(fold)
        if recipe.uses_noisy and noisy.empty:
            raise MelfoldError("no noisy clip is left to learn from", run.name, "Check noisy.top and data.exclude")
        return cls(
            recipe,
            fold,
            ClipStore(cache, [*curated.index, *noisy.index], front.n_mels, front.top_db),
            np.concatenate([curated.to_numpy(), noisy.to_numpy()]),
            len(train),
            ClipStore(cache, held_out, front.n_mels, front.top_db),
            run.targets(held_out),
            run.training_audio(cache),
        )

    @property
    def noisy(self) -> int:
        """How many clips of `train` are noisy."""
        return len(self.train.fnames) - self.curated

    def statistics(self) -> tuple[tuple[Level, Level] | None, tuple[Level, Level] | None]:
        """Mean and standard deviation in dB of the curated clips, unless they come with the weights; and of the noisy ones if
        they are to have their own."""
        kind = self.recipe.model.normalise
        own = None if kind == "checkpoint" else statistics(self.train.head(self.curated), bands=kind == "band")
        apart = self.noisy and self.recipe.noisy.own_norm
        return own, statistics(self.train.tail(self.noisy), bands=kind != "scalar") if apart else None

    @cached_property
    def phases(self) -> list[Phase]:
        """The stretches of training."""
        return phases_of(self.recipe, self.curated, self.noisy)

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.phases[-1].until

    @property
    def seeds(self) -> tuple[int, int]:
        """What every random stream of this fold starts with."""
        return self.recipe.seed, self.recipe.folds.n_folds if self.fold == FULL else int(self.fold)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The training batches from a step on."""
        config = self.recipe.train
        return train_batches(
            self.train,
            self.phases,
            length=self.recipe.crop_frames,
            batch_size=config.batch_size,
            pad=config.pad,
            seeds=self.seeds,
            first_step=first_step,
            first_noisy=self.curated,
        )

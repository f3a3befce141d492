"""The stretches of a training: which clips are drawn, how long, and at which learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from melfold.config import Recipe
from melfold.train_config import TrainConfig


@dataclass(frozen=True)
class Phase:
    """The steps from `begin` to `until`, in which clips are drawn from `rows`; rows may repeat.

    Args:
        config: the settings of `train` as this phase changes them.
    """

    config: TrainConfig
    begin: int
    until: int
    rows: np.ndarray

    def steps_in(self, epochs: float) -> int:
        """How many batches some passes over the rows take."""
        return math.ceil(epochs * len(self.rows) / self.config.batch_size)

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        return min(self.steps_in(self.config.warmup_epochs), self.until - self.begin - 1)

    def learning_rate(self, step: int) -> float:
        """At a step of the training: it rises evenly from `lr_min` to `lr`, then falls to `lr_min` along half a cosine."""
        config, at = self.config, step - self.begin
        if at < self.warmup:
            return config.lr_min + at * ((config.lr - config.lr_min) / self.warmup)
        falling = self.until - self.begin - self.warmup
        cosine = math.cos(math.pi * (at - self.warmup) / falling)
        return config.lr_min + 0.5 * (config.lr - config.lr_min) * (1.0 + cosine)

    def looks(self) -> range:
        """After how many steps of the training the held-out fold is scored, the end of the training aside."""
        every = self.steps_in(self.config.validate_every) or self.until + 1
        return range(self.begin + every, self.until + 1, every)


def phases_of(recipe: Recipe, curated: int, noisy: int) -> list[Phase]:
    """A recipe's phases on so many clips. Rows: the curated clips first, then the noisy ones."""
    phases, begin = [], 0
    own, theirs = np.arange(curated), np.arange(curated, curated + noisy)
    for config in recipe.schedule:
        both = np.concatenate([np.tile(own, config.curated_times), theirs])
        rows = {"curated": own, "noisy": theirs, "both": both}[config.clips]
        until = begin + math.ceil(config.epochs * len(rows) / config.batch_size)
        phases.append(Phase(config, begin, until, rows))
        begin = until
    return phases


def epochs_at(phases: Sequence[Phase], step: int) -> float:
    """Passes after `step` steps of the training, each over its own phase's rows."""
    done = [phase for phase in phases if phase.begin < step]
    return sum((min(step, phase.until) - phase.begin) * phase.config.batch_size / len(phase.rows) for phase in done)


def phase_at(phases: Sequence[Phase], step: int) -> int:
    """The number of the phase that a step belongs to; the last one at the end of the training."""
    return next((number for number, phase in enumerate(phases) if step < phase.until), len(phases) - 1)

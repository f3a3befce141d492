"""Input normalisation: one object that the model, masks, mixing and prediction share, saved with the weights."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from melfold.data.clips import ClipStore

Level: TypeAlias = float | np.ndarray
"""dB: one number, or one per mel band, float64 `(n_mels,)`."""

BLOCK_FRAMES = 8192
"""Read at a time, so that a clip of an hour needs no more memory than one of a minute."""

LEAST_STD = 1.0
"""dB, of a band. A band that hardly varies in training would be blown up where a test clip has sound in it."""


class Normalisation(nn.Module):
    """`(log_mel - mean) / std`, both in dB.

    Mean and standard deviation are scalars, or one value per mel band, shape `(n_mels,)`. In training, noisy clips may have
    statistics of their own; those are not kept.

    Args:
        bands: the number of mel bands; 0 for scalars.
        affine: also multiply by a weight and add a bias per band, as a batch norm in front of a network does. Clips with
            statistics of their own keep this weight and bias.
    """

    def __init__(self, bands: int = 0, *, affine: bool = False) -> None:
        super().__init__()
        shape = (bands,) if bands else ()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.register_buffer("weight", torch.ones(shape) if affine else None)
        self.register_buffer("bias", torch.zeros(shape) if affine else None)
        self.register_buffer("noisy_mean", None)
        self.register_buffer("noisy_std", None)

    def set(self, mean: Level, std: Level) -> None:
        """Take statistics of clips, dB."""
        self.mean.copy_(_tensor(mean))
        self.std.copy_(_tensor(std))

    def set_noisy(self, mean: Level, std: Level) -> None:
        """Take the noisy clips' own statistics, dB, for training."""
        self.noisy_mean, self.noisy_std = _tensor(mean), _tensor(std)

    def forward(self, log_mels: torch.Tensor, noisy: torch.Tensor | None = None) -> torch.Tensor:
        """Args: log_mels: dB `(clips, 1, n_mels, frames)`. noisy: bool `(clips,)`, or None if all clips are curated."""
        x = (log_mels - self._of(self.mean, self.noisy_mean, noisy)) / self._of(self.std, self.noisy_std, noisy)
        return x if self.weight is None else x * self.weight.view(1, 1, -1, 1) + self.bias.view(1, 1, -1, 1)

    def fill(self, noisy: torch.Tensor | None = None) -> torch.Tensor:
        """The dB of masked cells, which the model sees as 0; broadcasts to `(clips, 1, n_mels, frames)`."""
        mean = self._of(self.mean, self.noisy_mean, noisy)
        if self.weight is None:
            return mean
        # A weight of 0 gives the same whatever the input is.
        offset = torch.where(self.weight == 0, 0, self.bias / self.weight).view(1, 1, -1, 1)
        return mean - offset * self._of(self.std, self.noisy_std, noisy)

    @staticmethod
    def _of(own: torch.Tensor, theirs: torch.Tensor | None, noisy: torch.Tensor | None) -> torch.Tensor:
        own = own.view(1, 1, -1, 1)
        if noisy is None or theirs is None:
            return own
        return torch.where(noisy.view(-1, 1, 1, 1), theirs.view(1, 1, -1, 1), own)


def _tensor(level: Level) -> torch.Tensor:
    return torch.as_tensor(level, dtype=torch.float32)


def statistics(store: ClipStore, *, bands: bool) -> tuple[Level, Level]:
    """Mean and standard deviation in dB over all frames of all clips: two numbers, or per mel band two arrays `(n_mels,)`.

    Numbers come from the cache's manifest. Bands need a pass over the log-mels, which costs about as much as an epoch's reading.
    """
    if not bands:
        return store.statistics()
    total, squares = torch.zeros(store.n_mels, dtype=torch.float64), torch.zeros(store.n_mels, dtype=torch.float64)
    for row, frames in enumerate(store.frames):
        for start in range(0, int(frames), BLOCK_FRAMES):
            block = np.empty((min(BLOCK_FRAMES, int(frames) - start), store.n_mels), np.float16)
            store.read(row, start, block, "floor")
            values = torch.from_numpy(block).double()
            total += values.sum(dim=0)
            squares += values.square().sum(dim=0)
    count = int(store.frames.sum())
    mean = total / count
    std = (squares / count - mean**2).clamp(min=LEAST_STD**2).sqrt()
    return mean.numpy(), std.numpy()

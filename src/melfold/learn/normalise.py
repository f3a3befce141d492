"""Input normalisation: one object that the model, masks, mixing and prediction share, saved with the weights."""

from __future__ import annotations

import torch
from torch import nn


class Normalisation(nn.Module):
    """`(log_mel - mean) / std` in dB.

    Mean and standard deviation are scalars, or one value per mel band, shape `(n_mels,)`. In training, noisy clips may have
    statistics of their own; those are not kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("noisy_mean", None)
        self.register_buffer("noisy_std", None)

    def set(self, mean: float, std: float) -> None:
        """Take statistics of clips, dB."""
        self.mean.fill_(mean)
        self.std.fill_(std)

    def set_noisy(self, mean: float, std: float) -> None:
        """Take the noisy clips' own statistics, dB, for training."""
        self.noisy_mean, self.noisy_std = torch.tensor(mean), torch.tensor(std)

    def forward(self, log_mels: torch.Tensor, noisy: torch.Tensor | None = None) -> torch.Tensor:
        """Args: log_mels: dB `(clips, 1, n_mels, frames)`. noisy: bool `(clips,)`, or None if all clips are curated."""
        return (log_mels - self._of(self.mean, self.noisy_mean, noisy)) / self._of(self.std, self.noisy_std, noisy)

    def fill(self, noisy: torch.Tensor | None = None) -> torch.Tensor:
        """The dB of masked cells, which the model sees as 0; broadcasts to `(clips, 1, n_mels, frames)`."""
        return self._of(self.mean, self.noisy_mean, noisy)

    @staticmethod
    def _of(own: torch.Tensor, theirs: torch.Tensor | None, noisy: torch.Tensor | None) -> torch.Tensor:
        own = own.view(1, 1, -1, 1)
        if noisy is None or theirs is None:
            return own
        return torch.where(noisy.view(-1, 1, 1, 1), theirs.view(1, 1, -1, 1), own)

"""Losses on logits `(clips, labels)` and targets of the same shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def loss_named(name: str) -> Loss:
    """The loss of a recipe: `(logits, targets) -> scalar`."""
    return {"bce": functional.binary_cross_entropy_with_logits}[name]

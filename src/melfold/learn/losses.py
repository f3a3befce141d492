"""Losses on logits `(clips, labels)` and targets of the same shape, which may be soft."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch.nn import functional

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def loss_named(name: str) -> Loss:
    """The loss of a recipe: `(logits, targets) -> scalar`."""
    from timm.loss import AsymmetricLossMultiLabel

    # Older versions of timm know nothing but the sum.
    summed = {"reduction": "sum"} if "reduction" in inspect.signature(AsymmetricLossMultiLabel).parameters else {}

    def asymmetric(negative: float, positive: float, clip: float) -> Loss:
        loss = AsymmetricLossMultiLabel(gamma_neg=negative, gamma_pos=positive, clip=clip, **summed)
        return lambda logits, targets: loss(logits, targets) / targets.numel()

    return {
        "bce": functional.binary_cross_entropy_with_logits,
        "focal": asymmetric(2, 2, 0),
        "asl": asymmetric(4, 1, 0.05),
        "lsep": lsep,
        "lsep_bce": lambda logits, targets: (
            lsep(logits, targets) + functional.binary_cross_entropy_with_logits(logits, targets) * targets.shape[1]
        ),
    }[name]


def lsep(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of every absent label's logit less every present one's: what lwlrap ranks by, made smooth.

    Li, Song and Luo, "Improving Pairwise Ranking for Multi-label Image Classification" (2017). A soft target is a pair's weight
    on either side. A clip in which all labels are present, or none, has no pair and counts as 0.
    """
    # Far below any logit, but finite: a gradient through an infinity would be no number.
    present = torch.where(targets > 0, torch.log(targets), -1e4)
    absent = torch.where(targets < 1, torch.log1p(-targets), -1e4)
    return functional.softplus(torch.logsumexp(logits + absent, dim=1) + torch.logsumexp(present - logits, dim=1)).mean()


def bootstrapped(targets: torch.Tensor, logits: torch.Tensor, noisy: torch.Tensor, share: float) -> torch.Tensor:
    """Targets in which noisy clips take a share from the model's own prediction; no gradient passes through it.

    Soft bootstrapping: Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping" (2015).
    """
    return torch.where(noisy[:, None], torch.lerp(targets, torch.sigmoid(logits.detach()), share), targets)

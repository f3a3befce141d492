"""Losses on logits `(clips, labels)` and targets of the same shape, which may be soft."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from melfold.errors import MelfoldError

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, the mean over clips and labels."""
    return functional.binary_cross_entropy_with_logits(logits, targets)


def asl(
    logits: torch.Tensor, targets: torch.Tensor, *, gamma_neg: float = 4, gamma_pos: float = 1, clip: float = 0.05
) -> torch.Tensor:
    """Asymmetric loss, the mean over clips and labels.

    Ridnik et al., "Asymmetric Loss For Multi-Label Classification" (2021), as in timm.
    """
    from timm.loss import AsymmetricLossMultiLabel

    # Older versions of timm know nothing but the sum.
    summed = {"reduction": "sum"} if "reduction" in inspect.signature(AsymmetricLossMultiLabel).parameters else {}
    loss = AsymmetricLossMultiLabel(gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip, **summed)
    return loss(logits, targets) / targets.numel()


def focal(logits: torch.Tensor, targets: torch.Tensor, *, gamma: float = 2) -> torch.Tensor:
    """Focal loss, the mean over clips and labels: Lin et al., "Focal Loss for Dense Object Detection" (2017)."""
    return asl(logits, targets, gamma_neg=gamma, gamma_pos=gamma, clip=0)


def lsep(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of each absent label's logit minus each present one's: a smooth form of what lwlrap ranks by.

    Li, Song and Luo, "Improving Pairwise Ranking for Multi-label Image Classification" (2017). A soft target is a pair's weight
    on either side. A clip in which all labels are present, or none, has no pair and counts as 0.
    """
    # Far below any logit, but finite: a gradient through an infinity would be NaN.
    present = torch.where(targets > 0, torch.log(targets), -1e4)
    absent = torch.where(targets < 1, torch.log1p(-targets), -1e4)
    return functional.softplus(torch.logsumexp(logits + absent, dim=1) + torch.logsumexp(present - logits, dim=1)).mean()


def lsep_bce(logits: torch.Tensor, targets: torch.Tensor, *, bce_weight: float = 1) -> torch.Tensor:
    """`lsep` plus the binary cross-entropy of a clip, summed over labels."""
    return lsep(logits, targets) + bce_weight * (bce(logits, targets) * targets.shape[1])


LOSSES: dict[str, Callable[..., torch.Tensor]] = {"bce": bce, "focal": focal, "asl": asl, "lsep": lsep, "lsep_bce": lsep_bce}
"""By the name in `train.loss`. Keyword arguments come from `train.loss_kwargs`."""


def loss_named(name: str, kwargs: Mapping[str, float] | None = None) -> Loss:
    """The loss of a recipe: `(logits, targets) -> scalar`. Raises: MelfoldError: an argument that the loss does not have."""
    loss = LOSSES[name]
    known = [p.name for p in inspect.signature(loss).parameters.values() if p.kind == p.KEYWORD_ONLY]
    if unknown := sorted(set(kwargs or {}) - set(known)):
        what, found = f"loss {name} has no argument {', '.join(unknown)}", f"it takes {', '.join(known) or 'none'}"
        raise MelfoldError(what, found, "Fix train.loss_kwargs")
    return functools.partial(loss, **(kwargs or {}))


def bootstrapped(targets: torch.Tensor, logits: torch.Tensor, noisy: torch.Tensor, share: float) -> torch.Tensor:
    """Targets in which noisy clips take a share from the model's own prediction; no gradient passes through it.

    Soft bootstrapping: Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping" (2015).
    """
    return torch.where(noisy[:, None], torch.lerp(targets, torch.sigmoid(logits.detach()), share), targets)

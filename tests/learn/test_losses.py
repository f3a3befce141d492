"""Losses by their names."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from melfold.config import TrainConfig
from melfold.errors import MelfoldError
from melfold.learn.losses import LOSSES, bootstrapped, loss_named, lsep

NAMES = get_args(TrainConfig.model_fields["loss"].annotation)


def sample(clips: int = 6, labels: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    return torch.tensor(rng.normal(0, 2, (clips, labels))), torch.tensor((rng.random((clips, labels)) < 0.4).astype(float))


def test_bce_is_the_mean_over_clips_and_labels() -> None:
    loss = loss_named("bce")(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
    assert float(loss) == pytest.approx((0.693147 + 2.126928) / 2, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["all present", "none present", "mixed", "soft"])
def test_every_loss_and_its_gradient_are_finite(name: str, kind: str) -> None:
    logits, targets = sample()
    targets = {"all present": targets * 0 + 1, "none present": targets * 0, "mixed": targets, "soft": targets * 0.8 + 0.1}[kind]
    logits = (50 * logits).float().requires_grad_()
    loss = loss_named(name)(logits, targets.float())
    loss.backward()
    assert loss.ndim == 0
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_lsep_is_the_logarithm_of_one_and_a_sum_over_pairs() -> None:
    logits, targets = sample()
    expected = []
    for scores, truth in zip(logits.tolist(), targets.tolist(), strict=True):
        both = list(zip(scores, truth, strict=True))
        pairs = [math.exp(absent - present) for absent, t in both if not t for present, u in both if u]
        expected.append(math.log(1 + sum(pairs)))
    assert float(lsep(logits, targets)) == pytest.approx(np.mean(expected), rel=1e-9)


def test_lsep_weighs_pairs_by_soft_targets() -> None:
    logits, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.75, 0.125]])
    pairs = sum(targets[0, i] * (1 - targets[0, j]) * math.exp(logits[0, j] - logits[0, i]) for i in (0, 1) for j in (0, 1))
    assert float(lsep(logits, targets)) == pytest.approx(math.log1p(float(pairs)), rel=1e-5)


def test_lsep_wants_present_labels_above_absent_ones() -> None:
    logits, targets = sample()
    logits.requires_grad_()
    lsep(logits, targets).backward()
    both = (targets.sum(1) > 0) & (targets.sum(1) < targets.shape[1])
    assert (logits.grad[both][targets[both] > 0] < 0).all()
    assert (logits.grad[both][targets[both] == 0] > 0).all()


@pytest.mark.parametrize(
    ("name", "kwargs", "negative", "positive", "clip"),
    [
        ("focal", {}, 2, 2, 0),
        ("focal", {"gamma": 1}, 1, 1, 0),
        ("focal", {"gamma": 3.5}, 3.5, 3.5, 0),
        ("asl", {}, 4, 1, 0.05),
        ("asl", {"gamma_neg": 2, "clip": 0.2}, 2, 1, 0.2),
    ],
)
def test_focal_and_asymmetric_loss_by_their_formula(
    name: str, kwargs: dict[str, float], negative: float, positive: float, clip: float
) -> None:
    logits, targets = (t.float() for t in sample())
    p = torch.sigmoid(logits)
    shifted = (p - clip).clamp(min=0)
    by_hand = -targets * (1 - p) ** positive * p.log() - (1 - targets) * shifted**negative * (1 - shifted).log()
    assert float(loss_named(name, kwargs)(logits, targets)) == pytest.approx(float(by_hand.mean()), rel=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"bce_weight": 0.5}, {"bce_weight": 0}])
def test_lsep_bce_is_their_sum_over_labels(kwargs: dict[str, float]) -> None:
    logits, targets = sample()
    expected = lsep(logits, targets) + kwargs.get("bce_weight", 1) * loss_named("bce")(logits, targets) * 5
    assert float(loss_named("lsep_bce", kwargs)(logits, targets)) == pytest.approx(float(expected))


def test_focal_without_gamma_is_bce() -> None:
    logits, targets = (t.float() for t in sample())
    assert float(loss_named("focal", {"gamma": 0})(logits, targets)) == pytest.approx(
        float(loss_named("bce")(logits, targets)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("focal", {"gama": 1.0}, "loss focal has no argument gama: it takes gamma. Fix train.loss_kwargs"),
        ("bce", {"gamma": 1.0}, "loss bce has no argument gamma: it takes none. Fix train.loss_kwargs"),
        (
            "asl",
            {"b": 1.0, "a": 1.0},
            "loss asl has no argument a, b: it takes gamma_neg, gamma_pos, clip. Fix train.loss_kwargs",
        ),
        ("lsep_bce", {"logits": 1.0}, "loss lsep_bce has no argument logits: it takes bce_weight. Fix train.loss_kwargs"),
    ],
)
def test_an_unknown_argument_is_one_line_that_names_the_known(name: str, kwargs: dict[str, float], said: str) -> None:
    with pytest.raises(MelfoldError) as caught:
        loss_named(name, kwargs)
    assert str(caught.value) == said


def test_every_name_a_recipe_may_have_is_in_the_table() -> None:
    assert set(NAMES) == set(LOSSES)


def test_bootstrapping_mixes_in_the_models_own_view_of_noisy_clips_alone() -> None:
    logits, targets = sample(2)
    logits.requires_grad_()
    mixed = bootstrapped(targets, logits, torch.tensor([False, True]), 0.3)
    torch.testing.assert_close(mixed[0], targets[0])
    torch.testing.assert_close(mixed[1], 0.7 * targets[1] + 0.3 * torch.sigmoid(logits[1].detach()))
    assert not mixed.requires_grad

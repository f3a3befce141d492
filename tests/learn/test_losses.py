"""Losses by their names."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from melfold.config import TrainConfig
from melfold.learn.losses import loss_named


def test_bce_is_the_mean_over_clips_and_labels() -> None:
    loss = loss_named("bce")(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
    assert float(loss) == pytest.approx((0.693147 + 2.126928) / 2, abs=1e-5)


@pytest.mark.parametrize("name", get_args(TrainConfig.model_fields["loss"].annotation) or ["bce"])
def test_every_name_a_recipe_may_hold_is_a_loss(name: str) -> None:
    assert loss_named(name)(torch.zeros(2, 3), torch.ones(2, 3)).ndim == 0

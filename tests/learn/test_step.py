"""One step of training: what the model is shown, and how its weights move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learn_world import TINY

from melfold.config import Recipe
from melfold.learn.devices import pick_device
from melfold.learn.state import TrainState
from melfold.learn.train import train_step
from melfold.recipes import load_recipe
from tests.bench.footprint import fake_batch, trained_model

LABELS, CURATED_DB, NOISY_DB = 5, -30.0, -70.0


def start(*sets: str) -> tuple[Recipe, TrainState]:
    recipe = load_recipe("demo", [*TINY, "augment.freq_masks=0", "augment.time_masks=0", *sets])
    torch.manual_seed(0)
    return recipe, TrainState(trained_model(recipe, LABELS), recipe.train, pick_device("cpu", "off"))


def shown(*sets: str) -> tuple[np.ndarray, np.ndarray]:
    """What the model is shown of a batch of constant clips, loud curated and soft noisy ones, and which are noisy."""
    recipe, state = start("train.clips=both", *sets)
    state.model.normalise.set(-40.0, 10.0)
    if recipe.noisy.own_norm:
        state.model.normalise.set_noisy(-60.0, 10.0)
    batch, targets = fake_batch(recipe, 16, LABELS)
    levels = np.where(batch.noisy, NOISY_DB, CURATED_DB).astype(np.float16)
    batch = replace(batch, log_mels=np.broadcast_to(levels[:, None, None], batch.log_mels.shape).copy())
    seen = []
    forward = state.forward
    state.forward = lambda log_mels, noisy: seen.append(log_mels) or forward(log_mels, noisy)
    train_step(state, batch, targets, recipe, np.random.default_rng(0))
    return seen[0].numpy(), batch.noisy


@pytest.mark.parametrize("how", ["augment.mixup=power", "augment.mixup=db", "augment.concat_prob=1"])
def test_curated_and_noisy_clips_are_never_mixed_where_they_are_treated_differently(how: str) -> None:
    seen, noisy = shown("augment.mixup_prob=1", "augment.mixup_alpha=10", how)
    assert seen[~noisy].min() >= CURATED_DB - 6
    assert seen[noisy].max() <= NOISY_DB + 10
    together, noisy = shown("augment.mixup_prob=1", "augment.mixup_alpha=10", how, "noisy.own_head=false", "noisy.own_norm=false")
    assert together[noisy].max() > NOISY_DB + 15


def test_masks_hold_the_mean_that_the_clip_is_normalised_by() -> None:
    seen, noisy = shown("augment.mixup_prob=0", "augment.freq_masks=2", "augment.time_masks=2")
    assert set(np.unique(seen[~noisy])) == {CURATED_DB, -40.0}
    assert set(np.unique(seen[noisy])) == {NOISY_DB, -60.0}


def moved(*sets: str, rate: float = 1.0, gradient: bool = True) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each trained parameter before and after a step."""
    recipe, state = start(*sets)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    batch, targets = fake_batch(recipe, 4, LABELS)
    state.set_phase(recipe.train, rate)
    if not gradient:
        state.loss_of = lambda logits, targets: 0 * logits.sum()
    train_step(state, batch, targets, recipe, None)
    return {name: (before[name], p.detach()) for name, p in state.model.named_parameters()}


def test_the_gradient_is_clipped() -> None:
    def length(clip: str) -> float:
        steps = moved("train.optimizer=momentum", "train.weight_decay=0", clip)
        return sum(float((new - old).square().sum()) for old, new in steps.values()) ** 0.5

    assert length("train.clip_grad=0") > 0.02
    assert length("train.clip_grad=0.01") == pytest.approx(0.01, rel=0.01)


def test_weights_decay_and_biases_do_not() -> None:
    steps = moved("train.weight_decay=0.5", rate=0.1, gradient=False)
    for name, (old, new) in steps.items():
        torch.testing.assert_close(new, old * 0.95 if old.ndim > 1 else old, msg=name)
    assert "head.bias" in steps


def test_layers_nearer_to_the_input_learn_slower() -> None:
    recipe, state = start("train.layer_decay=0.5")
    state.set_phase(recipe.train, 0.25)
    rates = sorted({group["lr"] for group in state.optimizer.param_groups})
    assert rates[-1] == state.lr == 0.25
    assert rates[0] < 0.25 / 8
    _, state = start()
    assert len({group["lr"] for group in state.optimizer.param_groups}) == 1


def test_the_moving_average_follows_fast_at_first() -> None:
    _, state = start("train.ema_decay=0.999")
    for step in range(8):
        with torch.no_grad():
            state.model.head.weight.fill_(float(step >= 3))
        state.update()
    assert 0.5 < float(state.averaged.head.weight.detach().mean()) < 1, "without a warm-up it would still be near 0"

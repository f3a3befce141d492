"""Augmentation: what is drawn is what is done."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from melfold.config import AugmentConfig
from melfold.learn.augment import AugmentDraw, apply_augment, draw_augment
from melfold.learn.devices import pick_device

CPU = pick_device("cpu", "off")
FILL = torch.tensor(-50.0)
ALL = {"mixup_prob": 0.5, "freq_masks": 2, "time_masks": 2, "gain_db": 3, "resize_prob": 0.5, "concat_prob": 0.5}


def batch(clips: int = 3, n_mels: int = 8, frames: int = 10, labels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    log_mels = -80 * torch.rand(clips, 1, n_mels, frames, generator=generator)
    return log_mels, torch.eye(clips, labels)


def test_power_mixup_of_two_equal_sounds_is_3_db_louder_and_has_both_labels() -> None:
    log_mels, targets = batch(1)
    log_mels, targets = log_mels.repeat(2, 1, 1, 1), torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 1]])
    draw = AugmentDraw(partner=np.array([1, 0]), partner_gain_db=np.zeros(2, np.float32))
    mixed, labels = apply_augment(draw, log_mels, targets, FILL, CPU)
    torch.testing.assert_close(mixed, log_mels + 10 * np.log10(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(labels, torch.tensor([[1.0, 1, 0, 1], [1, 1, 0, 1]]))


def test_power_mixup_adds_powers_at_the_drawn_gain() -> None:
    log_mels, targets = batch(2)
    draw = AugmentDraw(partner=np.array([1, 1]), partner_gain_db=np.array([-6, -np.inf], np.float32))
    mixed, labels = apply_augment(draw, log_mels, targets, FILL, CPU)
    power = 10 ** (log_mels[0] / 10) + 10 ** ((log_mels[1] - 6) / 10)
    torch.testing.assert_close(mixed[0], 10 * torch.log10(power), atol=1e-4, rtol=0)
    torch.testing.assert_close(mixed[1], log_mels[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(labels, torch.maximum(targets, targets[[1, 1]]))


def test_db_mixup_is_linear_in_values_and_labels() -> None:
    log_mels, targets = batch(3)
    weight = np.array([0.75, 1, 0.5], np.float32)
    partner = np.array([2, 1, 0])
    mixed, labels = apply_augment(AugmentDraw(partner=partner, weight=weight), log_mels, targets, FILL, CPU)
    for i, w in enumerate(weight):
        torch.testing.assert_close(mixed[i], w * log_mels[i] + (1 - w) * log_mels[partner[i]])
        torch.testing.assert_close(labels[i], w * targets[i] + (1 - w) * targets[partner[i]])


def test_masks_set_exactly_the_drawn_cells() -> None:
    log_mels, targets = batch(2)
    freq = np.array([[[0, 2], [5, 6]], [[3, 3], [7, 8]]])
    time = np.array([[[4, 4]], [[0, 3]]])
    masked, labels = apply_augment(AugmentDraw(freq_masks=freq, time_masks=time), log_mels, targets, FILL, CPU)
    expected = log_mels.clone()
    for clip in range(2):
        for begin, end in freq[clip]:
            expected[clip, 0, begin:end] = FILL
        for begin, end in time[clip]:
            expected[clip, 0, :, begin:end] = FILL
    assert torch.equal(masked, expected)
    assert (masked == FILL).any()
    assert torch.equal(labels, targets)


def test_gain_moves_every_cell_of_a_clip() -> None:
    log_mels, targets = batch(2)
    louder, _ = apply_augment(AugmentDraw(gain_db=np.array([2.5, -4], np.float32)), log_mels, targets, FILL, CPU)
    torch.testing.assert_close(louder, log_mels + torch.tensor([2.5, -4]).view(2, 1, 1, 1))


def test_nothing_configured_is_the_identity_and_draws_nothing() -> None:
    log_mels, targets = batch()
    rng = np.random.default_rng(0)
    draw = draw_augment(AugmentConfig(), 3, 8, 10, rng)
    assert all(getattr(draw, field.name) is None for field in fields(draw))
    assert rng.random() == np.random.default_rng(0).random()
    same, labels = apply_augment(draw, log_mels, targets, FILL, CPU)
    assert torch.equal(same, log_mels)
    assert torch.equal(labels, targets)


@pytest.mark.parametrize("mixup", ["db", "power"])
def test_the_generator_decides_the_draw(mixup: str) -> None:
    config = AugmentConfig(mixup=mixup, **ALL)

    def draw(seed: int) -> AugmentDraw:
        return draw_augment(config, 16, 32, 64, np.random.default_rng(seed))

    for field in fields(AugmentDraw):
        np.testing.assert_array_equal(getattr(draw(1), field.name), getattr(draw(1), field.name))
    assert not np.array_equal(draw(1).time_masks, draw(2).time_masks)


@pytest.mark.parametrize("mixup", ["db", "power"])
def test_a_mixed_clip_never_meets_itself_and_an_unmixed_one_stays(mixup: str) -> None:
    clips = 1000
    draw = draw_augment(AugmentConfig(mixup=mixup, mixup_prob=0.4), clips, 8, 8, np.random.default_rng(0))
    mixed = draw.weight < 1 if mixup == "db" else np.isfinite(draw.partner_gain_db)
    other = draw.partner != np.arange(clips)
    np.testing.assert_array_equal(other[mixed], True)
    np.testing.assert_array_equal(other[~mixed], False)
    assert mixed.mean() == pytest.approx(0.4, abs=0.05)
    if mixup == "db":
        assert draw.weight.min() >= 0.5  # a clip is never the lesser part of its own mixture
    else:
        assert np.abs(draw.partner_gain_db[mixed]).max() <= AugmentConfig().mixup_gain_db


def test_a_lone_clip_is_not_mixed() -> None:
    assert draw_augment(AugmentConfig(mixup_prob=1), 1, 8, 8, np.random.default_rng(0)).partner is None


def test_draws_stay_within_their_bounds() -> None:
    config = AugmentConfig(freq_masks=3, freq_mask_width=0.25, time_masks=2, time_mask_width=0.1, gain_db=3)
    draw = draw_augment(config, 500, 32, 100, np.random.default_rng(0))
    for masks, shape, size, widest in ((draw.freq_masks, (500, 3, 2), 32, 8), (draw.time_masks, (500, 2, 2), 100, 10)):
        assert masks.shape == shape
        widths = masks[..., 1] - masks[..., 0]
        assert (widths.min(), widths.max()) == (0, widest)
        assert masks.min() == 0
        assert masks.max() == size
    assert np.abs(draw.gain_db).max() <= 3
    assert np.abs(draw.gain_db).max() > 2.9


def test_inputs_are_left_as_they_were() -> None:
    log_mels, targets = batch(4)
    before = log_mels.clone(), targets.clone()
    apply_augment(draw_augment(AugmentConfig(**ALL), 4, 8, 10, np.random.default_rng(0)), log_mels, targets, FILL, CPU)
    assert torch.equal(log_mels, before[0])
    assert torch.equal(targets, before[1])


def test_a_joined_clip_begins_as_itself_and_ends_as_the_other() -> None:
    log_mels, targets = batch(3, frames=100)
    draw = AugmentDraw(end=np.array([1, 1, 0]), steepness=np.full(3, 12, np.float32))
    joined, labels = apply_augment(draw, log_mels, targets, FILL, CPU)
    torch.testing.assert_close(joined[0, ..., :10], log_mels[0, ..., :10], atol=0.01, rtol=0)
    torch.testing.assert_close(joined[0, ..., -10:], log_mels[1, ..., -10:], atol=0.01, rtol=0)
    share = 1 / (1 + np.exp(-12 * np.linspace(-1, 1, 100)))
    expected = log_mels[2] * (1 - share) + log_mels[0] * share
    torch.testing.assert_close(joined[2], expected.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(joined[1], log_mels[1])  # with itself
    torch.testing.assert_close(labels, torch.maximum(targets, targets[[1, 1, 0]]))


def test_a_stretched_window_keeps_what_it_shows() -> None:
    mels, frames = 16, 40
    ramp = (torch.arange(mels).float()[:, None] + 100 * torch.arange(frames).float()).expand(2, 1, mels, frames)
    boxes = np.array([[0.25, 0.5, 0.5, 0.25], [0, 1, 0, 1]], np.float32)
    stretched, _ = apply_augment(AugmentDraw(boxes=boxes), ramp, torch.eye(2), FILL, CPU)
    assert torch.equal(stretched[1], ramp[1])  # the whole window: to the bit
    # Centres of cells: row i of the output is at 4 + (i + .5) / 2 - .5 of the input, column j at 20 + (j + .5) / 4 - .5.
    rows = 4 + (np.arange(mels) + 0.5) / 2 - 0.5
    columns = 20 + (np.arange(frames) + 0.5) / 4 - 0.5
    torch.testing.assert_close(stretched[0, 0], torch.tensor(rows[:, None] + 100 * columns).float(), atol=0.01, rtol=0)


def test_windows_are_as_large_as_asked_and_inside() -> None:
    config = AugmentConfig(resize_prob=0.5, resize_scale=0.6)
    boxes = draw_augment(config, 4000, 64, 100, np.random.default_rng(0)).boxes
    assert boxes is not None
    stretched = (boxes[:, [1, 3]] < 1).any(axis=1)
    assert stretched.mean() == pytest.approx(0.5, abs=0.03)
    assert boxes[stretched][:, [1, 3]].min() >= 0.6
    assert (boxes[:, [0, 2]] >= 0).all()
    assert (boxes[:, [0, 2]] + boxes[:, [1, 3]] <= 1 + 1e-6).all()


@pytest.mark.parametrize("sets", [{"mixup_prob": 1}, {"mixup_prob": 1, "mixup": "db"}, {"concat_prob": 1}])
def test_clips_of_two_groups_are_never_mixed(sets: dict) -> None:
    groups = np.array([True, False, False, True, False])
    for seed in range(20):
        draw = draw_augment(AugmentConfig(**sets), 5, 8, 10, np.random.default_rng(seed), groups)
        other = draw.end if draw.partner is None else draw.partner
        assert (groups[other] == groups).all()
        assert (other != np.arange(5)).all()


def test_a_clip_alone_in_its_group_stays_as_it_is() -> None:
    log_mels, targets = batch(3)
    groups = np.array([True, False, False])
    draw = draw_augment(AugmentConfig(mixup_prob=1, concat_prob=1), 3, 8, 10, np.random.default_rng(0), groups)
    mixed, labels = apply_augment(draw, log_mels, targets, FILL, CPU)
    torch.testing.assert_close(mixed[0], log_mels[0])
    torch.testing.assert_close(labels[0], targets[0])
    assert not torch.allclose(mixed[1], log_mels[1])

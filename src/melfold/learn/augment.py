"""Batch augmentation on the device: parameters are drawn with a NumPy generator, then applied to a whole batch.

Drawn on the CPU, the parameters are the same on every device. Log-mels are dB `(clips, 1, n_mels, frames)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from melfold.config import AugmentConfig
from melfold.learn.devices import Device

_DB_TO_NEPER = math.log(10) / 10


@dataclass(frozen=True)
class AugmentDraw:
    """The random parameters of a batch; one entry a clip. Fields that are None are not applied."""

    gain_db: np.ndarray | None = None
    """`(clips,)`"""
    partner: np.ndarray | None = None
    """`(clips,)` the clip that is mixed in, or the clip itself where nothing is."""
    weight: np.ndarray | None = None
    """`(clips,)` `db` mixup: the share of the clip itself."""
    partner_gain_db: np.ndarray | None = None
    """`(clips,)` `power` mixup: how much louder the partner is; -inf where nothing is mixed in."""
    freq_masks: np.ndarray | None = None
    """`(clips, masks, 2)` begin and end, in mels."""
    time_masks: np.ndarray | None = None
    """`(clips, masks, 2)` begin and end, in frames."""
    boxes: np.ndarray | None = None
    """`(clips, 4)` first mel, mels, first frame, frames of the window that is stretched to the whole, in fractions."""
    end: np.ndarray | None = None
    """`(clips,)` the clip whose end is joined on, or the clip itself."""
    steepness: np.ndarray | None = None
    """`(clips,)` how sharply the one passes into the other: the sigmoid runs from `-steepness` to `steepness`."""


CONCAT_STEEPNESS = (3.0, 12.0)
"""As in the winner's code."""


def draw_augment(
    config: AugmentConfig, clips: int, n_mels: int, frames: int, rng: np.random.Generator, groups: np.ndarray | None = None
) -> AugmentDraw:
    """Draw a batch's parameters.

    Args:
        groups: `(clips,)`; only clips of one group are mixed with each other. None: all are one.
    """
    draw: dict[str, np.ndarray] = {}
    groups = np.zeros(clips, bool) if groups is None else groups
    if config.gain_db:
        draw["gain_db"] = rng.uniform(-config.gain_db, config.gain_db, clips).astype(np.float32)
    if config.resize_prob:
        sizes = rng.uniform(config.resize_scale, 1, (clips, 2))
        sizes[rng.random(clips) >= config.resize_prob] = 1
        firsts = rng.random((clips, 2)) * (1 - sizes)
        draw["boxes"] = np.stack([firsts, sizes], axis=-1).reshape(clips, 4).astype(np.float32)
    if config.concat_prob and clips > 1:
        joined = rng.random(clips) < config.concat_prob
        draw["end"] = np.where(joined, _draw_partners(groups, rng), np.arange(clips))
        draw["steepness"] = rng.uniform(*CONCAT_STEEPNESS, clips).astype(np.float32)
    if config.mixup_prob and clips > 1:
        partner = _draw_partners(groups, rng)
        mixed = (rng.random(clips) < config.mixup_prob) & (partner != np.arange(clips))
        draw["partner"] = np.where(mixed, partner, np.arange(clips))
        if config.mixup == "db":
            share = rng.beta(config.mixup_alpha, config.mixup_alpha, clips)
            draw["weight"] = np.where(mixed, np.maximum(share, 1 - share), 1).astype(np.float32)
        else:
            level = rng.uniform(-config.mixup_gain_db, config.mixup_gain_db, clips)
            draw["partner_gain_db"] = np.where(mixed, level, -np.inf).astype(np.float32)
    if config.freq_masks:
        draw["freq_masks"] = _draw_masks((clips, config.freq_masks), config.freq_mask_width, n_mels, rng)
    if config.time_masks:
        draw["time_masks"] = _draw_masks((clips, config.time_masks), config.time_mask_width, frames, rng)
    return AugmentDraw(**draw)


def _draw_partners(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each clip another one of its group, never itself unless it is alone there."""
    partner = np.arange(len(groups))
    for group in np.unique(groups):
        (own,) = np.nonzero(groups == group)
        if len(own) > 1:
            partner[own] = own[(np.arange(len(own)) + rng.integers(1, len(own), len(own))) % len(own)]
    return partner


def _draw_masks(shape: tuple[int, int], width: float, size: int, rng: np.random.Generator) -> np.ndarray:
    widths = rng.integers(0, int(width * size) + 1, shape)
    begins = rng.integers(0, size - widths + 1)
    return np.stack([begins, begins + widths], axis=-1)


def apply_augment(
    draw: AugmentDraw, log_mels: torch.Tensor, targets: torch.Tensor, fill: torch.Tensor, device: Device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply what was drawn.

    Args:
        log_mels: float32 dB `(clips, 1, n_mels, frames)`.
        targets: `(clips, labels)` in 0..1.
        fill: the dB of masked cells, which broadcasts to the log-mels.

    Returns:
        New tensors of the same shapes.

    Sources: mixup, Zhang et al. (2018); superposition of powers with OR-ed labels, as "between-class" mixing in FAT2019's
    solutions; SpecAugment, Park et al. (2019); joining by a sigmoid in time and the stretched window, from the code of FAT2019's
    winner (R. Romulo, argus-freesound).
    """

    def column(values: np.ndarray) -> torch.Tensor:
        return device.tensor(values).view(-1, 1, 1, 1)

    if draw.boxes is not None:
        log_mels = _stretch(log_mels, draw.boxes, device)
    if draw.end is not None and draw.steepness is not None:
        at = torch.linspace(-1, 1, log_mels.shape[3], device=log_mels.device)
        end = device.tensor(draw.end)
        # Where a clip is joined to itself, nothing changes.
        log_mels = torch.lerp(log_mels, log_mels[end], torch.sigmoid(column(draw.steepness) * at))
        targets = torch.maximum(targets, targets[end])
    if draw.gain_db is not None:
        log_mels = log_mels + column(draw.gain_db)
    if draw.partner is not None:
        partner = device.tensor(draw.partner)
        other, other_targets = log_mels[partner], targets[partner]
        if draw.weight is not None:
            weight = column(draw.weight)
            log_mels = torch.lerp(other, log_mels, weight)
            targets = torch.lerp(other_targets, targets, weight.view(-1, 1))
        if draw.partner_gain_db is not None:
            louder = (other + column(draw.partner_gain_db)) * _DB_TO_NEPER
            log_mels = torch.logaddexp(log_mels * _DB_TO_NEPER, louder) / _DB_TO_NEPER
            targets = torch.maximum(targets, other_targets)
    for masks, shape in ((draw.freq_masks, (1, -1, 1)), (draw.time_masks, (1, 1, -1))):
        if masks is not None:
            at = np.arange(log_mels.shape[1 + shape.index(-1)])
            hidden = ((at >= masks[..., :1]) & (at < masks[..., 1:])).any(axis=1)
            log_mels = torch.where(device.tensor(hidden).view(len(masks), *shape), fill, log_mels)
    return log_mels, targets


def _stretch(log_mels: torch.Tensor, boxes: np.ndarray, device: Device) -> torch.Tensor:
    """Each clip's window, stretched to the whole by bilinear interpolation; whole windows stay as they are, to the bit."""
    chosen = np.flatnonzero((boxes[:, 1] < 1) | (boxes[:, 3] < 1))
    if not len(chosen):
        return log_mels
    mel, mels, frame, frames = boxes[chosen].T
    # An affine map of output to input coordinates, both from -1 to 1: scale and offset for each axis, time first.
    theta = np.zeros((len(chosen), 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 0, 2] = frames, 2 * frame + frames - 1
    theta[:, 1, 1], theta[:, 1, 2] = mels, 2 * mel + mels - 1
    rows = device.tensor(chosen)
    part = log_mels[rows]
    grid = torch.nn.functional.affine_grid(device.tensor(theta), list(part.shape), align_corners=False)
    stretched = torch.nn.functional.grid_sample(part, grid, padding_mode="border", align_corners=False)
    return log_mels.index_copy(0, rows, stretched)

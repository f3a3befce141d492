"""Normalisation per mel band: statistics of clips or of the weights; masks, noisy clips and prediction agree with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from learn_world import World
from safetensors.torch import load_file

from melfold.config import AugmentConfig
from melfold.data.arrays import npy_path
from melfold.data.clips import ClipStore
from melfold.learn.augment import apply_augment, draw_augment
from melfold.learn.devices import pick_device
from melfold.learn.fold_data import FoldData
from melfold.learn.model import build_model
from melfold.learn.normalise import LEAST_STD, Normalisation, statistics
from melfold.learn.train import load_fold, train_fold
from melfold.learn.weights import save_weights

N_MELS = 6


def log_mels(clips: int = 3) -> torch.Tensor:
    return -80 * torch.rand(clips, 1, N_MELS, 5, generator=torch.Generator().manual_seed(0))


def bands(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, N_MELS)


def per_band() -> Normalisation:
    normalise = Normalisation(N_MELS)
    normalise.set(bands(-60, -20), bands(5, 20))
    return normalise


def affine() -> Normalisation:
    normalise = Normalisation(N_MELS, affine=True)
    normalise.set(bands(-60, -20), bands(5, 20))
    normalise.weight.copy_(torch.tensor([0.5, 1, 2, -1, 0, 3]))
    normalise.bias.copy_(torch.tensor([1, -1, 0, 2, 0.5, -2]))
    return normalise


def test_each_band_has_its_own_mean_and_deviation() -> None:
    expected = (log_mels() - torch.from_numpy(bands(-60, -20)).view(1, 1, -1, 1)) / torch.from_numpy(bands(5, 20)).view(
        1, 1, -1, 1
    )
    torch.testing.assert_close(per_band()(log_mels()), expected.float())


@pytest.mark.parametrize("make", [per_band, affine])
def test_masked_cells_are_seen_as_0_whoever_the_clip_is(make: type) -> None:
    normalise = make()
    normalise.set_noisy(bands(-70, -10), bands(9, 3))
    noisy = torch.tensor([False, True, False])
    steady = normalise.weight == 0 if normalise.weight is not None else torch.zeros(N_MELS, dtype=bool)
    for groups in (None, noisy):
        seen = normalise(normalise.fill(groups).expand(3, 1, N_MELS, 5), groups)
        torch.testing.assert_close(seen[:, :, ~steady], torch.zeros(3, 1, int((~steady).sum()), 5), atol=2e-6, rtol=0)


def test_noisy_clips_take_their_own_statistics_and_the_same_weight_and_bias() -> None:
    normalise = affine()
    normalise.set_noisy(bands(-70, -10), bands(9, 3))
    noisy = torch.tensor([False, True, False])
    found = normalise(log_mels(), noisy)
    torch.testing.assert_close(found[[0, 2]], affine()(log_mels())[[0, 2]])
    own = affine()
    own.set(bands(-70, -10), bands(9, 3))
    torch.testing.assert_close(found[1], own(log_mels())[1])


def test_masks_are_filled_band_by_band() -> None:
    config = AugmentConfig(time_masks=1, time_mask_width=1.0)
    draw = draw_augment(config, 3, N_MELS, 5, np.random.default_rng(1))
    normalise = per_band()
    out, _ = apply_augment(draw, log_mels(), torch.zeros(3, 2), normalise.fill(), pick_device("cpu", "off"))
    changed = out != log_mels()
    assert changed.any()
    torch.testing.assert_close(normalise(out)[changed], torch.zeros(int(changed.sum())))


def test_statistics_of_bands_are_over_all_frames_of_all_clips(world: World) -> None:
    store = world.store(list(world.competition.curated.index[:9]))
    arrays = [np.load(npy_path(world.cache, f)).astype(np.float64) for f in store.fnames]
    whole = np.concatenate(arrays)
    mean, std = statistics(store, bands=True)
    np.testing.assert_allclose(mean, whole.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(std, np.maximum(whole.std(axis=0), LEAST_STD), rtol=1e-6)
    assert statistics(store, bands=False) == store.statistics()


def test_long_clips_are_read_in_parts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store = world.store(list(world.competition.curated.index[:3]))
    whole = statistics(store, bands=True)
    monkeypatch.setattr("melfold.learn.normalise.BLOCK_FRAMES", 7)
    np.testing.assert_allclose(statistics(store, bands=True), whole, rtol=1e-9)


def test_a_band_that_hardly_varies_is_not_blown_up(tmp_path: Path) -> None:
    class Flat(ClipStore):
        def __init__(self) -> None:
            self.frames, self.n_mels = np.array([10]), 2

        def read(self, row: int, start: int, out: np.ndarray, pad: str) -> None:
            out[:] = [[-100, -40]]
            out[::2, 1] = -20

    mean, std = statistics(Flat(), bands=True)
    assert mean.tolist() == [-100, -30]
    assert std.tolist() == [LEAST_STD, 10]


@pytest.mark.parametrize("own_norm", [False, True])
def test_a_fold_takes_the_statistics_of_its_training_clips(own_norm: bool, world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path, 'model.normalise="band"', "train.clips=both", f"noisy.own_norm={str(own_norm).lower()}")
    data = FoldData(run, "0", world.cache)
    own, noisy = data.statistics()
    np.testing.assert_array_equal(own, statistics(world.store(run.trained_on(0)), bands=True))
    assert (noisy is not None) == own_norm
    if noisy:
        np.testing.assert_array_equal(noisy, statistics(world.store(list(run.noisy.index)), bands=True))


def test_a_fold_keeps_its_bands_with_its_weights(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path, 'model.normalise="band"', "train.clips=both", "augment.freq_masks=1")
    folder = train_fold(run, 0, world.cache, world.device)
    kept = load_file(folder.weights)
    mean, std = statistics(world.store(run.trained_on(0)), bands=True)
    np.testing.assert_allclose(kept["normalise.mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(kept["normalise.std"], std, rtol=1e-6)
    assert not [key for key in kept if "noisy" in key]
    torch.testing.assert_close(load_fold(run, "0", world.device).normalise.mean, kept["normalise.mean"])


def test_a_fold_keeps_the_norm_of_the_weights_it_started_from(world: World, tmp_path: Path) -> None:
    n_mels = world.recipe().logmel.n_mels
    start = build_model(world.recipe().model, 3, n_mels, 32).backbone.state_dict()
    norm = {"weight": 1.1, "bias": 0.2, "running_mean": -30.0, "running_var": 99.0}
    norms = {f"bn0.{key}": torch.linspace(value, value + 1, n_mels) for key, value in norm.items()}
    save_weights(file := tmp_path / "w.safetensors", start | norms)
    sets = (f"model.weights=file:{file}", 'model.normalise="checkpoint"', 'model.axes="mel_time"')
    run = world.start(tmp_path, *sets, "train.clips=both")
    kept = load_file(train_fold(run, 0, world.cache, world.device).weights)
    torch.testing.assert_close(kept["normalise.mean"], torch.linspace(-30, -29, n_mels))
    torch.testing.assert_close(kept["normalise.std"], (torch.linspace(99, 100, n_mels) + 1e-5).sqrt())
    torch.testing.assert_close(kept["normalise.weight"], torch.linspace(1.1, 2.1, n_mels))
    file.unlink()
    assert load_fold(run, "0", world.device).normalise.bias is not None

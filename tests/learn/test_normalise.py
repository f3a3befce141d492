"""Input normalisation: of all clips, of noisy ones, and what masks are filled with."""

from __future__ import annotations

import pytest
import torch

from melfold.learn.normalise import Normalisation


def log_mels(clips: int = 3) -> torch.Tensor:
    return -80 * torch.rand(clips, 1, 4, 5, generator=torch.Generator().manual_seed(0))


def made(mean: float = -40, std: float = 20) -> Normalisation:
    normalise = Normalisation()
    normalise.set(mean, std)
    return normalise


def test_a_new_one_changes_nothing() -> None:
    assert torch.equal(Normalisation()(log_mels()), log_mels())


def test_values_become_distances_from_the_mean_in_standard_deviations() -> None:
    torch.testing.assert_close(made()(log_mels()), (log_mels() + 40) / 20)
    torch.testing.assert_close(made()(log_mels(), torch.tensor([True, False, True])), (log_mels() + 40) / 20)


def test_one_value_for_each_mel_band_is_taken_along_the_bands() -> None:
    normalise = Normalisation()
    normalise.mean, normalise.std = torch.tensor([-10.0, -20, -30, -40]), torch.tensor([1.0, 2, 4, 8])
    expected = (log_mels() - normalise.mean.view(1, 1, 4, 1)) / normalise.std.view(1, 1, 4, 1)
    torch.testing.assert_close(normalise(log_mels()), expected)
    torch.testing.assert_close(normalise(normalise.fill().expand(3, 1, 4, 5)), torch.zeros(3, 1, 4, 5))


def test_noisy_clips_take_their_own_statistics_if_there_are_any() -> None:
    normalise = made()
    normalise.set_noisy(-60, 5)
    noisy = torch.tensor([False, True, False])
    found = normalise(log_mels(), noisy)
    torch.testing.assert_close(found[[0, 2]], (log_mels()[[0, 2]] + 40) / 20)
    torch.testing.assert_close(found[1], (log_mels()[1] + 60) / 5)
    torch.testing.assert_close(normalise(log_mels()), (log_mels() + 40) / 20)


@pytest.mark.parametrize("own", [False, True])
def test_what_masks_are_filled_with_is_seen_as_0(own: bool) -> None:
    normalise = made()
    if own:
        normalise.set_noisy(-60, 5)
    noisy = torch.tensor([False, True, False])
    for groups in (None, noisy):
        filled = normalise.fill(groups).expand(3, 1, 4, 5)
        assert torch.equal(normalise(filled, groups), torch.zeros(3, 1, 4, 5))
    assert normalise.fill(noisy).expand(3, 1, 1, 1).flatten().tolist() == [-40, -60 if own else -40, -40]


def test_the_statistics_are_part_of_the_weights() -> None:
    other = Normalisation()
    other.load_state_dict(made(-33, 11).state_dict())
    assert (float(other.mean), float(other.std)) == (-33, 11)

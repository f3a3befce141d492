"""Crops and windows from the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from melfold.compute import Compute
from melfold.config import LogMelConfig
from melfold.data.arrays import npy_path
from melfold.data.cache import build_cache
from melfold.data.clips import ClipStore, Pad, tile, window_starts
from melfold.data.competition import load_competition
from melfold.errors import MelfoldError
from melfold.files import Home
from tests.conftest import write_wav

Maker = Callable[..., Path]
CONFIG = LogMelConfig(sr=16_000, n_fft=512, hop_length=160, n_mels=16, fmax=8_000, top_db=60)
PADS: tuple[Pad, ...] = ("wrap", "floor")


@pytest.fixture
def folder(tiny_download: Maker, tmp_path: Path) -> Path:
    """A cache of 10 curated clips, 16 to 46 frames long; the fourth is silent."""
    root = tiny_download(curated=10)
    write_wav(root / "train_curated" / "c0003.wav", np.zeros(3_000))
    return build_cache(load_competition(root), CONFIG, Home(tmp_path / "home"), compute=Compute(jobs=1))


@pytest.fixture
def store(folder: Path) -> ClipStore:
    return ClipStore(folder, [f"c{i:04d}.wav" for i in range(10)], CONFIG.n_mels, CONFIG.top_db)


@pytest.fixture
def arrays(folder: Path) -> list[np.ndarray]:
    """The same clips, as the cache holds them."""
    return [np.load(npy_path(folder, f"c{i:04d}.wav")) for i in range(10)]


def read(store: ClipStore, row: int, start: int, length: int, pad: Pad) -> np.ndarray:
    out = np.full((length, store.n_mels), np.nan, np.float16)
    store.read(row, start, out, pad)
    return out


@pytest.mark.parametrize("pad", PADS)
def test_a_crop_within_a_clip_is_a_slice_of_its_array(store: ClipStore, arrays: list[np.ndarray], pad: Pad) -> None:
    for row, array in enumerate(arrays):
        assert store.frames[row] == len(array)
        for start, length in ((0, len(array)), (0, 1), (3, 7), (len(array) - 1, 1), (len(array) - 5, 5)):
            np.testing.assert_array_equal(read(store, row, start, length, pad), array[start : start + length])


def test_wrapping_repeats_the_clip(store: ClipStore, arrays: list[np.ndarray]) -> None:
    array = arrays[1]
    frames = len(array)
    np.testing.assert_array_equal(read(store, 1, 0, 3 * frames, "wrap"), np.tile(array, (3, 1)))
    np.testing.assert_array_equal(read(store, 1, 5, 2 * frames, "wrap"), np.roll(np.tile(array, (2, 1)), -5, axis=0))
    np.testing.assert_array_equal(read(store, 1, frames - 2, 4, "wrap"), np.concatenate([array[-2:], array[:2]]))


def test_a_floor_lies_around_the_clip_at_its_own_silence(store: ClipStore, arrays: list[np.ndarray]) -> None:
    array = arrays[1]
    crop = read(store, 1, -4, len(array) + 9, "floor")
    np.testing.assert_array_equal(crop[4:-5], array)
    floor = array.astype(np.float32).max() - CONFIG.top_db
    np.testing.assert_allclose(np.concatenate([crop[:4], crop[-5:]]).astype(np.float32), floor, atol=0.05)
    np.testing.assert_array_equal(read(store, 1, -8, 12, "floor")[8:], array[:4])
    assert (read(store, 3, -4, 60, "floor") == -100).all(), "a silent clip's floor is its own -100 dB, not lower"


@pytest.mark.parametrize(
    ("length", "pad"),
    [(5, "wrap"), (30, "wrap"), (80, "wrap"), (5, "floor"), (80, "floor")],
)
def test_a_tile_of_an_array_in_memory_is_the_first_evaluation_window(
    store: ClipStore, arrays: list[np.ndarray], length: int, pad: Pad
) -> None:
    for row, array in enumerate(arrays):
        (start, *_) = window_starts(len(array), length, 0.0, 0, pad)
        np.testing.assert_array_equal(tile(array, length, pad, CONFIG.top_db), read(store, row, start, length, pad))


def test_statistics_are_those_of_all_frames(store: ClipStore, arrays: list[np.ndarray]) -> None:
    values = np.concatenate(arrays).astype(np.float64)
    assert store.statistics() == pytest.approx((values.mean(), values.std()), rel=1e-6)


def test_clips_that_are_not_cached_are_refused(folder: Path) -> None:
    with pytest.raises(MelfoldError, match=r"2 clips are not in the cache: x\.wav. Run `melfold cache`"):
        ClipStore(folder, ["c0000.wav", "x.wav", "y.wav"], CONFIG.n_mels, CONFIG.top_db)


def test_an_array_cut_short_is_refused_and_not_read_as_something_else(store: ClipStore, folder: Path) -> None:
    path = npy_path(folder, "c0001.wav")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MelfoldError, match="a cached log-mel is damaged"):
        read(store, 1, 0, int(store.frames[1]), "wrap")


@given(st.integers(1, 400), st.integers(1, 120), st.floats(0, 0.95), st.sampled_from(PADS))
def test_windows_cover_the_whole_clip(frames: int, length: int, overlap: float, pad: Pad) -> None:
    starts = window_starts(frames, length, overlap, 0, pad)
    covered = np.zeros(frames, bool)
    for start in starts:
        covered[max(start, 0) : start + length] = True
    assert covered[: length if frames == length + 1 else frames].all()
    assert len(starts) == len(set(starts))
    if frames > length + 1:
        assert (starts[0], starts[-1]) == (0, frames - length)
        assert max(np.diff(starts), default=0) <= max(1, round(length * (1 - overlap)))
    else:
        assert len(starts) == 1


@pytest.mark.parametrize("pad", PADS)
def test_a_clip_of_just_a_crops_time_is_one_window(pad: Pad) -> None:
    samples, hop, crop = 5 * 44_100, 441, 500
    assert window_starts(samples // hop + 1, crop, 0.5, 0, pad) == [0]
    assert len(window_starts(samples // hop + 3, crop, 0.5, 0, pad)) == 2


@given(st.integers(1, 400), st.integers(1, 120), st.floats(0, 0.95), st.integers(-150, 150), st.sampled_from(PADS))
def test_shifted_windows_stay_on_the_clip(frames: int, length: int, overlap: float, shift: int, pad: Pad) -> None:
    starts = window_starts(frames, length, overlap, shift, pad)
    assert starts
    assert starts == sorted(set(starts))
    for start in starts:
        if frames > length + 1:
            assert 0 <= start <= frames - length
            assert {starts[0], starts[-1]} == {0, frames - length}, "no shift leaves out the start or the end"
        elif pad == "wrap":
            assert 0 <= start < frames
        else:
            assert min(frames - length, 0) <= start <= 0


@pytest.mark.parametrize("pad", PADS)
def test_a_positive_shift_moves_windows_to_later_frames(pad: Pad) -> None:
    assert window_starts(100, 20, 0.5, 0, pad)[:3] == [0, 10, 20]
    assert window_starts(100, 20, 0.5, 3, pad)[:3] == [0, 3, 13], "no shift leaves out the start"
    assert window_starts(100, 20, 0.5, -3, pad)[:3] == [0, 7, 17]
    assert window_starts(10, 16, 0.5, 2, pad) == [2 if pad == "wrap" else -1]

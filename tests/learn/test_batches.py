"""Batches of training crops and evaluation windows, and reading ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from melfold.compute import Compute
from melfold.config import LogMelConfig, TrainConfig, View
from melfold.data.arrays import npy_path
from melfold.data.cache import build_cache
from melfold.data.clips import ClipStore, Pad, window_starts
from melfold.data.competition import load_competition
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.learn.batches import draw_start, prefetch, train_batches, window_batches
from melfold.learn.phases import Phase

Maker = Callable[..., Path]
CONFIG = LogMelConfig(sr=16_000, n_fft=512, hop_length=160, n_mels=16, fmax=8_000, top_db=60)
PADS: tuple[Pad, ...] = ("wrap", "floor")


@pytest.fixture
def folder(tiny_download: Maker, tmp_path: Path) -> Path:
    """A cache of 10 curated clips, 16 to 46 frames long."""
    return build_cache(load_competition(tiny_download(curated=10)), CONFIG, Home(tmp_path / "home"), compute=Compute(jobs=1))


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


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from(PADS), st.integers(0, 2**32))
def test_training_crops_hold_as_much_of_the_clip_as_fits(frames: int, length: int, pad: Pad, seed: int) -> None:
    start = draw_start(frames, length, pad, np.random.default_rng(seed))
    if frames >= length:
        assert 0 <= start <= frames - length
    elif pad == "wrap":
        assert 0 <= start < frames
    else:
        assert start <= 0
        assert frames <= start + length


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize(("frames", "length"), [(9, 5), (5, 5), (5, 9)])
def test_every_possible_start_is_drawn(frames: int, length: int, pad: Pad) -> None:
    rng = np.random.default_rng(0)
    drawn = {draw_start(frames, length, pad, rng) for _ in range(500)}
    spare = frames - length
    assert drawn == (set(range(spare + 1)) if spare >= 0 else set(range(frames)) if pad == "wrap" else set(range(spare, 1)))


def phase(begin: int, until: int, rows: Sequence[int], batch_size: int = 4, pad: Pad = "wrap") -> Phase:
    return Phase(TrainConfig(batch_size=batch_size, pad=pad), begin, until, np.array(rows))


def batches(
    store: ClipStore, n_steps: int = 15, batch_size: int = 4, pad: Pad = "wrap", **options: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    full = {"length": 24, "first_step": 0, "seeds": [1, 2], **options}
    phases = full.pop("phases", [phase(0, n_steps, range(len(store.fnames)), batch_size, pad)])
    return [(b.log_mels, b.rows) for b in train_batches(store, phases, **full)]


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("first", [1, 2, 7, 14])
def test_a_step_has_the_same_batch_wherever_reading_began(store: ClipStore, first: int, pad: Pad) -> None:
    whole, resumed = batches(store, pad=pad), batches(store, pad=pad, first_step=first)
    assert len(resumed) == 15 - first
    for (mels, rows), (again, rows_again) in zip(whole[first:], resumed, strict=True):
        np.testing.assert_array_equal(rows, rows_again)
        np.testing.assert_array_equal(mels, again)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 25])
def test_every_clip_is_seen_equally_often(store: ClipStore, batch_size: int) -> None:
    rows = np.concatenate([rows for _, rows in batches(store, batch_size=batch_size, n_steps=30)])
    for begin in range(0, len(rows) - 9, 10):
        assert sorted(rows[begin : begin + 10]) == list(range(10))
    assert np.ptp(np.bincount(rows, minlength=10)) <= 1


def test_passes_are_shuffled_anew_and_by_the_seeds(store: ClipStore) -> None:
    passes = np.concatenate([rows for _, rows in batches(store, batch_size=10, n_steps=4)]).reshape(4, 10)
    assert len({tuple(p) for p in passes}) == 4
    other = np.concatenate([rows for _, rows in batches(store, batch_size=10, n_steps=4, seeds=[1, 3])]).reshape(4, 10)
    assert not (passes == other).all()


def test_training_crops_come_from_their_clips(store: ClipStore, arrays: list[np.ndarray]) -> None:
    for mels, rows in batches(store, length=6):
        assert (mels.dtype, mels.shape) == (np.float16, (4, 6, 16))
        for mel, row in zip(mels, rows, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(arrays[row], 6, axis=0).transpose(0, 2, 1)
            assert (windows == mel).all(axis=(1, 2)).any()


@pytest.mark.parametrize("pad", PADS)
def test_evaluation_windows_come_in_order_in_full_batches(store: ClipStore, arrays: list[np.ndarray], pad: Pad) -> None:
    found = list(window_batches(store, View(20, 2, pad), overlap=0.5, batch_size=7))
    assert all(len(b.rows) == 7 for b in found[:-1])
    assert 1 <= len(found[-1].rows) <= 7
    expected = [(row, s) for row, a in enumerate(arrays) for s in window_starts(len(a), 20, 0.5, 2, pad)]
    np.testing.assert_array_equal(np.concatenate([b.rows for b in found]), [row for row, _ in expected])
    for mel, (row, start) in zip(np.concatenate([b.log_mels for b in found]), expected, strict=True):
        np.testing.assert_array_equal(mel, read(store, row, start, 20, pad))


@pytest.mark.parametrize(("first_noisy", "expected"), [(None, 10), (6, 6), (0, 0)])
def test_a_batch_says_which_of_its_clips_are_noisy(store: ClipStore, first_noisy: int | None, expected: int) -> None:
    phases = [phase(0, 15, range(10))]
    for batch in train_batches(store, phases, length=24, seeds=[1, 2], first_noisy=first_noisy):
        np.testing.assert_array_equal(batch.noisy, batch.rows >= expected)
    for batch in window_batches(store, View(20, 0, "wrap"), overlap=0.5, batch_size=7):
        assert batch.noisy.dtype == bool
        assert not batch.noisy.any()


def test_phases_follow_each_other_and_each_draws_from_its_own_rows(store: ClipStore) -> None:
    phases = [phase(0, 4, [0, 0, 1, 2]), phase(4, 7, [5, 6])]
    rows = [rows for _, rows in batches(store, phases=phases)]
    assert len(rows) == 7
    assert sorted(np.concatenate(rows[:4])) == [0] * 8 + [1] * 4 + [2] * 4
    assert sorted(np.concatenate(rows[4:])) == [5] * 6 + [6] * 6


@pytest.mark.parametrize("n", [0, 1, 100])
def test_prefetch_gives_every_item_in_order(n: int) -> None:
    assert list(prefetch(iter(range(n)))) == list(range(n))


def test_prefetch_raises_the_producers_error_after_its_items() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise MelfoldError("broken", "clip")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(MelfoldError, match="broken: clip"):
        next(ahead)


def test_prefetch_reads_no_further_than_asked() -> None:
    taken: list[int] = []
    ahead = prefetch((taken.append(i) or i for i in range(100)), depth=2)
    assert next(ahead) == 0
    time.sleep(0.3)
    assert len(taken) <= 5
    ahead.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("endless", [True, False])
def test_prefetch_stops_its_thread_when_abandoned(endless: bool) -> None:
    def items() -> Iterator[int]:
        i = 0
        while endless or i < 3:
            yield i
            i += 1

    before = set(threading.enumerate())
    ahead = prefetch(items(), depth=1)
    assert next(ahead) == 0
    ahead.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before

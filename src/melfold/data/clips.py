"""Crops and windows from the cache, in batches, read ahead of their use."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from melfold.data.cache import NPY_HEADER, npy_path, read_manifest
from melfold.errors import MelfoldError

Pad = Literal["wrap", "floor"]


@dataclass(frozen=True)
class Batch:
    """`log_mels`: float16 dB `(clips, frames, n_mels)`. `rows`: which clip of the caller's list each one is."""

    log_mels: np.ndarray
    rows: np.ndarray


class ClipStore:
    """Reads parts of cached log-mels, each with one contiguous read, and keeps none of them in memory.

    Args:
        folder: of the cache.
        fnames: the clips; a row number stands for a position in this list.
        top_db: how far below its peak a clip's floor is, in dB.

    Raises:
        MelfoldError: clips that are not in the cache.
    """

    def __init__(self, folder: Path, fnames: Sequence[str], n_mels: int, top_db: float) -> None:
        manifest = read_manifest(folder)
        missing = [f for f in fnames if f not in manifest.index or not manifest.at[f, "frames"]]
        if missing:
            raise MelfoldError(f"{len(missing)} clips are not in the cache", missing[0], "Run `melfold cache`")
        table = manifest.loc[list(fnames)]
        self.fnames = list(fnames)
        self.frames = table["frames"].to_numpy(np.int64)
        self.n_mels = n_mels
        self._paths = [str(npy_path(folder, f)) for f in fnames]
        self._floor = np.maximum(table["peak_db"].to_numpy(np.float64) - top_db, -100).astype(np.float16)
        self._mean = table["mean_db"].to_numpy(np.float64)
        self._mean_square = table["mean_square_db"].to_numpy(np.float64)

    def head(self, count: int) -> ClipStore:
        """Only the first clips."""
        return self._part(slice(count))

    def tail(self, count: int) -> ClipStore:
        """Only the last clips."""
        return self._part(slice(len(self.fnames) - count, None))

    def _part(self, part: slice) -> ClipStore:
        few = copy(self)
        for name in ("fnames", "frames", "_paths", "_floor", "_mean", "_mean_square"):
            setattr(few, name, getattr(self, name)[part])
        return few

    def statistics(self) -> tuple[float, float]:
        """Mean and standard deviation in dB over all frames of all clips."""
        share = self.frames / self.frames.sum()
        mean = float(share @ self._mean)
        return mean, float(np.sqrt(max(share @ self._mean_square - mean**2, 1e-6)))

    def read(self, row: int, start: int, out: np.ndarray, pad: Pad) -> None:
        """Fill `out`, float16 `(frames, n_mels)`, with a clip from frame `start` on; what is outside the clip is padded."""
        frames, length = int(self.frames[row]), len(out)
        if start >= 0 and start + length <= frames:
            self._read(row, start, out)
        elif pad == "wrap":
            clip = np.empty((frames, self.n_mels), np.float16)
            self._read(row, 0, clip)
            np.take(clip, np.arange(start, start + length), axis=0, mode="wrap", out=out)
        else:
            out[:] = self._floor[row]
            first, last = max(start, 0), min(start + length, frames)
            if first < last:
                self._read(row, first, out[first - start : last - start])

    def _read(self, row: int, start: int, out: np.ndarray) -> None:
        file = os.open(self._paths[row], os.O_RDONLY)
        try:
            got = os.preadv(file, [out], NPY_HEADER + 2 * self.n_mels * start)
        finally:
            os.close(file)
        if got != out.nbytes:
            raise MelfoldError("a cached log-mel is too short", self._paths[row], "Delete it and run `melfold cache`")


def tile(log_mel: np.ndarray, length: int, pad: Pad, top_db: float) -> np.ndarray:
    """The first evaluation window `(length, n_mels)` of a log-mel in memory, the same as `ClipStore.read` gives."""
    frames = len(log_mel)
    (start, *_) = window_starts(frames, length, 0.0, 0, pad)
    if pad == "wrap" or frames >= length:
        return np.take(log_mel, np.arange(start, start + length), axis=0, mode="wrap")
    return np.pad(log_mel, ((-start, length - frames + start), (0, 0)), constant_values=max(float(log_mel.max()) - top_db, -100))


def draw_start(frames: int, length: int, pad: Pad, rng: np.random.Generator) -> int:
    """Where a training crop begins: anywhere within a longer clip, or so that a shorter one lies anywhere in the crop."""
    if frames >= length:
        return int(rng.integers(0, frames - length + 1))
    return int(rng.integers(0, frames)) if pad == "wrap" else int(rng.integers(frames - length, 1))


def window_starts(frames: int, length: int, overlap: float, shift: int, pad: Pad) -> list[int]:
    """Start frames of the evaluation windows, spread evenly over a clip, all moved by `shift` frames."""
    spare = frames - length
    if spare <= 0:
        return [shift % frames] if pad == "wrap" else [min(max(spare // 2 + shift, spare), 0)]
    hop = max(1, round(length * (1 - overlap)))
    count = -(-spare // hop) + 1
    return sorted({min(max(round(s) + shift, 0), spare) for s in np.linspace(0, spare, count)})


@dataclass(frozen=True)
class Phase:
    """A stretch of training, up to the step `until`, in which clips are drawn from `rows`; a row may stand there repeatedly."""

    until: int
    rows: np.ndarray


def train_batches(
    store: ClipStore, phases: Sequence[Phase], *, length: int, batch_size: int, pad: Pad, first_step: int, seeds: Sequence[int]
) -> Iterator[Batch]:
    """Random crops, for the steps from `first_step` to the end of the last phase.

    In each phase clips come in an endless row of shuffled passes over its rows, cut into equal batches, and each step draws
    from a generator of its own: the batch of a step does not depend on where reading began, so that a resumed run sees what it
    would have seen.
    """
    begin = 0
    for number, phase in enumerate(phases):
        n = len(phase.rows)
        orders: dict[int, np.ndarray] = {}
        for step in range(max(first_step, begin), phase.until):
            positions = np.arange((step - begin) * batch_size, (step - begin + 1) * batch_size)
            passes = positions // n
            for p in np.unique(passes):
                if p not in orders:
                    orders[p] = np.random.default_rng([*seeds, 10 * number, int(p)]).permutation(n)
            rows = phase.rows[[orders[p][i] for p, i in zip(passes, positions % n, strict=True)]]
            orders = {p: order for p, order in orders.items() if p >= passes[-1]}
            rng = np.random.default_rng([*seeds, 1, step])
            log_mels = np.empty((batch_size, length, store.n_mels), np.float16)
            for out, row in zip(log_mels, rows, strict=True):
                store.read(row, draw_start(int(store.frames[row]), length, pad, rng), out, pad)
            yield Batch(log_mels, rows)
        begin = phase.until


def window_batches(store: ClipStore, *, length: int, overlap: float, shift: int, batch_size: int, pad: Pad) -> Iterator[Batch]:
    """Evaluation windows of all clips in order; every batch but the last is full, whatever the clips' lengths."""
    windows = [
        (row, start)
        for row, frames in enumerate(store.frames)
        for start in window_starts(int(frames), length, overlap, shift, pad)
    ]
    for begin in range(0, len(windows), batch_size):
        part = windows[begin : begin + batch_size]
        log_mels = np.empty((len(part), length, store.n_mels), np.float16)
        for out, (row, start) in zip(log_mels, part, strict=True):
            store.read(row, start, out, pad)
        yield Batch(log_mels, np.array([row for row, _ in part]))


T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int = 3) -> Iterator[T]:
    """Iterate in a background thread, up to `depth` items ahead; its errors are raised here.

    One thread is enough: a crop is one read of some tens of microseconds, against milliseconds of a training step.
    """
    ahead: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[str, T | BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return ahead.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(("item", item))
                if stop.is_set():
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, item = ahead.get()
            if kind == "item":
                yield item  # type: ignore[misc]
            elif kind == "error":
                raise item  # type: ignore[misc]
            else:
                return
    finally:
        stop.set()
        thread.join()

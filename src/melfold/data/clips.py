"""Parts of cached log-mels, and where evaluation windows start."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Literal

import numpy as np

from melfold.data.arrays import NPY_HEADER, npy_path
from melfold.data.cache import read_manifest
from melfold.errors import MelfoldError

Pad = Literal["wrap", "floor"]


class ClipStore:
    """Reads parts of cached log-mels, each with one contiguous read, and keeps none of them in memory.

    The first time a clip is read, its whole file is read and held against the checksum in the manifest.

    Args:
        folder: of the cache.
        fnames: the clips; a row number stands for a position in this list.
        top_db: how far below its peak a clip's floor is, in dB; None for a floor of -100 dB.

    Raises:
        MelfoldError: clips that are not in the cache.
    """

    def __init__(self, folder: Path, fnames: Sequence[str], n_mels: int, top_db: float | None) -> None:
        manifest = read_manifest(folder)
        missing = [f for f in fnames if f not in manifest.index or not manifest.at[f, "frames"]]
        if missing:
            raise MelfoldError(f"{len(missing)} clips are not in the cache", missing[0], "Run `melfold cache`")
        table = manifest.loc[list(fnames)]
        self.fnames = list(fnames)
        self.frames = table["frames"].to_numpy(np.int64)
        self.n_mels = n_mels
        self._paths = [str(npy_path(folder, f)) for f in fnames]
        self._floor = np.maximum(table["peak_db"].to_numpy(np.float64) - (top_db or np.inf), -100).astype(np.float16)
        self._mean = table["mean_db"].to_numpy(np.float64)
        self._mean_square = table["mean_square_db"].to_numpy(np.float64)
        self.crc32 = table["crc32"].to_numpy(np.int64)
        self._verified = np.zeros(len(fnames), bool)

    def head(self, count: int) -> ClipStore:
        """Only the first clips."""
        return self._part(slice(count))

    def tail(self, count: int) -> ClipStore:
        """Only the last clips."""
        return self._part(slice(len(self.fnames) - count, None))

    def _part(self, part: slice) -> ClipStore:
        few = copy(self)
        for name in ("fnames", "frames", "crc32", "_paths", "_floor", "_mean", "_mean_square", "_verified"):
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
            if not self._verified[row]:
                self._verify(row, file)
            got = os.preadv(file, [out], NPY_HEADER + 2 * self.n_mels * start)
        finally:
            os.close(file)
        if got != out.nbytes:
            raise MelfoldError("a cached log-mel is too short", self._paths[row], "Delete it and run `melfold cache`")

    def _verify(self, row: int, file: int) -> None:
        size = NPY_HEADER + 2 * self.n_mels * int(self.frames[row])
        if zlib.crc32(os.pread(file, size + 1, 0)) != self.crc32[row]:
            raise MelfoldError("a cached log-mel is damaged", self._paths[row], "Run `melfold cache --verify` with its recipe")
        self._verified[row] = True


def tile(log_mel: np.ndarray, length: int, pad: Pad, top_db: float | None) -> np.ndarray:
    """The first evaluation window `(length, n_mels)` of a log-mel in memory, the same as `ClipStore.read` gives."""
    frames = len(log_mel)
    (start, *_) = window_starts(frames, length, 0.0, 0, pad)
    if pad == "wrap" or frames >= length:
        return np.take(log_mel, np.arange(start, start + length), axis=0, mode="wrap")
    floor = max(float(log_mel.max()) - (top_db or np.inf), -100)
    return np.pad(log_mel, ((-start, length - frames + start), (0, 0)), constant_values=floor)


def window_starts(frames: int, length: int, overlap: float, shift: int, pad: Pad) -> list[int]:
    """Start frames of the evaluation windows, spread evenly over a clip, all moved by `shift` frames.

    Whatever the shift, the windows of a view cover the start and the end of the clip. A clip of just one window's time has one
    frame more than the window, since frames are centred; it is one window.
    """
    spare = frames - length
    if spare <= 1:
        return [shift % frames] if pad == "wrap" else [min(max(spare // 2 + shift, spare), 0)]
    hop = max(1, round(length * (1 - overlap)))
    count = -(-spare // hop) + 1
    starts = {min(max(round(s) + shift, 0), spare) for s in np.linspace(0, spare, count)}
    return sorted(starts | {0, spare})

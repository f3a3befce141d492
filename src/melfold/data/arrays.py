"""The array of one clip: its log-mel as a `.npy`, written in blocks, and what the manifest says of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from melfold.config import LogMelConfig
from melfold.data.audio import open_waveform
from melfold.data.logmel import LogMel
from melfold.errors import MelfoldError
from melfold.files import atomic_path

NPY_HEADER = 128
"""Bytes before the data in a `.npy` of this cache: crops are read at an offset without parsing the header."""

FULL_SCALE = 0.999
"""Samples of at least this size are at full scale; a clip with `CLIPPED_SAMPLES` of them is flagged as clipped."""

CLIPPED_SAMPLES = 10

REWRITE_FRAMES = 8192
"""Frames per block when `top_db` is applied to a written array."""


class ClipInfo(NamedTuple):
    """A row of the manifest. Bytes, ns, seconds, frames, dB."""

    fname: str
    size: int
    mtime_ns: int
    seconds: float = 0.0
    frames: int = 0
    peak_db: float = 0.0
    mean_db: float = 0.0
    mean_square_db: float = 0.0
    crc32: int = 0
    """Of the whole `.npy` file."""
    audio_crc32: int = 0
    """Of the audio file. Unlike the log-mel, it is the same on every machine."""
    flags: str = ""
    """As `flags_of` reads them."""
    error: str = ""


def npy_path(folder: Path, fname: str) -> Path:
    """The file of a clip's log-mel."""
    return folder / f"{fname.rsplit('.', 1)[0]}.npy"


def size_and_time(path: Path) -> tuple[int, int]:
    """A file's size and the time of its last change; zeros for one that does not exist, as a test clip may."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def crc32_of(path: Path) -> int:
    """The CRC-32 of a file."""
    crc32 = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def make_clip(folder: Path, fname: str, path: Path, transform: LogMel) -> ClipInfo:
    """Write one clip's array and return its row. A clip that cannot be read gets the flag `unreadable` and no array.

    Memory does not grow with the clip's length.
    """
    size, mtime_ns = size_and_time(path)
    target = npy_path(folder, fname)
    try:
        blocks, flags = open_waveform(path, transform.config.sr)
        meter = _Meter()
        # Not made durable: thousands of waits for the disk cost more than making clips again after a power cut.
        with atomic_path(target, durable=False) as temporary, temporary.open("w+b", buffering=0) as file:
            array = _write_array(file, transform.stream(meter.measure(blocks)), transform.config)
    except MelfoldError as error:
        target.unlink(missing_ok=True)
        return ClipInfo(fname, size, mtime_ns, flags="unreadable", error=str(error))
    if meter.peak == 0:
        flags.append("silent")
    if meter.full_scale >= CLIPPED_SAMPLES:
        flags.append("clipped")
    if meter.samples < transform.config.n_fft:
        flags.append("short")
    seconds = round(meter.samples / transform.config.sr, 4)
    return ClipInfo(fname, size, mtime_ns, seconds, **array, audio_crc32=crc32_of(path), flags="|".join(flags))


@dataclass
class _Meter:
    """Measures a waveform on its way to the transform."""

    samples: int = 0
    peak: float = 0.0
    full_scale: int = 0

    def measure(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            self.samples += len(block)
            peak = max(float(block.max()), -float(block.min()))
            self.peak = max(self.peak, peak)
            if peak >= FULL_SCALE:
                self.full_scale += int((np.abs(block) >= FULL_SCALE).sum())
            yield block


def _write_array(file: FileIO, parts: Iterator[np.ndarray], config: LogMelConfig) -> dict[str, Any]:
    """Write a `.npy` of float16 dB, limited to `top_db` below its peak. Returns what the manifest says of an array."""
    import torch

    file.seek(NPY_HEADER)
    frames, peak = 0, -np.inf
    for part in parts:
        frames, peak = frames + len(part), max(peak, float(part.max()))
        file.write(torch.from_numpy(part).half().numpy())  # NumPy's conversions to and from float16 are ten times slower
    # Rounding keeps the order, so limiting after it gives the same values as limiting before it.
    floor = float(np.float16(np.float32(peak) - np.float32(config.top_db or np.inf)))
    header = _header(frames, config.n_mels)
    crc32, total, squares = zlib.crc32(header), 0.0, 0.0
    for start in range(0, frames, REWRITE_FRAMES):
        stored = np.empty((min(REWRITE_FRAMES, frames - start), config.n_mels), np.float16)
        at = NPY_HEADER + start * config.n_mels * stored.itemsize
        file.seek(at)
        if file.readinto(stored) != stored.nbytes:
            raise OSError(f"{file.name}: fewer bytes than were written")
        values = torch.from_numpy(stored).float().clamp_(min=floor)
        file.seek(at)
        limited = values.half().numpy()
        file.write(limited)
        crc32 = zlib.crc32(limited, crc32)
        values = values.numpy()
        total += float(values.sum(dtype=np.float64))
        squares += float(np.square(values).sum(dtype=np.float64))
    file.seek(0)
    file.write(header)
    means = {"mean_db": total / (frames * config.n_mels), "mean_square_db": squares / (frames * config.n_mels)}
    return {"frames": frames, "peak_db": round(peak, 4), **means, "crc32": crc32}


def _header(frames: int, n_mels: int) -> bytes:
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": (frames, n_mels)})
    if len(header.getvalue()) != NPY_HEADER:
        raise RuntimeError(f"a .npy header of {len(header.getvalue())} bytes")
    return header.getvalue()

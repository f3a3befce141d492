"""Reading waveforms: any format that libsndfile reads, as mono float32 at one rate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from melfold.errors import MelfoldError

if TYPE_CHECKING:
    import soundfile

READ_BLOCK_SAMPLES = 1 << 20
"""Samples per block: a clip of an hour needs no more memory than one of half a minute."""

LOUDEST = 1e12
"""Full scale is 1, and 2e9 in floats that were integers; powers of much larger samples do not fit float32."""

OGG_PAGE = 27 + 255 + 255 * 255
"""The largest size of a page of an Ogg file, in bytes."""


def read_waveform(path: Path, sr: int) -> tuple[np.ndarray, list[str]]:
    """A clip's samples, float32 `(samples,)`, mono, at `sr` Hz; and those of the flags `downmixed` and `resampled` that apply.

    Raises:
        MelfoldError: a file that cannot be read, has no samples, or has samples that are not finite.
    """
    blocks, flags = open_waveform(path, sr)
    return np.concatenate(list(blocks)), flags


def open_waveform(path: Path, sr: int) -> tuple[Iterator[np.ndarray], list[str]]:
    """Like `read_waveform`, in blocks of about 24 s. Errors may also come while the blocks are read."""
    import soundfile

    try:
        file = soundfile.SoundFile(path)
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(path, str(error).strip()) from None
    flags = (["downmixed"] if file.channels > 1 else []) + (["resampled"] if file.samplerate != sr else [])
    return _waveform_blocks(file, path, sr), flags


def _waveform_blocks(file: soundfile.SoundFile, path: Path, sr: int) -> Iterator[np.ndarray]:
    import soundfile

    with file:
        if cut := cut_short(path):
            raise _unreadable(path, cut)
        resampler = None
        if file.samplerate != sr:
            import soxr

            resampler = soxr.ResampleStream(file.samplerate, sr, 1, dtype="float32", quality="HQ")
        read = given = 0
        last = False
        while not last:
            try:
                samples = file.read(min(READ_BLOCK_SAMPLES, file.frames - read), dtype="float32", always_2d=True)
            except (soundfile.SoundFileError, OSError) as error:
                raise _unreadable(path, str(error).strip()) from None
            read += len(samples)
            last = len(samples) < READ_BLOCK_SAMPLES or read == file.frames
            if last and read < file.frames:
                raise _unreadable(path, f"cut short: {read:,} of {file.frames:,} samples")
            if len(samples) and not max(samples.max(), -samples.min()) < LOUDEST:
                finite = np.isfinite(samples).all()
                raise _unreadable(path, f"samples of {np.abs(samples).max():.0e}" if finite else "samples that are not finite")
            block = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
            if resampler:
                block = resampler.resample_chunk(block, last=last)
            given += len(block)
            if len(block):
                yield block
        if not given:
            raise _unreadable(path, f"no samples left at {sr} Hz" if read else "no samples")


def _unreadable(path: Path, why: str) -> MelfoldError:
    return MelfoldError("unreadable audio", f"{path.name} ({why})", "Download it again")


def cut_short(path: Path) -> str:
    """Why a file is incomplete, as after a broken download: a wav's header promises more bytes than there are, or the last page
    of an Ogg file is not marked as such. Empty if it is whole.

    libsndfile reads such files without an error.
    """
    with path.open("rb") as file:
        head = file.read(8)
        size = os.fstat(file.fileno()).st_size
        tail = os.pread(file.fileno(), OGG_PAGE, max(0, size - OGG_PAGE)) if head[:4] == b"OggS" else b""
    if tail:
        page = tail[tail.rfind(b"OggS") :]
        whole = len(page) >= 27 and len(page) == 27 + page[26] + sum(page[27 : 27 + page[26]])
        return "" if whole and page[5] & 4 else "cut short: its last page is missing"
    promised = int.from_bytes(head[4:8], "little") + 8
    # Programs that write to a pipe leave 0 or the largest number; an odd chunk may lack its padding byte.
    if head[:4] == b"RIFF" and 8 < promised < 2**32 - 8 and promised > size + 1:
        return f"cut short: {size:,} of {promised:,} bytes"
    return ""

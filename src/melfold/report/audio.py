"""A clip's sound, small enough to be part of a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from melfold.data.audio import read_waveform

SR = 48_000
"""Hz: Opus has few rates, and this one keeps all that a 44.1 kHz recording holds."""

LEVEL = 0.9
"""libsndfile's scale from 0 (256 kbit/s) to 1 (6 kbit/s): about 30 kbit/s, with the whole range of hearing."""


@dataclass(frozen=True)
class Sound:
    """`uri` holds the whole file as text, a third longer than its `bytes`."""

    uri: str
    bytes: int
    seconds: float


def embed_sound(path: Path) -> Sound:
    """A clip as mono Ogg Opus.

    Raises:
        MelfoldError: a file that cannot be read.
    """
    content, seconds = encode(read_waveform(path, SR)[0])
    return Sound("data:audio/ogg;base64," + base64.b64encode(content).decode(), len(content), seconds)


def encode(waveform: np.ndarray) -> tuple[bytes, float]:
    """A waveform at `SR` as the bytes of an Ogg Opus file, and its length in seconds."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, SR, format="OGG", subtype="OPUS", compression_level=LEVEL)
    return buffer.getvalue(), len(waveform) / SR

"""A clip's log-mel as a small picture that can be part of a page."""

from __future__ import annotations

import base64
import io
from functools import cache

import numpy as np

from melfold.config import LogMelConfig, Recipe
from melfold.data.clips import window_starts

COLUMNS = 480
"""Pixels; a longer clip is averaged over time."""

QUALITY = 30
"""Of WebP: 3 to 6 kB for a clip, a third of a PNG; the eye sees no difference at this size."""

TICKS_HZ = (250, 500, 1000, 2000, 4000, 8000, 16_000)


def embed_spectrogram(log_mel: np.ndarray) -> str:
    """A log-mel `(frames, n_mels)` in dB as a `data:` address of a WebP: time to the right, low frequencies at the bottom."""
    from PIL import Image

    values = log_mel.astype(np.float32)
    if len(values) > COLUMNS:
        edges = np.linspace(0, len(values), COLUMNS + 1).astype(int)
        values = np.add.reduceat(values, edges[:-1], axis=0) / np.diff(edges)[:, None]
    span = max(float(np.ptp(values)), 1.0)
    pixels = ((values - values.min()) * (255 / span)).astype(np.uint8).T[::-1]
    buffer = io.BytesIO()
    Image.fromarray(_magma()[pixels]).save(buffer, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


@cache
def _magma() -> np.ndarray:
    import matplotlib

    return (matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).astype(np.uint8)


def window_shares(frames: int, recipe: Recipe) -> list[tuple[float, float]]:
    """Where the evaluation windows of the first view begin and end, as shares of the clip, cut to it."""
    view = recipe.views[0]
    starts = window_starts(frames, view.length, recipe.predict.overlap, view.shift, view.pad)
    if view.length >= frames:
        return [(0.0, 1.0)]
    return [(start / frames, (start + view.length) / frames) for start in starts]


def describe_windows(frames: int, recipe: Recipe) -> str:
    """The windows of a clip in words."""
    view, seconds = recipe.views[0], recipe.logmel.hop_length / recipe.logmel.sr
    length, more = view.length * seconds, f", in {len(recipe.views)} views" if len(recipe.views) > 1 else ""
    if frames < view.length:
        how = "the clip is repeated to fill it" if view.pad == "wrap" else "the rest is silence"
        return f"1 window of {length:.1f} s: {how}{more}"
    count = len(window_shares(frames, recipe))
    return f"{count} window{'s' if count > 1 else ''} of {length:.1f} s{more}"


def mel_ticks(config: LogMelConfig) -> list[tuple[str, float]]:
    """Frequencies to write beside a spectrogram, and their height as a share of it, from the bottom."""
    ticks: list[tuple[str, float]] = []
    for hz in TICKS_HZ:
        height = (band_of(hz, config) + 0.5) / config.n_mels
        if 0.02 < height < 0.94 and (not ticks or height - ticks[-1][1] > 0.12):
            ticks.append((f"{hz / 1000:g} kHz" if hz >= 1000 else f"{hz} Hz", height))
    return ticks


def band_of(hz: float, config: LogMelConfig) -> float:
    """The mel band, with a fraction, whose centre is at a frequency: librosa's scale, without loading librosa."""
    low, high = _mel(config.fmin, config.htk), _mel(config.fmax, config.htk)
    return float((_mel(hz, config.htk) - low) / (high - low) * (config.n_mels + 1) - 1)


def _mel(hz: float, htk: bool) -> float:
    if htk:
        return 2595 * np.log10(1 + hz / 700)
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)

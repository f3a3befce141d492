"""What a model sees of a clip: its log-mel, the evaluation windows, the frequencies of its bands, its predictions."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from melfold.config import LogMelConfig, Recipe
from melfold.data.arrays import npy_path, size_and_time
from melfold.data.audio import read_waveform
from melfold.data.cache import read_manifest
from melfold.data.clips import window_starts
from melfold.data.logmel import log_mel_of

TICKS_HZ = (250, 500, 1000, 2000, 4000, 8000, 16_000)


def manifest_of(cache: Path) -> pd.DataFrame:
    """The manifest of a cache; empty if there is none."""
    return read_manifest(cache) if (cache / "manifest.csv").exists() else pd.DataFrame()


def log_mel_for(cache: Path, manifest: pd.DataFrame, fname: str, audio: Path | None, config: LogMelConfig) -> np.ndarray | None:
    """dB `(frames, n_mels)` of a clip: from the cache if it is of this audio, or else made from it; None where neither is here.

    Raises:
        MelfoldError: audio that cannot be read.
    """
    array = npy_path(cache, fname)
    if fname in manifest.index and array.exists():
        row = manifest.loc[fname]
        if audio is None or (row["size"], row["mtime_ns"]) == size_and_time(audio):
            return np.load(array)
    return None if audio is None else log_mel_of(config)(read_waveform(audio, config.sr)[0])


def top_predictions(probs: pd.Series, labels: Collection[str], top: int) -> list[dict[str, Any]]:
    """The top predictions of a clip and all of its true labels, the likeliest first: `label prob rank true`."""
    ranked = probs.sort_values(ascending=False, kind="stable")
    rows = [
        {"label": label, "prob": float(prob), "rank": rank, "true": label in labels}
        for rank, (label, prob) in enumerate(ranked.items(), 1)
    ]
    return [row for row in rows if row["rank"] <= top or row["true"]]


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

    def mel(hz: float) -> float:
        if config.htk:
            return 2595 * np.log10(1 + hz / 700)
        return hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)

    low, high = mel(config.fmin), mel(config.fmax)
    return float((mel(hz) - low) / (high - low) * (config.n_mels + 1) - 1)

"""A picture of clips: waveform, the log-mel as a model sees it, labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from melfold.config import LogMelConfig, Recipe
from melfold.data.audio import read_waveform
from melfold.data.cache import cache_folder, npy_path, read_manifest
from melfold.data.clips import tile
from melfold.data.competition import SPLITS, Competition
from melfold.data.logmel import log_mel_of
from melfold.errors import MelfoldError
from melfold.files import Home, atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TICKS_HZ = (300, 1000, 2000, 4000, 8000, 16_000)


@dataclass(frozen=True)
class _Clip:
    fname: str
    split: str
    labels: tuple[str, ...]
    path: Path


def draw_clips(competition: Competition, fnames: Sequence[str], recipe: Recipe, path: Path, home: Home | None = None) -> None:
    """Write a PNG with one row per clip: its waveform, and its first evaluation window, padded as in training.

    Args:
        home: where log-mels may be cached already.

    Raises:
        MelfoldError: a clip the competition does not have, or one that cannot be read.
    """
    from matplotlib.figure import Figure

    clips = [_find(competition, fname) for fname in fnames]
    config = recipe.logmel
    cached = _cached(competition, clips, config, home)
    figure = Figure(figsize=(13, 2.6 * len(clips) + 0.4), layout="constrained")
    for (left, right), clip in zip(figure.subplots(len(clips), 2, squeeze=False), clips, strict=True):
        waveform, flags = read_waveform(clip.path, config.sr)
        _draw_waveform(left, waveform, config.sr, clip, flags)
        log_mel = np.load(cached[clip.fname]) if clip.fname in cached else log_mel_of(config)(waveform)
        image = _draw_log_mel(right, log_mel.astype(np.float32), recipe, clip)
        figure.colorbar(image, ax=right, label="dB", pad=0.01)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _find(competition: Competition, fname: str) -> _Clip:
    for split in SPLITS:
        table = competition.split(split)
        if fname in table.index:
            row = table.loc[fname]
            return _Clip(fname, split, tuple(row["labels"]) if split != "test" else (), row["path"])
    raise MelfoldError("no such clip", fname, f"Names look like {competition.curated.index[0]}")


def _cached(competition: Competition, clips: Sequence[_Clip], config: LogMelConfig, home: Home | None) -> dict[str, Path]:
    """The log-mels that exist already and whose audio has not changed since."""
    folder = cache_folder(home, competition.name, config) if home else None
    if not folder or not (folder / "manifest.csv").exists():
        return {}
    manifest, found = read_manifest(folder), {}
    for clip in clips:
        array, stat = npy_path(folder, clip.fname), clip.path.stat()
        if clip.fname in manifest.index and array.exists():
            row = manifest.loc[clip.fname]
            if (row["size"], row["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
                found[clip.fname] = array
    return found


def _draw_waveform(axes: Axes, waveform: np.ndarray, sr: int, clip: _Clip, flags: Sequence[str]) -> None:
    seconds = np.arange(len(waveform)) / sr
    axes.plot(seconds, waveform, linewidth=0.4, color="#2b6cb0")
    axes.set(xlim=(0, seconds[-1] if len(seconds) > 1 else 1), ylabel="amplitude", xlabel="seconds")
    note = f"  ({', '.join(flags)})" if flags else ""
    axes.set_title(f"{clip.fname}  {clip.split}  {len(waveform) / sr:.2f} s{note}", loc="left", fontsize=9)


def _draw_log_mel(axes: Axes, log_mel: np.ndarray, recipe: Recipe, clip: _Clip) -> object:
    config = recipe.logmel
    window = tile(log_mel, recipe.window_frames, recipe.train.pad, config.top_db)
    frame = config.hop_length / config.sr
    image = axes.imshow(
        window.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
        extent=(0, len(window) * frame, -0.5, config.n_mels - 0.5),
    )
    ticks = [hz for hz in TICKS_HZ if config.fmin <= hz <= config.fmax]
    axes.set_yticks([band_of(hz, config) for hz in ticks], [f"{hz:g}" for hz in ticks])
    axes.set(ylabel="Hz (mel)", xlabel="seconds")
    if len(log_mel) < len(window):
        axes.axvline(len(log_mel) * frame, color="white", linewidth=0.8, linestyle=":")
    axes.set_title(", ".join(clip.labels) or "labels unknown", loc="left", fontsize=9)
    return image


def band_of(hz: float, config: LogMelConfig) -> float:
    """The mel band, with a fraction, whose centre is at a frequency: librosa's scale, without loading librosa."""
    low, high = _mel(config.fmin, config.htk), _mel(config.fmax, config.htk)
    return float((_mel(hz, config.htk) - low) / (high - low) * (config.n_mels + 1) - 1)


def _mel(hz: float, htk: bool) -> float:
    if htk:
        return 2595 * np.log10(1 + hz / 700)
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)

"""A picture of clips: waveform, the log-mel with the windows that a model sees, labels, and a run's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from melfold.config import LogMelConfig, Recipe
from melfold.data.arrays import npy_path
from melfold.data.audio import read_waveform
from melfold.data.cache import cache_folder, read_manifest
from melfold.data.competition import SPLITS, Competition, Split
from melfold.data.logmel import log_mel_of
from melfold.errors import MelfoldError
from melfold.files import Home, atomic_path
from melfold.learn.predictions import Prediction
from melfold.probs import Probs
from melfold.report.pictures import describe_windows, mel_ticks, window_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}

TOP = 6
"""Predictions drawn of a clip, beside its true labels."""


@dataclass(frozen=True)
class _Clip:
    fname: str
    split: Split
    labels: tuple[str, ...]
    path: Path


def draw_clips(
    competition: Competition,
    fnames: Sequence[str],
    recipe: Recipe,
    path: Path,
    home: Home | None = None,
    *,
    prediction: Prediction | None = None,
) -> None:
    """Write a picture with a row for each clip: its waveform, its whole log-mel with the evaluation windows above it, and labels.

    Args:
        path: ends in `.png`, `.jpg` or `.jpeg`.
        home: where log-mels may be cached already.
        prediction: draw its probabilities too: out-of-fold for curated clips, the test predictions for test clips.

    Raises:
        MelfoldError: another kind of file, a clip the competition does not have, one that cannot be read, or predictions that
            are missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise MelfoldError("a picture is a PNG or a JPEG", path.name, f"Use -o {path.stem or 'clips'}.png")
    clips = [_find(competition, fname) for fname in fnames]
    tables = _tables(prediction, clips)

    from matplotlib.figure import Figure

    cached = _cached(competition, clips, recipe.logmel, home)
    columns = 3 if prediction else 2
    figure = Figure(figsize=(17 if prediction else 13, 2.7 * len(clips) + 0.4), layout="constrained")
    axes = figure.subplots(len(clips), columns, width_ratios=[3, 4, 2][:columns], squeeze=False)
    for row, clip in zip(axes, clips, strict=True):
        waveform, flags = read_waveform(clip.path, recipe.logmel.sr)
        log_mel = np.load(cached[clip.fname]) if clip.fname in cached else log_mel_of(recipe.logmel)(waveform)
        _draw_waveform(row[0], clip, waveform, flags, recipe)
        _draw_log_mel(row[1], clip, log_mel.astype(np.float32), len(waveform) / recipe.logmel.sr, recipe)
        if prediction:
            _draw_predictions(row[2], clip, tables.get(clip.split), prediction)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format=FORMATS[path.suffix.lower()])


def _draw_waveform(axes: Axes, clip: _Clip, waveform: np.ndarray, flags: list[str], recipe: Recipe) -> None:
    seconds = len(waveform) / recipe.logmel.sr
    axes.plot(np.arange(len(waveform)) / recipe.logmel.sr, waveform, linewidth=0.4, color="#0b5cad")
    axes.set(xlim=(0, seconds), ylabel="amplitude", xlabel="seconds")
    found = f"  ({', '.join(flags)})" if flags else ""
    axes.set_title(f"{clip.fname}  {clip.split}  {seconds:.2f} s{found}", loc="left", fontsize=9)


def _draw_log_mel(axes: Axes, clip: _Clip, log_mel: np.ndarray, seconds: float, recipe: Recipe) -> None:
    config = recipe.logmel
    extent = (0, seconds, 0, config.n_mels)
    image = axes.imshow(log_mel.T, origin="lower", aspect="auto", cmap="magma", interpolation="nearest", extent=extent)
    ticks = mel_ticks(config)
    axes.set_yticks([height * config.n_mels for _, height in ticks], [text for text, _ in ticks])
    axes.set_xlabel("seconds")
    for number, (start, end) in enumerate(window_shares(len(log_mel), recipe)):
        height = 1.03 + 0.035 * (number % 2)
        axes.plot(
            [start * seconds, end * seconds],
            [height, height],
            transform=axes.get_xaxis_transform(),
            color="#57606a",
            linewidth=2.5,
            solid_capstyle="butt",
            clip_on=False,
        )
    axes.set_xlim(0, seconds)
    title = f"{', '.join(clip.labels) or 'labels unknown'}   [{describe_windows(len(log_mel), recipe)}]"
    axes.set_title(title, loc="left", fontsize=9, pad=14)
    axes.figure.colorbar(image, ax=axes, label="dB", pad=0.01)


def _draw_predictions(axes: Axes, clip: _Clip, table: Probs | None, prediction: Prediction) -> None:
    """The likeliest labels and the true ones as bars; the true ones in green."""
    axes.set_title(prediction.label, loc="left", fontsize=9)
    if table is None or clip.fname not in table.index:
        axes.text(0.5, 0.5, "not predicted", ha="center", va="center", transform=axes.transAxes, color="#59616b")
        axes.set_axis_off()
        return
    probs = table.loc[clip.fname].sort_values(ascending=False, kind="stable")
    shown = [label for rank, label in enumerate(probs.index) if rank < TOP or label in clip.labels][::-1]
    values = [float(probs[label]) for label in shown]
    axes.barh(shown, values, color=["#1a6f3c" if label in clip.labels else "#9aa5b1" for label in shown])
    for row, value in enumerate(values):
        axes.text(min(value + 0.02, 0.98), row, f"{value:.2f}", va="center", fontsize=8, ha="left" if value < 0.9 else "right")
    axes.set(xlim=(0, 1), xlabel="probability")
    axes.tick_params(axis="y", labelsize=8)


def _tables(prediction: Prediction | None, clips: Sequence[_Clip]) -> dict[str, Probs]:
    """The probabilities of the splits that are drawn. A run does not predict noisy clips."""
    splits = {clip.split for clip in clips}
    found = {}
    if prediction and "curated" in splits:
        found["curated"] = prediction.read_oof()
    if prediction and "test" in splits:
        found["test"] = prediction.read_test()
    return found


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

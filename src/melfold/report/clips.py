"""A picture of clips: waveform, the log-mel with the windows that a model sees, labels, and a run's predictions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from melfold.config import Recipe
from melfold.data.audio import read_waveform
from melfold.data.cache import cache_folder
from melfold.data.competition import SPLITS, Competition, Split
from melfold.errors import MelfoldError
from melfold.files import Home, atomic_path
from melfold.learn.predictions import Prediction
from melfold.probs import Probs
from melfold.report.charts import GREY
from melfold.report.pictures import describe_windows, log_mel_for, manifest_of, mel_ticks, top_predictions, window_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}

TOP = 6
"""Predictions drawn of a clip, beside its true labels."""


def draw_clips(
    competition: Competition,
    fnames: Sequence[str],
    recipe: Recipe,
    path: Path,
    home: Home,
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
    splits = [_split_of(competition, fname) for fname in fnames]
    readers = {"curated": prediction.read_oof, "test": prediction.read_test} if prediction else {}
    tables = {split: read() for split, read in readers.items() if split in splits}  # a run does not predict noisy clips

    from matplotlib.figure import Figure

    cache = cache_folder(home, competition.name, recipe.logmel)
    manifest = manifest_of(cache)
    columns = 3 if prediction else 2
    figure = Figure(figsize=(17 if prediction else 13, 2.7 * len(fnames) + 0.4), layout="constrained")
    axes = figure.subplots(len(fnames), columns, width_ratios=[3, 4, 2][:columns], squeeze=False)
    for row, fname, split in zip(axes, fnames, splits, strict=True):
        clip = competition.split(split).loc[fname]
        labels = () if split == "test" else clip["labels"]
        waveform, flags = read_waveform(clip["path"], recipe.logmel.sr)
        log_mel = log_mel_for(cache, manifest, fname, clip["path"], recipe.logmel)
        seconds = len(waveform) / recipe.logmel.sr
        row[0].plot(np.arange(len(waveform)) / recipe.logmel.sr, waveform, linewidth=0.4)
        row[0].set(xlim=(0, seconds), ylabel="amplitude", xlabel="seconds")
        found = f"  ({', '.join(flags)})" if flags else ""
        row[0].set_title(f"{fname}  {split}  {seconds:.2f} s{found}", loc="left", fontsize=9)
        _draw_log_mel(row[1], np.asarray(log_mel, np.float32), seconds, labels, recipe)
        if prediction:
            row[2].set_title(prediction.label, loc="left", fontsize=9)
            _draw_predictions(row[2], fname, labels, tables.get(split))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format=FORMATS[path.suffix.lower()])


def _split_of(competition: Competition, fname: str) -> Split:
    for split in SPLITS:
        if fname in competition.split(split).index:
            return split
    raise MelfoldError("no such clip", fname, f"Names look like {competition.curated.index[0]}")


def _draw_log_mel(axes: Axes, log_mel: np.ndarray, seconds: float, labels: Collection[str], recipe: Recipe) -> None:
    bands = recipe.logmel.n_mels
    extent = (0, seconds, 0, bands)
    image = axes.imshow(log_mel.T, origin="lower", aspect="auto", cmap="magma", interpolation="nearest", extent=extent)
    ticks = mel_ticks(recipe.logmel)
    axes.set_yticks([height * bands for _, height in ticks], [text for text, _ in ticks])
    axes.set_xlabel("seconds")
    for number, (start, end) in enumerate(window_shares(len(log_mel), recipe)):
        height, above = 1.03 + 0.035 * (number % 2), axes.get_xaxis_transform()
        axes.hlines(height, start * seconds, end * seconds, transform=above, color=GREY, linewidth=2.5, clip_on=False)
    axes.set_xlim(0, seconds)
    title = f"{', '.join(labels) or 'labels unknown'}   [{describe_windows(len(log_mel), recipe)}]"
    axes.set_title(title, loc="left", fontsize=9, pad=14)
    axes.figure.colorbar(image, ax=axes, label="dB", pad=0.01)


def _draw_predictions(axes: Axes, fname: str, labels: Collection[str], table: Probs | None) -> None:
    """The likeliest labels and the true ones as bars; the true ones in green."""
    if table is None or fname not in table.index:
        axes.text(0.5, 0.5, "not predicted", ha="center", va="center", transform=axes.transAxes, color=GREY)
        axes.set_axis_off()
        return
    shown = top_predictions(table.loc[fname], labels, TOP)[::-1]
    colours = ["#1a6f3c" if row["true"] else "#9aa5b1" for row in shown]
    bars = axes.barh([row["label"] for row in shown], [row["prob"] for row in shown], color=colours)
    axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=3)
    axes.set(xlim=(0, 1.1), xlabel="probability")
    axes.tick_params(axis="y", labelsize=8)

"""A picture of clips: waveform, the log-mel as a model sees it, labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from melfold.config import Recipe
from melfold.data.audio import read_waveform
from melfold.data.clips import tile
from melfold.data.competition import SPLITS, Competition
from melfold.data.logmel import log_mel_of
from melfold.errors import MelfoldError
from melfold.files import atomic_path


def draw_clips(competition: Competition, fnames: Sequence[str], recipe: Recipe, path: Path) -> None:
    """Write a PNG with a row a clip: its waveform, and its first evaluation window, padded as in training.

    Raises:
        MelfoldError: a clip the competition does not have, or one that cannot be read.
    """
    import librosa
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [_find(competition, fname) for fname in fnames]
    config = recipe.logmel
    figure, axes = plt.subplots(len(rows), 2, figsize=(13, 2.6 * len(rows) + 0.4), squeeze=False, layout="constrained")
    ticks_hz = np.array([hz for hz in (300, 1000, 2000, 4000, 8000, 16_000) if config.fmin <= hz <= config.fmax])
    centres = librosa.mel_frequencies(n_mels=config.n_mels, fmin=config.fmin, fmax=config.fmax, htk=config.htk)
    for (left, right), (fname, split, labels, file) in zip(axes, rows, strict=True):
        waveform, flags = read_waveform(file, config.sr)
        seconds = np.arange(len(waveform)) / config.sr
        left.plot(seconds, waveform, linewidth=0.4, color="#2b6cb0")
        left.set(xlim=(0, seconds[-1] if len(seconds) > 1 else 1), ylabel="amplitude", xlabel="seconds")
        note = f"  ({', '.join(flags)})" if flags else ""
        left.set_title(f"{fname}  {split}  {len(waveform) / config.sr:.2f} s{note}", loc="left", fontsize=9)
        log_mel = log_mel_of(config)(waveform)
        window = tile(log_mel, recipe.window_frames, recipe.train.pad, recipe.logmel.top_db)
        frame = config.hop_length / config.sr
        image = right.imshow(
            window.T,
            origin="lower",
            aspect="auto",
            cmap="magma",
            interpolation="nearest",
            extent=(0, len(window) * frame, -0.5, config.n_mels - 0.5),
        )
        right.set_yticks(np.interp(ticks_hz, centres, np.arange(config.n_mels)), [f"{hz:g}" for hz in ticks_hz])
        right.set(ylabel="Hz (mel)", xlabel="seconds")
        if len(log_mel) < len(window):
            right.axvline(len(log_mel) * frame, color="white", linewidth=0.8, linestyle=":")
        right.set_title(", ".join(labels) or "labels unknown", loc="left", fontsize=9)
        figure.colorbar(image, ax=right, label="dB", pad=0.01)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _find(competition: Competition, fname: str) -> tuple[str, str, tuple[str, ...], Path]:
    for split in SPLITS:
        table = competition.split(split)
        if fname in table.index:
            row = table.loc[fname]
            return fname, split, tuple(row["labels"]) if split != "test" else (), row["path"]
    raise MelfoldError("no such clip", fname, f"Names look like {competition.curated.index[0]}")

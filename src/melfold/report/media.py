"""Pictures and sounds of clips as parts of a page."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from melfold.compute import Progress, silent
from melfold.data.audio import read_waveform
from melfold.data.cache import cache_folder, flags_of
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.learn.runs import Run
from melfold.probs import Probs
from melfold.report.pictures import describe_windows, log_mel_for, manifest_of, top_predictions, window_shares

TOP = 5
"""Predictions shown of a clip, beside its true labels."""

COLUMNS = 480
"""Pixels of a picture; a longer clip is averaged over time."""

QUALITY = 30
"""Of WebP: 3 to 6 kB for a clip, a third of a PNG; the eye sees no difference at this size."""

SR = 48_000
"""Hz: Opus has few rates, and this one keeps all that a 44.1 kHz recording holds."""

LEVEL = 0.9
"""libsndfile's scale from 0 (256 kbit/s) to 1 (6 kbit/s): about 30 kbit/s, with the whole range of hearing."""


@dataclass
class Media:
    """Pictures and sounds of a run's curated clips, each clip's once; what a page's script fetches by number.

    Args:
        competition: where the sounds come from; without, there are none, and pictures only from the cache.
        audio: whether sounds become part of the page.
    """

    run: Run
    competition: Competition | None
    audio: bool = True
    numbers: dict[str, int] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def cache(self) -> Path:
        """The folder of the run's log-mels."""
        return cache_folder(self.run.home, self.run.info.competition, self.run.recipe.logmel)

    @cached_property
    def manifest(self) -> pd.DataFrame:
        """Of the cache; empty if there is none."""
        return manifest_of(self.cache)

    def card(self, fname: str, targets: pd.DataFrame, tables: Sequence[Probs]) -> dict[str, Any]:
        """A clip as the templates take it; `media` is its number here, `sides` are its predictions by each of `tables`."""
        known = self.manifest.loc[fname] if fname in self.manifest.index else None
        labels = [label for label, own in targets.loc[fname].items() if own]
        return {
            "fname": fname,
            "media": self.numbers.setdefault(fname, len(self.numbers)),
            "fold": int(self.run.clips.at[fname, "fold"]),
            "seconds": None if known is None else float(known["seconds"]),
            "flags": [] if known is None else flags_of(known["flags"]),
            "sides": [top_predictions(probs.loc[fname], labels, TOP) for probs in tables],
        }

    def make(self, progress: Progress = silent) -> None:
        """Make the pictures and sounds of all clips that have a number. A clip that cannot be read has neither."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for item in pool.map(self._make, self.numbers):
                self.items.append(item)
                progress(len(self.items), len(self.numbers), "pictures and sounds")

    def _make(self, fname: str) -> dict[str, Any]:
        recipe = self.run.recipe
        path = self.competition.curated["path"].get(fname) if self.competition else None
        item: dict[str, Any] = {"picture": "", "sound": "", "bytes": 0, "seconds": 0, "windows": [], "told": ""}
        try:
            log_mel = log_mel_for(self.cache, self.manifest, fname, path, recipe.logmel)
            if log_mel is not None:
                frames = len(log_mel)
                item["picture"] = embed_spectrogram(log_mel)
                item["windows"] = [[round(a, 4), round(b, 4)] for a, b in window_shares(frames, recipe)]
                item["told"] = describe_windows(frames, recipe)
                item["seconds"] = round(frames * recipe.logmel.hop_length / recipe.logmel.sr, 2)
            if self.audio and path is not None:
                waveform = read_waveform(path, SR)[0]
                sound = encode_sound(waveform)
                item |= {"sound": _data("audio/ogg", sound), "bytes": len(sound), "seconds": round(len(waveform) / SR, 2)}
        except (MelfoldError, OSError):
            pass
        return item

    @property
    def told(self) -> str:
        """How many sounds there are and how large they are, in words."""
        sizes = [item["bytes"] for item in self.items if item["bytes"]]
        if not sizes:
            return "This page has no sounds."
        mean, total = np.mean(sizes) / 1000, sum(sizes) / 1e6
        return f"{len(sizes)} sounds, mono Ogg Opus: {mean:.0f} kB per clip, {total:.1f} MB in all."


def embed_spectrogram(log_mel: np.ndarray) -> str:
    """A log-mel `(frames, n_mels)` in dB as a `data:` address of a WebP: time to the right, low frequencies at the bottom."""
    import matplotlib
    from PIL import Image

    values = log_mel.astype(np.float32)
    if len(values) > COLUMNS:
        edges = np.linspace(0, len(values), COLUMNS + 1).astype(int)
        values = np.add.reduceat(values, edges[:-1], axis=0) / np.diff(edges)[:, None]
    shares = (values - values.min()) / max(float(np.ptp(values)), 1.0)
    buffer = io.BytesIO()
    pixels = matplotlib.colormaps["magma"](shares.T[::-1], bytes=True)[..., :3]
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "WEBP", quality=QUALITY, method=4)
    return _data("image/webp", buffer.getvalue())


def encode_sound(waveform: np.ndarray) -> bytes:
    """A waveform at `SR` as an Ogg Opus file."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, SR, format="OGG", subtype="OPUS", compression_level=LEVEL)
    return buffer.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

"""What a page shows of a clip: facts, predictions, the picture of its log-mel, its sound."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from melfold.compute import Progress, silent
from melfold.config import Recipe
from melfold.data.arrays import npy_path
from melfold.data.audio import read_waveform
from melfold.data.cache import cache_folder, read_manifest
from melfold.data.competition import Competition
from melfold.data.logmel import log_mel_of
from melfold.errors import MelfoldError
from melfold.learn.runs import Run
from melfold.probs import Probs
from melfold.report.audio import embed_sound
from melfold.report.pictures import describe_windows, embed_spectrogram, window_shares

TOP = 5
"""Predictions shown of a clip, beside its true labels."""


@dataclass(frozen=True)
class ClipSource:
    """Where pictures and sounds of a run's curated clips come from.

    Args:
        manifest: of the log-mel cache, if there is one.
        paths: audio files by `fname`; empty if the download is not here.
        audio: whether sounds become part of the page.
    """

    recipe: Recipe
    cache: Path
    manifest: pd.DataFrame | None
    paths: Mapping[str, Path]
    audio: bool

    @classmethod
    def of(cls, run: Run, competition: Competition | None, *, audio: bool = True) -> ClipSource:
        """Of a run; without a competition there are no sounds, and pictures only from the cache."""
        folder = cache_folder(run.home, run.info.competition, run.recipe.logmel)
        manifest = read_manifest(folder) if (folder / "manifest.csv").exists() else None
        paths = {} if competition is None else {f: p for f, p in competition.curated["path"].items() if p is not None}
        return cls(run.recipe, folder, manifest, paths, audio)

    def log_mel(self, fname: str) -> np.ndarray | None:
        """dB `(frames, n_mels)` from the cache, or else from the audio; None where neither is here or can be read."""
        path = npy_path(self.cache, fname)
        if path.exists():
            return np.load(path)
        if fname not in self.paths:
            return None
        try:
            return log_mel_of(self.recipe.logmel)(read_waveform(self.paths[fname], self.recipe.logmel.sr)[0])
        except (MelfoldError, OSError):
            return None

    def facts(self, fname: str) -> tuple[float | None, list[str]]:
        """Length in seconds and flags, as far as the cache knows them."""
        if self.manifest is None or fname not in self.manifest.index:
            return None, []
        row = self.manifest.loc[fname]
        return float(row["seconds"]), [flag for flag in str(row["flags"]).split("|") if flag]


@dataclass
class Media:
    """Pictures and sounds of a page, each clip's once; what a page's script fetches by number."""

    source: ClipSource
    fnames: list[str] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)

    def number(self, fname: str) -> int:
        """The number under which a clip's picture and sound will be found."""
        if fname not in self.fnames:
            self.fnames.append(fname)
        return self.fnames.index(fname)

    def make(self, progress: Progress = silent) -> None:
        """Make the pictures and sounds of all clips that were asked for.

        A clip that cannot be read has neither.
        """
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for item in pool.map(self._make, self.fnames):
                self.items.append(item)
                progress(len(self.items), len(self.fnames), "pictures and sounds")

    def _make(self, fname: str) -> dict[str, Any]:
        log_mel, recipe = self.source.log_mel(fname), self.source.recipe
        item: dict[str, Any] = {"picture": "", "sound": "", "bytes": 0, "seconds": 0, "windows": [], "told": ""}
        if log_mel is not None:
            frames = len(log_mel)
            item["picture"] = embed_spectrogram(log_mel)
            item["windows"] = [[round(a, 4), round(b, 4)] for a, b in window_shares(frames, recipe)]
            item["told"] = describe_windows(frames, recipe)
            item["seconds"] = round(frames * recipe.logmel.hop_length / recipe.logmel.sr, 2)
        if self.source.audio and fname in self.source.paths:
            try:
                sound = embed_sound(self.source.paths[fname])
            except (MelfoldError, OSError):
                return item
            item |= {"sound": sound.uri, "bytes": sound.bytes, "seconds": round(sound.seconds, 2)}
        return item

    @property
    def told(self) -> str:
        """How many sounds there are and how large they are, in words."""
        sizes = [item["bytes"] for item in self.items if item["bytes"]]
        if not sizes:
            return "This page has no sounds."
        mean, total = np.mean(sizes) / 1000, sum(sizes) / 1e6
        return f"{len(sizes)} sounds, mono Ogg Opus: {mean:.0f} kB per clip, {total:.1f} MB in all."


def predictions_of(fname: str, targets: pd.DataFrame, probs: Probs, top: int = TOP) -> list[dict[str, Any]]:
    """The top predictions of a clip and all of its true labels, the likeliest first: `label prob rank true`."""
    values, truth = probs.loc[fname].to_numpy(), targets.loc[fname].to_numpy() > 0
    order = np.argsort(-values, kind="stable")
    rank = np.empty(len(values), int)
    rank[order] = np.arange(1, len(values) + 1)
    shown = [at for at in order if rank[at] <= top or truth[at]]
    return [
        {"label": probs.columns[at], "prob": float(values[at]), "rank": int(rank[at]), "true": bool(truth[at])} for at in shown
    ]


def card(fname: str, media: Media, fold: int, targets: pd.DataFrame, tables: Sequence[Probs]) -> dict[str, Any]:
    """A clip as the templates take it; `sides` are its predictions by each of `tables`."""
    seconds, flags = media.source.facts(fname)
    return {
        "fname": fname,
        "media": media.number(fname),
        "fold": fold,
        "seconds": seconds,
        "flags": flags,
        "labels": [label for label, own in targets.loc[fname].items() if own],
        "sides": [predictions_of(fname, targets, probs) for probs in tables],
    }

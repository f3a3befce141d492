"""A small competition, its cache made once, and runs that train in less than a second."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from melfold.config import Recipe
from melfold.data.cache import cache_folder
from melfold.data.clips import ClipStore
from melfold.data.competition import Competition
from melfold.data.folds import fold_table_path
from melfold.files import Home
from melfold.learn.devices import Device
from melfold.learn.runs import Run
from melfold.learn.start import start_run
from melfold.recipes import load_recipe

TINY = (
    "logmel.n_fft=256",
    "logmel.hop_length=320",
    "logmel.n_mels=32",
    "model.kwargs={depths=[1, 1, 1, 1], dims=[8, 16, 16, 16]}",
    "train.epochs=0.9",  # 6 steps of 16 clips
    "train.crop_seconds=0.64",
    "train.warmup_epochs=0.2",
    "train.validate_every=0",
    "model.drop_rate=0.1",
)


@dataclass(frozen=True)
class World:
    """The demo's competition in a home with its log-mels and fold table."""

    competition: Competition
    home: Home
    device: Device

    def recipe(self, *sets: str) -> Recipe:
        """The demo's recipe, made tiny, with changes."""
        return load_recipe("demo", [*TINY, *sets])

    @property
    def cache(self) -> Path:
        """The log-mels of every such recipe."""
        return cache_folder(self.home, self.competition.name, self.recipe().logmel)

    @property
    def folds(self) -> Path:
        """The fold table."""
        return fold_table_path(self.home, self.competition.name, self.recipe().folds)

    def start(self, root: Path, *sets: str, name: str = "tiny") -> Run:
        """An untrained run in a home of its own."""
        return start_run(Home(root), name, self.recipe(*sets), self.competition, self.folds)

    def store(self, fnames: list[str]) -> ClipStore:
        """Cached clips."""
        config = self.recipe().logmel
        return ClipStore(self.cache, fnames, config.n_mels, config.top_db)


def relabelled(competition: Competition, fnames: list[str]) -> Competition:
    """The same clips, those named with other labels."""
    curated = competition.curated.copy()
    for fname in fnames:
        old = curated.at[fname, "labels"]
        curated.at[fname, "labels"] = tuple(label for label in competition.labels if label not in old)[:2]
    return replace(competition, curated=curated)

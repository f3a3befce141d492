"""The recordings and competitions that benchmarks work on, in a temporary folder."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import scipy.signal
import soundfile

from melfold.config import LogMelConfig
from melfold.data.cache import build_cache
from melfold.data.competition import Competition, load_competition
from melfold.files import Home
from melfold.recipes import load_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY.parent / "shared" / "data" / "esc10"


class Workspace:
    """A temporary folder and what lies in it, each part made when it is first asked for."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder = folder
        self.quick = quick

    def pick(self, full: int, quick: int) -> int:
        """A size."""
        return quick if self.quick else full

    @cached_property
    def front(self) -> LogMelConfig:
        """The front-end of recipe `open`."""
        return load_recipe("imagenet").logmel

    @cached_property
    def wavs(self) -> list[Path]:
        """44.1 kHz 16-bit mono recordings: decoded real ones, or synthetic ones."""
        folder, count = self.folder / "wavs", self.pick(60, 6)
        real = sorted(REAL.glob("t*/*.ogg"), key=lambda p: p.name)[:count]
        return decode(real, folder) if len(real) == count else synthesise(folder, count, 1.0, 15.0)

    @property
    def source(self) -> str:
        """Where the recordings come from."""
        return "decoded esc10" if REAL.is_dir() else "synthetic"

    @cached_property
    def seconds(self) -> float:
        """Of all recordings together."""
        return sum(soundfile.info(p).duration for p in self.wavs)

    @cached_property
    def competition(self) -> Competition:
        """A competition of the recordings, a tenth of them its test clips."""
        test = max(1, len(self.wavs) // 10)
        return write_competition(self.folder / "recordings", self.wavs, len(self.wavs) - test, test)

    @cached_property
    def home(self) -> Home:
        """The home of `competition`."""
        return Home(self.folder / "home")

    @cached_property
    def cache(self) -> Path:
        """The log-mels of `competition` under `front`."""
        return build_cache(self.competition, self.front, self.home)


def decode(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Write wav copies of recordings."""
    folder.mkdir()
    copies = []
    for path in paths:
        samples, rate = soundfile.read(path, dtype="float32")
        copies.append(folder / f"{path.stem}.wav")
        soundfile.write(copies[-1], samples, rate, subtype="PCM_16")
    return copies


def synthesise(folder: Path, count: int, shortest: float, longest: float, sr: int = 44_100) -> list[Path]:
    """Write clips of coloured noise and a few swelling tones; lengths in seconds, their mean below the middle."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        t = np.arange(int((shortest + (longest - shortest) * rng.beta(1.5, 2)) * sr)) / sr
        samples = scipy.signal.lfilter([1], [1, -rng.uniform(0, 0.98)], rng.standard_normal(len(t)))
        for hz in rng.uniform(80, sr / 4, 4):
            samples += 3 * np.sin(2 * np.pi * hz * t) * np.sin(np.pi * t * rng.uniform(0.2, 4)) ** 2
        paths.append(folder / f"{number:04d}.wav")
        soundfile.write(paths[-1], 0.5 * samples / np.abs(samples).max(), sr, subtype="PCM_16")
    return paths


def write_competition(root: Path, wavs: Sequence[Path], curated: int, test: int, labels: int = 10) -> Competition:
    """Write a competition in Kaggle's layout from copies of wavs, which recur where they are too few."""
    names = [f"{number:08x}.wav" for number in range(curated + test)]
    for folder in ("train_curated", "test"):
        (root / folder).mkdir(parents=True)
    for number, name in enumerate(names):
        shutil.copyfile(wavs[number % len(wavs)], root / ("train_curated" if number < curated else "test") / name)
    vocabulary = [f"label_{number}" for number in range(labels)]
    rows = [(name, _labels(number, vocabulary)) for number, name in enumerate(names[:curated])]
    _write_table(root / "train_curated.csv", [("fname", "labels"), *rows])
    _write_table(root / "sample_submission.csv", [("fname", *vocabulary), *[(n, *[0] * labels) for n in names[curated:]]])
    return load_competition(root)


def _labels(number: int, vocabulary: list[str]) -> str:
    """One label, and for each seventh clip a second one."""
    own = {vocabulary[number % len(vocabulary)]}
    if number % 7 == 0:
        own.add(vocabulary[(number + 3) % len(vocabulary)])
    return ",".join(sorted(own))


def _write_table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)

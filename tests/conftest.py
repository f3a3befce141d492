"""Fixtures for all layers: the real data where it is present, and tiny competitions made on the spot."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import settings

# For torch, which reads it when it is imported: tiny models are fastest so, and give the same bytes in every process.
os.environ["OMP_NUM_THREADS"] = "1"

# A shared machine is no reason to fail, and a failure in CI must fail here too.
settings.register_profile("melfold", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("melfold")

REPO = Path(__file__).resolve().parents[1]
LABELS = ("Bark", "Hiss_(air)", "Tone")

LONGEST = (
    "kaggle/test_submit",
    "kaggle/test_training",
    "test_road",
    "learn/test_launch",
    "kaggle/test_ship",
    "kaggle/test_client",
    "kaggle/test_kernels",
    "report/test_browser",
    "learn/test_cluster",
    "learn/test_train",
    "data/test_cache",
    "report/test_pages",
    "kaggle/test_fake_kaggle",
    "kaggle/test_push",
    "kaggle/test_schedules",
    "learn/test_placement",
    "learn/test_predictions",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that several workers end together."""
    files = [REPO / f"tests/{name}.py" for name in LONGEST]
    items.sort(key=lambda item: files.index(item.path) if item.path in files else len(files))


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real material beside the checkout."""
    return _there(REPO.parent / "shared" / "data")


@pytest.fixture(scope="session")
def esc10(shared: Path) -> Path:
    """400 real recordings in Kaggle's layout (Ogg Vorbis, 44.1 kHz mono)."""
    return _there(shared / "esc10")


@pytest.fixture(scope="session")
def fsdkaggle2019(shared: Path) -> Path:
    """The real competition's tables, without audio."""
    return _there(shared / "fsdkaggle2019")


def _there(path: Path) -> Path:
    if not path.is_dir():
        pytest.skip(f"needs the shared material, which is not at {path}")
    return path


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A CSV as the competition has it: a field with commas is quoted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def write_wav(path: Path, samples: np.ndarray, sr: int = 16_000) -> Path:
    """16-bit PCM; samples `(n,)` or `(n, channels)` in -1..1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, sr, subtype="PCM_16")
    return path


def draw_sound(label: str, seconds: float, sr: int, rng: np.random.Generator) -> np.ndarray:
    """A sound that shows its label: bursts, noise or a tone, at about a tenth of full scale."""
    t = np.arange(max(1, int(seconds * sr))) / sr
    noise = 0.1 * rng.standard_normal(len(t))
    if label == "Tone":
        return 0.1 * np.sin(2 * np.pi * rng.uniform(300, 3000) * t) + 0.01 * noise
    return noise * (np.sin(2 * np.pi * 8 * t) > 0) if label == "Bark" else noise


@dataclass(frozen=True)
class _Clip:
    fname: str
    labels: tuple[str, ...]


def _draw_clips(split: str, count: int, labels: Sequence[str], folder: Path, seconds: float, sr: int, seed: int) -> list[_Clip]:
    rng = np.random.default_rng([seed, len(split)])
    clips = []
    for i in range(count):
        own = (labels[i % len(labels)],) if i % 4 != 3 else (labels[i % len(labels)], labels[(i + 1) % len(labels)])
        clips.append(_Clip(f"{split}{i:04d}.wav", own))
        length = seconds * (0.5 + rng.random())
        write_wav(folder / clips[-1].fname, sum(draw_sound(label, length, sr, rng) for label in own), sr)
    return clips


Maker = Callable[..., Path]
"""make(name="tiny", *, curated=8, noisy=3, test=4, labels=LABELS, seconds=0.3, sr=16_000, seed=0) -> its root."""


@pytest.fixture
def tiny_download(tmp_path: Path) -> Maker:
    """Makes a small valid download in Kaggle's layout under `tmp_path`; every fourth clip holds two labels."""

    def make(
        name: str = "tiny",
        *,
        curated: int = 8,
        noisy: int = 3,
        test: int = 4,
        labels: Sequence[str] = LABELS,
        seconds: float = 0.3,
        sr: int = 16_000,
        seed: int = 0,
    ) -> Path:
        root = tmp_path / name
        for split, table, count in (("c", "train_curated", curated), ("n", "train_noisy", noisy), ("t", "test", test)):
            if not count:
                continue
            clips = _draw_clips(split, count, labels, root / table, seconds, sr, seed)
            if split == "t":
                write_table(root / "sample_submission.csv", ["fname", *labels], [(c.fname, *[0] * len(labels)) for c in clips])
                truth = [(c.fname, ",".join(c.labels), "Public" if i % 2 else "Private") for i, c in enumerate(clips)]
                write_table(root / "test_post_competition.csv", ["fname", "labels", "usage"], truth)
            else:
                write_table(root / f"{table}.csv", ["fname", "labels"], [(c.fname, ",".join(c.labels)) for c in clips])
        return root

    return make


@pytest.fixture
def tiny_zenodo(tmp_path: Path) -> Maker:
    """As `tiny_download`, in Zenodo's layout; the test table is in reverse order."""

    def make(
        name: str = "tiny_zenodo",
        *,
        curated: int = 8,
        noisy: int = 3,
        test: int = 4,
        labels: Sequence[str] = LABELS,
        seconds: float = 0.3,
        sr: int = 16_000,
        seed: int = 0,
    ) -> Path:
        root = tmp_path / name
        meta = root / "FSDKaggle2019.meta"
        write_table(meta / "vocabulary.csv", ["0", labels[0]], [(i, label) for i, label in enumerate(labels) if i])
        for split, table, count in (("c", "train_curated", curated), ("n", "train_noisy", noisy), ("t", "test", test)):
            clips = _draw_clips(split, count, labels, root / f"FSDKaggle2019.audio_{table}", seconds, sr, seed)
            extra = ["usage"] if split == "t" else []
            rows = [
                (c.fname, ",".join(c.labels), *(["Public" if i % 2 else "Private"] if extra else []), str(i), "CC-BY")
                for i, c in enumerate(clips)
            ]
            header = ["fname", "labels", *extra, "freesound_id", "license"]
            write_table(meta / f"{table}_post_competition.csv", header, rows[::-1] if extra else rows)
        return root

    return make

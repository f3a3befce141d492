"""A synthetic competition, small enough to try every stage in minutes. Layout, tables and quirks are as in the real one."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import scipy.signal

from melfold.errors import MelfoldError
from melfold.facts import join_labels
from melfold.files import atomic_path, write_text

SR = 16_000
CURATED, NOISY, TEST = 150, 60, 60
_DONE = "README.txt"  # written last

Sound = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(times in seconds, generator) -> samples of about unit power."""


def _tone(t: np.ndarray, hz: float | np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(hz, t.shape)) / SR)


def _bell(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    base, strikes = rng.uniform(500, 900), np.arange(0, t[-1], rng.uniform(0.5, 0.8))
    ring = sum(_tone(t, base * r) / (i + 1) for i, r in enumerate((1, 2.76, 5.4)))
    return ring * sum(np.where(t >= s, np.exp(-6 * (t - s)), 0) for s in strikes)


def _clicks(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    phase = (t * rng.uniform(6, 12)) % 1
    return rng.standard_normal(len(t)) * (phase < 0.04) * 3


def _filtered(samples: np.ndarray, order: int, hz: float, kind: str) -> np.ndarray:
    return scipy.signal.sosfilt(scipy.signal.butter(order, hz, kind, fs=SR, output="sos"), samples)


SOUNDS: dict[str, Sound] = {
    "Bell": _bell,
    "Buzz": lambda t, rng: scipy.signal.sawtooth(2 * np.pi * rng.uniform(90, 180) * t),
    "Clicks_(fast)": _clicks,
    "Falling_sweep": lambda t, rng: _tone(t, 600 * 2 ** (3 - 3 * ((t * rng.uniform(1.5, 2.5)) % 1))),
    "Hiss": lambda t, rng: _filtered(rng.standard_normal(len(t)), 4, 3000, "high"),
    "Rising_sweep": lambda t, rng: _tone(t, 600 * 2 ** (3 * ((t * rng.uniform(1.5, 2.5)) % 1))),
    "Rumble": lambda t, rng: 4 * _filtered(rng.standard_normal(len(t)), 4, 250, "low"),
    "Siren": lambda t, rng: _tone(t, rng.uniform(1200, 1600) * 2 ** (0.5 * np.sin(2 * np.pi * rng.uniform(3, 5) * t))),
    "Tremolo": lambda t, rng: _tone(t, rng.uniform(300, 450)) * (np.sin(2 * np.pi * rng.uniform(7, 10) * t) > 0),
    "Whistle": lambda t, rng: _tone(t, rng.uniform(2500, 3500)),
}


def write_demo(root: Path) -> Path:
    """Write the synthetic competition in Kaggle's layout: the same bytes each time.

    `test_post_competition.csv` holds the labels of the test clips, for scoring only. A complete folder is left as it is.

    Raises:
        MelfoldError: the folder holds something else.
    """
    if (root / _DONE).exists():
        return root
    others = root.exists() and any(not path.name.startswith(".") for path in root.iterdir())
    if others and not (root / "sample_submission.csv").exists():
        raise MelfoldError("the folder for the demo holds something else", str(root), "Choose another --home")
    rng = np.random.default_rng(0)
    names = [f"{n:08x}.wav" for n in rng.choice(2**32, CURATED + NOISY + TEST, replace=False)]
    curated = [(name, _draw_labels(i, rng, 0.15)) for i, name in enumerate(names[:CURATED])]
    noisy = [(name, _draw_labels(i, rng, 0.1)) for i, name in enumerate(names[CURATED : CURATED + NOISY])]
    test = [(name, _draw_labels(i, rng, 0.3)) for i, name in enumerate(sorted(names[CURATED + NOISY :]))]
    # First: it says that this folder is the demo's, if the rest is not finished.
    _write_table(root / "sample_submission.csv", ["fname", *SOUNDS], [(n, *[0] * len(SOUNDS)) for n, _ in test])
    for folder, rows in (("train_curated", curated), ("train_noisy", noisy), ("test", test)):
        for name, labels in rows:
            _write_wav(root / folder / name, _mix(labels, rng, dull=folder == "train_noisy"))
    wrong = [(name, labels if rng.random() < 0.6 else _draw_labels(int(rng.integers(99)), rng, 0)) for name, labels in noisy]
    _write_table(root / "train_curated.csv", ["fname", "labels"], [(n, join_labels(ls)) for n, ls in curated])
    _write_table(root / "train_noisy.csv", ["fname", "labels"], [(n, join_labels(ls)) for n, ls in wrong])
    truth = [(n, join_labels(ls), "Public" if rng.random() < 0.25 else "Private") for n, ls in test]
    _write_table(root / "test_post_competition.csv", ["fname", "labels", "usage"], truth)
    write_text(root / _DONE, "A synthetic competition made by `melfold demo`: not real recordings.\n")
    return root


def _draw_labels(number: int, rng: np.random.Generator, two: float) -> tuple[str, ...]:
    labels = list(SOUNDS)
    first = labels[number % len(labels)]
    if rng.random() >= two:
        return (first,)
    return tuple(sorted((first, str(rng.choice([x for x in labels if x != first])))))


def _mix(labels: tuple[str, ...], rng: np.random.Generator, *, dull: bool) -> np.ndarray:
    t = np.arange(int(rng.uniform(0.4, 3.0) * SR)) / SR
    parts = []
    for label in labels:
        sound = SOUNDS[label](t, rng)
        parts.append(sound / np.sqrt(np.square(sound).mean()) * 10 ** (rng.uniform(-3, 3) / 20))
    mixed = np.sum(parts, axis=0) + rng.standard_normal(len(t)) * 10 ** (rng.uniform(-40, -25) / 20)
    if dull:
        mixed = _filtered(mixed, 2, 3000, "low")
    return 0.1 * 10 ** (rng.uniform(-12, 6) / 20) * mixed


def _write_wav(path: Path, samples: np.ndarray) -> None:
    import soundfile

    with atomic_path(path, durable=False) as temporary:
        soundfile.write(temporary, np.clip(samples, -1, 1), SR, subtype="PCM_16", format="WAV")


def _write_table(path: Path, header: list[str], rows: Sequence[tuple[object, ...]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])

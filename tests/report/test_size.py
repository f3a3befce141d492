"""Pages of a competition of FAT2019's size: small enough to mail, made in seconds, shown at once."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from browser import Browser
from report_world import made_run

from melfold.artefacts import Artefact
from melfold.data.arrays import make_clip, npy_path
from melfold.data.cache import cache_folder
from melfold.data.competition import Competition
from melfold.data.logmel import log_mel_of
from melfold.files import Home
from melfold.learn.predictions import Prediction, own_prediction
from melfold.report.media import Media
from melfold.report.review_page import write_review_page
from melfold.report.run_page import write_run_page

pytestmark = pytest.mark.soak

CLIPS, LABELS, FILES, SR = 4970, 80, 24, 44_100
FRONT_END = ("logmel.sr=44100", "logmel.n_fft=2048", "logmel.hop_length=441", "logmel.n_mels=128", "logmel.fmax=22050.0")
FOLDS = ("folds.n_folds=5", "folds.groups=none")  # all clips share a few files


@dataclass(frozen=True)
class Large:
    """A home of FAT2019's size with one run: `clips` share some synthetic recordings of 0.3 to 30 s, 7.6 s on average."""

    home: Home
    competition: Competition
    prediction: Prediction


def recordings(folder: Path) -> list[Path]:
    """Bursts of coloured noise over hum: harder for a codec than most recordings."""
    rng = np.random.default_rng(0)
    seconds = np.clip(rng.lognormal(1.65, 0.9, FILES), 0.3, 30)
    seconds *= 7.6 / seconds.mean()
    folder.mkdir(parents=True)
    paths = []
    for number, length in enumerate(np.minimum(seconds, 30)):
        t = np.arange(int(length * SR)) / SR
        noise = np.convolve(rng.standard_normal(len(t)), np.ones(1 + number % 5), "same")
        sound = 0.05 * noise * (1 + np.sin(2 * np.pi * rng.uniform(0.5, 4) * t)) + 0.1 * np.sin(
            2 * np.pi * 110 * (1 + number) * t
        )
        paths.append(folder / f"{number}.wav")
        soundfile.write(paths[-1], np.clip(sound, -1, 1), SR, subtype="PCM_16")
    return paths


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    root = tmp_path_factory.mktemp("large")
    paths, rng = recordings(root / "audio"), np.random.default_rng(1)
    labels = tuple(f"Label_number_{n:02d}_(of_some_length)" for n in range(LABELS))
    counts = rng.choice([1, 2, 3], CLIPS, p=[0.86, 0.11, 0.03])
    own = [tuple(dict.fromkeys([labels[i % LABELS], *rng.choice(labels, c - 1)])) for i, c in enumerate(counts)]
    fnames = pd.Index([f"{n:08x}.wav" for n in range(CLIPS)], name="fname")
    table = pd.DataFrame({"labels": pd.Series(own, index=fnames, dtype=object), "path": [paths[n % FILES] for n in range(CLIPS)]})
    empty = table.iloc[:0]
    competition, home = Competition("large", root, labels, table, empty, empty), Home(root)
    run = made_run(home, "large", competition, *FRONT_END, *FOLDS, skill=3.0)
    folder = cache_folder(home, competition.name, run.recipe.logmel)
    folder.mkdir(parents=True)
    infos = [make_clip(folder, f, table.at[f, "path"], log_mel_of(run.recipe.logmel)) for f in fnames[:FILES]]
    for number, fname in enumerate(fnames[FILES:], FILES):
        os.link(npy_path(folder, fnames[number % FILES]), npy_path(folder, fname))
    rows = [asdict(infos[number % FILES]) | {"fname": fname} for number, fname in enumerate(fnames)]
    pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)
    Artefact.of(folder / "manifest.csv").commit({})
    return Large(home, competition, own_prediction(run))


@pytest.fixture(scope="module")
def page(large: Large) -> tuple[Path, Media, float]:
    """The run's page without sounds, what is embedded in it, and the CPU seconds it took."""
    path, began = large.home.reports / "large.html", time.process_time()
    media = write_run_page([large.prediction], path, competition=large.competition, audio=False)
    return path, media, time.process_time() - began


def test_a_page_of_fat2019s_size_is_small_and_soon_made(page: tuple[Path, Media, float]) -> None:
    path, media, seconds = page
    assert seconds < 15 * 2  # two cores, however busy the machine is
    assert path.stat().st_size < 2e6
    assert len(media.items) > 2 * LABELS
    assert all(item["picture"] and not item["sound"] for item in media.items)


def test_a_page_of_fat2019s_size_is_painted_at_once(page: tuple[Path, Media, float], browser: Browser) -> None:
    browser.open(page[0])
    paint = "return performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)"
    browser.wait(lambda: browser.run(paint))
    assert browser.run(paint)[0] < 3000
    assert browser.messages() == []


def test_a_review_with_sound_can_be_mailed(large: Large) -> None:
    path = large.home.reports / "review.html"
    media = write_review_page(large.prediction, path, count=25, competition=large.competition)
    assert len(media.items) == 25
    assert all(item["picture"] and item["sound"] for item in media.items)
    assert np.mean([item["seconds"] for item in media.items]) > 5
    assert path.stat().st_size < 12e6 / 4, "a hundred clips are to take less than 12 MB"

"""Pictures of clips."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import librosa
import numpy as np
import pytest
from report_world import made_competition, made_run

from melfold.compute import Compute
from melfold.config import LogMelConfig, Recipe
from melfold.data.arrays import npy_path
from melfold.data.cache import build_cache
from melfold.data.competition import Competition, load_competition
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.learn.predictions import own_prediction
from melfold.recipes import load_recipe
from melfold.report.clips import draw_clips
from melfold.report.pictures import band_of


@pytest.fixture
def competition(tiny_download: Callable[..., Path]) -> Competition:
    return load_competition(tiny_download())


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("demo")


def size(png: Path) -> tuple[int, int]:
    """Width and height, in pixels, from the PNG's first chunk."""
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content[12:16] == b"IHDR"
    return struct.unpack(">II", content[16:24])


def test_a_picture_of_clips_of_every_split_is_a_png(competition: Competition, recipe: Recipe, tmp_path: Path) -> None:
    fnames = [competition.split(split).index[0] for split in ("curated", "noisy", "test")]
    draw_clips(competition, fnames[:1], recipe, tmp_path / "one.png", Home(tmp_path))
    draw_clips(competition, fnames, recipe, tmp_path / "sub" / "three.png", Home(tmp_path))
    one, three = size(tmp_path / "one.png"), size(tmp_path / "sub" / "three.png")
    assert one[0] == three[0] > 1000
    assert three[1] > 2 * one[1] > 400
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert not list(tmp_path.rglob(".*"))


def test_another_sound_is_another_picture(competition: Competition, recipe: Recipe, tmp_path: Path) -> None:
    for number, fname in enumerate(competition.curated.index[:2]):
        draw_clips(competition, [fname], recipe, tmp_path / f"{number}.png", Home(tmp_path))
    draw_clips(competition, [competition.curated.index[0]], recipe, tmp_path / "again.png", Home(tmp_path))
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


def test_a_cached_log_mel_is_drawn_unless_its_audio_changed(competition: Competition, recipe: Recipe, tmp_path: Path) -> None:
    home, fname = Home(tmp_path / "home"), competition.curated.index[0]
    array = npy_path(build_cache(competition, recipe.logmel, home, compute=Compute(jobs=1)), fname)
    pictures = []

    def draw() -> bytes:
        path = tmp_path / f"{len(pictures)}.png"
        draw_clips(competition, [fname], recipe, path, home)
        pictures.append(path.read_bytes())
        return pictures[-1]

    first = draw()
    np.save(array, np.full_like(np.load(array), -30))
    assert draw() != first
    competition.curated.at[fname, "path"].touch()
    assert draw() not in pictures[1:-1]


@pytest.mark.parametrize("config", [LogMelConfig(), LogMelConfig(sr=16_000, fmin=300, fmax=8000, n_mels=40, htk=True)])
def test_frequencies_are_at_the_centres_of_librosas_bands(config: LogMelConfig) -> None:
    centres = librosa.mel_frequencies(config.n_mels + 2, fmin=config.fmin, fmax=config.fmax, htk=config.htk)[1:-1]
    np.testing.assert_allclose([band_of(hz, config) for hz in centres], np.arange(config.n_mels), atol=1e-6)


def test_an_unknown_or_unreadable_clip_is_refused_and_nothing_is_written(
    competition: Competition, recipe: Recipe, tmp_path: Path
) -> None:
    known = competition.curated.index[0]
    with pytest.raises(MelfoldError, match=f"no such clip: nosuch.wav. Names look like {known}"):
        draw_clips(competition, [known, "nosuch.wav"], recipe, tmp_path / "clips.png", Home(tmp_path))
    competition.curated.at[known, "path"].write_bytes(b"not audio")
    with pytest.raises(MelfoldError, match=f"unreadable audio: {known}"):
        draw_clips(competition, [known], recipe, tmp_path / "clips.png", Home(tmp_path))
    assert not (tmp_path / "clips.png").exists()


def test_a_jpeg_is_written_where_a_jpeg_is_asked_for_and_other_kinds_are_refused(
    competition: Competition, recipe: Recipe, tmp_path: Path
) -> None:
    fnames = list(competition.curated.index[:1])
    draw_clips(competition, fnames, recipe, tmp_path / "clips.JPG", Home(tmp_path))
    assert (tmp_path / "clips.JPG").read_bytes().startswith(b"\xff\xd8\xff")
    with pytest.raises(MelfoldError, match="a picture is a PNG or a JPEG: clips.gif. Use -o clips.png"):
        draw_clips(competition, fnames, recipe, tmp_path / "clips.gif", Home(tmp_path))
    assert [path.name for path in tmp_path.glob("clips*")] == ["clips.JPG"]


def test_predictions_of_a_run_are_drawn_beside_a_clip(tmp_path: Path) -> None:
    competition, home = made_competition(tmp_path / "data", clips=24), Home(tmp_path)
    run = made_run(home, "drawn", competition)
    fnames = list(competition.curated.index[:1])
    draw_clips(competition, fnames, run.recipe, tmp_path / "without.png", Home(tmp_path))
    draw_clips(competition, fnames, run.recipe, tmp_path / "with.png", Home(tmp_path), prediction=own_prediction(run))
    assert size(tmp_path / "with.png")[0] > size(tmp_path / "without.png")[0]
    with pytest.raises(MelfoldError, match="drawn has no current test predictions"):
        draw_clips(
            competition, ["test0000.wav"], run.recipe, tmp_path / "test.png", Home(tmp_path), prediction=own_prediction(run)
        )
    assert not (tmp_path / "test.png").exists()

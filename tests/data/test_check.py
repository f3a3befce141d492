"""Checking a download before any long work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from melfold.compute import Compute
from melfold.data.check import check
from melfold.data.competition import load_competition
from melfold.data.folds import fold_table
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.recipes import load_recipe

Maker = Callable[..., Path]
RECIPE = load_recipe("demo", ["folds.n_folds=2", "folds.groups=none"])


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_a_good_download_is_described_split_by_split(tiny_download: Maker, home: Home) -> None:
    steps: list[tuple[int, int, str]] = []
    checked = check(tiny_download(), home, RECIPE, Compute(progress=lambda *step: steps.append(step)))
    assert checked.notes == []
    assert list(checked.splits.index) == ["curated", "noisy", "test"]
    assert list(checked.splits["clips"]) == [8, 3, 4]
    assert list(checked.splits["multi-label"]) == [2, 0, None]
    assert set(checked.splits["audio"]) == {"16000 Hz, 1 ch, WAV PCM_16"}
    assert 0.15 <= checked.splits.at["curated", "shortest s"] <= checked.splits.at["curated", "longest s"] <= 0.45
    assert steps == [(i, 15, "reading headers") for i in range(1, 16)]
    assert not home.root.exists(), "a check writes nothing"


def test_every_unreadable_file_has_a_line(tiny_download: Maker, home: Home) -> None:
    root = tiny_download()
    (root / "train_curated/c0001.wav").write_bytes(b"no audio")
    (root / "train_noisy/n0000.wav").write_bytes((root / "train_noisy/n0000.wav").read_bytes()[:3000])
    soundfile.write(root / "test/t0002.wav", [], 16_000)
    with pytest.raises(MelfoldError) as caught:
        check(root, home, RECIPE)
    curated, noisy, test = caught.value.lines
    assert curated.startswith("curated: unreadable audio: c0001.wav (")
    assert noisy.startswith("noisy: unreadable audio: n0000.wav (cut short: 3,000 of ")
    assert test == "test: unreadable audio: t0002.wav (no samples). Download it again"


def test_a_clip_that_the_recipe_leaves_out_need_not_be_readable(tiny_download: Maker, home: Home) -> None:
    root = tiny_download(noisy=0)
    (root / "train_curated/c0001.wav").write_bytes(b"no audio")
    recipe = load_recipe("demo", ["data.exclude.'c0001.wav'=broken", "data.exclude.'x.wav'=elsewhere"])
    assert check(root, home, recipe).notes == [
        "no noisy clips in this download; recipes that use them cannot run",
        "c0001.wav is left out by recipe demo: broken",
    ]


def test_identical_clips_are_named_with_their_folds(tiny_download: Maker, home: Home) -> None:
    root = tiny_download()
    competition = load_competition(root)
    path, _ = fold_table(competition, home, RECIPE.folds)
    folds = dict(line.split(",") for line in path.read_text().splitlines()[1:])
    zero = min(fname for fname, fold in folds.items() if fold == "0")
    one, other = sorted(fname for fname, fold in folds.items() if fold == "1")[:2]

    def notes(first: str, second: str) -> list[str]:
        shutil.copyfile(root / "train_curated" / first, root / "train_curated" / second)
        return check(root, home, RECIPE).notes

    assert notes(one, other) == [f"identical audio: {one}, {other} (fold 1)"]
    (found,) = notes(one, zero)
    names = ", ".join(sorted([zero, one, other]))
    assert found == f"identical audio: {names} (fold 0, 1: `melfold folds --groups identical` keeps them together)"


def test_labels_that_no_table_can_spread_evenly_are_named(tiny_download: Maker, home: Home) -> None:
    competition = load_competition(root := tiny_download())
    home.folds.mkdir(parents=True)
    own = [fname for fname, labels in competition.curated["labels"].items() if "Bark" in labels]
    (home.folds / "tiny_groups.csv").write_text("fname,group\n" + "".join(f"{fname},x\n" for fname in own))
    recipe = load_recipe("demo", ["folds.n_folds=2"])
    fold_table(competition, home, recipe.folds)
    (note,) = check(root, home, recipe).notes
    assert note.startswith("tiny_curated_2fold_grouped_seed42.csv: Folds of ")
    assert f"more clips in one group than fit a fold: Bark {len(own)} of {len(own)}" in note

"""Fold tables: even, repeatable, and held against the clips they are about."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from melfold.data.competition import Competition, load_competition, multi_hot
from melfold.data.folds import find_identical, fold_table_name, label_deviation, make_folds, read_folds, write_folds
from melfold.errors import MelfoldError

Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def real_targets(fsdkaggle2019: Path) -> pd.DataFrame:
    """The 4,970 real curated clips, `(clips, 80)`."""
    with (fsdkaggle2019 / "vocabulary.csv").open(newline="") as file:
        labels = [row[-1] for row in csv.reader(file)]
    table = pd.read_csv(fsdkaggle2019 / "train_curated_post_competition.csv", dtype=str, index_col="fname")
    return multi_hot(table["labels"].str.split(",").map(tuple), labels)


def targets_of(n: int, n_labels: int = 4, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    values = np.eye(n_labels, dtype=np.float32)[rng.integers(0, n_labels, n)]
    values[rng.random(n) < 0.2, 0] = 1
    return pd.DataFrame(values, [f"{i:04x}.wav" for i in rng.permutation(n)], [f"L{j}" for j in range(n_labels)])


@given(st.integers(10, 60), st.integers(2, 5), st.integers(0, 2**31), st.randoms())
def test_a_table_depends_on_clips_labels_and_seed_alone(n: int, n_folds: int, seed: int, random: object) -> None:
    targets = targets_of(n)
    order = list(targets.index)
    random.shuffle(order)  # type: ignore[attr-defined]
    one, other = make_folds(targets, n_folds, seed), make_folds(targets.loc[order], n_folds, seed)
    pd.testing.assert_frame_equal(one, other)
    assert list(one.index) == sorted(order)
    assert set(one["fold"]) == set(range(n_folds))


def test_another_seed_gives_another_table() -> None:
    targets = targets_of(60)
    assert not make_folds(targets, 5, 0).equals(make_folds(targets, 5, 1))


def test_the_real_clips_are_spread_evenly(real_targets: pd.DataFrame) -> None:
    assert real_targets.shape == (4970, 80)
    assert label_deviation(real_targets, make_folds(real_targets, 5, 42)) <= 3
    shuffled = np.random.default_rng(0).permutation(4970) % 5
    assert label_deviation(real_targets, pd.DataFrame({"fold": shuffled}, real_targets.index)) > 3


def test_the_committed_table_is_what_make_folds_gives(real_targets: pd.DataFrame, repo: Path, tmp_path: Path) -> None:
    name = fold_table_name("fat2019", 5, 42)
    assert name == "fat2019_curated_5fold_seed42.csv"
    write_folds(tmp_path / name, make_folds(real_targets, 5, 42))
    assert (repo / "folds" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_deviation_is_the_most_clips_off_an_even_split() -> None:
    targets = pd.DataFrame({"A": [1, 1, 1, 1], "B": [1, 0, 0, 0]}, list("abcd"))
    assert label_deviation(targets, pd.DataFrame({"fold": [0, 1, 0, 1]}, list("abcd"))) == 1  # B: 1 and 0, even is 0.5
    assert label_deviation(targets[["A"]], pd.DataFrame({"fold": [0, 1, 0, 1]}, list("abcd"))) == 0
    assert label_deviation(targets[["A"]], pd.DataFrame({"fold": [1, 0, 0, 0]}, list("dcba"))) == 1


def test_clips_of_a_group_stay_in_one_fold_and_the_rest_is_even() -> None:
    targets = targets_of(90)
    names = sorted(targets.index)
    groups = {name: i // 3 for i, name in enumerate(names[:30])}
    folds = make_folds(targets, 3, 0, groups)
    for start in range(0, 30, 3):
        assert folds.loc[names[start : start + 3], "fold"].nunique() == 1
    assert list(folds.index) == names
    assert folds["fold"].value_counts().min() >= 25


def test_the_grouped_table_has_a_name_of_its_own() -> None:
    assert fold_table_name("x", 3, 7, grouped=True) == "x_curated_3fold_seed7_grouped.csv" != fold_table_name("x", 3, 7)


def test_more_folds_than_clips_are_refused() -> None:
    with pytest.raises(MelfoldError, match="more folds than clips: 5 folds, 4 clips"):
        make_folds(targets_of(4), 5, 0)


def test_identical_audio_is_found_whatever_its_container(tiny_download: Maker) -> None:
    folder = tiny_download(curated=6) / "train_curated"
    samples, sr = soundfile.read(folder / "c0000.wav")
    for name, values, subtype in (
        ("c0002.wav", samples, "PCM_16"),
        ("c0004.wav", samples, "PCM_24"),
        ("c0003.wav", -samples, "PCM_16"),
    ):
        soundfile.write(folder / name, values, sr, subtype=subtype)
    (folder / "c0005.wav").write_bytes(b"broken")
    groups = find_identical({path.name: path for path in sorted(folder.iterdir())})
    assert groups == [["c0000.wav", "c0002.wav", "c0004.wav"]]


@pytest.fixture
def competition(tiny_download: Maker) -> Competition:
    return load_competition(tiny_download())


def test_a_table_comes_back_as_written(competition: Competition, tmp_path: Path) -> None:
    folds = make_folds(competition.targets(), 2, 0)
    write_folds(tmp_path / "f.csv", folds)
    pd.testing.assert_frame_equal(read_folds(tmp_path / "f.csv", competition), folds)
    assert (tmp_path / "f.csv").read_text().startswith("fname,fold\nc0000.wav,")


def test_a_standing_table_is_kept_and_never_overwritten(competition: Competition, tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    folds = make_folds(competition.targets(), 2, 0)
    write_folds(path, folds)
    before = path.stat().st_mtime_ns, path.read_bytes()
    write_folds(path, folds)
    with pytest.raises(MelfoldError, match="a different fold table stands there"):
        write_folds(path, 1 - folds)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


ROWS = "".join(f"c000{i}.wav,{i % 2}\n" for i in range(8))
REFUSED = {
    "empty": ("", "is no fold table"),
    "other columns": ("fname,split\n" + ROWS, "columns fname, split, not fname,fold"),
    "a word": ("fname,fold\n" + ROWS.replace(",1", ",one", 1), "is no fold table"),
    "a fraction": ("fname,fold\n" + ROWS.replace(",1", ",1.5", 1), "is no fold table"),
    "no number": ("fname,fold\n" + ROWS.replace(",1", ",", 1), "is no fold table"),
    "a clip missing": ("fname,fold\n" + ROWS.replace("c0003.wav,1\n", ""), r"1 differ, first c0003\.wav"),
    "a clip of elsewhere": ("fname,fold\n" + ROWS + "x.wav,0\n", r"1 differ, first x\.wav"),
    "a clip twice": ("fname,fold\n" + ROWS + "c0003.wav,0\n", r"1 differ, first c0003\.wav"),
    "a gap": ("fname,fold\n" + ROWS.replace(",1", ",2"), r"folds must be 0, 1, …: \[0, 2\]"),
    "from 1": ("fname,fold\n" + ROWS.replace(",1", ",2").replace(",0", ",1"), r"folds must be 0, 1, …: \[1, 2\]"),
    "one fold": ("fname,fold\n" + ROWS.replace(",1", ",0"), r"folds must be 0, 1, …: \[0\]"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_a_table_that_does_not_fit_is_refused(problem: str, competition: Competition, tmp_path: Path) -> None:
    text, said = REFUSED[problem]
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(MelfoldError, match=said):
        read_folds(tmp_path / "f.csv", competition)


def test_a_missing_table_is_told_with_its_stage(competition: Competition, tmp_path: Path) -> None:
    with pytest.raises(MelfoldError, match="no fold table: .*Run `melfold folds`"):
        read_folds(tmp_path / "f.csv", competition)


def test_a_table_saved_by_a_spreadsheet_is_read(competition: Competition, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_bytes(b"\xef\xbb\xbf" + ("fname,fold\n" + ROWS).replace("\n", "\r\n").encode())
    assert list(read_folds(tmp_path / "f.csv", competition)["fold"]) == [0, 1] * 4

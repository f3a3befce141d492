"""Fold tables: even, repeatable, and checked against the clips and against their stamps."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from melfold.config import FoldsConfig
from melfold.data.competition import Competition, load_competition, multi_hot
from melfold.data.folds import (
    balance_of,
    fold_inputs,
    fold_table,
    fold_table_path,
    make_folds,
    read_folds,
    write_folds,
)
from melfold.data.groups import find_identical, number_groups, read_groups
from melfold.errors import MelfoldError
from melfold.facts import split_labels
from melfold.files import Home, read_json

Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def real_labels(fsdkaggle2019: Path) -> pd.Series:
    """The labels of the 4,970 real curated clips."""
    table = pd.read_csv(fsdkaggle2019 / "train_curated_post_competition.csv", dtype=str, index_col="fname")
    return table["labels"].map(split_labels)


@pytest.fixture(scope="module")
def real_targets(real_labels: pd.Series, fsdkaggle2019: Path) -> pd.DataFrame:
    """The same, `(clips, 80)`."""
    with (fsdkaggle2019 / "vocabulary.csv").open(newline="") as file:
        labels = [row[-1] for row in csv.reader(file)]
    return multi_hot(real_labels, labels)


@pytest.fixture(scope="module")
def real_groups(repo: Path) -> pd.Series:
    """The committed groups of FAT2019's clips."""
    return read_groups(repo / "folds" / "fat2019_groups.csv")


def alone(folds: pd.DataFrame) -> pd.DataFrame:
    """A table in which no clip is in a group, as `read_folds` gives it."""
    return folds.assign(group=folds.index)


def targets_of(n: int, n_labels: int = 4, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    values = np.eye(n_labels, dtype=np.float32)[rng.integers(0, n_labels, n)]
    values[rng.random(n) < 0.2, 0] = 1
    return pd.DataFrame(values, [f"{i:04x}.wav" for i in rng.permutation(n)], [f"L{j}" for j in range(n_labels)])


@given(st.integers(10, 60), st.integers(2, 5), st.integers(0, 2**31), st.randoms())
def test_a_table_depends_only_on_clips_labels_and_seed(n: int, n_folds: int, seed: int, random: object) -> None:
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
    assert balance_of(real_targets, alone(make_folds(real_targets, 5, 42))).deviation <= 3
    shuffled = np.random.default_rng(0).permutation(4970) % 5
    assert balance_of(real_targets, alone(pd.DataFrame({"fold": shuffled}, real_targets.index))).deviation > 3


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_real_groups_stay_together_and_the_folds_are_even(seed: int, real_targets: pd.DataFrame, real_groups: pd.Series) -> None:
    folds = make_folds(real_targets, 5, seed, real_groups)
    assert folds["fold"].groupby(real_groups).nunique().max() == 1
    assert folds["group"].nunique() == real_groups.nunique() == 3187
    balance = balance_of(real_targets, folds)
    assert 991 <= balance.sizes[0] <= balance.sizes[1] <= 996
    assert balance.deviation <= 3
    assert balance.too_large["Gurgling"] == (40, 75)
    assert len(balance.too_large) == 12
    assert "Gurgling 40 of 75" in str(balance)


@pytest.mark.parametrize("groups", ["auto", "none"])
def test_the_committed_tables_and_stamps_are_what_the_kit_makes(
    groups: str, real_labels: pd.Series, real_targets: pd.DataFrame, real_groups: pd.Series, repo: Path, tmp_path: Path
) -> None:
    config = FoldsConfig(n_folds=5, seed=42, groups=groups)
    path = fold_table_path(Home(tmp_path), "fat2019", config)
    assert path.name == f"fat2019_curated_5fold_{'grouped_' if groups == 'auto' else ''}seed42.csv"
    own = real_groups if groups == "auto" else None
    write_folds(path, make_folds(real_targets, 5, 42, own), fold_inputs(real_labels, config, own))
    for made in (path, path.with_suffix(".json")):
        assert (repo / "folds" / made.name).read_bytes() == made.read_bytes()


def test_deviation_is_the_most_clips_off_an_even_split() -> None:
    targets = pd.DataFrame({"A": [1, 1, 1, 1], "B": [1, 0, 0, 0]}, list("abcd"))
    table = alone(pd.DataFrame({"fold": [0, 1, 0, 1]}, list("abcd")))
    assert balance_of(targets, table).deviation == 1  # B: 1 and 0, even is 0.5
    assert balance_of(targets[["A"]], table).deviation == 0
    assert balance_of(targets[["A"]], alone(pd.DataFrame({"fold": [1, 0, 0, 0]}, list("dcba")))).deviation == 1
    assert balance_of(targets[["A"]], table.assign(group=["x", "y", "x", "x"])).too_large == {"A": (3, 4)}


@given(st.integers(30, 90), st.integers(2, 4), st.integers(0, 2**31), st.randoms())
def test_clips_of_a_group_stay_in_one_fold_and_the_rest_is_even(n: int, n_folds: int, seed: int, random: object) -> None:
    targets = targets_of(n)
    names = sorted(targets.index)
    groups = pd.Series({name: i // 3 for i, name in enumerate(names[: n // 2])})
    folds = make_folds(targets, n_folds, seed, groups)
    assert folds["fold"].groupby(groups).nunique().max() == 1
    assert list(folds.index) == names
    assert np.ptp(folds["fold"].value_counts()) <= 3
    order = list(targets.index)
    random.shuffle(order)  # type: ignore[attr-defined]
    pd.testing.assert_frame_equal(folds, make_folds(targets.loc[order], n_folds, seed, groups))


def test_each_way_of_grouping_has_its_own_table() -> None:
    names = [
        fold_table_path(Home(Path()), "x", FoldsConfig(n_folds=3, seed=7, groups=groups)).name
        for groups in ("none", "auto", "identical", "some/mine.csv")
    ]
    kinds = ("", "grouped_", "identical_", "grouped_mine_")
    assert names == [f"x_curated_3fold_{kind}seed7.csv" for kind in kinds]


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
    pd.testing.assert_frame_equal(read_folds(tmp_path / "f.csv", competition), alone(folds))
    assert (tmp_path / "f.csv").read_text().startswith("fname,fold\nc0000.wav,")


def test_an_existing_table_is_kept_and_never_overwritten(competition: Competition, tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    folds = make_folds(competition.targets(), 2, 0)
    write_folds(path, folds)
    before = path.stat().st_mtime_ns, path.read_bytes()
    write_folds(path, folds)
    with pytest.raises(MelfoldError, match="a different fold table already exists"):
        write_folds(path, 1 - folds)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_table_whose_writing_was_killed_is_whole_with_its_stamp_the_next_time(
    competition: Competition, tmp_path: Path, killed_at: int
) -> None:
    config, renames = FoldsConfig(n_folds=2), 0
    undisturbed, home = Home(tmp_path / "undisturbed"), Home(tmp_path / "killed")

    def die(event: str, _: object) -> None:
        nonlocal renames
        renames += event == "os.rename"
        if event == "os.rename" and renames == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        sys.addaudithook(die)
        fold_table(competition, home, config)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    for place in (undisturbed, home):
        fold_table(competition, place, config)
    contents = [{path.name: path.read_bytes() for path in place.folds.iterdir()} for place in (undisturbed, home)]
    assert len(contents[0]) == 2
    assert contents[1] == contents[0]


ROWS = "".join(f"c000{i}.wav,{i % 2}\n" for i in range(8))
REFUSED = {
    "empty": ("", "is not a fold table"),
    "other columns": ("fname,split\n" + ROWS, "columns fname, split, not fname,fold"),
    "a word": ("fname,fold\n" + ROWS.replace(",1", ",one", 1), "is not a fold table"),
    "a fraction": ("fname,fold\n" + ROWS.replace(",1", ",1.5", 1), "is not a fold table"),
    "no number": ("fname,fold\n" + ROWS.replace(",1", ",", 1), "is not a fold table"),
    "a clip missing": ("fname,fold\n" + ROWS.replace("c0003.wav,1\n", ""), r"1 differ, first c0003\.wav"),
    "a clip of elsewhere": ("fname,fold\n" + ROWS + "x.wav,0\n", r"1 differ, first x\.wav"),
    "a clip twice": ("fname,fold\n" + ROWS + "c0003.wav,0\n", r"1 differ, first c0003\.wav"),
    "a gap": ("fname,fold\n" + ROWS.replace(",1", ",2"), r"folds must be 0, 1, …: \[0, 2\]"),
    "from 1": ("fname,fold\n" + ROWS.replace(",1", ",2").replace(",0", ",1"), r"folds must be 0, 1, …: \[1, 2\]"),
    "a split group": ("fname,fold,group\n" + ROWS.replace("\n", ",x\n"), r"splits groups over folds: 1, first x"),
    "one fold": ("fname,fold\n" + ROWS.replace(",1", ",0"), r"folds must be 0, 1, …: \[0\]"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_a_table_that_does_not_fit_is_refused(problem: str, competition: Competition, tmp_path: Path) -> None:
    text, said = REFUSED[problem]
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(MelfoldError, match=said):
        read_folds(tmp_path / "f.csv", competition)


def test_a_missing_table_is_reported_with_the_command_that_makes_it(competition: Competition, tmp_path: Path) -> None:
    with pytest.raises(MelfoldError, match="no fold table: .*Run `melfold folds`"):
        read_folds(tmp_path / "f.csv", competition)


def test_a_table_saved_by_a_spreadsheet_is_read(competition: Competition, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_bytes(b"\xef\xbb\xbf" + ("fname,fold\n" + ROWS).replace("\n", "\r\n").encode())
    assert list(read_folds(tmp_path / "f.csv", competition)["fold"]) == [0, 1] * 4


CONFIG = FoldsConfig(n_folds=2, seed=0, groups="none")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_a_fold_table_is_made_once_with_a_stamp(competition: Competition, home: Home) -> None:
    path, balance = fold_table(competition, home, CONFIG)
    assert path == home.folds / "tiny_curated_2fold_seed0.csv"
    assert balance == balance_of(competition.targets(), read_folds(path, competition))
    made = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in home.folds.iterdir()}
    assert set(made) == {"tiny_curated_2fold_seed0.csv", "tiny_curated_2fold_seed0.json"}
    stamp = read_json(path.with_suffix(".json"))
    assert stamp["made_from"] == fold_inputs(competition.curated["labels"], CONFIG)
    assert fold_table(competition, home, CONFIG) == (path, balance)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in home.folds.iterdir()} == made


@pytest.mark.parametrize("groups", ["auto", "identical"])
def test_identical_clips_share_a_fold_and_the_stamp_says_so(groups: str, tiny_download: Maker, home: Home) -> None:
    root = tiny_download()
    shutil.copyfile(root / "train_curated/c0001.wav", root / "train_curated/c0005.wav")
    competition = load_competition(root)
    grouped = CONFIG.model_copy(update={"groups": groups})
    path, _ = fold_table(competition, home, grouped)
    folds = read_folds(path, competition)
    assert folds.loc["c0001.wav"].equals(folds.loc["c0005.wav"])
    assert folds["group"].nunique() == 7
    inputs = fold_inputs(competition.curated["labels"], grouped, number_groups([["c0005.wav", "c0001.wav"]]))
    assert read_json(path.with_suffix(".json"))["made_from"] == inputs
    assert inputs["groups"] not in ("", fold_inputs(competition.curated["labels"], grouped, None)["groups"])


def test_groups_come_from_a_table_and_a_changed_one_is_noticed(competition: Competition, home: Home, tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    config = CONFIG.model_copy(update={"groups": str(table)})
    with pytest.raises(MelfoldError, match=r"cannot read folds.groups: .*mine.csv \(No such file"):
        fold_table(competition, home, config)
    table.write_text("fname,sources\nc0001.wav,x\n")
    with pytest.raises(MelfoldError, match="is no table of groups: .*Its columns are fname,group"):
        fold_table(competition, home, config)
    table.write_text("fname,group\nelsewhere.wav,x\n")
    with pytest.raises(MelfoldError, match="has no curated clip: 1 clips"):
        fold_table(competition, home, config)
    table.write_text("fname,group,sources\nc0001.wav,x,1\nc0004.wav,x,1\nc0006.wav,x,1\n")
    path, _ = fold_table(competition, home, config)
    assert path.name == "tiny_curated_2fold_grouped_mine_seed0.csv"
    assert read_folds(path, competition).loc[["c0001.wav", "c0004.wav", "c0006.wav"], "fold"].nunique() == 1
    table.write_text("fname,group\nc0001.wav,x\nc0004.wav,x\n")
    with pytest.raises(MelfoldError, match="is no longer as it was made: groups: "):
        fold_table(competition, home, config)


def test_auto_takes_the_table_of_the_competition_where_there_is_one(competition: Competition, home: Home) -> None:
    home.folds.mkdir(parents=True)
    (home.folds / "tiny_groups.csv").write_text("fname,group\nc0002.wav,x\nc0003.wav,x\nelsewhere.wav,x\n")
    path, _ = fold_table(competition, home, CONFIG.model_copy(update={"groups": "auto"}))
    assert read_folds(path, competition).loc[["c0002.wav", "c0003.wav"], "group"].nunique() == 1


def test_an_edited_table_is_refused_until_its_stamp_is_deleted(competition: Competition, home: Home) -> None:
    path, _ = fold_table(competition, home, CONFIG)
    text = path.read_text()
    path.write_text(text.replace(",1", ",2").replace(",0", ",1").replace(",2", ",0"))
    with pytest.raises(MelfoldError) as caught:
        fold_table(competition, home, CONFIG)
    (line,) = caught.value.lines
    assert line == (
        "fold table tiny_curated_2fold_seed0.csv is no longer as it was made: tiny_curated_2fold_seed0.csv was changed after it"
        " was written. Delete it to make it again, or delete tiny_curated_2fold_seed0.json to keep it as your own"
    )
    path.with_suffix(".json").unlink()
    assert fold_table(competition, home, CONFIG)[0] == path
    assert not path.with_suffix(".json").exists(), "the user's own table gets no stamp"


def test_a_table_of_other_labels_is_refused_and_a_deleted_one_is_made_again(tiny_download: Maker, home: Home) -> None:
    root = tiny_download()
    path, _ = fold_table(load_competition(root), home, CONFIG)
    table = root / "train_curated.csv"
    table.write_text(table.read_text().replace("c0000.wav,Bark", "c0000.wav,Tone"))
    changed = load_competition(root)
    with pytest.raises(MelfoldError, match="is no longer as it was made: curated_labels: [0-9a-f]{16} -> [0-9a-f]{16}. Delete"):
        fold_table(changed, home, CONFIG)
    path.unlink()
    assert fold_table(changed, home, CONFIG)[0] == path
    assert read_json(path.with_suffix(".json"))["made_from"] == fold_inputs(changed.curated["labels"], CONFIG)


def test_the_order_of_rows_and_of_labels_does_not_matter(competition: Competition) -> None:
    labels = competition.curated["labels"]
    assert fold_inputs(labels[::-1].map(lambda own: own[::-1]), CONFIG) == fold_inputs(labels, CONFIG)


def test_a_table_with_another_number_of_folds_is_refused(competition: Competition, home: Home) -> None:
    path = fold_table_path(home, competition.name, CONFIG)
    write_folds(path, make_folds(competition.targets(), 3, 0))
    with pytest.raises(MelfoldError, match="tiny_curated_2fold_seed0.csv has 3 folds: the recipe wants 2"):
        fold_table(competition, home, CONFIG)

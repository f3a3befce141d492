"""Groups by Freesound ids, and the twins that fold tables leave in the training set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from melfold.cli.main import app
from melfold.data.groups import clips_with_twin_outside, join_pairs, read_groups, read_ids, tables_of, twin_pairs, write_groups
from melfold.errors import MelfoldError

ROWS = [("a.wav", "Bark", 10), ("b.wav", '"Bark,Meow"', 13), ("c.wav", "Meow", 16), ("d.wav", "Bark", 17), ("e.wav", "Tone", 11)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text("fname,labels,freesound_id\n" + "".join(f"{f},{own},{id}\n" for f, own, id in reversed(ROWS)))
    return path


def test_clips_of_near_ids_with_a_common_label_are_one_group_also_through_others(table: Path) -> None:
    clips = read_ids(table)
    pairs = twin_pairs(clips)
    assert {tuple(sorted(clips.index[list(pair)])) for pair in pairs} == {("a.wav", "b.wav"), ("b.wav", "c.wav")}
    groups = join_pairs(list(clips.index), pairs)
    assert groups.to_dict() == {"a.wav": 0, "b.wav": 0, "c.wav": 0, "d.wav": 1, "e.wav": 2}


def test_twins_in_other_folds_are_counted_by_clip(table: Path) -> None:
    pairs = twin_pairs(read_ids(table))
    assert clips_with_twin_outside(pairs, np.array([0, 0, 0, 1, 1])) == 0
    assert clips_with_twin_outside(pairs, np.array([0, 0, 1, 1, 1])) == 2
    assert clips_with_twin_outside(pairs, np.array([0, 1, 0, 1, 1])) == 3


def test_groups_come_back_as_written_and_are_never_overwritten(table: Path, tmp_path: Path) -> None:
    clips = read_ids(table)
    groups = join_pairs(list(clips.index), twin_pairs(clips))
    write_groups(tmp_path / "g.csv", groups)
    assert read_groups(tmp_path / "g.csv").astype(int).equals(groups)
    write_groups(tmp_path / "g.csv", groups)
    with pytest.raises(MelfoldError, match="the file exists already"):
        write_groups(tmp_path / "g.csv", groups + 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fname,labels\na.wav,Bark\n", "has no Freesound ids"),
        ("fname,labels,freesound_id\na.wav,Bark,x\n", "has no Freesound ids"),
    ],
)
def test_a_table_without_ids_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(MelfoldError, match=said):
        read_ids(tmp_path / "t.csv")


def test_the_command_makes_the_committed_groups_and_prints_the_twins_of_both_tables(
    fsdkaggle2019: Path, repo: Path, tmp_path: Path
) -> None:
    table = fsdkaggle2019 / "train_curated_post_competition.csv"
    output = tmp_path / "groups.csv"
    result = CliRunner().invoke(app, ["groups", str(table), "-o", str(output), "--home", str(repo)])
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == (repo / "folds" / "fat2019_groups.csv").read_bytes()
    assert "4970 clips in 3187 groups, 711 of several clips, the largest of 40." in result.output
    rows = {words[0]: words[1:] for line in result.output.splitlines() if (words := line.split())}
    assert rows["fat2019_curated_5fold_seed42.csv"] == ["2291", "46.1"]
    assert rows["fat2019_curated_5fold_grouped_seed42.csv"] == ["0", "0.0"]


def test_other_tables_in_the_folder_of_folds_are_left_out(tmp_path: Path) -> None:
    fnames = pd.Index(["a.wav", "b.wav"])
    (tmp_path / "folds.csv").write_text("fname,fold\nb.wav,1\na.wav,0\n")
    (tmp_path / "fewer.csv").write_text("fname,fold\na.wav,0\n")
    (tmp_path / "notes.csv").write_text("who,what\nAda,listened\n")
    ((path, folds),) = tables_of(tmp_path, fnames)
    assert (path.name, list(folds)) == ("folds.csv", ["0", "1"])

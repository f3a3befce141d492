"""Downloads, validated when they are read."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from melfold.compute import Compute
from melfold.config import LogMelConfig
from melfold.data.cache import build_cache, read_manifest
from melfold.data.competition import Competition, load_competition, multi_hot, with_bad_clips
from melfold.data.folds import fold_table, read_folds
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.learn.runs import open_run
from melfold.learn.start import start_run
from melfold.probs import make_probs, read_probs, write_probs
from melfold.recipes import load_recipe

Maker = Callable[..., Path]
LABELS = ("Bark", "Hiss_(air)", "Tone")


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def add_row(path: Path, row: str) -> None:
    path.write_text(path.read_text() + row + "\n")


def refused(root: Path) -> list[str]:
    """The lines of the error that loading raises."""
    with pytest.raises(MelfoldError) as caught:
        load_competition(root)
    return list(caught.value.lines)


def test_kaggles_layout(tiny_download: Maker) -> None:
    root = tiny_download("My Download")
    competition = load_competition(root)
    assert (competition.name, competition.labels) == ("my_download", LABELS)
    assert [len(competition.split(s)) for s in ("curated", "noisy", "test")] == [8, 3, 4]
    assert competition.curated.at["c0003.wav", "labels"] == ("Bark", "Hiss_(air)")
    assert list(competition.test.columns) == ["path"]
    for split in (competition.curated, competition.noisy, competition.test):
        assert split.index.name == "fname"
        assert all(path.name == fname and path.is_file() for fname, path in split["path"].items())


def test_zenodos_layout_has_the_same_tables_with_sorted_test_rows(tiny_zenodo: Maker, tiny_download: Maker) -> None:
    zenodo, kaggle = load_competition(tiny_zenodo()), load_competition(tiny_download())
    assert zenodo.labels == kaggle.labels
    assert list(zenodo.test.index) == sorted(zenodo.test.index)
    for split in ("curated", "noisy", "test"):
        pd.testing.assert_frame_equal(zenodo.split(split).drop(columns="path"), kaggle.split(split).drop(columns="path"))
    assert all(path.is_file() for path in zenodo.test["path"])


def test_kaggles_test_rows_keep_the_samples_order(tiny_download: Maker) -> None:
    root = tiny_download()
    header, *rows = (root / "sample_submission.csv").read_text().splitlines()
    (root / "sample_submission.csv").write_text("\n".join([header, *rows[::-1]]) + "\n")
    assert list(load_competition(root).test.index) == ["t0003.wav", "t0002.wav", "t0001.wav", "t0000.wav"]


def test_a_folder_nested_in_itself_is_found(tiny_download: Maker) -> None:
    root = tiny_download()
    (root / "test").rename(root / "inner")
    (root / "test").mkdir()
    (root / "inner").rename(root / "test" / "test")
    assert all(path.parent == root / "test" / "test" for path in load_competition(root).test["path"])


def test_a_download_without_noisy_clips_is_fine(tiny_download: Maker) -> None:
    competition = load_competition(tiny_download(noisy=0))
    assert competition.noisy.empty
    assert competition.targets("noisy").shape == (0, 3)


def test_bom_crlf_and_quotes_are_read(tiny_download: Maker) -> None:
    root = tiny_download()
    expected = load_competition(root)
    for path in root.glob("*.csv"):
        rows = list(csv.reader(path.read_text().splitlines()))
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, lineterminator="\r\n", quoting=csv.QUOTE_ALL).writerows(rows)
    found = load_competition(root)
    assert found.labels == expected.labels
    pd.testing.assert_frame_equal(found.curated, expected.curated)
    pd.testing.assert_frame_equal(found.test, expected.test)


@pytest.mark.parametrize("make", ["tiny_download", "tiny_zenodo"])
def test_the_labels_of_test_clips_are_not_read(make: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(make)()
    (path,) = root.rglob("test_post_competition.csv")
    expected = load_competition(root).test
    rows = list(csv.DictReader(path.read_text().splitlines()))
    path.write_text("fname,labels,usage\n" + "".join(f"{row['fname']},Nonsense,?\n" for row in rows))
    pd.testing.assert_frame_equal(load_competition(root).test, expected)


def test_targets_are_multi_hot_in_vocabulary_order() -> None:
    table = multi_hot(pd.Series({"a": ("Tone", "Bark"), "b": ("Hiss_(air)",), "c": ()}), LABELS)
    assert list(table.columns) == list(LABELS)
    np.testing.assert_array_equal(table, [[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    assert table.to_numpy().dtype == np.float32


def test_labels_keep_the_order_of_the_vocabulary(tiny_download: Maker, tiny_zenodo: Maker) -> None:
    labels = ("Tone", "Bark", "Hiss_(air)")
    for root in (tiny_download(labels=labels), tiny_zenodo(labels=labels)):
        competition = load_competition(root)
        assert competition.labels == labels
        assert tuple(competition.targets().columns) == labels
        assert competition.targets().loc["c0000.wav"].tolist() == [1, 0, 0]


def test_a_download_with_the_real_vocabulary_is_fat2019_whatever_its_folder(tiny_zenodo: Maker, fsdkaggle2019: Path) -> None:
    root = tiny_zenodo("anything", labels=("Bark", "Accordion", "Yell"))
    (vocabulary,) = fsdkaggle2019.rglob("vocabulary.csv")
    shutil.copyfile(vocabulary, root / "FSDKaggle2019.meta" / "vocabulary.csv")
    competition = load_competition(root)
    assert competition.name == "fat2019"
    assert len(competition.labels) == 80


def test_known_bad_clips_are_left_out_if_the_tables_hold_them(fsdkaggle2019: Path, tiny_download: Maker) -> None:
    with (fsdkaggle2019 / "vocabulary.csv").open(newline="") as file:
        vocabulary = tuple(row[-1] for row in csv.reader(file))
    fnames = pd.Index(["0006ae4e.wav", "1d44b0bd.wav", "f76181c4.wav"], name="fname")
    table = pd.DataFrame({"labels": [("Bark",)] * 3, "path": [Path()] * 3}, index=fnames)
    fat2019 = Competition("fat2019", Path(), vocabulary, table, table.iloc[:0], table[["path"]].iloc[:0])
    recipe = load_recipe("open", ["data.exclude.'1d44b0bd.wav'=my own reason", "data.exclude.'x.wav'=mine"])
    found = with_bad_clips(recipe, fat2019)
    assert found.data.exclude == {
        "1d44b0bd.wav": "my own reason",
        "f76181c4.wav": "wrong label, from a renaming bug",
        "x.wav": "mine",
    }
    assert with_bad_clips(found, fat2019) == found
    assert found.model_copy(update={"data": recipe.data}) == recipe
    tiny = load_competition(tiny_download())
    assert with_bad_clips(recipe, tiny) == recipe, "other competitions have no known bad clips"


def test_names_that_look_like_missing_values_survive_every_table(tiny_download: Maker, tmp_path: Path) -> None:
    labels = ("NA", "nan", "None", "null")
    root = tiny_download(labels=labels)
    home, recipe = Home(tmp_path / "home"), load_recipe("demo", ["folds.n_folds=2", "train.clips=both"])
    for name in ("train_curated.csv", "train_noisy.csv"):
        replace(root / name, "0000.wav", "NA.wav")
    (root / "train_curated/c0000.wav").rename(root / "train_curated/cNA.wav")
    (root / "train_noisy/n0000.wav").rename(root / "train_noisy/nNA.wav")
    competition = load_competition(root)
    assert competition.labels == labels
    assert competition.curated.at["cNA.wav", "labels"] == ("NA",)
    assert competition.curated.at["c0003.wav", "labels"] == ("null", "NA")

    path, _ = fold_table(competition, home, recipe.folds)
    assert set(read_folds(path, competition).index) == set(competition.curated.index)
    config = LogMelConfig(sr=16_000, n_fft=512, hop_length=160, n_mels=32, fmax=8_000)
    folder = build_cache(competition, config, home, compute=Compute(jobs=1))
    assert read_manifest(folder).at["cNA.wav", "frames"] > 0

    run = start_run(home, "tiny", recipe, competition, path)
    run = open_run(home, "tiny")
    assert run.clips["labels"].to_dict() == competition.curated["labels"].to_dict()
    assert run.noisy.to_dict() == competition.noisy["labels"].to_dict()

    probs = make_probs(np.random.default_rng(0).random((4, 4)), ["NA", "nan", "None", "null"], labels)
    write_probs(tmp_path / "probs.csv", probs)
    pd.testing.assert_frame_equal(read_probs(tmp_path / "probs.csv"), probs)


def test_the_real_recordings_pass(esc10: Path) -> None:
    competition = load_competition(esc10)
    assert (competition.name, len(competition.labels)) == ("esc10", 10)
    assert [len(competition.split(s)) for s in ("curated", "noisy", "test")] == [200, 80, 220]


PROBLEMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing columns": (
        lambda r: replace(r / "train_curated.csv", "fname,labels", "file,tags"),
        "train_curated.csv: missing column fname and labels: file, tags",
    ),
    "empty table": (
        lambda r: (r / "train_noisy.csv").write_text(""),
        "train_noisy.csv: missing column fname and labels: an empty",
    ),
    "no rows": (lambda r: (r / "train_curated.csv").write_text("fname,labels\n"), "train_curated.csv: no rows"),
    "missing table": (lambda r: (r / "train_curated.csv").unlink(), "cannot read train_curated.csv: "),
    "not utf-8": (
        lambda r: (r / "train_noisy.csv").write_bytes(b"fname,labels\n\xff\xfe,Bark\n"),
        "cannot read train_noisy.csv: ",
    ),
    "unclosed quote": (lambda r: add_row(r / "train_noisy.csv", 'x.wav,"Bark'), "cannot read train_noisy.csv: "),
    "duplicated fname": (
        lambda r: add_row(r / "train_curated.csv", "c0001.wav,Bark"),
        "train_curated.csv: duplicate fname: c0001.wav (2 rows)",
    ),
    "duplicated test row": (
        lambda r: add_row(r / "sample_submission.csv", "t0001.wav,0,0,0"),
        "sample_submission.csv: duplicate fname: t0001.wav (2 rows)",
    ),
    "empty labels": (lambda r: replace(r / "train_curated.csv", "c0000.wav,Bark", "c0000.wav,"), "no labels: c0000.wav"),
    "short row": (lambda r: replace(r / "train_curated.csv", "c0000.wav,Bark", "c0000.wav"), "no labels: c0000.wav"),
    "unquoted labels": (
        lambda r: replace(r / "train_curated.csv", '"Bark,Hiss_(air)"', "Bark,Hiss_(air)"),
        "train_curated.csv: more cells than columns",
    ),
    "unknown label": (
        lambda r: replace(r / "train_curated.csv", "c0000.wav,Bark", "c0000.wav,Brk"),
        "train_curated.csv: unknown label: 'Brk' of c0000.wav",
    ),
    "space in labels": (
        lambda r: replace(r / "train_curated.csv", '"Bark,Hiss_(air)"', '"Bark, Hiss_(air)"'),
        "train_curated.csv: unknown label: ' Hiss_(air)' of c0003.wav",
    ),
    "duplicate label": (
        lambda r: replace(r / "train_curated.csv", '"Bark,Hiss_(air)"', '"Bark,Bark"'),
        "train_curated.csv: duplicate label: c0003.wav: Bark,Bark",
    ),
    "duplicate vocabulary": (
        lambda r: replace(r / "sample_submission.csv", "fname,Bark", "fname,Tone"),
        "sample_submission.csv: duplicate label: Tone",
    ),
    "no vocabulary": (lambda r: replace(r / "sample_submission.csv", "fname,Bark,Hiss_(air),Tone", "fname"), "two labels: none"),
    "one label": (lambda r: replace(r / "sample_submission.csv", "fname,Bark,Hiss_(air),Tone", "fname,Bark"), "two labels: Bark"),
    "odd label": (lambda r: replace(r / "sample_submission.csv", "fname,Bark", "fname, Bark"), "not a label: ' Bark'"),
    "first column": (
        lambda r: replace(r / "sample_submission.csv", "fname,Bark,Hiss_(air)", "Bark,fname,Hiss_(air)"),
        "sample_submission.csv: the first column must be fname: Bark",
    ),
    "upwards": (lambda r: add_row(r / "train_curated.csv", "../c.wav,Bark"), "fname must be a plain file name: '../c.wav'"),
    "separator": (lambda r: add_row(r / "train_curated.csv", "test/t0000.wav,Bark"), "plain file name: 'test/t0000.wav'"),
    "backslash": (lambda r: add_row(r / "train_curated.csv", "test\\t0000.wav,Bark"), "fname must be a plain file name"),
    "absolute": (lambda r: add_row(r / "sample_submission.csv", "/etc/x.wav,0,0,0"), "plain file name: '/etc/x.wav'"),
    "no name": (lambda r: add_row(r / "train_curated.csv", ",Bark"), "fname must be a plain file name: ''"),
    "suffix": (lambda r: add_row(r / "train_curated.csv", "c0001.mp3,Bark"), "fname must end in .wav, .flac, .ogg: c0001.mp3"),
    "row without file": (
        lambda r: (r / "train_curated/c0002.wav").unlink(),
        "a row without a file: train_curated/c0002.wav. Download it again, or leave it out: --set data.exclude.'c0002.wav'='why'",
    ),
    "dangling link": (
        lambda r: ((r / "train_noisy/n0001.wav").unlink(), (r / "train_noisy/n0001.wav").symlink_to(r / "gone.wav")),
        "a row without a file: train_noisy/n0001.wav",
    ),
    "file without row": (
        lambda r: (r / "train_noisy/extra.wav").touch(),
        "a file without a row in train_noisy.csv: train_noisy/extra.wav",
    ),
    "no audio folder": (lambda r: shutil.rmtree(r / "test"), "audio folder missing: "),
    "one clip in two splits": (
        lambda r: (add_row(r / "train_noisy.csv", "t0001.wav,Bark"), shutil.copy(r / "test/t0001.wav", r / "train_noisy")),
        "two clips have the same name: t0001.wav in test, t0001.wav in noisy",
    ),
    "one stem in two formats": (
        lambda r: (add_row(r / "train_curated.csv", "c0001.ogg,Bark"), (r / "train_curated/c0001.ogg").touch()),
        "two clips have the same name: c0001.ogg in curated, c0001.wav in curated",
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_each_problem_is_reported_with_what_was_found(problem: str, tiny_download: Maker) -> None:
    root = tiny_download()
    spoil, line = PROBLEMS[problem]
    spoil(root)
    assert any(line in found for found in refused(root)), "\n".join(refused(root))


def test_zenodos_vocabulary_is_checked_too(tiny_zenodo: Maker) -> None:
    root = tiny_zenodo()
    add_row(root / "FSDKaggle2019.meta/vocabulary.csv", "3,Bark")
    assert refused(root) == ["vocabulary.csv: duplicate label: Bark"]
    (root / "FSDKaggle2019.meta/vocabulary.csv").unlink()
    assert refused(root)[0].startswith("cannot read vocabulary.csv: ")


def test_several_problems_are_listed_at_once_in_the_same_order_each_time(tiny_download: Maker) -> None:
    root = tiny_download()
    for name in ("c0002.wav", "c0001.wav", "c0003.wav"):
        (root / "train_curated" / name).unlink()
    replace(root / "train_curated.csv", "c0000.wav,Bark", "c0000.wav,Brk")
    replace(root / "train_noisy.csv", "n0000.wav,Bark", "n0000.wav,")
    lines = refused(root)
    assert len(lines) == 5
    missing = [re.search(r"train_curated/(\w+)\.wav", line)[1] for line in lines if "without a file" in line]
    assert missing == ["c0001", "c0002", "c0003"]


def test_test_clips_without_a_file_and_files_that_are_no_test_clips_are_only_warned_about(
    tiny_download: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny_download()
    (root / "test/t0001.wav").unlink()
    (root / "test/t0002.wav").unlink()
    (root / "test/t0002.wav").symlink_to(root / "gone.wav")
    (root / "test/extra.wav").touch()
    assert len(load_competition(root).test) == 4
    missing, extra = caplog.messages
    assert missing == "2 TEST CLIPS HAVE NO FILE and will get the prior: t0001.wav, t0002.wav"
    assert extra.startswith("1 files in ")
    assert extra.endswith("are not in sample_submission.csv and are ignored: extra.wav")


def test_training_clips_that_are_left_out_need_no_file(tiny_download: Maker) -> None:
    root = tiny_download()
    (root / "train_curated/c0002.wav").unlink()
    assert "c0002.wav" in load_competition(root, {"c0002.wav": "lost"}).curated.index


def test_the_tables_alone_are_enough_where_no_audio_is_needed(tiny_download: Maker) -> None:
    root = tiny_download()
    whole = load_competition(root)
    for folder in ("train_curated", "train_noisy", "test"):
        shutil.rmtree(root / folder)
    tables = load_competition(root, audio=False)
    for split in ("curated", "noisy", "test"):
        pd.testing.assert_frame_equal(tables.split(split), whole.split(split))


@pytest.mark.parametrize("found", ["nothing", "no folder"])
def test_a_folder_without_a_download_is_refused_and_the_message_says_what_was_expected(tmp_path: Path, found: str) -> None:
    if found == "nothing":
        assert "neither sample_submission.csv (Kaggle's layout) nor FSDKaggle2019.meta/" in refused(tmp_path)[0]
    else:
        assert refused(tmp_path / "none")[0].startswith("no such data folder")

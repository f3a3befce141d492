"""A competition's download: its tables, validated when they are read, and where each clip's audio is."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from melfold.config import Recipe
from melfold.errors import MelfoldError
from melfold.facts import Facts, facts_of, join_labels, split_labels

log = logging.getLogger(__name__)

Split = Literal["curated", "noisy", "test"]
SPLITS: tuple[Split, ...] = ("curated", "noisy", "test")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg")

SHOWN = 5
"""How many file names a warning lists."""

_KAGGLE = {"curated": "train_curated", "noisy": "train_noisy", "test": "test"}


@dataclass(frozen=True)
class Competition:
    """A validated download.

    `curated`, `noisy` and `test` are indexed by `fname`, with the columns `labels` (a tuple of names; not in `test`) and `path`.
    `noisy` is empty if the download has no noisy clips. `test` is in the order of the submission.
    """

    name: str
    root: Path
    labels: tuple[str, ...]
    curated: pd.DataFrame
    noisy: pd.DataFrame
    test: pd.DataFrame

    @property
    def facts(self) -> Facts:
        """What is known of this competition, which is recognised by its labels."""
        return facts_of(self.labels)

    def split(self, name: Split) -> pd.DataFrame:
        """The table of a split."""
        return {"curated": self.curated, "noisy": self.noisy, "test": self.test}[name]

    def targets(self, name: Literal["curated", "noisy"] = "curated") -> pd.DataFrame:
        """Multi-hot `(clips, labels)` float32."""
        return multi_hot(self.split(name)["labels"], self.labels)


def multi_hot(labels_of: pd.Series, labels: Sequence[str]) -> pd.DataFrame:
    """Float32 `(clips, labels)` of 0 and 1, from each clip's tuple of label names."""
    column = {label: i for i, label in enumerate(labels)}
    values = np.zeros((len(labels_of), len(labels)), np.float32)
    for row, own in enumerate(labels_of):
        values[row, [column[label] for label in own]] = 1
    return pd.DataFrame(values, index=labels_of.index, columns=list(labels))


def with_bad_clips(recipe: Recipe, competition: Competition) -> Recipe:
    """A recipe that also leaves out the known bad clips of a competition, as far as its tables hold them.

    A reason that the recipe itself gives for a clip is kept.
    """
    bad = {f: why for f, why in competition.facts.bad_clips.items() if f in competition.curated.index}
    exclude = bad | recipe.data.exclude
    if exclude == recipe.data.exclude:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"exclude": exclude})})


def load_competition(root: Path, exclude: Collection[str] = (), *, audio: bool = True) -> Competition:
    """Read and validate a download in Kaggle's or Zenodo's layout.

    A test clip without a file, or a file that is no test clip, is only worth a warning.

    Args:
        exclude: training clips that need no file.
        audio: without, no clip needs one.

    Raises:
        MelfoldError: one line for each problem in the tables and folders.
    """
    layout = _Layout.find(root)
    problems: list[MelfoldError] = []
    labels = _read_vocabulary(layout, problems)
    tables: dict[str, pd.DataFrame] = {}
    for split in SPLITS:
        folder = _audio_folder(layout.audio[split])
        if split == "noisy" and not layout.tables[split].exists() and not folder.exists():
            tables[split] = _no_clips()
            continue
        rows = _read_rows(layout.tables[split], split != "test", problems)
        if rows is None:
            continue
        _check_rows(rows, layout.tables[split].name, set(labels) if split != "test" else None, problems)
        if audio and not folder.is_dir():
            problems.append(MelfoldError("audio folder missing", f"{folder} ({len(rows)} clips)", "Unpack it there"))
        elif audio:
            need = rows.index.difference([*exclude, *facts_of(labels).bad_clips])
            _check_audio(split, need, rows.index, folder, layout.tables[split].name, problems)
        tables[split] = rows.assign(path=[folder / f for f in rows.index])
    _check_across(tables, problems)
    if problems:
        raise MelfoldError.many(problems)
    test = tables["test"] if layout.sample else tables["test"].sort_index()
    return Competition(_name(root, labels), root, labels, tables["curated"], tables["noisy"], test)


def read_test(root: Path) -> Competition:
    """Only the labels and test rows of a download, for a submission that must be made whatever else is missing.

    The training tables are empty. A clip need not have a file.

    Raises:
        MelfoldError: a sample submission or test table that cannot be used.
    """
    layout = _Layout.find(root)
    problems: list[MelfoldError] = []
    labels = _read_vocabulary(layout, problems)
    rows = _read_rows(layout.tables["test"], False, problems)
    if rows is not None:
        _check_rows(rows, layout.tables["test"].name, None, problems)
    if problems or rows is None:
        raise MelfoldError.many(problems)
    folder = _audio_folder(layout.audio["test"])
    test = rows.assign(path=[folder / f for f in rows.index])
    test = test if layout.sample else test.sort_index()
    return Competition(_name(root, labels), root, labels, _no_clips(), _no_clips(), test)


def _no_clips() -> pd.DataFrame:
    return pd.DataFrame({"labels": [], "path": []}, index=pd.Index([], name="fname", dtype=str))


@dataclass(frozen=True)
class _Layout:
    tables: dict[str, Path]
    audio: dict[str, Path]
    vocabulary: Path
    sample: bool
    """Whether the labels and test rows come from `sample_submission.csv`."""

    @classmethod
    def find(cls, root: Path) -> _Layout:
        if root.is_file():
            raise MelfoldError("not a folder", str(root), "Unpack it and give the folder")
        if not root.is_dir():
            raise MelfoldError("no such data folder", str(root), "Give the folder of the competition's download")
        if (meta := root / "FSDKaggle2019.meta").is_dir():
            return cls(
                {s: meta / f"{n}_post_competition.csv" for s, n in _KAGGLE.items()},
                {s: root / f"FSDKaggle2019.audio_{n}" for s, n in _KAGGLE.items()},
                meta / "vocabulary.csv",
                sample=False,
            )
        sample = root / "sample_submission.csv"
        if not sample.exists():
            raise MelfoldError(
                f"{root} is not a competition download",
                "neither sample_submission.csv (Kaggle's layout) nor FSDKaggle2019.meta/ (Zenodo's)",
                "Give the folder that holds one of them",
            )
        tables = {s: root / f"{n}.csv" for s, n in _KAGGLE.items()} | {"test": sample}
        return cls(tables, {s: root / n for s, n in _KAGGLE.items()}, sample, sample=True)


def _name(root: Path, labels: Sequence[str]) -> str:
    return facts_of(labels).name or re.sub(r"[^a-z0-9]+", "_", root.resolve().name.lower()).strip("_") or "competition"


def _read_vocabulary(layout: _Layout, problems: list[MelfoldError]) -> tuple[str, ...]:
    path = layout.vocabulary
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file)) if not layout.sample else [next(csv.reader(file), [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(MelfoldError(f"cannot read {path.name}", str(error)))
        return ()
    if layout.sample:
        if rows[0][:1] != ["fname"]:
            problems.append(
                MelfoldError(f"{path.name}: the first column must be fname", ", ".join(rows[0][:3]) or "an empty file")
            )
        labels = rows[0][1:]
    else:
        labels = [row[-1] for row in rows if row]
    if len(labels) < 2:
        problems.append(MelfoldError(f"{path.name}: fewer than two labels", ", ".join(labels) or "none"))
    for label, count in Counter(labels).items():
        if count > 1:
            problems.append(MelfoldError(f"{path.name}: duplicate label", label))
        if not label or "," in label or label != label.strip():
            problems.append(MelfoldError(f"{path.name}: not a label", repr(label)))
    return tuple(labels)


def _read_rows(path: Path, labelled: bool, problems: list[MelfoldError]) -> pd.DataFrame | None:
    """`fname` (and `labels`) of a table, or None with a problem added."""
    columns = ["fname", "labels"] if labelled else ["fname"]
    try:
        # Only `fname` is read from a test table: the labels published after the competition are for scoring only.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [c for c in columns if c not in (reader.fieldnames or [])]
            if missing:
                found = ", ".join((reader.fieldnames or ["an empty file"])[:4])
                problems.append(MelfoldError(f"{path.name}: missing column {' and '.join(missing)}", found))
                return None
            rows = []
            for row in reader:
                if None in row:
                    problems.append(
                        MelfoldError(
                            f"{path.name}: more cells than columns", f"line {reader.line_num}", "Put several labels in quotes"
                        )
                    )
                rows.append([row[c] or "" for c in columns])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(MelfoldError(f"cannot read {path.name}", str(error), "Download it again"))
        return None
    if not rows:
        problems.append(MelfoldError(f"{path.name}: no rows"))
        return None
    table = pd.DataFrame(rows, columns=columns).set_index("fname")
    if labelled:
        table["labels"] = [split_labels(text) for text in table["labels"]]
    return table


def _check_rows(table: pd.DataFrame, name: str, labels: set[str] | None, problems: list[MelfoldError]) -> None:
    for fname, count in Counter(table.index).items():
        if count > 1:
            problems.append(MelfoldError(f"{name}: duplicate fname", f"{fname} ({count} rows)"))
        if not fname or "/" in fname or "\\" in fname or fname.startswith("."):
            problems.append(MelfoldError(f"{name}: fname must be a plain file name", repr(fname)))
        elif not fname.lower().endswith(AUDIO_SUFFIXES):
            problems.append(MelfoldError(f"{name}: fname must end in {', '.join(AUDIO_SUFFIXES)}", fname))
    if labels is None:
        return
    for fname, own in table["labels"].items():
        if not own:
            problems.append(MelfoldError(f"{name}: no labels", str(fname)))
        elif len(set(own)) < len(own):
            problems.append(MelfoldError(f"{name}: duplicate label", f"{fname}: {join_labels(own)}"))
        for label in own:
            if labels and label not in labels:
                problems.append(MelfoldError(f"{name}: unknown label", f"{label!r} of {fname}"))


def _audio_folder(folder: Path) -> Path:
    """The folder, or the one of the same name inside it, as in some mounts."""
    nested = folder / folder.name
    return nested if nested.is_dir() else folder


def _check_audio(split: Split, need: pd.Index, fnames: pd.Index, folder: Path, table: str, problems: list[MelfoldError]) -> None:
    """Compare the rows of a table with the files of a folder.

    Args:
        need: the clips among `fnames` that must have a file.
    """
    with os.scandir(folder) as entries:
        is_file = {entry.name: entry.is_file() for entry in entries if not entry.name.startswith(".")}  # not so a dangling link
    missing = sorted(fname for fname in need if not is_file.get(fname))
    unknown = sorted(is_file.keys() - set(fnames))
    if split == "test":
        if missing:
            log.warning("%d TEST CLIPS HAVE NO FILE and will get the prior: %s", len(missing), _some(missing))
        if unknown:
            log.warning("%d files in %s are not in %s and are ignored: %s", len(unknown), folder, table, _some(unknown))
        return
    for fname in missing:
        fix = f"Download it again, or leave it out: --set data.exclude.'{fname}'='why'"
        problems.append(MelfoldError("a row without a file", f"{folder.name}/{fname}", fix))
    for fname in unknown:
        problems.append(MelfoldError(f"a file without a row in {table}", f"{folder.name}/{fname}", f"Download {table} again"))


def _some(fnames: Sequence[str]) -> str:
    return ", ".join(fnames[:SHOWN]) + (" …" if len(fnames) > SHOWN else "")


def _check_across(tables: dict[str, pd.DataFrame], problems: list[MelfoldError]) -> None:
    """Cached arrays are named by stem, so a stem must be unique."""
    seen: dict[str, str] = {}
    for split, table in tables.items():
        for fname in dict.fromkeys(table.index):
            stem = fname.rsplit(".", 1)[0]
            if stem in seen:
                problems.append(MelfoldError("two clips have the same name", f"{fname} in {split}, {seen[stem]}"))
            seen[stem] = f"{fname} in {split}"

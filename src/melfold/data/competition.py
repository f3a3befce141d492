"""A competition's download: its tables, validated when they are read, and where each clip's audio is."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

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
        return getattr(self, name)

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


def load_competition(
    root: Path, exclude: Collection[str] = (), *, audio: bool = True, splits: Collection[Split] = SPLITS
) -> Competition:
    """Read and validate a download in Kaggle's or Zenodo's layout.

    A test clip without a file, or a file that is no test clip, is only worth a warning.

    Args:
        exclude: training clips that need no file.
        audio: without, no clip needs one.
        splits: the tables to read; the others are empty.

    Raises:
        MelfoldError: one line for each problem in the tables and folders.
    """
    layout = _Layout.find(root)
    labels = _read_vocabulary(layout)
    problems = list(_check_vocabulary(layout, labels))
    tables: dict[str, pd.DataFrame] = {}
    for split in SPLITS:
        path, folder = layout.tables[split], layout.audio[split]
        if split not in splits or (split == "noisy" and not path.exists() and not folder.exists()):
            tables[split] = pd.DataFrame({"labels": [], "path": []}, index=pd.Index([], name="fname", dtype=str))
            continue
        try:
            rows = _read_rows(path, ["fname"] if split == "test" else ["fname", "labels"])
        except MelfoldError as error:
            problems.append(error)
            continue
        problems += _check_rows(rows, path.name, labels if split != "test" else None)
        fnames = pd.Index([row["fname"] for row in rows], name="fname")
        if audio and not folder.is_dir():
            problems.append(MelfoldError("audio folder missing", f"{folder} ({len(rows)} clips)", "Unpack it there"))
        elif audio:
            need = fnames.difference([*exclude, *facts_of(labels).bad_clips])
            problems += _check_audio(split, need, fnames, folder, path.name)
        own = {} if split == "test" else {"labels": [split_labels(row["labels"]) for row in rows]}
        tables[split] = pd.DataFrame(own | {"path": [folder / fname for fname in fnames]}, index=fnames)
    problems += _check_across(tables)
    if problems:
        raise MelfoldError.many(problems)
    test = tables["test"] if layout.sample else tables["test"].sort_index()
    name = facts_of(labels).name or re.sub(r"[^a-z0-9]+", "_", root.resolve().name.lower()).strip("_") or "competition"
    return Competition(name, root, labels, tables["curated"], tables["noisy"], test)


def read_test(root: Path) -> Competition:
    """Only the labels and test rows of a download, for a submission that must be made whatever else is missing.

    The training tables are empty. A clip need not have a file.
    """
    return load_competition(root, audio=False, splits=["test"])


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
            tables = {s: meta / f"{n}_post_competition.csv" for s, n in _KAGGLE.items()}
            audio = {s: _audio_folder(root / f"FSDKaggle2019.audio_{n}") for s, n in _KAGGLE.items()}
            return cls(tables, audio, meta / "vocabulary.csv", sample=False)
        sample = root / "sample_submission.csv"
        if not sample.exists():
            found = "neither sample_submission.csv (Kaggle's layout) nor FSDKaggle2019.meta/ (Zenodo's)"
            raise MelfoldError(f"{root} is not a competition download", found, "Give the folder that holds one of them")
        tables = {s: root / f"{n}.csv" for s, n in _KAGGLE.items()} | {"test": sample}
        return cls(tables, {s: _audio_folder(root / n) for s, n in _KAGGLE.items()}, sample, sample=True)


def _audio_folder(folder: Path) -> Path:
    """The folder, or the one of the same name inside it, as in some mounts."""
    nested = folder / folder.name
    return nested if nested.is_dir() else folder


def _read_vocabulary(layout: _Layout) -> tuple[str, ...]:
    try:
        with layout.vocabulary.open(newline="", encoding="utf-8-sig") as file:
            rows = list(islice(csv.reader(file), 1 if layout.sample else None))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MelfoldError(f"cannot read {layout.vocabulary.name}", str(error)) from None
    if not layout.sample:
        return tuple(row[-1] for row in rows if row)
    if not rows or rows[0][:1] != ["fname"]:
        found = ", ".join(rows[0][:3]) if rows else "an empty file"
        raise MelfoldError(f"{layout.vocabulary.name}: the first column must be fname", found)
    return tuple(rows[0][1:])


def _check_vocabulary(layout: _Layout, labels: Sequence[str]) -> Iterator[MelfoldError]:
    name = layout.vocabulary.name
    if len(labels) < 2:
        yield MelfoldError(f"{name}: fewer than two labels", ", ".join(labels) or "none")
    for label, count in Counter(labels).items():
        if count > 1:
            yield MelfoldError(f"{name}: duplicate label", label)
        if not label or "," in label or label != label.strip():
            yield MelfoldError(f"{name}: not a label", repr(label))


def _read_rows(path: Path, columns: Sequence[str]) -> list[dict[Any, Any]]:
    """The rows of a table, each with its `line`. Only `columns` are to be used: labels of test clips are for scoring only."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            header = list(reader.fieldnames or ["an empty file"])
            if missing := [column for column in columns if column not in header]:
                raise MelfoldError(f"{path.name}: missing column {' and '.join(missing)}", ", ".join(header[:4]))
            rows = [row | {"line": reader.line_num} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MelfoldError(f"cannot read {path.name}", str(error), "Download it again") from None
    if not rows:
        raise MelfoldError(f"{path.name}: no rows")
    return rows


def _check_rows(rows: Sequence[dict[Any, Any]], name: str, labels: Collection[str] | None) -> Iterator[MelfoldError]:
    """What is wrong with the rows of a table; `labels` are all that there are, None for a table without."""
    for row in rows:
        if None in row:
            yield MelfoldError(f"{name}: more cells than columns", f"line {row['line']}", "Put several labels in quotes")
    for fname, count in Counter(row["fname"] for row in rows).items():
        if count > 1:
            yield MelfoldError(f"{name}: duplicate fname", f"{fname} ({count} rows)")
        if not fname or "/" in fname or "\\" in fname or fname.startswith("."):
            yield MelfoldError(f"{name}: fname must be a plain file name", repr(fname))
        elif not fname.lower().endswith(AUDIO_SUFFIXES):
            yield MelfoldError(f"{name}: fname must end in {', '.join(AUDIO_SUFFIXES)}", fname)
    for row in rows if labels is not None else ():
        fname, own = row["fname"], split_labels(row["labels"])
        if not own:
            yield MelfoldError(f"{name}: no labels", fname)
        elif len(set(own)) < len(own):
            yield MelfoldError(f"{name}: duplicate label", f"{fname}: {join_labels(own)}")
        for label in own:
            if labels and label not in labels:
                yield MelfoldError(f"{name}: unknown label", f"{label!r} of {fname}")


def _check_audio(split: Split, need: pd.Index, fnames: pd.Index, folder: Path, table: str) -> Iterator[MelfoldError]:
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
        yield MelfoldError("a row without a file", f"{folder.name}/{fname}", fix)
    for fname in unknown:
        yield MelfoldError(f"a file without a row in {table}", f"{folder.name}/{fname}", f"Download {table} again")


def _some(fnames: Sequence[str]) -> str:
    return ", ".join(fnames[:SHOWN]) + (" …" if len(fnames) > SHOWN else "")


def _check_across(tables: dict[str, pd.DataFrame]) -> Iterator[MelfoldError]:
    """Cached arrays are named by stem, so a stem must be unique."""
    seen: dict[str, str] = {}
    for split, table in tables.items():
        for fname in dict.fromkeys(table.index):
            stem = fname.rsplit(".", 1)[0]
            if stem in seen:
                yield MelfoldError("two clips have the same name", f"{fname} in {split}, {seen[stem]}")
            seen[stem] = f"{fname} in {split}"

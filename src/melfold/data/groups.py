"""Groups of clips that must share a fold: cuts of one recording, or recordings of one session.

A model that learned from one of them has an easy game with the others, which the test set does not offer.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.facts import DEFAULT, split_labels
from melfold.files import Home, write_text

ID_GAP = 3
"""Freesound gives ids in the order of uploads: clips at most this far apart come from one series of uploads."""


def find_groups(competition: Competition, home: Home, groups: str) -> pd.Series:
    """The groups that `folds.groups` asks for, by `fname`; a clip that is not there is alone.

    Raises:
        MelfoldError: a table that cannot be used.
    """
    path = groups_path(competition.name, home, groups)
    if path:
        table = read_groups(path)
        known = table.loc[table.index.isin(competition.curated.index)]
        if groups != "auto" and known.empty:
            raise MelfoldError(f"{path} has no curated clip", f"{len(table)} clips", "Give the groups of this competition")
        return known
    if groups == "none":
        return number_groups([])
    if not next(iter(competition.curated["path"])).parent.is_dir():
        fix = "Copy the fold table here, or use --set folds.groups=none"
        raise MelfoldError("grouping identical clips needs their audio", str(competition.root), fix)
    return number_groups(find_identical(dict(competition.curated["path"])))


def groups_path(competition_name: str, home: Home, groups: str) -> Path | None:
    """The table that `folds.groups` stands for, if it does.

    Raises:
        MelfoldError: FAT2019's table, which everybody's folds are made from, is nowhere.
    """
    if groups in ("none", "identical"):
        return None
    if groups != "auto":
        return Path(groups)
    name = f"{competition_name}_groups.csv"
    for folder in (home.folds, Path(__file__).resolve().parents[3] / "folds"):
        if (folder / name).exists():
            return folder / name
    if competition_name == DEFAULT:
        fix = "Copy it from the project's folds/, or use --set folds.groups=identical"
        raise MelfoldError("the groups of FAT2019's clips are missing", str(home.folds / name), fix)
    return None


def read_groups(path: Path) -> pd.Series:
    """The `group` of each `fname` of a table; further columns do not matter.

    Raises:
        MelfoldError: a missing table, other columns, or a duplicate clip.
    """
    odd = ("is no table of groups", "Its columns are fname,group")
    return read_clips(path, {"group": str}, ("cannot read folds.groups", "Fix the path"), odd)["group"]


def read_clips(path: Path, columns: Mapping[str, type], unread: tuple[str, str], odd: tuple[str, str]) -> pd.DataFrame:
    """Some columns of a table that the user gives, by `fname`, which may be `NA`, each there once.

    Args:
        columns: their types.
        unread, odd: what is wrong, and how to fix it, with a file that cannot be read, and with one that is no such table.
    """
    try:
        table = pd.read_csv(path, dtype=str, encoding="utf-8-sig", keep_default_na=False)
        table = table.set_index("fname", verify_integrity=True)
        return pd.DataFrame({name: table[name].astype(own) for name, own in columns.items()})
    except OSError as error:
        raise MelfoldError(unread[0], f"{path} ({error.strerror})", unread[1]) from None
    except (KeyError, ValueError) as error:
        raise MelfoldError(f"{path} {odd[0]}", str(error), odd[1]) from None


def write_groups(path: Path, groups: pd.Series) -> None:
    """Write `fname,group`.

    Raises:
        MelfoldError: a different file exists.
    """
    text = groups.rename("group").sort_index().to_csv(index_label="fname", lineterminator="\n")
    if path.exists() and path.read_text() != text:
        raise MelfoldError("the file exists already", str(path), "It may hold your own work: choose another name")
    write_text(path, text)


def number_groups(groups: Iterable[Sequence[str]]) -> pd.Series:
    """Lists of clips as a number by `fname`."""
    numbers = {fname: number for number, group in enumerate(groups) for fname in group}
    return pd.Series(numbers, dtype=int).rename_axis("fname").rename("group")


def join_pairs(fnames: Sequence[str], pairs: np.ndarray) -> pd.Series:
    """Groups of clips linked by row numbers `(pairs, 2)`, also through others; numbered in the order of their first clip."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(fnames), len(fnames)))
    _, parts = connected_components(links, directed=False)
    return pd.Series(pd.factorize(parts)[0], index=pd.Index(fnames, name="fname"), name="group")


def read_ids(path: Path) -> pd.DataFrame:
    """`labels` (a tuple) and `id` of each clip of an official table with Freesound ids, sorted by `fname`.

    Raises:
        MelfoldError: no such table.
    """
    odd = ("has no Freesound ids", "It needs fname, labels and freesound_id")
    table = read_clips(path, {"freesound_id": int, "labels": str}, ("cannot read the table", "Fix the path"), odd).sort_index()
    return pd.DataFrame({"labels": table["labels"].map(split_labels), "id": table["freesound_id"]})


def twin_pairs(table: pd.DataFrame) -> np.ndarray:
    """Row numbers `(pairs, 2)` in a table of `read_ids`: clips that share a label, with ids within `ID_GAP` of each other."""
    order = np.argsort(table["id"].to_numpy(), kind="stable")
    ids, labels = table["id"].to_numpy()[order], [set(table["labels"].iloc[row]) for row in order]
    pairs = []
    for i, own in enumerate(labels):
        for j in range(i + 1, int(np.searchsorted(ids, ids[i] + ID_GAP, "right"))):
            if own & labels[j]:
                pairs.append((order[i], order[j]))
    return np.array(pairs, int).reshape(-1, 2)


def clips_with_twin_outside(pairs: np.ndarray, folds: np.ndarray) -> int:
    """How many clips have a twin in another fold, so in the training set of the model that scores them."""
    return len(np.unique(pairs[folds[pairs[:, 0]] != folds[pairs[:, 1]]]))


def tables_of(folder: Path, fnames: pd.Index) -> Iterator[tuple[Path, pd.Series]]:
    """The fold tables of a folder for just these clips: path and folds, in the clips' order."""
    for path in sorted(folder.glob("*.csv")):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if {"fname", "fold"} <= set(table) and sorted(table["fname"]) == sorted(fnames):
            yield path, table.set_index("fname").loc[fnames, "fold"]


def find_identical(paths: dict[str, Path]) -> list[list[str]]:
    """Groups of clips whose decoded audio is the same, sample by sample. Unreadable clips are skipped.

    Only clips of the same length are decoded.
    """
    import soundfile

    by_length: dict[tuple[int, int], list[str]] = defaultdict(list)
    for fname, path in paths.items():
        try:
            header = soundfile.info(path)
        except (soundfile.SoundFileError, OSError):
            continue  # `check` reports it
        by_length[header.frames, header.samplerate].append(fname)
    groups: dict[bytes, list[str]] = defaultdict(list)
    for same in by_length.values():
        for fname in same if len(same) > 1 else ():
            try:
                samples, _ = soundfile.read(paths[fname], dtype="float32")
            except soundfile.SoundFileError:
                continue
            groups[hashlib.sha256(samples.tobytes()).digest()].append(fname)
    return [sorted(group) for group in groups.values() if len(group) > 1]

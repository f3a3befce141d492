"""Fold tables: who is held out when."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.files import write_text


def fold_table_name(competition_name: str, n_folds: int, seed: int, *, grouped: bool = False) -> str:
    """The file name of a fold table."""
    return f"{competition_name}_curated_{n_folds}fold_seed{seed}{'_grouped' if grouped else ''}.csv"


def make_folds(targets: pd.DataFrame, n_folds: int, seed: int, groups: dict[str, int] | None = None) -> pd.DataFrame:
    """Multilabel-stratified folds from the labels alone.

    Sechidis et al., "On the Stratification of Multi-Label Data" (2011), as in iterative-stratification.

    Args:
        targets: multi-hot `(clips, labels)`, in any order: rows are sorted by `fname` first.
        groups: fname -> number; clips of one number stay together.

    Returns:
        `fold` (0-based) indexed by `fname`, sorted.
    """
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

    targets = targets.sort_index()
    if n_folds > len(targets):
        raise MelfoldError("more folds than clips", f"{n_folds} folds, {len(targets)} clips")
    groups = groups or {}
    key = pd.Series([groups.get(fname, -1 - i) for i, fname in enumerate(targets.index)], index=targets.index)
    units = targets.groupby(key, sort=False).max()
    fold_of_unit = pd.Series(-1, index=units.index)
    splitter = MultilabelStratifiedKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(np.zeros(len(units)), units.to_numpy(int))):
        fold_of_unit.iloc[held_out] = fold
    return pd.DataFrame({"fold": fold_of_unit.loc[key.to_numpy()].to_numpy()}, index=targets.index)


def label_deviation(targets: pd.DataFrame, folds: pd.DataFrame) -> int:
    """The most clips by which any label in any fold is off an even split, rounded up."""
    counts = targets.groupby(folds["fold"].reindex(targets.index)).sum()
    return int(np.ceil((counts - targets.sum() / len(counts)).abs().to_numpy().max() - 1e-9))


def write_folds(path: Path, folds: pd.DataFrame) -> None:
    """Write `fname,fold`. An existing table that differs is never overwritten.

    Raises:
        MelfoldError: another table stands there.
    """
    text = folds.to_csv(index_label="fname", lineterminator="\n")
    if path.exists():
        if path.read_text() != text:
            raise MelfoldError(
                "a different fold table stands there", str(path), "Runs may rest on it: move it away, or use another seed"
            )
        return
    write_text(path, text)


def read_folds(path: Path, competition: Competition) -> pd.DataFrame:
    """Read a fold table and hold it against the curated clips.

    Raises:
        MelfoldError: a missing table, or one whose clips are not the competition's.
    """
    try:
        folds = pd.read_csv(path, dtype={"fname": str, "fold": "int64"}, encoding="utf-8-sig")
        if list(folds.columns) != ["fname", "fold"]:
            raise ValueError(f"columns {', '.join(folds.columns)}, not fname,fold")
        folds = folds.set_index("fname")
    except FileNotFoundError:
        raise MelfoldError("no fold table", str(path), "Run `melfold folds`") from None
    except ValueError as error:
        raise MelfoldError(f"{path} is no fold table", str(error)) from None
    if folds.index.has_duplicates or set(folds.index) != set(competition.curated.index):
        odd = sorted(set(folds.index) ^ set(competition.curated.index)) or list(folds.index[folds.index.duplicated()])
        raise MelfoldError(f"{path.name} is not about these curated clips", f"{len(odd)} differ, first {odd[0]}")
    numbers = sorted(set(folds["fold"]))
    if numbers != list(range(len(numbers))) or len(numbers) < 2:
        raise MelfoldError(f"{path.name}: folds must be 0, 1, …", str(numbers))
    return folds


def find_identical(paths: dict[str, Path]) -> list[list[str]]:
    """Groups of clips whose decoded audio is the same, sample by sample. Unreadable clips are passed over.

    Only clips of equal length are decoded.
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

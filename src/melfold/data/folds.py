"""Fold tables: which clips are held out together.

A table made here has a stamp beside it, `<name>.json`, which says what it was made from. A table without a stamp is the user's
own.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from melfold.artefacts import Artefact, listed
from melfold.config import FoldsConfig
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.files import Home, digest, write_text


def fold_table(competition: Competition, home: Home, config: FoldsConfig) -> tuple[Path, int]:
    """Make a fold table, or check the one that exists.

    Returns:
        Its path, and by how many clips, at most, a label's count in a fold is off an even split.

    Raises:
        MelfoldError: more folds than clips; or an existing table that `read_folds` refuses or that has another number of folds.
    """
    path = fold_table_path(home, competition.name, config)
    targets = competition.targets()
    if not path.exists():
        groups = find_identical(dict(competition.curated["path"])) if config.group_identical else []
        group_of = {fname: number for number, group in enumerate(groups) for fname in group}
        folds = make_folds(targets, config.n_folds, config.seed, group_of)
        write_folds(path, folds, fold_inputs(competition.curated["labels"], config, groups))
    table = read_folds(path, competition)
    count = table["fold"].nunique()
    if count != config.n_folds:
        found = f"the recipe wants {config.n_folds}"
        raise MelfoldError(f"{path.name} has {count} folds", found, "Rename it, or change the recipe")
    return path, label_deviation(targets, table)


def fold_table_path(home: Home, competition_name: str, config: FoldsConfig) -> Path:
    """The file of a fold table. A grouped one has another name."""
    grouped = "_grouped" if config.group_identical else ""
    return home.folds / f"{competition_name}_curated_{config.n_folds}fold_seed{config.seed}{grouped}.csv"


def fold_inputs(labels: pd.Series, config: FoldsConfig, groups: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    """What a fold table is made from, as its stamp holds it.

    Args:
        labels: the tuple of labels of each curated clip.
        groups: clips that stay together.
    """
    return {
        "curated_labels": _labels_digest(labels),
        "n_folds": config.n_folds,
        "seed": config.seed,
        "groups": digest(sorted(map(sorted, groups)))[:16] if groups else "",
    }


def _labels_digest(labels: pd.Series) -> str:
    return digest({fname: sorted(own) for fname, own in labels.items()})[:16]


def make_folds(targets: pd.DataFrame, n_folds: int, seed: int, groups: dict[str, int] | None = None) -> pd.DataFrame:
    """Multilabel-stratified folds; they depend on the labels only.

    Sechidis et al., "On the Stratification of Multi-Label Data" (2011), as in iterative-stratification.

    Args:
        targets: multi-hot `(clips, labels)`, in any order: rows are sorted by `fname` first.
        groups: fname -> number; clips with the same number stay together.

    Returns:
        `fold` (0-based), indexed by `fname`, sorted.

    Raises:
        MelfoldError: more folds than clips.
    """
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

    targets = targets.sort_index()
    key = pd.Series([(groups or {}).get(fname, -1 - i) for i, fname in enumerate(targets.index)], index=targets.index)
    units = targets.groupby(key, sort=False).max()
    if n_folds > len(units):
        same = f" ({len(units)} that differ)" if groups else ""
        raise MelfoldError("more folds than clips", f"{n_folds} folds, {len(targets)} clips{same}", "Use fewer folds")
    fold_of_unit = pd.Series(-1, index=units.index)
    splitter = MultilabelStratifiedKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(np.zeros(len(units)), units.to_numpy(int))):
        fold_of_unit.iloc[held_out] = fold
    return pd.DataFrame({"fold": fold_of_unit.loc[key.to_numpy()].to_numpy()}, index=targets.index)


def label_deviation(targets: pd.DataFrame, folds: pd.DataFrame) -> int:
    """By how many clips, at most, a label's count in a fold is off an even split, rounded up."""
    counts = targets.groupby(folds["fold"].reindex(targets.index)).sum()
    return int(np.ceil((counts - targets.sum() / len(counts)).abs().to_numpy().max() - 1e-9))


def write_folds(path: Path, folds: pd.DataFrame, inputs: Mapping[str, Any] | None = None) -> None:
    """Write `fname,fold`. An existing table with other contents is never overwritten.

    Args:
        inputs: of `fold_inputs`, for the table's stamp; without them it gets none.

    Raises:
        MelfoldError: a different table already exists.
    """
    text = folds.to_csv(index_label="fname", lineterminator="\n")
    if path.exists():
        if path.read_text() != text:
            raise MelfoldError(
                "a different fold table already exists", str(path), "Runs may use it: move it away, or use another seed"
            )
        return
    artefact = Artefact.of(path)
    artefact.remove()  # the stamp of a table that was deleted
    write_text(path, text)
    if inputs is not None:
        artefact.commit(inputs)


def read_folds(path: Path, competition: Competition) -> pd.DataFrame:
    """Read a fold table and check that it fits the curated clips and its own stamp.

    Returns:
        `fold`, indexed by `fname`, in the order of the file.

    Raises:
        MelfoldError: a missing table, one with other clips, or one that was edited or made from other labels.
    """
    try:
        folds = pd.read_csv(path, dtype={"fname": str, "fold": "int64"}, encoding="utf-8-sig", keep_default_na=False)
        if list(folds.columns) != ["fname", "fold"]:
            raise ValueError(f"columns {', '.join(folds.columns)}, not fname,fold")
        folds = folds.set_index("fname")
    except FileNotFoundError:
        raise MelfoldError("no fold table", str(path), "Run `melfold folds`") from None
    except ValueError as error:
        raise MelfoldError(f"{path} is not a fold table", str(error)) from None
    if folds.index.has_duplicates or set(folds.index) != set(competition.curated.index):
        odd = sorted(set(folds.index) ^ set(competition.curated.index)) or list(folds.index[folds.index.duplicated()])
        raise MelfoldError(f"{path.name} does not fit the curated clips", f"{len(odd)} differ, first {odd[0]}")
    numbers = sorted(set(folds["fold"]))
    if numbers != list(range(len(numbers))) or len(numbers) < 2:
        raise MelfoldError(f"{path.name}: folds must be 0, 1, …", str(numbers))
    _check_stamp(path, competition)
    return folds


def _check_stamp(path: Path, competition: Competition) -> None:
    artefact = Artefact.of(path)
    if not artefact.stamp.exists():
        return
    if changes := artefact.changes({"curated_labels": _labels_digest(competition.curated["labels"])}):
        raise MelfoldError(
            f"fold table {path.name} is no longer as it was made",
            listed(changes),
            f"Delete it to make it again, or delete {artefact.stamp.name} to keep it as your own",
        )


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

"""Fold tables: which clips are held out together.

A table made here has a stamp beside it, `<name>.json`, which says what it was made from. A table without a stamp is the user's
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from melfold.artefacts import Artefact, listed
from melfold.config import FoldsConfig
from melfold.data.competition import Competition
from melfold.data.groups import find_groups, groups_path
from melfold.errors import MelfoldError
from melfold.files import Home, atomic_path, digest


@dataclass(frozen=True)
class Balance:
    """How even a fold table is.

    Args:
        sizes: clips of the smallest and of the largest fold.
        deviation: by how many clips, at most, a label's count in a fold is off an even split, rounded up.
        too_large: labels that cannot be even, and are not part of `deviation`: one group has more clips of them than a fold's
            share. The clips of that group, and all clips of the label.
    """

    sizes: tuple[int, int]
    deviation: int
    too_large: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        small, large = self.sizes
        labels = ", ".join(f"{label} {own} of {all}" for label, (own, all) in self.too_large.items())
        but = f", but for those that have more clips in one group than fit a fold: {labels}" if labels else ""
        even = f"In no fold is a label more than {self.deviation} clip{'s' * (self.deviation != 1)} away from an even split"
        return f"Folds of {small} to {large} clips. {even}{but}."


def fold_table(competition: Competition, home: Home, config: FoldsConfig) -> tuple[Path, Balance]:
    """Make a fold table, or check the one that exists.

    Raises:
        MelfoldError: more folds than clips; or an existing table that `read_folds` refuses, or that has another number of folds
            or other groups.
    """
    path = fold_table_path(home, competition.name, config)
    targets, labels = competition.targets(), competition.curated["labels"]
    if not path.exists():
        groups = find_groups(competition, home, config.groups)
        folds = make_folds(targets, config.n_folds, config.seed, groups)
        write_folds(path, folds, fold_inputs(labels, config, groups))
    elif groups_path(competition.name, home, config.groups):
        groups = find_groups(competition, home, config.groups)
        _check_stamp(path, fold_inputs(labels, config, groups))
    table = read_folds(path, competition)
    if (count := table["fold"].nunique()) != config.n_folds:
        found = f"the recipe wants {config.n_folds}"
        raise MelfoldError(f"{path.name} has {count} folds", found, "Rename it, or change the recipe")
    return path, balance_of(targets, table)


def fold_table_path(home: Home, competition_name: str, config: FoldsConfig) -> Path:
    """The file of a fold table. Its name says by what clips are grouped."""
    kinds = {"none": "", "auto": "_grouped", "identical": "_identical"}
    kind = kinds.get(config.groups, f"_grouped_{Path(config.groups).stem}")
    return home.folds / f"{competition_name}_curated_{config.n_folds}fold{kind}_seed{config.seed}.csv"


def fold_inputs(labels: pd.Series, config: FoldsConfig, groups: pd.Series | None = None) -> dict[str, Any]:
    """What a fold table is made from, as its stamp holds it: each curated clip's labels, the groups of clips, and settings."""
    together = [] if groups is None else [sorted(own) for own in groups.groupby(groups).groups.values() if len(own) > 1]
    return {
        "curated_labels": _labels_digest(labels),
        "n_folds": config.n_folds,
        "seed": config.seed,
        "groups": digest(sorted(together))[:16] if together else "",
    }


def _labels_digest(labels: pd.Series) -> str:
    return digest({fname: sorted(own) for fname, own in labels.items()})[:16]


def make_folds(targets: pd.DataFrame, n_folds: int, seed: int, groups: pd.Series | None = None) -> pd.DataFrame:
    """Folds that are even in size and in every label; they depend on the labels and groups only.

    Without groups by Sechidis et al., "On the Stratification of Multi-Label Data" (2011), as in iterative-stratification; with
    groups by `assign`.

    Args:
        targets: multi-hot `(clips, labels)`, in any order: rows are sorted by `fname` first.
        groups: fname -> group; clips of the same group stay together. Clips that are not there are alone.

    Returns:
        `fold` (0-based), indexed by `fname`, sorted; and with groups of several clips `group`, numbered from 0.

    Raises:
        MelfoldError: more folds than clips or groups.
    """
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

    targets = targets.sort_index()
    if n_folds > len(targets):
        raise MelfoldError("more folds than clips", f"{n_folds} folds, {len(targets)} clips")
    known = {} if groups is None else groups.to_dict()
    keys = [f"group {known[fname]}" if fname in known else f"clip {fname}" for fname in targets.index]
    group = pd.factorize(np.array(keys))[0]
    folds = pd.DataFrame({"fold": -1}, index=targets.index)
    if group.max() + 1 == len(targets):
        splitter = MultilabelStratifiedKFold(n_splits=n_folds, shuffle=True, random_state=seed)
        for fold, (_, held_out) in enumerate(splitter.split(np.zeros(len(targets)), targets.to_numpy(int))):
            folds.iloc[held_out, 0] = fold
        return folds
    if n_folds > group.max() + 1:
        raise MelfoldError("more folds than groups", f"{n_folds} folds, {group.max() + 1} groups", "Use fewer folds")
    counts = targets.assign(clips=1).groupby(group).sum().to_numpy(np.float64)
    folds["fold"] = assign(counts, n_folds, seed)[group]
    return folds.assign(group=group)


def assign(counts: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """A fold for each group, such that the sums in all folds are as even as can be.

    The largest groups come first, each into the fold that needs it most; then single groups move as long as that helps. What
    is made small is the sum of squared distances from an even split, over folds and columns. All `counts` `(groups, columns)`
    are whole numbers, so every machine finds the same folds; the last column is the number of clips.
    """
    n_groups = len(counts)
    # A fold's sums less its share, times the number of folds: whole numbers.
    excess = -np.tile(counts.sum(axis=0), (n_folds, 1))
    shuffled = np.random.default_rng(seed).permutation(n_groups)
    fold = np.empty(n_groups, int)
    for group in shuffled[np.argsort(-counts[shuffled, -1], kind="stable")]:
        fold[group] = np.argmin(excess @ counts[group])
        excess[fold[group]] += n_folds * counts[group]
    squares, rows = n_folds * (counts**2).sum(axis=1)[:, None], np.arange(n_groups)
    while True:
        need = counts @ excess.T
        change = need - need[rows, fold][:, None] + squares  # half of what a move to each fold changes
        change[rows, fold] = 0
        group, to = np.unravel_index(np.argmin(change), change.shape)
        if change[group, to] >= 0:
            return fold
        excess[fold[group]] -= n_folds * counts[group]
        excess[to] += n_folds * counts[group]
        fold[group] = to


def balance_of(targets: pd.DataFrame, folds: pd.DataFrame) -> Balance:
    """How even the labels of clips are over the folds of a table; of `read_folds`, or with the same columns."""
    folds = folds.reindex(targets.index)
    counts, n_folds = targets.sum(), folds["fold"].nunique()
    largest = targets.groupby(folds["group"]).sum().max()
    fits = largest <= np.ceil(counts / n_folds)
    off = (targets.groupby(folds["fold"]).sum() - counts / n_folds).abs().max()
    too_large = {label: (int(largest[label]), int(counts[label])) for label in targets.columns[~fits]}
    sizes = folds["fold"].value_counts()
    return Balance((int(sizes.min()), int(sizes.max())), int(np.ceil(off[fits].max() - 1e-9)) if fits.any() else 0, too_large)


def write_folds(path: Path, folds: pd.DataFrame, inputs: Mapping[str, Any] | None = None) -> None:
    """Write `fname,fold`, with groups also `group`. An existing table with other contents is never overwritten.

    Args:
        inputs: of `fold_inputs`, for the table's stamp; without them it gets none.

    Raises:
        MelfoldError: a different table already exists.
    """
    text = folds.to_csv(index_label="fname", lineterminator="\n")
    if path.exists():
        if path.read_text() != text:
            fix = "Runs may use it: move it away, or use another seed"
            raise MelfoldError("a different fold table already exists", str(path), fix)
        return
    artefact = Artefact.of(path)
    artefact.remove()  # the stamp of a table that was deleted
    with atomic_path(path) as draft:
        draft.write_text(text)
        if inputs is not None:
            artefact.commit(inputs, draft=draft)  # before the table: one without a stamp counts as the user's own


def read_folds(path: Path, competition: Competition) -> pd.DataFrame:
    """Read a fold table and check that it fits the curated clips and its own stamp.

    Returns:
        `fold` and `group` (text; a clip that is alone has its own name), indexed by `fname`, in the order of the file.

    Raises:
        MelfoldError: a missing table, one with other clips, one that splits a group, or one that was edited or made from other
            labels.
    """
    try:
        types = {"fname": str, "fold": "int64", "group": str}
        folds = pd.read_csv(path, dtype=types, encoding="utf-8-sig", keep_default_na=False)
        if list(folds.columns) not in (["fname", "fold"], ["fname", "fold", "group"]):
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
    if "group" not in folds:
        folds["group"] = folds.index
    split = folds.groupby("group")["fold"].nunique().loc[lambda count: count > 1]
    if len(split):
        found = f"{len(split)}, first {split.index[0]}"
        raise MelfoldError(f"{path.name} splits groups over folds", found, "Put each into one fold")
    _check_stamp(path, {"curated_labels": _labels_digest(competition.curated["labels"])})
    return folds


def _check_stamp(path: Path, inputs: Mapping[str, Any]) -> None:
    artefact = Artefact.of(path)
    if artefact.stamp.exists() and (changes := artefact.changes(inputs)):
        fix = f"Delete it to make it again, or delete {artefact.stamp.name} to keep it as your own"
        raise MelfoldError(f"fold table {path.name} is no longer as it was made", listed(changes), fix)

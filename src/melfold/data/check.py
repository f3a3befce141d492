"""Check a download before any long work: is it complete, and can every file be read?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from melfold.compute import Compute
from melfold.config import Recipe
from melfold.data.audio import cut_short
from melfold.data.competition import SPLITS, Competition, load_competition, with_bad_clips
from melfold.data.folds import balance_of, fold_table_path, read_folds
from melfold.data.groups import find_identical
from melfold.errors import MelfoldError
from melfold.files import Home


@dataclass(frozen=True)
class Checked:
    """What `check` found in a download that can be used: a row per split, notes, and whether every test clip has a file."""

    splits: pd.DataFrame
    notes: list[str]
    complete: bool


def check(root: Path, home: Home, recipe: Recipe, compute: Compute = Compute()) -> Checked:
    """Validate the tables, the folders and the header of every file.

    Args:
        recipe: clips that it leaves out need not be readable.
        compute: only its `progress` is used.

    Raises:
        MelfoldError: one line for each problem.
    """
    competition = load_competition(root, recipe.data.exclude)
    recipe = with_bad_clips(recipe, competition)
    problems, rows, notes = [], {}, []
    done, total = 0, sum(len(competition.split(split)) for split in SPLITS)
    for split in SPLITS:
        table = competition.split(split)
        if not len(table):
            notes.append(f"no {split} clips in this download; recipes that use them cannot run")
            continue
        headers = []
        for fname, path in table["path"].items():
            header, why = _read_header(path) if split != "test" or path.exists() else (None, "")  # as was said
            if header:
                headers.append(header)
            if why and fname not in recipe.data.exclude:
                problems.append(MelfoldError(f"{split}: unreadable audio", f"{fname} ({why})", "Download it again"))
            done += 1
            compute.progress(done, total, "reading headers")
        rows[split] = _summary(table, headers)
    if problems:
        raise MelfoldError.many(problems)
    for fname, why in recipe.data.exclude.items():
        if fname in competition.curated.index or fname in competition.noisy.index:
            notes.append(f"{fname} is left out by recipe {recipe.name}: {why}")
    notes += _fold_notes(competition, home, recipe)
    return Checked(pd.DataFrame(rows).T, notes, all(path.exists() for path in competition.test["path"]))


def _read_header(path: Path) -> tuple[Any, str]:
    """What soundfile says of a file, None if nothing; and why the file cannot be used, empty if it can."""
    import soundfile

    try:
        header = soundfile.info(path)
    except (soundfile.SoundFileError, OSError) as error:
        return None, str(error).strip()
    return header, cut_short(path) if header.frames else "no samples"


def _summary(table: pd.DataFrame, headers: Sequence[Any]) -> dict[str, Any]:
    seconds = [header.duration for header in headers]
    kinds = Counter(f"{h.samplerate} Hz, {h.channels} ch, {h.format} {h.subtype}" for h in headers)
    return {
        "clips": len(table),
        "multi-label": (table["labels"].map(len) > 1).sum() if "labels" in table else None,
        "hours": sum(seconds) / 3600,
        "shortest s": min(seconds, default=0),
        "longest s": max(seconds, default=0),
        "audio": "; ".join(kind for kind, _ in kinds.most_common(3)),
    }


def _fold_notes(competition: Competition, home: Home, recipe: Recipe) -> list[str]:
    """Labels that no fold table can spread evenly, and clips with identical audio."""
    path = fold_table_path(home, competition.name, recipe.folds)
    table = read_folds(path, competition) if path.exists() else None
    notes = []
    if table is not None and (balance := balance_of(competition.targets(), table)).too_large:
        notes.append(f"{path.name}: {balance}")
    for group in find_identical(dict(competition.curated["path"])):
        where = ""
        if table is not None:
            folds = sorted(set(table.loc[group, "fold"]))
            where = f" (fold {', '.join(map(str, folds))}"
            where += ": `melfold folds --groups identical` keeps them together)" if len(folds) > 1 else ")"
        notes.append(f"identical audio: {', '.join(group)}{where}")
    return notes

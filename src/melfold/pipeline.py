"""Checking a download."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from melfold.compute import Progress, silent
from melfold.config import Recipe
from melfold.data.competition import SPLITS, Competition, load_competition
from melfold.data.folds import find_identical, read_folds
from melfold.data.logmel import cut_short
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.stages import folds_path


@dataclass(frozen=True)
class Report:
    """What `check` found in a sane download. `splits`: a row a split. `notes`: what is worth knowing."""

    splits: pd.DataFrame
    notes: list[str]


def check(root: Path, home: Home, recipe: Recipe, *, progress: Progress = silent) -> Report:
    """Validate tables, folders and every file's header.

    Raises:
        MelfoldError: with a line for each problem.
    """
    import soundfile

    competition = load_competition(root)
    problems, rows, notes = [], {}, []
    total = sum(len(competition.split(s)) for s in SPLITS)
    done = 0
    for split in SPLITS:
        table = competition.split(split)
        seconds, kinds = [], Counter()
        for fname, path in table["path"].items():
            try:
                header = soundfile.info(path)
            except (soundfile.SoundFileError, OSError) as error:
                if fname not in recipe.data.exclude:
                    problems.append(
                        MelfoldError(f"{split}: unreadable audio", f"{fname} ({str(error).strip()})", "Download it again")
                    )
                continue
            finally:
                done += 1
                progress(done, total, "reading headers")
            cut = "" if header.frames else "no samples"
            if (cut := cut or cut_short(path)) and fname not in recipe.data.exclude:
                problems.append(MelfoldError(f"{split}: unreadable audio", f"{fname} ({cut})", "Download it again"))
            seconds.append(header.duration)
            kinds[f"{header.samplerate} Hz, {header.channels} ch, {header.format} {header.subtype}"] += 1
        if len(table):
            multi = sum(len(labels) > 1 for labels in table["labels"]) if split != "test" else None
            rows[split] = {
                "clips": len(table),
                "multi-label": multi,
                "hours": sum(seconds) / 3600,
                "shortest s": min(seconds, default=0),
                "longest s": max(seconds, default=0),
                "audio": "; ".join(kind for kind, _ in kinds.most_common(3)),
            }
        else:
            notes.append(f"no {split} clips in this download; recipes that use them cannot run")
    notes += [f"{fname} is left out by recipe {recipe.name}: {why}" for fname, why in excluded_here(competition, recipe).items()]
    if not problems:
        notes += _identical_notes(competition, home, recipe)
    if problems:
        raise MelfoldError.many(problems)
    return Report(pd.DataFrame(rows).T, notes)


def excluded_here(competition: Competition, recipe: Recipe) -> dict[str, str]:
    """The clips of this competition that a recipe leaves out."""
    return {f: why for f, why in recipe.data.exclude.items() if f in competition.curated.index or f in competition.noisy.index}


def _identical_notes(competition: Competition, home: Home, recipe: Recipe) -> list[str]:
    path = folds_path(home, competition, recipe)
    table = read_folds(path, competition)["fold"] if path.exists() else None
    notes = []
    for group in find_identical(dict(competition.curated["path"])):
        where = ""
        if table is not None:
            folds = sorted(set(table.loc[group]))
            where = f" (fold {', '.join(map(str, folds))}"
            where += ": `melfold folds --group-identical` keeps them together)" if len(folds) > 1 else ")"
        notes.append(f"identical audio: {', '.join(group)}{where}")
    return notes

"""Check and score a `submission.csv`, made by this kit or not."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import pandas as pd

from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.facts import split_labels
from melfold.metrics import interval_of, lwlrap
from melfold.probs import Probs, read_probs

log = logging.getLogger(__name__)


def check_submission(path: Path, competition: Competition) -> Probs:
    """Check any CSV against what the competition accepts.

    Raises:
        MelfoldError: with a line for each problem: columns, rows, their order, duplicates, values that are not finite
            numbers in 0..1, or rows in which all labels tie.
    """
    if not path.is_file():
        raise MelfoldError("no such file", str(path), "Give the path of a CSV")
    problems: list[MelfoldError] = []
    try:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        table = pd.read_csv(path, dtype={"fname": str}, float_precision="round_trip")
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise MelfoldError(f"{path} is no CSV", str(error).splitlines()[0]) from None
    wanted = ["fname", *competition.labels]
    if header != wanted:
        odd = next(
            (f"column {i + 1} is {a!r}, not {b!r}" for i, (a, b) in enumerate(zip(header, wanted, strict=False)) if a != b), ""
        )
        raise MelfoldError(f"{path.name}: wrong columns", odd or f"{len(header)} columns, not {len(wanted)}")
    rows, asked = list(table["fname"]), list(competition.test.index)
    if len(set(rows)) < len(rows):
        problems.append(
            MelfoldError(f"{path.name}: duplicate clips", f"{len(rows) - len(set(rows))}, first {_first_twice(rows)}")
        )
    for what, clips in (("clips missing", set(asked) - set(rows)), ("unknown clips", set(rows) - set(asked))):
        if clips:
            problems.append(MelfoldError(f"{path.name}: {what}", f"{len(clips)}, first {min(map(str, clips))}"))
    if not problems and rows != asked:
        at = next(i for i, (a, b) in enumerate(zip(rows, asked, strict=True)) if a != b)
        problems.append(MelfoldError(f"{path.name}: wrong order", f"row {at + 1} is {rows[at]}, not {asked[at]}"))
    numbers = table[list(competition.labels)]
    if not all(pd.api.types.is_numeric_dtype(t) for t in numbers.dtypes):
        column = next(c for c in numbers if not pd.api.types.is_numeric_dtype(numbers[c]))
        problems.append(MelfoldError(f"{path.name}: not numbers", f"column {column}"))
        raise MelfoldError.many(problems)
    values = numbers.to_numpy(np.float64)
    bad = ~((values >= 0) & (values <= 1)).all(axis=1)
    if bad.any():
        problems.append(MelfoldError(f"{path.name}: values not in 0..1", f"{bad.sum()} clips, first {rows[bad.argmax()]}"))
    tied = (values == values[:, :1]).all(axis=1) & ~bad
    if tied.any():
        problems.append(MelfoldError(f"{path.name}: all labels tie", f"{tied.sum()} clips, first {rows[tied.argmax()]}"))
    if problems:
        raise MelfoldError.many(problems)
    return numbers.astype(np.float32).set_axis(pd.Index(rows, name="fname"))


def _first_twice(rows: list[str]) -> str:
    seen: set[str] = set()
    return next(r for r in rows if r in seen or seen.add(r))  # type: ignore[func-returns-value]


def score_submission(path: Path, truth: Path) -> pd.DataFrame:
    """Score a submission as the leaderboard would: `clips, lwlrap, low, high` for Public and Private, each if covered.

    Args:
        path: any table of probabilities; rows in any order.
        truth: `fname,labels,usage`, published after the competition. Nothing else in the kit reads it.

    Raises:
        MelfoldError: a truth table that is no such table, or a file that covers neither half whole.
    """
    probs = read_probs(path)
    try:
        table = pd.read_csv(truth, dtype=str, encoding="utf-8-sig", keep_default_na=False)
        table = table.set_index("fname", verify_integrity=True)
        usage, labels = table["usage"], table["labels"].map(split_labels)
    except OSError as error:
        raise MelfoldError("cannot read the truth", f"{truth} ({error.strerror})", "Give the published table: --truth") from None
    except (KeyError, ValueError) as error:
        raise MelfoldError(f"{truth} is no truth table", str(error), "It needs fname, labels and usage") from None
    unknown = {label for own in labels for label in own or ("",)} - set(probs.columns)  # a clip without labels is refused too
    if unknown:
        raise MelfoldError(f"{truth} has labels that {path} lacks", ", ".join(sorted(unknown)[:5]))
    rows = []
    for half in ("Public", "Private"):
        fnames = table.index[usage == half]
        missing = fnames.difference(probs.index)
        if len(fnames) and 0 < len(missing) < len(fnames):
            log.warning(
                "the %s half is not scored: %d of %d clips missing, first %s", half, len(missing), len(fnames), missing[0]
            )
        if len(fnames) and not len(missing):
            own = [set(labels[f]) for f in fnames]
            values = np.array([[label in names for label in probs.columns] for names in own], np.float32)
            targets = pd.DataFrame(values, index=fnames, columns=probs.columns)
            interval = interval_of(targets, probs, None)
            rows.append((half, len(fnames), lwlrap(targets, probs), interval.low, interval.high))
    if not rows:
        raise MelfoldError(f"{path} covers neither half of {truth}", f"{len(probs)} clips", "Use the truth of this competition")
    return pd.DataFrame(rows, columns=["usage", "clips", "lwlrap", "low", "high"]).set_index("usage")

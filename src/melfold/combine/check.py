"""Check and score a `submission.csv`, made by this kit or not."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from melfold.data.competition import Competition, multi_hot
from melfold.data.groups import read_clips
from melfold.errors import MelfoldError
from melfold.facts import split_labels
from melfold.metrics import bootstrap_interval, lwlrap
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
    try:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        table = pd.read_csv(path, dtype={"fname": str}, float_precision="round_trip")
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise MelfoldError(f"{path} is no CSV", str(error).splitlines()[0]) from None
    wanted = ["fname", *competition.labels]
    if header != wanted:
        odd = (f"column {i} is {a!r}, not {b!r}" for i, (a, b) in enumerate(zip(header, wanted, strict=False), 1) if a != b)
        raise MelfoldError(f"{path.name}: wrong columns", next(odd, f"{len(header)} columns, not {len(wanted)}"))
    if problems := list(_problems(table.set_index("fname"), list(competition.test.index), path.name)):
        raise MelfoldError.many(problems)
    return table.set_index("fname").astype(np.float32)


def _problems(table: pd.DataFrame, asked: Sequence[str], name: str) -> Iterator[MelfoldError]:
    clips = table.index
    twice = clips[clips.duplicated()]
    if len(twice):
        yield MelfoldError(f"{name}: duplicate clips", f"{len(twice)}, first {twice[0]}")
    missing, unknown = set(asked) - set(clips), set(clips) - set(asked)
    for what, odd in (("clips missing", missing), ("unknown clips", unknown)):
        if odd:
            yield MelfoldError(f"{name}: {what}", f"{len(odd)}, first {min(map(str, odd))}")
    if not (len(twice) or missing or unknown) and list(clips) != asked:
        at = next(i for i, (a, b) in enumerate(zip(clips, asked, strict=True)) if a != b)
        yield MelfoldError(f"{name}: wrong order", f"row {at + 1} is {clips[at]}, not {asked[at]}")
    for column in table:
        if not pd.api.types.is_numeric_dtype(table[column]):
            yield MelfoldError(f"{name}: not numbers", f"column {column}")
            return
    values = table.to_numpy(np.float64)
    bad = ~((values >= 0) & (values <= 1)).all(axis=1)
    if bad.any():
        yield MelfoldError(f"{name}: values not in 0..1", f"{bad.sum()} clips, first {clips[bad.argmax()]}")
    tied = (values == values[:, :1]).all(axis=1) & ~bad
    if tied.any():
        yield MelfoldError(f"{name}: all labels tie", f"{tied.sum()} clips, first {clips[tied.argmax()]}")


def score_submission(path: Path, truth: Path) -> pd.DataFrame:
    """Score a submission as the leaderboard would: `clips, lwlrap, low, high` for Public and Private, each if covered.

    Args:
        path: any table of probabilities; rows in any order.
        truth: `fname,labels,usage`, published after the competition. Nothing else in the kit reads it.

    Raises:
        MelfoldError: a truth table that is no such table, or a file that covers neither half whole.
    """
    probs = read_probs(path)
    unread = ("cannot read the truth", "Give the published table: --truth")
    odd = ("is no truth table", "It needs fname, labels and usage")
    table = read_clips(truth, {"usage": str, "labels": str}, unread, odd)
    usage, labels = table["usage"], table["labels"].map(split_labels)
    unknown = {label for own in labels for label in own or ("",)} - set(probs.columns)  # a clip without labels is refused too
    if unknown:
        raise MelfoldError(f"{truth} has labels that {path} lacks", ", ".join(sorted(unknown)[:5]))
    rows = []
    for half in ("Public", "Private"):
        fnames = table.index[usage == half]
        missing = fnames.difference(probs.index)
        if len(fnames) and 0 < len(missing) < len(fnames):
            found = f"{len(missing)} of {len(fnames)} clips missing, first {missing[0]}"
            log.warning("the %s half is not scored: %s", half, found)
        if len(fnames) and not len(missing):
            targets = multi_hot(labels[fnames], list(probs.columns))
            interval = bootstrap_interval(targets, probs)
            rows.append((half, len(fnames), lwlrap(targets, probs), interval.low, interval.high))
    if not rows:
        raise MelfoldError(f"{path} covers neither half of {truth}", f"{len(probs)} clips", "Use the truth of this competition")
    return pd.DataFrame(rows, columns=["usage", "clips", "lwlrap", "low", "high"]).set_index("usage")

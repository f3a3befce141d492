"""Build, check and score a submission."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from melfold.combine.ensemble import pool_oof
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.facts import facts_of, split_labels
from melfold.files import Home, digest, read_json, sha256_file, write_json
from melfold.learn.runs import FULL, Run
from melfold.metrics import bootstrap_interval, lwlrap
from melfold.probs import MEANS, Probs, align, check_weights, is_current, mean_probs, read_probs, write_probs

log = logging.getLogger(__name__)


def build_submission(
    home: Home,
    runs: Sequence[Run],
    competition: Competition,
    *,
    id: str,
    mean: str,
    weights: Sequence[float] | None = None,
    replace: bool = False,
) -> Path:
    """Combine the test predictions of runs into `submissions/<id>/submission.csv`, with `recipe.json` beside it.

    Rows and columns are in the order of `sample_submission.csv`. The same inputs under the same id change nothing.

    Args:
        weights: one a run; equal where not given.
        replace: put it in the place of one of other inputs under this id.

    Raises:
        MelfoldError: no predictions, a submission of other inputs under this id, or one that its own check refuses.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", id):
        raise MelfoldError("a submission's name is letters, digits, dots, dashes, +", repr(id), "Use --id NAME")
    if mean not in MEANS:
        raise MelfoldError("unknown mean", mean, f"Use {', '.join(MEANS)}")
    shares = check_weights(weights, len(runs))
    runs, shares = [run for run, share in zip(runs, shares, strict=True) if share], [float(s) for s in shares if s]
    if len({run.folder for run in runs}) < len(runs):
        raise MelfoldError("a run is named twice", ", ".join(run.name for run in runs), "Name each once")
    folder = home.submissions / id
    for run in runs:
        if run.missing_folds() and run.done_folds() != [FULL]:
            missing = ", ".join(map(str, run.missing_folds()))
            log.warning("run %s is INCOMPLETE: not trained: fold %s", run.name, missing)
        if not run.test.exists():
            raise MelfoldError(f"run {run.name} has no test predictions", str(run.test), f"Run `melfold predict {run.name}`")
        if not is_current(run.test, None, rests_on=run.weights_sha256(run.used_folds())):
            mend = f"Run `melfold predict {run.name}`"
            raise MelfoldError(f"test predictions of {run.name} are not of its trained folds", str(run.test), mend)
        if run.done_folds() != [FULL]:
            pool_oof(run)
    recipe = _recipe(runs, competition, id, mean, shares)
    path, noted = folder / "submission.csv", folder / "recipe.json"
    if noted.exists():
        before = read_json(noted)
        if any(before.get(k) != v for k, v in recipe.items()):
            if not replace:
                mend = "Use another name: `melfold submission build ... --id NAME`"
                raise MelfoldError(f"submission {id} stands already, of other inputs", str(noted), mend)
            noted.unlink()
            path.unlink(missing_ok=True)
    tables = [read_probs(run.test) for run in runs]
    probs = tables[0] if len(tables) == 1 else mean_probs(tables, mean, shares)
    probs = align(probs, competition.test.index, competition.labels, "test predictions")
    if path.exists() and noted.exists() and sha256_file(path) != read_json(noted)["submission_sha256"]:
        raise MelfoldError("a submission was changed by hand", str(path), "Delete it, or use another --id")
    write_probs(path, probs)
    try:
        check_submission(path, competition)
    except MelfoldError:
        path.unlink()
        raise
    write_json(noted, recipe | {"submission_sha256": sha256_file(path)})
    return path


@dataclass(frozen=True)
class Standing:
    """What a combination of runs may call itself: the loosest of what they are."""

    track: str
    data: list[str]
    licences: list[str]
    breaks: list[str]
    """The competition's rules that it would break, and what else stands in the way of publishing it."""


def standing_of(runs: Sequence[Run]) -> Standing:
    """The track, data and licences that runs have together."""
    infos = [run.info for run in runs]
    track = "open" if any(info.track == "open" for info in infos) else "scratch"
    licences = sorted({part for info in infos for part in info.licence.split(", ") if part})
    breaks = []
    rules = facts_of(runs[0].info.labels)
    if track == "open" and not rules.external_data:
        theirs = ", ".join(run.name for run in runs if run.info.track == "open")
        breaks.append(f"{rules.external_data_rule} ({theirs})")
    if "unknown" in licences:
        breaks.append("the licence of its first weights is not known: name it with --set model.licence=…")
    if bound := [licence for licence in licences if re.search(r"(?i)\bnc\b|non-?commercial", licence)]:
        breaks.append(f"winners license their models for any use, these weights do not allow it: {', '.join(bound)}")
    return Standing(track, sorted({info.data for info in infos}), licences, breaks)


def _recipe(runs: Sequence[Run], competition: Competition, id: str, mean: str, shares: list[float]) -> dict[str, Any]:
    """All that a submission is made of."""
    standing = standing_of(runs)
    return {
        "id": id,
        "competition": competition.name,
        **asdict(standing),
        "mean": mean,
        "oof_lwlrap": _oof_lwlrap(runs, mean, shares),
        "runs": [
            {
                "name": run.name,
                "recipe": run.recipe.model_dump(mode="json"),
                "share": share,
                "track": run.info.track,
                "data": run.info.data,
                "licence": run.info.licence,
                "teacher": run.info.teacher,
                "folds_sha256": run.info.folds_sha256,
                "clips_sha256": run.info.clips_sha256,
                "weights_sha256": run.weights_sha256(run.done_folds()),
                "test_sha256": sha256_file(run.test),
                "commit": run.info.commit,
            }
            for run, share in zip(runs, shares, strict=True)
        ],
        "test_rows": digest(list(competition.test.index)),
    }


def _oof_lwlrap(runs: Sequence[Run], mean: str, shares: list[float]) -> float | None:
    """The out-of-fold score of the combination; none unless every run held out the same clips at the same time.

    Weights that were fitted on these clips make it a little too good: `melfold ensemble suggest` shows the nested score.
    """
    if not all(run.oof.exists() for run in runs) or len({run.info.clips_sha256 for run in runs}) > 1:
        return None
    tables = [read_probs(run.oof) for run in runs]
    if any(set(t.index) != set(tables[0].index) for t in tables):
        return None
    probs = tables[0] if len(tables) == 1 else mean_probs(tables, mean, shares)
    return lwlrap(runs[0].targets(probs.index), probs)


def check_submission(path: Path, competition: Competition) -> Probs:
    """Hold any CSV against what the competition takes.

    Raises:
        MelfoldError: with a line for each problem: columns, rows, their order, duplicates, values that are not finite
            numbers in 0..1, or rows in which all labels tie.
    """
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
            MelfoldError(f"{path.name}: clips stand twice", f"{len(rows) - len(set(rows))}, first {_first_twice(rows)}")
        )
    for what, odd in (("clips missing", set(asked) - set(rows)), ("unknown clips", set(rows) - set(asked))):
        if odd:
            problems.append(MelfoldError(f"{path.name}: {what}", f"{len(odd)}, first {min(map(str, odd))}"))
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
    except (OSError, KeyError, ValueError) as error:
        raise MelfoldError(f"{truth} is no truth table", str(error), "It needs fname, labels and usage") from None
    unknown = {label for own in labels for label in own} - set(probs.columns)
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
            interval = bootstrap_interval(targets, probs, rng=np.random.default_rng(0))
            rows.append((half, len(fnames), lwlrap(targets, probs), interval.low, interval.high))
    if not rows:
        raise MelfoldError(f"{path} covers neither half of {truth}", f"{len(probs)} clips", "Use the truth of this competition")
    return pd.DataFrame(rows, columns=["usage", "clips", "lwlrap", "low", "high"]).set_index("usage")

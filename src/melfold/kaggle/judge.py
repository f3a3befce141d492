"""Judge what a rehearsed kernel left in its working folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from melfold.combine.check import check_submission
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.facts import Facts, facts_of
from melfold.files import Home, read_json
from melfold.kernels.boot import NOT_STARTED, RECORD
from melfold.probs import read_probs

MAX_DIFFERENCE = 1e-5  # between a kernel's probabilities and those predicted at home


def judge_infer(
    working: Path, facts: dict[str, Any], competition: Competition, home: Home
) -> tuple[list[str], str, dict[str, float]]:
    """Failures, how close it is to the submission made at home, and the expected seconds for the real numbers of clips."""
    path = working / "submission.csv"
    try:
        check_submission(path, competition)
        record = read_json(working / RECORD)
    except MelfoldError as error:
        return list(error.lines), "", {}
    equality, difference = _compare(path, home.submissions / facts["id"] / "submission.csv")
    if facts["kind"] == "copy_csv":
        return [difference] if difference else [], equality, {}
    failures = []
    passes = record["passes"]
    skipped = [p for p in passes if not p["done"]]
    failures += [f"{p['run']} fold {p['fold']}, view {p['view']} fails: {p['error']}" for p in passes if "error" in p][:1]
    if record["late"]:
        failures.append(f"it exceeds its budget: no time for the log-mels of {record['late']} of {record['clips']} clips")
    elif not failures and (skipped or not passes):
        budget = record["budget_s"]
        failures.append(f"it exceeds its budget: {len(skipped)} of {len(passes)} passes do not fit into {budget:.0f} s")
    if difference and not skipped:
        failures.append(difference)
    real = facts_of(facts["competition_slug"])
    predicted, most = _project(record, real), max(real.test_clips)
    unknown = facts["gpu"] and record["device"] == "cpu"  # a CPU does not tell how long a GPU will take
    if predicted[str(most)] > record["budget_s"] and not skipped and not unknown:
        found = f"{predicted[str(most)]:.0f} s expected for {most:,} clips"
        failures.append(f"it would exceed its budget: {found}, {record['budget_s']:.0f} s allowed on {record['device']}")
    return failures, equality, predicted


def _compare(path: Path, at_home: Path) -> tuple[str, str]:
    """How close a kernel's submission is to the one made at home, and the failure if it is not close enough."""
    if not at_home.exists():
        return "", f"there is nothing to compare with: {at_home} is missing"
    if at_home.read_bytes() == path.read_bytes():
        return "the same bytes as at home", ""
    ours, theirs = read_probs(path), read_probs(at_home)
    same = list(ours.index) == list(theirs.index)
    apart = float(np.abs(ours.to_numpy() - theirs.to_numpy()).max()) if same else float("inf")
    found = f"its probabilities differ by {apart:.1e} from those predicted at home; {MAX_DIFFERENCE:.0e} is allowed"
    return f"within {apart:.1e} of what was predicted at home", found if apart > MAX_DIFFERENCE else ""


def _project(record: dict[str, Any], facts: Facts) -> dict[str, float]:
    """Expected seconds for each number of test clips that the competition has or had, of their mean length."""
    seconds = record.get("audio_s", 0) / record["clips"]  # of a clip here
    longer = max(1.0, facts.mean_test_seconds / seconds) if seconds else 1.0
    steady = record["cache_s"] - record["cache_start_s"] + sum(p.get("seconds", 0) for p in record["passes"])
    start = record["setup_s"] + record["cache_start_s"]
    return {str(clips): round(start + longer * steady * clips / record["clips"], 1) for clips in facts.test_clips}


def judge_train(working: Path) -> list[str]:
    """The failures of a training kernel, by what it left in its working folder."""
    try:
        record = read_json(working / RECORD)
    except MelfoldError as error:
        return list(error.lines)
    if record["failure"]:
        return [record["failure"]]
    states = record["folds"]
    return [] if any(state != NOT_STARTED for state in states.values()) else [f"nothing was trained: {json.dumps(states)}"]

"""Build a submission, and say what it may call itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from melfold.artefacts import Artefact, differences, listed, summary
from melfold.combine.check import check_submission
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.facts import facts_of
from melfold.files import Home, digest, sha256_file
from melfold.learn.predictions import Prediction
from melfold.learn.runs import FULL, Run
from melfold.metrics import lwlrap
from melfold.probs import MEANS, align, check_weights, mean_probs, write_probs

log = logging.getLogger(__name__)

NAME = "[A-Za-z0-9][A-Za-z0-9._+-]*"
"""A submission's name, as a regular expression."""

OF_RUN = ("track", "data", "licence", "teachers", "fold_table", "folds_sha256", "clips_sha256")
"""Facts of a run that a manifest repeats."""


def submission_artefact(home: Home, id: str) -> Artefact:
    """`submission.csv` of a submission and its stamp, `manifest.json`."""
    folder = home.submissions / id
    return Artefact(folder / "manifest.json", (folder / "submission.csv",))


def open_submission(home: Home, id: str) -> dict[str, Any]:
    """The manifest of a submission, after checking `submission.csv` against it.

    Raises:
        MelfoldError: no such submission, or one whose file is missing or was changed.
    """
    if not re.fullmatch(NAME, id):  # one name for one submission, or it would be submitted under each
        raise MelfoldError("a submission is named without its folder", repr(id), f"Use {Path(id).name or 'its name'}")
    artefact = submission_artefact(home, id)
    if not artefact.stamp.exists():
        known = ", ".join(sorted(p.parent.name for p in home.submissions.glob("*/manifest.json")))
        fix = f"Known: {known}" if known else "Run `melfold submission build` first"
        raise MelfoldError("no such submission", f"{id} in {home.submissions}", fix)
    if not artefact.exists:
        what, fix = f"submission {id} has no submission.csv here", f"Run `melfold submission rebuild {id}`"
        raise MelfoldError(what, str(artefact.files[0]), fix)
    return artefact.verify()


def build_submission(
    home: Home,
    predictions: Sequence[Prediction],
    competition: Competition,
    *,
    id: str,
    mean: str,
    weights: Sequence[float] | None = None,
    replace: bool = False,
) -> Path:
    """Combine test predictions into `submissions/<id>/submission.csv`, with `manifest.json` beside it.

    Rows and columns are in the order of `sample_submission.csv`. The same inputs under the same id change nothing.

    Args:
        weights: one for each prediction; equal if not given.
        replace: replace a submission of this id that was made from different inputs.

    Raises:
        MelfoldError: no current predictions, a submission of this id made from different inputs, or a result that the
            competition would not take.
    """
    if not re.fullmatch(NAME, id):
        raise MelfoldError("a submission's name is letters, digits, dots, dashes, +", repr(id), "Use --id NAME")
    if mean not in MEANS:
        raise MelfoldError("unknown mean", mean, f"Use {', '.join(MEANS)}")
    if len({p.label for p in predictions}) < len(predictions):
        raise MelfoldError("a run is named twice", ", ".join(p.label for p in predictions), "Name each once")
    shares = {p.label: float(s) for p, s in zip(predictions, check_weights(weights, len(predictions)), strict=True) if s}
    members = [p for p in predictions if p.label in shares]
    for run in {p.run.name: p.run for p in members}.values():
        if run.missing_folds() and run.done_folds() != [FULL]:
            log.warning("run %s is INCOMPLETE: not trained: fold %s", run.name, ", ".join(map(str, run.missing_folds())))
    tables = [prediction.read_test() for prediction in members]
    artefact = submission_artefact(home, id)
    (path,) = artefact.files
    made_from = _made_from(members, competition, mean, shares)
    if artefact.stamp.exists():
        content = artefact.read()
        if changes := differences(content["made_from"], summary(made_from)):
            if not replace:
                fix = "Use another name: `melfold submission build ... --id NAME`"
                raise MelfoldError(f"submission {id} exists and was made from different inputs", listed(changes), fix)
            artefact.remove()
        elif path.exists():
            artefact.verify()
    probs = tables[0] if len(tables) == 1 else mean_probs(tables, mean, list(shares.values()))
    write_probs(path, align(probs, competition.test.index, competition.labels, "test predictions"))
    try:
        check_submission(path, competition)
    except MelfoldError:
        path.unlink()
        raise
    artefact.commit(made_from, **_facts(members, competition, id, mean, shares))
    return path


def _made_from(members: Sequence[Prediction], competition: Competition, mean: str, shares: dict[str, float]) -> dict[str, Any]:
    parts = {
        p.label: {"share": shares[p.label], "recipe": p.run.recipe.fingerprint(), "test": sha256_file(p.test)} for p in members
    }
    return {"competition": competition.name, "mean": mean, "runs": parts, "test_rows": digest(list(competition.test.index))}


def _facts(
    members: Sequence[Prediction], competition: Competition, id: str, mean: str, shares: dict[str, float]
) -> dict[str, Any]:
    """What a manifest says of a submission, beside what it was made from."""
    return {
        "id": id,
        "competition": competition.name,
        **asdict(standing_of([p.run for p in members])),
        "mean": mean,
        "oof_lwlrap": _oof_lwlrap(members, mean, list(shares.values())),
        "runs": [
            {
                "name": p.run.name,
                "prediction": p.name,
                "recipe": p.recipe.model_dump(mode="json"),
                "share": shares[p.label],
                **{key: getattr(p.run.info, key) for key in OF_RUN},
                "weights_sha256": p.run.weights_sha256(p.run.used_folds()),
                "test_sha256": sha256_file(p.test),
                "commit": p.run.info.commit,
            }
            for p in members
        ],
    }


def _oof_lwlrap(members: Sequence[Prediction], mean: str, shares: list[float]) -> float | None:
    """The out-of-fold score of the combination; none unless every run held out the same clips at the same time.

    If the weights were fitted on these clips, it is a little too good: `melfold ensemble suggest` shows the nested score.
    """
    if any(p.run.done_folds() == [FULL] for p in members) or len({p.run.info.clips_sha256 for p in members}) > 1:
        return None
    tables = [p.read_oof() for p in members]
    if any(set(t.index) != set(tables[0].index) for t in tables):
        return None
    probs = tables[0] if len(tables) == 1 else mean_probs(tables, mean, shares)
    return lwlrap(members[0].run.targets(probs.index), probs)


@dataclass(frozen=True)
class Standing:
    """What a combination of runs may call itself: the loosest of what they are."""

    track: str
    data: list[str]
    licences: list[str]
    seen: list[str]
    """The data sets that the first weights were trained on."""
    breaks: list[str]
    """The competition's rules that it would break, and what else stands in the way of publishing it."""


def standing_of(runs: Sequence[Run]) -> Standing:
    """The track, data, licences and warnings that runs have together."""
    infos = [run.info for run in runs]
    track = "open" if any(info.track == "open" for info in infos) else "scratch"
    licences = sorted({part for info in infos for part in info.licence.split(", ") if part})
    seen = sorted({name for info in infos for name in info.seen})
    breaks = sorted({text for info in infos for text in info.warnings})
    rules = facts_of(runs[0].info.labels)
    if track == "open" and not rules.external_data:
        theirs = ", ".join(run.name for run in runs if run.info.track == "open")
        breaks.append(f"{rules.external_data_rule} ({theirs})")
    if "unknown" in licences:
        breaks.append("the licence of its first weights is not known: name it with --set model.licence=…")
    if bound := [licence for licence in licences if re.search(r"(?i)\bnc\b|non-?commercial", licence)]:
        breaks.append(f"winners license their models for any use, these weights do not allow it: {', '.join(bound)}")
    return Standing(track, sorted({info.data for info in infos}), licences, seen, breaks)

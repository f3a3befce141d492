"""What score to expect on the leaderboard, from out-of-fold predictions alone.

Twins of a clip in the training set make an out-of-fold score too high. Folds that keep groups together end that, and then the
score itself was the best estimate found. Adding what the mean of all folds' models gains over one model was tried and came out
too high: see `tests/bench/README.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from melfold.errors import MelfoldError
from melfold.facts import facts_of
from melfold.learn.predictions import Prediction
from melfold.metrics import bootstrap_interval, lwlrap
from melfold.probs import mean_probs


@dataclass(frozen=True)
class Expected:
    """The out-of-fold score; its 95 % interval is for the luck of the curated clips, and of the test clips that are scored."""

    score: float
    low: float
    high: float
    grouped: bool
    """Whether the folds keep groups of clips together; otherwise expect less."""


def expected_score(members: Sequence[Prediction], mean: str, shares: Sequence[float], test_clips: int) -> Expected:
    """The score that a combination of predictions may expect; `test_clips` are the rows of the submission.

    Raises:
        MelfoldError: it cannot be told: runs of different folds, without folds or unfinished.
    """
    first = members[0].run
    if len({p.run.info.clips_sha256 for p in members}) > 1:
        raise MelfoldError("no score can be expected", "the runs have different folds", "Use one fold table")
    if any(p.run.missing_folds() for p in members):
        raise MelfoldError("no score can be expected", "a run lacks folds", "Train them all")
    tables = [p.read_oof() for p in members]
    oof = tables[0] if len(tables) == 1 else mean_probs(tables, mean, shares)
    targets, groups = first.targets(oof.index), first.clips["group"]
    rng, score = np.random.default_rng(0), lwlrap(targets, oof)
    by_group, by_clip = (bootstrap_interval(targets, oof, groups=each, rng=rng) for each in (groups, None))
    known = facts_of(first.info.labels)  # the leaderboard scores the last stage's clips; where that is not known, half
    scored = known.test_clips[-1] if known.name and test_clips >= known.test_clips[-1] else max(1, test_clips // 2)
    margin = np.hypot(by_group.high - by_group.low, (by_clip.high - by_clip.low) * np.sqrt(len(oof) / scored)) / 2
    return Expected(score, max(0.0, score - margin), min(1.0, score + margin), groups.nunique() < len(groups))

"""What score to expect on the leaderboard, from out-of-fold predictions and unlabelled test clips alone.

Two things separate an out-of-fold score from the leaderboard's. Twins of a clip in the training set make it too high: folds that
keep groups together end that. And each curated clip is predicted by the one model that did not see it, while a test clip gets the
mean of all folds' models, which is better.

What averaging gains is measured by simulation and extrapolation (SIMEX; Cook and Stefanski, 1994). On the test clips, which no
model saw, the models of the folds differ, and these differences are the error that averaging takes away. They are added to the
out-of-fold predictions, scaled to half, one, one and a half times and twice their variance; the scores, as a function of the
variance, are continued by a parabola to where only the share that is left in a mean of K models, 1/K, remains. No truth of the
test clips is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from melfold.errors import MelfoldError
from melfold.facts import facts_of
from melfold.learn.predictions import Prediction
from melfold.learn.runs import FULL
from melfold.metrics import bootstrap_interval, lwlrap, rank_precisions
from melfold.probs import Probs, align, mean_probs, to_mean

VARIANCES = (0.0, 0.5, 1.0, 1.5, 2.0)
"""Added to the predictions' own, in units of it."""

DRAWS = 20
DONORS = 20
"""A curated clip gets the differences of one of so many test clips, those whose highest logit is nearest to its own."""


@dataclass(frozen=True)
class Expected:
    """The score to expect.

    Args:
        score, low, high: with a 95 % interval, which holds the luck of the curated clips and of as many test clips as the
            leaderboard scores, and half of the gain as the error of its extrapolation.
        oof: the out-of-fold score.
        gain: of averaging the models of the folds.
        grouped: whether the folds keep groups of clips together; otherwise expect less.
    """

    score: float
    low: float
    high: float
    oof: float
    gain: float
    grouped: bool


def expected_score(members: Sequence[Prediction], mean: str, shares: Sequence[float], test_clips: int) -> Expected:
    """The score that a combination of predictions may expect.

    Args:
        mean: the kind of mean of several members.
        shares: of the members.
        test_clips: rows of the submission.

    Raises:
        MelfoldError: it cannot be told: runs of different folds, without folds or unfinished, or test predictions that are not
            there fold by fold.
    """
    first = members[0].run
    if len({p.run.info.clips_sha256 for p in members}) > 1:
        raise MelfoldError("no score can be expected", "the runs have different folds", "Use one fold table")
    if any(p.run.missing_folds() for p in members):
        raise MelfoldError("no score can be expected", "a run lacks folds", "Train them all")
    oof = _mean([p.read_oof() for p in members], mean, shares)
    folds = [fold for fold in first.done_folds() if fold != FULL]
    by_fold = [_mean([p.read_fold_test(fold) for p in members], mean, shares) for fold in folds]
    targets, groups = first.targets(oof.index), first.clips["group"]
    gain = averaging_gain(targets, oof, by_fold)
    rng, score = np.random.default_rng(0), lwlrap(targets, oof)
    own, alone = (bootstrap_interval(targets, oof, groups=each, rng=rng) for each in (groups, None))
    half = (own.high - own.low) / 2
    luck = (alone.high - alone.low) / 2 * np.sqrt(len(oof) / _scored(first.info.labels, test_clips))
    margin = float(np.sqrt(half**2 + luck**2 + (gain / 2) ** 2))
    grouped = groups.nunique() < len(groups)
    return Expected(score + gain, max(0.0, score + gain - margin), min(1.0, score + gain + margin), score, gain, grouped)


def _mean(tables: Sequence[Probs], kind: str, shares: Sequence[float]) -> Probs:
    return tables[0] if len(tables) == 1 else mean_probs(tables, kind, shares)


def _scored(labels: list[str], rows: int) -> int:
    """How many clips the leaderboard scores: those of the last stage, or half where that is not known."""
    known = facts_of(labels)
    return known.test_clips[-1] if known.name and rows >= known.test_clips[-1] else max(1, rows // 2)


def averaging_gain(targets: pd.DataFrame, oof: Probs, by_fold: Sequence[Probs], *, draws: int = DRAWS, seed: int = 0) -> float:
    """What the mean of the folds' models scores more than one of them; never less than nothing.

    Args:
        oof: each clip of `targets` by one model.
        by_fold: other clips, without truth, by each of the models.
    """
    models, rng = len(by_fold), np.random.default_rng(seed)
    truth = targets.to_numpy() > 0
    own = to_mean(align(oof, targets.index, list(targets.columns), "predictions").to_numpy(np.float64), "logit")
    fnames, labels = by_fold[0].index, list(targets.columns)
    others = np.stack([to_mean(align(t, fnames, labels, "test predictions").to_numpy(np.float64), "logit") for t in by_fold])
    centre = others.mean(axis=0)
    order = np.argsort(centre, axis=1)
    # Differences from the mean of a few models are smaller than from that of many.
    differences = np.take_along_axis(others - centre, order[None], axis=2) * np.sqrt(models / (models - 1))
    ranks = np.argsort(np.argsort(own, axis=1), axis=1)
    near = np.argsort(np.abs(own.max(axis=1)[:, None] - centre.max(axis=1)), axis=1, kind="stable")[:, :DONORS]
    scores = np.zeros(len(VARIANCES))
    for _ in range(draws):
        donor = near[np.arange(len(own)), rng.integers(0, near.shape[1], len(own))]
        drawn = differences[rng.integers(0, models, len(own)), donor] * rng.choice([-1.0, 1.0], len(own))[:, None]
        noise = np.take_along_axis(drawn, ranks, axis=1)  # the likeliest label gets what the donor's likeliest label has
        scores += [rank_precisions(truth, own + np.sqrt(variance) * noise)[0].mean() for variance in VARIANCES]
    curve = np.polynomial.Polynomial.fit(VARIANCES, scores / draws, 2)
    return max(0.0, float(curve(1 / models - 1) - curve(0)))

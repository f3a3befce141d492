"""Label-weighted label-ranking average precision (lwlrap), the competition's metric.

Over all (clip, true label) pairs, the mean of the precision at that label's rank. Ties take the worst rank, as in
scikit-learn's `label_ranking_average_precision_score`; the organisers' own code ranks ties by position, so that
constant scores would look better than they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from melfold.errors import MelfoldError
from melfold.probs import Probs, align

_PAIRS = 4096  # at a time, so that memory stays flat and the comparisons in the processor's cache
_DRAWN = 1 << 22  # counts at a time


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval around a score."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A paired comparison: `value` is the first score less the second; `better` the share of resamples in which it is above 0."""

    value: float
    low: float
    high: float
    better: float


def lwlrap(targets: pd.DataFrame, scores: Probs) -> float:
    """The headline score.

    Args:
        targets: multi-hot `(clips, labels)`. Clips without labels do not count.
        scores: any finite numbers, higher for likelier; may hold further clips, rows in any order.

    Raises:
        MelfoldError: missing clips or labels, a NaN, targets that are not 0 or 1, or no label at all.
    """
    precision, clips, _ = pair_precisions(targets, scores)
    if not len(clips):
        raise MelfoldError("lwlrap needs at least one true label", f"{len(targets)} clips without labels")
    return float(precision.mean())


def per_label_lwlrap(targets: pd.DataFrame, scores: Probs) -> pd.DataFrame:
    """`lwlrap` and `weight` (the label's share of all labels) by label; their products sum to the headline score.

    A label without clips has a weight of 0 and NaN for its lwlrap.
    """
    precision, _, labels = pair_precisions(targets, scores)
    counts = np.bincount(labels, minlength=targets.shape[1])
    sums = np.bincount(labels, weights=precision, minlength=targets.shape[1])
    table = pd.DataFrame(
        {"lwlrap": sums / np.where(counts, counts, np.nan), "clips": counts, "weight": counts / max(1, counts.sum())},
        index=pd.Index(targets.columns, name="label"),
    )
    return table


def bootstrap_interval(
    targets: pd.DataFrame, scores: Probs, *, rng: np.random.Generator, draws: int = 1000, level: float = 0.95
) -> Interval:
    """Percentile interval of lwlrap over resampled clips."""
    sums, counts = _by_clip(targets, scores)
    totals = _resampled(np.stack([sums, counts], axis=1), draws, rng)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def paired_bootstrap(
    targets: pd.DataFrame, a: Probs, b: Probs, *, rng: np.random.Generator, draws: int = 2000, level: float = 0.95
) -> Difference:
    """Is `a` better than `b`? Both are scored on the same resampled clips, so that what makes a clip hard falls out."""
    sums_a, counts = _by_clip(targets, a)
    sums_b, _ = _by_clip(targets, b)
    totals = _resampled(np.stack([sums_a - sums_b, counts], axis=1), draws, rng)
    differences = totals[:, 0] / totals[:, 1]
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    # Resamples in which nothing differs count half, so that a run is no better than itself.
    better = float(np.mean(differences > 0) + np.mean(differences == 0) / 2)
    return Difference(float((sums_a - sums_b).sum() / counts.sum()), float(low), float(high), better)


def interval_of(targets: pd.DataFrame, scores: Probs) -> Interval:
    """The 95 % interval that every command prints: 1,000 resamples from one fixed seed."""
    return bootstrap_interval(targets, scores, rng=np.random.default_rng(0))


def difference_of(targets: pd.DataFrame, a: Probs, b: Probs) -> Difference:
    """The paired difference that every command prints: 2,000 resamples from one fixed seed."""
    return paired_bootstrap(targets, a, b, rng=np.random.default_rng(0))


def _by_clip(targets: pd.DataFrame, scores: Probs) -> tuple[np.ndarray, np.ndarray]:
    """The sum of precisions and the number of labels, of each clip that has any."""
    precision, clips, _ = pair_precisions(targets, scores)
    sums = np.bincount(clips, weights=precision, minlength=len(targets))
    counts = np.bincount(clips, minlength=len(targets))
    keep = counts > 0
    if not keep.any():
        raise MelfoldError("lwlrap needs at least one true label", f"{len(targets)} clips without labels")
    return sums[keep], counts[keep]


def _resampled(values: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Sums of `(clips, columns)` over as many clips drawn with replacement, `(draws, columns)`."""
    clips = len(values)
    at_once = max(1, _DRAWN // clips)
    sums = []
    for begin in range(0, draws, at_once):
        times_drawn = rng.multinomial(clips, np.full(clips, 1 / clips), size=min(at_once, draws - begin))
        sums.append(times_drawn @ values)
    return np.concatenate(sums)


def constant_lwlrap(targets: pd.DataFrame) -> float:
    """What predicting every label's frequency for every clip scores: the least to beat."""
    prior = targets.to_numpy(np.float64).mean(axis=0)
    return lwlrap(targets, pd.DataFrame([prior] * len(targets), index=targets.index, columns=targets.columns))


def pair_precisions(targets: pd.DataFrame, scores: Probs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`precision`, and the row numbers `clip` and `label`, of every true pair: lwlrap is the mean of the first."""
    if set(targets.columns) != set(scores.columns):
        odd = sorted(set(targets.columns) ^ set(scores.columns))
        raise MelfoldError("targets and scores have different labels", ", ".join(map(str, odd[:5])))
    for name, table in (("targets", targets), ("scores", scores)):
        if table.index.has_duplicates:
            raise MelfoldError(f"{name} repeat clips", ", ".join(table.index[table.index.duplicated()][:5]))
    truth = targets.to_numpy()
    values = align(scores, targets.index, list(targets.columns), "scores").to_numpy()
    if not np.isin(truth, (0, 1)).all():
        raise MelfoldError("targets must be 0 or 1", "other values")
    if not np.isfinite(values).all():
        rows = ~np.isfinite(values).all(axis=1)
        raise MelfoldError(
            "scores must be finite", f"{rows.sum()} clips with NaN or infinity, first {targets.index[rows.argmax()]}"
        )
    clips, labels = np.nonzero(truth)
    precision = np.empty(len(clips))
    for begin in range(0, len(clips), _PAIRS):
        part = slice(begin, begin + _PAIRS)
        # One row a true pair: which labels are at or above it.
        above = values[clips[part]] >= values[clips[part], labels[part]][:, None]
        precision[part] = (above & (truth[clips[part]] > 0)).sum(axis=1) / above.sum(axis=1)
    return precision, clips, labels

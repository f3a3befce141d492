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
    columns = {"lwlrap": sums / np.where(counts, counts, np.nan), "clips": counts, "weight": counts / max(1, counts.sum())}
    return pd.DataFrame(columns, index=pd.Index(targets.columns, name="label"))


def bootstrap_interval(
    targets: pd.DataFrame,
    scores: Probs,
    groups: pd.Series | None = None,
    *,
    rng: np.random.Generator | None = None,
    draws: int = 1000,
) -> Interval:
    """The 95 % percentile interval of lwlrap over resampled groups of clips.

    Args:
        groups: the group of each clip, by `fname`: clips of one recording are not independent, so whole groups are drawn. Without
            it every clip is alone.
        rng: by default from one fixed seed, so that every command prints the same.
    """
    means = resampled_means(*_by_group(targets, scores, groups), draws, rng or np.random.default_rng(0))
    return Interval(*middle_of(means))


def paired_bootstrap(
    targets: pd.DataFrame,
    a: Probs,
    b: Probs,
    groups: pd.Series | None = None,
    *,
    rng: np.random.Generator | None = None,
    draws: int = 2000,
) -> Difference:
    """Is `a` better than `b`? Both are scored on the same resampled groups, so that what makes a clip hard falls out.

    Args:
        groups, rng: as in `bootstrap_interval`.
    """
    sums_a, counts = _by_group(targets, a, groups)
    sums_b, _ = _by_group(targets, b, groups)
    differences = resampled_means(sums_a - sums_b, counts, draws, rng or np.random.default_rng(0))
    # Resamples in which nothing differs count half, so that a run is no better than itself.
    better = float(np.mean(differences > 0) + np.mean(differences == 0) / 2)
    return Difference(float((sums_a - sums_b).sum() / counts.sum()), *middle_of(differences), better)


def middle_of(draws: np.ndarray) -> tuple[float, float]:
    """The ends of the interval that holds the middle 95 % of some draws."""
    low, high = np.quantile(draws, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    return float(low), float(high)


def _by_group(targets: pd.DataFrame, scores: Probs, groups: pd.Series | None) -> tuple[np.ndarray, np.ndarray]:
    """The sum of precisions and the number of labels, of each group that has any."""
    precision, clips, _ = pair_precisions(targets, scores)
    own = np.arange(len(targets)) if groups is None else pd.factorize(groups.loc[targets.index])[0]
    sums = np.bincount(own[clips], weights=precision, minlength=own.max(initial=0) + 1)
    counts = np.bincount(own[clips], minlength=own.max(initial=0) + 1)
    keep = counts > 0
    if not keep.any():
        raise MelfoldError("lwlrap needs at least one true label", f"{len(targets)} clips without labels")
    return sums[keep], counts[keep]


def resampled_means(sums: np.ndarray, counts: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means over as many groups as there are, drawn with replacement, from the sum and the count of each."""
    groups, values = len(sums), np.stack([sums, counts], axis=1)
    at_once = max(1, _DRAWN // groups)
    means = []
    for begin in range(0, draws, at_once):
        times_drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=min(at_once, draws - begin))
        totals = times_drawn @ values
        means.append(totals[:, 0] / totals[:, 1])
    return np.concatenate(means)


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
        found = f"{rows.sum()} clips with NaN or infinity, first {targets.index[rows.argmax()]}"
        raise MelfoldError("scores must be finite", found)
    return rank_precisions(truth > 0, values)


def rank_precisions(truth: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`pair_precisions` of arrays `(clips, labels)`, without checks."""
    clips, labels = np.nonzero(truth)
    precision = np.empty(len(clips))
    for begin in range(0, len(clips), _PAIRS):
        part = slice(begin, begin + _PAIRS)
        # One row a true pair: which labels are at or above it.
        above = values[clips[part]] >= values[clips[part], labels[part]][:, None]
        precision[part] = (above & truth[clips[part]]).sum(axis=1) / above.sum(axis=1)
    return precision, clips, labels

"""Where a prediction is wrong: by label, by pair of labels, by kind of clip, and in how sure it is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd

from melfold.metrics import middle_of, pair_precisions, resampled_means
from melfold.probs import Probs, align

DRAWS = 1000
"""Resamples behind an interval."""

LENGTHS = (1, 2, 4, 8, 16)
"""Seconds between the groups of clips by length."""

BINS = 10
"""Of equal width, for calibration."""


def true_pairs(targets: pd.DataFrame, probs: Probs) -> pd.DataFrame:
    """A row for each true label of each clip.

    Returns:
        `fname`, `label`, `prob`, `rank` (1 is the best; ties take the worst) and `precision`, whose mean is lwlrap.
    """
    precision, clips, labels = pair_precisions(targets, probs)
    values = align(probs, targets.index, list(targets.columns), "predictions").to_numpy()
    own = values[clips, labels]
    rank = (values[clips] >= own[:, None]).sum(axis=1)
    names, fnames = np.array(targets.columns), np.array(targets.index)
    return pd.DataFrame({"fname": fnames[clips], "label": names[labels], "prob": own, "rank": rank, "precision": precision})


def scores_by(kind: pd.Series, pairs: pd.DataFrame, groups: pd.Series) -> pd.DataFrame:
    """`lwlrap` with its 95 % interval `low` to `high` over resampled groups, `clips`, and the median `rank`, by kind, sorted.

    Args:
        kind: of each row of `pairs`; rows without one are left out.
        pairs: of `true_pairs`.
        groups: each clip's group in the folds.
    """
    rows: dict[Any, Any] = {}
    for name, own in pairs.groupby(kind, observed=True):
        together = pd.factorize(groups.loc[own["fname"]])[0]
        sums, counts = np.bincount(together, weights=own["precision"]), np.bincount(together)
        low, high = middle_of(resampled_means(sums, counts, DRAWS, np.random.default_rng(0)))
        clips, rank = own["fname"].nunique(), own["rank"].median()
        rows[name] = {"lwlrap": own["precision"].mean(), "low": low, "high": high, "clips": clips, "rank": rank}
    return pd.DataFrame.from_dict(rows, orient="index")


def confusions(targets: pd.DataFrame, probs: Probs) -> pd.DataFrame:
    """In how many clips with the true label `row` the absent label `column` is ranked at or above it."""
    values = align(probs, targets.index, list(targets.columns), "predictions").to_numpy()
    truth = targets.to_numpy() > 0
    counts = [((values[own] >= values[own, label][:, None]) & ~truth[own]).sum(axis=0) for label, own in enumerate(truth.T)]
    return pd.DataFrame(np.stack(counts), index=targets.columns, columns=targets.columns)


def together(targets: pd.DataFrame) -> pd.DataFrame:
    """How many clips have both labels; 0 on the diagonal."""
    truth = targets.to_numpy(np.int64)
    counts = truth.T @ truth
    np.fill_diagonal(counts, 0)
    return pd.DataFrame(counts, index=targets.columns, columns=targets.columns)


def largest(counts: pd.Series, top: int) -> list[tuple[Any, int]]:
    """The largest counts with their names, none of them 0."""
    return [(name, int(n)) for name, n in counts.sort_values(ascending=False, kind="stable").head(top).items() if n]


def calibration(targets: pd.DataFrame, probs: Probs) -> pd.DataFrame:
    """How sure a prediction is against how often it is right: over all pairs of a clip and a label, in bins of equal width.

    Returns:
        `predicted` (mean probability), `observed` (share that is true) with its 95 % interval `low` to `high` (Wilson's), and
        `pairs`, of each bin that is not empty.
    """
    from scipy.stats import binomtest

    values = align(probs, targets.index, list(targets.columns), "predictions").to_numpy(np.float64).ravel()
    table = pd.DataFrame({"predicted": values, "observed": targets.to_numpy(np.float64).ravel()})
    by_bin = table.groupby(np.minimum((values * BINS).astype(int), BINS - 1))
    bins = by_bin.mean().assign(pairs=by_bin.size())
    tests = [binomtest(round(share * n), n) for share, n in zip(bins["observed"], bins["pairs"], strict=True)]
    bins[["low", "high"]] = [test.proportion_ci(method="wilson") for test in tests]
    return bins


def calibration_error(bins: pd.DataFrame) -> float:
    """The mean distance of predicted and observed, weighted by the labels in a bin rather than by the many pairs near 0."""
    weight = bins["pairs"] * bins[["predicted", "observed"]].max(axis=1)
    return float((weight * (bins["predicted"] - bins["observed"]).abs()).sum() / max(weight.sum(), 1e-12))


def length_groups(seconds: pd.Series) -> pd.Series:
    """Clips by their length."""
    middle = [f"{a} to {b} s" for a, b in itertools.pairwise(LENGTHS)]
    names = [f"under {LENGTHS[0]} s", *middle, f"over {LENGTHS[-1]} s"]
    return pd.cut(seconds, [0, *LENGTHS, np.inf], right=False, labels=names)


def count_groups(targets: pd.DataFrame) -> pd.Series:
    """Clips by their number of labels."""
    return pd.cut(targets.sum(axis=1), [1, 2, 3, np.inf], right=False, labels=["one label", "two labels", "three or more"])


def flag_groups(flags: pd.Series) -> pd.Series:
    """Clips by what the cache found: `short`, `silent`, `clipped`, or several; `no flag` first."""
    text = flags.str.replace("|", ", ", regex=False).replace("", "no flag")
    return text.astype(pd.CategoricalDtype(["no flag", *sorted(set(text) - {"no flag"})]))

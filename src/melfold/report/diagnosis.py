"""Where a prediction is wrong: by label, by pair of labels, by kind of clip, and in how sure it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from melfold.metrics import interval_of, lwlrap, pair_precisions, resampled_means
from melfold.probs import Probs, align

DRAWS = 1000
"""Resamples behind the interval of a label's score."""

LENGTHS = (1, 2, 4, 8, 16)
"""Seconds between the groups of clips by length."""

BINS = 10
"""Of equal width, for calibration."""


def true_pairs(targets: pd.DataFrame, probs: Probs) -> pd.DataFrame:
    """A row for each true label of each clip.

    Args:
        targets: multi-hot `(clips, labels)`.

    Returns:
        `fname`, `label`, `prob`, `rank` (1 is the best; ties take the worst) and `precision`, whose mean is lwlrap.
    """
    precision, clips, labels = pair_precisions(targets, probs)
    values = align(probs, targets.index, list(targets.columns), "predictions").to_numpy()
    own = values[clips, labels]
    rank = (values[clips] >= own[:, None]).sum(axis=1)
    names, fnames = np.array(targets.columns), np.array(targets.index)
    return pd.DataFrame({"fname": fnames[clips], "label": names[labels], "prob": own, "rank": rank, "precision": precision})


def by_label(pairs: pd.DataFrame, labels: Iterable[str], groups: pd.Series) -> pd.DataFrame:
    """`lwlrap` with its 95 % interval `low` to `high` over resampled groups, `clips`, and the median `rank`, by label.

    All NaN for a label without clips.

    Args:
        groups: each clip's group in the folds.
    """
    rng = np.random.default_rng(0)
    of_label = dict(list(pairs.groupby("label")))
    rows = []
    for label in labels:
        own = of_label.get(label)
        if own is None:
            rows.append((label, np.nan, np.nan, np.nan, 0, np.nan))
            continue
        values = own["precision"].to_numpy()
        together = pd.factorize(groups.loc[own["fname"]])[0]
        drawn = resampled_means(np.bincount(together, weights=values), np.bincount(together), DRAWS, rng)
        low, high = np.quantile(drawn, [0.025, 0.975])
        rows.append((label, values.mean(), low, high, len(values), float(own["rank"].median())))
    return pd.DataFrame(rows, columns=["label", "lwlrap", "low", "high", "clips", "rank"]).set_index("label")


def confusions(targets: pd.DataFrame, probs: Probs) -> pd.DataFrame:
    """In how many clips with the true label `row` the absent label `column` is ranked at or above it."""
    values = align(probs, targets.index, list(targets.columns), "predictions").to_numpy()
    truth = targets.to_numpy() > 0
    counts = np.zeros((truth.shape[1],) * 2, np.int64)
    for label in range(truth.shape[1]):
        own = truth[:, label]
        counts[label] = ((values[own] >= values[own, label][:, None]) & ~truth[own]).sum(axis=0)
    return pd.DataFrame(counts, index=targets.columns, columns=targets.columns)


def together(targets: pd.DataFrame) -> pd.DataFrame:
    """How many clips have both labels; 0 on the diagonal."""
    truth = targets.to_numpy(np.int64)
    counts = truth.T @ truth
    np.fill_diagonal(counts, 0)
    return pd.DataFrame(counts, index=targets.columns, columns=targets.columns)


def largest(counts: pd.DataFrame, top: int) -> list[tuple[str, str, int]]:
    """The largest cells of a table of counts as (row, column, count), none of them 0."""
    values = counts.to_numpy()
    order = np.argsort(-values, axis=None, kind="stable")[:top]
    cells = [divmod(int(at), values.shape[1]) for at in order]
    return [(counts.index[r], counts.columns[c], int(values[r, c])) for r, c in cells if values[r, c]]


@dataclass(frozen=True)
class Calibration:
    """How sure a prediction is against how often it is right.

    `bins`: `predicted` (mean probability), `observed` (share that is true) with its 95 % interval `low` to `high`, and `pairs`.
    `error`: the mean distance of the two, weighted by the true and predicted labels in a bin rather than by the many near 0.
    """

    bins: pd.DataFrame
    error: float


def calibration(targets: pd.DataFrame, probs: Probs) -> Calibration:
    """Over all pairs of a clip and a label, in bins of equal width; empty bins are left out."""
    values = align(probs, targets.index, list(targets.columns), "predictions").to_numpy(np.float64).ravel()
    truth = targets.to_numpy(np.float64).ravel()
    number = np.minimum((values * BINS).astype(int), BINS - 1)
    pairs = np.bincount(number, minlength=BINS)
    kept = pairs > 0
    n = pairs[kept]
    predicted, observed = (np.bincount(number, weights=w, minlength=BINS)[kept] / n for w in (values, truth))
    low, high = _wilson(observed, n)
    bins = pd.DataFrame({"predicted": predicted, "observed": observed, "low": low, "high": high, "pairs": n})
    weight = n * np.maximum(predicted, observed)
    return Calibration(bins, float((weight * np.abs(predicted - observed)).sum() / max(weight.sum(), 1e-12)))


def _wilson(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def by_kind(targets: pd.DataFrame, probs: Probs, kind: pd.Series, groups: pd.Series) -> pd.DataFrame:
    """`lwlrap` with its interval `low` to `high`, and `clips`, by the kind of a clip, in the order of their first clips' names.

    Args:
        kind: a name by `fname`; clips it lacks are left out.
        groups: each clip's group in the folds.
    """
    rows = []
    for name in pd.unique(kind):
        own = targets.index.intersection(kind.index[kind == name])
        if len(own) and targets.loc[own].to_numpy().any():
            part = targets.loc[own]
            interval = interval_of(part, probs, groups)
            rows.append((name, lwlrap(part, probs), interval.low, interval.high, len(own)))
    return pd.DataFrame(rows, columns=["kind", "lwlrap", "low", "high", "clips"]).set_index("kind")


def length_groups(seconds: pd.Series) -> pd.Series:
    """Clips by their length, the shortest first."""
    edges = (0, *LENGTHS, np.inf)
    middle = [f"{a} to {b} s" for a, b in itertools.pairwise(LENGTHS)]
    names = [f"under {LENGTHS[0]} s", *middle, f"over {LENGTHS[-1]} s"]
    seconds = seconds.sort_values(kind="stable")
    return pd.Series([names[int(np.searchsorted(edges, s, "right")) - 1] for s in seconds], index=seconds.index, dtype=object)


def count_groups(targets: pd.DataFrame) -> pd.Series:
    """Clips by their number of labels."""
    counts = targets.sum(axis=1).astype(int).sort_values(kind="stable")
    names = ["none", "one label", "two labels"]
    return pd.Series([names[c] if c < 3 else "three or more" for c in counts], index=counts.index, dtype=object)


def flag_groups(flags: pd.Series) -> pd.Series:
    """Clips by what the cache found: `short`, `silent`, `clipped`, or several; `no flag` first."""
    text = flags.str.replace("|", ", ", regex=False).sort_values(kind="stable")
    return text.where(text != "", "no flag")

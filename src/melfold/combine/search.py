"""Which runs to combine, and how: subsets forward and backward, every kind of mean, weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from melfold.combine.oof import Together
from melfold.metrics import rank_precisions
from melfold.probs import MEANS, Probs, align, mean_probs, to_mean

PAYS = 0.0005
"""A run, or fitted weights, must add this much lwlrap on the clips they are chosen on: less is not worth the seconds."""

ROUNDS = 20
"""Of greedy weights."""


@dataclass(frozen=True)
class Choice:
    """An ensemble: runs, the kind of their mean, weights that sum to 1, and the score on the clips it was chosen on."""

    runs: tuple[str, ...]
    kind: str
    weights: tuple[float, ...]
    fitted: float

    def mean(self, tables: Mapping[str, Probs]) -> Probs:
        """The combined probabilities."""
        return mean_probs([tables[name] for name in self.runs], self.kind, self.weights)


Score = Callable[[Sequence[int]], float]
"""Runs -> lwlrap of their mean with equal weights."""


def choose(
    targets: pd.DataFrame,
    tables: Mapping[str, Probs],
    *,
    kinds: Iterable[str] = MEANS,
    most: int | None = None,
    costs: Sequence[float] | None = None,
    budget: float = np.inf,
) -> Choice:
    """The best ensemble on some clips, by a search that leaves out runs that do not pay.

    For each kind of mean: from the best pair or single run forward, and from all runs backward, with equal weights; then greedy
    weights for the better set. Ties go to fewer runs and to the first kind.

    Args:
        tables: by run; only the clips of `targets` are used.
        most: at most this many runs.
        costs: of each run, in any unit; a set must cost no more than `budget`. At least one run does.
    """
    names, best = list(tables), None
    aligned = [align(table, targets.index, list(targets.columns), "predictions") for table in tables.values()]
    values = np.stack([table.to_numpy(np.float64) for table in aligned])
    price = np.zeros(len(names)) if costs is None else np.asarray(costs, np.float64)

    def fits(runs: Sequence[int]) -> bool:
        return len(runs) <= (most or len(names)) and price[list(runs)].sum() <= budget

    for kind in kinds:
        runs, weights, fitted = _search(targets.to_numpy() > 0, to_mean(values, kind), fits)
        if best is None or fitted > best.fitted + 1e-12:
            used = [run for run in runs if weights[run]]
            best = Choice(tuple(names[r] for r in used), kind, tuple(float(w) for w in weights[used]), fitted)
    assert best
    return best


def _search(
    truth: np.ndarray, linear: np.ndarray, fits: Callable[[Sequence[int]], bool]
) -> tuple[Sequence[int], np.ndarray, float]:
    """The best runs, the weights of all runs, and the score.

    Args:
        linear: of each run; every kind of mean is linear in something, and what brings it back to 0..1 keeps the order, which is
            all that lwlrap sees.
    """
    count = len(linear)

    def weighted(weights: np.ndarray) -> float:
        return float(rank_precisions(truth, np.tensordot(weights / weights.sum(), linear, 1))[0].mean())

    def equal(runs: Sequence[int]) -> np.ndarray:
        return np.isin(np.arange(count), runs) / len(runs)

    def score(runs: Sequence[int]) -> float:
        return weighted(equal(runs))

    sets = [_drop(_grow(count, score, fits), score)]
    if fits(range(count)):
        sets.append(_drop(list(range(count)), score))
    runs = max(sets, key=lambda own: (score(own), -len(own)))
    greedy = _greedy_weights(weighted, runs, count)
    return (runs, greedy, weighted(greedy)) if weighted(greedy) > score(runs) + PAYS else (runs, equal(runs), score(runs))


def _grow(count: int, score: Score, fits: Callable[[Sequence[int]], bool]) -> list[int]:
    """From the best single run, or the best pair if that pays, the run that helps most, as long as one pays."""
    runs, best = _best([[run] for run in range(count) if fits([run])], score)
    more, value = _best([list(pair) for pair in combinations(range(count), 2) if fits(pair)], score)
    while value > best + PAYS:
        runs, best = more, value
        more, value = _best([[*runs, run] for run in range(count) if run not in runs and fits([*runs, run])], score)
    return runs


def _drop(runs: list[int], score: Score) -> list[int]:
    """Leave out the run that is missed least, as long as it does not pay."""
    while len(runs) > 1:
        fewer, value = _best([[r for r in runs if r != run] for run in runs], score)
        if value + PAYS < score(runs):
            break
        runs = fewer
    return runs


def _best(sets: Sequence[list[int]], score: Score) -> tuple[list[int], float]:
    values = [score(runs) for runs in sets]
    return (sets[int(np.argmax(values))], max(values)) if sets else ([], -np.inf)


def _greedy_weights(weighted: Callable[[np.ndarray], float], runs: Sequence[int], count: int) -> np.ndarray:
    """Weights `(count,)`, summing to 1, by greedy selection with replacement: each round adds the run that helps most.

    Caruana et al., "Ensemble Selection from Libraries of Models" (2004); the best of all rounds is kept. Ties go to the first.
    """
    counts, steps = np.zeros(count), np.eye(count)[list(runs)]
    best, chosen = -1.0, counts
    for _ in range(ROUNDS):
        scores = [weighted(counts + step) for step in steps]
        counts = counts + steps[int(np.argmax(scores))]
        if max(scores) > best + 1e-12:
            best, chosen = max(scores), counts
    return chosen / chosen.sum()


def nested_probs(together: Together, chosen: Callable[[pd.DataFrame, Mapping[str, Probs]], Choice]) -> Probs:
    """Every clip by what `chosen`, such as `choose`, takes on the other folds' clips: its score is not the fitted one."""
    parts = []
    for fold in sorted(together.folds.unique()):
        inside = together.folds == fold
        choice = chosen(together.targets.loc[~inside], together.tables)
        parts.append(choice.mean({name: table.loc[inside] for name, table in together.tables.items()}))
    return pd.concat(parts).loc[together.targets.index]

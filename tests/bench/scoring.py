"""The metric, against a loop over clips."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.metrics import label_ranking_average_precision_score

from melfold.metrics import lwlrap
from tests.bench.harness import Result, ratio_result, seconds_of, take_turns
from tests.bench.workspace import Workspace


def score(work: Workspace) -> list[Result]:
    """lwlrap of as many clips as FAT2019's curated ones, 80 labels, 1.2 of them true in a clip.

    The loop gets plain arrays, ours validates and aligns tables; both must agree, with scikit-learn too.
    """
    clips, labels = work.pick(4970, 200), 80
    rng = np.random.default_rng(0)
    truth = np.zeros((clips, labels), np.float32)
    truth[np.arange(clips), rng.integers(0, labels, clips)] = 1
    truth[np.arange(0, clips, 5), rng.integers(0, labels, len(range(0, clips, 5)))] = 1
    scores = rng.permutation(clips * labels).reshape(clips, labels).astype(np.float32) / (clips * labels)  # no ties
    names = [f"{number:08x}.wav" for number in range(clips)]
    targets_table, scores_table = (pd.DataFrame(v, names, [f"label_{i}" for i in range(labels)]) for v in (truth, scores))

    def sklearn() -> float:
        return label_ranking_average_precision_score(truth > 0, scores, sample_weight=truth.sum(axis=1))

    values = [lwlrap(targets_table, scores_table), loop_lwlrap(truth, scores), sklearn()]
    assert np.ptp(values) < 1e-6, f"three ways to compute lwlrap differ: {values}"
    turns = take_turns(lambda: lwlrap(targets_table, scores_table), lambda: loop_lwlrap(truth, scores), work.pick(15, 1))
    sklearn_rate = clips / min(seconds_of(sklearn) for _ in range(5))
    return [
        ratio_result(
            "lwlrap", "loop over clips", turns, clips, "clips/s", bound=3.0, aim=3.0, sklearn_clips_per_s=round(sklearn_rate)
        )
    ]


def loop_lwlrap(truth: np.ndarray, scores: np.ndarray) -> float:
    """The organisers' way: clip by clip, the precision at the rank of each of its labels."""
    total, pairs = 0.0, 0
    for own, values in zip(truth, scores, strict=True):
        positive = np.flatnonzero(own > 0)
        if not len(positive):
            continue
        order = np.argsort(values)[::-1]
        ranks = np.empty(len(values), int)
        ranks[order] = np.arange(len(values))
        retrieved = np.zeros(len(values), bool)
        retrieved[ranks[positive]] = True
        hits = np.cumsum(retrieved)
        total += float((hits[ranks[positive]] / (1 + ranks[positive])).sum())
        pairs += len(positive)
    return total / pairs

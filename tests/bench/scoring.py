"""The metric, against a bare sort, scikit-learn and a loop over clips."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.metrics import label_ranking_average_precision_score

from melfold.metrics import lwlrap
from melfold.probs import make_probs, read_probs, write_probs
from tests.bench.harness import Result, one_thread, ratio_result, take_turns
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
    sides = {
        "bare sort": (lambda: np.sort(scores, axis=1), 0.07, 0.1),
        "scikit-learn": (sklearn, 3.0, 10.0),
        "loop over clips": (lambda: loop_lwlrap(truth, scores), 3.0, 3.0),
    }
    with one_thread():
        return [
            ratio_result(
                "lwlrap",
                against,
                take_turns(lambda: lwlrap(targets_table, scores_table), theirs, work.pick(15, 1)),
                clips,
                "clips/s",
                bound=bound,
                aim=aim,
            )
            for against, (theirs, bound, aim) in sides.items()
        ]


def tables(work: Workspace) -> list[Result]:
    """Probabilities written to and read from CSV, cells a second, beside the same array as bytes."""
    clips, labels = work.pick(4970, 50), 80
    values = np.random.default_rng(0).random((clips, labels), np.float32)
    probs = make_probs(values, [f"{n:08x}.wav" for n in range(clips)], [f"label_{n}" for n in range(labels)])
    path, bare = work.folder / "probs.csv", work.folder / "probs.npy"

    def ours() -> None:
        write_probs(path, probs)
        read_probs(path)

    def theirs() -> None:
        np.save(bare, values)
        np.load(bare)

    turns = take_turns(ours, theirs, work.pick(5, 1))
    rate, bytes_rate = turns.rates(clips * labels)
    return [Result("tables", "np.save and np.load", rate, bytes_rate, "cells/s", rate, "cells/s", 1e5, 1e5)]


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

"""Near-duplicates by audio, for data without ids: clips that sound as if they were cut from one recording.

Two clips that share a label are compared in two ways: by the distribution of levels in each band, and by how near each frame of
one is to its nearest frame of the other. Both distances count in units of what is usual between clips of that label. Cuts of one
recording that have no sound in common are not found: this is a proposal to listen to, not a proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from melfold.compute import Progress, silent
from melfold.data.arrays import npy_path
from melfold.data.groups import join_pairs

NEAR = 0.5
"""Pairs whose distance is less than this share of the usual one are proposed; see folds/README.md for what it finds."""

FRAMES = 48
"""Of a clip, evenly spaced, that are compared one by one."""

QUIET_DB = 75.0
"""Frames this far below a clip's peak are silence, and tell nothing."""


def suggest_groups(labels: pd.Series, folder: Path, progress: Progress = silent) -> tuple[pd.Series, pd.DataFrame]:
    """Groups of clips that are probably near-duplicates, from the labels of each clip and the folder of log-mels.

    Returns:
        A number by `fname`, of the clips that are in a group of several; and the pairs behind it, nearest first: `one`, `other`
        and `distance`, 0 for the same audio and about 1 for any two clips of a label.
    """
    fnames, spectra, frames = list(labels.index), [], []
    for number, fname in enumerate(fnames, 1):
        log_mel = np.load(npy_path(folder, fname)).astype(np.float32)
        peaks = log_mel.max(axis=1)
        loud = log_mel[peaks > peaks.max() - QUIET_DB]
        spectra.append(np.percentile(loud, (10, 50, 90), axis=0).ravel())
        frames.append(loud[np.linspace(0, len(loud) - 1, FRAMES).astype(int)])
        progress(number, len(fnames), "reading log-mels")
    own = [set(each) for each in labels]
    pairs = np.array([(i, j) for i, j in combinations(range(len(fnames)), 2) if own[i] & own[j]], int).reshape(-1, 2)
    level = np.stack(spectra)
    level -= level.mean(axis=1, keepdims=True)  # louder or softer is the same recording
    level = (level - level.mean(axis=0)) / (level.std(axis=0) + 1e-6)
    by_level = np.sqrt(((level[pairs[:, 0]] - level[pairs[:, 1]]) ** 2).mean(axis=1))
    by_frame = _frame_distances([each - each.mean() for each in frames], pairs)
    distance = np.sqrt(_relative(by_level, pairs) * _relative(by_frame, pairs))
    near = np.flatnonzero(distance < NEAR)
    near = near[np.argsort(distance[near], kind="stable")]
    groups = join_pairs(fnames, pairs[near])
    names = np.array(fnames, object)
    table = pd.DataFrame({"one": names[pairs[near, 0]], "other": names[pairs[near, 1]], "distance": distance[near]})
    return groups.loc[groups.duplicated(keep=False)], table


def _frame_distances(frames: Sequence[np.ndarray], pairs: np.ndarray) -> np.ndarray:
    """The mean distance in dB from each frame of a pair to the nearest of the other clip."""
    squares, found = [(each**2).sum(axis=1) for each in frames], np.empty(len(pairs))
    for row, (i, j) in enumerate(pairs):
        table = squares[i][:, None] + squares[j] - 2 * frames[i] @ frames[j].T
        table = np.sqrt(np.maximum(table, 0) / frames[i].shape[1])
        found[row] = (table.min(axis=0).mean() + table.min(axis=1).mean()) / 2
    return found


def _relative(distances: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Distances in units of the usual one of both clips to those they share a label with."""
    both = pd.DataFrame({"clip": pairs.ravel(), "distance": np.repeat(distances, 2)})
    usual = both.groupby("clip")["distance"].median()
    return distances / np.sqrt(usual.loc[pairs[:, 0]].to_numpy() * usual.loc[pairs[:, 1]].to_numpy() + 1e-12)

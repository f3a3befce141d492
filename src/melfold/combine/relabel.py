"""Doubtful labels: curated clips whose held-out prediction contradicts their labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from melfold.errors import MelfoldError
from melfold.facts import join_labels
from melfold.files import write_text
from melfold.learn.predictions import Prediction
from melfold.probs import Probs, align


def suggest_corrections(prediction: Prediction) -> pd.DataFrame:
    """The doubtful clips of a prediction; see `doubtful`."""
    oof = prediction.read_oof()
    return doubtful(prediction.run.targets(oof.index), oof)


def doubtful(targets: pd.DataFrame, oof: Probs) -> pd.DataFrame:
    """Curated clips whose held-out prediction contradicts their labels.

    By confident learning (Northcutt et al., 2021), a label at a time: an absent label is *missing* where its probability
    reaches the mean over clips that have it; a present one is *wrong* where its probability is below the mean over clips that
    lack it. Where all labels are wrong and none is missing, the label that is nearest to its threshold is taken as missing.
    Each prediction is by the model that never saw the clip.

    Args:
        targets: multi-hot `(clips, labels)`.

    Returns:
        `labels` as they are, `suggested` (never the same, never empty), `missing` and `wrong` (tuples of names), and `doubt`, the
        largest distance from such a threshold in logits; by `fname`, the most doubtful first.
    """
    probs = align(oof, targets.index, list(targets.columns), "out-of-fold predictions").to_numpy(np.float64)
    truth = targets.to_numpy() > 0
    inner = np.clip(probs, 1e-7, 1 - 1e-7)
    logits = np.log(inner) - np.log1p(-inner)

    def threshold(chosen: np.ndarray, empty: float) -> np.ndarray:
        count = chosen.sum(axis=0)
        mean = np.clip((probs * chosen).sum(axis=0) / np.maximum(count, 1), 1e-7, 1 - 1e-7)
        return np.where(count, np.log(mean) - np.log1p(-mean), empty)

    # A label that no clip has, or that all have, can be neither missing nor wrong anywhere.
    over = np.where(truth, -np.inf, logits - threshold(truth, np.inf))
    under = np.where(truth, threshold(~truth, -np.inf) - logits, -np.inf)
    names = np.array(targets.columns)
    rows = []
    for row, fname in enumerate(targets.index):
        missing, wrong = over[row] >= 0, under[row] > 0
        if wrong[truth[row]].all() and not missing.any() and np.isfinite(over[row].max()):
            missing[over[row].argmax()] = True
        if missing.any() or (wrong.any() and not wrong[truth[row]].all()):
            sets = (truth[row], (truth[row] & ~wrong) | missing, missing, wrong)
            rows.append((fname, *(tuple(names[own]) for own in sets), float(max(over[row].max(), under[row].max()))))
    columns = ["fname", "labels", "suggested", "missing", "wrong", "doubt"]
    return pd.DataFrame(rows, columns=columns).sort_values(["doubt", "fname"], ascending=[False, True]).set_index("fname")


def write_corrections(path: Path, doubts: pd.DataFrame, run: str, track: str) -> None:
    """Write a run's suggestions as a `corrections.csv`, to be listened to and edited; an existing file is never replaced.

    A recipe with these corrections is of the run's `track` too.

    Raises:
        MelfoldError: the file exists.
    """
    if path.exists():
        raise MelfoldError("the file exists already", str(path), "It may hold your own work: choose another name")
    rows = []
    for row in doubts.itertuples():
        changes = [f"{kind} {', '.join(names)}" for kind, names in (("lacks", row.missing), ("wrong", row.wrong)) if names]
        rows.append((row.Index, join_labels(row.suggested), f"{run}: {'; '.join(changes)}, doubt {row.doubt:.1f}", track))
    table = pd.DataFrame(rows, columns=["fname", "labels", "why", "track"])
    write_text(path, table.to_csv(index=False, lineterminator="\n"))

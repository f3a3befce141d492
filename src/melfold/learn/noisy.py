"""Learning from the noisy set without learning from what one is scored on: teachers, selection, and doubtful labels.

A student's fold `k` is taught by the teacher's fold `k`, which never saw the clips held out there. So no curated clip's label
reaches the model that scores it. (Corrections that a person makes by a run's suggestions are another matter: a suggestion for a
clip of one fold comes from a model that has seen the labels of the others.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from melfold.config import NoisyConfig
from melfold.data.cache import read_manifest
from melfold.data.clips import ClipStore
from melfold.data.competition import multi_hot
from melfold.errors import MelfoldError
from melfold.facts import join_labels
from melfold.files import locked, read_json, write_text
from melfold.learn.devices import Device
from melfold.learn.predict import predict_probs
from melfold.learn.runs import FULL, Run
from melfold.learn.train import load_fold
from melfold.probs import Probs, align, is_current, make_probs, mean_probs, read_probs, write_current


def teach(student: Run, teacher: Run, fold: int | str, teacher_cache: Path, device: Device) -> None:
    """Leave a fold's lesson in the student's folder: the noisy clips that the teacher's model of that fold kept, with targets.

    A student on every clip (`full`) learns from the teacher's `full` model, or else from the mean of its folds: it is not scored.

    Args:
        teacher_cache: log-mels of the noisy clips as the teacher hears them.

    Raises:
        MelfoldError: the teacher's fold is not trained.
    """
    folder = student.fold(fold)
    if folder.done:
        return

    def busy() -> None:
        raise MelfoldError("another melfold trains this fold", str(folder.path), "Wait for it, or stop it")

    folds = [str(fold)]
    if fold == FULL and not teacher.fold(FULL).done:
        folds = [f for f in teacher.done_folds() if f != FULL]
    if not folds or not all(teacher.fold(f).done for f in folds):
        what = f"fold {fold} of teacher {teacher.name} is not trained"
        raise MelfoldError(what, str(teacher.folder), f"Run `melfold train --run {teacher.name}`")
    with locked(folder.path / ".lock", busy):
        keys = [_judgement_key(teacher, f, student, teacher_cache) for f in folds]
        key = [keys, student.recipe.noisy.model_dump(mode="json")]
        if is_current(folder.lesson, key):
            return
        judged = [_judge(teacher, f, k, student, teacher_cache, device) for f, k in zip(folds, keys, strict=True)]
        probs = judged[0] if len(judged) == 1 else mean_probs(judged, "geometric")
        targets = multi_hot(student.noisy, student.info.labels)
        kept = select_noisy(targets, probs, student.recipe.noisy)
        probs = align(probs, kept, student.info.labels, f"predictions of {teacher.name}")
        share = student.recipe.noisy.pseudo
        values = (1 - share) * targets.loc[kept].to_numpy(np.float64) + share * probs.to_numpy(np.float64)
        write_current(folder.lesson, make_probs(values, kept, student.info.labels), key)


def _judgement_key(teacher: Run, fold: str, student: Run, cache: Path) -> list[Any]:
    """All that a teacher's judgement of the student's noisy clips rests on: its weights, its views, and the clips' files."""
    recipe, fnames = teacher.recipe, list(student.noisy.index)
    files = read_manifest(cache).loc[fnames, ["size", "mtime_ns"]].reset_index().to_numpy().tolist()
    views = [recipe.logmel.fingerprint(), recipe.predict.model_dump(mode="json"), recipe.train.crop_seconds, recipe.train.pad]
    return [read_json(teacher.fold(fold).result)["weights_sha256"], views, files]


def _judge(teacher: Run, fold: str, key: list[Any], student: Run, cache: Path, device: Device) -> Probs:
    """What one of the teacher's models thinks of the student's noisy clips; kept beside its weights."""
    folder, recipe = teacher.fold(fold), teacher.recipe
    if not is_current(folder.noisy, key):
        store = ClipStore(cache, list(student.noisy.index), recipe.logmel.n_mels, recipe.logmel.top_db)
        model = load_fold(teacher, fold, device)
        if recipe.noisy.use and recipe.noisy.own_norm:  # it learnt to hear such clips with their own statistics
            mean, std = store.statistics()
            model.mean.fill_(mean)
            model.std.fill_(std)
        write_current(folder.noisy, predict_probs(model, store, teacher.info.labels, recipe, device), key)
    return read_probs(folder.noisy)


def select_noisy(targets: pd.DataFrame, judged: Probs, config: NoisyConfig) -> list[str]:
    """The noisy clips a teacher agrees with most, sorted by name.

    Agreement is the mean logarithm of the teacher's probability of the clip's labels. Clips are taken from the most agreed
    with on, each unless one of its labels has `per_label` clips already, until there are `top`: FAT2019's teams so chose about
    5,000 of 20,000, with at most 50 a label.

    Args:
        targets: multi-hot `(clips, labels)`.
    """
    truth = targets.to_numpy() > 0
    logs = np.log(np.maximum(align(judged, targets.index, list(targets.columns), "judgements").to_numpy(np.float64), 1e-38))
    agreement = (logs * truth).sum(axis=1) / truth.sum(axis=1)
    taken = np.zeros(truth.shape[1], int)
    kept: list[str] = []
    for row in np.lexsort((targets.index.to_numpy(str), -agreement)):
        if config.top and len(kept) == config.top:
            break
        if config.per_label and (taken[truth[row]] >= config.per_label).any():
            continue
        taken += truth[row]
        kept.append(targets.index[row])
    return sorted(kept)


def doubtful(targets: pd.DataFrame, oof: Probs) -> pd.DataFrame:
    """Curated clips whose held-out prediction contradicts their labels.

    By confident learning (Northcutt et al., 2021), a label at a time: an absent label is *missing* where its probability
    reaches the mean over clips that have it; a present one is *wrong* where its probability is below the mean over clips that
    lack it.
    Each prediction is by the model that never saw the clip.

    Args:
        targets: multi-hot `(clips, labels)`.

    Returns:
        `labels` as they are, `suggested`, `missing` and `wrong` (tuples of names), and `doubt`, the largest distance from such a
        threshold in logits; by `fname`, the most doubtful first.
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
        if missing.any() or wrong.any():
            rows.append(
                {
                    "fname": fname,
                    "labels": tuple(names[truth[row]]),
                    "suggested": tuple(names[(truth[row] & ~wrong) | missing]),
                    "missing": tuple(names[missing]),
                    "wrong": tuple(names[wrong]),
                    "doubt": float(max(over[row].max(), under[row].max())),
                }
            )
    columns = ["fname", "labels", "suggested", "missing", "wrong", "doubt"]
    return pd.DataFrame(rows, columns=columns).sort_values(["doubt", "fname"], ascending=[False, True]).set_index("fname")


def write_corrections(path: Path, doubts: pd.DataFrame, run: str) -> None:
    """Write suggestions as a `corrections.csv` to be listened through and pruned; an existing file is never replaced.

    Raises:
        MelfoldError: a file stands there.
    """
    if path.exists():
        raise MelfoldError("a file stands there already", str(path), "It may hold your own work: choose another name")
    rows = [
        (fname, join_labels(row.suggested or row.labels), f"{run}: {_why(row)}, doubt {row.doubt:.1f}")
        for fname, row in zip(doubts.index, doubts.itertuples(), strict=True)
    ]
    table = pd.DataFrame(rows, columns=["fname", "labels", "why"])
    write_text(path, table.to_csv(index=False, lineterminator="\n"))


def _why(row: Any) -> str:
    parts = [f"{kind} {', '.join(names)}" for kind, names in (("lacks", row.missing), ("wrong", row.wrong)) if names]
    return "; ".join(parts)

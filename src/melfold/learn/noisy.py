"""Learning from the noisy set without learning from what one is scored on: teachers and pseudo labels.

Fold `k` of a student learns from the predictions of the teacher's fold `k`, which never saw the clips held out there. So no
curated clip's label reaches the model that scores it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from melfold.artefacts import Artefact
from melfold.config import NoisyConfig
from melfold.data.cache import read_manifest
from melfold.data.clips import ClipStore
from melfold.data.competition import multi_hot
from melfold.errors import MelfoldError
from melfold.learn.devices import Device
from melfold.learn.normalise import statistics
from melfold.learn.predict import predict_probs
from melfold.learn.predictions import write_current
from melfold.learn.runs import FULL, Run
from melfold.learn.train import load_fold
from melfold.probs import Probs, align, make_probs, mean_probs, read_probs


def make_pseudo_labels(student: Run, teacher: Run, fold: int | str, teacher_cache: Path, device: Device) -> None:
    """Leave in the student's fold the noisy clips that the teacher's model of that fold selected, with their targets.

    A student on every clip (`full`) takes the teacher's `full` model, or else the mean of its folds: it is not scored.

    Args:
        teacher_cache: log-mels of the noisy clips with the teacher's front-end.

    Raises:
        MelfoldError: the teacher's fold is not trained.
    """
    folder = student.fold(fold)
    if folder.done:
        return
    folds = [str(fold)]
    if fold == FULL and not teacher.fold(FULL).done:
        folds = [f for f in teacher.done_folds() if f != FULL]
    if not folds or not all(teacher.fold(f).done for f in folds):
        what = f"fold {fold} of teacher {teacher.name} is not trained"
        raise MelfoldError(what, str(teacher.folder), f"Run `melfold train --run {teacher.name}`")
    with folder.lock():
        inputs = {f: _inputs(teacher, f, student, teacher_cache) for f in folds}
        made_from = {"teacher": inputs, "noisy": student.recipe.noisy.model_dump(mode="json")}
        if Artefact.of(folder.pseudo_labels).is_fresh(made_from):
            return
        predicted = [_teacher_probs(teacher, f, inputs[f], student, teacher_cache, device) for f in folds]
        probs = predicted[0] if len(predicted) == 1 else mean_probs(predicted, "geometric")
        targets = multi_hot(student.noisy, student.info.labels)
        kept = select_noisy(targets, probs, student.recipe.noisy)
        probs = align(probs, kept, student.info.labels, f"predictions of {teacher.name}")
        share = student.recipe.noisy.pseudo
        values = (1 - share) * targets.loc[kept].to_numpy(np.float64) + share * probs.to_numpy(np.float64)
        write_current(folder.pseudo_labels, make_probs(values, kept, student.info.labels), made_from)


def _inputs(teacher: Run, fold: str, student: Run, cache: Path) -> dict[str, Any]:
    """What a teacher's predictions of the student's noisy clips are made from: weights, views, and the clips' files."""
    recipe = teacher.recipe
    files = read_manifest(cache).loc[list(student.noisy.index), ["size", "mtime_ns"]].reset_index().to_numpy().tolist()
    predict = recipe.predict.model_dump(mode="json") | {"crop_seconds": recipe.train.crop_seconds, "pad": recipe.train.pad}
    weights = teacher.fold(fold).weights_sha256()
    return {"weights": weights, "logmel": recipe.logmel.fingerprint(), "predict": predict, "clips": files}


def _teacher_probs(teacher: Run, fold: str, inputs: dict[str, Any], student: Run, cache: Path, device: Device) -> Probs:
    """What one of the teacher's models predicts for the student's noisy clips; kept beside its weights."""
    path, recipe = teacher.fold(fold).teacher_probs, teacher.recipe
    if not Artefact.of(path).is_fresh(inputs):
        store = ClipStore(cache, list(student.noisy.index), recipe.logmel.n_mels, recipe.logmel.top_db)
        model = load_fold(teacher, fold, device)
        if recipe.uses_noisy and recipe.noisy.own_norm:  # it was trained with these clips' own statistics
            model.normalise.set(*statistics(store, bands=recipe.model.normalise != "scalar"))
        write_current(path, predict_probs(model, store, teacher.info.labels, recipe, device), inputs)
    return read_probs(path)


def select_noisy(targets: pd.DataFrame, predicted: Probs, config: NoisyConfig) -> list[str]:
    """The noisy clips whose labels a teacher agrees with most, sorted by name.

    Agreement is the mean logarithm of the teacher's probability of the clip's labels. Clips are taken in order of agreement,
    except those with a label that has `per_label` clips already, until there are `top`: FAT2019's teams chose about 5,000 of
    20,000 in this way, with at most 50 for each label.

    Args:
        targets: multi-hot `(clips, labels)`.
    """
    truth = targets.to_numpy() > 0
    logs = np.log(np.maximum(align(predicted, targets.index, list(targets.columns), "teacher").to_numpy(np.float64), 1e-38))
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

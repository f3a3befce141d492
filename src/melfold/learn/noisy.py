"""Learning from teachers without learning from what one is scored on: chosen noisy clips and soft targets.

Fold `k` of a student learns from the predictions of its teachers' folds `k`, which never saw the clips held out there. So no
curated clip's label reaches the model that scores it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from melfold.artefacts import Artefact
from melfold.compute import Progress, adding, silent
from melfold.config import NoisyConfig
from melfold.data.cache import audio_digest
from melfold.data.clips import ClipStore
from melfold.data.competition import multi_hot
from melfold.errors import MelfoldError
from melfold.learn.devices import Device
from melfold.learn.normalise import statistics
from melfold.learn.predict import predict_probs
from melfold.learn.predictions import write_current
from melfold.learn.runs import FULL, Run, open_run
from melfold.learn.train import load_fold
from melfold.probs import Probs, align, make_probs, mean_probs, read_probs, sigmoid


def make_pseudo_labels(
    student: Run, fold: int | str, caches: Sequence[Path], device: Device, progress: Progress = silent
) -> None:
    """Leave in the student's fold the clips with targets from its teachers' models of that fold: the noisy clips they chose, and
    the curated ones that probably lack a label.

    A student on every clip (`full`) takes a teacher's `full` model, or else all of its folds: it is not scored.

    Args:
        caches: for each teacher the folder of log-mels with its front-end.

    Raises:
        MelfoldError: a teacher's fold is not trained.
    """
    folder, config = student.fold(fold), student.recipe.noisy
    if folder.done:
        return
    curated = student.train_targets(student.trained_on(fold))
    if not config.missing:
        curated = curated.iloc[:0]
    noisy = multi_hot(student.noisy, student.info.labels)
    with folder.lock():
        models = {}
        for name, cache in zip(config.teachers, caches, strict=True):
            teacher = open_run(student.home, name)
            for own in _folds_of(teacher, fold):
                models[f"{name} {own}"] = teacher, own, cache, _inputs(teacher, own, [*curated.index, *noisy.index], cache)
        made_from = {"teachers": {key: inputs for key, (*_, inputs) in models.items()}, "noisy": config.model_dump(mode="json")}
        if Artefact.of(folder.pseudo_labels).is_fresh(made_from):
            return
        tables = []
        for teacher, own, cache, inputs in models.values():
            probs = _teacher_probs(teacher, own, cache, inputs, list(curated.index), list(noisy.index), device, progress)
            given = [*noisy.index, *curated.index]
            probs = align(probs, given, student.info.labels, f"predictions of {teacher.name}")
            tables.append(probs if teacher.recipe.schedule[-1].loss == "bce" else calibrated(probs, pd.concat([noisy, curated])))
        write_current(folder.pseudo_labels, soft_targets(noisy, curated, mean_probs(tables, "geometric"), config), made_from)


def _folds_of(teacher: Run, fold: int | str) -> list[str]:
    folds = [str(fold)]
    if fold == FULL and not teacher.fold(FULL).done:
        folds = [f for f in teacher.done_folds() if f != FULL]
    if not folds or not all(teacher.fold(f).done for f in folds):
        what = f"fold {fold} of teacher {teacher.name} is not trained"
        raise MelfoldError(what, str(teacher.folder), f"Run `melfold train --run {teacher.name}`")
    return folds


def _inputs(teacher: Run, fold: str, clips: Sequence[str], cache: Path) -> dict[str, Any]:
    """What a teacher's predictions of some clips are made from: weights, views, and the clips' audio."""
    recipe = teacher.recipe
    predict = recipe.predict.model_dump(mode="json") | {"crop_seconds": recipe.train.crop_seconds, "pad": recipe.train.pad}
    weights = teacher.fold(fold).weights_sha256()
    return {"weights": weights, "logmel": recipe.logmel.fingerprint(), "predict": predict, "audio": audio_digest(cache, clips)}


def _teacher_probs(
    teacher: Run,
    fold: str,
    cache: Path,
    inputs: dict[str, Any],
    curated: list[str],
    noisy: list[str],
    device: Device,
    progress: Progress,
) -> Probs:
    """What one of a teacher's models predicts for a student's clips; kept beside its weights."""
    path, recipe = teacher.fold(fold).teacher_probs, teacher.recipe
    if Artefact.of(path).is_fresh(inputs):
        return read_probs(path)
    model, parts = load_fold(teacher, fold, device), []
    total = len(recipe.views) * (len(curated) + len(noisy))
    tell = adding(progress, total, f"{teacher.name} fold {fold}: predicting the student's clips")
    for clips, apart in ((curated, False), (noisy, recipe.uses_noisy and recipe.noisy.own_norm)):
        if clips:
            store = ClipStore(cache, clips, recipe.logmel.n_mels, recipe.logmel.top_db)
            if apart:  # it was trained with these clips' own statistics
                model.normalise.set(*statistics(store, bands=recipe.model.normalise != "scalar"))
            parts.append(predict_probs(model, store, teacher.info.labels, recipe, device, tell))
    write_current(path, pd.concat(parts), inputs)
    return read_probs(path)


def calibrated(probs: Probs, targets: pd.DataFrame) -> Probs:
    """Probabilities whose sum over clips and labels is the number of labels that the clips have.

    A ranking loss such as LSEP compares the logits within a clip, so a number added to all of them changes nothing, and training
    leaves it undecided: this finds it. No label of a held-out clip takes part, and a label on the wrong clip does no harm.

    Args:
        targets: multi-hot `(clips, labels)` of the same clips, of which only the sum is used.
    """
    values = np.clip(probs.to_numpy(np.float64), 1e-9, 1 - 1e-9)
    logits, wanted = np.log(values) - np.log1p(-values), float(targets.to_numpy().sum())
    low, high = -50.0, 50.0
    for _ in range(60):  # halving; the sum grows with the number
        middle = (low + high) / 2
        low, high = (low, middle) if sigmoid(logits + middle).sum() > wanted else (middle, high)
    return make_probs(sigmoid(logits + low), list(probs.index), list(probs.columns))


def soft_targets(noisy: pd.DataFrame, curated: pd.DataFrame, probs: Probs, config: NoisyConfig) -> Probs:
    """The targets of the noisy clips that teachers chose, and of the curated clips that probably lack a label.

    Args:
        noisy, curated: multi-hot `(clips, labels)`.
        probs: the teachers' probabilities for both.
    """
    soft = probs.astype(np.float64) ** config.power
    kept = select_noisy(noisy, probs.loc[noisy.index], config)
    mixed = (1 - config.pseudo) * noisy.loc[kept].astype(np.float64) + config.pseudo * soft.loc[kept]
    lacking = missing_labels(curated, probs.loc[curated.index], config.missing)
    completed = curated.where(~lacking, soft.loc[curated.index])[lacking.any(axis=1)]
    table = pd.concat([mixed, completed])
    return make_probs(table.to_numpy(np.float64), list(table.index), list(table.columns))


def missing_labels(targets: pd.DataFrame, probs: Probs, share: float) -> pd.DataFrame:
    """bool `(clips, labels)`: of the clips without a label, the given share, those for which it is most probable.

    A share, not a threshold: a teacher has seen these clips without the label, and finds it less probable than elsewhere. After
    Fonseca et al., "Addressing Missing Labels in Audio Event Recognition Using a Teacher-Student Framework" (2020).
    """
    lacking = np.zeros(targets.shape, bool)
    for column in range(targets.shape[1]):
        (absent,) = np.nonzero(targets.to_numpy()[:, column] == 0)
        order = np.lexsort((targets.index.to_numpy(str)[absent], -probs.to_numpy()[absent, column]))
        lacking[absent[order[: int(share * len(absent))]], column] = True
    return pd.DataFrame(lacking, targets.index, targets.columns)


def select_noisy(targets: pd.DataFrame, predicted: Probs, config: NoisyConfig) -> list[str]:
    """The noisy clips whose labels the teachers agree with most, sorted by name.

    Agreement is the mean logarithm of the probability of the clip's labels. Clips are taken in order of agreement, except those
    with a label that has `per_label` clips already, until there are `top`: FAT2019's teams chose about 5,000 of 20,000 so.

    Args:
        targets: multi-hot `(clips, labels)`.
    """
    truth = targets.to_numpy() > 0
    logs = np.log(np.maximum(align(predicted, targets.index, list(targets.columns), "teachers").to_numpy(np.float64), 1e-38))
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

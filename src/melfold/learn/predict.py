"""The one prediction: out-of-fold, test and kernel all come through `predict_probs`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from melfold.config import Recipe
from melfold.data.clips import ClipStore, prefetch, window_batches
from melfold.files import Progress, silent
from melfold.learn.devices import Device
from melfold.learn.model import Tagger
from melfold.probs import Probs, make_probs


def predict_probs(
    model: Tagger, store: ClipStore, labels: Sequence[str], recipe: Recipe, device: Device, *, progress: Progress = silent
) -> Probs:
    """Probabilities `(clips, labels)` of every clip of a store, from windows over the whole clip at the recipe's shifts."""
    shifts = recipe.shift_frames
    total = np.zeros((len(store.fnames), len(labels)))
    for number, shift in enumerate(shifts):
        total += predict_logits(model, store, recipe, device, shift)
        progress(number + 1, len(shifts), "predicting")
    return make_probs(sigmoid(total / len(shifts)), store.fnames, labels)


def predict_logits(model: Tagger, store: ClipStore, recipe: Recipe, device: Device, shift: int) -> np.ndarray:
    """float64 logits `(clips, labels)`: for each clip the mean over its windows, their grid moved by `shift` frames.

    In float32 without mixed precision: the numbers must not depend on which clips share a batch.
    """
    n_labels = model.head.out_features
    sums = np.zeros((len(store.fnames), n_labels))
    counts = np.zeros(len(store.fnames))
    batches = window_batches(
        store,
        length=recipe.window_frames,
        overlap=recipe.predict.overlap,
        shift=shift,
        batch_size=recipe.predict.batch_size,
        pad=recipe.train.pad,
    )
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in prefetch(batches):
            logits = model(device.log_mels(batch.log_mels)).cpu().numpy()
            np.add.at(sums, batch.rows, logits.astype(np.float64))
            np.add.at(counts, batch.rows, 1)
    model.train(was_training)
    return sums / counts[:, None]


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """In float64 and without overflow; a float32 one would saturate into ties."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, small) / (1 + small)

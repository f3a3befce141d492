"""The one prediction: out-of-fold, test and kernel all come through `predict_probs`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from melfold.compute import Tell, silent
from melfold.config import Recipe, View
from melfold.data.clips import ClipStore
from melfold.learn.batches import read_ahead, window_batches
from melfold.learn.devices import Device, exact, explain_out_of_memory
from melfold.learn.model import Tagger
from melfold.probs import Probs, make_probs, sigmoid


def predict_probs(
    model: Tagger, store: ClipStore, labels: Sequence[str], recipe: Recipe, device: Device, tell: Tell = silent
) -> Probs:
    """Probabilities `(clips, labels)` of every clip of a store, from windows over the whole clip in all of the recipe's views.

    Args:
        tell: called now and then, in each view, with the number of clips done since the call before.
    """
    total = sum(predict_logits(model, store, recipe, device, view, tell) for view in recipe.views)
    return make_probs(sigmoid(total / len(recipe.views)), store.fnames, labels)


def speed_since(began: float, store: ClipStore, recipe: Recipe) -> dict[str, float]:
    """`speed`, to be kept with a prediction: seconds of audio for each second since a time of `time.monotonic`."""
    audio = float(store.frames.sum()) * recipe.logmel.hop_length / recipe.logmel.sr
    return {"speed": round(audio / max(time.monotonic() - began, 1e-3), 3)}


def predict_logits(
    model: Tagger, store: ClipStore, recipe: Recipe, device: Device, view: View, tell: Tell = silent
) -> np.ndarray:
    """float64 logits `(clips, labels)`: for each clip the mean over a view's windows.

    In float32 without mixed precision: the numbers must not depend on which clips share a batch.
    """
    sums, counts = np.zeros((len(store.fnames), model.head.out_features)), np.zeros(len(store.fnames))
    batches = window_batches(store, view, overlap=recipe.predict.overlap, batch_size=recipe.predict.batch_size)
    was_training = model.training
    model.eval()
    done: list[tuple[np.ndarray, torch.Tensor]] = []
    last = 0
    with explain_out_of_memory(device, "Use --set predict.batch_size=16, or less"), exact(), torch.inference_mode():
        for batch in read_ahead(batches, device):
            done.append((batch.rows, model(device.log_mels(batch.log_mels))))
            tell(int(batch.rows[-1]) - last)  # the last clip's other windows may be in the next batch
            last = int(batch.rows[-1])
        # Fetched at the end: each fetch would make the device wait for the next batch.
        for rows, logits in done:
            np.add.at(sums, rows, logits.cpu().numpy().astype(np.float64))
            np.add.at(counts, rows, 1)
        tell(1)
    model.train(was_training)
    return sums / counts[:, None]

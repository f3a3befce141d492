"""Training one fold: one visible loop that can be killed at any moment and continues from its last checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melfold.compute import Progress, silent
from melfold.config import Recipe
from melfold.errors import MelfoldError
from melfold.files import digest, remove_leftovers, sha256_file
from melfold.learn.augment import apply_augment, draw_augment
from melfold.learn.batches import Batch, read_ahead
from melfold.learn.devices import Device, explain_out_of_memory, repeatable
from melfold.learn.fold_data import FoldData
from melfold.learn.losses import bootstrapped
from melfold.learn.model import Tagger, build_model, load_model
from melfold.learn.phases import phase_at
from melfold.learn.predict import predict_probs, speed_since
from melfold.learn.predictions import own_prediction, write_current
from melfold.learn.provenance import versions
from melfold.learn.runs import FULL, FoldFolder, Run
from melfold.learn.state import TrainState
from melfold.learn.train_log import TrainLog, duration
from melfold.learn.weights import load_weights, save_weights
from melfold.metrics import lwlrap
from melfold.probs import Probs
from melfold.train_config import TrainConfig

log = logging.getLogger(__name__)

_INITIAL, _DROPOUT, _AUGMENT = 1, 2, 3  # purposes, which keep the streams of random numbers apart


def train_fold(
    run: Run, fold: int | str, cache: Path, device: Device, *, progress: Progress = silent, place: tuple[int, int] = (1, 1)
) -> FoldFolder:
    """Train one fold (or `full`), or continue where an earlier call was stopped; a trained fold is left as it is.

    Leaves the weights, the held-out clips' predictions, the log and, last, `result.json` in the fold's folder.

    Args:
        cache: the folder of the log-mels.
        place: this is the first number of the second number of folds.

    Raises:
        MelfoldError: no such fold, another process training it, or a loss that is not finite (the clips are named).
        KeyboardInterrupt: Ctrl-C; the state is saved first.
    """
    folder = run.fold(fold)
    if fold != FULL and not 0 <= int(fold) < run.recipe.folds.n_folds:
        raise MelfoldError("no such fold", str(fold), f"Folds are 0 to {run.recipe.folds.n_folds - 1}, or {FULL}")
    if folder.done:
        folder.checkpoint.unlink(missing_ok=True)  # a kill may have come between the result and this
        return folder
    with folder.lock():
        remove_leftovers(folder.path)
        data = FoldData(run, folder.fold, cache)
        config = run.recipe.train
        with (
            repeatable(seed_for(data, _INITIAL), device, benchmark=config.benchmark),
            explain_out_of_memory(device, less_memory(config)),
        ):
            _train(run, folder, data, device, progress, place)
    return folder


def less_memory(config: TrainConfig) -> str:
    """What to do if a training does not fit its device."""
    return f"Use --set train.micro_batch={(config.micro_batch or config.batch_size) // 2 or 1}"


def _train(run: Run, folder: FoldFolder, data: FoldData, device: Device, progress: Progress, place: tuple[int, int]) -> None:
    config, steps, inputs = run.recipe.train, data.steps, _inputs(run, folder, data)
    title = f"{run.name} fold {folder.fold}, {place[0]} of {place[1]}"
    made_from = inputs | {"precision": device.precision}
    # A checkpoint replaces the initial weights, so they need not be there.
    state = start_state(run, data, device, initial=not folder.checkpoint.exists())
    if folder.checkpoint.exists():
        state.load(folder.checkpoint, made_from)
        log.info("%s: continuing at step %d of %d", title, state.step, steps)
    log.info("%s: %s, %d steps of %d crops", title, device.describe(), steps, config.batch_size)
    watch = TrainLog(folder.log, state, data, progress, title, place[1] - place[0])
    saved = time.monotonic()
    with _stop_signal() as stop:
        for batch in read_ahead(data.batches(state.step), device):
            phase = data.phases[phase_at(data.phases, state.step)]
            state.set_phase(phase.config, phase.learning_rate(state.step))
            torch.manual_seed(seed_for(data, _DROPOUT, state.step))
            loss, norm = train_step(state, batch, data.targets[batch.rows], run.recipe, augment_rng(data, state.step))

            stopping, last = stop.is_set(), state.step == steps
            checked = watch.add(batch, loss, norm, look=stopping)
            if state.step in phase.looks() and not last and data.held_out.fnames:
                _validate(run, data, state, watch)
            if checked and (stopping or last or time.monotonic() - saved > 60 * config.checkpoint_minutes):
                state.save(folder.checkpoint, made_from)
                saved = time.monotonic()
            if stopping:
                break
    _finish(run, folder, data, state, watch, inputs)


def _inputs(run: Run, folder: FoldFolder, data: FoldData) -> dict[str, str]:
    """What a fold's weights are made from."""
    pseudo = sha256_file(folder.pseudo_labels) if run.recipe.noisy.teachers and folder.pseudo_labels.exists() else ""
    first = run.first_fold(folder.fold)
    weights = {"first_weights": first.weights_sha256()} if first else {}
    return {"fold": folder.fold, **run.made_from, "pseudo_labels": pseudo, **weights, "training_audio": data.training_audio}


def start_state(run: Run, data: FoldData, device: Device, *, initial: bool = True) -> TrainState:
    """A model with its statistics, and all that trains it.

    Args:
        initial: start from the recipe's weights, else from random ones that are to be replaced.
    """
    recipe, n_labels, n_mels = run.recipe, len(run.info.labels), run.recipe.logmel.n_mels
    model = build_model(recipe.model, n_labels, n_mels, recipe.crop_frames, initial=initial, home=run.home)
    if initial and (first := run.first_fold(data.fold)):
        first.verify()
        load_weights(first.weights, model, f"{run.name}'s")
    own, noisy = data.statistics()
    if own:
        model.normalise.set(*own)
    if recipe.uses_noisy and recipe.noisy.own_head:
        model.add_noisy_head()
    if noisy:
        model.normalise.set_noisy(*noisy)
    return TrainState(model, recipe.train, device)


def train_step(
    state: TrainState, batch: Batch, targets: np.ndarray, recipe: Recipe, rng: np.random.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of training: augment, forward, loss, backward, update. It does not wait for the device.

    Args:
        targets: float32 `(clips, labels)` of the batch.
        rng: draws the augmentation; None: there is none.

    Returns:
        The loss and the gradient's norm before clipping, on the device.
    """
    device, config, noisy_config = state.device, recipe.train, recipe.noisy
    apart = recipe.uses_noisy and (noisy_config.own_head or noisy_config.own_norm)
    log_mels, wanted, noisy = device.log_mels(batch.log_mels), device.tensor(targets), device.tensor(batch.noisy)
    if rng:
        groups = batch.noisy if apart else None  # clips that are treated differently are not mixed with each other
        draw = draw_augment(recipe.augment, len(log_mels), log_mels.shape[2], log_mels.shape[3], rng, groups)
        log_mels, wanted = apply_augment(draw, log_mels, wanted, state.model.normalise.fill(noisy), device)
    size, losses = config.micro_batch or len(log_mels), []
    for part, aims, own in zip(log_mels.split(size), wanted.split(size), noisy.split(size), strict=True):
        with device.autocast():
            logits = state.forward(part, own if apart else None)
        logits = logits.float()
        if noisy_config.bootstrap:
            aims = bootstrapped(aims, logits, own, noisy_config.bootstrap)
        loss = state.loss_of(logits, aims) * (len(part) / len(log_mels))  # every loss is a mean over clips
        state.scaler.scale(loss).backward()
        losses.append(loss.detach())
    return sum(losses[1:], losses[0]), state.update()


def augment_rng(data: FoldData, step: int) -> np.random.Generator | None:
    """The generator that draws a step's augmentation; None in a phase that sees the clips as they are."""
    augmented = data.phases[phase_at(data.phases, step)].config.augment
    return np.random.default_rng([*data.seeds, _AUGMENT, step]) if augmented else None


def _validate(run: Run, data: FoldData, state: TrainState, watch: TrainLog) -> Probs:
    """The probabilities of the held-out clips by the averaged model; their score is logged."""
    probs = predict_probs(state.averaged, data.held_out, run.info.labels, data.recipe, state.device)
    watch.lwlrap = lwlrap(data.held_out_targets, probs)
    watch.write(lwlrap=watch.lwlrap)
    return probs


def _finish(run: Run, folder: FoldFolder, data: FoldData, state: TrainState, watch: TrainLog, inputs: Mapping[str, str]) -> None:
    if not all(torch.isfinite(value).all() for value in state.averaged.state_dict().values()):
        fix = "Lower train.lr, delete the fold's folder, train again"
        raise MelfoldError("the weights are not finite at the end", str(folder.path), fix)
    save_weights(folder.weights, state.averaged.kept())
    facts: dict[str, Any] = {"clips": data.curated, "noisy_clips": data.noisy, "steps": data.steps}
    score, held_out = "", data.held_out.fnames
    if held_out:
        began = time.monotonic()
        probs = _validate(run, data, state, watch)
        facts |= {"held_out_clips": len(held_out), "lwlrap": watch.lwlrap}
        score = f"lwlrap {watch.lwlrap:.5f} on {len(held_out)} clips, "
        own = own_prediction(run)
        clips = own.inputs(folder.fold, digest(held_out), sha256_file(folder.weights))
        write_current(own.fold_oof(folder.fold), probs, clips, **speed_since(began, data.held_out, run.recipe))
    facts |= {"seconds": round(state.seconds, 1), "device": state.device.describe(), "versions": versions()}
    facts |= {"cudnn_benchmark": state.device.torch.type == "cuda" and run.recipe.train.benchmark}
    facts |= {"peak_memory_mib": state.device.peak_memory() >> 20}
    folder.artefact.commit(inputs, **facts)
    folder.checkpoint.unlink(missing_ok=True)
    log.info("%s: %s%s", watch.title, score, duration(state.seconds))


def seed_for(data: FoldData, purpose: int, step: int = 0) -> int:
    """A seed for torch that depends on the recipe's seed, the fold, a purpose and a step, and on nothing else."""
    return int(np.random.SeedSequence([*data.seeds, purpose, step]).generate_state(1)[0])


def load_fold(run: Run, fold: str, device: Device) -> Tagger:
    """A trained fold's model, as `load_model`.

    Raises:
        MelfoldError: a fold that is not done, or weights that are damaged or do not fit.
    """
    folder = run.fold(fold)
    if not folder.done:
        raise MelfoldError(f"fold {fold} of {run.name} is not trained", str(folder.path), f"Run `melfold train --folds {fold}`")
    folder.verify()
    return load_model(run.recipe, len(run.info.labels), folder.weights, device)


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a step is never cut in two. A second one ends at once.

    Raises:
        KeyboardInterrupt: at the end, if it was set.
    """
    stop = threading.Event()

    def handler(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
    if stop.is_set():
        raise KeyboardInterrupt

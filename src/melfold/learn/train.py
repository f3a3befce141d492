"""Training one fold: one visible loop that can be killed at any moment and continues from its last checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from melfold.compute import Progress, silent
from melfold.errors import MelfoldError
from melfold.files import digest, remove_leftovers, sha256_file
from melfold.learn.augment import apply_augment, draw_augment
from melfold.learn.batches import Batch, prefetch
from melfold.learn.devices import Device, repeatable
from melfold.learn.fold_data import FoldData
from melfold.learn.losses import bootstrapped, loss_named
from melfold.learn.model import Tagger, build_model
from melfold.learn.predict import predict_probs
from melfold.learn.predictions import own_prediction, write_current
from melfold.learn.provenance import versions
from melfold.learn.runs import FULL, FoldFolder, Run
from melfold.learn.state import TrainState
from melfold.learn.train_log import TrainLog, duration
from melfold.learn.weights import load_weights, save_weights
from melfold.metrics import lwlrap
from melfold.probs import Probs

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
        data = FoldData.read(run, folder.fold, cache)
        with repeatable(seed_for(data, _INITIAL)):
            _train(run, folder, data, device, progress, place)
    return folder


def _train(run: Run, folder: FoldFolder, data: FoldData, device: Device, progress: Progress, place: tuple[int, int]) -> None:
    config, steps = run.recipe.train, data.steps
    title = f"{run.name} fold {folder.fold}, {place[0]} of {place[1]}"
    made_from = {**_inputs(run, folder), "precision": device.precision}
    state = _start(run, folder, data, device)
    if folder.checkpoint.exists():
        state.load(folder.checkpoint, made_from)
        log.info("%s: continuing at step %d of %d", title, state.step, steps)
    log.info("%s: %s, %d steps of %d crops", title, device.describe(), steps, config.batch_size)
    watch = TrainLog(folder.log, state, data, progress, title, place[1] - place[0])
    loss_of = loss_named(config.loss, config.loss_kwargs)
    validate_steps = data.steps_in(config.validate_every) if config.validate_every else steps + 1
    saved = time.monotonic()
    with _stop_signal() as stop:
        for batch in prefetch(data.batches(state.step)):
            torch.manual_seed(seed_for(data, _DROPOUT, state.step))
            state.schedule.step_update(state.step)
            log_mels, targets, noisy = _augmented(batch, data, state)
            with device.autocast():
                logits = state.model(log_mels, noisy if _apart(data) else None)
            logits = logits.float()
            if run.recipe.noisy.bootstrap:
                targets = bootstrapped(targets, logits, noisy, run.recipe.noisy.bootstrap)
            loss = loss_of(logits, targets)
            norm = state.update(loss)
            watch.add(batch, loss, norm)

            last, looked = state.step == steps, False
            if watch.is_due() or stop.is_set():
                watch.look()
                looked = True
            if state.step % validate_steps == 0 and not last and len(data.held_out.fnames):
                watch.lwlrap, _ = _validate(run, data, state)
                watch.write(lwlrap=watch.lwlrap)
            if stop.is_set() or last or (looked and time.monotonic() - saved > 60 * config.checkpoint_minutes):
                state.save(folder.checkpoint, made_from)
                saved = time.monotonic()
            if stop.is_set():
                raise KeyboardInterrupt
    _finish(run, folder, data, state, watch)


def _inputs(run: Run, folder: FoldFolder) -> dict[str, str]:
    """What a fold's weights are made from."""
    pseudo = sha256_file(folder.pseudo_labels) if run.recipe.noisy.teacher and folder.pseudo_labels.exists() else ""
    return {"fold": folder.fold, **run.made_from, "pseudo_labels": pseudo}


def _start(run: Run, folder: FoldFolder, data: FoldData, device: Device) -> TrainState:
    """A model with its statistics, and all that trains it."""
    recipe, config = run.recipe, run.recipe.train
    first = not folder.checkpoint.exists()  # a checkpoint replaces the initial weights, so they need not be there
    model = build_model(
        recipe.model, len(run.info.labels), recipe.logmel.n_mels, recipe.crop_frames, initial=first, home=run.home
    )
    own, noisy = data.statistics()
    if own:
        model.normalise.set(*own)
    if recipe.noisy.use and recipe.noisy.own_head:
        model.add_noisy_head()
    if noisy:
        model.normalise.set_noisy(*noisy)
    warmup = min(data.steps_in(config.warmup_epochs), data.steps - 1)
    return TrainState(model, config, device, steps=data.steps, warmup=warmup)


def _apart(data: FoldData) -> bool:
    """Whether noisy clips are treated differently: then they are also mixed with each other only."""
    noisy = data.recipe.noisy
    return noisy.use and (noisy.own_head or noisy.own_norm)


def _augmented(batch: Batch, data: FoldData, state: TrainState) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-mels, targets and which clips are noisy, on the device; augmented, except in the last epochs."""
    device, augment = state.device, data.recipe.augment
    log_mels = device.log_mels(batch.log_mels)
    targets, noisy = device.tensor(data.targets[batch.rows]), device.tensor(batch.noisy)
    off_steps = data.steps_in(augment.off_epochs, -1) if augment.off_epochs else 0
    if state.step < data.steps - off_steps:
        rng = np.random.default_rng([*data.seeds, _AUGMENT, state.step])
        groups = batch.noisy if _apart(data) else None
        draw = draw_augment(augment, len(log_mels), *log_mels.shape[2:], rng, groups)
        log_mels, targets = apply_augment(draw, log_mels, targets, state.model.normalise.fill(noisy), device)
    return log_mels, targets, noisy


def _validate(run: Run, data: FoldData, state: TrainState) -> tuple[float, Probs]:
    """The score and the probabilities of the held-out clips by the averaged model."""
    probs = predict_probs(state.averaged, data.held_out, run.info.labels, data.recipe, state.device)
    return lwlrap(data.held_out_targets, probs), probs


def _finish(run: Run, folder: FoldFolder, data: FoldData, state: TrainState, watch: TrainLog) -> None:
    if not all(torch.isfinite(value).all() for value in state.averaged.state_dict().values()):
        raise MelfoldError(
            "the weights are not finite at the end", str(folder.path), "Lower train.lr, delete the fold's folder, train again"
        )
    save_weights(folder.weights, state.averaged.kept())
    facts: dict[str, object] = {"clips": data.curated, "noisy_clips": data.noisy, "steps": data.steps}
    score = ""
    if len(data.held_out.fnames):
        watch.lwlrap, probs = _validate(run, data, state)
        watch.write(lwlrap=watch.lwlrap)
        facts |= {"held_out_clips": len(data.held_out.fnames), "lwlrap": watch.lwlrap}
        score = f"lwlrap {watch.lwlrap:.5f} on {len(data.held_out.fnames)} clips, "
        own = own_prediction(run)
        inputs = own.inputs(folder.fold, digest(data.held_out.fnames), sha256_file(folder.weights))
        write_current(own.fold_oof(folder.fold), probs, inputs)
    facts |= {"seconds": round(state.seconds, 1), "device": state.device.describe(), "versions": versions()}
    folder.artefact.commit(_inputs(run, folder), **facts)
    folder.checkpoint.unlink(missing_ok=True)
    log.info("%s: %s%s", watch.title, score, duration(state.seconds))


def seed_for(data: FoldData, purpose: int, step: int = 0) -> int:
    """A seed for torch that depends on the recipe's seed, the fold, a purpose and a step, and on nothing else."""
    return int(np.random.SeedSequence([*data.seeds, purpose, step]).generate_state(1)[0])


def load_fold(run: Run, fold: str, device: Device) -> Tagger:
    """A trained fold's model, built from what the run holds: no hub, no initial weights file.

    Raises:
        MelfoldError: a fold that is not done, or weights that are damaged or do not fit.
    """
    folder = run.fold(fold)
    if not folder.done:
        raise MelfoldError(f"fold {fold} of {run.name} is not trained", str(folder.path), f"Run `melfold train --folds {fold}`")
    folder.verify()
    recipe = run.recipe
    model = build_model(recipe.model, len(run.info.labels), recipe.logmel.n_mels, recipe.crop_frames, initial=False)
    load_weights(folder.weights, model)
    return model.to(device.torch).eval()


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a step is never cut in two; a second Ctrl-C ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)

"""Training one fold: one visible loop that can be killed at any moment and goes on where it was."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from melfold.compute import Progress, silent
from melfold.config import Recipe
from melfold.data.clips import ClipStore, Phase, prefetch, train_batches
from melfold.errors import MelfoldError
from melfold.files import atomic_path, digest, locked, remove_leftovers, sha256_file, write_json, write_text
from melfold.learn.augment import apply_augment, draw_augment
from melfold.learn.devices import Device, repeatable
from melfold.learn.losses import bootstrapped, loss_named
from melfold.learn.model import Tagger, build_model, load_weights, save_weights
from melfold.learn.predict import predict_probs
from melfold.learn.runs import FULL, FoldFolder, Run, versions
from melfold.metrics import lwlrap
from melfold.probs import Probs, write_probs

log = logging.getLogger(__name__)

LOG_STEPS = 20
"""Steps between looks at the loss: on a GPU each look waits for all the work before it."""

_INITIAL, _DROPOUT, _AUGMENT = 1, 2, 3  # purposes, which keep the streams of random numbers apart


def train_fold(
    run: Run,
    fold: int | str,
    cache: Path,
    device: Device,
    *,
    progress: Progress = silent,
) -> FoldFolder:
    """Train one fold (or `full`), or go on where an earlier call was stopped; nothing happens where it is done.

    Leaves the weights, the held-out clips' predictions, the log and, last, `result.json` in the fold's folder.

    Raises:
        MelfoldError: no such fold, another process at it, or a loss that is not finite (the clips are named).
        KeyboardInterrupt: Ctrl-C; the state is saved first.
    """
    folder = run.fold(fold)
    if fold != FULL and not 0 <= int(fold) < run.recipe.folds.n_folds:
        raise MelfoldError("no such fold", str(fold), f"Folds are 0 to {run.recipe.folds.n_folds - 1}, or {FULL}")
    if folder.done:
        folder.checkpoint.unlink(missing_ok=True)  # a kill may have come between the result and this
        return folder

    def busy() -> None:
        raise MelfoldError("another melfold trains this fold", str(folder.path), "Wait for it, or stop it")

    with locked(folder.path / ".lock", busy):
        remove_leftovers(folder.path)
        _Fold(run, folder, cache, device, progress).train()
    return folder


def steps_in(epochs: float, clips: int, batch_size: int) -> int:
    """The number of steps that show each clip `epochs` times."""
    return math.ceil(epochs * clips / batch_size)


def phases_of(recipe: Recipe, curated: int, noisy: int) -> list[Phase]:
    """Which rows are drawn when: curated clips, `curated_times` each, among the noisy ones; and curated ones alone at the end."""
    batch_size, config = recipe.train.batch_size, recipe.noisy
    alone = np.arange(curated)
    rows = np.concatenate([np.tile(alone, config.curated_times), np.arange(curated, curated + noisy)]) if config.use else alone
    phases = [Phase(steps_in(recipe.train.epochs, len(rows), batch_size), rows)]
    if config.use and config.curated_epochs:
        phases.append(Phase(phases[0].until + steps_in(config.curated_epochs, curated, batch_size), alone))
    return phases


def seed_for(recipe: Recipe, fold: str, purpose: int, step: int = 0) -> int:
    """A seed for torch that depends on the recipe's seed, the fold, a purpose and a step, and on nothing else."""
    return int(np.random.SeedSequence([*stream(recipe, fold), purpose, step]).generate_state(1)[0])


def stream(recipe: Recipe, fold: str) -> tuple[int, int]:
    """What every random stream of a fold begins with."""
    return recipe.seed, recipe.folds.n_folds if fold == FULL else int(fold)


class _Fold:
    """The state of one fold in training."""

    def __init__(self, run: Run, folder: FoldFolder, cache: Path, device: Device, progress: Progress) -> None:
        self.run, self.folder, self.device, self.progress = run, folder, device, progress
        self.recipe, self.config = run.recipe, run.recipe.train
        recipe = self.recipe
        train, held_out = run.trained_on(folder.fold), run.held_out(folder.fold)
        self.targets = run.taught(train).to_numpy()
        self.held_out_targets = run.targets(held_out)
        self.noisy: list[str] = []
        # Taken once, with the lesson that is read here: a checkpoint must not carry the mark of another.
        lesson = sha256_file(folder.lesson) if recipe.noisy.teacher and folder.lesson.exists() else ""
        self.key = digest([recipe.fingerprint(), run.info.clips_sha256, run.info.noisy_sha256, lesson, folder.fold])
        if recipe.noisy.use:
            noisy = run.noisy_targets(folder.fold)
            if noisy.empty:
                raise MelfoldError("no noisy clip is left to learn from", str(folder.path), "Mend noisy.top or data.exclude")
            self.noisy = list(noisy.index)
            self.targets = np.concatenate([self.targets, noisy.to_numpy()])
        front = recipe.logmel
        # Curated clips first: a row past them is a noisy one.
        self.store = ClipStore(cache, [*train, *self.noisy], front.n_mels, front.top_db)
        self.curated = self.store.head(len(train))
        self.held_out = ClipStore(cache, held_out, front.n_mels, front.top_db)
        self.labels = run.info.labels
        self.phases = phases_of(recipe, len(train), len(self.noisy))
        self.total = self.phases[-1].until
        self.step, self.seconds, self.rows = 0, 0.0, []
        self.lwlrap: float | None = None

    def per(self, epochs: float, phase: int = 0) -> int:
        """Steps in some epochs of a phase."""
        return steps_in(epochs, len(self.phases[phase].rows), self.config.batch_size)

    def train(self) -> None:
        recipe, config, device = self.recipe, self.config, self.device
        with repeatable(seed_for(recipe, self.folder.fold, _INITIAL)):
            self._build()
            self._resume()
            augment_until = self.total - self.per(recipe.augment.off_epochs, -1) if recipe.augment.off_epochs else self.total
            apart = recipe.noisy.use and (recipe.noisy.own_head or recipe.noisy.own_norm)
            mean = float(self.model.mean)
            noisy_mean = float(self.model.noisy_mean) if apart else mean
            loss_of = loss_named(config.loss)
            validate_steps = self.per(config.validate_every) if config.validate_every else self.total + 1
            saved = time.monotonic()
            started = saved - self.seconds
            losses: list[torch.Tensor] = []
            shown: list[np.ndarray] = []
            batches = train_batches(
                self.store,
                self.phases,
                length=recipe.crop_frames,
                batch_size=config.batch_size,
                pad=config.pad,
                first_step=self.step,
                seeds=stream(recipe, self.folder.fold),
            )
            with _stop_signal() as stop:
                for batch in prefetch(batches):
                    rng = np.random.default_rng([*stream(recipe, self.folder.fold), _AUGMENT, self.step])
                    torch.manual_seed(seed_for(recipe, self.folder.fold, _DROPOUT, self.step))
                    self.schedule.step_update(self.step)
                    log_mels = device.log_mels(batch.log_mels)
                    targets = device.tensor(self.targets[batch.rows])
                    is_noisy = batch.rows >= len(self.curated.fnames)
                    domains = is_noisy if apart else None
                    if self.step < augment_until:
                        draw = draw_augment(recipe.augment, len(log_mels), *log_mels.shape[2:], rng, domains)
                        fill = device.tensor(np.where(is_noisy, noisy_mean, mean).astype(np.float32)) if apart else mean
                        log_mels, targets = apply_augment(draw, log_mels, targets, fill, device)
                    with device.autocast():
                        logits = self.model(log_mels, device.tensor(domains) if apart else None)
                    logits = logits.float()
                    if recipe.noisy.bootstrap:
                        targets = bootstrapped(targets, logits, device.tensor(is_noisy), recipe.noisy.bootstrap)
                    loss = loss_of(logits, targets)
                    self.optimizer.zero_grad(set_to_none=True)
                    self.scaler.scale(loss).backward()
                    self.scaler.unscale_(self.optimizer)
                    norm = torch.nn.utils.clip_grad_norm_(self.trained, config.clip_grad or math.inf)
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                    if self.ema:
                        self.ema.update(self.model, step=self.step)
                    self.step += 1
                    losses.append(loss.detach())
                    shown.append(batch.rows)

                    last = self.step == self.total
                    if self.step % LOG_STEPS == 0 or last or stop.is_set() or device.torch.type == "cpu":
                        values = torch.stack(losses).float().cpu().numpy()
                        self._check_finite(values, shown)
                        self.seconds = time.monotonic() - started
                        if self.step % LOG_STEPS == 0 or last:
                            self._log(loss=float(values[-1]), grad_norm=float(norm), lr=self.optimizer.param_groups[-1]["lr"])
                        losses, shown = [], []
                        self._tell(float(values[-1]))
                    if self.step % validate_steps == 0 and not last and len(self.held_out.fnames):
                        self._validate()
                    if stop.is_set() or last or (not losses and time.monotonic() - saved > 60 * config.checkpoint_minutes):
                        self._save()
                        saved = time.monotonic()
                    if stop.is_set():
                        raise KeyboardInterrupt
            self._finish()

    def _build(self) -> None:
        recipe, config = self.recipe, self.config
        model = build_model(
            recipe.model, len(self.labels), recipe.logmel.n_mels, recipe.crop_frames, initial=not self.folder.checkpoint.exists()
        )
        mean, std = self.curated.statistics()
        model.mean.fill_(mean)
        model.std.fill_(std)
        if recipe.noisy.use:
            theirs = self.store.tail(len(self.noisy)).statistics() if recipe.noisy.own_norm else (mean, std)
            model.add_noisy(own_head=recipe.noisy.own_head, mean=theirs[0], std=theirs[1])
        self.model = model.to(self.device.torch).train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        try:
            self.optimizer = create_optimizer_v2(
                model,
                opt=config.optimizer,
                lr=config.lr,
                weight_decay=config.weight_decay,
                layer_decay=config.layer_decay if config.layer_decay < 1 else None,
            )
        except (TypeError, ValueError) as error:
            raise MelfoldError(f"timm refuses optimizer {config.optimizer}", str(error), "Mend train.optimizer") from error
        # Where warm-up fills a short run, timm remarks that nothing is left to anneal.
        logging.getLogger("timm.scheduler.cosine_lr").setLevel(logging.ERROR)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=max(1, self.total - self._warmup()),
            lr_min=config.lr_min,
            warmup_t=self._warmup(),
            warmup_lr_init=config.lr_min,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.scaler = self.device.scaler()
        self.ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None

    def _warmup(self) -> int:
        return min(self.per(self.config.warmup_epochs), self.total - 1)

    @property
    def averaged(self) -> Tagger:
        """The model that is scored and kept."""
        return self.ema.module if self.ema else self.model

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return parts | ({"ema": self.ema.module} if self.ema else {})

    def _save(self) -> None:
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"key": self.key, "step": self.step, "seconds": self.seconds, "rows": json.dumps(self.rows)}
        with atomic_path(self.folder.checkpoint) as temporary:
            torch.save(state, temporary)

    def _resume(self) -> None:
        if not self.folder.checkpoint.exists():
            self._write_log()
            return
        try:
            state = torch.load(self.folder.checkpoint, map_location=self.device.torch, weights_only=True)
        except Exception as error:  # a broken file fails in many ways
            raise MelfoldError("broken checkpoint", str(self.folder.checkpoint), "Delete it to train anew") from error
        if state["key"] != self.key:
            raise MelfoldError(
                "a checkpoint is from other data, folds, recipe or lesson", str(self.folder.checkpoint), "Delete it to train anew"
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.seconds, self.rows = state["step"], state["seconds"], json.loads(state["rows"])
        self._write_log()
        log.info("%s fold %s: going on at step %d of %d", self.run.name, self.folder.fold, self.step, self.total)

    def _check_finite(self, values: np.ndarray, shown: list[np.ndarray]) -> None:
        if not np.isfinite(values).all():
            first = int(np.argmin(np.isfinite(values)))
            names = " ".join(self.store.fnames[row] for row in shown[first])
            raise MelfoldError(
                f"the loss is not finite at step {self.step - len(values) + first}",
                f"{values[first]} in the batch of {names}",
                "Lower train.lr, or look at these clips with `melfold show`",
            )

    def _log(self, **values: float) -> None:
        epoch = self.step * self.config.batch_size / len(self.phases[0].rows)
        row = {"step": self.step, "epoch": round(epoch, 3), "seconds": round(self.seconds, 1), **values}
        self.rows.append({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()})
        with self.folder.log.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def _write_log(self) -> None:
        """Rows that an interrupted process wrote after its last checkpoint are written again, so they go."""
        write_text(self.folder.log, "".join(json.dumps(row) + "\n" for row in self.rows))

    def _tell(self, loss: float) -> None:
        score = f", lwlrap {self.lwlrap:.3f}" if self.lwlrap is not None else ""
        self.progress(self.step, self.total, f"{self.run.name} fold {self.folder.fold}: loss {loss:.4f}{score}")

    def _validate(self) -> Probs:
        probs = predict_probs(self.averaged, self.held_out, self.labels, self.recipe, self.device)
        self.lwlrap = lwlrap(self.held_out_targets, probs)
        self._log(lwlrap=self.lwlrap)
        return probs

    def _finish(self) -> None:
        folder = self.folder
        if not all(torch.isfinite(value).all() for value in self.averaged.state_dict().values()):
            raise MelfoldError(
                "the weights are not finite at the end", str(folder.path), "Lower train.lr, delete the fold's folder, train"
            )
        save_weights(folder.weights, self.averaged)
        result: dict[str, Any] = {"fold": folder.fold, "clips": len(self.curated.fnames), "steps": self.total}
        if self.noisy:
            result["noisy_clips"] = len(self.noisy)
            if folder.lesson.exists():
                result["lesson_sha256"] = sha256_file(folder.lesson)
        if len(self.held_out.fnames):
            write_probs(folder.oof, self._validate())
            result |= {"held_out_clips": len(self.held_out.fnames), "lwlrap": self.lwlrap}
        result |= {
            "seconds": round(self.seconds, 1),
            "weights_sha256": sha256_file(folder.weights),
            "device": str(self.device.torch),
            "amp": str(self.device.amp).removeprefix("torch."),
            "versions": versions(),
        }
        write_json(folder.result, result)
        folder.checkpoint.unlink(missing_ok=True)


def load_fold(run: Run, fold: str, device: Device) -> Tagger:
    """A trained fold's model, built from what the run holds: no hub, no initial weights file.

    Raises:
        MelfoldError: a fold that is not done, or weights that do not fit.
    """
    folder = run.fold(fold)
    if not folder.done:
        raise MelfoldError(f"fold {fold} of {run.name} is not trained", str(folder.path), f"Run `melfold train --folds {fold}`")
    recipe = run.recipe
    model = build_model(recipe.model, len(run.info.labels), recipe.logmel.n_mels, recipe.window_frames, initial=False)
    load_weights(folder.weights, model)
    return model.to(device.torch).eval()


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a polite kill sets, so that a step is never cut in two; a second Ctrl-C ends at once."""
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

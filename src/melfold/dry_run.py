"""A dry run: every stage of a recipe with a few clips, and a forecast of the training from steps of its own size.

Does it run at all, does it fit the device, and how long will it take?
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from melfold import stages
from melfold.combine.oof import score
from melfold.combine.submission import build_submission
from melfold.compute import Compute
from melfold.config import Recipe
from melfold.data.competition import Competition, load_competition, with_bad_clips
from melfold.files import Home
from melfold.learn.batches import read_ahead
from melfold.learn.devices import Device, explain_out_of_memory, pick_device, repeatable, shared_threads
from melfold.learn.fetch import hub_file, share_weights
from melfold.learn.fold_data import FoldData
from melfold.learn.phases import phases_of
from melfold.learn.predict import predict_probs
from melfold.learn.predictions import own_prediction
from melfold.learn.runs import Run, open_run
from melfold.learn.shorten import few_clips, shorten
from melfold.learn.train import augment_rng, less_memory, start_state, train_step
from melfold.learn.train_log import duration

_MEASURED_SECONDS = 60.0
_WARM_UP = {"cpu": 1, "cuda": 10}
"""Steps before the clock starts: memory, kernels and cuDNN's choices are made in them."""
_BLOCK = {"cpu": 1, "cuda": 20}
"""Steps between looks at the clock: on a GPU each look waits for all the work before it."""
_MOST_STEPS = 200


@dataclass(frozen=True)
class Forecast:
    """How long training will take, from steps of the recipe's own size on the device.

    Args:
        device: the first device and its precision; others are taken to be like it.
        devices, folds: how many devices train how many folds.
        steps, batch_size: of the training of a fold.
        seconds_per_step: measured after warm-up.
        start_seconds: what the first steps took on top: compiling, choosing kernels.
        predict_seconds: of all predictions in a fold's training: held-out clips and, with a teacher, noisy ones.
        peak_memory: bytes: tensors on a GPU, the whole process on the CPU.
    """

    device: str
    devices: int
    folds: int
    steps: int
    batch_size: int
    seconds_per_step: float
    start_seconds: float
    predict_seconds: float
    peak_memory: int

    @property
    def crops_per_second(self) -> float:
        return self.batch_size / self.seconds_per_step

    @property
    def fold_seconds(self) -> float:
        """Of one fold on one device, log-mels aside."""
        return self.steps * self.seconds_per_step + self.start_seconds + self.predict_seconds

    @property
    def seconds(self) -> float:
        """Of all folds on all devices."""
        return math.ceil(self.folds / self.devices) * self.fold_seconds

    def lines(self) -> list[str]:
        """For people."""
        places = f"{self.devices} devices" if self.devices > 1 else "1 device"
        return [
            f"{self.device}: {self.crops_per_second:.0f} crops/s, {self.peak_memory / 2**30:.1f} GiB",
            f"One fold: {self.steps:,} steps of {self.batch_size}, about {duration(self.fold_seconds)}",
            f"All {self.folds} folds on {places}: about {duration(self.seconds)}",
        ]


@dataclass(frozen=True)
class DryRun:
    """What a dry run left and found."""

    folder: Path
    submission: Path
    forecast: Forecast


def dry_run(root: Path, home: Home, recipe: Recipe, compute: Compute) -> DryRun:
    """Run every stage of a recipe with a few clips and steps, from the start, in `build/dry-run`; then forecast its training.

    Model, crops, augmentation, losses and phases are the recipe's own.
    """
    whole = load_competition(root, recipe.data.exclude)
    recipe = with_bad_clips(recipe, whole)
    few = few_clips(whole, recipe.folds.n_folds, recipe.data.exclude)
    place = Home(home.root / "build" / "dry-run")
    shutil.rmtree(place.root, ignore_errors=True)
    recipes = _with_teachers(home, "", recipe)
    names = {name: f"try{number}" for number, name in enumerate(recipes)}
    if any(hub_file(each.model) for each in recipes.values()):
        share_weights(home, place)
    for name, each in recipes.items():
        short = shorten(each, few, names, batch_size=min(4, each.train.batch_size), steps=3)
        run = stages.train(few, place, short, names[name], range(recipe.folds.n_folds), compute)
        prediction = own_prediction(run)
        score(prediction)
    stages.predict(prediction, few, place, compute)
    path = build_submission(place, [prediction], few, id=run.name, mean=recipe.predict.fold_mean)
    full = shorten(recipe, few, names, batch_size=recipe.train.batch_size, steps=10_000)
    cache = stages.cache(few, place, full, compute)
    return DryRun(run.folder, path, forecast(replace(run, recipe=full), cache, whole, recipe, compute.devices))


def forecast(run: Run, cache: Path, whole: Competition, recipe: Recipe, devices: Sequence[str]) -> Forecast:
    """Time some steps of a run's fold 0, for about a minute, and what it will take to train the recipe on a whole competition.

    Args:
        run: of the recipe, with the clips of `cache` and more than enough epochs.

    Raises:
        MelfoldError: the device has not enough memory.
    """
    device, config = pick_device(devices[0], recipe.train.amp), recipe.train
    data = FoldData(run, "0", cache)
    threads = torch.get_num_threads()
    torch.set_num_threads(int(shared_threads(devices).get("OMP_NUM_THREADS", threads)))
    try:
        with repeatable(0, device, benchmark=config.benchmark), explain_out_of_memory(device, less_memory(config)):
            per_step, start, per_clip, peak = _measure(run, data, device)
    finally:
        torch.set_num_threads(threads)
    curated = len(whole.curated) * (recipe.folds.n_folds - 1) // recipe.folds.n_folds
    noisy, teachers = len(whole.noisy), recipe.noisy.teachers
    if teachers:
        noisy = min(noisy, recipe.noisy.top or noisy, recipe.noisy.per_label * len(whole.labels) or noisy)
    phases = phases_of(recipe, curated, noisy)
    steps = phases[-1].until
    looks = 1 + sum(look < steps for phase in phases for look in phase.looks())
    by_teachers = len(whole.noisy) + (curated if recipe.noisy.missing else 0)
    predicted = looks * (len(whole.curated) - curated) + len(teachers) * by_teachers
    sizes = (len(devices), recipe.folds.n_folds, steps, config.batch_size)
    return Forecast(device.describe(), *sizes, per_step, start, predicted * per_clip, peak)


def _measure(run: Run, data: FoldData, device: Device) -> tuple[float, float, float, int]:
    """Seconds of a step, seconds that the first steps took on top, seconds to predict a clip, and the peak memory."""
    kind = device.torch.type
    warm_up, block = _WARM_UP[kind], _BLOCK[kind]
    device.reset_peak_memory()
    state = start_state(run, data, device, initial=False)
    begin = mark = time.perf_counter()
    done = 0
    for batch in read_ahead(data.batches(0), device):
        train_step(state, batch, data.targets[batch.rows], run.recipe, augment_rng(data, state.step))
        if state.step == warm_up:
            device.wait()
            mark = time.perf_counter()
        elif (done := state.step - warm_up) > 0 and done % block == 0:
            device.wait()
            if done >= _MOST_STEPS or time.perf_counter() - begin > _MEASURED_SECONDS:
                break
    per_step = (time.perf_counter() - mark) / max(1, done)
    start = max(0.0, mark - begin - warm_up * per_step)
    peak = device.peak_memory()
    clips = data.held_out if kind == "cpu" else data.train
    for _ in range(1 if kind == "cpu" else 2):  # a GPU's first prediction warms it up
        mark = time.perf_counter()
        predict_probs(state.averaged, clips, run.info.labels, run.recipe, device)
        per_clip = (time.perf_counter() - mark) / len(clips.fnames)
    return per_step, start, per_clip, peak


def _with_teachers(home: Home, name: str, recipe: Recipe) -> dict[str, Recipe]:
    """A recipe by its name, behind those of its teachers and of their teachers."""
    found: dict[str, Recipe] = {}
    for teacher in recipe.noisy.teachers:
        found |= _with_teachers(home, teacher, open_run(home, teacher).recipe)
    return found | {name: recipe}

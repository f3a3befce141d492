"""One fold's work as a job: small enough to send to another process or machine, and done wherever it arrives.

Run as a module, it reads a job from standard input and does it on a device: the worker of `launch`.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from melfold.compute import Progress, end_with_parent, silent
from melfold.data.clips import ClipStore
from melfold.errors import MelfoldError, system_error
from melfold.files import Home
from melfold.learn.devices import Device, pick_device
from melfold.learn.noisy import make_pseudo_labels
from melfold.learn.predict import predict_probs, speed_since
from melfold.learn.predictions import open_prediction, write_current
from melfold.learn.runs import open_run
from melfold.learn.train import load_fold, train_fold

log = logging.getLogger(__name__)

TELL_SECONDS = 30
STOPPED = 130
"""Exit code of a worker that saved its state and stopped."""

_ONE_AT_A_TIME = threading.Lock()
"""A cluster's worker may run jobs in several threads, but PyTorch's random generator belongs to the whole process."""


@dataclass(frozen=True)
class Job:
    """Train one fold, or predict some clips with it.

    Args:
        home, label, fold: which home, `RUN` or `RUN@NAME`, and which fold.
        cache: the folder of the log-mels.
        number, count: this is job `number` of `count`.
        teacher_caches: `train`: for each teacher the folder of log-mels with its front-end.
        output, fnames, clips: `predict`: the CSV to write, its clips, and the digest of their audio.
    """

    task: Literal["train", "predict"]
    home: str
    label: str
    fold: str
    cache: str
    number: int = 1
    count: int = 1
    teacher_caches: tuple[str, ...] = ()
    output: str = ""
    fnames: tuple[str, ...] = ()
    clips: str = ""

    def __str__(self) -> str:
        return f"{self.label} fold {self.fold}"

    @property
    def done(self) -> bool:
        """Whether a training job has nothing left to do."""
        return self.task == "train" and open_run(Home(Path(self.home)), self.label).fold(self.fold).done


def do(job: Job, device: Device, progress: Progress = silent) -> None:
    """Do a job here. What an earlier try left behind is used."""
    home = Home(Path(job.home))
    if job.task == "train":
        run = open_run(home, job.label)
        if job.teacher_caches:
            make_pseudo_labels(run, job.fold, [Path(cache) for cache in job.teacher_caches], device)
        train_fold(run, job.fold, Path(job.cache), device, progress=progress, place=(job.number, job.count))
        return
    prediction = open_prediction(home, job.label)
    recipe, labels = prediction.recipe, prediction.run.info.labels
    store = ClipStore(Path(job.cache), list(job.fnames), recipe.logmel.n_mels, recipe.logmel.top_db)
    model, began = load_fold(prediction.run, job.fold, device), time.monotonic()
    probs = predict_probs(model, store, labels, recipe, device)
    write_current(Path(job.output), probs, prediction.inputs(job.fold, job.clips), **speed_since(began, store, recipe))


def device_for(job: Job, name: str) -> Device:
    """The device of a job by name, with mixed precision if it trains and its recipe allows."""
    if job.task == "predict":
        return pick_device(name, "off")
    return pick_device(name, open_run(Home(Path(job.home)), job.label).recipe.train.amp)


def do_remote(values: dict[str, object], device: str) -> str:
    """Do a job on a worker of a cluster. Returns: its name."""
    job = _job(values)
    with _ONE_AT_A_TIME:
        do(job, device_for(job, device))
    return str(job)


def _job(values: dict[str, object]) -> Job:
    return Job(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})  # type: ignore[arg-type]


def _worker(device: str) -> int:
    end_with_parent()
    job = _job(json.load(sys.stdin))
    told = 0.0

    def progress(done: int, total: int, text: str) -> None:
        nonlocal told
        if done == total or time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            log.info("%s: %d/%d", text, done, total)

    try:
        do(job, device_for(job, device), progress)
    except KeyboardInterrupt:
        log.info("%s: stopped, its state is saved", job)
        return STOPPED
    except (MelfoldError, OSError) as error:
        for line in error.lines if isinstance(error, MelfoldError) else [system_error(error)]:
            log.error("%s", line)
        return 2
    return 0


def as_dict(job: Job) -> dict[str, object]:
    """A job as JSON holds it."""
    return asdict(job)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="melfold: %(message)s")
    sys.exit(_worker(sys.argv[1]))

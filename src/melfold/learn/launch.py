"""The one launcher of folds: on one device, on several, on the workers of a cluster, or until a deadline.

A fold's work is a `Job`, small enough to send to another process or machine, and done wherever it arrives. Run as a module, this
reads a job from standard input and does it on a device.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from joblib import Parallel, delayed

from melfold.compute import Compute, Progress, adding, end_with_parent, remote, silent
from melfold.data.clips import ClipStore
from melfold.errors import MelfoldError, system_error
from melfold.files import Home
from melfold.learn.devices import find_device, pick_device, shared_threads
from melfold.learn.predictions import Prediction, open_prediction, write_current
from melfold.learn.runs import Run, open_run

log = logging.getLogger(__name__)

TELL_SECONDS = 30
STOPPED = 130
"""Exit code of a process that saved its state and stopped."""

_ONE_AT_A_TIME = threading.Lock()
"""A cluster's worker may run jobs in several threads, but PyTorch's random generator belongs to the whole process."""


@dataclass(frozen=True)
class Job:
    """Train one fold, or predict clips with it.

    Args:
        home, label, fold: which home, `RUN` or `RUN@NAME`, and which fold.
        cache: the folder of the log-mels.
        number, count: this is job `number` of `count`.
        teacher_caches: `train`: for each teacher the folder of log-mels with its front-end.
        outputs: `predict`: CSVs to write, each with its clips and the digest of their audio.
    """

    task: Literal["train", "predict"]
    home: str
    label: str
    fold: str
    cache: str
    number: int = 1
    count: int = 1
    teacher_caches: Sequence[str] = ()
    outputs: Sequence[tuple[str, Sequence[str], str]] = ()

    def __str__(self) -> str:
        return f"{self.label} fold {self.fold}"


def launch(jobs: Sequence[Job], compute: Compute, *, seconds: float = math.inf) -> None:
    """Do the jobs. What is done stays done, and a repeated call continues with the rest.

    On one device they are done here, one after the other. On several, and if there is a deadline, each job is a process of its
    own, as many at a time as there are devices. On a cluster, the workers do them.

    Args:
        seconds: when this time is up, running processes are told to save and stop.

    Raises:
        MelfoldError: an unknown device, or naming the jobs that failed, after the others have ended.
    """
    if not jobs:
        return
    if remote():
        # A job whose worker is lost starts again on another one, and continues from the files that it left behind.
        work = Parallel(return_as="generator_unordered", batch_size=1)(delayed(do)(job, compute.devices[0]) for job in jobs)
        for number, name in enumerate(work, 1):
            compute.progress(number, len(jobs), f"{name}: {jobs[0].task} done")
    elif len(compute.devices) == 1 and seconds == math.inf:
        for job in jobs:
            do(job, compute.devices[0], compute.progress)
    else:
        for name in compute.devices:
            find_device(name)  # no more than that: this process must not take memory of a GPU that its children use
        _processes(jobs, compute.devices, seconds)


def train_folds(
    run: Run,
    which: Sequence[int | str],
    cache: Path,
    compute: Compute,
    *,
    teacher_caches: Sequence[Path] = (),
    seconds: float = math.inf,
) -> None:
    """Train the folds of a run that are not done.

    Args:
        cache: the folder of the log-mels.
        teacher_caches: for each teacher the folder of log-mels with its front-end.
        seconds: as in `launch`.
    """
    left = [str(fold) for fold in which if not run.fold(fold).done]
    home, caches = str(run.home.root), tuple(map(str, teacher_caches))
    jobs = [Job("train", home, run.name, fold, str(cache), i, len(left), caches) for i, fold in enumerate(left, 1)]
    launch(jobs, compute, seconds=seconds)


def predict_folds(
    prediction: Prediction, cache: Path, work: Sequence[tuple[str, Path, Sequence[str], str]], compute: Compute
) -> None:
    """Predict clips with folds of a run, each fold loaded once.

    Args:
        cache: the folder of the log-mels.
        work: fold, the CSV to write, its clips, and the digest of their audio.
    """
    outputs: dict[str, list[tuple[str, Sequence[str], str]]] = {}
    for fold, path, fnames, clips in work:
        outputs.setdefault(fold, []).append((str(path), fnames, clips))
    home, label = str(prediction.run.home.root), prediction.label
    parts = enumerate(outputs.items(), 1)
    launch([Job("predict", home, label, fold, str(cache), i, len(outputs), outputs=csvs) for i, (fold, csvs) in parts], compute)


def do(job: Job, device_name: str, progress: Progress = silent) -> str:
    """Do a job here. What an earlier try left behind is used. Returns: its name."""
    with _ONE_AT_A_TIME:
        (_train if job.task == "train" else _predict)(job, device_name, progress)
    return str(job)


def _train(job: Job, device_name: str, progress: Progress) -> None:
    # Imported here, since a process that only starts others needs no timm.
    from melfold.learn.noisy import make_pseudo_labels
    from melfold.learn.train import train_fold

    run = open_run(Home(Path(job.home)), job.label)
    device = pick_device(device_name, run.recipe.train.amp)
    if job.teacher_caches:
        make_pseudo_labels(run, job.fold, [Path(own) for own in job.teacher_caches], device, progress)
    train_fold(run, job.fold, Path(job.cache), device, progress=progress, place=(job.number, job.count))


def _predict(job: Job, device_name: str, progress: Progress) -> None:
    from melfold.learn.predict import predict_probs, speed_since
    from melfold.learn.train import load_fold

    prediction, device = open_prediction(Home(Path(job.home)), job.label), pick_device(device_name, "off")
    recipe, labels = prediction.recipe, prediction.run.info.labels
    total = len(recipe.views) * sum(len(fnames) for _, fnames, _ in job.outputs)
    tell = adding(progress, total, f"{job}, {job.number} of {job.count}: predicting")
    model = load_fold(prediction.run, job.fold, device)
    for path, fnames, digest in job.outputs:
        store = ClipStore(Path(job.cache), list(fnames), recipe.logmel.n_mels, recipe.logmel.top_db)
        began = time.monotonic()
        probs = predict_probs(model, store, labels, recipe, device, tell)
        write_current(Path(path), probs, prediction.inputs(job.fold, digest), **speed_since(began, store, recipe))


def _processes(jobs: Sequence[Job], devices: Sequence[str], seconds: float) -> None:
    limit, environment = time.monotonic() + seconds, os.environ | shared_threads(devices)
    waiting, free = list(jobs), list(devices)
    running: dict[subprocess.Popen[bytes], tuple[Job, str]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            if time.monotonic() > limit:
                waiting = []
                _stop(running)
            while waiting and free:
                job, device = waiting.pop(0), free.pop(0)
                running[_start(job, device, environment)] = job, device
            for process in [process for process in running if process.poll() is not None]:
                job, device = running.pop(process)
                free.append(device)
                if process.returncode not in (0, STOPPED, -signal.SIGTERM):
                    failed.append(f"{job} (exit code {process.returncode})")
            time.sleep(0.1)
    finally:
        _stop(running)
    if failed:
        raise MelfoldError(f"{len(failed)} of {len(jobs)} folds failed", ", ".join(failed), "Their messages are above")


def _start(job: Job, device: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    log.info("%s: %s on %s", job, job.task, device)
    process = subprocess.Popen([sys.executable, "-m", "melfold.learn.launch", device], stdin=subprocess.PIPE, env=environment)
    assert process.stdin
    with process.stdin:
        process.stdin.write(json.dumps(asdict(job)).encode())
    return process


def _stop(processes: Iterable[subprocess.Popen[bytes]], grace: float = 120) -> None:
    """Ask processes to save and stop; after `grace` seconds kill them: their last checkpoint stays."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        process.send_signal(signal.SIGTERM)
    limit = time.monotonic() + grace
    for process in alive:
        try:
            process.wait(max(0.1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _do_given(device: str) -> int:
    """Do the job on standard input. Returns: the exit code."""
    end_with_parent()
    job, told = Job(**json.load(sys.stdin)), 0.0

    def progress(done: int, total: int, text: str) -> None:
        nonlocal told
        if done == total or time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            log.info("%s: %d/%d", text, done, total)

    try:
        do(job, device, progress)
    except KeyboardInterrupt:
        log.info("%s: stopped, its state is saved", job)
        return STOPPED
    except (MelfoldError, OSError) as error:
        for line in error.lines if isinstance(error, MelfoldError) else [system_error(error)]:
            log.error("%s", line)
        return 2
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="melfold: %(message)s")
    sys.exit(_do_given(sys.argv[1]))

"""Several folds at a time, one a device, within a time limit, or one a worker of a cluster; what is not done goes on later."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from melfold.config import Recipe
from melfold.data.clips import ClipStore
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.learn.devices import pick_device, shared_threads
from melfold.learn.noisy import teach
from melfold.learn.predict import predict_probs
from melfold.learn.runs import Run, open_run
from melfold.learn.train import load_fold, train_fold
from melfold.probs import write_current

log = logging.getLogger(__name__)

TELL_SECONDS = 30

_ONE = threading.Lock()
"""A worker may run jobs in several threads, but PyTorch's generator of random numbers is the whole process's."""


def train_session(
    run: Run, folds: Sequence[str], cache: Path, devices: Sequence[str], *, amp: str = "auto", seconds: float = float("inf")
) -> list[str]:
    """Train folds, each in a process of its own, as many at a time as there are devices.

    Args:
        seconds: when this time is up, the processes are told to save and end; a later session goes on.

    Returns:
        The folds that are done.

    Raises:
        MelfoldError: naming the folds whose process failed, after the others have ended.
    """
    begun = time.monotonic()
    waiting = [fold for fold in folds if not run.fold(fold).done]
    free = list(devices)
    environment = os.environ | shared_threads(devices)
    busy: dict[str, tuple[str, subprocess.Popen[bytes]]] = {}
    failed: list[str] = []
    try:
        while waiting or busy:
            late = time.monotonic() - begun > seconds
            while waiting and free and not late:
                device, fold = free.pop(0), waiting.pop(0)
                busy[fold] = device, _start(run, fold, cache, device, amp, environment)
            if late:
                waiting = []
                _stop(process for _, process in busy.values())
            for fold, (device, process) in list(busy.items()):
                if process.poll() is not None:
                    del busy[fold]
                    free.append(device)
                    if process.returncode not in (0, 130, -signal.SIGTERM):
                        failed.append(f"{fold} (exit code {process.returncode})")
            time.sleep(0.2)
    finally:
        _stop(process for _, process in busy.values())
    if failed:
        raise MelfoldError(f"run {run.name}: folds failed", ", ".join(failed), "Their messages stand above")
    return [fold for fold in folds if run.fold(fold).done]


def _start(run: Run, fold: str, cache: Path, device: str, amp: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    log.info("%s fold %s on %s", run.name, fold, device)
    command = [sys.executable, "-m", "melfold.learn.session", str(run.folder), fold, str(cache), device, amp]
    return subprocess.Popen(command, env=environment)


def _stop(processes: Iterable[subprocess.Popen[bytes]], grace: float = 120) -> None:
    """Ask to save and end; after `grace` seconds insist: the last checkpoint stands."""
    alive = [p for p in processes if p.poll() is None]
    for process in alive:
        process.send_signal(signal.SIGTERM)
    limit = time.monotonic() + grace
    for process in alive:
        try:
            process.wait(max(0.1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _worker(folder: str, fold: str, cache: str, device: str, amp: str) -> int:
    told = [0.0]

    def progress(done: int, total: int, text: str) -> None:
        if done == total or time.monotonic() - told[0] > TELL_SECONDS:
            told[0] = time.monotonic()
            log.info("%s: %d/%d", text, done, total)

    run = open_run(Home.find(), folder)
    try:
        train_fold(run, fold, Path(cache), pick_device(device, amp), progress=progress)
    except KeyboardInterrupt:
        log.info("%s fold %s: saved", run.name, fold)
        return 130
    except MelfoldError as error:
        log.error("%s", error)
        return 2
    return 0


def train_job(home: Path, name: str, fold: str, cache: Path, heard: Path | None, device: str) -> str:
    """Train a fold, wherever this is called, from its last checkpoint.

    Args:
        home: the home folder, the same for all.
        heard: the noisy clips' log-mels as the teacher hears them, where there is one.

    Returns:
        The fold.
    """
    place = Home(home)
    run = open_run(place, name)
    target = pick_device(device, run.recipe.train.amp)
    with _ONE:
        if heard:
            teach(run, open_run(place, run.recipe.noisy.teacher), fold, heard, target)
        train_fold(run, fold, cache, target)
    return fold


def predict_job(home: Path, name: str, fold: str, cache: Path, fnames: list[str], key: object, device: str) -> str:
    """Write a fold's test probabilities, wherever this is called. Returns: the fold."""
    run = open_run(Home(home), name)
    recipe: Recipe = run.recipe
    target = pick_device(device, "off")
    with _ONE:
        store = ClipStore(cache, fnames, recipe.logmel.n_mels, recipe.logmel.top_db)
        probs = predict_probs(load_fold(run, fold, target), store, run.info.labels, recipe, target)
        write_current(run.fold(fold).test, probs, key)
    return fold


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="melfold: %(message)s")
    sys.exit(_worker(*sys.argv[1:]))

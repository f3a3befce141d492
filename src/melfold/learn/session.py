"""Several folds at a time, one a device, within a time limit; what is not done by then goes on in the next session."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.learn.devices import pick_device
from melfold.learn.runs import Run, open_run
from melfold.learn.train import train_fold

log = logging.getLogger(__name__)

TELL_SECONDS = 30


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
    busy: dict[str, tuple[str, subprocess.Popen[bytes]]] = {}
    failed: list[str] = []
    try:
        while waiting or busy:
            late = time.monotonic() - begun > seconds
            while waiting and free and not late:
                device, fold = free.pop(0), waiting.pop(0)
                busy[fold] = device, _start(run, fold, cache, device, amp)
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


def _start(run: Run, fold: str, cache: Path, device: str, amp: str) -> subprocess.Popen[bytes]:
    log.info("%s fold %s on %s", run.name, fold, device)
    command = [sys.executable, "-m", "melfold.learn.session", str(run.folder), fold, str(cache), device, amp]
    return subprocess.Popen(command)


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


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="melfold: %(message)s")
    sys.exit(_worker(*sys.argv[1:]))

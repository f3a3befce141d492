"""The one launcher of folds: on one device, on several, on the workers of a cluster, or until a deadline."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from melfold.compute import Compute, remote, spread
from melfold.errors import MelfoldError
from melfold.learn.devices import find_device, shared_threads
from melfold.learn.jobs import STOPPED, Job, as_dict, device_for, do, do_remote
from melfold.learn.runs import Run

log = logging.getLogger(__name__)


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
        for number, name in enumerate(spread(do_remote, [(as_dict(job), compute.device) for job in jobs])):
            compute.progress(number + 1, len(jobs), f"{name}: {jobs[0].task} done")
    elif len(compute.devices) == 1 and seconds == math.inf:
        device = device_for(jobs[0], compute.device)
        for number, job in enumerate(jobs):
            do(job, device, compute.progress)
            if job.task == "predict":
                compute.progress(number + 1, len(jobs), f"{job.label}: predicting")
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
    more: dict[str, Any] = {"count": len(left), "teacher_caches": tuple(map(str, teacher_caches))}
    home = str(run.home.root)
    jobs = [Job("train", home, run.name, fold, str(cache), number + 1, **more) for number, fold in enumerate(left)]
    launch(jobs, compute, seconds=seconds)


def _processes(jobs: Sequence[Job], devices: Sequence[str], seconds: float) -> None:
    started = time.monotonic()
    waiting, free = [job for job in jobs if not job.done], list(devices)
    environment = os.environ | shared_threads(devices)
    running: list[tuple[Job, str, subprocess.Popen[bytes]]] = []
    failed: list[str] = []
    try:
        while waiting or running:
            late = time.monotonic() - started > seconds
            while waiting and free and not late:
                job, device = waiting.pop(0), free.pop(0)
                running.append((job, device, _start(job, device, environment)))
            if late:
                waiting = []
                _stop(process for _, _, process in running)
            for entry in list(running):
                job, device, process = entry
                if process.poll() is not None:
                    running.remove(entry)
                    free.append(device)
                    if process.returncode not in (0, STOPPED, -signal.SIGTERM):
                        failed.append(f"{job} (exit code {process.returncode})")
            time.sleep(0.1)
    finally:
        _stop(process for _, _, process in running)
    if failed:
        raise MelfoldError(f"{len(failed)} of {len(jobs)} folds failed", ", ".join(failed), "Their messages are above")


def _start(job: Job, device: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    log.info("%s: %s on %s", job, job.task, device)
    process = subprocess.Popen([sys.executable, "-m", "melfold.learn.jobs", device], stdin=subprocess.PIPE, env=environment)
    assert process.stdin
    with process.stdin:
        process.stdin.write(json.dumps(as_dict(job)).encode())
    return process


def _stop(processes: Iterable[subprocess.Popen[bytes]], grace: float = 120) -> None:
    """Ask processes to save and stop; after `grace` seconds kill them: their last checkpoint stays."""
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

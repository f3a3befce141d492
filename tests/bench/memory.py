"""Memory of caching and training, at ten times the clips."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil

from tests.bench.caching import MELFOLD
from tests.bench.harness import Result
from tests.bench.workspace import Workspace, synthesise, write_competition

INTERVAL = 0.02


def memory(work: Workspace) -> list[Result]:
    """Peak USS, children included, of `melfold cache` and of `melfold train` at 200 and at 2,000 clips.

    USS is what would be freed if the processes ended: pages shared with others do not count. Training takes the same
    number of steps at both sizes; its model is small so that growth would show.
    """
    small, large = work.pick(200, 24), work.pick(2000, 48)
    wavs = synthesise(work.folder / "memory_wavs", 20, 0.4, 1.0, sr=16_000)
    peaks: dict[str, list[float]] = {"cache": [], "train": []}
    for clips in (small, large):
        data = work.folder / f"memory{clips}"
        write_competition(data, wavs, clips, 10)
        for stage, command in _commands(data, clips, work.folder / f"memory_home{clips}", work.pick(40, 2)).items():
            peaks[stage].append(peak_uss(command, work.folder / "memory.log") / 2**20)
    against = f"{small:,} clips"
    notes = {"clips": large}
    return [
        Result(f"memory {stage}", against, there, here, "MiB", there / here, "x", 1.1, 1.0, False, notes)
        for stage, (here, there) in peaks.items()
    ]


def _commands(data: Path, clips: int, home: Path, steps: int) -> dict[str, list[str]]:
    common = [str(data), "--recipe", "demo", "--home", str(home), "--jobs", "2"]
    # Two of three folds are trained on, 16 clips a step.
    sets = [f"train.epochs={steps * 16 / (clips * 2 / 3)}", "train.validate_every=0", "augment.off_epochs=0"]
    train = [*common, "--folds", "0", "--run", "memory", "--device", "cpu"]
    return {
        "cache": [*MELFOLD, "cache", *common],
        "train": [*MELFOLD, "train", *train, *(part for value in sets for part in ("--set", value))],
    }


def peak_uss(command: list[str], log: Path) -> int:
    """The largest USS in bytes, of a command's process and its children together, looked at every 20 ms."""
    peak = 0
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _uss(root))
            time.sleep(INTERVAL)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()}")
    return peak


def _uss(root: psutil.Process) -> int:
    total = 0
    try:
        for process in [root, *root.children(recursive=True)]:
            total += _uss_of(process)
    except psutil.NoSuchProcess:
        pass  # the command just ended
    return total


def _uss_of(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().uss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # ended between listing and looking

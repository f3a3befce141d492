"""One launcher: folds here or in processes of their own, as many at a time as there are devices, within a time limit."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from learn_world import World

from melfold.compute import Compute
from melfold.errors import MelfoldError
from melfold.files import Home, sha256_file
from melfold.learn import launch
from melfold.learn.devices import shared_threads
from melfold.learn.runs import FoldFolder, Run, open_run
from melfold.learn.train import train_fold

ONE = Compute(devices=("cpu",))
TWO = Compute(devices=("cpu", "cpu"))
# Steps that take milliseconds, each followed by a checkpoint.
QUICK = ("train.amp=off", "train.batch_size=2", "train.checkpoint_minutes=0")
ENDLESS = (*QUICK, "train.epochs=1e6", "train.checkpoint_minutes=600")


def wait_until(so: Callable[[], bool], seconds: float = 300) -> None:
    """Look again and again; the limit is only there to end a broken test."""
    limit = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.01)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was saved at; its first 32 bytes are the SHA-256 of the rest."""
    return torch.load(io.BytesIO(checkpoint.read_bytes()[32:]), weights_only=True)["step"]


def children_of(pid: int) -> list[int]:
    """The processes that a process started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def runs_still(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def can_be_locked(folder: FoldFolder) -> bool:
    try:
        with folder.lock():
            return True
    except MelfoldError:
        return False


def test_two_devices_give_the_bytes_of_one_and_a_fold_that_fails_is_named(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    together, alone = world.start(tmp_path / "a", "train.amp=off"), world.start(tmp_path / "b", "train.amp=off")
    together.fold(0).path.mkdir()
    together.fold(0).checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(MelfoldError, match=r"1 of 2 folds failed: tiny fold 0 \(exit code 2\)\. Their messages are above"):
        launch.train_folds(together, [0, 1], world.cache, TWO)
    assert "damaged checkpoint" in capfd.readouterr().err
    assert together.done_folds() == ["1"]
    launch.train_folds(alone, [1], world.cache, ONE)
    for name in ("weights.safetensors", "oof.csv"):
        assert sha256_file(together.fold(1).path / name) == sha256_file(alone.fold(1).path / name)
    before = {p: p.stat().st_mtime_ns for p in together.folder.rglob("*")}
    launch.train_folds(together, [1], world.cache, TWO)
    assert {p: p.stat().st_mtime_ns for p in together.folder.rglob("*")} == before, "what is done is left"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_train_at_the_same_time_end_with_a_killed_parent_and_a_repeated_call_finishes(
    world: World, tmp_path: Path
) -> None:
    run = world.start(tmp_path, *QUICK, "train.epochs=6")
    folds = [run.fold(0), run.fold(1)]
    parent = multiprocessing.get_context("fork").Process(target=launch.train_folds, args=(run, [0, 1], world.cache, TWO))
    parent.start()
    try:
        # A checkpoint lives from a fold's first step until its end: two of them are two folds in training.
        wait_until(lambda: all(fold.checkpoint.exists() for fold in folds) or not parent.is_alive())
        assert [fold.done for fold in folds] == [False, False], "one after the other"
        workers = children_of(parent.pid)
        assert len(workers) == 2
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.join()
    killed = time.monotonic()
    wait_until(lambda: not any(map(runs_still, workers)), seconds=30)
    assert time.monotonic() - killed < 30
    assert all(can_be_locked(fold) for fold in folds)
    steps = [step_of(fold.checkpoint) for fold in folds]
    assert min(steps) > 0
    continued: list[int] = []
    run = world.start(tmp_path, *QUICK, "train.epochs=6", "train.checkpoint_minutes=3")
    launch.train_folds(run, [0, 1], world.cache, Compute(devices=("cpu",), progress=lambda done, *_: continued.append(done)))
    assert run.done_folds() == ["0", "1"]
    assert continued[0] == steps[0] + 1


def test_when_time_is_up_the_state_is_saved_and_nothing_more_is_started(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.start(tmp_path, *ENDLESS)

    def clock() -> float:
        """Time is up as soon as the first fold is in training."""
        log = run.fold(0).log
        return time.monotonic() + 1e6 * (log.exists() and log.stat().st_size > 0)

    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    launch.train_folds(run, [0, 1], world.cache, ONE, seconds=1e5)
    assert step_of(run.fold(0).checkpoint) > 0
    assert can_be_locked(run.fold(0))
    assert run.done_folds() == []
    assert not run.fold(1).path.exists()


def test_no_time_is_no_fold(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path)
    launch.train_folds(run, [0, 1], world.cache, ONE, seconds=-1)
    launch.train_folds(run, [0, 1], world.cache, TWO, seconds=-1)
    assert not run.fold(0).path.exists()
    assert not run.fold(1).path.exists()


def train_on_a_full_disk(run: Run, cache: Path, told: Path) -> None:
    """Train in a worker where no file can be larger than 20 kB; leave the error's lines."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        launch.train_folds(run, [0], cache, TWO)
    except MelfoldError as error:
        told.write_text(str(error))


def test_a_full_disk_under_a_worker_is_reported_in_one_line(world: World, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run, told = world.start(tmp_path, *QUICK), tmp_path / "told"
    process = multiprocessing.get_context("fork").Process(target=train_on_a_full_disk, args=(run, world.cache, told))
    process.start()
    process.join()
    stderr, folder = capfd.readouterr().err, run.fold(0)
    assert told.read_text() == "1 of 1 folds failed: tiny fold 0 (exit code 2). Their messages are above", stderr
    line = f"melfold: File too large: {folder.checkpoint}. Free some space, or use another folder"
    assert stderr.splitlines().count(line) == 1, stderr
    assert "Traceback" not in stderr
    assert not list(folder.path.glob(".*.tmp"))
    launch.train_folds(run, [0], world.cache, ONE)
    assert run.done_folds() == ["0"]


def test_on_one_device_a_fold_that_fails_says_why_itself(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path)
    run.fold(0).path.mkdir()
    run.fold(0).checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(MelfoldError, match="damaged checkpoint"):
        launch.train_folds(run, [0, 1], world.cache, ONE)


def test_only_the_folds_that_are_left_count(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path)
    train_fold(run, 1, world.cache, world.device)
    told: list[str] = []
    compute = Compute(devices=("cpu",), progress=lambda done, total, text: told.append(text))
    launch.train_folds(run, [0, 1, 2], world.cache, compute)
    assert {text.split(":")[0] for text in told} == {"tiny fold 0, 1 of 2", "tiny fold 2, 2 of 2"}
    assert open_run(Home(tmp_path), "tiny").missing_folds() == []


@pytest.mark.parametrize("devices", [("gpu9",), ("cpu", "gpu9")])
def test_an_unknown_device_is_refused_before_anything_is_started(devices: tuple[str, ...], world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path)
    with pytest.raises(MelfoldError, match="unknown device: 'gpu9'. Use auto, cpu, cuda or cuda:N"):
        launch.train_folds(run, [0, 1], world.cache, Compute(devices=devices))
    assert not run.fold(0).path.exists()


def test_processes_on_the_cpu_share_its_threads_and_gpus_leave_them_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert shared_threads(["cpu", "cpu"]) == {"OMP_NUM_THREADS": "2"}
        assert shared_threads(["cpu"] * 8) == {"OMP_NUM_THREADS": "1"}
        assert shared_threads(["cpu"]) == shared_threads(["cuda:0", "cuda:1"]) == {}
    finally:
        torch.set_num_threads(before)

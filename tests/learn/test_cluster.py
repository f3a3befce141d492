"""A real Dask scheduler and two worker processes on this machine; one of them is killed in mid-job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from melfold.data.demo import write_demo
from melfold.files import sha256_file

pytest.importorskip("distributed", reason="the optional extra `dask` is not installed")

MELFOLD = [sys.executable, "-m", "melfold"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SETS = (
    "train.epochs=60",
    "train.checkpoint_minutes=0.01",
    "train.validate_every=0",
    "train.crop_seconds=0.64",
    "train.amp=off",
    "logmel.n_fft=256",
    "logmel.hop_length=320",
    "logmel.n_mels=32",
    "model.kwargs={depths=[1, 1, 1, 1], dims=[8, 16, 16, 16]}",
)


class Cluster:
    """A scheduler's address and the workers' processes."""

    def __init__(self, folder: Path) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        self._start(folder, "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file), "--no-dashboard")
        wait_for(file.exists)
        self.address: str = json.loads(file.read_text())["address"]
        for name in ("one", "two"):
            self._start(folder, "worker", self.address, "--name", name, "--nthreads", "1", "--no-nanny", "--no-dashboard")

    def _start(self, folder: Path, *command: str) -> None:
        with (folder / f"{len(self.processes)}.log").open("w") as log:
            command = (sys.executable, "-m", "dask", *command)
            self.processes.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log, cwd=folder))

    def kill_a_worker(self) -> None:
        """At once, as a machine dies."""
        self.processes[-1].send_signal(signal.SIGKILL)
        self.processes[-1].wait()

    def end(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    """Until it is so."""
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("data") / "demo")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    made = Cluster(folder)
    yield made
    made.end()


def melfold(*command: str, **others: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*MELFOLD, *command], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **others
    )


def ended(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def bytes_of(home: Path) -> dict[str, str]:
    """All that caching, training and predicting leave, but for what holds times."""
    kept = [p for p in home.rglob("*") if p.suffix in (".npy", ".safetensors") or p.name in ("oof.csv", "test.csv")]
    return {str(p.relative_to(home)): sha256_file(p) for p in kept}


def test_a_cluster_that_loses_a_worker_gives_the_bytes_of_one_machine(tmp_path: Path, cluster: Cluster, demo_data: Path) -> None:
    sets = [part for value in SETS for part in ("--set", value)]
    homes = {"here": tmp_path / "here", "there": tmp_path / "there"}
    data = [str(demo_data), "--recipe", "demo", *sets, "--device", "cpu"]
    cached = [arg for arg in data if arg not in ("--device", "cpu")]
    engine = {"here": [], "there": ["--engine", "dask", "--scheduler", cluster.address]}

    out = ended(melfold("cache", *cached, "--home", str(homes["there"]), *engine["there"]))
    assert "dask: 2 workers" in out
    folds = [homes["there"] / "runs" / "r" / f"fold{k}" for k in (0, 1)]
    training = melfold("train", *data, "--folds", "0,1", "--run", "r", "--home", str(homes["there"]), *engine["there"])
    wait_for(lambda: all((fold / "checkpoint.pt").exists() for fold in folds))
    cluster.kill_a_worker()
    assert not any((fold / "result.json").exists() for fold in folds), "in the middle: make the folds longer"
    ended(training)

    ended(melfold("train", *data, "--folds", "0,1", "--run", "r", "--home", str(homes["here"])))
    for where, home in homes.items():
        command = ["predict", "r", "--data", str(demo_data), "--device", "cpu", "--home", str(home), *engine[where]]
        assert "INCOMPLETE: predicting with folds 0, 1 alone" in ended(melfold(*command))
    here, there = bytes_of(homes["here"]), bytes_of(homes["there"])
    assert {name for name in here if "runs" in name} >= {"runs/r/test.csv", "runs/r/fold1/weights.safetensors"}
    assert here == there
    assert not list(homes["there"].rglob("checkpoint.pt"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["--engine", "dask"], "go together"),
        (["--scheduler", "tcp://127.0.0.1:1"], "go together"),
        (["--engine", "spark", "--scheduler", "x"], "unknown engine: 'spark'. Use --engine joblib or dask"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(tmp_path: Path, demo_data: Path, command: list[str], said: str) -> None:
    process = melfold("cache", str(demo_data), "--recipe", "demo", "--home", str(tmp_path), *command)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said in out
    assert not (tmp_path / "cache").exists()

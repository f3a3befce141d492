"""A real Dask scheduler and two worker processes on this machine; one of them is killed in mid-job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from melfold import stages
from melfold.cli.main import app
from melfold.compute import Compute
from melfold.data.competition import load_competition
from melfold.data.demo import write_demo
from melfold.files import Home, sha256_file
from melfold.learn.predictions import own_prediction
from melfold.recipes import load_recipe

Client = pytest.importorskip("distributed", reason="the optional extra `dask` is not installed").Client

ENVIRONMENT = os.environ | {"MKL_NUM_THREADS": "1"}
SETS = (
    "train.epochs=8",
    "train.checkpoint_minutes=0",
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
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=120)

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
        assert time.monotonic() < limit, "it did not happen in time"
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


def melfold(*command: str, code: int = 0) -> str:
    """The command line, in this process. Returns: all it printed."""
    result = CliRunner().invoke(app, command)
    assert result.exit_code == code, f"{result.output} {result.exception!r}"
    return result.output


def bytes_of(home: Home) -> dict[str, str]:
    """All that caching, training and predicting leave, but for what holds times."""
    kept = [p for p in home.root.rglob("*") if p.suffix in (".npy", ".safetensors") or p.name in ("oof.csv", "test.csv")]
    return {str(p.relative_to(home.root)): sha256_file(p) for p in kept}


def test_a_cluster_that_loses_a_worker_gives_the_bytes_of_one_machine(tmp_path: Path, cluster: Cluster, demo_data: Path) -> None:
    here, there = Home(tmp_path / "here"), Home(tmp_path / "there")
    recipe = [str(demo_data), "--recipe", "demo", *(part for value in SETS for part in ("--set", value))]
    on_cluster = ["--home", str(there.root), "--engine", "dask", "--scheduler", cluster.address]

    folds = [there.runs / "r" / f"fold{k}" for k in (0, 1)]

    def kill_in_the_middle() -> bool:
        wait_for(lambda: all((fold / "checkpoint.pt").exists() for fold in folds))
        cluster.kill_a_worker()
        return not any((fold / "result.json").exists() for fold in folds)

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_in_the_middle)
        assert "dask: 2 workers" in melfold("train", *recipe, "--folds", "0,1", "--run", "r", "--device", "cpu", *on_cluster)
        assert killed.result(), "in the middle: make the folds longer"
    predicted = melfold("predict", "r", "--data", str(demo_data), "--device", "cpu", *on_cluster)
    assert "INCOMPLETE: predicting with fold 0, 1 only" in predicted

    competition, one = load_competition(demo_data), Compute(("cpu",), jobs=1)
    run = stages.train(competition, here, load_recipe("demo", SETS), "r", [0, 1], one)
    stages.predict(own_prediction(run), competition, here, one)
    assert {name for name in bytes_of(here) if "runs" in name} >= {"runs/r/test.csv", "runs/r/fold1/weights.safetensors"}
    assert bytes_of(here) == bytes_of(there)
    assert not list(there.root.rglob("checkpoint.pt"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["--engine", "dask"], "go together"),
        (["--scheduler", "tcp://127.0.0.1:1"], "go together"),
        (["--engine", "spark", "--scheduler", "x"], "unknown engine: 'spark'. Use --engine joblib or dask"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(tmp_path: Path, demo_data: Path, command: list[str], said: str) -> None:
    assert said in melfold("cache", str(demo_data), "--recipe", "demo", "--home", str(tmp_path), *command, code=2)
    assert not (tmp_path / "cache").exists()

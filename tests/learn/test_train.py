"""The training loop: what it leaves, and that a stop at any moment changes nothing."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from learn_world import TINY, World
from safetensors.torch import load_file

from melfold.artefacts import Artefact
from melfold.data.arrays import crc32_of, npy_path
from melfold.data.cache import read_manifest
from melfold.errors import MelfoldError
from melfold.files import Home, atomic_path
from melfold.learn import fold_data, state
from melfold.learn.predict import predict_probs
from melfold.learn.predictions import own_prediction
from melfold.learn.runs import FULL, FoldFolder, Run, open_run
from melfold.learn.train import load_fold, train_fold
from melfold.metrics import lwlrap
from melfold.probs import Probs, write_probs

ALWAYS = "train.checkpoint_minutes=0"  # a checkpoint after every step
STEPS = 6
LEFT = {".lock", "log.jsonl", "oof.csv", "oof.json", "result.json", "weights.safetensors"}


def go(world: World, run: Run, fold: int | str = 0, **kwargs: object) -> FoldFolder:
    return train_fold(run, fold, world.cache, world.device, **kwargs)


def oof_of(run: Run, fold: int | str) -> Probs:
    """The held-out clips' probabilities that training left."""
    return own_prediction(run).read_fold_oof(fold)


def contents(folder: FoldFolder) -> dict[str, bytes]:
    """What must be the same to the byte."""
    return {path.name: path.read_bytes() for path in (folder.weights, folder.path / "oof.csv") if path.exists()}


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose fold 0 was trained without a stop."""
    run = world.start(tmp_path_factory.mktemp("whole"), ALWAYS)
    go(world, run)
    return run


# Processes that can be killed: forked from a server that has imported torch already.


@pytest.fixture(scope="module")
def spawn() -> Iterator[Callable[..., BaseProcess]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["melfold.learn.train", "melfold.stages", "melfold.cli.main"])
    started: list[BaseProcess] = []

    def start(target: Callable[..., None], *args: object) -> BaseProcess:
        started.append(context.Process(target=target, args=args))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


def train_until(root: Path, cache: Path, moment: str) -> None:
    """Train fold 0 of the run in `root`; die by SIGKILL at a moment."""
    from melfold.learn.devices import pick_device

    def die(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    steps = itertools.count(1)
    kind, _, number = moment.partition(" ")
    if kind == "saving":

        def half(path: Path, content: bytes) -> None:
            if next(steps) < int(number):
                return write(path, content)
            with atomic_path(path) as temporary:
                temporary.write_bytes(content[: len(content) // 2])
                die()

        write, state.write_bytes = state.write_bytes, half
    elif kind == "call":
        count, _, name = number.partition(" ")
        owner, name = name.rsplit(".", 1)
        module = importlib.import_module(f"melfold.{owner}")
        called = getattr(module, name)
        setattr(module, name, lambda *args, **kwargs: die() if next(steps) == int(count) else called(*args, **kwargs))

    def progress(done: int, total: int, text: str) -> None:
        if kind == "step" and next(steps) == int(number):
            die()

    train_fold(open_run(Home(root), "tiny"), 0, cache, pick_device("cpu", "off"), progress=progress)


def train_and_wait(root: Path, cache: Path) -> None:
    """Train fold 0, saying each step; wait for ever at step 3."""
    from melfold.learn.devices import pick_device

    def progress(done: int, total: int, text: str) -> None:
        if done == 3:
            (root / "waiting").touch()
            while True:
                signal.pause()

    train_fold(open_run(Home(root), "tiny"), 0, cache, pick_device("cpu", "off"), progress=progress)


def command_line(stderr: Path, *args: str) -> None:
    """`melfold ARGS`, stderr into a file."""
    from melfold.cli.main import main

    sys.argv = ["melfold", *args]
    with stderr.open("w", buffering=1) as sys.stderr:
        main()


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was saved at; its first 32 bytes are the SHA-256 of the rest."""
    return torch.load(io.BytesIO(checkpoint.read_bytes()[32:]), weights_only=True)["step"]


def wait_for(path: Path, process: BaseProcess) -> None:
    """Until a file is there and not empty or, for a mark, is there at all."""
    while not path.exists() or (path.suffix and not path.stat().st_size):
        process.join(0.02)
        assert process.exitcode is None, f"ended before {path} was there"


def test_exactly_these_files_are_left(world: World, whole: Run) -> None:
    folder = whole.fold(0)
    assert {p.name for p in folder.path.iterdir()} == LEFT
    result = folder.verify()
    clips = len(whole.trained_on(0)), len(whole.held_out(0))
    assert (result["made_from"]["fold"], result["steps"], result["clips"], result["held_out_clips"]) == ("0", STEPS, *clips)
    rows = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [row["step"] for row in rows] == [STEPS, STEPS]
    assert math.isfinite(rows[0]["loss"])
    assert rows[1]["lwlrap"] == result["lwlrap"]
    assert whole.done_folds() == ["0"]


def test_a_fold_that_is_done_is_left_alone(world: World, whole: Run) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.fold(0).path.iterdir()}
    go(world, whole, progress=lambda *_: pytest.fail("it trained"))
    assert {p: p.stat().st_mtime_ns for p in whole.fold(0).path.iterdir()} == before


@pytest.mark.parametrize(
    "moments",
    [
        ["step 1", "step 3", "step 1"],  # each counted from where the one before had got
        ["saving 1", "saving 2"],
        [
            "call 1 learn.train.save_weights",
            "call 1 learn.train.write_current",
            "call 1 artefacts.write_json",
            "call 2 artefacts.write_json",
        ],
    ],
    ids=["in steps", "while a checkpoint is written", "at the end"],
)
def test_killed_at_any_moment_it_continues_to_the_same_bytes(
    moments: list[str], world: World, whole: Run, tmp_path: Path, spawn: Callable[..., BaseProcess]
) -> None:
    run = world.start(tmp_path, ALWAYS)
    for moment in moments:
        process = spawn(train_until, tmp_path, world.cache, moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not run.fold(0).done
    went_on: list[int] = []
    go(world, run, progress=lambda done, total, text: went_on.append(done))
    assert contents(run.fold(0)) == contents(whole.fold(0))
    assert {p.name for p in run.fold(0).path.iterdir()} == LEFT
    assert len(went_on) < STEPS


def test_two_processes_never_train_one_fold(world: World, whole: Run, tmp_path: Path, spawn: Callable[..., BaseProcess]) -> None:
    run = world.start(tmp_path, ALWAYS)
    process = spawn(train_and_wait, tmp_path, world.cache)
    wait_for(tmp_path / "waiting", process)
    with pytest.raises(MelfoldError, match="another melfold is training this fold"):
        go(world, run)
    process.kill()
    process.join()
    go(world, run)  # a dead process holds no lock
    assert contents(run.fold(0)) == contents(whole.fold(0))


def test_ctrl_c_and_sigterm_end_cleanly_and_the_same_command_continues(
    world: World, tmp_path: Path, spawn: Callable[..., BaseProcess], capfd: pytest.CaptureFixture
) -> None:
    sets = [*TINY, "train.epochs=4000"]
    args = ["train", str(world.competition.root), "--recipe", "demo", "--folds", "0", "--run", "tiny", "--home", str(tmp_path)]
    args += ["--device", "cpu", "--jobs", "1", *itertools.chain.from_iterable(("--set", s) for s in sets)]
    folder = FoldFolder(tmp_path / "runs" / "tiny" / "fold0", "0")
    steps = []
    for number, signal_number in enumerate((signal.SIGINT, signal.SIGTERM), 1):
        stderr = tmp_path / f"stderr{number}.txt"
        before = len(folder.log.read_text().splitlines()) if number > 1 else 0
        process = spawn(command_line, stderr, *args)
        wait_for(folder.log, process)
        while len(folder.log.read_text().splitlines()) <= before:
            process.join(0.02)
            assert process.exitcode is None
        os.kill(process.pid, signal_number)
        process.join()
        assert process.exitcode == 130
        assert stderr.read_text().splitlines()[-1].startswith("melfold: stopped. The same command ")
        assert "Traceback" not in stderr.read_text()
        assert folder.checkpoint.exists()
        assert not folder.done
        assert not list(folder.path.glob("*.tmp")) + list(folder.path.glob(".*.tmp"))
        steps.append(step_of(folder.checkpoint))
    assert 0 < steps[0] < steps[1]
    assert f"continuing at step {steps[0]} of" in stderr.read_text()


def command_line_on_a_full_disk(stderr: Path, size: int, *args: str) -> None:
    """`melfold ARGS` where no file can be larger than some bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    command_line(stderr, *args)


def test_a_full_disk_is_reported_in_one_line_and_training_continues_later(
    world: World, whole: Run, tmp_path: Path, spawn: Callable[..., BaseProcess]
) -> None:
    run = world.start(tmp_path, ALWAYS)
    shutil.copytree(world.home.cache, tmp_path / "cache")
    args = ["resume", "tiny", "--home", str(tmp_path), "--device", "cpu", "--jobs", "1"]
    size = whole.fold(0).weights.stat().st_size // 2
    process = spawn(command_line_on_a_full_disk, tmp_path / "stderr.txt", size, *args)
    process.join()
    told = (tmp_path / "stderr.txt").read_text()
    assert (process.exitcode, told.splitlines()[-1]) == (
        2,
        f"melfold: File too large: {run.fold(0).checkpoint}. Free some space, or use another folder",
    ), told
    assert "Traceback" not in told
    assert not list(run.fold(0).path.glob(".*.tmp"))
    go(world, run)
    assert contents(run.fold(0)) == contents(whole.fold(0))


class Stop(Exception):
    """Stands for anything that ends a process."""


def stop_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, text: str) -> None:
        if done == step:
            raise Stop

    return progress


def test_the_seed_decides_every_byte(world: World, whole: Run, tmp_path: Path) -> None:
    same = go(world, world.start(tmp_path / "a", ALWAYS))
    other = go(world, world.start(tmp_path / "b", ALWAYS, "seed=1"))
    assert contents(same) == contents(whole.fold(0))
    assert contents(other)["weights.safetensors"] != contents(same)["weights.safetensors"]
    assert contents(other)["oof.csv"] != contents(same)["oof.csv"]


def test_looking_at_the_held_out_fold_changes_nothing(world: World, whole: Run, tmp_path: Path) -> None:
    looking = go(world, world.start(tmp_path, "train.validate_every=0.3"))
    assert contents(looking) == contents(whole.fold(0))
    rows = [json.loads(line) for line in looking.log.read_text().splitlines()]
    assert [row["step"] for row in rows if "lwlrap" in row] == [2, 4, 6]


def test_folds_see_different_clips(world: World, whole: Run, tmp_path: Path) -> None:
    run = world.start(tmp_path, ALWAYS)
    weights = contents(go(world, run, 1))["weights.safetensors"]
    assert weights != contents(whole.fold(0))["weights.safetensors"]
    assert set(oof_of(run, 1).index) == set(run.held_out(1))


def test_no_held_out_clip_is_ever_in_a_training_batch(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.start(tmp_path, "train.epochs=2")
    shown: set[str] = set()
    batches = fold_data.train_batches

    def spy(store: object, *args: object, **kwargs: object) -> Iterator[object]:
        for batch in batches(store, *args, **kwargs):
            shown.update(store.fnames[row] for row in batch.rows)
            yield batch

    monkeypatch.setattr(fold_data, "train_batches", spy)
    go(world, run, 2)
    assert shown == set(run.trained_on(2))
    assert set(oof_of(run, 2).index) == set(run.held_out(2))
    assert not shown & set(run.held_out(2))


def test_the_score_is_that_of_the_kept_weights(world: World, whole: Run, tmp_path: Path) -> None:
    model = load_fold(whole, "0", world.device)
    held_out = whole.held_out(0)
    probs = predict_probs(model, world.store(held_out), whole.info.labels, whole.recipe, world.device)
    write_probs(tmp_path / "oof.csv", probs)
    assert (tmp_path / "oof.csv").read_bytes() == own_prediction(whole).fold_oof(0).read_bytes()
    result = json.loads(whole.fold(0).result.read_text())
    assert result["lwlrap"] == lwlrap(whole.targets(held_out), probs)


def test_the_moving_average_leaves_the_initial_weights(world: World, tmp_path: Path) -> None:
    def weights(name: str, *sets: str) -> dict[str, torch.Tensor]:
        run = world.start(tmp_path / name, "train.warmup_epochs=0", *sets)
        return load_file(go(world, run).weights)

    initial = weights("initial", "train.lr=1e-30", "train.lr_min=0.0", "train.ema_decay=0.0")
    last = weights("last", "train.ema_decay=0.0")
    averaged = weights("averaged", "train.ema_decay=0.999")

    def distance(a: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float((a[k] - v).square().sum()) for k, v in initial.items() if not k.startswith("normalise.")))

    assert distance(last) > 0.1
    assert distance(averaged) > 0.2 * distance(last)
    assert any(not torch.equal(averaged[k], last[k]) for k in last)


def test_statistics_of_the_training_clips_are_in_the_weights(world: World, whole: Run) -> None:
    values = np.concatenate([np.load(npy_path(world.cache, f)).astype(np.float64).ravel() for f in whole.trained_on(0)])
    weights = load_file(whole.fold(0).weights)
    assert float(weights["normalise.mean"]) == pytest.approx(values.mean(), abs=1e-3)
    assert float(weights["normalise.std"]) == pytest.approx(values.std(), abs=1e-3)


def test_a_loss_that_is_not_finite_names_the_clips_and_can_be_fixed(world: World, whole: Run, tmp_path: Path) -> None:
    run = world.start(tmp_path, ALWAYS)
    poisoned = run.trained_on(0)[7]
    cache = tmp_path / "cache"
    shutil.copytree(world.cache, cache)
    np.save(npy_path(cache, poisoned), np.full_like(np.load(npy_path(cache, poisoned)), np.inf))
    manifest = read_manifest(cache)  # as if it had been made so
    manifest.loc[poisoned, "crc32"] = crc32_of(npy_path(cache, poisoned))
    manifest.to_csv(cache / "manifest.csv")
    Artefact.of(cache / "manifest.csv").commit({})
    with pytest.raises(MelfoldError, match="the loss is not finite at step") as caught:
        train_fold(run, 0, cache, world.device)
    assert poisoned in str(caught.value)
    assert not run.fold(0).done
    assert not run.fold(0).weights.exists()
    go(world, run)  # with the sane cache; no checkpoint held a spoilt weight
    assert contents(run.fold(0)) == contents(whole.fold(0))


def test_a_learning_rate_that_explodes_is_reported(world: World, tmp_path: Path) -> None:
    sets = ("train.lr=1e30", "train.lr_min=1e30", "train.clip_grad=0.0", "train.warmup_epochs=0", "train.epochs=2")
    run = world.start(tmp_path, *sets)
    with pytest.raises(MelfoldError, match="the loss is not finite at step .*Lower train.lr"):
        go(world, run)
    assert not run.fold(0).done


def test_a_checkpoint_of_something_else_is_refused(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path, ALWAYS)
    with pytest.raises(Stop):
        go(world, run, progress=stop_at(3))
    other = world.start(tmp_path, ALWAYS, "seed=1", name="other")
    for folder in (run.fold(1), other.fold(0)):
        folder.path.mkdir(parents=True)
        shutil.copy(run.fold(0).checkpoint, folder.checkpoint)
    for fold, its_run, what in ((1, run, "fold"), (0, other, "recipe")):
        with pytest.raises(MelfoldError, match=f"was saved under different conditions: {what}: ") as caught:
            go(world, its_run, fold)
        assert len(caught.value.lines) == 1
        assert not its_run.fold(fold).done


def test_a_broken_checkpoint_is_named(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path)
    run.fold(0).path.mkdir()
    run.fold(0).checkpoint.write_bytes(b"junk")
    with pytest.raises(
        MelfoldError, match="damaged checkpoint: .*checkpoint.pt. Delete it to train this fold again from the start"
    ):
        go(world, run)


def test_an_unknown_optimizer_is_reported(world: World, tmp_path: Path) -> None:
    with pytest.raises(MelfoldError, match="timm refuses optimizer adammm: .*Check train.optimizer"):
        go(world, world.start(tmp_path, "train.optimizer=adammm"))


def test_full_trains_on_every_clip_and_has_no_oof(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path)
    folder = go(world, run, FULL)
    assert {p.name for p in folder.path.iterdir()} == LEFT - {"oof.csv", "oof.json"}
    result = json.loads(folder.result.read_text())
    assert result["clips"] == len(world.competition.curated)
    assert "lwlrap" not in result
    assert run.done_folds() == [FULL]


@pytest.mark.parametrize("fold", [3, -1, 99])
def test_a_fold_that_is_none_is_refused(fold: int, world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path)
    with pytest.raises(MelfoldError, match=f"no such fold: {fold}. Folds are 0 to 2, or full"):
        go(world, run, fold)
    assert not run.fold(fold).path.exists()


def test_an_untrained_fold_has_no_model(world: World, whole: Run) -> None:
    with pytest.raises(MelfoldError, match="fold 1 of tiny is not trained"):
        load_fold(whole, "1", world.device)


@pytest.mark.parametrize(
    "sets",
    [
        ("model.head=norm_linear", "model.pool=mean", "train.optimizer=adam", "train.pad=floor", "augment.mixup=db"),
        ("model.frozen=true", "train.ema_decay=0.0"),
        ("train.layer_decay=0.5", "augment.gain_db=3.0"),
    ],
    ids=["others", "frozen", "layer decay"],
)
def test_other_settings_train_and_resume_too(sets: tuple[str, ...], world: World, tmp_path: Path) -> None:
    one = go(world, world.start(tmp_path / "one", ALWAYS, *sets))
    run = world.start(tmp_path / "two", ALWAYS, *sets)
    with pytest.raises(Stop):
        go(world, run, progress=stop_at(4))
    assert contents(go(world, run)) == contents(one)


@pytest.mark.soak
def test_a_compiled_model_learns_the_same_up_to_rounding(world: World, tmp_path: Path) -> None:
    calm = ("model.drop_rate=0", "model.drop_path_rate=0")  # a compiled model draws its dropout otherwise
    one, two = (go(world, world.start(tmp_path / name, f"train.compile={name}", *calm)).weights for name in ("false", "true"))
    compiled = load_file(two)
    for name, value in load_file(one).items():
        torch.testing.assert_close(compiled[name], value, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")

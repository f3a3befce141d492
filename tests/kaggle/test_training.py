"""Training on Kaggle: what is built, what its kernels do, and the way home over several sessions."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pytest
import timm
import torch
from kaggle_world import CPU as COMPUTE
from kaggle_world import DEMO, SETS, SLUG, World, bundle_of, environment, lay_out, record
from safetensors.torch import save

from melfold import stages
from melfold.data.competition import load_competition
from melfold.data.demo import write_demo
from melfold.errors import MelfoldError
from melfold.kaggle.build import Target
from melfold.kaggle.built import Built
from melfold.kaggle.client import Kaggle
from melfold.kaggle.judge import judge_train
from melfold.kaggle.push import fetch_run
from melfold.kaggle.rehearsal import rehearse
from melfold.kaggle.training import Training, build_train, train_on_kaggle
from melfold.kernels.boot import Session
from melfold.kernels.train import train
from melfold.learn.fetch import hub_file
from melfold.learn.runs import open_run
from melfold.recipes import load_recipe
from tests.fake_kaggle import FakeKaggle
from tests.learn.hub_standin import serve

CPU = Target("tester", SLUG, gpu=False)
README = Path(__file__).resolve().parents[2] / "kernels/README.md"


def training(world: World, *sets: str, data: Path | None = None, folds: Sequence[int | str] = (0, 1), **more: str) -> Training:
    recipe = load_recipe("demo", [*SETS, *sets])
    competition = load_competition(data or world.data, audio=False)
    table, _ = stages.folds(competition, world.home, recipe)
    return Training(**{"name": "far", **more}, recipe=recipe, table=table, competition=competition, folds=folds)


def metadata(built: Built) -> dict:
    return json.loads((built.kernel / "kernel-metadata.json").read_text())


@pytest.mark.parametrize("name", ["../x", "a/b", ".."])
def test_a_name_with_parts_of_a_path_is_refused(name: str, own: World) -> None:
    with pytest.raises(MelfoldError, match="a run's name is letters"):
        build_train(own.home, training(own, name=name), CPU)


def test_a_kernel_has_a_network_only_for_weights_of_the_hub(own: World) -> None:
    built = build_train(own.home, training(own), CPU)
    assert metadata(built)["enable_internet"] is False
    built = build_train(own.home, training(own, "model.weights=hub"), CPU)
    assert metadata(built)["enable_internet"] is True
    assert not built.dataset.exists()


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("someone/train-s1", "kernel_sources"),
        ("dataset:someone/weights", "dataset_sources"),
        ("model:someone/convnext/pytorch/tiny/1", "model_sources"),
    ],
)
def test_weights_on_kaggle_are_attached_by_name(source: str, key: str, own: World) -> None:
    built = build_train(own.home, training(own, "model.weights=file:far.safetensors", weights_from=source), CPU)
    assert metadata(built)[key] == [source.split(":")[-1]]
    assert metadata(built)["enable_internet"] is False
    assert bundle_of(built)["recipe"]["model"]["weights"] == "file:far.safetensors"


@pytest.mark.parametrize("source", ["weights", "dataset:a/b/c", "model:a/b", "../x/y"])
def test_a_source_that_is_none_is_refused(source: str, own: World) -> None:
    with pytest.raises(MelfoldError, match="no kernel, dataset or model of Kaggle"):
        build_train(own.home, training(own, "model.weights=file:far.safetensors", weights_from=source), CPU)


def test_a_session_that_does_not_find_the_one_before_fails(own: World, tmp_path: Path) -> None:
    build_train(own.home, training(own), CPU)
    second = build_train(own.home, training(own), CPU, session=2)
    assert metadata(second)["kernel_sources"] == ["tester/melfold-train-far-s1"]
    lay_out(second, own, tmp_path / "nothing")
    with pytest.raises(MelfoldError, match="the session before left nothing here: no run far below"):
        train(Session(bundle_of(second), tmp_path / "nothing", time.monotonic()))
    left = own.home.root / "build/kernels/melfold-train-far-s1/output"
    shutil.copytree(own.home.runs / "tiny", left / "runs/far")
    (left / "melfold.json").write_text(json.dumps({"build_id": "0" * 64}))
    lay_out(second, own, tmp_path / "other")
    with pytest.raises(MelfoldError, match="the session before is of another build: 000000000000, not "):
        train(Session(bundle_of(second), tmp_path / "other", time.monotonic()))


def test_two_sessions_from_the_tables_alone_bring_the_run_home(
    own: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "melfold")
    tables = tmp_path / "tables" / own.competition.name
    tables.mkdir(parents=True)
    for name in ("train_curated.csv", "train_noisy.csv", "sample_submission.csv"):
        shutil.copy(own.data / name, tables)
    with serve() as hub, FakeKaggle(tmp_path / "kaggle", data=own.data) as fake:
        plan = training(own, "model.weights=hub", data=tables, folds=[0])
        kwargs = plan.recipe.model.kwargs
        hub.files[str(hub_file(plan.recipe.model))] = save(timm.create_model(plan.recipe.model.name, **kwargs).state_dict())
        fake.kernel_env = {"HF_ENDPOINT": hub.address}
        with environment(fake.env(tmp_path / "user") | {"MELFOLD_PACE": "0.1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
            client = Kaggle(SLUG)
            short = Target("tester", SLUG, gpu=False, minutes=0.01)
            with pytest.raises(MelfoldError, match=r"folds of run far are not done after 1 sessions: 0\. Continue with"):
                train_on_kaggle(client, own.home, plan, short, sessions=1)
            built = train_on_kaggle(client, own.home, plan, CPU, sessions=2)
            run = open_run(own.home, "far")
            assert (run.done_folds(), run.info.track, run.info.competition) == (["0"], "open", own.competition.name)
            shown = [line for line in caplog.messages if line.startswith("melfold-train-far-s2 | ")]
            assert any("continuing from" in line for line in shown)
            assert "continuing from notebooks/tester/melfold-train-far-s1/runs/far" in fake.kernels[built.folder.name][0].text
            assert not (built.folder / "output/weights").exists()
            calls = len(fake.calls)
            assert train_on_kaggle(client, own.home, plan, CPU, sessions=2).folder == built.folder
            assert len(fake.calls) == calls, "what is done is not asked for again"
            # Here, where no hub can be reached, nothing is left to train.
            assert stages.train(own.competition, own.home, plan.recipe, "far", [0], COMPUTE).folder == run.folder
            other = training(own, "model.weights=hub", "seed=5", data=tables, folds=[0])
            with pytest.raises(MelfoldError, match="run far was started on Kaggle with other settings"):
                train_on_kaggle(client, own.home, other, CPU, sessions=2)


def test_a_run_is_not_mixed_with_another_one_of_its_name(own: World, tmp_path: Path) -> None:
    built = build_train(own.home, training(own, "seed=7"), CPU)
    shutil.copytree(own.home.runs / "tiny", own.home.runs / "far")
    working = lay_out(built, own, tmp_path)
    train(Session(bundle_of(built) | {"budget_minutes": 0.01}, tmp_path, time.monotonic()))
    with pytest.raises(MelfoldError, match=r"run far here was trained with different settings: seed: 0 -> 7\. Move it away"):
        fetch_run(built, working, own.home)


def test_a_fold_that_fails_does_not_take_the_session_with_it(own: World, tmp_path: Path) -> None:
    built = build_train(own.home, training(own, "model.weights=file:x.safetensors", weights_from="dataset:a/b", folds=[0]), CPU)
    working = lay_out(built, own, tmp_path)
    attached = tmp_path / "kaggle/input/datasets/a/b/x.safetensors"
    attached.parent.mkdir(parents=True)
    attached.write_bytes(save({"other": torch.ones(1)}))
    train(Session(bundle_of(built), tmp_path, time.monotonic()))
    assert record(working)["folds"] == {"0": "not started"}
    assert record(working)["failure"].startswith("1 of 1 folds failed: far fold 0")
    assert judge_train(working) == [record(working)["failure"]]


def run_session(built: Built, world: World, root: Path, minutes: float) -> Path:
    """Run a training kernel in this process. Returns: its output, where the next session finds it."""
    working, output = lay_out(built, world, root), built.folder / "output"
    train(Session(bundle_of(built) | {"budget_minutes": minutes}, root, time.monotonic()))
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(working, output)
    return output


def steps_in(checkpoint: Path) -> int:
    """The step a checkpoint was saved at; its content follows a hash of 32 bytes."""
    return torch.load(BytesIO(checkpoint.read_bytes()[32:]), weights_only=True)["step"]


@pytest.mark.soak
def test_training_stops_in_time_and_continues_in_a_second_session(
    own: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each session gets more time until it has trained at all; the second must continue where the first one stopped."""
    steps = [0]
    for session in (1, 2):
        built = build_train(own.home, training(own, "train.epochs=5000", folds=[0]), CPU, session=session)
        for minutes in (0.3, 0.6, 1.2, 2.4):
            output = run_session(built, own, tmp_path / f"{session}-{minutes}", minutes)
            checkpoint = output / "runs/far/fold0/checkpoint.pt"
            step = steps_in(checkpoint) if checkpoint.exists() else 0
            if step > steps[-1]:
                break
        assert record(output)["folds"] == {"0": "saved, not finished"}
        steps.append(step)
    assert f"continuing at step {steps[1]} of" in capfd.readouterr().err
    assert 0 < steps[1] < steps[2]


@pytest.mark.soak  # the suite rehearses two sessions above
def test_a_rehearsal_needs_no_audio_and_takes_a_few_steps(own: World, tmp_path: Path) -> None:
    hub = ("model.weights=hf:someone/weights", "model.normalise=checkpoint")
    plan = training(own, "train.clips=both", "train.epochs=5000", *hub, folds=[1])
    built = build_train(own.home, plan, CPU)
    report = rehearse(built, plan.competition, own.home, keep=tmp_path / "kept")
    assert report.failures == [], report.log
    assert record(tmp_path / "kept")["folds"] == {"1": "done"}


def masked(text: str) -> str:
    """A text without its numbers, and with single spaces."""
    return " ".join(re.sub(r"\b[0-9a-f]{12}\b|\d[\d.,:-]*", "#", text).split())


@pytest.mark.soak
def test_the_example_of_the_readme_is_true(tmp_path: Path) -> None:
    """Its commands, in a home that is empty, print what it shows, but for the numbers."""
    example = README.read_text().partition("\n## An example\n")[2].partition("\n## ")[0].replace("\\\n", " ")
    lines = [line.strip() for line in example.splitlines() if line.startswith("    ")]
    assert sum(line.startswith("melfold ") for line in lines) == 5
    data, shown = write_demo(tmp_path / "demo"), ""
    truth = data / "test_post_competition.csv"
    with serve() as hub, FakeKaggle(tmp_path / "kaggle", competition=DEMO, data=data, truth=truth) as fake:
        fake.kernels_only = fake.late = True
        model = load_recipe("demo", ["model.weights=hub", "model.kwargs={}"]).model
        hub.files[str(hub_file(model))] = save(timm.create_model(model.name).state_dict())
        fake.kernel_env = {"HF_ENDPOINT": hub.address}
        env = fake.env(tmp_path / "user") | {"MELFOLD_HOME": str(tmp_path / "empty"), "MELFOLD_PACE": "0.2"}
        env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "COLUMNS": "160"}  # no hub can be reached from here
        for line in lines:
            if not line.startswith("melfold "):
                by_speed = re.search(r"session \d of|continuing|output of", line)  # a fast machine needs fewer sessions
                assert by_speed or masked(line) in shown, shown
                continue
            last = re.sub(r"-s\d", "-s" + str(len(fake.kernels)), line)  # a slower machine needs more sessions
            done = subprocess.run(
                [sys.executable, "-m", *shlex.split(last)], env=env, cwd=tmp_path, capture_output=True, text=True
            )
            shown = masked(done.stdout + done.stderr)
            assert done.returncode == 0, shown
        assert len(fake.submissions) == 2

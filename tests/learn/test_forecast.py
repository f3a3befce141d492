"""A dry run: it walks every stage, and says what a training will take on this device."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from melfold import dry_run, stages
from melfold.compute import Compute
from melfold.data.competition import load_competition
from melfold.dry_run import Forecast
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.learn.devices import pick_device
from melfold.learn.model import Tagger
from melfold.learn.train import train_fold
from melfold.recipes import load_recipe

SETS = (
    "logmel.n_fft=256",
    "logmel.hop_length=320",
    "logmel.n_mels=32",
    "model.kwargs={depths=[1, 1, 1, 1], dims=[8, 16, 16, 16]}",
    "train.crop_seconds=0.64",
    "train.epochs=2",
    "train.batch_size=6",
    "train.validate_every=0.5",
    "folds.n_folds=3",
    "train.clips=both",
    "train.curated_times=1",
)
CPU = Compute(("cpu",), jobs=1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "_MEASURED_SECONDS", 0.5)


@pytest.mark.usefixtures("quick")
def test_a_dry_run_forecasts_with_the_recipes_own_batches(tmp_path: Path, tiny_download: Callable[..., Path]) -> None:
    root = tiny_download(curated=30, noisy=9, test=3)
    recipe = load_recipe("demo", [*SETS, 'phases=[{}, {clips = "curated", epochs = 1}]'])
    tried = dry_run.dry_run(root, Home(tmp_path / "home"), recipe, CPU)
    assert tried.submission.exists()
    found = tried.forecast
    assert (found.batch_size, found.folds, found.devices) == (6, 3, 1)
    assert found.steps == math.ceil(2 * (20 + 9) / 6) + math.ceil(20 / 6)
    assert 0 < found.seconds_per_step < 5
    assert found.predict_seconds > 0
    assert found.peak_memory > 100 * 2**20
    assert found.device.startswith("cpu")
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["build"]


def test_folds_are_shared_out_over_the_devices() -> None:
    one = Forecast("cpu, fp32", 1, 5, 1000, 64, 0.5, 20, 80, 3 * 2**30)
    assert one.crops_per_second == 128
    assert one.fold_seconds == 600
    assert one.seconds == 3000
    assert replace(one, devices=2).seconds == 1800
    assert one.lines() == [
        "cpu, fp32: 128 crops/s, 3.0 GiB",
        "One fold: 1,000 steps of 64, about 10 min",
        "All 5 folds on 1 device: about 50 min",
    ]


@pytest.fixture
def trained(tmp_path: Path, tiny_download: Callable[..., Path]) -> Callable[..., dict[str, object]]:
    """Trains fold 0 of a tiny recipe. Returns: its result."""
    competition, home = load_competition(tiny_download(curated=30, noisy=9, test=3)), Home(tmp_path / "home")

    def train(*sets: str) -> dict[str, object]:
        recipe = load_recipe("demo", [*SETS, *sets])
        run = stages.start(competition, home, recipe, f"run{recipe.fingerprint()}", [0])
        folder = train_fold(run, 0, stages.cache(competition, home, recipe, CPU), pick_device("cpu", "off"))
        return json.loads(folder.result.read_text())

    return train


def test_a_result_says_how_it_was_computed(trained: Callable[..., dict[str, object]]) -> None:
    result = trained()
    assert result["cudnn_benchmark"] is False, "it means something on a GPU only"
    assert result["peak_memory_mib"] > 100


def test_settings_that_change_rounding_name_a_run() -> None:
    prints = {
        load_recipe("demo", [s]).fingerprint() for s in ("train.micro_batch=8", "train.benchmark=false", "train.compile=true")
    }
    assert len(prints | {load_recipe("demo").fingerprint()}) == 4


def test_a_training_that_does_not_fit_names_the_setting(
    trained: Callable[..., dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Tagger, "forward", full)
    with pytest.raises(MelfoldError, match=r"not enough memory.*train\.micro_batch=3"):
        trained()
    with pytest.raises(MelfoldError, match=r"train\.micro_batch=1"):
        trained("train.micro_batch=2")

"""Runs that start from another run's weights, fold by fold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learn_world import World

from melfold import stages
from melfold.compute import Compute
from melfold.data.folds import read_folds
from melfold.errors import MelfoldError
from melfold.files import Home, read_json
from melfold.learn.fold_data import FoldData
from melfold.learn.runs import Run
from melfold.learn.start import start_run
from melfold.learn.train import start_state, train_fold
from melfold.learn.weights import read_state

SECOND = ("model.weights=run:tiny", "train.lr=0.0005")


def trained(world: World, root: Path, *folds: int) -> Run:
    run = world.start(root)
    for fold in folds:
        train_fold(run, fold, world.cache, world.device)
    return run


def test_each_fold_starts_from_the_same_fold(world: World, tmp_path: Path) -> None:
    first = trained(world, tmp_path, 0, 1)
    second = world.start(tmp_path, *SECOND, name="second")
    for fold in ("0", "1"):
        state = start_state(second, FoldData(second, fold, world.cache), world.device)
        ours, theirs = state.model.state_dict(), read_state(first.fold(fold).weights)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), "the training clips are the same: so is their mean"
    assert not torch.equal(*(read_state(first.fold(k).weights)["head.weight"] for k in "01"))


def test_the_weights_it_started_from_are_part_of_a_fold(world: World, tmp_path: Path) -> None:
    first = trained(world, tmp_path, 0)
    second = world.start(tmp_path, *SECOND, name="second")
    train_fold(second, 0, world.cache, world.device)
    assert read_json(second.fold(0).result)["made_from"]["first_weights"] == first.fold(0).weights_sha256()
    assert second.info.first_weights == f"tiny {first.recipe.fingerprint()}"


def test_a_fold_that_is_not_trained_gives_no_weights(world: World, tmp_path: Path) -> None:
    trained(world, tmp_path, 0)
    second = world.start(tmp_path, *SECOND, name="second")
    with pytest.raises(MelfoldError, match="second starts from tiny, where fold 1 is not trained: .* --run tiny --folds 1"):
        train_fold(second, 1, world.cache, world.device)
    with pytest.raises(MelfoldError, match="run tiny, which this one learns from, lacks folds: 1. Train them first"):
        stages.start(world.competition, Home(tmp_path), world.recipe(*SECOND), "third", [0, 1])


def test_a_run_of_other_folds_or_no_run_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(MelfoldError, match="no such run: tiny"):
        world.start(tmp_path, *SECOND, name="second")
    table = read_folds(world.folds, world.competition)
    table.assign(fold=(table["fold"] + 1) % 3).to_csv(other := tmp_path / "other.csv")
    start_run(Home(tmp_path), "tiny", world.recipe(), world.competition, other)
    with pytest.raises(MelfoldError, match="must have the same folds and labels: tiny"):
        world.start(tmp_path, *SECOND, name="second")


def test_another_network_does_not_fit(world: World, tmp_path: Path) -> None:
    trained(world, tmp_path, 0)
    wider = "model.kwargs={depths=[1, 1, 1, 1], dims=[16, 16, 16, 16]}"
    second = world.start(tmp_path, *SECOND, wider, name="second")
    with pytest.raises(MelfoldError, match="does not fit second's recipe: .*shapes differ") as caught:
        train_fold(second, 0, world.cache, world.device)
    assert len(caught.value.lines) == 1


def test_it_is_as_open_as_the_run_it_starts_from(world: World, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"any")
    sets = (f"model.weights=file:{tmp_path / 'w.safetensors'}", "model.licence=MIT", 'model.seen=["FSD50K"]')
    world.start(tmp_path, *sets)
    second = world.start(tmp_path, *SECOND, name="second")
    assert (second.info.track, second.info.licence, second.info.seen) == ("open", "MIT", ["FSD50K"])
    assert "FSD50K" in second.info.warnings[0]
    legal = world.start(tmp_path / "other", name="tiny")
    assert (legal.info.track, legal.info.seen) == ("scratch", [])
    assert world.start(tmp_path / "other", *SECOND, name="second").info.track == "scratch"


def test_a_dry_run_needs_no_weights_of_the_other_run(world: World, tmp_path: Path) -> None:
    from melfold.dry_run import dry_run

    found = dry_run(world.competition.root, Home(tmp_path), world.recipe(*SECOND), Compute())
    assert found.forecast.steps > 0

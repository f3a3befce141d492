"""Files that were damaged, edited or mixed up are never used: each is told in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from learn_world import World

from melfold import stages
from melfold.combine.oof import score
from melfold.compute import Compute
from melfold.data.competition import load_competition
from melfold.errors import MelfoldError
from melfold.files import Home, read_json, write_json
from melfold.learn.devices import Device
from melfold.learn.losses import LOSSES, bce
from melfold.learn.predictions import own_prediction, start_prediction
from melfold.learn.runs import Run, open_run
from melfold.learn.train import load_fold, train_fold

ALWAYS = "train.checkpoint_minutes=0"


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with two trained folds and its predictions. Treat it as read-only."""
    run = world.start(tmp_path_factory.mktemp("made"))
    for fold in (0, 1):
        train_fold(run, fold, world.cache, world.device)
    stages.predict(own_prediction(run), world.competition, world.home, Compute(devices=("cpu",), jobs=1))
    score(own_prediction(run))
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy of it that may be damaged."""
    shutil.copytree(made.folder, tmp_path / "runs" / "tiny")
    return open_run(Home(tmp_path), "tiny")


def flip_a_bit(path: Path, at: float = 0.7) -> None:
    """The size stays, and the file can still be read as what it is."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def refused(what: Callable[[], object], *said: str) -> None:
    """Refused in one line that holds these words."""
    with pytest.raises(MelfoldError) as caught:
        what()
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)
    for words in said:
        assert words in str(caught.value)


def test_a_flipped_bit_in_the_weights_is_found(run: Run, world: World) -> None:
    load_fold(run, "0", world.device)
    flip_a_bit(run.fold(0).weights)
    refused(lambda: load_fold(run, "0", world.device), "weights.safetensors was changed after it was written", "make it again")


def test_missing_weights_are_found(run: Run, world: World) -> None:
    run.fold(0).weights.unlink()
    refused(lambda: load_fold(run, "0", world.device), "weights.safetensors is missing")


def test_a_fold_in_place_of_another_is_found(run: Run, world: World) -> None:
    shutil.rmtree(run.fold(0).path)
    shutil.copytree(run.fold(1).path, run.fold(0).path)
    for what in (lambda: load_fold(run, "0", world.device), own_prediction(run).read_oof, own_prediction(run).read_test):
        refused(what, "result.json belongs to another fold or recipe: fold: 1 -> 0", "train it again")


def test_the_same_fold_of_another_recipe_is_found(run: Run, world: World, tmp_path: Path) -> None:
    other = world.start(tmp_path, "seed=1", name="other")
    shutil.copytree(run.fold(0).path, other.fold(0).path)
    for what in (lambda: load_fold(other, "0", world.device), own_prediction(other).read_oof):
        refused(what, "result.json belongs to another fold or recipe: recipe: ", run.recipe.fingerprint())


def test_an_edited_table_of_clips_is_found(run: Run) -> None:
    fname, fold = run.clips.index[0], run.clips["fold"].iloc[0]
    edit(run.folder / "clips.csv", f"{fname},{fold}", f"{fname},{(fold + 1) % 3}")
    refused(lambda: open_run(run.home, "tiny"), "clips.csv was changed after it was written")


@pytest.mark.parametrize("key", ["seed", "train.lr", "model.drop_rate", "logmel.top_db", "noisy.per_label"])
def test_an_edited_recipe_is_found_and_the_key_named(run: Run, key: str) -> None:
    path = run.folder / "recipe.json"
    values = read_json(path)
    *sections, last = key.split(".")
    table = values[sections[0]] if sections else values
    table[last] = table[last] / 2 + 1 if isinstance(table[last], float) else table[last] + 1
    write_json(path, values)
    if key == "model.drop_rate":
        values["model"]["drop_rate"] = 0.2
        write_json(path, values)
    refused(lambda: open_run(run.home, "tiny"), "recipe.json was changed after the run started", key, "Undo the change")


def test_edited_views_in_the_recipe_make_the_predictions_stale(run: Run) -> None:
    values = read_json(run.folder / "recipe.json")
    values["predict"]["overlap"] = 0.25
    write_json(run.folder / "recipe.json", values)
    own = own_prediction(open_run(run.home, "tiny"))
    refused(own.read_oof, "tiny has no current out-of-fold predictions", "predict.overlap: 0.5 -> 0.25")
    refused(own.read_test, "tiny has no current test predictions", "predict.overlap: 0.5 -> 0.25")


def test_edited_probabilities_are_found(run: Run) -> None:
    own = own_prediction(run)
    for path in (own.fold_oof(0), own.test):
        edit(path, "0.", "0.1")
    refused(own.read_oof, "oof.csv was changed after it was written", "Run `melfold predict tiny --data DATA`")
    refused(lambda: score(own), "oof.csv was changed after it was written")
    refused(own.read_test, "test.csv was changed after it was written", "Run `melfold predict tiny --data DATA`")


def test_an_edited_pool_is_made_again_from_the_folds(run: Run) -> None:
    own = own_prediction(run)
    before = own.oof.read_bytes()
    scores = score(own)
    edit(own.oof, "0.", "0.1")
    assert score(own).oof_lwlrap == scores.oof_lwlrap
    assert own.oof.read_bytes() == before


def test_edited_probabilities_of_one_fold_are_made_again_by_predict(run: Run, made: Run, world: World) -> None:
    own = own_prediction(run)
    for path in (own.fold_oof(0), own.fold_test(1)):
        edit(path, "0.", "0.1")
    stages.predict(own, world.competition, world.home, Compute(devices=("cpu",), jobs=1))
    for path in (own.fold_oof(0), own.fold_test(1), own.test):
        assert path.read_bytes() == (made.folder / path.relative_to(run.folder)).read_bytes()


def test_after_a_fold_was_trained_anew_its_predictions_are_made_anew(run: Run, world: World, tmp_path: Path) -> None:
    """The weights of another seed stand for those that another machine would give."""
    other = train_fold(world.start(tmp_path / "other", "seed=1"), 0, world.cache, world.device)
    own, folder = own_prediction(run), run.fold(0)
    before = {path: path.read_bytes() for path in (own.fold_oof(0), own.fold_test(0), own.test)}
    shutil.copy(other.weights, folder.weights)
    folder.artefact.commit(folder.artefact.read()["made_from"])
    for read in (own.read_oof, own.read_test):
        refused(read, "tiny has no current", "weights: ")
    stages.predict(own, world.competition, world.home, Compute(devices=("cpu",), jobs=1))
    assert all(path.read_bytes() != content for path, content in before.items())
    assert len(own.read_oof()) == len(run.held_out(0)) + len(run.held_out(1))
    own.read_test()


class Stop(Exception):
    """Stands for anything that ends a process."""


def stopped(world: World, run: Run, step: int = 3) -> Path:
    """Train fold 2 up to a step. Returns: its checkpoint."""

    def progress(done: int, total: int, text: str) -> None:
        if done == step:
            raise Stop

    with pytest.raises(Stop):
        train_fold(run, 2, world.cache, world.device, progress=progress)
    return run.fold(2).checkpoint


@pytest.mark.parametrize("at", [0.001, 0.3, 0.99], ids=["in its hash", "in the weights", "near its end"])
def test_a_flipped_bit_in_a_checkpoint_is_found(at: float, world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path, ALWAYS)
    flip_a_bit(stopped(world, run), at)
    refused(lambda: train_fold(run, 2, world.cache, world.device), "damaged checkpoint", "Delete it to train this fold again")
    run.fold(2).checkpoint.unlink()
    assert train_fold(run, 2, world.cache, world.device).done


def test_a_checkpoint_of_another_precision_is_refused(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path, ALWAYS)
    before = stopped(world, run).read_bytes()
    half = Device(torch.device("cpu"), torch.bfloat16)
    said = ("was saved under different conditions: precision: fp32 -> bf16", "Undo the change, or delete it")
    refused(lambda: train_fold(run, 2, world.cache, half), *said)
    assert run.fold(2).checkpoint.read_bytes() == before
    assert train_fold(run, 2, world.cache, world.device).done


@pytest.fixture
def replaced(world: World, tmp_path: Path) -> Path:
    """Log-mels after one of the curated clips was replaced by another sound."""
    root, home = tmp_path / world.competition.root.name, Home(tmp_path / "home")
    shutil.copytree(world.competition.root, root)
    shutil.copytree(world.home.cache, home.cache)
    competition = load_competition(root)
    first, second = competition.curated["path"].iloc[:2]
    shutil.copy(second, first)
    cache = stages.cache(competition, home, world.recipe(), Compute(jobs=1))
    assert cache.name == world.cache.name
    return cache


def test_audio_that_was_replaced_between_two_folds_is_refused(run: Run, world: World, replaced: Path) -> None:
    said = "audio files have changed since fold 0 of run tiny was trained", "Put the old files back", "--run NAME"
    refused(lambda: train_fold(run, 2, replaced, world.device), *said)
    assert train_fold(run, 2, world.cache, world.device).done


def test_audio_that_was_replaced_is_not_predicted_by_a_model_of_the_old(run: Run, world: World, replaced: Path) -> None:
    competition, home = load_competition(replaced.parents[3] / world.competition.root.name), Home(replaced.parents[2])
    other = start_prediction(run, "other", run.recipe.predict.model_copy(update={"overlap": 0.25}))
    compute = Compute(devices=("cpu",), jobs=1)
    refused(lambda: stages.predict(other, competition, home, compute), "audio files have changed since fold 0")


def test_audio_that_was_replaced_before_a_resume_is_refused(world: World, tmp_path: Path, replaced: Path) -> None:
    run = world.start(tmp_path, ALWAYS)
    stopped(world, run)
    refused(lambda: train_fold(run, 2, replaced, world.device), "was saved under different conditions: training_audio: ")
    assert train_fold(run, 2, world.cache, world.device).done


def test_audio_files_that_were_only_copied_again_are_the_same(run: Run, world: World, tmp_path: Path) -> None:
    root, home = tmp_path / world.competition.root.name, Home(tmp_path / "home")
    shutil.copytree(world.competition.root, root)
    shutil.copytree(world.home.cache, home.cache)
    competition = load_competition(root)
    os.utime(competition.curated["path"].iloc[0])
    cache = stages.cache(competition, home, world.recipe(), Compute(jobs=1))
    assert train_fold(run, 2, cache, world.device).done


def test_a_missing_table_of_noisy_clips_is_found(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path, "train.clips=both")
    (run.folder / "noisy.csv").unlink()
    refused(lambda: open_run(run.home, "tiny"), "noisy.csv is missing")


def test_a_gradient_that_is_not_finite_stops_before_a_checkpoint_is_saved(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.start(tmp_path, ALWAYS)
    before = stopped(world, run).read_bytes()

    def poisoned(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # A finite value whose gradient is 0 * infinity.
        return bce(logits, targets) + torch.sqrt(logits.square().sum() * 0)

    monkeypatch.setitem(LOSSES, "bce", poisoned)
    with pytest.raises(MelfoldError, match="the gradient is not finite at step 2: nan in the batch of .*Lower train.lr"):
        train_fold(run, 2, world.cache, world.device)
    assert run.fold(2).checkpoint.read_bytes() == before
    assert not run.fold(2).done
    monkeypatch.undo()
    assert train_fold(run, 2, world.cache, world.device).done


def test_the_log_holds_only_what_json_can(made: Run) -> None:
    for fold in (0, 1):
        rows = [json.loads(line) for line in made.fold(fold).log.read_text().splitlines()]
        assert all(value is not None for row in rows for value in row.values())

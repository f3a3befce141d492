"""Run folders: what may be trained in one, how they are found, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from learn_world import World

from melfold.data.folds import make_folds, read_folds, write_folds
from melfold.errors import MelfoldError
from melfold.files import Home, read_json, write_json
from melfold.learn.predictions import write_current
from melfold.learn.runs import FULL, Run, open_run
from melfold.learn.start import default_run_name, start_run
from melfold.probs import make_probs


def test_a_run_is_opened_again_as_it_was_started(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path)
    again = world.start(tmp_path)
    assert (again.recipe, again.info) == (run.recipe, run.info)
    for found in (open_run(Home(tmp_path), "tiny"), open_run(Home(tmp_path / "elsewhere"), run.folder)):
        assert (found.recipe, found.info, found.folder) == (run.recipe, run.info, run.folder)
    assert {p.name for p in run.folder.iterdir()} == {"clips.csv", "recipe.json", "run.json"}


def begin(run: Run) -> None:
    """What training leaves first that is worth keeping."""
    run.fold(0).path.mkdir()
    run.fold(0).checkpoint.touch()


def test_a_run_without_a_checkpoint_or_trained_fold_is_replaced_by_a_fixed_recipe(world: World, tmp_path: Path) -> None:
    world.start(tmp_path, "train.optimizer=nosuch")
    fixed = world.start(tmp_path)
    assert open_run(Home(tmp_path), "tiny").recipe == fixed.recipe == world.recipe()


def test_a_run_of_another_melfold_is_refused_in_one_line(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path)
    current = read_json(run.folder / "run.json")
    newer = current | {"info": current["info"] | {"nosuch": 1}}
    for content in ({"competition": "x", "nosuch": 1}, newer, current | {"made_from": None}):
        write_json(run.folder / "run.json", content)
        with pytest.raises(MelfoldError, match="run tiny was made by another version of melfold") as caught:
            open_run(Home(tmp_path), "tiny")
        assert len(caught.value.lines) == 1
        assert str(caught.value).endswith("Use that version to read it, or train again under another name")


@pytest.mark.parametrize("name", ["run.json", "recipe.json", "clips.csv"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"made_from": {'], ids=["empty", "a list", "not UTF-8", "cut"])
def test_damaged_files_of_a_run_are_reported_in_one_line(name: str, content: bytes, world: World, tmp_path: Path) -> None:
    (world.start(tmp_path).folder / name).write_bytes(content)
    with pytest.raises(MelfoldError, match=name.replace(".", r"\.")) as caught:
        open_run(Home(tmp_path), "tiny")
    assert len(caught.value.lines) == 1


def test_a_fold_without_clips_is_refused_before_training(world: World, tmp_path: Path) -> None:
    folds = read_folds(world.folds, world.competition)["fold"]
    for left_out in (folds.index[folds == 1], folds.index[folds != 0], folds.index):
        table = ", ".join(f"'{fname}' = 'a test'" for fname in left_out)
        with pytest.raises(MelfoldError, match=r"data.exclude leaves a fold without clips: fold [012, ]+, \d+ of 150") as caught:
            world.start(tmp_path, f"data.exclude={{{table}}}")
        assert len(caught.value.lines) == 1
    assert not (tmp_path / "runs").exists()


def test_another_recipe_is_refused_naming_the_keys(world: World, tmp_path: Path) -> None:
    begin(world.start(tmp_path))
    with pytest.raises(MelfoldError, match="run tiny exists and was trained with different settings") as caught:
        world.start(tmp_path, "train.lr=0.5", "seed=3")
    message = str(caught.value)
    assert "train.lr: 0.002 -> 0.5" in message
    assert "seed: 0 -> 3" in message
    assert "train.epochs" not in message
    assert "--run NAME" in message


FREE = ("train.checkpoint_minutes=9", "train.validate_every=0.5")


def test_what_changes_no_weight_does_not_name_a_run(world: World) -> None:
    recipe = world.recipe()
    for sets in (FREE, ("predict.overlap=0.25", "predict.shift_seconds=[0.0, 0.1]"), ("predict.fold_mean=rank",)):
        assert world.recipe(*sets) != recipe
        assert world.recipe(*sets).fingerprint() == recipe.fingerprint()
        assert world.recipe(*sets).training() == recipe.training()
    for sets in ("seed=1", "train.crop_seconds=0.5", "train.amp=off", "noisy.per_label=3", "logmel.top_db=70.0"):
        assert world.recipe(sets).fingerprint() != recipe.fingerprint()


def test_a_run_is_continued_with_other_settings_of_checkpoints_and_validation(world: World, tmp_path: Path) -> None:
    begin(world.start(tmp_path))
    again = world.start(tmp_path, *FREE)
    assert again.recipe.train.checkpoint_minutes == 9
    assert open_run(Home(tmp_path), "tiny").recipe == again.recipe
    assert again.fold(0).checkpoint.exists()


def test_other_settings_of_prediction_are_sent_to_a_prediction_of_that_name(world: World, tmp_path: Path) -> None:
    begin(world.start(tmp_path))
    with pytest.raises(MelfoldError, match="run tiny exists and predicts with different settings: predict.overlap") as caught:
        world.start(tmp_path, "predict.overlap=0.25")
    assert "melfold predict tiny --data DATA" in str(caught.value)
    assert len(caught.value.lines) == 1
    assert open_run(Home(tmp_path), "tiny").recipe.predict.overlap == 0.5


def test_other_labels_are_refused(world: World, tmp_path: Path) -> None:
    begin(world.start(tmp_path))
    competition = world.competition
    fname = competition.curated.index[0]
    curated = competition.curated.copy()
    curated.at[fname, "labels"] = tuple(label for label in competition.labels if label not in curated.at[fname, "labels"])[:1]
    with pytest.raises(MelfoldError, match="clips: ") as caught:
        start_run(Home(tmp_path), "tiny", world.recipe(), replace(competition, curated=curated), world.folds)
    assert "fold_table" not in str(caught.value)
    with pytest.raises(MelfoldError, match="labels: "):
        start_run(Home(tmp_path), "tiny", world.recipe(), replace(competition, labels=(*competition.labels, "New")), world.folds)


def test_another_fold_table_is_refused(world: World, tmp_path: Path) -> None:
    begin(world.start(tmp_path))
    table = tmp_path / "other.csv"
    write_folds(table, make_folds(world.competition.targets(), 3, 43))
    with pytest.raises(MelfoldError, match="fold_table: "):
        start_run(Home(tmp_path), "tiny", world.recipe(), world.competition, table)


@pytest.mark.parametrize("name", ["../out", "a b", "", ".hidden"])
def test_a_name_that_is_no_folder_name_is_refused(name: str, world: World, tmp_path: Path) -> None:
    with pytest.raises(MelfoldError, match="a run's name"):
        world.start(tmp_path / "home", name=name)
    assert not list(tmp_path.iterdir())


def test_an_unknown_run_lists_the_known(world: World, tmp_path: Path) -> None:
    with pytest.raises(MelfoldError, match="no such run: nosuch in .*--home"):
        open_run(Home(tmp_path), "nosuch")
    world.start(tmp_path, name="one")
    world.start(tmp_path, name="two")
    with pytest.raises(MelfoldError, match="Known: one, two"):
        open_run(Home(tmp_path), "nosuch")


def test_the_default_name_tells_whether_the_recipe_was_changed(world: World) -> None:
    recipe = world.recipe()
    assert default_run_name(recipe, recipe) == "demo"
    changed = world.recipe("seed=1")
    assert default_run_name(changed, recipe) == f"demo-{changed.fingerprint()[:6]}"
    assert default_run_name(recipe.model_copy(update={"name": "my recipe.v2"}), recipe) == "my-recipe-v2"


def test_training_and_held_out_clips_are_disjoint_and_cover_all(world: World, tmp_path: Path) -> None:
    excluded = world.competition.curated.index[3]
    run = world.start(tmp_path, f"data.exclude={{'{excluded}'='a test'}}")
    everything = set(world.competition.curated.index) - {excluded}
    held_out = [run.held_out(fold) for fold in range(3)]
    assert sorted(f for fold in held_out for f in fold) == sorted(everything)
    for fold in range(3):
        assert set(run.trained_on(fold)) == everything - set(held_out[fold])
    assert set(run.trained_on(FULL)) == everything
    assert run.held_out(FULL) == []


def test_excluded_noisy_clips_are_left_out(world: World, tmp_path: Path) -> None:
    first, *rest = world.competition.noisy.index
    run = world.start(tmp_path, "train.clips=both", f"data.exclude={{'{first}'='a test'}}")
    assert set(run.noisy.index) == set(run.fold_targets(0)[1].index) == set(rest)


def test_the_model_of_every_clip_predicts_only_if_there_is_no_other(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path)
    for fold, used in ((FULL, [FULL]), (0, ["0"]), (2, ["0", "2"])):
        run.fold(fold).path.mkdir()
        run.fold(fold).result.touch()
        assert run.used_folds() == used


def test_pseudo_labels_are_read_by_name(world: World, tmp_path: Path) -> None:
    world.start(tmp_path, name="teacher")
    run = world.start(tmp_path, "train.clips=both", "noisy.teachers=teacher")
    labels = run.info.labels
    probs = make_probs(np.random.default_rng(0).random((3, len(labels))), list(run.noisy.index[:3]), labels)
    write_current(run.fold(0).pseudo_labels, probs[labels[::-1]], {})
    pd.testing.assert_frame_equal(run.fold_targets(0)[1], probs)

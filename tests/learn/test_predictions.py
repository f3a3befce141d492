"""Predictions: other views of the same weights beside a run's own, and when they are stale."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from learn_world import World
from safetensors.torch import load_file

from melfold import stages
from melfold.artefacts import Artefact
from melfold.combine.oof import score
from melfold.compute import Compute
from melfold.config import PredictConfig
from melfold.errors import MelfoldError
from melfold.files import Home, sha256_file
from melfold.learn import launch
from melfold.learn.predictions import (
    Prediction,
    list_predictions,
    open_prediction,
    open_predictions,
    own_prediction,
    start_prediction,
    write_current,
)
from melfold.learn.runs import Run, open_run
from melfold.learn.weights import save_weights
from melfold.probs import make_probs, read_probs, write_probs

CPU = Compute(devices=("cpu",), jobs=1)
TTA = PredictConfig(shift_seconds=(0.0, 0.1), overlap=0.25)


def predicted(world: World, prediction: Prediction, compute: Compute = CPU) -> Prediction:
    return stages.predict(prediction, world.competition, world.home, compute)


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with every fold trained, predicted by its own views and by those of `tta`. Treat it as read-only."""
    run = world.start(tmp_path_factory.mktemp("made"))
    launch.train_folds(run, range(3), world.cache, CPU)
    predicted(world, own_prediction(run))
    predicted(world, start_prediction(run, "tta", TTA))
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy that may be changed."""
    shutil.copytree(made.folder, tmp_path / "runs" / "tiny")
    return open_run(Home(tmp_path), "tiny")


def files_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of every file of a run, other predictions left out."""
    files = [p for p in folder.rglob("*") if p.is_file() and "predictions" not in p.relative_to(folder).parts]
    return {str(p.relative_to(folder)): (sha256_file(p), p.stat().st_mtime_ns) for p in files}


def test_other_views_lie_beside_the_runs_own_whose_bytes_stay(run: Run, world: World) -> None:
    before = files_of(run.folder)
    other = predicted(world, start_prediction(run, "long", PredictConfig(window_seconds=(0.64, 1.0))))
    assert other.label == "tiny@long"
    assert files_of(run.folder) == before
    assert {p.name for p in other.folder.iterdir()} == {"predict.json", "fold0", "fold1", "fold2", "test.csv", "test.json"}
    assert {p.name for p in (other.folder / "fold1").iterdir()} == {"oof.csv", "oof.json", "test.csv", "test.json"}
    own = own_prediction(run)
    for mine, theirs in ((own.read_oof(), other.read_oof()), (own.read_test(), other.read_test())):
        assert list(mine.index) == list(theirs.index)
        assert not np.allclose(mine, theirs, atol=1e-5)
    score(other)
    assert (other.oof.parent, other.scores.parent) == (other.folder, other.folder)
    assert files_of(run.folder) == before


def test_both_parts_of_a_prediction_come_from_the_same_views(run: Run, world: World) -> None:
    for prediction in (own_prediction(run), open_prediction(run.home, "tiny@tta")):
        parts = [Artefact.of(p).read()["made_from"]["predict"] for p in (prediction.fold_oof(1), prediction.fold_test(1))]
        assert parts[0] == parts[1]
        assert parts[0]["views"] == [[v.length, v.shift, v.pad] for v in prediction.recipe.views]
        assert parts[0]["overlap"] == prediction.config.overlap


def test_a_prediction_that_is_there_is_left_alone(run: Run, world: World) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")}
    for prediction in list_predictions(run):
        predicted(world, prediction)
    assert {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")} == before


def test_the_runs_own_settings_under_a_name_give_its_own_bytes(run: Run, world: World) -> None:
    own, same = own_prediction(run), predicted(world, start_prediction(run, "same", run.recipe.predict))
    for fold in range(3):
        assert same.fold_oof(fold).read_bytes() == own.fold_oof(fold).read_bytes()
        assert same.fold_test(fold).read_bytes() == own.fold_test(fold).read_bytes()
    assert same.test.read_bytes() == own.test.read_bytes()
    assert score(same).oof_lwlrap == score(own).oof_lwlrap
    assert same.oof.read_bytes() == own.oof.read_bytes()


def test_other_settings_under_a_name_that_exists_are_refused(run: Run) -> None:
    assert start_prediction(run, "tta", TTA) == open_prediction(run.home, "tiny@tta")
    with pytest.raises(MelfoldError) as caught:
        start_prediction(run, "tta", TTA.model_copy(update={"overlap": 0.5}))
    assert str(caught.value) == "prediction tiny@tta has different settings: overlap: 0.25 -> 0.5. Use another --name"
    assert open_prediction(run.home, "tiny@tta").config == TTA


@pytest.mark.parametrize("name", ["", "../out", "a/b", "a b", ".hidden", "a@b"])
def test_a_name_that_is_no_folder_name_is_refused(name: str, run: Run) -> None:
    with pytest.raises(MelfoldError, match="a prediction's name is letters, digits, dots, dashes"):
        start_prediction(run, name, TTA)
    assert len(list_predictions(run)) == 2


def test_predictions_are_opened_by_the_runs_name_or_folder(run: Run) -> None:
    own, tta = own_prediction(run), open_prediction(run.home, "tiny@tta")
    assert (own.label, tta.label) == ("tiny", "tiny@tta")
    assert (tta.name, tta.config, tta.folder) == ("tta", TTA, run.folder / "predictions" / "tta")
    assert open_prediction(run.home, "tiny") == own
    elsewhere = Home(run.home.root / "elsewhere")
    assert open_prediction(elsewhere, str(run.folder)) == own
    assert open_prediction(elsewhere, f"{run.folder}@tta") == tta
    assert list_predictions(run) == [own, tta]
    assert open_predictions(run.home, ["tiny@tta", "tiny"]) == [tta, own]
    assert tta.recipe.predict == TTA
    assert tta.recipe.training() == run.recipe.training()


def test_a_prediction_that_does_not_exist_or_is_named_twice_is_one_line(run: Run) -> None:
    with pytest.raises(
        MelfoldError, match="no such prediction: tiny@no. Known: tiny, tiny@tta. `melfold predict tiny --name no`"
    ):
        open_prediction(run.home, "tiny@no")
    with pytest.raises(MelfoldError, match="no such run: other"):
        open_prediction(run.home, "other@tta")
    with pytest.raises(MelfoldError, match="a run is named twice: tiny, tiny. Name each once"):
        open_predictions(run.home, ["tiny", "tiny"])
    (run.folder / "predictions" / "tta" / "predict.json").write_text('{"overlap": 7}')
    with pytest.raises(MelfoldError, match="predict.json holds no prediction settings") as caught:
        open_prediction(run.home, "tiny@tta")
    assert len(caught.value.lines) == 1


def test_changed_weights_make_every_prediction_stale_and_predict_renews_them(run: Run, world: World) -> None:
    folder = run.fold(1)
    made_from = folder.verify()["made_from"]
    weights = load_file(folder.weights)
    save_weights(folder.weights, weights | {"head.bias": weights["head.bias"] + 1})
    folder.artefact.commit(made_from)
    for label in ("tiny", "tiny@tta"):
        prediction = open_prediction(run.home, label)
        before = prediction.fold_oof(1).read_bytes(), prediction.fold_test(1).read_bytes(), prediction.test.read_bytes()
        untouched = prediction.fold_oof(0).stat().st_mtime_ns, prediction.fold_test(0).stat().st_mtime_ns
        for read, what in ((prediction.read_oof, "out-of-fold"), (prediction.read_test, "test")):
            with pytest.raises(MelfoldError) as caught:
                read()
            (line,) = caught.value.lines
            assert line.startswith(f"{label} has no current {what} predictions: ")
            assert "weights: " in line
            assert line.endswith(f"Run `melfold predict {label} --data DATA`")
        with pytest.raises(MelfoldError, match="has no current out-of-fold predictions"):
            score(prediction)
        predicted(world, prediction)
        assert len(prediction.read_oof()) == len(world.competition.curated)
        assert len(prediction.read_test()) == len(world.competition.test)
        after = prediction.fold_oof(1).read_bytes(), prediction.fold_test(1).read_bytes(), prediction.test.read_bytes()
        assert all(a != b for a, b in zip(before, after, strict=True))
        assert (prediction.fold_oof(0).stat().st_mtime_ns, prediction.fold_test(0).stat().st_mtime_ns) == untouched


def test_one_more_fold_makes_the_averaged_test_probabilities_stale(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path)
    launch.train_folds(run, [0], world.cache, CPU)
    own = predicted(world, own_prediction(run))
    own.read_test()
    launch.train_folds(run, [1], world.cache, CPU)
    with pytest.raises(MelfoldError, match="tiny has no current test predictions: .*folds.1: none -> "):
        own.read_test()
    assert len(predicted(world, own).read_test()) == len(world.competition.test)


def test_the_fold_mean_is_part_of_a_prediction(run: Run, world: World) -> None:
    own = own_prediction(run)
    other = predicted(world, start_prediction(run, "rank", run.recipe.predict.model_copy(update={"fold_mean": "rank"})))
    for fold in range(3):
        assert other.fold_test(fold).read_bytes() == own.fold_test(fold).read_bytes()
    assert other.test.read_bytes() != own.test.read_bytes()


def test_progress_counts_the_clips_of_a_fold_in_all_views(run: Run, world: World) -> None:
    shutil.rmtree(run.fold(2).path)
    told: list[tuple[int, int, str]] = []
    config = PredictConfig(shift_seconds=(0.0, 0.2), batch_size=4)
    compute = Compute(devices=("cpu",), jobs=1, progress=lambda *what: told.append(what))
    predicted(world, start_prediction(run, "told", config), compute)
    for number, fold in enumerate((0, 1), 1):
        text, clips = f"tiny@told fold {fold}, {number} of 2: predicting", len(run.held_out(fold)) + len(world.competition.test)
        counts = [done for done, total, said in told if (total, said) == (2 * clips, text)]
        assert counts == sorted(counts)
        assert len(counts) > 2 * clips / 4
        assert counts[-1] == 2 * clips


def test_processes_of_several_devices_predict_the_same_bytes(run: Run, world: World) -> None:
    for fold in (1, 2):
        shutil.rmtree(run.fold(fold).path)
    config = PredictConfig(shift_seconds=(0.0, 0.2))
    one = predicted(world, start_prediction(run, "one", config))
    two = predicted(world, start_prediction(run, "two", config), Compute(devices=("cpu", "cpu"), jobs=1))
    assert two.fold_oof(0).read_bytes() == one.fold_oof(0).read_bytes()
    assert two.fold_test(0).read_bytes() == one.fold_test(0).read_bytes()
    assert two.test.read_bytes() == one.test.read_bytes()


def test_a_run_that_is_not_trained_cannot_predict(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path)
    with pytest.raises(MelfoldError, match="run tiny has no trained fold: .*Run `melfold train` first"):
        predicted(world, own_prediction(run))
    with pytest.raises(MelfoldError, match="run tiny has no trained fold"):
        own_prediction(run).read_oof()


def one(value: float) -> pd.DataFrame:
    return make_probs(np.full((1, 1), value), ["x.wav"], ["Bark"])


def test_a_table_is_current_for_its_inputs_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    artefact = Artefact.of(path)
    assert not artefact.is_fresh({"a": 1})
    write_current(path, one(0.25), {"a": 1})
    assert artefact.is_fresh({"a": 1})
    pd.testing.assert_frame_equal(read_probs(path), one(0.25))
    assert not artefact.is_fresh({"a": 2})
    write_probs(path, one(0.5))
    assert not artefact.is_fresh({"a": 1})

"""Students of several teachers, in rounds: what they learn from, and that no held-out label reaches them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from learn_world import TINY, World, relabelled
from safetensors.torch import load_file, save_file

from melfold import stages
from melfold.compute import Compute
from melfold.config import NoisyConfig
from melfold.data.competition import Competition, load_competition
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.learn.fold_data import FoldData
from melfold.learn.noisy import calibrated, make_pseudo_labels, missing_labels, soft_targets
from melfold.learn.normalise import statistics
from melfold.learn.predict import predict_probs, sigmoid
from melfold.learn.runs import FULL, Run, open_run
from melfold.learn.start import start_run
from melfold.learn.train import load_fold, train_fold
from melfold.probs import make_probs, mean_probs, read_probs
from melfold.recipes import change_recipe, load_recipe

JOINT = ("train.clips=both", "train.curated_times=2", "train.epochs=0.1", 'phases=[{}, {clips = "curated", epochs = 0.2}]')
SOFT = ("noisy.missing=0.05", "noisy.power=2", "noisy.top=6", "noisy.pseudo=0.25")


def named(values: object, prefix: str = "n") -> pd.DataFrame:
    array = np.array(values, np.float32)
    names = pd.Index([f"{prefix}{i}.wav" for i in range(len(array))], name="fname")
    return pd.DataFrame(array, index=names, columns=list("ABCD")[: array.shape[1]])


def as_probs(table: pd.DataFrame) -> pd.DataFrame:
    return make_probs(table.to_numpy(), list(table.index), list(table.columns))


def test_calibration_finds_the_number_that_a_ranking_loss_leaves_undecided() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 2, (50, 4))
    targets = named(rng.random((50, 4)) < 0.3)
    one, other = (calibrated(as_probs(named(sigmoid(logits + add))), targets) for add in (0, 3))
    assert float(one.to_numpy().sum()) == pytest.approx(float(targets.to_numpy().sum()), rel=1e-5)
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert (np.argsort(one.to_numpy(), axis=1) == np.argsort(logits, axis=1)).all()


def test_of_the_clips_without_a_label_the_likeliest_are_taken_to_lack_it() -> None:
    targets = named([[1, 0], [0, 0], [0, 1], [0, 0], [0, 1]], "c")
    probs = named([[0.9, 0.1], [0.2, 0.3], [0.6, 0.8], [0.1, 0.2], [0.6, 0.9]], "c")
    lacking = missing_labels(targets, as_probs(probs), 0.5)
    assert [(f, label) for f in lacking.index for label in "AB" if lacking.at[f, label]] == [
        ("c1.wav", "B"),
        ("c2.wav", "A"),
        ("c4.wav", "A"),
    ]
    assert not missing_labels(targets, as_probs(probs), 0.2).to_numpy()[:, 1].any(), "a fifth of three clips is none"


def test_soft_targets_are_a_share_of_the_sharpened_probabilities() -> None:
    noisy, curated = named([[1, 0], [0, 1]]), named([[1, 0], [0, 1], [0, 1]], "c")
    probs = as_probs(pd.concat([named([[0.5, 0.4], [0.2, 0.8]]), named([[0.9, 0.5], [0.6, 0.8], [0.1, 0.9]], "c")]))
    config = NoisyConfig(teachers="t", pseudo=0.25, power=2, missing=0.5)
    found = soft_targets(noisy, curated, probs, config)
    assert list(found.index) == ["n0.wav", "n1.wav", "c1.wav"]
    np.testing.assert_allclose(found.loc["n0.wav"], [0.75 + 0.25 * 0.25, 0.25 * 0.16], rtol=1e-6)
    np.testing.assert_allclose(found.loc["c1.wav"], [0.36, 1.0], rtol=1e-6)


def trained(world: World, root: Path, name: str, *sets: str, fold: int = 0) -> Run:
    run = start_run(Home(root), name, world.recipe(*sets), world.competition, world.folds)
    train_fold(run, fold, world.cache, world.device)
    return run


def test_teachers_are_averaged_each_in_its_own_way(world: World, tmp_path: Path) -> None:
    """One knows the noisy clips' own statistics and learned by a ranking loss, the other has seen curated clips only."""
    a = trained(world, tmp_path, "a", *JOINT, "train.loss=lsep")
    b = trained(world, tmp_path, "b", "seed=1")
    sets = ('noisy.teachers=["a", "b"]', "noisy.missing=0.05", "noisy.pseudo=1", "noisy.top=0", "noisy.per_label=0")
    student = start_run(Home(tmp_path), "student", world.recipe(*JOINT, *sets), world.competition, world.folds)
    make_pseudo_labels(student, 0, [world.cache] * 2, world.device)
    assert student.info.teachers == [f"{run.name} {run.recipe.fingerprint()}" for run in (a, b)]

    noisy, own = list(world.competition.noisy.index), student.trained_on(0)
    labels = student.info.labels

    def predict(run: Run, clips: list[str], apart: bool = False) -> pd.DataFrame:
        model, store = load_fold(run, "0", world.device), world.store(clips)
        if apart:
            model.normalise.set(*statistics(store, bands=False))
        return predict_probs(model, store, labels, run.recipe, world.device)

    targets = pd.concat([student.targets(own), world.competition.targets("noisy")])
    by_a = calibrated(pd.concat([predict(a, own), predict(a, noisy, apart=True)]), targets)
    by_b = pd.concat([predict(b, own), predict(b, noisy)])
    wanted = mean_probs([by_a, by_b], "geometric")
    found = read_probs(student.fold(0).pseudo_labels)
    np.testing.assert_allclose(found.loc[noisy], wanted.loc[noisy], atol=1e-6)

    # The curated clips' targets are the table's, but for the labels that they probably lack.
    data = FoldData(student, "0", world.cache)
    learned = pd.DataFrame(data.targets[: data.curated], own, labels)
    table = student.targets(own)
    lacking = missing_labels(table, wanted.loc[own], 0.05)
    assert lacking.to_numpy().sum() > 5
    np.testing.assert_allclose(learned, table.where(~lacking, wanted.loc[own]), atol=1e-6)
    assert set(found.index) == {*noisy, *lacking.index[lacking.any(axis=1)]}


def test_pseudo_labels_of_other_weights_are_not_kept(world: World, tmp_path: Path) -> None:
    teacher = trained(world, tmp_path, "teacher")
    student = start_run(Home(tmp_path), "student", world.recipe(*JOINT, "noisy.teachers=teacher"), world.competition, world.folds)
    make_pseudo_labels(student, 0, [world.cache], world.device)
    before = student.fold(0).pseudo_labels.read_bytes()
    folder = teacher.fold(0)
    weights = load_file(folder.weights)
    save_file(weights | {"head.weight": 2 * weights["head.weight"]}, folder.weights)
    folder.artefact.commit(folder.artefact.read()["made_from"])  # as if it had been trained again
    make_pseudo_labels(student, 0, [world.cache], world.device)
    assert student.fold(0).pseudo_labels.read_bytes() != before


def rounds_of(world: World, root: Path, competition: Competition, fold: int) -> dict[str, bytes]:
    """Two teachers and two rounds of their students: the weights, and the targets."""
    home, found = Home(root), {}
    recipes = {"a": world.recipe(*JOINT), "b": world.recipe(*JOINT, "train.loss=lsep", "seed=1")}
    for number in range(3):
        for name, recipe in recipes.items():
            run = start_run(home, f"{name}{number}", recipe, competition, world.folds)
            if number:
                make_pseudo_labels(run, fold, [world.cache] * 2, world.device)
                found[f"targets of {run.name}"] = run.fold(fold).pseudo_labels.read_bytes()
            found[run.name] = train_fold(run, fold, world.cache, world.device).weights.read_bytes()
        teachers = json.dumps([f"{name}{number}" for name in recipes])
        recipes = {name: change_recipe(recipe, [f"noisy.teachers={teachers}", *SOFT]) for name, recipe in recipes.items()}
    return found


def test_in_no_round_does_a_curated_clips_label_reach_a_model_that_scores_it(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path / "look")
    before = rounds_of(world, tmp_path / "a", world.competition, 1)
    # Every label of the clips that fold 1 is scored on is another one: teachers, targets and students are the same to the byte.
    assert rounds_of(world, tmp_path / "b", relabelled(world.competition, run.held_out(1)), 1) == before
    # Those of the clips it learns from change all of them: the test can tell.
    after = rounds_of(world, tmp_path / "c", relabelled(world.competition, run.trained_on(1)), 1)
    assert [name for name in before if before[name] == after[name]] == []
    soft = read_probs(tmp_path / "a" / "runs" / "a2" / "fold1" / "pseudo_labels.csv").index
    assert set(soft) & set(run.trained_on(1)), "curated clips have soft targets"
    assert not set(soft) & set(run.held_out(1))


def test_a_full_student_learns_from_all_models_of_its_teachers(world: World, tmp_path: Path) -> None:
    a = trained(world, tmp_path, "a")
    train_fold(a, 1, world.cache, world.device)
    trained(world, tmp_path, "b", "seed=1")
    sets = ('noisy.teachers=["a", "b"]', "noisy.pseudo=1", "noisy.top=0", "noisy.per_label=0", *JOINT)
    student = start_run(Home(tmp_path), "student", world.recipe(*sets), world.competition, world.folds)
    make_pseudo_labels(student, FULL, [world.cache] * 2, world.device)
    tables = [
        read_probs(open_run(Home(tmp_path), name).fold(fold).teacher_probs) for name, fold in (("a", 0), ("a", 1), ("b", 0))
    ]
    found = read_probs(student.fold(FULL).pseudo_labels)
    np.testing.assert_allclose(found, mean_probs(tables, "geometric").loc[found.index], atol=1e-6)
    with pytest.raises(MelfoldError, match="fold 1 of teacher b is not trained"):
        make_pseudo_labels(student, 1, [world.cache] * 2, world.device)


def test_rounds_are_ordinary_runs_that_continue_where_they_were_stopped(
    tmp_path: Path, tiny_download: Callable[..., Path]
) -> None:
    home, competition = Home(tmp_path / "home"), load_competition(tiny_download(curated=12, noisy=6))
    quiet = Compute(("cpu",), jobs=1)
    recipe = load_recipe("demo", [*TINY, "folds.n_folds=2", "train.epochs=2"])
    for name in ("a", "b-r1"):
        stages.train(competition, home, recipe, name, [0, 1], quiet)
    assert [run.name for run in stages.students(home, ["a", "b-r1"], 1, SOFT, quiet)] == ["a-r1", "b-r2"]
    before = {path: path.stat().st_mtime_ns for path in home.runs.glob("*/*/weights.safetensors")}

    def stop(done: int, total: int, text: str) -> None:
        if text.startswith("b-r3 fold 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.students(home, ["a", "b-r1"], 2, SOFT, replace(quiet, progress=stop))
    assert open_run(home, "b-r3").missing_folds() == [1]
    last = stages.students(home, ["a", "b-r1"], 2, SOFT, quiet)
    assert [run.name for run in last] == ["a-r2", "b-r3"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for run in last:
        assert not run.missing_folds()
        assert (run.recipe.noisy.teachers, run.recipe.train.clips, run.recipe.noisy.power) == (("a-r1", "b-r2"), "both", 2)
    with pytest.raises(MelfoldError, match="run a-r1 exists and was trained with different settings: noisy.power: 2.0 -> 3.0"):
        stages.students(home, ["a", "b-r1"], 2, [*SOFT, "noisy.power=3"], quiet)

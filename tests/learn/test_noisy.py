"""The noisy set: what is chosen from it and how it is learnt from, and that no held-out label leaks through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from learn_world import World, relabelled
from safetensors.torch import load_file

from melfold import stages
from melfold.compute import Compute
from melfold.config import NoisyConfig
from melfold.data.cache import build_cache
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.learn import fold_data, launch
from melfold.learn.model import build_model
from melfold.learn.noisy import make_pseudo_labels, select_noisy
from melfold.learn.predictions import write_current
from melfold.learn.runs import FULL, open_run
from melfold.learn.start import start_run
from melfold.learn.train import load_fold, train_fold
from melfold.probs import make_probs, read_probs, write_probs

JOINT = ("train.clips=both", "train.curated_times=2", "train.epochs=0.2", 'phases=[{}, {clips = "curated", epochs = 0.4}]')
STUDENT = (*JOINT, "noisy.teachers=teacher", "noisy.top=6", "noisy.per_label=2", "noisy.pseudo=0.5")


def named(values: object, labels: str = "ABC") -> pd.DataFrame:
    array = np.array(values, np.float32)
    return pd.DataFrame(array, index=pd.Index([f"n{i}.wav" for i in range(len(array))], name="fname"), columns=list(labels))


def chosen(targets: pd.DataFrame, judged: pd.DataFrame, **config: int) -> list[str]:
    given = NoisyConfig(teachers="t", **config)
    return select_noisy(targets, make_probs(judged.to_numpy(), list(judged.index), list(judged.columns)), given)


def test_the_clips_a_teacher_agrees_with_most_are_kept() -> None:
    targets = named([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1]])
    judged = named([[0.9, 0.1, 0.1], [0.2, 0.9, 0.1], [0.1, 0.8, 0.1], [0.1, 0.9, 0.3]])
    assert chosen(targets, judged, top=1, per_label=0) == ["n0.wav"]
    # The fourth by the geometric mean of its two labels: .52.
    assert chosen(targets, judged, top=3, per_label=0) == ["n0.wav", "n2.wav", "n3.wav"]
    assert chosen(targets, judged, top=0, per_label=0) == list(targets.index)


def test_agreement_is_a_mean_over_a_clips_labels() -> None:
    targets, judged = named([[1, 1, 0], [0, 0, 1]]), named([[0.6, 0.6, 0.1], [0.1, 0.1, 0.5]])
    assert chosen(targets, judged, top=1, per_label=0) == ["n0.wav"], "two labels of .6 are more than one of .5"


def test_no_label_has_more_clips_than_it_may() -> None:
    rng = np.random.default_rng(0)
    targets = named(np.eye(3)[rng.integers(0, 3, 60)] + np.eye(3)[rng.integers(0, 3, 60)] > 0)
    kept = chosen(targets, named(rng.random((60, 3))), top=20, per_label=5)
    assert targets.loc[kept].sum().max() == 5
    assert len(kept) <= 15


def test_of_equals_the_first_names_are_kept() -> None:
    targets = named([[1, 0, 0]] * 4)
    assert chosen(targets.iloc[::-1], named([[0.5] * 3] * 4), top=2, per_label=0) == ["n0.wav", "n1.wav"]


def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The clips of each batch that is trained on from now on."""
    seen: list[list[str]] = []
    batches = fold_data.train_batches

    def spy(store: object, *args: object, **kwargs: object) -> Iterator[object]:
        for batch in batches(store, *args, **kwargs):
            seen.append([store.fnames[row] for row in batch.rows])
            yield batch

    monkeypatch.setattr(fold_data, "train_batches", spy)
    return seen


def test_curated_clips_are_drawn_as_often_as_asked_and_alone_at_the_end(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = shown(monkeypatch)
    run = world.start(tmp_path, "train.epochs=1", "phases.0={clips = 'both', curated_times = 3}", "phases.1.clips=curated")
    train_fold(run, 0, world.cache, world.device)
    curated, noisy = set(run.trained_on(0)), set(world.competition.noisy.index)
    drawn = 3 * len(curated) + len(noisy)
    first, last = seen[: -(-drawn // 16)], seen[-(-drawn // 16) :]
    counts = Counter([fname for batch in first for fname in batch][:drawn])
    assert {counts[fname] for fname in curated} == {3}
    assert {counts[fname] for fname in noisy} == {1}
    assert {fname for batch in last for fname in batch} == curated
    assert not set(run.held_out(0)) & set(counts)


def test_what_only_the_noisy_set_needs_is_thrown_away(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path, *JOINT)
    folder = train_fold(run, 0, world.cache, world.device)
    assert not [name for name in load_file(folder.weights) if "noisy" in name]
    assert load_fold(run, "0", world.device).head.out_features == len(run.info.labels)
    assert (run.info.data, run.info.track) == ("curated and noisy", "scratch")


@pytest.mark.parametrize("change", ["noisy.own_norm=false", "noisy.own_head=false", "noisy.bootstrap=0.5"])
def test_each_setting_changes_what_is_learnt(world: World, tmp_path: Path, change: str, joint: bytes) -> None:
    run = world.start(tmp_path, *JOINT, change)
    assert train_fold(run, 0, world.cache, world.device).weights.read_bytes() != joint


@pytest.fixture(scope="module")
def joint(world: World, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = world.start(tmp_path_factory.mktemp("joint"), *JOINT)
    return train_fold(run, 0, world.cache, world.device).weights.read_bytes()


def test_a_stop_in_either_phase_changes_nothing(world: World, tmp_path: Path, joint: bytes) -> None:
    run = world.start(tmp_path, *JOINT, "train.checkpoint_minutes=0")

    for step in (2, 5):

        def stop(done: int, total: int, text: str, step: int = step) -> None:
            if done == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_fold(run, 0, world.cache, world.device, progress=stop)
    assert train_fold(run, 0, world.cache, world.device).weights.read_bytes() == joint


def learned(world: World, root: Path, competition: Competition, fold: int) -> tuple[bytes, bytes, bytes]:
    """A teacher's and a student's weights of a fold, and the pseudo labels between them."""
    home = Home(root)
    teacher = start_run(home, "teacher", world.recipe(*JOINT), competition, world.folds)
    train_fold(teacher, fold, world.cache, world.device)
    student = start_run(home, "student", world.recipe(*STUDENT), competition, world.folds)
    make_pseudo_labels(student, fold, [world.cache], world.device)
    train_fold(student, fold, world.cache, world.device)
    return tuple(
        p.read_bytes() for p in (teacher.fold(fold).weights, student.fold(fold).pseudo_labels, student.fold(fold).weights)
    )


def test_without_a_head_of_its_own_no_tensor_is_shared(world: World) -> None:
    # Else the moving average would take two steps at a time for it.
    recipe = world.recipe()
    model = build_model(recipe.model, 10, recipe.logmel.n_mels, recipe.crop_frames)
    model.normalise.set_noisy(-40.0, 10.0)
    state = [value for value in model.state_dict().values() if value.numel() > 1]
    assert len({value.data_ptr() for value in state}) == len(state)


def test_a_teacher_may_have_another_front_end(world: World, tmp_path: Path) -> None:
    home = Home(tmp_path)
    recipe = world.recipe("logmel.n_mels=40", "logmel.hop_length=400", "train.crop_seconds=0.8")
    folder = build_cache(world.competition, recipe.logmel, home, splits=["curated", "noisy"], compute=Compute(jobs=1))
    teacher = start_run(home, "teacher", recipe, world.competition, world.folds)
    train_fold(teacher, 0, folder, world.device)
    student = start_run(home, "student", world.recipe(*STUDENT), world.competition, world.folds)
    make_pseudo_labels(student, 0, [folder], world.device)
    assert train_fold(student, 0, world.cache, world.device).done
    assert len(read_probs(teacher.fold(0).teacher_probs)) == len(world.competition.noisy)


def test_a_student_does_not_continue_under_other_pseudo_labels(world: World, tmp_path: Path) -> None:
    teacher = start_run(Home(tmp_path), "teacher", world.recipe(), world.competition, world.folds)
    train_fold(teacher, 0, world.cache, world.device)
    student = world.start(tmp_path, *STUDENT, "train.checkpoint_minutes=0", name="student")
    make_pseudo_labels(student, 0, [world.cache], world.device)

    def stop(done: int, total: int, text: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_fold(student, 0, world.cache, world.device, progress=stop)
    before = student.fold(0).pseudo_labels.stat().st_mtime_ns
    make_pseudo_labels(student, 0, [world.cache], world.device)
    assert student.fold(0).pseudo_labels.stat().st_mtime_ns == before, "the same pseudo labels are not made again"
    labels = read_probs(student.fold(0).pseudo_labels)
    write_probs(student.fold(0).pseudo_labels, labels.iloc[1:])
    with pytest.raises(MelfoldError, match="pseudo_labels.csv was changed after it was written") as caught:
        train_fold(student, 0, world.cache, world.device)
    assert len(caught.value.lines) == 1
    write_current(student.fold(0).pseudo_labels, labels.iloc[1:], {})
    with pytest.raises(MelfoldError, match="was saved under different conditions: pseudo_labels: ") as caught:
        train_fold(student, 0, world.cache, world.device)
    assert len(caught.value.lines) == 1


def test_pseudo_labels_hold_the_chosen_clips_and_soft_targets(world: World, tmp_path: Path) -> None:
    learned(world, tmp_path, world.competition, 0)
    student, teacher = (open_run(Home(tmp_path), name) for name in ("student", "teacher"))
    labels = read_probs(student.fold(0).pseudo_labels)
    assert len(labels) <= 6
    table = world.competition.targets("noisy").loc[labels.index]
    assert table.sum().max() <= 2
    judged = read_probs(teacher.fold(0).teacher_probs).loc[labels.index]
    np.testing.assert_allclose(labels, (table + judged) / 2, atol=1e-6)
    assert set(read_probs(teacher.fold(0).teacher_probs).index) == set(world.competition.noisy.index)


def test_a_teacher_must_have_the_same_folds(world: World, tmp_path: Path) -> None:
    other = relabelled(world.competition, [world.competition.curated.index[0]])
    start_run(Home(tmp_path), "teacher", world.recipe(), other, world.folds)
    with pytest.raises(MelfoldError, match="a teacher must have the same folds and labels: teacher"):
        world.start(tmp_path, *STUDENT)
    with pytest.raises(MelfoldError, match="no such run: teacher"):
        world.start(tmp_path / "empty", *STUDENT)


def test_a_student_is_no_stricter_than_its_teacher(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"any")
    sets = f"model.weights=file:{tmp_path / 'w.safetensors'}"
    teacher = world.start(tmp_path, sets, "model.licence=CC-BY-NC-4.0", name="teacher")
    assert (teacher.info.track, teacher.info.licence) == ("open", "CC-BY-NC-4.0")
    student = world.start(tmp_path, *STUDENT)
    assert (student.recipe.track, student.info.track, student.info.licence) == ("scratch", "open", "CC-BY-NC-4.0")
    assert student.info.teachers == [f"teacher {teacher.recipe.fingerprint()}"]


def test_a_full_student_may_learn_from_the_mean_of_the_folds(world: World, tmp_path: Path) -> None:
    learned(world, tmp_path, world.competition, 0)
    student = open_run(Home(tmp_path), "student")
    make_pseudo_labels(student, FULL, [world.cache], world.device)
    assert len(read_probs(student.fold(FULL).pseudo_labels))
    with pytest.raises(MelfoldError, match="fold 2 of teacher teacher is not trained"):
        make_pseudo_labels(student, 2, [world.cache], world.device)


def test_without_noisy_clips_a_recipe_that_wants_them_is_refused(world: World, tmp_path: Path) -> None:
    without = replace(world.competition, noisy=world.competition.noisy.iloc[:0])
    with pytest.raises(MelfoldError, match="this download has no noisy clips"):
        stages.start(without, Home(tmp_path), world.recipe("train.clips=both"), "tiny", [0])
    assert not list(tmp_path.iterdir())


def test_corrections_are_learnt_from_and_not_scored_by(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path / "plain")
    fname = run.trained_on(0)[0]
    label = next(name for name in run.info.labels if name not in run.clips.at[fname, "labels"])
    (tmp_path / "corrections.csv").write_text(f"fname,labels,why\n{fname},{label},heard it\n")
    corrected = world.start(tmp_path, f"data.corrections={tmp_path / 'corrections.csv'}")
    assert corrected.recipe.fingerprint() != run.recipe.fingerprint()
    assert list(corrected.train_targets([fname]).columns[corrected.train_targets([fname]).iloc[0] > 0]) == [label]
    pd.testing.assert_frame_equal(corrected.targets([fname]), run.targets([fname]))
    pd.testing.assert_frame_equal(corrected.train_targets(run.trained_on(0)[1:]), run.targets(run.trained_on(0)[1:]))
    (tmp_path / "corrections.csv").write_text("fname,labels,why\nnosuch.wav,Nothing,\n")
    recipe = world.recipe(f"data.corrections={tmp_path / 'corrections.csv'}")
    with pytest.raises(MelfoldError) as caught:
        stages.start(world.competition, Home(tmp_path), recipe, "bad", [0])
    assert [line.split(". ")[0] for line in caught.value.lines] == [
        "a correction names no curated clip: nosuch.wav",
        "a correction has an unknown label: nosuch.wav: 'Nothing'",
    ]


def test_changed_pseudo_labels_are_made_again_by_the_next_training_job(world: World, tmp_path: Path) -> None:
    learned(world, tmp_path, world.competition, 0)
    student, teacher = (open_run(Home(tmp_path), name) for name in ("student", "teacher"))
    student.fold(0).artefact.remove()
    path = student.fold(0).pseudo_labels
    before = path.read_bytes()
    write_probs(path, read_probs(path).iloc[1:])
    make_pseudo_labels(student, 0, [world.cache], world.device)
    assert path.read_bytes() == before
    write_probs(teacher.fold(0).teacher_probs, read_probs(teacher.fold(0).teacher_probs) / 2)
    path.unlink()
    make_pseudo_labels(student, 0, [world.cache], world.device)
    assert path.read_bytes() == before, "edited predictions of the teacher are not used"


def test_a_student_without_pseudo_labels_is_not_trained(world: World, tmp_path: Path) -> None:
    start_run(Home(tmp_path), "teacher", world.recipe(), world.competition, world.folds)
    student = world.start(tmp_path, *STUDENT, name="student")
    with pytest.raises(MelfoldError, match="fold 0 of student has no pseudo labels: .*`melfold train` makes them"):
        train_fold(student, 0, world.cache, world.device)


def test_an_edited_list_of_noisy_clips_is_found(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path, "train.clips=both")
    path = run.folder / "noisy.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(MelfoldError, match="noisy.csv was changed after it was written") as caught:
        open_run(Home(tmp_path), "tiny")
    assert len(caught.value.lines) == 1


def test_the_launcher_makes_pseudo_labels_where_it_trains(world: World, tmp_path: Path) -> None:
    home, sets = Home(tmp_path / "a"), "train.amp=off"
    start_run(home, "teacher", world.recipe(*JOINT, sets), world.competition, world.folds)
    launch.train_folds(open_run(home, "teacher"), [0], world.cache, Compute(devices=("cpu",)))
    student = start_run(home, "student", world.recipe(*STUDENT, sets), world.competition, world.folds)
    launch.train_folds(student, [0], world.cache, Compute(devices=("cpu",)), teacher_caches=[world.cache])
    assert student.done_folds() == ["0"]
    by_hand = learned(world, tmp_path / "b", world.competition, 0)[1]
    assert student.fold(0).pseudo_labels.read_bytes() == by_hand

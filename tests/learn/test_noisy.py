"""The noisy set: what is chosen from it and how it is learnt from, and that no held-out label leaks through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from learn_world import World
from safetensors.torch import load_file

from melfold.compute import Compute
from melfold.config import NoisyConfig
from melfold.data.cache import build_cache
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.learn import train
from melfold.learn.model import build_model
from melfold.learn.noisy import doubtful, select_noisy, teach
from melfold.learn.runs import FULL, open_run, start_run
from melfold.learn.train import load_fold, train_fold
from melfold.probs import make_probs, read_probs, write_probs

JOINT = ("noisy.use=true", "noisy.curated_times=2", "train.epochs=0.2", "noisy.curated_epochs=0.4")
STUDENT = (*JOINT, "noisy.teacher=teacher", "noisy.top=6", "noisy.per_label=2", "noisy.pseudo=0.5")


def named(values: object, labels: str = "ABC") -> pd.DataFrame:
    array = np.array(values, np.float32)
    return pd.DataFrame(array, index=pd.Index([f"n{i}.wav" for i in range(len(array))], name="fname"), columns=list(labels))


def chosen(targets: pd.DataFrame, judged: pd.DataFrame, **config: int) -> list[str]:
    given = NoisyConfig(use=True, teacher="t", **config)
    return select_noisy(targets, make_probs(judged.to_numpy(), list(judged.index), list(judged.columns)), given)


def test_the_clips_a_teacher_agrees_with_most_are_kept() -> None:
    targets = named([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1]])
    judged = named([[0.9, 0.1, 0.1], [0.2, 0.9, 0.1], [0.1, 0.8, 0.1], [0.1, 0.9, 0.3]])
    assert chosen(targets, judged, top=1, per_label=0) == ["n0.wav"]
    # The fourth by the geometric mean of its two labels: .52.
    assert chosen(targets, judged, top=3, per_label=0) == ["n0.wav", "n2.wav", "n3.wav"]
    assert chosen(targets, judged, top=0, per_label=0) == list(targets.index)


def test_no_label_has_more_clips_than_it_may() -> None:
    rng = np.random.default_rng(0)
    targets = named(np.eye(3)[rng.integers(0, 3, 60)] + np.eye(3)[rng.integers(0, 3, 60)] > 0)
    kept = chosen(targets, named(rng.random((60, 3))), top=20, per_label=5)
    assert targets.loc[kept].sum().max() == 5
    assert len(kept) <= 15


def test_of_equals_the_first_names_are_kept() -> None:
    targets = named([[1, 0, 0]] * 4)
    assert chosen(targets.iloc[::-1], named([[0.5] * 3] * 4), top=2, per_label=0) == ["n0.wav", "n1.wav"]


def test_wrong_and_missing_labels_are_found() -> None:
    rng = np.random.default_rng(1)
    truth = np.eye(4)[rng.integers(0, 4, 200)]
    # A good model: high where the truth is, low elsewhere.
    oof = named(np.clip(np.where(truth > 0, 0.8, 0.05) + rng.normal(0, 0.02, truth.shape), 0, 1), "ABCD")
    labels = truth.copy()
    wrong, lacking = 3, 7
    labels[wrong] = np.roll(truth[wrong], 1)  # the true label replaced
    labels[lacking] = np.roll(truth[lacking], 1) + truth[lacking]
    both = oof.copy()
    both.iloc[lacking] = np.where(labels[lacking] > 0, 0.9, 0.05).astype(np.float32)
    labels[lacking] = truth[lacking]  # two sounds are heard, one is labelled
    found = doubtful(named(labels, "ABCD"), both)
    rows = found.loc[["n3.wav", "n7.wav"]]
    assert list(rows["suggested"]) == [
        tuple(np.array(list("ABCD"))[truth[wrong] > 0]),
        tuple(np.array(list("ABCD"))[both.iloc[lacking].to_numpy() > 0.5]),
    ]
    assert rows.loc["n3.wav", "wrong"] == tuple(np.array(list("ABCD"))[labels[wrong] > 0])
    assert rows.loc["n7.wav", "wrong"] == ()
    assert set(found.index[:1]) <= {"n3.wav", "n7.wav"}
    assert found["doubt"].is_monotonic_decreasing


def test_a_label_that_no_clip_has_is_never_missing() -> None:
    assert doubtful(named([[1, 0], [1, 0]], "AB"), named([[0.9, 0.99], [0.9, 0.99]], "AB")).empty


def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The clips of each batch that is trained on from now on."""
    seen: list[list[str]] = []
    batches = train.train_batches

    def spy(store: object, *args: object, **kwargs: object) -> Iterator[object]:
        for batch in batches(store, *args, **kwargs):
            seen.append([store.fnames[row] for row in batch.rows])
            yield batch

    monkeypatch.setattr(train, "train_batches", spy)
    return seen


def test_curated_clips_are_drawn_as_often_as_asked_and_alone_at_the_end(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = shown(monkeypatch)
    run = world.start(tmp_path, "noisy.use=true", "noisy.curated_times=3", "train.epochs=1", "noisy.curated_epochs=1")
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


def relabelled(competition: Competition, fnames: list[str]) -> Competition:
    """The same clips, those named with other labels."""
    curated = competition.curated.copy()
    for fname in fnames:
        old = curated.at[fname, "labels"]
        curated.at[fname, "labels"] = tuple(label for label in competition.labels if label not in old)[:2]
    return replace(competition, curated=curated)


def taught(world: World, root: Path, competition: Competition, fold: int) -> tuple[bytes, bytes, bytes]:
    """A teacher's and a student's weights of a fold, and the lesson between them."""
    home = Home(root)
    teacher = start_run(home, "teacher", world.recipe(*JOINT), competition, world.folds)
    train_fold(teacher, fold, world.cache, world.device)
    student = start_run(home, "student", world.recipe(*STUDENT), competition, world.folds)
    teach(student, teacher, fold, world.cache, world.device)
    train_fold(student, fold, world.cache, world.device)
    return tuple(p.read_bytes() for p in (teacher.fold(fold).weights, student.fold(fold).lesson, student.fold(fold).weights))


def test_no_curated_clips_label_reaches_the_model_that_scores_it(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path / "look", "noisy.use=true")
    before = taught(world, tmp_path / "a", world.competition, 1)
    # Every label of the clips that fold 1 is scored on is another one: teacher, lesson and student are the same to the byte.
    assert taught(world, tmp_path / "b", relabelled(world.competition, run.held_out(1)), 1) == before
    # Those of the clips it learns from change all three: the test can tell.
    after = taught(world, tmp_path / "c", relabelled(world.competition, run.trained_on(1)), 1)
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_without_a_head_of_its_own_no_tensor_stands_twice(world: World) -> None:
    # Else the moving average would take two steps at a time for it.
    recipe = world.recipe()
    model = build_model(recipe.model, 10, recipe.logmel.n_mels, recipe.crop_frames)
    model.add_noisy(own_head=False, mean=-40.0, std=10.0)
    state = [value for value in model.state_dict().values() if value.numel() > 1]
    assert len({value.data_ptr() for value in state}) == len(state)


def test_a_teacher_may_hear_otherwise(world: World, tmp_path: Path) -> None:
    home = Home(tmp_path)
    recipe = world.recipe("logmel.n_mels=40", "logmel.hop_length=400", "train.crop_seconds=0.8")
    folder = build_cache(world.competition, recipe.logmel, home, splits=["curated", "noisy"], compute=Compute(jobs=1))
    teacher = start_run(home, "teacher", recipe, world.competition, world.folds)
    train_fold(teacher, 0, folder, world.device)
    student = start_run(home, "student", world.recipe(*STUDENT), world.competition, world.folds)
    teach(student, teacher, 0, folder, world.device)
    assert train_fold(student, 0, world.cache, world.device).done
    assert len(read_probs(teacher.fold(0).noisy)) == len(world.competition.noisy)


def test_a_student_does_not_go_on_under_another_lesson(world: World, tmp_path: Path) -> None:
    teacher = start_run(Home(tmp_path), "teacher", world.recipe(), world.competition, world.folds)
    train_fold(teacher, 0, world.cache, world.device)
    student = world.start(tmp_path, *STUDENT, "train.checkpoint_minutes=0", name="student")
    teach(student, teacher, 0, world.cache, world.device)

    def stop(done: int, total: int, text: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_fold(student, 0, world.cache, world.device, progress=stop)
    before = student.fold(0).lesson.stat().st_mtime_ns
    teach(student, teacher, 0, world.cache, world.device)
    assert student.fold(0).lesson.stat().st_mtime_ns == before, "the same lesson is not given twice"
    lesson = read_probs(student.fold(0).lesson)
    write_probs(student.fold(0).lesson, lesson.iloc[1:])
    with pytest.raises(MelfoldError, match="a checkpoint is from other data, folds, recipe or lesson"):
        train_fold(student, 0, world.cache, world.device)


def test_a_lesson_holds_the_chosen_clips_and_soft_targets(world: World, tmp_path: Path) -> None:
    taught(world, tmp_path, world.competition, 0)
    student, teacher = (open_run(Home(tmp_path), name) for name in ("student", "teacher"))
    lesson = read_probs(student.fold(0).lesson)
    assert len(lesson) <= 6
    table = world.competition.targets("noisy").loc[lesson.index]
    assert table.sum().max() <= 2
    judged = read_probs(teacher.fold(0).noisy).loc[lesson.index]
    np.testing.assert_allclose(lesson, (table + judged) / 2, atol=1e-6)
    assert set(read_probs(teacher.fold(0).noisy).index) == set(world.competition.noisy.index)


def test_a_teacher_must_have_the_same_folds(world: World, tmp_path: Path) -> None:
    other = relabelled(world.competition, [world.competition.curated.index[0]])
    start_run(Home(tmp_path), "teacher", world.recipe(), other, world.folds)
    with pytest.raises(MelfoldError, match="a teacher must have the student's folds and labels: teacher"):
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
    assert student.info.teacher == f"teacher {teacher.recipe.fingerprint()}"


def test_a_full_student_may_learn_from_the_mean_of_the_folds(world: World, tmp_path: Path) -> None:
    taught(world, tmp_path, world.competition, 0)
    student, teacher = open_run(Home(tmp_path), "student"), open_run(Home(tmp_path), "teacher")
    teach(student, teacher, FULL, world.cache, world.device)
    assert len(read_probs(student.fold(FULL).lesson))
    with pytest.raises(MelfoldError, match="fold 2 of teacher teacher is not trained"):
        teach(student, teacher, 2, world.cache, world.device)


def test_without_noisy_clips_a_recipe_that_wants_them_is_refused(world: World, tmp_path: Path) -> None:
    without = replace(world.competition, noisy=world.competition.noisy.iloc[:0])
    with pytest.raises(MelfoldError, match="this download has no noisy clips"):
        start_run(Home(tmp_path), "tiny", world.recipe("noisy.use=true"), without, world.folds)


def test_corrections_are_learnt_from_and_not_scored_by(world: World, tmp_path: Path) -> None:
    run = world.start(tmp_path / "plain")
    fname = run.trained_on(0)[0]
    label = next(name for name in run.info.labels if name not in run.clips.at[fname, "labels"])
    (tmp_path / "corrections.csv").write_text(f"fname,labels,why\n{fname},{label},heard it\n")
    corrected = world.start(tmp_path, f"data.corrections={tmp_path / 'corrections.csv'}")
    assert corrected.recipe.fingerprint() != run.recipe.fingerprint()
    assert list(corrected.taught([fname]).columns[corrected.taught([fname]).iloc[0] > 0]) == [label]
    pd.testing.assert_frame_equal(corrected.targets([fname]), run.targets([fname]))
    pd.testing.assert_frame_equal(corrected.taught(run.trained_on(0)[1:]), run.targets(run.trained_on(0)[1:]))
    (tmp_path / "corrections.csv").write_text("fname,labels,why\nnosuch.wav,Nothing,\n")
    with pytest.raises(MelfoldError) as caught:
        world.start(tmp_path, f"data.corrections={tmp_path / 'corrections.csv'}", name="bad")
    assert [line.split(". ")[0] for line in caught.value.lines] == [
        "a correction is about no curated clip: nosuch.wav",
        "a correction has an unknown label: nosuch.wav: 'Nothing'",
    ]

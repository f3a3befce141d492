"""Submissions: built in the asked order, checked line by line, scored as the leaderboard would."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up import LABELS, MadeUp, draw, oracle

from melfold.combine.check import check_submission, score_submission
from melfold.combine.oof import score
from melfold.combine.rebuild import plan_rebuild
from melfold.combine.submission import Standing, build_submission, open_submission, standing_of
from melfold.config import PredictConfig
from melfold.errors import MelfoldError
from melfold.learn.predictions import Prediction, own_prediction, start_prediction, write_current
from melfold.learn.runs import Run
from melfold.probs import mean_probs, read_probs, write_probs


def build(made_up: MadeUp, *runs: Run | Prediction, id: str = "sub", mean: str = "geometric", **options: object) -> Path:
    predictions = [own_prediction(run) if isinstance(run, Run) else run for run in runs]
    return build_submission(made_up.home, predictions, made_up.competition, id=id, mean=mean, **options)


def manifest_of(path: Path) -> dict:
    """What is written beside a `submission.csv`."""
    return json.loads((path.parent / "manifest.json").read_text())


def test_rows_and_columns_are_in_the_asked_order(made_up: MadeUp) -> None:
    run = made_up.run()
    made_up.predict(own_prediction(run), draw(sorted(made_up.competition.test.index), 0).iloc[:, ::-1])
    path = build(made_up, run)
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(["fname", *LABELS])
    assert [line.split(",")[0] for line in lines[1:]] == list(made_up.competition.test.index)
    pd.testing.assert_frame_equal(read_probs(path).sort_index(), draw(sorted(made_up.competition.test.index), 0))
    pd.testing.assert_frame_equal(check_submission(path, made_up.competition), read_probs(path))


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_runs_are_averaged_and_their_combination_scored(mean: str, made_up: MadeUp) -> None:
    runs = [own_prediction(made_up.run("one", seed=1)), own_prediction(made_up.run("two", seed=2))]
    path = build(made_up, *runs, mean=mean)

    def combine(tables: list[pd.DataFrame]) -> pd.DataFrame:
        a, b = (t.astype(np.float64) for t in tables)
        return (a + b) / 2 if mean == "arithmetic" else np.sqrt(a * b)

    built = read_probs(path)
    expected = combine([r.read_test() for r in runs]).loc[built.index]
    np.testing.assert_allclose(built, expected, rtol=1e-6)
    manifest = manifest_of(path)
    assert [run["name"] for run in manifest["runs"]] == ["one", "two"]
    together = oracle(made_up.competition.targets(), combine([r.read_oof() for r in runs]))
    assert manifest["oof_lwlrap"] == pytest.approx(together, abs=1e-9)
    assert manifest["track"] == "scratch"


def test_runs_that_held_out_different_clips_have_no_common_score(made_up: MadeUp) -> None:
    runs = [made_up.run("one"), made_up.run("two", folds=[0])]
    assert manifest_of(build(made_up, *runs))["oof_lwlrap"] is None


def test_building_again_gives_the_same_bytes(made_up: MadeUp) -> None:
    run = made_up.run()
    path = build(made_up, run)
    before = path.read_bytes(), (path.parent / "manifest.json").read_bytes()
    assert build(made_up, run) == path
    assert (path.read_bytes(), (path.parent / "manifest.json").read_bytes()) == before
    path.unlink()  # it is not committed: its manifest rebuilds it
    build(made_up, run)
    assert (path.read_bytes(), (path.parent / "manifest.json").read_bytes()) == before


def test_a_submission_made_from_different_inputs_is_never_overwritten(made_up: MadeUp) -> None:
    run, other = made_up.run("one"), made_up.run("two", seed=1)
    path = build(made_up, run)
    before = path.read_bytes()
    for runs, mean in (((other,), "geometric"), ((run, other), "geometric"), ((run,), "arithmetic")):
        with pytest.raises(MelfoldError, match="submission sub exists and was made from different inputs: .*--id NAME"):
            build(made_up, *runs, mean=mean)
    made_up.predict(own_prediction(run), draw(made_up.competition.test.index, 9))
    with pytest.raises(MelfoldError, match="exists and was made from different inputs: runs.one.test: "):
        build(made_up, run)
    assert path.read_bytes() == before
    assert build(made_up, run, replace=True) == path
    pd.testing.assert_frame_equal(read_probs(path), draw(made_up.competition.test.index, 9))


def test_a_submission_changed_by_hand_is_reported(made_up: MadeUp) -> None:
    path = build(made_up, run := made_up.run())
    path.write_text(path.read_text().replace("0.", "0.0", 1))
    for what in (lambda: build(made_up, run), lambda: open_submission(made_up.home, "sub")):
        with pytest.raises(MelfoldError, match="submission.csv was changed after it was written") as caught:
            what()
        assert len(caught.value.lines) == 1


def test_a_submission_is_opened_with_its_manifest(made_up: MadeUp) -> None:
    path = build(made_up, made_up.run())
    assert open_submission(made_up.home, "sub").items() <= manifest_of(path).items()
    with pytest.raises(MelfoldError, match="no such submission: other in .*Known: sub"):
        open_submission(made_up.home, "other")
    path.unlink()
    with pytest.raises(MelfoldError, match="submission sub has no submission.csv here: .*Run `melfold submission rebuild sub`"):
        open_submission(made_up.home, "sub")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not UTF-8": lambda content: content.replace(b"geometric", b"geometri\xff"),
    "another value": lambda content: content.replace(b'"share": 1.0', b'"share": 2.0'),
    "a list": lambda content: b"[" + content + b"]",
    "other JSON": lambda content: b'{"runs": 3}',
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_manifest_is_refused_in_one_line_and_nothing_is_replaced(kind: str, made_up: MadeUp) -> None:
    path = build(made_up, run := made_up.run())
    manifest, content = path.with_name("manifest.json"), path.read_bytes()
    damaged = DAMAGE[kind](manifest.read_bytes())
    assert damaged != manifest.read_bytes()
    manifest.write_bytes(damaged)
    for use in (
        lambda: build(made_up, run),
        lambda: open_submission(made_up.home, "sub"),
        lambda: plan_rebuild(made_up.home, "sub", made_up.competition.root),
    ):
        with pytest.raises(MelfoldError, match="manifest.json (is not JSON|was not written by this|was changed after)") as caught:
            use()
        assert len(caught.value.lines) == 1
    assert (manifest.read_bytes(), path.read_bytes()) == (damaged, content)


def test_a_run_without_predictions_or_with_ties_leaves_nothing(made_up: MadeUp) -> None:
    run = made_up.run()
    tied = draw(made_up.competition.test.index, 0)
    tied.iloc[2] = 0.5
    made_up.predict(own_prediction(run), tied)
    with pytest.raises(MelfoldError, match=f"all labels tie: 1 clips, first {tied.index[2]}"):
        build(made_up, run)
    own_prediction(run).test.unlink()
    with pytest.raises(MelfoldError, match="one has no current test predictions: .*test.csv is missing"):
        build(made_up, run)
    assert not list(made_up.home.submissions.glob("*/*"))


@pytest.mark.parametrize("id", ["../out", "a/b", "", ".", ".hidden"])
def test_a_name_that_leads_out_of_submissions_is_refused(id: str, made_up: MadeUp) -> None:
    with pytest.raises(MelfoldError, match="a submission's name is"):
        build(made_up, made_up.run(), id=id)
    assert not list(made_up.competition.root.rglob("submission.csv"))


def test_an_unknown_mean_is_refused_for_one_run_too(made_up: MadeUp) -> None:
    with pytest.raises(MelfoldError, match="unknown mean: harmonic"):
        build(made_up, made_up.run(), mean="harmonic")
    assert not made_up.home.submissions.exists()


def _set(table: pd.DataFrame, value: object) -> pd.DataFrame:
    return table.assign(**{LABELS[1]: [value, *table[LABELS[1]][1:]]})


BROKEN: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "a column missing": (lambda t: t.drop(columns=LABELS[3]), "wrong columns: 4 columns, not 5"),
    "a column too many": (lambda t: t.assign(New=0.5), "wrong columns: 6 columns, not 5"),
    "columns swapped": (lambda t: t[["fname", LABELS[1], LABELS[0], *LABELS[2:]]], "wrong columns: column 2 is 'Hiss_"),
    "another label": (lambda t: t.rename(columns={"Meow": "Moo"}), "wrong columns: column 4 is 'Moo', not 'Meow'"),
    "no fname": (lambda t: t.rename(columns={"fname": "id"}), "wrong columns: column 1 is 'id', not 'fname'"),
    "a clip missing": (lambda t: t.drop(index=2), "clips missing: 1, first t5.wav"),
    "an unknown clip": (lambda t: t.replace("t5.wav", "t9.wav"), "unknown clips: 1, first t9.wav"),
    "a clip twice": (lambda t: pd.concat([t, t.iloc[:1]]), "duplicate clips: 1, first t3.wav"),
    "another order": (lambda t: t.iloc[[0, 2, 1, 3, 4, 5]], "wrong order: row 2 is t5.wav, not t0.wav"),
    "NaN": (lambda t: _set(t, np.nan), "values not in 0..1: 1 clips, first t3.wav"),
    "infinity": (lambda t: _set(t, np.inf), "values not in 0..1: 1 clips, first t3.wav"),
    "above 1": (lambda t: _set(t, 1.0001), "values not in 0..1: 1 clips, first t3.wav"),
    "below 0": (lambda t: _set(t, -1e-9), "values not in 0..1: 1 clips, first t3.wav"),
    "text": (lambda t: _set(t, "high"), "not numbers: column Hiss_"),
    "all labels tie": (lambda t: t.assign(**dict.fromkeys(LABELS, 0.25)), "all labels tie: 6 clips, first t3.wav"),
    "no rows": (lambda t: t.iloc[:0], "clips missing: 6, first t0.wav"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_submission_is_reported_in_one_line(case: str, made_up: MadeUp) -> None:
    breaking, message = BROKEN[case]
    table = draw(made_up.competition.test.index, 0).reset_index()
    path = made_up.home.root / "sub.csv"
    path.parent.mkdir(parents=True)
    table.to_csv(path, index=False)
    assert len(check_submission(path, made_up.competition)) == 6
    breaking(table).to_csv(path, index=False)
    with pytest.raises(MelfoldError) as caught:
        check_submission(path, made_up.competition)
    assert message in str(caught.value)
    assert all(line.startswith("sub.csv: ") for line in caught.value.lines)


def test_every_problem_has_its_line(made_up: MadeUp) -> None:
    table = _set(draw(made_up.competition.test.index, 0).reset_index(), 2.0)
    path = made_up.competition.root / "sub.csv"
    pd.concat([table.drop(index=2), table.iloc[:1]]).to_csv(path, index=False)
    with pytest.raises(MelfoldError) as caught:
        check_submission(path, made_up.competition)
    assert len(caught.value.lines) == 3


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"fname,Bark\na.wav,1,2,3\nb.wav,1\n"])
def test_what_is_no_submission_at_all_is_refused(content: bytes | None, made_up: MadeUp) -> None:
    path = made_up.competition.root / "sub.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MelfoldError) as caught:
        check_submission(path, made_up.competition)
    assert len(caught.value.lines) == 1


@pytest.fixture
def truth(made_up: MadeUp) -> tuple[Path, pd.DataFrame]:
    """The file, and the table it holds: four Private clips, two Public."""
    test = made_up.competition.test.index
    own = [(LABELS[0],), (LABELS[1], LABELS[2]), LABELS[:3], (LABELS[3],), (LABELS[2],), (LABELS[0], LABELS[3])]
    table = pd.DataFrame({"labels": [",".join(o) for o in own], "usage": ["Private", "Public"] * 2 + ["Private"] * 2}, index=test)
    path = made_up.competition.root / "truth.csv"
    table.assign(licence="CC0").to_csv(path)
    return path, table


def _halves(probs: pd.DataFrame, table: pd.DataFrame) -> dict[str, float]:
    targets = table["labels"].str.get_dummies(",").reindex(columns=list(LABELS), fill_value=0)
    return {half: oracle(targets[table["usage"] == half], probs) for half in ("Public", "Private")}


def test_halves_are_scored_apart_rows_in_any_order(made_up: MadeUp, truth: tuple[Path, pd.DataFrame]) -> None:
    path, table = truth
    probs = draw(made_up.competition.test.index, 3)
    for order in (probs, probs.iloc[::-1, ::-1], probs.sort_index()):
        write_probs(file := made_up.competition.root / "sub.csv", order)
        scores = score_submission(file, path)
        assert list(scores.index) == ["Public", "Private"]
        assert list(scores["clips"]) == [2, 4]
        assert scores["lwlrap"].to_dict() == pytest.approx(_halves(probs, table), abs=1e-9)
        assert (scores["low"] <= scores["lwlrap"]).all()
        assert (scores["lwlrap"] <= scores["high"]).all()


def test_a_half_that_is_not_covered_is_left_out(made_up: MadeUp, truth: tuple[Path, pd.DataFrame]) -> None:
    path, table = truth
    probs = draw(made_up.competition.test.index, 3)
    write_probs(file := made_up.competition.root / "sub.csv", probs[table["usage"] == "Private"])
    scores = score_submission(file, path)
    assert list(scores.index) == ["Private"]
    assert scores.at["Private", "lwlrap"] == pytest.approx(_halves(probs, table)["Private"], abs=1e-9)
    write_probs(file, probs.iloc[:1])
    with pytest.raises(MelfoldError, match="covers neither half"):
        score_submission(file, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fname,labels\nt0.wav,Bark\n", "is no truth table"),
        ("", "is no truth table"),
        ("fname,labels,usage\nt0.wav,Bork,Public\n", "has labels that .* lacks: Bork"),
        ("fname,labels,usage\nt0.wav,Bark,Public\nt0.wav,Bark,Public\n", "is no truth table.*t0.wav"),
        ("fname,labels,usage\nt0.wav,,Public\n", "has labels that .* lacks"),
    ],
    ids=["no usage", "empty", "unknown label", "a clip twice", "no labels"],
)
def test_a_truth_that_is_none_is_refused(text: str, message: str, made_up: MadeUp) -> None:
    write_probs(file := made_up.competition.root / "sub.csv", draw(made_up.competition.test.index, 3))
    path = made_up.competition.root / "truth.csv"
    path.write_text(text)
    with pytest.raises(MelfoldError, match=message):
        score_submission(file, path)


def loosened(run: Run, **info: object) -> Run:
    return replace(run, info=replace(run.info, **info))


def test_a_combination_is_as_strict_as_its_loosest_run(made_up: MadeUp) -> None:
    strict = made_up.run("strict", seed=1)
    assert standing_of([strict]) == Standing("scratch", ["curated"], [], [], [])
    loose = loosened(made_up.run("loose", seed=2), track="open", licence="apache-2.0, mit", seen=["ImageNet-1k"])
    assert standing_of([strict, loose]) == Standing(
        "open", ["curated"], ["apache-2.0", "mit"], ["ImageNet-1k"], ["no pretrained models and no external data (loose)"]
    )
    doubtful = loosened(loose, warnings=["the weights may have seen clips of this competition"])
    assert standing_of([doubtful]).breaks[0] == "the weights may have seen clips of this competition"
    unknown = loosened(loose, licence="unknown")
    assert standing_of([unknown]).breaks[1].startswith("the licence of its first weights is not known")
    bound = loosened(loose, licence="CC-BY-NC-4.0")
    assert "do not allow it: CC-BY-NC-4.0" in standing_of([bound]).breaks[1]


def test_weights_are_recorded_and_applied_to_test_and_oof_alike(made_up: MadeUp) -> None:
    runs = [own_prediction(made_up.run("one", seed=1)), own_prediction(made_up.run("two", seed=2))]
    path = build(made_up, *runs, id="w", mean="rank", weights=[3, 1])
    manifest = manifest_of(path)
    assert [run["share"] for run in manifest["runs"]] == [0.75, 0.25]
    built = read_probs(path)
    expected = mean_probs([run.read_test() for run in runs], "rank", [3, 1]).loc[built.index]
    np.testing.assert_allclose(built, expected, rtol=1e-6)
    oof = mean_probs([run.read_oof() for run in runs], "rank", [3, 1])
    assert manifest["oof_lwlrap"] == pytest.approx(oracle(made_up.competition.targets(), oof), abs=1e-9)
    with pytest.raises(MelfoldError, match="was made from different inputs: runs.one.share: 0.75 -> 0.5"):
        build(made_up, *runs, id="w", mean="rank", weights=[1, 1])
    with pytest.raises(MelfoldError, match="weights do not fit: 1 for 2"):
        build(made_up, *runs, id="x", mean="rank", weights=[1])


def test_predictions_of_fewer_folds_than_are_trained_by_now_are_not_taken(made_up: MadeUp) -> None:
    run = made_up.run(folds=[0])
    build(made_up, run, id="part")
    made_up.train(run, 1)
    with pytest.raises(MelfoldError, match="one has no current test predictions: .*folds.1: none -> .*Run `melfold predict one"):
        build(made_up, run)
    made_up.predict(own_prediction(run), draw(made_up.competition.test.index, 3))
    assert manifest_of(build(made_up, run))["oof_lwlrap"] == pytest.approx(score(own_prediction(run)).oof_lwlrap)


def test_a_run_of_no_weight_is_no_part_of_a_submission(made_up: MadeUp) -> None:
    runs = [made_up.run("one", seed=1), made_up.run("two", seed=2)]
    path = build(made_up, *runs, id="w", weights=[0, 1])
    assert [run["name"] for run in manifest_of(path)["runs"]] == ["two"]
    pd.testing.assert_frame_equal(read_probs(path).sort_index(), own_prediction(runs[1]).read_test().sort_index())


def test_a_named_prediction_of_a_run_can_be_submitted_alone_or_beside_the_runs_own(made_up: MadeUp) -> None:
    run = made_up.run()
    own, tta = own_prediction(run), start_prediction(run, "tta", PredictConfig(overlap=0.25))
    for fold in range(3):
        write_current(tta.fold_oof(fold), draw(run.held_out(fold), 50 + fold), tta.inputs(fold))
    made_up.predict(tta, draw(made_up.competition.test.index, 77))
    path = build(made_up, tta, id="alone")
    pd.testing.assert_frame_equal(read_probs(path), draw(made_up.competition.test.index, 77))
    (member,) = manifest_of(path)["runs"]
    assert (member["name"], member["prediction"], member["recipe"]["predict"]["overlap"]) == ("one", "tta", 0.25)
    assert manifest_of(path)["oof_lwlrap"] == pytest.approx(score(tta).oof_lwlrap)
    both = manifest_of(build(made_up, own, tta, id="both", mean="arithmetic"))
    assert [(m["name"], m["prediction"]) for m in both["runs"]] == [("one", ""), ("one", "tta")]
    expected = oracle(made_up.competition.targets(), (own.read_oof() + tta.read_oof()) / 2)
    assert both["oof_lwlrap"] == pytest.approx(expected, abs=1e-9)
    with pytest.raises(MelfoldError, match="a run is named twice: one@tta, one@tta"):
        build(made_up, tta, tta, id="twice")


def test_an_unfinished_run_is_named_in_a_warning(made_up: MadeUp, caplog: pytest.LogCaptureFixture) -> None:
    build(made_up, made_up.run(folds=[1]))
    assert "run one is INCOMPLETE: not trained: fold 0, 2" in caplog.text

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

from melfold.combine.ensemble import pool_oof
from melfold.combine.submission import Standing, build_submission, check_submission, score_submission, standing_of
from melfold.errors import MelfoldError
from melfold.learn.runs import Run
from melfold.probs import mean_probs, read_probs, write_current, write_probs


def build(made_up: MadeUp, *runs: object, id: str = "sub", mean: str = "geometric") -> Path:
    return build_submission(made_up.home, runs, made_up.competition, id=id, mean=mean)


def predicted(run: Run, probs: pd.DataFrame) -> None:
    """Leave test predictions as `melfold predict` does."""
    write_current(run.test, probs, None, rests_on=run.weights_sha256(run.used_folds()))


def test_rows_and_columns_are_in_the_asked_order(made_up: MadeUp) -> None:
    run = made_up.run()
    predicted(run, draw(sorted(made_up.competition.test.index), 0).iloc[:, ::-1])
    path = build(made_up, run)
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(["fname", *LABELS])
    assert [line.split(",")[0] for line in lines[1:]] == list(made_up.competition.test.index)
    pd.testing.assert_frame_equal(read_probs(path).sort_index(), draw(sorted(made_up.competition.test.index), 0))
    pd.testing.assert_frame_equal(check_submission(path, made_up.competition), read_probs(path))


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_runs_are_averaged_and_their_combination_scored(mean: str, made_up: MadeUp) -> None:
    runs = [made_up.run("one", seed=1), made_up.run("two", seed=2)]
    for run in runs:
        pool_oof(run)
    path = build(made_up, *runs, mean=mean)

    def combine(tables: list[pd.DataFrame]) -> pd.DataFrame:
        a, b = (t.astype(np.float64) for t in tables)
        return (a + b) / 2 if mean == "arithmetic" else np.sqrt(a * b)

    built = read_probs(path)
    expected = combine([read_probs(r.test) for r in runs]).loc[built.index]
    np.testing.assert_allclose(built, expected, rtol=1e-6)
    noted = json.loads((path.parent / "recipe.json").read_text())
    assert [run["name"] for run in noted["runs"]] == ["one", "two"]
    score = oracle(made_up.competition.targets(), combine([read_probs(r.oof) for r in runs]))
    assert noted["oof_lwlrap"] == pytest.approx(score, abs=1e-9)
    assert noted["track"] == "scratch"


def test_runs_that_held_out_different_clips_have_no_common_score(made_up: MadeUp) -> None:
    runs = [made_up.run("one"), made_up.run("two", folds=[0])]
    for run in runs:
        pool_oof(run)
    assert json.loads((build(made_up, *runs).parent / "recipe.json").read_text())["oof_lwlrap"] is None


def test_building_again_gives_the_same_bytes(made_up: MadeUp) -> None:
    run = made_up.run()
    path = build(made_up, run)
    before = path.read_bytes(), (path.parent / "recipe.json").read_bytes()
    assert build(made_up, run) == path
    assert (path.read_bytes(), (path.parent / "recipe.json").read_bytes()) == before
    path.unlink()  # it is not committed: its recipe rebuilds it
    build(made_up, run)
    assert (path.read_bytes(), (path.parent / "recipe.json").read_bytes()) == before


def test_a_submission_of_other_inputs_is_never_overwritten(made_up: MadeUp) -> None:
    run, other = made_up.run("one"), made_up.run("two", seed=1)
    path = build(made_up, run)
    before = path.read_bytes()
    for runs, mean in (((other,), "geometric"), ((run, other), "geometric"), ((run,), "arithmetic")):
        with pytest.raises(MelfoldError, match="submission sub stands already, of other inputs"):
            build(made_up, *runs, mean=mean)
    predicted(run, draw(made_up.competition.test.index, 9))
    with pytest.raises(MelfoldError, match="stands already, of other inputs"):
        build(made_up, run)
    assert path.read_bytes() == before


def test_a_submission_changed_by_hand_is_told(made_up: MadeUp) -> None:
    path = build(made_up, run := made_up.run())
    path.write_text(path.read_text().replace("0.", "0.0", 1))
    with pytest.raises(MelfoldError, match="a submission was changed by hand"):
        build(made_up, run)


def test_a_run_without_predictions_or_with_ties_leaves_nothing(made_up: MadeUp) -> None:
    run = made_up.run()
    tied = draw(made_up.competition.test.index, 0)
    tied.iloc[2] = 0.5
    predicted(run, tied)
    with pytest.raises(MelfoldError, match=f"all labels tie: 1 clips, first {tied.index[2]}"):
        build(made_up, run)
    run.test.unlink()
    with pytest.raises(MelfoldError, match="run one has no test predictions"):
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
def test_a_broken_submission_is_told_in_one_line(case: str, made_up: MadeUp) -> None:
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


def loosened(run: Run, **info: str) -> Run:
    return replace(run, info=replace(run.info, **info))


def test_a_combination_is_as_strict_as_its_loosest_run(made_up: MadeUp) -> None:
    strict = made_up.run("strict", seed=1)
    assert standing_of([strict]) == Standing("scratch", ["curated"], [], [])
    loose = loosened(made_up.run("loose", seed=2), track="open", licence="apache-2.0, mit")
    assert standing_of([strict, loose]) == Standing(
        "open", ["curated"], ["apache-2.0", "mit"], ["no pretrained models and no external data (loose)"]
    )
    unknown = loosened(loose, licence="unknown")
    assert standing_of([unknown]).breaks[1].startswith("the licence of its first weights is not known")
    bound = loosened(loose, licence="CC-BY-NC-4.0")
    assert "do not allow it: CC-BY-NC-4.0" in standing_of([bound]).breaks[1]


def test_weights_are_noted_and_applied_to_test_and_oof_alike(made_up: MadeUp) -> None:
    runs = [made_up.run("one", seed=1), made_up.run("two", seed=2)]
    for run in runs:
        pool_oof(run)
    path = build_submission(made_up.home, runs, made_up.competition, id="w", mean="rank", weights=[3, 1])
    noted = json.loads((path.parent / "recipe.json").read_text())
    assert [run["share"] for run in noted["runs"]] == [0.75, 0.25]
    built = read_probs(path)
    expected = mean_probs([read_probs(run.test) for run in runs], "rank", [3, 1]).loc[built.index]
    np.testing.assert_allclose(built, expected, rtol=1e-6)
    oof = mean_probs([read_probs(run.oof) for run in runs], "rank", [3, 1])
    assert noted["oof_lwlrap"] == pytest.approx(oracle(made_up.competition.targets(), oof), abs=1e-9)
    with pytest.raises(MelfoldError, match="stands already, of other inputs"):
        build_submission(made_up.home, runs, made_up.competition, id="w", mean="rank", weights=[1, 1])
    with pytest.raises(MelfoldError, match="weights do not fit: 1 for 2"):
        build_submission(made_up.home, runs, made_up.competition, id="x", mean="rank", weights=[1])


def test_predictions_of_fewer_folds_than_are_trained_by_now_are_not_taken(made_up: MadeUp) -> None:
    run = made_up.run(folds=[0])
    build(made_up, run, id="part")
    made_up.train(run, 1)
    with pytest.raises(MelfoldError, match="test predictions of one are not of its trained folds.*Run `melfold predict one`"):
        build(made_up, run)
    predicted(run, draw(made_up.competition.test.index, 3))
    build(made_up, run)
    noted = json.loads((made_up.home.submissions / "sub" / "recipe.json").read_text())
    assert noted["oof_lwlrap"] == pytest.approx(pool_oof(run).oof_lwlrap)


def test_a_run_of_no_weight_is_no_part_of_a_submission(made_up: MadeUp) -> None:
    runs = [made_up.run("one", seed=1), made_up.run("two", seed=2)]
    path = build_submission(made_up.home, runs, made_up.competition, id="w", mean="geometric", weights=[0, 1])
    assert [run["name"] for run in json.loads((path.parent / "recipe.json").read_text())["runs"]] == ["two"]
    pd.testing.assert_frame_equal(read_probs(path).sort_index(), read_probs(runs[1].test).sort_index())

"""Folds pooled and averaged."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
from made_up import LABELS, MadeUp, oracle

from melfold.combine.ensemble import compare, fold_mean, inference_seconds, predictions_alike, suggest
from melfold.combine.oof import Together, prior_of, score
from melfold.combine.search import choose, nested_probs
from melfold.config import PredictConfig
from melfold.errors import MelfoldError
from melfold.learn.predictions import Prediction, own_prediction, start_prediction, write_current
from melfold.learn.runs import FULL, open_run
from melfold.metrics import lwlrap
from melfold.probs import MEANS, make_probs, read_probs, write_probs


def test_pooled_and_mean_fold_scores_are_two_numbers_and_both_right(made_up: MadeUp) -> None:
    run = made_up.run()
    own = own_prediction(run)
    scores = score(own)
    tables = [read_probs(own.fold_oof(k)) for k in range(3)]
    targets = made_up.competition.targets()
    by_fold = [oracle(targets.loc[run.held_out(k)], tables[k]) for k in range(3)]
    assert scores.oof_lwlrap == pytest.approx(oracle(targets, pd.concat(tables)), abs=1e-9)
    assert scores.mean_fold_lwlrap == pytest.approx(np.mean(by_fold), abs=1e-9)
    assert list(scores.fold_lwlrap.values()) == pytest.approx(by_fold, abs=1e-9)
    assert abs(scores.oof_lwlrap - scores.mean_fold_lwlrap) > 1e-3
    assert scores.low <= scores.oof_lwlrap <= scores.high
    assert (scores.clips, scores.missing) == (12, [])


def test_what_is_pooled_is_left_in_the_run(made_up: MadeUp) -> None:
    run = made_up.run()
    own = own_prediction(run)
    scores = score(own)
    pooled = read_probs(own.oof)
    assert list(pooled.index) == sorted(made_up.competition.curated.index)
    for k in range(3):
        pd.testing.assert_frame_equal(pooled.loc[run.held_out(k)], read_probs(own.fold_oof(k)))
    pd.testing.assert_frame_equal(own.read_oof(), pooled)
    kept = json.loads(own.scores.read_text())["scores"]
    assert kept["oof_lwlrap"] == scores.oof_lwlrap
    assert kept["mean_fold_lwlrap"] == scores.mean_fold_lwlrap
    assert [row["label"] for row in kept["per_label"]] == list(LABELS)
    assert (scores.per_label["lwlrap"] * scores.per_label["weight"]).sum() == pytest.approx(scores.oof_lwlrap)


def test_missing_folds_are_named_and_do_not_count(made_up: MadeUp) -> None:
    run = made_up.run(folds=[1])
    scores = score(own_prediction(run))
    assert scores.missing == [0, 2]
    assert list(scores.fold_lwlrap) == ["1"]
    assert scores.clips == len(run.held_out(1))
    assert scores.oof_lwlrap == pytest.approx(
        oracle(made_up.competition.targets().loc[run.held_out(1)], own_prediction(run).read_fold_oof(1))
    )
    made_up.train(run, 0)
    assert score(own_prediction(run)).missing == [2]


def test_a_label_without_clips_is_null_in_json(made_up: MadeUp) -> None:
    run = made_up.run(folds=[2])
    scores = score(own_prediction(run))
    without = [label for label, row in scores.per_label.iterrows() if not row["clips"]]
    assert without
    kept = {row["label"]: row["lwlrap"] for row in json.loads(own_prediction(run).scores.read_text())["scores"]["per_label"]}
    assert [label for label, value in kept.items() if value is None] == without
    assert all(math.isnan(scores.per_label.at[label, "lwlrap"]) for label in without)


def test_no_trained_fold_cannot_be_scored(made_up: MadeUp) -> None:
    with pytest.raises(MelfoldError, match="run one has no trained fold: .*Run `melfold train` first"):
        score(own_prediction(made_up.run(folds=[])))


def test_a_run_on_every_clip_has_no_score_and_its_prior_is_the_labels_frequency(made_up: MadeUp) -> None:
    run = made_up.run(folds=[])
    run.fold(FULL).path.mkdir()
    run.fold(FULL).weights.touch()
    run.fold(FULL).artefact.commit({"fold": FULL, **run.made_from})
    with pytest.raises(MelfoldError, match="run one holds no clip out, so it has no out-of-fold score: folds: full"):
        score(own_prediction(run))
    pd.testing.assert_series_equal(prior_of(own_prediction(run)), made_up.competition.targets().mean(), check_dtype=False)


def test_scores_are_computed_once_and_read_as_they_were(made_up: MadeUp) -> None:
    own = own_prediction(made_up.run(folds=[0, 2]))
    first = score(own)
    before = own.scores.stat().st_mtime_ns, own.oof.stat().st_mtime_ns
    again = score(own)
    assert (own.scores.stat().st_mtime_ns, own.oof.stat().st_mtime_ns) == before
    pd.testing.assert_frame_equal(again.per_label, first.per_label)
    assert dataclasses.replace(again, per_label=first.per_label) == first
    made_up.train(own.run, 1)
    assert score(own).clips == 12


def test_the_prior_is_the_mean_of_the_held_out_probabilities(made_up: MadeUp) -> None:
    own = own_prediction(made_up.run())
    pd.testing.assert_series_equal(prior_of(own), own.read_oof().mean())


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
def test_the_fold_mean_is_of_the_recipes_kind_and_aligned_by_name(kind: str, made_up: MadeUp) -> None:
    run = made_up.run(sets=[f"predict.fold_mean={kind}"])
    own = own_prediction(run)
    tables = [read_probs(own.fold_test(k)) for k in range(3)]
    values = np.stack([t.to_numpy(np.float64) for t in tables])
    expected = values.mean(axis=0) if kind == "arithmetic" else np.exp(np.log(values).mean(axis=0))
    write_current(own.fold_test(1), tables[1].iloc[::-1, ::-1], own.inputs(1))
    mean = fold_mean(own, ["0", "1", "2"])
    assert list(mean.index) == list(tables[0].index)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)


def test_a_folds_test_probabilities_that_were_edited_are_not_averaged(made_up: MadeUp) -> None:
    own = own_prediction(made_up.run())
    write_probs(own.fold_test(1), read_probs(own.fold_test(1)) / 2)
    with pytest.raises(MelfoldError, match="one has no current test predictions: .*test.csv was changed after it was written"):
        fold_mean(own, ["0", "1", "2"])


def skilled(made_up: MadeUp, name: str, skill: float, seed: int) -> Prediction:
    """A prediction whose OOF probabilities know something of the truth."""
    own = own_prediction(made_up.run(name, seed=seed, sets=[f"seed={seed}"]))
    for fold in range(3):
        sharpen(own, own, fold, skill)
    return own


def sharpen(source: Prediction, target: Prediction, fold: int, skill: float) -> None:
    """Mix the truth into a fold's probabilities."""
    noise = read_probs(source.fold_oof(fold))
    truth = source.run.targets(noise.index)
    probs = make_probs(skill * truth.to_numpy() + (1 - skill) * noise.to_numpy(), list(noise.index), LABELS)
    write_current(target.fold_oof(fold), probs, target.inputs(fold))


def problem(skills: dict[str, float], clips: int = 400, seed: int = 0) -> Together:
    """Made-up runs that know something of the truth, over five folds."""
    rng = np.random.default_rng(seed)
    truth = np.eye(4)[rng.integers(0, 4, clips)]
    names = [f"c{i}" for i in range(clips)]
    tables = {n: make_probs(w * truth + (1 - w) * rng.random(truth.shape), names, LABELS) for n, w in skills.items()}
    folds = pd.Series(np.arange(clips) % 5, index=names)
    return Together(pd.DataFrame(truth, names, LABELS), folds, pd.Series(names, names), tables)


def test_a_search_takes_what_pays_and_leaves_out_what_does_not() -> None:
    together = problem({"useless": 0.0, "good": 0.2, "other": 0.18})
    choice = choose(together.targets, together.tables)
    assert set(choice.runs) == {"good", "other"}
    assert sum(choice.weights) == pytest.approx(1)
    assert choice.fitted == pytest.approx(lwlrap(together.targets, choice.mean(together.tables)), abs=1e-6)
    assert choice.fitted > max(lwlrap(together.targets, table) for table in together.tables.values())
    copies = dict.fromkeys(("a", "b", "c"), together.tables["good"])
    assert choose(together.targets, copies).runs == ("a",), "copies add nothing"


def test_the_best_pair_is_found_even_without_the_best_run() -> None:
    together = problem({"best": 0.3})
    truth, rng = together.targets.to_numpy(), np.random.default_rng(3)
    noise = rng.normal(0, 0.25, truth.shape)
    for name, sign in (("up", 1), ("down", -1)):  # each of them is poor, but their errors cancel out
        values = np.clip(0.35 + 0.2 * truth + sign * noise, 0, 1)
        together.tables[name] = make_probs(values, list(together.targets.index), LABELS)
    assert max(together.tables, key=lambda name: lwlrap(together.targets, together.tables[name])) == "best"
    assert set(choose(together.targets, together.tables, kinds=["arithmetic"], most=2).runs) == {"up", "down"}


def test_a_search_keeps_to_a_budget() -> None:
    together = problem({"slow": 0.3, "fast": 0.2, "other": 0.2})
    choice = choose(together.targets, together.tables, costs=[10, 2, 3], budget=6)
    assert set(choice.runs) == {"fast", "other"}
    assert choose(together.targets, together.tables, costs=[10, 2, 3], budget=4).runs in {("fast",), ("other",)}


def test_a_clip_is_never_scored_by_an_ensemble_that_was_chosen_on_it() -> None:
    together = problem({"a": 0.2, "b": 0.2, "c": 0.1, "d": 0.0}, clips=100)
    nested = nested_probs(together, choose)
    # Other labels for the clips of fold 1 change the choice of all folds but theirs.
    inside = together.folds.index[together.folds == 1]
    targets = together.targets.copy()
    targets.loc[inside] = targets.loc[inside].to_numpy()[:, ::-1]
    again = nested_probs(dataclasses.replace(together, targets=targets), choose)
    pd.testing.assert_frame_equal(again.loc[inside], nested.loc[inside])
    assert not again.equals(nested)


def test_on_runs_that_know_nothing_a_search_gains_nothing_and_its_suggestion_says_so(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = problem({f"r{i}": 0.0 for i in range(6)}, clips=150, seed=4)
    runs = [own_prediction(made_up.run(name, seed=number)) for number, name in enumerate(together.tables)]
    monkeypatch.setattr("melfold.combine.ensemble.read_together", lambda predictions: together)
    (searched, *_) = [item for item in suggest(runs) if item.fitted is not None and len(item.runs) > 2]
    chance = np.mean([lwlrap(together.targets, table) for table in together.tables.values()])
    assert searched.fitted - chance > 0.02 > searched.oof_lwlrap - chance
    assert searched.oof_lwlrap == lwlrap(together.targets, nested_probs(together, choose))


def test_suggestions_hold_single_runs_every_mean_and_two_searches_the_best_first(made_up: MadeUp) -> None:
    runs = [skilled(made_up, "a", 0.4, 1), skilled(made_up, "b", 0.3, 2), skilled(made_up, "c", 0.35, 3)]
    found = suggest(runs)
    assert [s.oof_lwlrap for s in found] == sorted((s.oof_lwlrap for s in found), reverse=True)
    assert {(tuple(s.runs), s.mean) for s in found if s.fitted is None} == {
        (("a",), "-"),
        (("b",), "-"),
        (("c",), "-"),
        *((("a", "b", "c"), kind) for kind in MEANS),
    }
    assert len([s for s in found if s.fitted is not None]) == 2
    assert len([s for s in suggest(runs[:2]) if s.fitted is not None]) == 1, "of two runs, both searches find the same"
    single = {s.runs[0]: s for s in found if len(s.runs) == 1 and s.fitted is None}
    assert single["a"].oof_lwlrap == pytest.approx(score(runs[0]).oof_lwlrap)
    best = max(single.values(), key=lambda s: s.oof_lwlrap)
    assert (best.gain.value, best.gain.better) == (0, 0.5)
    for item in found:
        assert item.gain.value == pytest.approx(item.oof_lwlrap - best.oof_lwlrap)
        assert item.weights is None or sum(item.weights) == pytest.approx(1, abs=1e-3)
        assert item.seconds is None, "made-up runs have no speed"


def test_a_budget_in_seconds_is_kept_by_recorded_speeds(made_up: MadeUp) -> None:
    runs = [skilled(made_up, "a", 0.4, 1), skilled(made_up, "b", 0.3, 2)]
    with pytest.raises(MelfoldError, match="the speed of a run was not recorded: a, b. `melfold predict a --data DATA` records"):
        suggest(runs, 60)
    for prediction, speed in zip(runs, (100.0, 400.0), strict=True):
        for fold in range(3):
            inputs = prediction.inputs(fold)
            write_current(prediction.fold_test(fold), read_probs(prediction.fold_test(fold)), inputs, speed=speed)
    one, other = (inference_seconds(prediction) for prediction in runs)
    audio = 3361 * 12.9 * 3600 / 4481  # FAT2019's test clips stand in for an unknown competition's
    assert (one, other) == pytest.approx((3 * audio / 100, 3 * audio / 400))
    assert {tuple(s.runs) for s in suggest(runs, one + other + 1)} >= {("a",), ("b",), ("a", "b")}
    assert {tuple(s.runs) for s in suggest(runs, one - 1)} == {("b",)}
    with pytest.raises(MelfoldError, match="no run fits the budget: b takes 4.4 minutes"):
        suggest(runs, 1)


def test_one_run_or_runs_of_other_folds_are_no_ensemble(made_up: MadeUp) -> None:
    own = own_prediction(made_up.run("one"))
    with pytest.raises(MelfoldError, match="an ensemble needs at least two runs: one"):
        suggest([own])
    with pytest.raises(MelfoldError, match="a run is named twice: one, one"):
        suggest([own, own])
    run = made_up.run("two")
    other = dataclasses.replace(run, info=dataclasses.replace(run.info, clips_sha256="0" * 64))
    with pytest.raises(MelfoldError, match="runs with other folds or labels cannot be compared: one and two. Use one fold table"):
        suggest([own, own_prediction(other)])


def test_runs_are_compared_with_the_first_on_the_clips_they_share(made_up: MadeUp) -> None:
    part = own_prediction(made_up.run("part", folds=[0, 2], seed=3))
    runs = [skilled(made_up, "a", 0.5, 1), skilled(made_up, "b", 0.2, 2), part]
    with pytest.raises(MelfoldError, match="run part is not finished: folds missing: 1. .*--common"):
        compare(runs)
    found = compare(runs, common=True)
    shared = [*part.run.held_out(0), *part.run.held_out(2)]
    assert found.clips == len(shared)
    table = found.runs
    assert list(table.index) == ["a", "b", "part"]
    assert np.isnan(table.at["a", "difference"])
    assert table.at["b", "difference"] == pytest.approx(table.at["b", "oof_lwlrap"] - table.at["a", "oof_lwlrap"])
    assert table.at["b", "d_low"] <= table.at["b", "difference"] <= table.at["b", "d_high"]
    assert list(found.labels.columns) == ["clips", "a", "b", "part"]
    assert found.labels["clips"].sum() == made_up.competition.targets().loc[shared].sum().sum()


def test_runs_without_a_clip_in_common_are_not_compared(made_up: MadeUp) -> None:
    runs = [own_prediction(made_up.run("one", folds=[0])), own_prediction(made_up.run("two", folds=[1]))]
    with pytest.raises(MelfoldError, match="these runs have no trained fold in common: one, two"):
        compare(runs, common=True)


def test_the_spread_over_seeds_is_that_of_runs_alike(made_up: MadeUp) -> None:
    a, b = skilled(made_up, "a", 0.5, 1), skilled(made_up, "b", 0.5, 2)
    other = own_prediction(made_up.run("other", sets=["train.lr=0.5", "seed=3"]))
    found = compare([a, b, other])
    scores = found.runs.loc[["a", "b"], "oof_lwlrap"]
    assert found.seeds == [(["a", "b"], pytest.approx(scores.mean()), pytest.approx(scores.std()))]


def test_other_views_of_a_run_are_members_like_any_other(made_up: MadeUp) -> None:
    own = skilled(made_up, "a", 0.2, 1)
    tta = start_prediction(own.run, "tta", PredictConfig(shift_seconds=(0.0, 0.1)))
    for fold in range(3):
        sharpen(own, tta, fold, 0.3)
    found = compare([own, tta])
    assert list(found.runs.index) == ["a", "a@tta"]
    assert found.runs.at["a@tta", "difference"] == pytest.approx(score(tta).oof_lwlrap - score(own).oof_lwlrap)
    assert found.seeds == []
    assert {name for item in suggest([own, tta]) for name in item.runs} == {"a", "a@tta"}


def test_the_largest_family_of_finished_runs_is_found_with_all_its_predictions(
    made_up: MadeUp, caplog: pytest.LogCaptureFixture
) -> None:
    assert predictions_alike(made_up.home) == []
    for number, name in enumerate(("a", "b")):
        made_up.run(name, seed=number)
    start_prediction(open_run(made_up.home, "b"), "tta", PredictConfig(overlap=0.25))
    made_up.run("part", folds=[0])
    broken = made_up.run("broken")
    (broken.folder / "clips.csv").write_text("edited")
    assert [p.label for p in predictions_alike(made_up.home)] == ["a", "b", "b@tta"]
    assert "left out: run broken: " in caplog.text

"""Folds pooled and averaged."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
from made_up import LABELS, MadeUp, oracle

from melfold.combine.ensemble import (
    Together,
    compare,
    fold_mean,
    greedy_weights,
    nested_probs,
    pool_oof,
    read_together,
    suggest,
)
from melfold.errors import MelfoldError
from melfold.learn.runs import Run
from melfold.metrics import lwlrap
from melfold.probs import MEANS, make_probs, mean_probs, read_probs, write_probs


def test_pooled_and_mean_fold_scores_are_two_numbers_and_both_right(made_up: MadeUp) -> None:
    run = made_up.run()
    scores = pool_oof(run)
    tables = [read_probs(run.fold(k).oof) for k in range(3)]
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
    scores = pool_oof(run)
    pooled = read_probs(run.oof)
    assert list(pooled.index) == sorted(made_up.competition.curated.index)
    for k in range(3):
        pd.testing.assert_frame_equal(pooled.loc[run.held_out(k)], read_probs(run.fold(k).oof))
    kept = json.loads(run.scores.read_text())
    assert kept["oof_lwlrap"] == scores.oof_lwlrap
    assert kept["mean_fold_lwlrap"] == scores.mean_fold_lwlrap
    assert [row["label"] for row in kept["per_label"]] == list(LABELS)
    assert (scores.per_label["lwlrap"] * scores.per_label["weight"]).sum() == pytest.approx(scores.oof_lwlrap)


def test_missing_folds_are_named_and_do_not_count(made_up: MadeUp) -> None:
    run = made_up.run(folds=[1])
    scores = pool_oof(run)
    assert scores.missing == [0, 2]
    assert list(scores.fold_lwlrap) == ["1"]
    assert scores.clips == len(run.held_out(1))
    assert scores.oof_lwlrap == pytest.approx(
        oracle(made_up.competition.targets().loc[run.held_out(1)], read_probs(run.fold(1).oof))
    )
    made_up.train(run, 0)
    assert pool_oof(run).missing == [2]


def test_a_label_without_clips_is_null_in_json(made_up: MadeUp) -> None:
    run = made_up.run(folds=[2])
    scores = pool_oof(run)
    without = [label for label, row in scores.per_label.iterrows() if not row["clips"]]
    assert without
    kept = {row["label"]: row["lwlrap"] for row in json.loads(run.scores.read_text())["per_label"]}
    assert [label for label, value in kept.items() if value is None] == without
    assert all(math.isnan(scores.per_label.at[label, "lwlrap"]) for label in without)


def test_no_trained_fold_cannot_be_scored(made_up: MadeUp) -> None:
    with pytest.raises(MelfoldError, match="run one has no trained fold to score: none. Run `melfold train`"):
        pool_oof(made_up.run(folds=[]))


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
def test_the_fold_mean_is_of_the_recipes_kind_and_aligned_by_name(kind: str, made_up: MadeUp) -> None:
    run = made_up.run(sets=[f"predict.fold_mean={kind}"])
    tables = [read_probs(run.fold(k).test) for k in range(3)]
    values = np.stack([t.to_numpy(np.float64) for t in tables])
    expected = values.mean(axis=0) if kind == "arithmetic" else np.exp(np.log(values).mean(axis=0))
    write_probs(run.fold(1).test, tables[1].iloc[::-1, ::-1])
    mean = fold_mean(run, ["0", "1", "2"])
    assert list(mean.index) == list(tables[0].index)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)


def skilled(made_up: MadeUp, name: str, skill: float, seed: int) -> Run:
    """A run whose OOF probabilities know something of the truth."""
    run = made_up.run(name, seed=seed, sets=[f"seed={seed}"])
    for fold in range(3):
        noise = read_probs(run.fold(fold).oof)
        truth = run.targets(noise.index)
        write_probs(
            run.fold(fold).oof, make_probs(skill * truth.to_numpy() + (1 - skill) * noise.to_numpy(), list(noise.index), LABELS)
        )
    return run


def test_greedy_weights_take_what_helps_and_leave_what_does_not(made_up: MadeUp) -> None:
    rng = np.random.default_rng(0)
    truth = np.eye(4)[rng.integers(0, 4, 400)]
    names = [f"c{i}" for i in range(400)]
    targets = pd.DataFrame(truth, names, LABELS)
    skills = (0.2, 0.18, 0)
    good, other, useless = (make_probs(w * truth + (1 - w) * rng.random(truth.shape), names, LABELS) for w in skills)
    weights = greedy_weights(targets, [useless, good, other], "arithmetic")
    assert weights.sum() == pytest.approx(1)
    assert weights[0] < 0.1 < weights[2] <= weights[1] + 0.2
    fitted = lwlrap(targets, mean_probs([useless, good, other], "arithmetic", list(weights)))
    assert fitted >= max(lwlrap(targets, t) for t in (useless, good, other))


def test_a_clip_is_never_scored_with_weights_fitted_on_it(made_up: MadeUp) -> None:
    together = read_together([skilled(made_up, "a", 0.4, 1), skilled(made_up, "b", 0.3, 2)])
    nested = nested_probs(together, "arithmetic")
    # Other labels for the clips of fold 1 change the weights of all folds but theirs.
    inside = together.folds.index[together.folds == 1]
    targets = together.targets.copy()
    targets.loc[inside] = targets.loc[inside].to_numpy()[:, ::-1]
    again = nested_probs(Together(targets, together.folds, together.tables), "arithmetic")
    pd.testing.assert_frame_equal(again.loc[inside], nested.loc[inside])


def test_on_runs_that_know_nothing_fitted_weights_gain_nothing_once_nested() -> None:
    rng = np.random.default_rng(4)
    names = [f"c{i}" for i in range(150)]
    targets = pd.DataFrame(np.eye(4)[rng.integers(0, 4, 150)], names, LABELS)
    tables = {f"r{i}": make_probs(rng.random((150, 4)), names, LABELS) for i in range(6)}
    folds = pd.Series(np.arange(150) % 5, index=names)
    fitted = lwlrap(
        targets, mean_probs(list(tables.values()), "rank", list(greedy_weights(targets, list(tables.values()), "rank")))
    )
    nested = lwlrap(targets, nested_probs(Together(targets, folds, tables), "rank"))
    chance = np.mean([lwlrap(targets, t) for t in tables.values()])
    assert fitted - chance > 0.02 > nested - chance


def test_suggestions_hold_single_runs_and_every_mean_and_the_best_comes_first(made_up: MadeUp) -> None:
    runs = [skilled(made_up, "a", 0.4, 1), skilled(made_up, "b", 0.3, 2)]
    found = suggest(runs)
    assert [s.oof_lwlrap for s in found] == sorted((s.oof_lwlrap for s in found), reverse=True)
    assert {(tuple(s.runs), s.mean) for s in found if s.fitted is None} == {
        (("a",), "-"),
        (("b",), "-"),
        *((("a", "b"), kind) for kind in MEANS),
    }
    fitted = [s for s in found if s.fitted is not None]
    assert {s.mean for s in fitted} == set(MEANS)
    assert all(s.weights and len(s.weights) == len(s.runs) and min(s.weights) > 0 for s in fitted)
    single = {s.runs[0]: s for s in found if len(s.runs) == 1}
    assert single["a"].oof_lwlrap == pytest.approx(pool_oof(runs[0]).oof_lwlrap)
    best = max(single.values(), key=lambda s: s.oof_lwlrap)
    assert (best.gain.value, best.gain.better) == (0, 0.5)
    for item in found:
        assert item.gain.value == pytest.approx(item.oof_lwlrap - best.oof_lwlrap)
        assert item.weights is None or sum(item.weights) == pytest.approx(1, abs=1e-3)


def test_one_run_or_runs_of_other_folds_are_no_ensemble(made_up: MadeUp) -> None:
    run = made_up.run("one")
    with pytest.raises(MelfoldError, match="an ensemble needs two runs: one"):
        suggest([run])
    with pytest.raises(MelfoldError, match="a run is named twice: one, one"):
        suggest([run, run])
    other = dataclasses.replace(made_up.run("two"), info=dataclasses.replace(run.info, clips_sha256="0" * 64))
    with pytest.raises(MelfoldError, match="runs of other folds or labels cannot be set side by side: one and two"):
        suggest([run, other])


def test_runs_are_compared_with_the_first_on_the_clips_they_share(made_up: MadeUp) -> None:
    runs = [skilled(made_up, "a", 0.5, 1), skilled(made_up, "b", 0.2, 2), made_up.run("part", folds=[0, 2], seed=3)]
    found = compare(runs)
    assert found.clips == len(runs[0].held_out(0)) + len(runs[0].held_out(2))
    table = found.runs
    assert list(table.index) == ["a", "b", "part"]
    assert np.isnan(table.at["a", "difference"])
    assert table.at["b", "difference"] == pytest.approx(table.at["b", "oof_lwlrap"] - table.at["a", "oof_lwlrap"])
    assert table.at["b", "d_low"] <= table.at["b", "difference"] <= table.at["b", "d_high"]
    assert list(found.labels.columns) == ["clips", "a", "b", "part"]
    assert (
        found.labels["clips"].sum() == made_up.competition.targets().loc[[*runs[0].held_out(0), *runs[0].held_out(2)]].sum().sum()
    )


def test_the_spread_over_seeds_is_that_of_runs_alike(made_up: MadeUp) -> None:
    a, b = skilled(made_up, "a", 0.5, 1), skilled(made_up, "b", 0.5, 2)
    other = made_up.run("other", sets=["train.lr=0.5", "seed=3"])
    found = compare([a, b, other])
    scores = found.runs.loc[["a", "b"], "oof_lwlrap"]
    assert found.seeds == [(["a", "b"], pytest.approx(scores.mean()), pytest.approx(scores.std()))]

"""Folds pooled and averaged."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from made_up import LABELS, MadeUp, draw, oracle

from melfold.combine.ensemble import fold_mean, is_current, pool_oof, write_current
from melfold.errors import MelfoldError
from melfold.probs import read_probs, write_probs


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


def test_a_table_is_current_for_its_key_until_it_changes(made_up: MadeUp) -> None:
    path = made_up.home.root / "table.csv"
    assert not is_current(path, ["a", 1])
    write_current(path, draw(["x.wav"], 0), ["a", 1])
    assert is_current(path, ["a", 1])
    assert not is_current(path, ["a", 2])
    write_probs(path, draw(["x.wav"], 1))
    assert not is_current(path, ["a", 1])

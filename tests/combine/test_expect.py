"""The score to expect: out-of-fold score and gain of averaging, without the truth of a test clip."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from made_up import MadeUp

from melfold.combine.expect import averaging_gain, expected_score
from melfold.errors import MelfoldError
from melfold.learn.predictions import own_prediction
from melfold.metrics import lwlrap
from melfold.probs import Probs, make_probs, mean_probs

LABELS = [f"L{i}" for i in range(20)]


def world(noise: float, clips: int, seed: int, models: int = 5) -> tuple[pd.DataFrame, list[Probs]]:
    """Truth and the predictions of models that share what is hard about a clip and each have errors of their own."""
    rng = np.random.default_rng(seed)
    truth = np.eye(20)[rng.integers(0, 20, clips)]
    shared = 3 * truth - 3 + rng.normal(0, 1, truth.shape)
    names = [f"s{seed}c{i}" for i in range(clips)]
    tables = [make_probs(1 / (1 + np.exp(-shared - rng.normal(0, noise, truth.shape))), names, LABELS) for _ in range(models)]
    return pd.DataFrame(truth, names, LABELS), tables


@pytest.mark.parametrize("noise", [0.5, 1.0, 1.5])
def test_the_gain_of_averaging_is_found_without_the_truth_of_the_test(noise: float) -> None:
    targets, [oof, *_] = world(noise, 2000, 1)
    truth, by_fold = world(noise, 2000, 2)
    gain = averaging_gain(targets, oof, by_fold)
    single = np.mean([lwlrap(truth, table) for table in by_fold])
    real = lwlrap(truth, mean_probs(by_fold, "logit")) - single
    assert real > 0.02
    assert 0.5 * real < gain < 1.2 * real, "the parabola is a little careful"
    assert averaging_gain(targets, oof, by_fold) == gain, "the same draws each time"


def test_models_that_agree_gain_nothing_by_averaging() -> None:
    targets, [oof, *_] = world(1.0, 200, 1)
    _, [one, *_] = world(1.0, 200, 2)
    assert averaging_gain(targets, oof, [one, one, one]) == pytest.approx(0, abs=1e-9)


def test_the_expected_score_is_out_of_fold_and_gain_in_an_interval(made_up: MadeUp) -> None:
    own = own_prediction(made_up.run())
    found = expected_score([own], "geometric", [1.0], 6)
    assert found.score == pytest.approx(found.oof + found.gain)
    assert found.oof == pytest.approx(lwlrap(made_up.competition.targets(), own.read_oof()))
    assert 0 <= found.low < found.score < found.high <= 1
    assert not found.grouped
    both = expected_score([own, own_prediction(made_up.run("two", seed=1))], "rank", [0.5, 0.5], 6)
    assert both.oof != found.oof
    larger = expected_score([own], "geometric", [1.0], 6000)
    assert larger.high - larger.low < found.high - found.low, "more test clips are less luck"


def test_where_no_score_can_be_expected_the_reason_is_given(made_up: MadeUp) -> None:
    own, part = own_prediction(made_up.run()), own_prediction(made_up.run("part", folds=[0, 1]))
    with pytest.raises(MelfoldError, match="no score can be expected: a run lacks folds"):
        expected_score([own, part], "rank", [0.5, 0.5], 6)
    own.fold_test(1).unlink()
    with pytest.raises(MelfoldError, match="one has no current test predictions"):
        expected_score([own], "rank", [1.0], 6)

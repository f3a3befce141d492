"""lwlrap against numbers made by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from melfold.errors import MelfoldError
from melfold.metrics import Difference, bootstrap_interval, constant_lwlrap, lwlrap, paired_bootstrap, per_label_lwlrap


def tables(truth: object, scores: object) -> tuple[pd.DataFrame, pd.DataFrame]:
    truth, scores = np.asarray(truth, np.float32), np.asarray(scores)
    clips, labels = [f"c{i}" for i in range(len(truth))], [f"L{j}" for j in range(truth.shape[1])]
    return pd.DataFrame(truth, clips, labels), pd.DataFrame(scores, clips, labels)


@st.composite
def problems(draw: st.DrawFn, ties: bool | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Targets with at least one label, and scores that often tie."""
    shape = draw(st.tuples(st.integers(1, 8), st.integers(2, 7)))
    truth = draw(hnp.arrays(np.int8, shape, elements=st.integers(0, 1)).filter(np.any))
    grid = st.integers(0, 3).map(float)
    scores = draw(hnp.arrays(np.float64, shape, elements=grid | st.floats(-1e6, 1e6)))
    return tables(truth, scores)


# (truth, scores, lwlrap), precisions at each true label's rank written out
GOLDEN = [
    ([[1, 0, 0]], [[0.9, 0.5, 0.1]], 1.0),
    ([[0, 1, 0]], [[0.9, 0.5, 0.1]], 1 / 2),
    ([[0, 0, 1]], [[0.9, 0.5, 0.1]], 1 / 3),
    ([[1, 0, 1]], [[0.9, 0.5, 0.1]], (1 + 2 / 3) / 2),
    ([[0, 1, 1]], [[0.9, 0.5, 0.1]], (1 / 2 + 2 / 3) / 2),
    ([[1, 1, 1]], [[0.9, 0.5, 0.1]], 1.0),
    # three pairs over two clips: a mean over pairs, not over clips
    ([[1, 0, 0], [0, 1, 1]], [[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]], (1 + 1 / 2 + 2 / 3) / 3),
    # a clip without labels does not count
    ([[0, 1, 0], [0, 0, 0]], [[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]], 1 / 2),
    # ties take the worst rank: 2 of 2, and 2 hits of 3
    ([[1, 0, 0]], [[0.5, 0.5, 0.1]], 1 / 2),
    ([[1, 1, 0]], [[0.5, 0.5, 0.5]], 2 / 3),
]


@pytest.mark.parametrize(("truth", "scores", "expected"), GOLDEN)
def test_golden_numbers(truth: list, scores: list, expected: float) -> None:
    assert lwlrap(*tables(truth, scores)) == pytest.approx(expected, abs=1e-12)


def test_constant_scores_take_the_pessimistic_side() -> None:
    # Ranks by position would give (1 + 1/4) / 2 = 0.625 here.
    truth = [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert lwlrap(*tables(truth, np.full((2, 4), 0.5))) == 0.25


@given(problems())
def test_equals_scikit_learns_label_ranking_weighted_by_labels(problem: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    from sklearn.metrics import label_ranking_average_precision_score  # here, since loading it takes a second

    targets, scores = problem
    keep = targets.sum(axis=1) > 0
    truth = targets[keep].to_numpy(int)
    oracle = label_ranking_average_precision_score(truth, scores[keep].to_numpy(), sample_weight=truth.sum(1))
    assert lwlrap(targets, scores) == pytest.approx(oracle, abs=1e-12)


@given(problems())
def test_labels_times_their_weights_sum_to_the_headline(problem: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table = per_label_lwlrap(*problem)
    targets = problem[0]
    assert list(table.index) == list(targets.columns)
    assert (table["lwlrap"] * table["weight"]).sum() == pytest.approx(lwlrap(*problem), abs=1e-12)
    assert table["weight"].sum() == pytest.approx(1)
    assert list(table["clips"]) == list(targets.sum())
    assert (table["lwlrap"].isna() == (table["clips"] == 0)).all()


@given(problems(), st.randoms())
def test_rows_and_columns_may_stand_in_any_order_and_scores_hold_more_clips(problem: tuple, random: object) -> None:
    targets, scores = problem
    rows, columns = list(scores.index), list(scores.columns)
    random.shuffle(rows)  # type: ignore[attr-defined]
    random.shuffle(columns)  # type: ignore[attr-defined]
    more = pd.concat([pd.DataFrame(np.nan, ["extra"], columns), scores.loc[rows, columns]])
    assert lwlrap(targets, more) == lwlrap(targets, scores)
    pd.testing.assert_frame_equal(per_label_lwlrap(targets, more), per_label_lwlrap(targets, scores))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", [lwlrap, per_label_lwlrap])
def test_scores_that_are_not_finite_are_refused(function: object, bad: float) -> None:
    targets, scores = tables([[1, 0], [0, 1]], [[0.1, 0.2], [0.3, bad]])
    with pytest.raises(MelfoldError, match="1 clips with NaN or infinity, first c1"):
        function(targets, scores)  # type: ignore[operator]


def test_what_does_not_fit_is_refused() -> None:
    targets, scores = tables([[1, 0], [0, 1]], [[0.1, 0.2], [0.3, 0.4]])
    with pytest.raises(MelfoldError, match="different labels: L1, Other"):
        lwlrap(targets, scores.rename(columns={"L1": "Other"}))
    with pytest.raises(MelfoldError, match="different labels: L1"):
        lwlrap(targets, scores[["L0"]])
    with pytest.raises(MelfoldError, match="1 clips missing: c1"):
        lwlrap(targets, scores.iloc[:1])
    with pytest.raises(MelfoldError, match="scores repeat clips: c0"):
        lwlrap(targets, pd.concat([scores, scores.iloc[:1]]))
    with pytest.raises(MelfoldError, match="targets repeat clips: c0"):
        lwlrap(pd.concat([targets, targets.iloc[:1]]), scores)
    for wrong in (0.5, np.nan, 2):
        with pytest.raises(MelfoldError, match="targets must be 0 or 1"):
            lwlrap(targets.replace(1, wrong), scores)
    with pytest.raises(MelfoldError, match="at least one true label"):
        lwlrap(targets * 0, scores)
    with pytest.raises(MelfoldError, match="at least one true label"):
        bootstrap_interval(targets * 0, scores, rng=np.random.default_rng(0))


def test_the_constant_floor_ranks_labels_by_how_often_they_stand() -> None:
    targets, _ = tables([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.zeros((4, 3)))
    # L0 first; L1 and L2 tie, and ties take the worst rank.
    assert constant_lwlrap(targets) == pytest.approx((1 + 1 + 1 / 3 + 1 / 3) / 4)


def noisy_problem(clips: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(5)
    truth = np.eye(10)[rng.integers(0, 10, clips)]
    return tables(truth, truth + rng.normal(0, 0.7, truth.shape))


def test_the_bootstrap_interval_brackets_the_score_and_narrows_with_more_clips() -> None:
    widths = []
    for clips in (50, 800):
        problem = noisy_problem(clips)
        interval = bootstrap_interval(*problem, rng=np.random.default_rng(0))
        assert 0 <= interval.low < lwlrap(*problem) < interval.high <= 1
        widths.append(interval.high - interval.low)
    assert widths[1] < widths[0] / 2


def test_the_bootstrap_is_its_generators_and_ignores_clips_without_labels() -> None:
    targets, scores = noisy_problem(40)
    first, again, other = (bootstrap_interval(targets, scores, rng=np.random.default_rng(s)) for s in (1, 1, 2))
    assert first == again != other
    empty = pd.DataFrame(0, ["e"], targets.columns)
    more = pd.concat([targets, empty]), pd.concat([scores, empty])
    assert bootstrap_interval(*more, rng=np.random.default_rng(1)) == first


def test_clips_of_one_group_count_as_one_draw() -> None:
    targets, scores = noisy_problem(60)
    doubled = [pd.concat([table, table.rename(index=lambda name: f"{name} again")]) for table in (targets, scores)]
    groups = pd.Series([*targets.index, *targets.index], doubled[0].index)
    alone, together = (bootstrap_interval(*doubled, groups=g, rng=np.random.default_rng(0)) for g in (None, groups))
    assert together == bootstrap_interval(targets, scores, rng=np.random.default_rng(0)), "copies tell nothing new"
    assert together.high - together.low > 1.2 * (alone.high - alone.low)
    worse = doubled[1] + 0.15 * np.random.default_rng(1).standard_normal(doubled[1].shape)
    alone, together = (paired_bootstrap(*doubled, worse, groups=g, rng=np.random.default_rng(0)) for g in (None, groups))
    assert together.value == pytest.approx(alone.value)
    assert together.high - together.low > 1.2 * (alone.high - alone.low)


def test_a_run_is_no_better_than_itself() -> None:
    targets, scores = noisy_problem(50)
    found = paired_bootstrap(targets, scores, scores, rng=np.random.default_rng(0))
    assert found == Difference(0, 0, 0, 0.5)


def test_a_paired_difference_is_that_of_the_scores_and_its_interval_narrower_than_two_apart() -> None:
    targets, scores = noisy_problem(300)
    rng = np.random.default_rng(1)
    worse = scores + 0.15 * rng.standard_normal(scores.shape)
    found = paired_bootstrap(targets, scores, worse, rng=np.random.default_rng(0))
    assert found.value == pytest.approx(lwlrap(targets, scores) - lwlrap(targets, worse), abs=1e-12)
    assert found.low < found.value < found.high
    a, b = (bootstrap_interval(targets, s, rng=np.random.default_rng(0)) for s in (scores, worse))
    assert found.high - found.low < (a.high - a.low + b.high - b.low) / 2
    mirrored = paired_bootstrap(targets, worse, scores, rng=np.random.default_rng(0))
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    assert mirrored.better == pytest.approx(1 - found.better)


def test_its_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng([3, seed])
        truth = np.eye(4)[rng.integers(0, 4, 80)]
        # Two models of the same quality: the true difference is 0.
        a, b = (tables(truth, truth + 1.2 * rng.standard_normal(truth.shape))[1] for _ in range(2))
        found = paired_bootstrap(tables(truth, truth)[0], a, b, rng=rng, draws=400)
        covered += found.low <= 0 <= found.high
    assert covered >= 52

"""The score to expect: the out-of-fold score, in an interval."""

from __future__ import annotations

import pytest
from made_up import MadeUp

from melfold.combine.expect import expected_score
from melfold.errors import MelfoldError
from melfold.learn.predictions import own_prediction
from melfold.metrics import lwlrap


def test_the_expected_score_is_the_out_of_fold_score_in_an_interval(made_up: MadeUp) -> None:
    own = own_prediction(made_up.run())
    found = expected_score([own], "geometric", [1.0], 6)
    assert found.score == pytest.approx(lwlrap(made_up.competition.targets(), own.read_oof()))
    assert 0 <= found.low < found.score < found.high <= 1
    assert not found.grouped
    both = expected_score([own, own_prediction(made_up.run("two", seed=1))], "rank", [0.5, 0.5], 6)
    assert both.score != found.score
    larger = expected_score([own], "geometric", [1.0], 6000)
    assert larger.high - larger.low < found.high - found.low, "more test clips are less luck"


def test_where_no_score_can_be_expected_the_reason_is_given(made_up: MadeUp) -> None:
    own, part = own_prediction(made_up.run()), own_prediction(made_up.run("part", folds=[0, 1]))
    with pytest.raises(MelfoldError, match="no score can be expected: a run lacks folds"):
        expected_score([own, part], "rank", [0.5, 0.5], 6)

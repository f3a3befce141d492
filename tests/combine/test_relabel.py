"""Doubtful labels, and the file of corrections they are written to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up import LABELS, MadeUp

from melfold.combine.relabel import doubtful, suggest_corrections, write_corrections
from melfold.errors import MelfoldError
from melfold.learn.predictions import own_prediction
from melfold.recipes import read_corrections


def named(values: object, labels: str = "ABC") -> pd.DataFrame:
    array = np.array(values, np.float32)
    return pd.DataFrame(array, index=pd.Index([f"n{i}.wav" for i in range(len(array))], name="fname"), columns=list(labels))


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
    labels[lacking] = truth[lacking]  # two sounds can be heard, one is labelled
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


def test_a_clip_whose_only_label_is_wrong_gets_the_likeliest_other_label() -> None:
    truth = named([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    oof = named([[0.9, 0.1, 0.1], [0.01, 0.2, 0.6], [0.1, 0.9, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9], [0.1, 0.1, 0.9]])
    found = doubtful(truth, oof)
    assert list(found.index) == ["n1.wav"]
    assert (found.at["n1.wav", "wrong"], found.at["n1.wav", "suggested"]) == (("A",), ("C",))
    found = doubtful(named([[1], [0]], "A"), named([[0.1], [0.5]], "A"))
    assert list(found.index) == ["n1.wav"], "where there is no other label, there is nothing to suggest"


def test_a_label_that_no_clip_has_is_never_missing() -> None:
    assert doubtful(named([[1, 0], [1, 0]], "AB"), named([[0.9, 0.99], [0.9, 0.99]], "AB")).empty


def test_suggestions_come_from_a_predictions_held_out_probabilities(made_up: MadeUp) -> None:
    own = own_prediction(made_up.run())
    targets = made_up.competition.targets()
    pd.testing.assert_frame_equal(suggest_corrections(own), doubtful(targets.loc[own.read_oof().index], own.read_oof()))


def test_suggestions_are_written_as_a_table_that_a_recipe_reads_and_never_over_another(made_up: MadeUp, tmp_path: Path) -> None:
    doubts = suggest_corrections(own_prediction(made_up.run()))
    assert len(doubts)
    write_corrections(path := tmp_path / "corrections.csv", doubts, "one", "open")
    found = read_corrections(path)
    assert list(found) == list(doubts.index)
    for fname, row in doubts.iterrows():
        assert tuple(found[fname]["labels"]) == row["suggested"] != row["labels"]
        assert set(found[fname]["labels"]) <= set(LABELS)
        assert found[fname]["why"].startswith("one: ")
    before = path.read_bytes()
    with pytest.raises(MelfoldError, match="the file exists already: .*choose another name"):
        write_corrections(path, doubts, "one", "open")
    assert path.read_bytes() == before

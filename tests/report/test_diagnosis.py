"""The numbers behind a report, against counts made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from melfold.metrics import bootstrap_interval, lwlrap, per_label_lwlrap
from melfold.report.diagnosis import (
    calibration,
    calibration_error,
    confusions,
    count_groups,
    flag_groups,
    largest,
    length_groups,
    scores_by,
    together,
    true_pairs,
)

LABELS = ["Bark", "Meow", "Rain"]
FNAMES = pd.Index(["a.wav", "b.wav", "c.wav", "d.wav"], name="fname")
TARGETS = pd.DataFrame([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]], FNAMES, LABELS, dtype=np.float32)
ALONE = pd.Series(FNAMES, FNAMES)
PROBS = pd.DataFrame([[0.2, 0.7, 0.1], [0.9, 0.4, 0.6], [0.1, 0.8, 0.8], [0.3, 0.2, 0.9]], FNAMES, LABELS, dtype=np.float32)


def test_true_pairs_are_what_lwlrap_is_the_mean_of() -> None:
    pairs = true_pairs(TARGETS, PROBS)
    assert list(zip(pairs["fname"], pairs["label"], pairs["rank"], strict=True)) == [
        ("a.wav", "Bark", 2),
        ("b.wav", "Bark", 1),
        ("b.wav", "Meow", 3),
        ("c.wav", "Meow", 2),  # a tie takes the worst rank
        ("d.wav", "Rain", 1),
    ]
    assert pairs["precision"].tolist() == pytest.approx([1 / 2, 1, 2 / 3, 1 / 2, 1])
    assert pairs["precision"].mean() == pytest.approx(lwlrap(TARGETS, PROBS))


def test_labels_have_an_interval_and_the_scores_of_the_metric() -> None:
    pairs = true_pairs(TARGETS, PROBS)
    table = scores_by(pairs["label"], pairs, ALONE)
    expected = per_label_lwlrap(TARGETS, PROBS)
    assert table["lwlrap"].to_dict() == pytest.approx(expected["lwlrap"].to_dict())
    assert table["clips"].to_dict() == expected["clips"].to_dict()
    assert (table["low"] <= table["lwlrap"]).all()
    assert (table["lwlrap"] <= table["high"]).all()
    assert table.at["Rain", "low"] == table.at["Rain", "high"] == 1


def test_confusions_count_absent_labels_ranked_at_or_above_true_ones() -> None:
    counts = confusions(TARGETS, PROBS)
    assert counts.to_numpy().tolist() == [[0, 1, 0], [0, 0, 2], [0, 0, 0]]
    assert largest(counts.stack(), 5) == [(("Meow", "Rain"), 2), (("Bark", "Meow"), 1)]
    assert together(TARGETS).to_numpy().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_a_calibrated_prediction_lies_on_the_diagonal_and_a_bold_one_below_it() -> None:
    rng = np.random.default_rng(0)
    fnames = pd.Index([f"{n}.wav" for n in range(2000)], name="fname")
    probs = pd.DataFrame(rng.random((2000, 3)), fnames, LABELS, dtype=np.float32)
    targets = (pd.DataFrame(rng.random((2000, 3)), fnames, LABELS) < probs).astype(np.float32)
    honest, bold = calibration(targets, probs), calibration(targets, probs**0.5)
    assert calibration_error(honest) < 0.02 < 0.1 < calibration_error(bold)
    assert honest["pairs"].sum() == 6000
    assert ((honest["low"] <= honest["observed"]) & (honest["observed"] <= honest["high"])).all()
    assert (bold["observed"] < bold["predicted"]).iloc[1:-1].all()


def test_clips_are_grouped_by_length_labels_and_flags() -> None:
    seconds = pd.Series([0.5, 30.0, 1.0, 5.0], FNAMES)
    lengths = length_groups(seconds)
    assert lengths.to_dict() == {"a.wav": "under 1 s", "c.wav": "1 to 2 s", "d.wav": "4 to 8 s", "b.wav": "over 16 s"}
    assert list(lengths.cat.categories)[:3] == ["under 1 s", "1 to 2 s", "2 to 4 s"]
    assert count_groups(TARGETS)["b.wav"] == "two labels"
    flags = flag_groups(pd.Series(["", "short|clipped", "", "silent"], FNAMES))
    assert flags["b.wav"] == "short, clipped"
    pairs = true_pairs(TARGETS, PROBS)
    table = scores_by(pairs["fname"].map(flags), pairs, ALONE)
    interval = bootstrap_interval(TARGETS.loc[["a.wav", "c.wav"]], PROBS, ALONE)
    assert list(table.index) == ["no flag", "short, clipped", "silent"]
    assert table["clips"].tolist() == [2, 1, 1]
    assert table.at["no flag", "lwlrap"] == pytest.approx(lwlrap(TARGETS.loc[["a.wav", "c.wav"]], PROBS))
    assert (table.at["no flag", "low"], table.at["no flag", "high"]) == pytest.approx((interval.low, interval.high))

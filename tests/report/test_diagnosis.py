"""The numbers behind a report, against counts made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from melfold.metrics import lwlrap, per_label_lwlrap
from melfold.report.diagnosis import (
    by_kind,
    by_label,
    calibration,
    confusions,
    count_groups,
    flag_groups,
    largest,
    length_groups,
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
    table = by_label(true_pairs(TARGETS, PROBS), [*LABELS, "Absent"], ALONE)
    expected = per_label_lwlrap(TARGETS, PROBS)
    assert table.loc[LABELS, "lwlrap"].tolist() == pytest.approx(expected["lwlrap"].tolist())
    assert table.loc[LABELS, "clips"].tolist() == expected["clips"].tolist()
    assert (table.loc[LABELS, "low"] <= table.loc[LABELS, "lwlrap"]).all()
    assert (table.loc[LABELS, "lwlrap"] <= table.loc[LABELS, "high"]).all()
    assert table.at["Rain", "low"] == table.at["Rain", "high"] == 1
    assert table.at["Absent", "clips"] == 0
    assert np.isnan(table.at["Absent", "lwlrap"])


def test_confusions_count_absent_labels_ranked_at_or_above_true_ones() -> None:
    counts = confusions(TARGETS, PROBS)
    assert counts.to_numpy().tolist() == [[0, 1, 0], [0, 0, 2], [0, 0, 0]]
    assert largest(counts, 5) == [("Meow", "Rain", 2), ("Bark", "Meow", 1)]
    assert together(TARGETS).to_numpy().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_a_calibrated_prediction_lies_on_the_diagonal_and_a_bold_one_below_it() -> None:
    rng = np.random.default_rng(0)
    fnames = pd.Index([f"{n}.wav" for n in range(2000)], name="fname")
    probs = pd.DataFrame(rng.random((2000, 3)), fnames, LABELS, dtype=np.float32)
    targets = (pd.DataFrame(rng.random((2000, 3)), fnames, LABELS) < probs).astype(np.float32)
    honest, bold = calibration(targets, probs), calibration(targets, probs**0.5)
    assert honest.error < 0.02 < 0.1 < bold.error
    assert honest.bins["pairs"].sum() == 6000
    assert ((honest.bins["low"] <= honest.bins["observed"]) & (honest.bins["observed"] <= honest.bins["high"])).all()
    assert (bold.bins["observed"] < bold.bins["predicted"]).iloc[1:-1].all()


def test_clips_are_grouped_by_length_labels_and_flags() -> None:
    seconds = pd.Series([0.5, 30.0, 1.0, 5.0], FNAMES)
    lengths = length_groups(seconds)
    assert lengths.to_dict() == {"a.wav": "under 1 s", "c.wav": "1 to 2 s", "d.wav": "4 to 8 s", "b.wav": "over 16 s"}
    assert list(lengths.index) == ["a.wav", "c.wav", "d.wav", "b.wav"]
    assert count_groups(TARGETS)["b.wav"] == "two labels"
    flags = flag_groups(pd.Series(["", "short|clipped", "", "silent"], FNAMES))
    assert flags["b.wav"] == "short, clipped"
    table = by_kind(TARGETS, PROBS, flags, ALONE)
    assert list(table.index) == ["no flag", "short, clipped", "silent"]
    assert table["clips"].tolist() == [2, 1, 1]
    assert table.at["no flag", "lwlrap"] == pytest.approx(lwlrap(TARGETS.loc[["a.wav", "c.wav"]], PROBS))

"""Probabilities: named, checked, exact on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from melfold.errors import MelfoldError
from melfold.probs import MEANS, align, check_probs, make_probs, mean_probs, read_probs, write_probs

UNIT = st.floats(0, 1, width=32)
TABLES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=6).flatmap(lambda s: hnp.arrays(np.float32, s, elements=UNIT))


def named(values: np.ndarray) -> pd.DataFrame:
    return make_probs(values, [f"c{i}.wav" for i in range(len(values))], [f"L_{j}_(x)" for j in range(values.shape[1])])


@given(TABLES)
def test_every_float32_comes_back_exactly_from_its_file(values: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.csv"
        write_probs(path, named(values))
        back = read_probs(path)
    pd.testing.assert_frame_equal(back, named(values), check_exact=True)
    assert back.to_numpy().dtype == np.float32
    assert (back.to_numpy().view(np.uint32) == (values + 0.0).view(np.uint32)).all()


def test_numbers_that_look_like_names_and_a_bom_and_crlf_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbffname,A\r\n00123,0.5\r\n")
    probs = read_probs(tmp_path / "p.csv")
    assert probs.at["00123", "A"] == np.float32(0.5)


@given(TABLES, st.randoms())
def test_alignment_is_by_name_whatever_the_order(values: np.ndarray, random: object) -> None:
    probs = named(values)
    rows, columns = list(probs.index), list(probs.columns)
    random.shuffle(rows)  # type: ignore[attr-defined]
    random.shuffle(columns)  # type: ignore[attr-defined]
    shuffled = align(probs, rows, columns, "test")
    assert (list(shuffled.index), list(shuffled.columns)) == (rows, columns)
    pd.testing.assert_frame_equal(align(shuffled, probs.index, list(probs.columns), "test"), probs, check_exact=True)


def test_alignment_names_what_is_missing() -> None:
    probs = named(np.zeros((2, 2), np.float32))
    with pytest.raises(MelfoldError, match=r"mine: 1 clips missing: c9\.wav"):
        align(probs, ["c0.wav", "c9.wav"], list(probs.columns), "mine")
    with pytest.raises(MelfoldError, match="mine: 1 labels missing: Bark"):
        align(probs, probs.index, ["L_0_(x)", "Bark"], "mine")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.1, 1.1])
def test_values_that_are_no_probabilities_are_refused_everywhere(tmp_path: Path, bad: float) -> None:
    values = np.array([[0.5, 0.5], [0.5, bad]])
    with pytest.raises(MelfoldError, match=r"1 clips, first c1\.wav"):
        named(values)
    (tmp_path / "p.csv").write_text(f"fname,A,B\na.wav,0.5,0.5\nb.wav,0.5,{bad}\n")
    with pytest.raises(MelfoldError, match=r"outside 0\.\.1 or not finite: 1 clips, first b\.wav"):
        read_probs(tmp_path / "p.csv")


def test_repeated_clips_and_labels_are_refused(tmp_path: Path) -> None:
    values = np.zeros((2, 2))
    with pytest.raises(MelfoldError, match="repeated clips: a"):
        make_probs(values, ["a", "a"], ["A", "B"])
    with pytest.raises(MelfoldError, match="repeated labels: A"):
        make_probs(values, ["a", "b"], ["A", "A"])
    (tmp_path / "rows.csv").write_text("fname,A\na.wav,0\na.wav,0\n")
    with pytest.raises(MelfoldError, match=r"rows\.csv: repeated clips: a\.wav"):
        read_probs(tmp_path / "rows.csv")
    (tmp_path / "columns.csv").write_text("fname,A,B,A\na.wav,0,0,1\n")
    with pytest.raises(MelfoldError, match=r"columns\.csv: repeated labels: A"):
        read_probs(tmp_path / "columns.csv")


def test_a_shape_that_does_not_fit_its_names_is_refused() -> None:
    with pytest.raises(MelfoldError, match=r"\(2, 2\) for 2 clips and 3 labels"):
        make_probs(np.zeros((2, 2)), ["a", "b"], ["A", "B", "C"])


@pytest.mark.parametrize("text", ["", "name,A\na.wav,0\n", "fname,A\na.wav,yes\n", "fname,A\na.wav,0,1,2\n"])
def test_a_file_that_is_no_table_of_probabilities_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(MelfoldError, match=r"p\.csv"):
        read_probs(tmp_path / "p.csv")
    with pytest.raises(MelfoldError, match="no such predictions"):
        read_probs(tmp_path / "none.csv")


def test_means_by_hand() -> None:
    a, b = (make_probs(np.array([values]), ["c"], ["A", "B"]) for values in ([0.2, 1.0], [0.8, 0.25]))
    np.testing.assert_allclose(mean_probs([a, b], "arithmetic").loc["c"], [0.5, 0.625], rtol=1e-6)
    np.testing.assert_allclose(mean_probs([a, b], "geometric").loc["c"], [0.4, 0.5], rtol=1e-6)
    with pytest.raises(MelfoldError, match="unknown mean: harmonic"):
        mean_probs([a, b], "harmonic")


@given(TABLES, st.sampled_from(["arithmetic", "geometric"]))
def test_a_mean_of_equals_is_itself_and_stays_a_probability(values: np.ndarray, kind: str) -> None:
    probs = named(values)
    mean = mean_probs([probs, probs.iloc[::-1, ::-1]], kind)
    check_probs(mean, "mean")
    np.testing.assert_allclose(mean, probs, rtol=1e-5, atol=1e-37)


def test_one_models_zero_does_not_veto_the_ranking_of_the_others() -> None:
    zero = make_probs(np.zeros((1, 2)), ["c"], ["A", "B"])
    other = make_probs(np.array([[0.9, 0.1]]), ["c"], ["A", "B"])
    mean = mean_probs([zero, other], "geometric").loc["c"]
    assert mean["A"] > mean["B"] > 0


def test_predictions_of_different_clips_are_never_averaged() -> None:
    a = make_probs(np.zeros((2, 1)), ["a", "b"], ["A"])
    for other in (make_probs(np.zeros((2, 1)), ["a", "c"], ["A"]), make_probs(np.zeros((1, 1)), ["a"], ["A"])):
        with pytest.raises(MelfoldError, match="clips"):
            mean_probs([a, other], "arithmetic")


def test_logit_and_rank_means_by_hand() -> None:
    a, b = (make_probs(np.array([values]), ["c"], ["A", "B", "C"]) for values in ([0.2, 0.9, 0.5], [0.6, 0.7, 0.5]))
    odds = np.sqrt(np.array([0.2 / 0.8 * 0.6 / 0.4, 0.9 / 0.1 * 0.7 / 0.3, 1]))
    np.testing.assert_allclose(mean_probs([a, b], "logit").loc["c"], odds / (1 + odds), rtol=1e-5)
    np.testing.assert_allclose(mean_probs([a, b], "rank").loc["c"], [1.5 / 4, 3 / 4, 1.5 / 4], rtol=1e-6)


@pytest.mark.parametrize("kind", MEANS)
def test_a_weight_counts_as_so_many_tables(kind: str) -> None:
    rng = np.random.default_rng(0)
    a, b = (named(rng.random((5, 4)).astype(np.float32)) for _ in range(2))
    weighted = mean_probs([a, b], kind, [3, 1])
    np.testing.assert_allclose(weighted, mean_probs([a, a, b, a], kind), rtol=1e-5)
    np.testing.assert_allclose(mean_probs([a, b], kind, [1, 0]), mean_probs([a], kind), rtol=1e-6)


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, np.nan], [1, 1, 1]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    a = named(np.full((2, 2), 0.5))
    with pytest.raises(MelfoldError, match="weights do not fit"):
        mean_probs([a, a], "arithmetic", weights)


@given(TABLES)
def test_a_rank_mean_keeps_every_clips_order(values: np.ndarray) -> None:
    mean = mean_probs([named(values)], "rank").to_numpy()
    for row, ranks in zip(values, mean, strict=True):
        assert (np.sign(row[:, None] - row) == np.sign(ranks[:, None] - ranks)).all()

"""The record: its rows, the choice of two, the picture."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from melfold.errors import MelfoldError
from melfold.kaggle.ledger import COLUMNS, Ledger, Row, choose_two
from melfold.report.ledger import plot_ledger


def row(id: str, oof: float | None = None, public: float | None = None, private: float | None = None, **more: str) -> Row:
    text = {"oof_lwlrap": oof, "public_score": public, "private_score": private}
    scores = {key: "" if value is None else str(value) for key, value in text.items()}
    made = Row(id, id, "2026-01-01T00:00:00Z", "abc", id, f"w-{id}", "r", "f", "scratch", "", status="complete")
    return replace(made, **scores, **more)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv")
    rows = [row("a", 0.9, 0.7), row("b", note='commas, "quotes"\nand lines')]
    for one in rows:
        ledger.add(one)
    assert ledger.rows() == rows
    assert ledger.path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert ledger.update("a", status="error").status == "error"
    assert [r.status for r in ledger.rows()] == ["error", "complete"]


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv")
    threads = [threading.Thread(target=ledger.add, args=(row(f"r{i}"),)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {r.id for r in ledger.rows()} == {f"r{i}" for i in range(16)}


DAMAGE = {
    "not UTF-8": (lambda text: text[:-20] + b"\xff" + text[-20:], "is no ledger"),
    "cut in a line": (lambda text: text[:-30], "is cut: row 2 is not whole"),
    "cut in the last cell": (lambda text: text[:-2], "is cut: row 2 is not whole"),
    "a row twice": (lambda text: text + text.splitlines(keepends=True)[-1], "has a row twice"),
    "a score that is none": (lambda text: text.replace(b"0.7", b"O.7"), "not a score: 'O.7' of a"),
    "an open quote": (lambda text: text.replace(b"a,a,", b'"a,a,'), "ledger.csv"),
    "empty": (lambda text: b"", "is no ledger"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_ledger_is_refused_in_one_line_and_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv")
    for one in (row("a", 0.9, 0.7), row("b", note="a note")):
        ledger.add(one)
    damage, said = DAMAGE[kind]
    damaged = damage(ledger.path.read_bytes())
    ledger.path.write_bytes(damaged)
    for use in (ledger.rows, lambda: ledger.add(row("c"))):
        with pytest.raises(MelfoldError, match=said) as caught:
            use()
        assert len(caught.value.lines) == 1
    assert ledger.path.read_bytes() == damaged


@pytest.mark.parametrize("text", ["id,other\n1,2\n", f"{','.join(COLUMNS)}\n{'x,' * 15}lost,\n"])
def test_a_table_that_is_no_ledger_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    path.write_text(text)
    with pytest.raises(MelfoldError, match="ledger.csv"):
        Ledger(path).rows()


def test_the_two_to_select_are_the_best_by_oof_and_the_best_of_the_others_by_public() -> None:
    rows = [row("a", 0.90, 0.70), row("b", 0.95, 0.68), row("c", 0.80, 0.75), row("d", 0.99, None, status="submitted")]
    first, second = choose_two(rows)
    assert (first.row.id, second.row.id) == ("b", "c")
    assert "0.9500" in first.reason
    assert "0.7500" in second.reason
    assert choose_two(rows[3:]) == []
    assert [c.row.id for c in choose_two(rows[:1])] == ["a"]


def test_the_same_weights_are_not_selected_twice() -> None:
    twin = replace(row("b2", 0.95, 0.69), runs="b", weights="w-b")
    assert [c.row.id for c in choose_two([row("b", 0.95, 0.68), twin, row("a", 0.5, 0.5)])] == ["b2", "a"]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    rows = [row("a", 0.90, 0.70, 0.71), row("b", 0.95, 0.68, 0.70), row("c", 0.80, 0.66)]
    plot_ledger(rows, tmp_path / "ledger.png")
    with Image.open(tmp_path / "ledger.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    with pytest.raises(MelfoldError, match="too little to draw"):
        plot_ledger(rows[:1], tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()

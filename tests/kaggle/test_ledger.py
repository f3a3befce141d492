"""The record: its rows, the choice of two, the picture."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from kaggle_world import SLUG, environment
from PIL import Image
from typer.testing import CliRunner

from melfold.cli.main import app
from melfold.errors import MelfoldError
from melfold.facts import facts_of
from melfold.files import Home
from melfold.kaggle.client import Kaggle
from melfold.kaggle.ledger import COLUMNS, OLD_COLUMNS, Ledger, Row, choose_two
from melfold.kaggle.standings import fetch_table, place_at, place_of, read_table, table_path
from melfold.report.ledger import draw_ledger, plot_ledger
from tests.fake_kaggle import FakeKaggle


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
    "cut after the last cell": (lambda text: text[:-1], "is cut: row 2 is not whole"),
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


def test_a_public_score_of_zero_beside_a_private_one_is_none() -> None:
    late = row("a", 0.9, 0.0, 0.7)
    assert (late.public, late.private, late.public_score) == (None, 0.7, "0.0")
    assert row("b", 0.9, 0.0).public == 0, "it may be a real score"
    assert choose_two([late, row("b", 0.8, 0.0, 0.71)]) == [], "late submissions are not selected"
    assert [c.row.id for c in choose_two([late, row("c", 0.8, 0.6, 0.71)])] == ["c"]


def test_an_old_ledger_is_read_and_upgraded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv")
    ledger.add(row("a", 0.9, 0.7, kernel="someone/melfold-infer-a"))
    lines = [line.rsplit(",", 2)[0] for line in ledger.path.read_text().splitlines()]
    ledger.path.write_text("\n".join(lines) + "\n")
    assert lines[0] == ",".join(OLD_COLUMNS)
    (old,) = ledger.rows()
    assert (old.competition, old.account) == (SLUG, "someone")
    ledger.add(row("b"))
    assert ledger.path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert ledger.rows()[0] == old


FAT2019 = facts_of("fat2019")
TABLE = [0.76 - 0.0001 * n for n in range(9)] + [0.74399] + [0.73] * 39 + [0.7181] + [0.7] * 49 + [0.69233] + [0.5] * 317


@pytest.mark.parametrize(
    ("score", "rank", "exact", "medal", "following", "missing"),
    [
        (0.77, 1, 1, "gold", "", 0),
        (0.74399, 10, 10, "gold", "rank 1", 0.01601),
        (0.74398, 10, 11, "silver", "gold", 0.00001),
        (0.7181, 50, 50, "silver", "gold", 0.02589),
        (0.70, 85, 51, "bronze", "silver", 0.0181),
        (0.69233, 100, 100, "bronze", "silver", 0.02577),
        (0.6, 170, 101, "", "bronze", 0.09233),
        (0.0, 417, 417, "", "bronze", 0.69233),
    ],
)
def test_where_a_score_stands(score: float, rank: int, exact: int, medal: str, following: str, missing: float) -> None:
    assert FAT2019.standings
    place = place_of(score, FAT2019.standings)
    assert (place.rank, place.exact, place.medal, place.next) == (rank, False, medal, following)
    assert place.missing == pytest.approx(missing)
    assert place_of(score, FAT2019.standings, TABLE).rank == exact
    assert f"about rank {rank} of 417" in str(place)


def test_the_full_leaderboard_is_fetched_once_and_must_be_the_final_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home, path = Home(tmp_path / "home"), table_path(Home(tmp_path / "home"), FAT2019)
    with FakeKaggle(tmp_path / "kaggle") as fake, environment(fake.env(tmp_path / "user") | {"MELFOLD_PACE": "0"}):
        fake.leaderboard = TABLE[1:]
        fetch_table(Kaggle(), home)
        assert "not the final Private one" in caplog.text
        assert not path.exists()
        fake.leaderboard = TABLE
        fetch_table(Kaggle(), home)
        assert read_table(home, FAT2019) == pytest.approx(sorted(TABLE, reverse=True), abs=1e-5)
        asked = len(fake.calls)
        fetch_table(Kaggle(), home)
        assert len(fake.calls) == asked
        fetch_table(Kaggle(), home, refresh=True)
        assert len(fake.calls) > asked
    place = place_at(home, "fat2019", 0.70)
    assert place
    assert str(place) == "rank 51 of 417 (top 12 %), bronze; 0.01810 below silver"
    assert place_at(home, "demo", 0.70) is place_at(home, "fat2019", None) is None


def test_the_table_shows_where_each_submission_stands(tmp_path: Path) -> None:
    home = Home(tmp_path)
    Ledger.of(home).add(row("late", 0.9, 0.0, 0.70, competition=SLUG))
    Ledger.of(home).add(row("demo", 0.8, 0.5, 0.6, competition="demo"))
    shown = CliRunner().invoke(app, ["ledger", "show", "--home", str(tmp_path)]).stdout.splitlines()
    assert "0.90000 - 0.70000 ~85/417 20 % bronze silver +0.01810" in " ".join(shown[1].split())
    assert "0.80000 0.50000 0.60000 - - - -" in " ".join(shown[2].split())
    assert [line.split(",")[0] for line in shown if line.startswith("select")] == ["select 1: demo ()"]
    found = json.loads(CliRunner().invoke(app, ["ledger", "show", "--json", "--home", str(tmp_path)]).stdout)["rows"]
    assert (found[0]["public_score"], found[0]["place"]["rank"], found[1]["place"]) == (0.0, 85, None)


def test_twenty_submissions_with_long_names_are_readable() -> None:
    import matplotlib.pyplot as plt

    rows = [
        row(f"a-run-with-a-long-name-{n:02}+another-one-with-other-settings-{n}", 0.84 + 0.002 * (n % 5), 0.0, 0.69 + 0.002 * n)
        for n in range(20)
    ]
    rows = [replace(r, competition=SLUG, time=f"2026-01-{n + 1:02}T10:00:00Z") for n, r in enumerate(rows)]
    figure = draw_ledger(rows)
    left, right, names = figure.axes
    figure.canvas.draw()
    numbers = [text for text in left.texts if text.get_text().isdigit()]
    boxes = [text.get_window_extent() for text in numbers]
    assert sorted(int(text.get_text()) for text in numbers) == list(range(1, 21))
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)], "no number hides another"
    (listed,) = names.texts
    assert listed.get_window_extent().x1 <= figure.bbox.x1
    assert listed.get_window_extent().y0 >= 0
    for axes in (left, right):
        assert {"silver 0.71810", "bronze 0.69233"} <= {text.get_text() for text in axes.texts}
    assert {line.get_label() for line in right.lines} >= {"best Private so far"}
    plt.close(figure)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    rows = [row("a", 0.90, 0.70, 0.71), row("b", 0.95, 0.68, 0.70), row("c", 0.80, 0.66)]
    plot_ledger(rows, tmp_path / "ledger.png")
    with Image.open(tmp_path / "ledger.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    with pytest.raises(MelfoldError, match="too little to draw"):
        plot_ledger(rows[:1], tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()

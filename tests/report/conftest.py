"""The browser and the pages that reports' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, Browser, start_browser
from report_world import HOSTILE_LABELS, Pages, made_competition, made_run

from melfold.compute import Compute
from melfold.data.competition import Competition
from melfold.files import Home
from melfold.kaggle.ledger import Ledger, Row
from melfold.learn.predictions import own_prediction
from melfold.report.home_page import write_home_page
from melfold.report.review_page import write_review_page
from melfold.report.run_page import write_run_page
from melfold.stages import cache


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of a session."""
    pytest.importorskip("selenium", reason="needs selenium")
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs chromium and chromedriver: `make browser` installs them where apt-get is there")
    started = start_browser(tmp_path_factory.mktemp("browser"))
    yield started
    started.driver.quit()


def make_pages(root: Path, competition: Competition) -> Pages:
    """Two runs on a competition, five submissions, and all kinds of pages."""
    home = Home(root)
    first = made_run(home, "first", competition)
    second = made_run(home, "second", competition, "seed=1", skill=3.0, seed=1)
    cache(competition, home, first.recipe, Compute(jobs=1))
    for number in range(5):
        oof, private = 0.80 + 0.02 * number, 0.66 + 0.025 * number
        row = Row(f"tag{number}", f"s{number}", f"2026-10-0{number + 1}T12:00:00Z", "", "first", "", "", "", "open", f"{oof:.5f}")
        Ledger.of(home).add(replace(row, competition="fat2019"))
        Ledger.of(home).update(row.tag, public_score="0.00000", private_score=f"{private:.5f}", status="complete")
    paths = [home.reports / f"{name}.html" for name in ("first", "first-vs-second", "first-review", "index")]
    a, b = own_prediction(first), own_prediction(second)
    write_run_page([a], paths[0], competition=competition)
    write_run_page([a, b], paths[1], competition=competition)
    write_review_page(a, paths[2], count=5, competition=competition)
    write_home_page(home, paths[3])
    return Pages(home, competition, (first, second), *paths)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Pages of an ordinary competition. Treat them as read-only."""
    root = tmp_path_factory.mktemp("report")
    return make_pages(root, made_competition(root / "data"))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Pages of a competition whose labels and file names try to run code or to break the layout."""
    root = tmp_path_factory.mktemp("hostile")
    names = ("<img src=x onerror='window.hacked = 4'>.wav", "a&b;\"c'.wav", "=cmd|' $(touch x) `id`.wav", "x" * 120 + ".wav")
    return make_pages(root, made_competition(root / "data", HOSTILE_LABELS, names=names))

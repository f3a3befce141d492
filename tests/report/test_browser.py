"""Pages in a real browser: quiet, offline, at every width, accessible, and used by keyboard alone."""

from __future__ import annotations

import base64
import csv
import hashlib
import re
import shlex
from pathlib import Path

import pytest
from browser import WIDTHS, Browser
from report_world import Pages

from melfold.recipes import load_recipe, read_corrections

SPILLED = """
    return [...document.querySelectorAll('.card:not(.scroll), .clip')]
        .filter(card => card.scrollWidth > card.clientWidth + 1).map(card => card.textContent.trim().slice(0, 60))
"""
"""The begin of each card whose content is wider than the card."""

KINDS = ("run", "two", "review", "index")


def open_labels(browser: Browser) -> None:
    """Open the first two labels of a run's page."""
    browser.run("[...document.querySelectorAll('.open')].slice(0, 2).forEach(button => button.click())")


def picture_loaded(browser: Browser) -> bool:
    return browser.run("const image = document.querySelector('.spectrogram img'); return image && image.naturalWidth > 0")


def sideways(browser: Browser) -> int:
    """By how many pixels the page is wider than the window."""
    return browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_a_page_is_one_file_whose_policy_allows_its_own_script_alone(pages: Pages, hostile: Pages) -> None:
    """It needs no browser, but the hostile pages, which take long to make."""
    for page in (*pages.all, *hostile.all):
        text = page.read_text()
        assert not re.search(r'(src|href)="?(https?:)?//', text)
        scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
        assert len(scripts) == 1
        digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
        assert f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in (
            text.replace("&#39;", "'")
        )
        assert "<img src=x" not in text
        assert "<svg onload" not in text
    assert not list(pages.home.reports.glob(".*"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_logs_nothing_and_asks_for_nothing_outside_itself(browser: Browser, pages: Pages, kind: str) -> None:
    browser.open(getattr(pages, kind))
    open_labels(browser)
    assert browser.messages() == []
    assert browser.requests() <= {"file", "data"}
    assert browser.run("return document.title").endswith("melfold")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_never_scrolls_sideways(browser: Browser, pages: Pages, hostile: Pages, kind: str, width: int) -> None:
    for world in (pages, hostile):
        browser.open(getattr(world, kind), width=width)
        open_labels(browser)
        assert sideways(browser) == 0
        assert browser.run(SPILLED) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_has_no_serious_accessibility_problem(browser: Browser, pages: Pages, kind: str, dark: bool) -> None:
    axe = pytest.importorskip("axe_core_python", reason="needs axe-core-python")
    browser.open(getattr(pages, kind), dark=dark)
    open_labels(browser)
    browser.run((Path(axe.__file__).parent / "axe.min.js").read_text())
    result = browser.driver.execute_async_script("const done = arguments[0]; axe.run().then(done)")
    assert len(result["passes"]) > 20
    serious = [
        (found["id"], [node["html"][:120] for node in found["nodes"]][:3])
        for found in result["violations"]
        if found["impact"] in ("serious", "critical")
    ]
    assert serious == []


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_names_from_the_data_are_text_and_nothing_else(browser: Browser, hostile: Pages, kind: str) -> None:
    browser.open(getattr(hostile, kind))
    open_labels(browser)
    if kind == "review":
        browser.keys(*"kkxsx1n2")
    assert browser.run("return window.hacked") is None
    assert browser.messages() == []
    assert browser.requests() <= {"file", "data"}
    if kind != "index":
        assert all(label in browser.run("return document.body.textContent") for label in hostile.competition.labels[:5])


def test_what_has_the_focus_is_seen(browser: Browser, pages: Pages) -> None:
    for page in pages.all:
        browser.open(page)
        for _ in range(6):
            browser.keys("\ue004")  # Tab
            style = "const s = getComputedStyle(document.activeElement); return [s.outlineStyle, parseFloat(s.outlineWidth)]"
            kind, width = browser.run(style)
            assert kind != "none"
            assert width >= 2


def test_a_label_opens_and_shows_its_worst_clips(browser: Browser, pages: Pages) -> None:
    browser.open(pages.run)
    assert not browser.run("return document.querySelector('.clip')")
    browser.run("document.querySelector('.open').focus()")
    browser.keys("\ue007")  # Enter
    browser.wait(lambda: picture_loaded(browser))
    assert browser.run("return document.querySelectorAll('.clip').length") == 3
    assert browser.run("return document.querySelectorAll('.clip .windows span').length") >= 3
    browser.keys("\ue007")
    assert browser.run("return document.querySelector('.detail').hidden")


def test_labels_are_sorted_and_filtered(browser: Browser, pages: Pages) -> None:
    browser.open(pages.run)
    names = "return [...document.querySelectorAll('#label-table .open')].map(b => b.textContent)"
    press = "document.querySelectorAll('#label-table .sort')[arguments[0]].click()"
    browser.run(press, 0)
    assert browser.run(names) == sorted(pages.competition.labels)
    browser.run(press, 0)
    assert browser.run(names) == sorted(pages.competition.labels, reverse=True)
    browser.run(press, 1)
    scores = browser.run("return [...document.querySelectorAll('#label-table tbody')].map(b => +b.rows[0].cells[1].textContent)")
    assert scores == sorted(scores, reverse=True)
    browser.run("document.getElementById('filter').focus()")
    browser.keys(*"zip")
    shown = "return [...document.querySelectorAll('#label-table tbody')].filter(b => !b.hidden).length"
    assert browser.run(shown) == 1
    assert browser.run("return document.getElementById('label-table-count').textContent") == "1 of 6"


def test_a_sound_plays(browser: Browser, pages: Pages) -> None:
    browser.open(pages.review)
    browser.keys(" ")
    browser.wait(lambda: browser.run("return sound.currentTime > 0"))
    assert browser.run("return sound.error") is None
    seconds = browser.run("return [sound.duration, player.item.seconds]")
    assert seconds[0] == pytest.approx(seconds[1], abs=0.05)
    browser.wait(lambda: browser.run("return playing === null"))  # at its end


def fresh(browser: Browser, page: Path) -> None:
    """Open a review without decisions of another test."""
    browser.open(page)
    browser.run("localStorage.clear()")
    browser.open(page)


def test_three_clips_are_reviewed_by_keyboard_alone(browser: Browser, pages: Pages) -> None:
    fresh(browser, pages.review)
    clips = browser.run("return review.clips")
    browser.run("document.getElementById('who').focus()")
    browser.keys(*"Ada", "\ue00c")  # Escape
    # The first: drop its first label, add one by name.
    browser.keys("1", "a")
    new = next(label for label in pages.competition.labels if label not in clips[0]["labels"])
    browser.keys(*new, "\ue007")
    browser.keys("o", *'is "loud",\x20it', "\ue00c", "n")
    # The second stays, the third goes.
    browser.keys("k", "x")
    assert browser.run("return document.getElementById('count').textContent") == "3 of 5 decided"
    for old in browser.downloads.glob("*"):
        old.unlink()
    browser.keys("d")
    path = browser.downloads / "corrections.csv"
    browser.wait(path.exists)
    labels = sorted({*clips[0]["labels"][1:], new}, key=pages.competition.labels.index)
    suggested = ", ".join(clips[0]["suggested"])
    why = f'first suggests {suggested}; Ada adds {new}, drops {clips[0]["labels"][0]}; is "loud", it'
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["fname", "labels", "why", "track"],
            [clips[0]["fname"], ",".join(labels), why, "scratch"],
        ]
    assert read_corrections(path) == {clips[0]["fname"]: {"labels": tuple(labels), "why": why, "track": "scratch"}}


def test_the_command_of_a_review_is_one_that_the_kit_takes(browser: Browser, hostile: Pages) -> None:
    fresh(browser, hostile.review)
    fnames = [clip["fname"] for clip in browser.run("return review.clips")]
    browser.keys("o", *"it's bad", "\ue007", "x", "o", *"it's bad", "\ue007", *"xxxx")
    command = shlex.split(browser.run("return document.getElementById('command').textContent").replace("\\\n", " "))
    assert command[:2] == ["melfold", "train"]
    assert command[2] == str(hostile.competition.root.resolve())
    sets = [command[at + 1] for at, word in enumerate(command) if word == "--set"]
    excluded = load_recipe("demo", sets).data.exclude
    assert excluded.keys() >= {fname for fname in fnames if "=" not in fname}  # the kit has no way to write such a name
    assert any("listener excludes it: it's bad" in why for why in excluded.values())


def test_decisions_are_kept_when_the_page_is_opened_again(browser: Browser, pages: Pages) -> None:
    fresh(browser, pages.review)
    browser.keys("k", "x", "1")
    browser.open(pages.review)
    assert browser.run("return document.getElementById('summary').textContent") == "1 kept, 1 changed, 1 excluded."
    assert browser.run("return state.at") == 2
    browser.keys("u")
    assert browser.run("return document.getElementById('summary').textContent") == "1 kept, 0 changed, 1 excluded."


def test_a_clip_without_any_label_is_not_a_correction(browser: Browser, pages: Pages) -> None:
    fresh(browser, pages.review)
    for number in range(len(browser.run("return review.clips[0].labels")), 0, -1):
        browser.keys(str(number))
    assert not browser.run("return document.getElementById('empty').hidden")
    assert browser.run("return csv()") == "fname,labels,why,track\n"


def test_single_keys_can_be_turned_off(browser: Browser, pages: Pages) -> None:
    fresh(browser, pages.review)
    browser.run("document.getElementById('keys').click()")
    browser.keys("k", "x")
    assert browser.run("return document.getElementById('count').textContent") == "0 of 5 decided"

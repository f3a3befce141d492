"""Pages as files: what is in them, and what is refused."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from report_world import LABELS, Pages, made_competition, made_run

from melfold.combine.oof import score
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.kaggle.ledger import Row
from melfold.learn.predictions import own_prediction
from melfold.recipes import read_corrections
from melfold.report.charts import name_points, new_chart, svg
from melfold.report.home_page import trust_words
from melfold.report.ledger import plot_ledger, scored
from melfold.report.media import SR, embed_spectrogram, encode_sound
from melfold.report.pages import breaks, percent, span
from melfold.report.pictures import describe_windows, window_shares
from melfold.report.review_page import write_review_page
from melfold.report.run_page import write_run_page
from melfold.report.training import cost_of, recipe_rows


def data_of(page: Path, name: str) -> object:
    """The JSON that a page holds under a name."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page.read_text(), re.S)
    assert found
    return json.loads(found[1])


def test_a_runs_page_holds_its_scores_and_its_labels(pages: Pages) -> None:
    text, scores = pages.run.read_text(), score(own_prediction(pages.runs[0]))
    for value in (scores.oof_lwlrap, scores.low, scores.high):
        assert f"{value:.5f}" in text
    for label in LABELS:
        assert breaks(label) in text
    assert text.count("<tbody>") >= len(LABELS)


def test_two_runs_are_compared_on_the_same_clips(pages: Pages) -> None:
    text = pages.two.read_text()
    assert "first is better." in text
    assert "second" in text
    for run in pages.runs:
        assert f"{score(own_prediction(run)).oof_lwlrap:.5f}" in text


def test_the_homes_page_holds_runs_submissions_and_medal_lines(pages: Pages) -> None:
    text = pages.index.read_text()
    assert all(name in text for name in ("first", "second", "s0", "s4", "0.74399", "0.71810", "0.69233"))
    assert "OOF scores are 0.130 above Private scores on average (5 submissions)." in text
    assert "rank correlation 1.00" in text
    assert ">0.00000<" not in text


def test_pictures_and_sounds_are_those_of_the_clips(pages: Pages) -> None:
    clips, media = data_of(pages.review, "review")["clips"], data_of(pages.review, "media")
    for clip in clips:
        item = media[clip["media"]]
        assert base64.b64decode(item["picture"].partition(",")[2])[8:12] == b"WEBP"
        sound, sr = soundfile.read(io.BytesIO(base64.b64decode(item["sound"].partition(",")[2])))
        original = soundfile.info(pages.competition.curated.at[clip["fname"], "path"])
        assert sr == SR
        assert sound.ndim == 1
        assert len(sound) / sr == pytest.approx(original.duration, abs=0.01) == item["seconds"]
        assert item["bytes"] < 8000


def test_sounds_can_be_left_out(pages: Pages, tmp_path: Path) -> None:
    prediction = own_prediction(pages.runs[0])
    quiet = write_run_page([prediction], tmp_path / "quiet.html", competition=pages.competition, audio=False, clips=1)
    assert quiet.told == "This page has no sounds."
    assert all(item["picture"] and not item["sound"] for item in quiet.items)
    without = write_review_page(prediction, tmp_path / "without.html", count=2)
    assert all(item["picture"] and not item["sound"] for item in without.items)
    assert "audio/ogg" not in (tmp_path / "quiet.html").read_text() + (tmp_path / "without.html").read_text()


def test_a_run_whose_cache_is_gone_still_has_a_page(tmp_path: Path) -> None:
    competition, home = made_competition(tmp_path / "data", clips=24), Home(tmp_path)
    prediction = own_prediction(made_run(home, "bare", competition))
    drawn = write_run_page([prediction], tmp_path / "drawn.html", competition=competition, clips=1)
    assert all(item["picture"] and item["sound"] for item in drawn.items)
    bare = write_run_page([prediction], tmp_path / "bare.html", clips=1)
    assert not any(item["picture"] or item["sound"] for item in bare.items)
    competition.curated.iloc[0]["path"].write_bytes(b"not audio")
    write_run_page([prediction], tmp_path / "damaged.html", competition=competition, clips=24)


def test_what_cannot_be_shown_is_refused(pages: Pages, tmp_path: Path) -> None:
    first, second = (own_prediction(run) for run in pages.runs)
    with pytest.raises(MelfoldError, match="a page shows one or two predictions"):
        write_run_page([first, second, first], tmp_path / "three.html")
    with pytest.raises(MelfoldError, match="a run is named twice"):
        write_run_page([first, first], tmp_path / "twice.html")
    assert not list(tmp_path.iterdir())


def test_a_review_starts_from_the_labels_that_the_run_learned(tmp_path: Path) -> None:
    competition, home = made_competition(tmp_path / "data", clips=24), Home(tmp_path)
    fname = competition.curated.index[0]
    corrections = tmp_path / "corrections.csv"
    corrections.write_text(f'fname,labels,why\n{fname},"Rain,Bark","heard, twice"\n')
    prediction = own_prediction(made_run(home, "again", competition, f"data.corrections={corrections}"))
    write_review_page(prediction, tmp_path / "review.html", count=24)
    data = data_of(tmp_path / "review.html", "review")
    clip = next(clip for clip in data["clips"] if clip["fname"] == fname)
    assert sorted(clip["labels"]) == ["Bark", "Rain"]
    assert data["corrections"] == [[fname, list(read_corrections(corrections)[fname]["labels"]), "heard, twice", "scratch"]]
    assert len(data["clips"]) == 24
    doubts = [clip["doubt"] for clip in data["clips"]]
    assert doubts[: sum(d is not None for d in doubts)] == sorted((d for d in doubts if d is not None), reverse=True)


def test_the_recipe_is_shown_as_differences_with_reasons(pages: Pages) -> None:
    rows = {row["key"]: row for row in recipe_rows([run.recipe for run in pages.runs])}
    assert rows["seed"]["here"] == ["0", "1"]
    assert rows["seed"]["differs"]
    assert rows["logmel.sr"] == {
        "key": "logmel.sr",
        "base": "44100",
        "here": ["16000", "16000"],
        "why": "the rate of the demo's recordings",
        "differs": False,
    }
    assert "train.weight_decay" not in rows
    cost = cost_of(pages.runs[0])
    assert cost.seconds == pytest.approx(3 * 120.5)
    assert cost.crops_per_second == pytest.approx(3 * 400 * pages.runs[0].recipe.train.batch_size / cost.seconds)


def test_windows_cover_the_clip_and_are_described_in_words(pages: Pages) -> None:
    recipe = pages.runs[0].recipe
    frames = recipe.views[0].length
    assert window_shares(frames // 2, recipe) == [(0.0, 1.0)]
    assert describe_windows(frames // 2, recipe) == "1 window of 1.3 s: the clip is repeated to fill it"
    shares = window_shares(3 * frames, recipe)
    assert shares[0][0] == 0
    assert shares[-1][1] == pytest.approx(1)
    assert all(a[1] >= b[0] for a, b in itertools.pairwise(shares))
    assert describe_windows(3 * frames, recipe) == f"{len(shares)} windows of 1.3 s"


def test_a_sound_and_a_picture_are_small() -> None:
    rng = np.random.default_rng(0)
    noise = (0.1 * rng.standard_normal(10 * SR)).astype(np.float32)
    assert len(encode_sound(noise)) * 8 / 10 < 60_000  # bits a second, of the hardest sound there is
    assert len(embed_spectrogram(rng.normal(-40, 10, (3000, 128)))) < 24_000  # characters, likewise
    assert embed_spectrogram(np.zeros((1, 64)))


def test_a_score_of_zero_is_no_score(tmp_path: Path) -> None:
    rows = [
        Row(f"t{n}", f"s{n}", "2026-10-01T00:00:00Z", "", "", "", "", "", "open", f"0.8{n}", "0.00000", f"0.7{n}")
        for n in range(3)
    ]
    assert scored(rows, "public") == []
    assert [value for _, value, _ in scored(rows, "private")] == [0.7, 0.71, 0.72]
    assert "Private = 1.000 x OOF - 0.10000" in trust_words(rows)
    assert "needs 3 submissions" in trust_words(rows[:2])
    assert trust_words([]).startswith("No submission")
    plot_ledger(rows, tmp_path / "ledger.png")
    assert (tmp_path / "ledger.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(MelfoldError, match="too little to draw: 1 submissions"):
        plot_ledger(rows[:1], tmp_path / "one.png")


def test_a_chart_is_described_in_words_and_its_text_is_escaped() -> None:
    axes = new_chart("x & y", "$y")
    axes.plot([0, 1, 2], [0.1, 0.4, 0.2], color="C1")
    name_points(axes, [(0, 0.1, "<i>x</i>"), (1, 0.4, "a $ b $")])
    text = svg(axes, "<title>. up, then down")
    assert 'aria-label="&lt;title&gt;. up, then down"' in text
    assert "&lt;i&gt;x&lt;/i&gt;" in text
    assert "<i>" not in text
    assert "a $ b $" in text
    assert "var(--c1)" in text
    assert "#" not in re.sub(r"#[mp][0-9a-f]{10}", "", text), "every colour is the style sheet's"


def test_numbers_are_written_for_people() -> None:
    assert [percent(p) for p in (1, 0.934, 0.0442, 0.0001)] == ["100 %", "93 %", "4.4 %", "0 %"]
    assert [span(s) for s in (45, 800, 12_300, None)] == ["45 s", "13 min", "3.4 h", "–"]
    assert breaks("<b>_Bark") == "&lt;b&gt;_<wbr>Bark"

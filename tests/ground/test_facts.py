"""Facts of competitions."""

from __future__ import annotations

import csv
from importlib import resources
from pathlib import Path

import pytest

from melfold.errors import MelfoldError
from melfold.facts import facts_of, join_labels, known_facts, parse_facts, split_labels

FAT2019 = (resources.files("melfold") / "competitions" / "fat2019.toml").read_text()


def test_the_real_labels_belong_to_fat2019(fsdkaggle2019: Path) -> None:
    with (fsdkaggle2019 / "vocabulary.csv").open(newline="") as file:
        labels = [row[-1] for row in csv.reader(file)]
    facts = facts_of(labels)
    assert facts == facts_of("fat2019") == facts_of("freesound-audio-tagging-2019")
    assert facts.name == "fat2019"
    assert facts_of(labels[::-1]).name == ""


def test_the_sizes_and_limits_of_fat2019() -> None:
    facts = facts_of("fat2019")
    assert facts.test_clips == (1120, 3361)
    assert facts.mean_test_seconds == 12.9 * 3600 / 4481
    assert facts.kernel_minutes == {"cpu": 240, "gpu": 60}
    assert not facts.external_data
    assert len(facts.bad_clips) == 6
    assert all(facts.bad_clips.values())


def test_the_standings_of_fat2019() -> None:
    standings = facts_of("fat2019").standings
    assert standings
    assert (standings.teams, standings.median) == (417, 0.54819)
    assert standings.ranks == {1: 0.760, 10: 0.74399, 50: 0.7181, 100: 0.69233}
    assert standings.lines == {"gold": 0.74399, "silver": 0.7181, "bronze": 0.69233}


@pytest.mark.parametrize("competition", ["esc10", "", ["Bark", "Tone"], ("Bark",), []], ids=repr)
def test_an_unknown_competition_gets_the_same_limits_and_nothing_else(competition: str | list[str]) -> None:
    facts, known = facts_of(competition), facts_of("fat2019")
    assert (facts.name, facts.slug, facts.bad_clips, facts.standings) == ("", "", {}, None)
    assert (facts.kernel_minutes, facts.external_data_rule) == (known.kernel_minutes, known.external_data_rule)


def test_every_file_is_about_another_competition() -> None:
    known = known_facts()
    assert len({facts.name for facts in known}) == len({facts.slug for facts in known}) == len(known)
    assert all(len(facts.labels_sha256) >= 8 for facts in known)


def test_a_sister_competition_is_one_more_file() -> None:
    text = FAT2019.replace("fat2019", "fat2018").replace("-2019", "-2018").replace("[1120, 3361]", "[9400]")
    facts = parse_facts("fat2018.toml", text[: text.index("[standings]")])
    assert (facts.name, facts.slug, facts.test_clips) == ("fat2018", "freesound-audio-tagging-2018", (9400,))
    assert facts.standings is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("test_hours =", "test_hour =", "missing or unknown keys: test_hour, test_hours. Compare it with fat2019.toml"),
        ("[bad_clips] ", "[bad_clip] ", "missing or unknown keys: bad_clip, bad_clips"),
        ("median =", "mean =", r"missing or unknown keys: standings\.mean, standings\.median"),
        ("test_hours =", "test_hours", "x.toml is not TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(old: str, new: str, said: str) -> None:
    with pytest.raises(MelfoldError, match=said):
        parse_facts("x.toml", FAT2019.replace(old, new, 1))


@pytest.mark.parametrize("labels", [(), ("NA",), ("Bark", "Hiss_(air)"), ("nan", "None")])
def test_labels_come_back_from_a_cell(labels: tuple[str, ...]) -> None:
    assert split_labels(join_labels(labels)) == labels

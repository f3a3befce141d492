"""Facts of competitions, one file for each in `competitions/`; and how the tables of all of them write a clip's labels."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from importlib import resources
from typing import Any

from melfold.errors import MelfoldError

DEFAULT = "fat2019"
"""Whose limits and rules an unknown competition gets."""


@dataclass(frozen=True)
class Standings:
    """The final Private leaderboard; scores are lwlrap. `ranks`: rank -> score. `medals`: medal -> its last rank, best first."""

    teams: int
    median: float
    medals: dict[str, int]
    ranks: dict[int, float]

    @property
    def lines(self) -> dict[str, float]:
        """Medal -> the score of its last rank, best first."""
        return {medal: self.ranks[rank] for medal, rank in self.medals.items()}


@dataclass(frozen=True)
class Facts:
    """What is known of a competition; `competitions/fat2019.toml` says what each key means.

    An unknown competition has no name. `labels_sha256` is how the SHA-256 begins. `bad_clips`: curated clip -> reason.
    """

    name: str
    slug: str
    labels_sha256: str
    test_clips: tuple[int, ...]
    test_hours: float
    code_only: bool
    external_data: bool
    external_data_rule: str
    kernel_minutes: dict[str, int]
    bad_clips: dict[str, str]
    standings: Standings | None = None

    @property
    def mean_test_seconds(self) -> float:
        """The mean length of a test clip."""
        return self.test_hours * 3600 / sum(self.test_clips)


def facts_of(competition: str | Sequence[str]) -> Facts:
    """The facts of a competition.

    An unknown one, such as the demo, gets the limits, rules and test sizes of `DEFAULT`, but no name, bad clips or standings, and
    it takes files. `competition` is a name, a slug on Kaggle, or all labels in order.
    """
    if isinstance(competition, str):
        found = [facts for facts in known_facts() if competition in (facts.name, facts.slug)]
    else:
        sha256 = hashlib.sha256("\n".join(competition).encode()).hexdigest()
        found = [facts for facts in known_facts() if sha256.startswith(facts.labels_sha256)]
    if found:
        return found[0]
    unknown: dict[str, Any] = {"name": "", "slug": "", "labels_sha256": ""}
    unknown |= {"bad_clips": {}, "standings": None, "code_only": False}
    return replace(facts_of(DEFAULT), **unknown)


@cache
def known_facts() -> tuple[Facts, ...]:
    """The facts of every competition that has a file."""
    files = sorted((resources.files("melfold") / "competitions").iterdir(), key=lambda path: path.name)
    return tuple(parse_facts(path.name, path.read_text()) for path in files if path.name.endswith(".toml"))


def parse_facts(source: str, text: str) -> Facts:
    """The facts in a file's text.

    Raises:
        MelfoldError: text that is not TOML, or a key that is missing or unknown.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MelfoldError(f"{source} is not TOML", str(error), "Fix that line") from None
    odd = _odd_keys(Facts, values)
    if standings := values.get("standings"):
        odd += [f"standings.{key}" for key in _odd_keys(Standings, standings)]
    if odd:
        raise MelfoldError(f"{source}: missing or unknown keys", ", ".join(odd), f"Compare it with {DEFAULT}.toml")
    if standings:
        ranks = {int(rank): score for rank, score in standings["ranks"].items()}
        values["standings"] = Standings(**standings | {"ranks": ranks})
    return Facts(**values | {"test_clips": tuple(values["test_clips"])})


def _odd_keys(kind: type[Facts] | type[Standings], values: dict[str, Any]) -> list[str]:
    """The keys that are missing or unknown."""
    known = {field.name: field.default is MISSING for field in fields(kind)}
    return sorted({key for key, required in known.items() if required and key not in values} | (values.keys() - known.keys()))


def split_labels(text: str) -> tuple[str, ...]:
    """The labels in a cell of a table: `Bark,Meow` -> `("Bark", "Meow")`; none in an empty cell."""
    return tuple(text.split(",")) if text else ()


def join_labels(labels: Iterable[str]) -> str:
    """The cell of a table that holds these labels."""
    return ",".join(labels)

"""Facts of competitions, one file for each in `competitions/`; and how the tables of all of them write a clip's labels."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from importlib import resources

from melfold.errors import MelfoldError

DEFAULT = "fat2019"
"""Whose limits and rules an unknown competition gets."""


@dataclass(frozen=True)
class Standings:
    """The final Private leaderboard; scores are lwlrap. `ranks`: rank -> score. `medals`: medal -> its last rank, best first."""

    teams: int
    median: float
    medals: dict[str, int]
    best_known: float
    ranks: dict[int, float]

    @property
    def lines(self) -> dict[str, float]:
        """Medal -> the score of its last rank, best first."""
        return {medal: self.ranks[rank] for medal, rank in self.medals.items()}


@dataclass(frozen=True)
class Facts:
    """What is known of a competition.

    Args:
        name: names its cache and fold tables; empty for an unknown competition.
        slug: its name on Kaggle.
        labels_sha256: how the SHA-256 of its labels begins, one label per line.
        n_labels: how many labels it has.
        test_clips: the number of test clips in each stage.
        test_hours: the length of all test clips together.
        code_only: whether it takes kernels alone, and no files.
        external_data: whether external data and pretrained models are allowed.
        external_data_rule: that rule in words.
        kernel_minutes: the limits of an inference kernel, by `cpu` and `gpu`.
        bad_clips: curated clips to leave out of training and scoring, each with the reason.
        standings: the final leaderboard, where there is one.
    """

    name: str
    slug: str
    labels_sha256: str
    n_labels: int
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
    it takes files.

    Args:
        competition: its name, its slug on Kaggle, or all of its labels in order.
    """
    if isinstance(competition, str):
        found = [facts for facts in known_facts() if competition in (facts.name, facts.slug)]
    else:
        sha256 = hashlib.sha256("\n".join(competition).encode()).hexdigest()
        found = [facts for facts in known_facts() if sha256.startswith(facts.labels_sha256)]
    if found:
        return found[0]
    unknown = {"name": "", "slug": "", "labels_sha256": "", "n_labels": 0, "bad_clips": {}, "standings": None, "code_only": False}
    return replace(facts_of(DEFAULT), **unknown)


@cache
def known_facts() -> tuple[Facts, ...]:
    """The facts of every competition that has a file.

    Raises:
        MelfoldError: a file that lacks a key or has an unknown one.
    """
    files = sorted((resources.files("melfold") / "competitions").iterdir(), key=lambda path: path.name)
    return tuple(parse_facts(path.name, path.read_text()) for path in files if path.name.endswith(".toml"))


def parse_facts(source: str, text: str) -> Facts:
    """The facts in a file's text.

    Raises:
        MelfoldError: text that is not TOML, a missing key or an unknown one.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MelfoldError(f"{source} is not TOML", str(error), "Fix that line") from None
    required = {f.name for f in fields(Facts) if f.default is MISSING}
    odd = (required - values.keys()) | (values.keys() - {f.name for f in fields(Facts)})
    if odd:
        raise MelfoldError(f"{source}: missing or unknown keys", ", ".join(sorted(odd)), f"Compare it with {DEFAULT}.toml")
    values["test_clips"] = tuple(values["test_clips"])
    if "standings" in values:
        ranks = {int(rank): score for rank, score in values["standings"].pop("ranks").items()}
        values["standings"] = Standings(**values["standings"], ranks=ranks)
    return Facts(**values)


def split_labels(text: str) -> tuple[str, ...]:
    """The labels in a cell of a table: `Bark,Meow` -> `("Bark", "Meow")`; none in an empty cell."""
    return tuple(text.split(",")) if text else ()


def join_labels(labels: Iterable[str]) -> str:
    """The cell of a table that holds these labels."""
    return ",".join(labels)

"""Facts of competitions, one file for each in `competitions/`; and how the tables of all of them write a clip's labels."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any

from pydantic import ValidationError

from melfold.errors import MelfoldError
from melfold.train_config import Frozen

DEFAULT = "fat2019"
"""Whose limits and rules an unknown competition gets."""


class Standings(Frozen):
    """The final Private leaderboard; scores are lwlrap. `ranks`: rank -> score. `medals`: medal -> its last rank, best first."""

    teams: int
    median: float
    medals: dict[str, int]
    ranks: dict[int, float]

    @property
    def lines(self) -> dict[str, float]:
        """Medal -> the score of its last rank, best first."""
        return {medal: self.ranks[rank] for medal, rank in self.medals.items()}


class Facts(Frozen):
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
    return facts_of(DEFAULT).model_copy(update=unknown)


@cache
def known_facts() -> tuple[Facts, ...]:
    """The facts of every competition that has a file."""
    files = sorted((resources.files("melfold") / "competitions").iterdir(), key=lambda path: path.name)
    return tuple(parse_facts(path.name, path.read_text()) for path in files if path.name.endswith(".toml"))


def parse_facts(source: str, text: str) -> Facts:
    """The facts in a file's text.

    Raises:
        MelfoldError: text that is not TOML, a key that is missing or unknown, or a value that does not fit.
    """
    try:
        return Facts.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise MelfoldError(f"{source} is not TOML", str(error), "Fix that line") from None
    except ValidationError as error:
        wrong = {".".join(map(str, e["loc"])): e["type"] in ("missing", "extra_forbidden") for e in error.errors()}
        what = "missing or unknown keys" if all(wrong.values()) else "values that do not fit"
        raise MelfoldError(f"{source}: {what}", ", ".join(sorted(wrong)), f"Compare it with {DEFAULT}.toml") from None


def split_labels(text: str) -> tuple[str, ...]:
    """The labels in a cell of a table: `Bark,Meow` -> `("Bark", "Meow")`; none in an empty cell."""
    return tuple(text.split(",")) if text else ()


def join_labels(labels: Iterable[str]) -> str:
    """The cell of a table that holds these labels."""
    return ",".join(labels)

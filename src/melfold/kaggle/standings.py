"""Where a score would stand on the final Private leaderboard."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from melfold.facts import Facts, Standings, facts_of
from melfold.files import Home, write_text
from melfold.kaggle.client import Kaggle
from melfold.kaggle.command import KaggleError

log = logging.getLogger(__name__)

SAME = 5e-6  # two scores this close are the same: Kaggle shows five digits


@dataclass(frozen=True)
class Place:
    """Where a score would stand.

    Args:
        rank: 1 is the best; teams with the same score share one.
        exact: counted in the full table; otherwise estimated between the ranks whose scores are known.
        medal: the best medal whose line it passes; empty for none.
        next: what comes next: a medal, `rank 1`, or nothing.
        missing: how much more lwlrap that takes.
    """

    rank: int
    exact: bool
    teams: int
    medal: str
    next: str
    missing: float

    @property
    def top_percent(self) -> float:
        """The share of the teams that stand here or better."""
        return 100 * self.rank / self.teams

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        parts = [f"{about}rank {self.rank} of {self.teams} (top {self.top_percent:.0f} %)", self.medal or "no medal"]
        return ", ".join(parts) + (f"; {self.missing:.5f} below {self.next}" if self.next else "")


def place_of(score: float, standings: Standings, table: Sequence[float] = ()) -> Place:
    """Where a Private score would stand among the teams of a finished competition.

    Args:
        table: the scores of all teams, as `read_table` gives them; without them the rank is estimated.
    """
    import numpy as np

    lines = standings.lines | {"rank 1": max(table) if table else standings.ranks[1]}
    medal = next((medal for medal, line in standings.lines.items() if score + SAME >= line), "")
    ahead = {name: line - score for name, line in lines.items() if line > score + SAME}
    following = min(ahead, key=lambda name: ahead[name], default="")
    if table:
        rank = 1 + sum(other > score + SAME for other in table)
    else:  # by straight lines between the known ones, the median team and a score of 0
        known = standings.ranks | {(standings.teams + 1) // 2: standings.median, standings.teams: 0.0}
        rank = round(np.interp(-score, [-known[rank] for rank in sorted(known)], sorted(known)))
    return Place(min(rank, standings.teams), bool(table), standings.teams, medal, following, ahead.get(following, 0.0))


def place_at(home: Home, competition: str | Sequence[str], score: float | None) -> Place | None:
    """Where a Private score would stand in a competition (see `facts_of`); None without a score or a finished leaderboard."""
    facts = facts_of(competition)
    if score is None or not facts.standings:
        return None
    return place_of(score, facts.standings, read_table(home, facts))


def table_path(home: Home, facts: Facts) -> Path:
    """Where the full leaderboard of a competition is kept."""
    return home.data / f"{facts.slug}-leaderboard.csv"


def read_table(home: Home, facts: Facts) -> list[float]:
    """The scores of all teams, best first; none if the leaderboard was not downloaded, or is another one."""
    path = table_path(home, facts)
    return _scores(path.read_text(), facts) if path.exists() else []


def fetch_table(client: Kaggle, home: Home, *, refresh: bool = False) -> None:
    """Download the final leaderboard of a competition, unless it is there. Failing is no error: known ranks do without it."""
    facts = facts_of(client.competition)
    path = table_path(home, facts)
    if not facts.standings or (path.exists() and not refresh):
        return
    try:
        text = client.leaderboard()
    except KaggleError as error:
        log.warning("no full leaderboard, so ranks are estimated: %s", error)
        return
    if _scores(text, facts):
        write_text(path, text)
    else:
        log.warning("Kaggle's leaderboard of %s is not the final Private one, so ranks are estimated", facts.slug)


def _scores(text: str, facts: Facts) -> list[float]:
    """The scores in Kaggle's table, best first; none unless they agree with the known lines."""
    try:
        scores = sorted((float(row["Score"]) for row in csv.DictReader(text.splitlines()) if row["Score"]), reverse=True)
    except (KeyError, ValueError):
        return []
    lines = [(rank, facts.standings.ranks[rank]) for rank in facts.standings.medals.values()] if facts.standings else []
    return scores if all(rank <= len(scores) and abs(scores[rank - 1] - line) < 1e-4 for rank, line in lines) else []

"""The record of submissions: one row each, written before Kaggle is called and completed afterwards."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from melfold.errors import MelfoldError, first_line
from melfold.facts import DEFAULT, facts_of
from melfold.files import Home, locked, write_text

STATUSES = ("pending", "submitted", "complete", "error", "refused", "unknown")
"""`pending`: Kaggle is being called. `submitted`: accepted, no score yet. `complete`: scored. `error`: could not be scored.
`refused`: not accepted. `unknown`: accepted or not; every sync looks for it again, and it is never repeated."""

RESTORE = "Correct it by hand, or restore it, for example with git"

SPENT = ("submitted", "complete", "error")


@dataclass(frozen=True)
class Row:
    """A row of `ledger.csv`, as text; unknown values are empty."""

    tag: str
    id: str
    time: str
    commit: str
    runs: str
    weights: str
    recipes: str
    folds: str
    track: str
    oof_lwlrap: str
    public_score: str = ""
    private_score: str = ""
    kernel: str = ""
    version: str = ""
    ref: str = ""
    status: str = "pending"
    note: str = ""
    account: str = ""
    competition: str = ""

    @property
    def oof(self) -> float | None:
        """The out-of-fold score."""
        return float(self.oof_lwlrap) if self.oof_lwlrap else None

    @property
    def private(self) -> float | None:
        """The Private score."""
        return float(self.private_score) if self.private_score else None

    @property
    def public(self) -> float | None:
        """The Public score. Exactly 0 beside a Private score is none: a late submission is not scored on the Public half."""
        value = float(self.public_score) if self.public_score else None
        return None if value == 0 and self.private is not None else value


COLUMNS = [f.name for f in fields(Row)]
OLD_COLUMNS = COLUMNS[:-2]
"""Of a ledger from before several competitions were told apart; the next change writes all columns."""


@dataclass(frozen=True)
class Ledger:
    """`submissions/ledger.csv` of a home."""

    path: Path

    @classmethod
    def of(cls, home: Home) -> Ledger:
        """The ledger of a home."""
        return cls(home.submissions / "ledger.csv")

    def rows(self) -> list[Row]:
        """All rows, oldest first.

        Raises:
            MelfoldError: a table that is damaged, or was edited into something else.
        """
        if not self.path.exists():
            return []
        try:
            text = self.path.read_text(encoding="utf-8")
            header, *cells = csv.reader(io.StringIO(text, newline=""), strict=True)
        except (ValueError, csv.Error) as error:
            raise MelfoldError(f"{self.path} is no ledger", first_line(error), RESTORE) from None
        if header not in (COLUMNS, OLD_COLUMNS):
            raise MelfoldError(f"{self.path} has other columns", ", ".join(header), RESTORE)
        odd = next((str(number) for number, row in enumerate(cells, 1) if len(row) != len(header)), "")
        if odd or not text.endswith("\n"):
            raise MelfoldError(f"{self.path} is cut", f"row {odd or len(cells)} is not whole", RESTORE)
        rows = [Row(**dict(zip(header, row, strict=True))) for row in cells]
        if header == OLD_COLUMNS:
            rows = [replace(row, competition=facts_of(DEFAULT).slug, account=row.kernel.partition("/")[0]) for row in rows]
        for row in rows:
            if row.status not in STATUSES:
                raise MelfoldError(f"{self.path}: no such status", f"{row.status!r} of {row.id}", f"Use {', '.join(STATUSES)}")
            for score in (row.oof_lwlrap, row.public_score, row.private_score):
                if score and not re.fullmatch(r"[01]\.?\d*(e-?\d+)?", score):
                    raise MelfoldError(f"{self.path}: not a score", f"{score!r} of {row.id}", RESTORE)
        if len({row.tag for row in rows}) < len(rows):
            raise MelfoldError(f"{self.path} has a row twice", f"{len(rows)} rows", RESTORE)
        return rows

    def add(self, row: Row) -> None:
        """Append a row."""
        with self._changed() as rows:
            rows.append(row)

    def update(self, tag: str, **changes: str) -> Row:
        """Change the row of a tag. Returns: the row."""
        with self._changed() as rows:
            number = [row.tag for row in rows].index(tag)
            rows[number] = replace(rows[number], **changes)
        return rows[number]

    @contextmanager
    def _changed(self) -> Iterator[list[Row]]:
        """The rows, which are written afterwards; meanwhile nobody else changes them."""
        with locked(self.path.with_name(".ledger.lock")):
            rows, text = self.rows(), io.StringIO()
            yield rows
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, rows))
            write_text(self.path, text.getvalue())


@dataclass(frozen=True)
class Choice:
    """One of the two submissions to select, and why."""

    row: Row
    reason: str


def choose_two(rows: Sequence[Row]) -> list[Choice]:
    """The two submissions to select for the Private score; none where nothing has a Public score, since it is too late then.

    First the best out-of-fold score: it was chosen on more clips than the Public half has. Then, as a hedge against an
    out-of-fold score that flatters, the best Public score among the others.
    """
    scored = [row for row in rows if row.status == "complete" and row.public is not None]
    if not scored:
        return []
    first = max(scored, key=lambda row: (row.oof or 0, row.public or 0))
    choices = [Choice(first, f"the best OOF lwlrap, {first.oof or float('nan'):.5f}")]
    if others := [row for row in scored if (row.runs, row.weights) != (first.runs, first.weights)]:
        second = max(others, key=lambda row: (row.public or 0, row.oof or 0))
        choices.append(Choice(second, f"the best Public score of the others, {second.public:.5f}: a hedge"))
    return choices

"""The record of submissions: one row each, written before Kaggle is called and completed afterwards."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from melfold.errors import MelfoldError, first_line
from melfold.files import Home, locked, write_text
from melfold.kaggle.client import Submission

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


COLUMNS = [f.name for f in fields(Row)]


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
        if header != COLUMNS:
            raise MelfoldError(f"{self.path} has other columns", ", ".join(header), RESTORE)
        odd = next((str(number) for number, row in enumerate(cells, 1) if len(row) != len(COLUMNS)), "")
        if odd or not text.endswith("\n"):
            raise MelfoldError(f"{self.path} is cut", f"row {odd or len(cells)} is not whole", RESTORE)
        rows = [Row(*row) for row in cells]
        for row in rows:
            if row.status not in STATUSES:
                raise MelfoldError(f"{self.path}: no such status", f"{row.status!r} of {row.id}", f"Use {', '.join(STATUSES)}")
            for score in (row.oof_lwlrap, row.public_score, row.private_score):
                if score and not re.fullmatch(r"[01]\.?\d*(e-?\d+)?", score):
                    raise MelfoldError(f"{self.path}: not a score", f"{score!r} of {row.id}", RESTORE)
        if len({row.tag for row in rows}) < len(rows):
            raise MelfoldError(f"{self.path} has a row twice", f"{len(rows)} rows", RESTORE)
        return rows

    def of_id(self, id: str) -> list[Row]:
        """The rows of one submission id."""
        return [row for row in self.rows() if row.id == id]

    def add(self, row: Row) -> None:
        """Append a row."""
        with self._lock():
            self._write([*self.rows(), row])

    def update(self, tag: str, **changes: str) -> Row:
        """Change the row of a tag. Returns: the row."""
        with self._lock():
            rows = [replace(row, **changes) if row.tag == tag else row for row in self.rows()]
            self._write(rows)
        return next(row for row in rows if row.tag == tag)

    def settle(self, tag: str, found: Submission) -> Row:
        """Record what Kaggle says about a submission."""
        status = {"COMPLETE": "complete", "ERROR": "error"}.get(found.status, "submitted")
        return self.update(
            tag, ref=found.ref, status=status, public_score=_text(found.public_score), private_score=_text(found.private_score)
        )

    def _lock(self) -> Any:
        return locked(self.path.with_name(".ledger.lock"))

    def _write(self, rows: Sequence[Row]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
        write_text(self.path, text.getvalue())


def now() -> str:
    """UTC to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Choice:
    """One of the two submissions to select, and why."""

    row: Row
    reason: str


def choose_two(rows: Sequence[Row]) -> list[Choice]:
    """The two submissions to select for the Private score.

    First the best out-of-fold score: it was chosen on more clips than the Public half has. Then, as a hedge against an
    out-of-fold score that flatters, the best Public score among the others.
    """
    scored = [row for row in rows if row.status == "complete" and row.public_score]
    if not scored:
        return []
    by_oof = [row for row in scored if row.oof_lwlrap] or scored
    first = max(by_oof, key=lambda row: (float(row.oof_lwlrap or 0), float(row.public_score)))
    choices = [Choice(first, f"the best OOF lwlrap, {float(first.oof_lwlrap or 'nan'):.5f}")]
    others = [row for row in scored if row.tag != first.tag and (row.runs, row.weights) != (first.runs, first.weights)]
    if others:
        second = max(others, key=lambda row: (float(row.public_score), float(row.oof_lwlrap or 0)))
        choices.append(Choice(second, f"the best Public score of the others, {float(second.public_score):.5f}: a hedge"))
    return choices


def _text(score: float | None) -> str:
    return "" if score is None else f"{score:.5f}"

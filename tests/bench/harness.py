"""What benchmarks share: taking turns, results, the table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

RESULTS = Path(__file__).with_name("results")
"""One JSON per machine, and pictures."""


@dataclass(frozen=True)
class Result:
    """One measured value and its bound.

    `value` is held against `bound`: at least it where `higher`, else at most it. `aim` is what we would like.
    `ours` and `theirs` are the medians of both sides, in `unit`; `theirs` is None where the bound is not a ratio.
    """

    name: str
    against: str
    ours: float
    theirs: float | None
    unit: str
    value: float
    value_unit: str
    bound: float
    aim: float
    higher: bool = True
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the bound holds: what no change may fall behind."""
        return self.value >= self.bound if self.higher else self.value <= self.bound

    @property
    def reached(self) -> bool:
        """Whether the aim is reached, to within the noise of a percent."""
        return self.value >= 0.99 * self.aim if self.higher else self.value <= 1.01 * self.aim


@dataclass(frozen=True)
class Turns:
    """Seconds of each turn of both sides."""

    ours: list[float]
    theirs: list[float]

    def rates(self, work: float) -> tuple[float, float]:
        """Median units of work a second, ours and theirs."""
        return work / statistics.median(self.ours), work / statistics.median(self.theirs)

    @property
    def ratio(self) -> float:
        """How many times faster ours is, from the medians."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def spread(self) -> list[float]:
        """The lowest and the highest ratio of neighbouring turns."""
        pairs = [b / a for a, b in zip(self.ours, self.theirs, strict=True)]
        return [round(min(pairs), 3), round(max(pairs), 3)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it, NumPy's and PyTorch's libraries compute in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def take_turns(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> Turns:
    """Time A B, B A, A B, ... after one untimed turn of each."""
    ours()
    theirs()
    turns = Turns([], [])
    for number in range(repeats):
        pair = [(ours, turns.ours), (theirs, turns.theirs)]
        for work, into in pair if number % 2 == 0 else reversed(pair):
            into.append(seconds_of(work))
    return turns


def ratio_result(
    name: str, against: str, turns: Turns, work: float, unit: str, *, bound: float, aim: float, **notes: Any
) -> Result:
    """A result whose value is a ratio of two rates."""
    ours, theirs = turns.rates(work)
    return Result(name, against, ours, theirs, unit, turns.ratio, "x", bound, aim, notes={"spread": turns.spread, **notes})


def show(results: list[Result], before: dict[tuple[str, str], float], *, quick: bool) -> None:
    """Print the table, with the values of `before` by name and what they are held against."""
    table = Table(title="melfold bench" + (" --quick: sizes too small to mean anything" if quick else ""))
    for column in ("benchmark", "against", "ours", "theirs", "unit", "value", "before", "bound", "goal", ""):
        numbers = ("ours", "theirs", "value", "before", "bound", "goal")
        table.add_column(column, justify="right" if column in numbers else "left")
    for r in results:
        sign = "≥" if r.higher else "≤"
        table.add_row(
            r.name,
            r.against,
            _number(r.ours),
            "" if r.theirs is None else _number(r.theirs),
            r.unit,
            f"{_number(r.value)} {r.value_unit}",
            _number(before[r.name, r.against]) if (r.name, r.against) in before else "",
            f"{sign} {_number(r.bound)}",
            f"{sign} {_number(r.aim)}",
            "MISSED" if not r.ok else "" if r.reached else "goal missed",
        )
    console = Console(width=150)
    console.print(table)
    for r in results:
        if r.notes:
            console.print(
                f"{r.name}: " + ", ".join(f"{k} {v}" for k, v in r.notes.items()), style="dim", highlight=False, markup=False
            )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

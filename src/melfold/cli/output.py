"""What commands show: errors, progress, tables, scores, JSON."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from melfold.compute import Progress
from melfold.errors import MelfoldError, system_error

if TYPE_CHECKING:
    import pandas as pd

PLAIN_SECONDS = 10
"""Between two lines of progress where there is no terminal."""

TABLE_WIDTH = 200
"""Of a table that is not shown on a terminal."""

_running_bars: list[Any] = []


def command(app: typer.Typer, name: str, example: str, *, continues: bool = False) -> Callable[[Callable[..., None]], Any]:
    """Register a command, with an example in its help; if it `continues`, it can be given again after Ctrl-C."""

    def register(function: Callable[..., None]) -> Any:
        return app.command(name, help=f"{function.__doc__}\n\nExample: {example}")(guarded(function, continues=continues))

    return register


def guarded(function: Callable[..., None], *, continues: bool = False) -> Callable[..., None]:
    """A command that tells each expected error in its own lines, with exit code 2."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        logger = logging.getLogger("melfold")
        logger.handlers, logger.propagate = [_Lines()], False
        logger.setLevel(logging.INFO)
        try:
            function(*args, **kwargs)
        except MelfoldError as error:
            fail(error.lines)
        except BrokenPipeError:
            # The reader, such as `head`, has seen enough; a further flush at exit would complain again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except OSError as error:
            fail([system_error(error)])
        except KeyboardInterrupt:
            typer.echo("melfold: stopped." + (" The same command continues where it stopped." if continues else ""), err=True)
            raise typer.Exit(130) from None
        finally:
            for bar in _running_bars:
                bar.stop()  # an error would leave the terminal without its cursor
            _running_bars.clear()

    return call


def fail(lines: Iterable[str]) -> NoReturn:
    """Tell an error and end with exit code 2."""
    for line in lines:
        typer.secho(f"melfold: {line}", fg="red", err=True)
    sys.exit(2)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else "WARNING: "
        print(f"melfold: {level}{record.getMessage()}", file=sys.stderr, flush=True)  # above a bar, which replaces stderr


def note(text: str) -> None:
    """A remark that is not the command's result: on stderr, so that `--json` stays clean."""
    typer.secho(f"melfold: {text}", fg="yellow", err=True)


def warn_incomplete(clips: int, of: int) -> None:
    """Say that a score covers only some of the clips."""
    if clips < of:
        note(f"INCOMPLETE: this covers {clips} of {of} clips")


def bar() -> Progress:
    """A bar with the time left on a terminal; elsewhere a plain line every ten seconds."""
    return _terminal_bar() if sys.stderr.isatty() else _plain_lines()


def _terminal_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown: dict[str, Any] = {}

    def progress(done: int, total: int, text: str) -> None:
        if not shown:
            shown["bar"] = Progress(*columns, console=Console(stderr=True), transient=True)
            shown["bar"].start()
            _running_bars.append(shown["bar"])
            shown["task"] = shown["bar"].add_task(text, total=total, completed=done - 1)
        shown["bar"].update(shown["task"], completed=done, total=total, description=text)
        if done >= total:
            shown["bar"].stop()
            shown.clear()

    return progress


def _plain_lines() -> Progress:
    state = {"began": 0.0, "first": 0, "said": 0.0}

    def progress(done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if not state["began"] or done < state["first"]:
            state.update(began=now, first=done, said=now)
        if done >= total or now - state["said"] >= PLAIN_SECONDS:
            rate = (done - state["first"]) / max(now - state["began"], 1e-9)
            left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
            typer.echo(f"melfold: {text}: {done}/{total}{left}", err=True)
            state["said"] = now
        if done >= total:
            state["began"] = 0.0

    return progress


def score(value: float | None) -> str:
    """A score as Kaggle prints it, with five digits."""
    return "-" if value is None or value != value else f"{value:.5f}"


def interval(low: float, high: float) -> str:
    """A 95 % interval of a score."""
    return f"{score(low)} to {score(high)}"


def size(count: float) -> str:
    """Bytes for people: `1.2 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def age(seconds: float) -> str:
    """A span of time for people: `3 days`."""
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds / length)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{max(0, int(seconds))} s"


def rows_of(table: pd.DataFrame, index: str) -> list[dict[str, Any]]:
    """A table as rows of plain values, its index first."""
    return table.rename_axis(index).reset_index().astype(object).to_dict("records")


def print_table(rows: Sequence[Mapping[str, Any]], *, left: Sequence[str] = (), digits: int = 5) -> None:
    """A table without lines: the first column and those named in `left` to the left, numbers with some digits."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    first, *_ = columns = list(rows[0])
    drawn = Table(box=None, pad_edge=False)
    for column in columns:
        drawn.add_column(column, justify="left" if column == first or column in left else "right")
    for row in rows:
        drawn.add_row(*(Text(_cell(row[column], digits)) for column in columns))
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(drawn)


def _cell(value: Any, digits: int) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def print_json(value: Any) -> None:
    """A command's whole result for programs; what is not known is null."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value.item()  # NumPy's

    known = json.loads(json.dumps(value, default=plain), parse_constant=lambda _: None)  # NaN
    typer.echo(json.dumps(known, indent=2, ensure_ascii=False))

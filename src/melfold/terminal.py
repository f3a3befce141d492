"""What every command shares: its options, its errors, its progress, its tables."""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melfold.compute import Progress
from melfold.errors import MelfoldError

if TYPE_CHECKING:
    import pandas as pd

DataArg = Annotated[
    Path, typer.Argument(metavar="DATA", help="The folder of the competition's download, in Kaggle's or Zenodo's layout.")
]
DataOpt = Annotated[Path, typer.Option("--data", help="The folder of the competition's download.")]
RunArg = Annotated[str, typer.Argument(metavar="RUN", help="A run's name in runs/, or its folder.")]
HomeOpt = Annotated[
    Path | None, typer.Option("--home", help="Where melfold keeps what it makes (MELFOLD_HOME, else the current folder).")
]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value of the recipe; repeatable.")
]
RecipeOpt = Annotated[str, typer.Option("--recipe", help="A recipe's name, or the path of a .toml file.")]
RunOpt = Annotated[
    str | None, typer.Option("--run", help="The run's name (else the recipe's, with a piece of its hash where --set changed it).")
]
DeviceOpt = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DevicesOpt = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N; as cuda:0,cuda:1 a fold trains on each.")]
EngineOpt = Annotated[str, typer.Option("--engine", help="joblib: this machine. dask: the workers of --scheduler.")]
SchedulerOpt = Annotated[str, typer.Option("--scheduler", metavar="ADDRESS", help="Of the Dask scheduler.")]
JobsOpt = Annotated[int, typer.Option("--jobs", help="Worker processes; -1 is one a core.")]


_BARS: list[Any] = []


def command(on: typer.Typer, name: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command, with an example in its help and every expected error told in its own lines."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            _set_up_logging()
            try:
                function(*args, **kwargs)
            except MelfoldError as error:
                for line in error.lines:
                    typer.secho(f"melfold: {line}", fg="red", err=True)
                raise typer.Exit(2) from None
            except BrokenPipeError:
                # The reader, such as `head`, has seen enough; a further flush at exit would complain again.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(141) from None
            except OSError as error:
                typer.secho(f"melfold: {_system_error(error)}", fg="red", err=True)
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                typer.echo("melfold: stopped. The same command goes on from here.", err=True)
                raise typer.Exit(130) from None
            finally:
                for drawn in _BARS:
                    drawn.stop()  # else an error would leave the terminal without its cursor

        return on.command(name, help=f"{function.__doc__}\n\nExample: {example}")(guarded)

    return register


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
            _BARS.append(shown["bar"])
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
        if done >= total or now - state["said"] >= 10:
            rate = (done - state["first"]) / max(now - state["began"], 1e-9)
            left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
            typer.echo(f"melfold: {text}: {done}/{total}{left}", err=True)
            state["said"] = now
        if done >= total:
            state["began"] = 0.0

    return progress


def _set_up_logging() -> None:
    class Lines(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return f"melfold: {'' if record.levelno < logging.WARNING else 'WARNING: '}{record.getMessage()}"

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    logger = logging.getLogger("melfold")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def _system_error(error: OSError) -> str:
    name = re.sub(r"\.([^/]+)\.\d+\.tmp$", r"\1", str(error.filename or ""))  # what it would have been named
    where = f": {name}" if name else ""
    refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
    return f"{error.strerror or error}{where}" + (". Make room, or choose another folder: --home" if refused else "")


def refuse_set(sets: list[str] | None) -> None:
    """A finished run's recipe is read from the run; to let it be changed here would make its record untrue."""
    if sets:
        raise MelfoldError("--set changes nothing here", " ".join(sets), "What this command works on was decided before")


def print_table(table: pd.DataFrame, index: str) -> None:
    """A table without lines, its index first."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False)
    drawn.add_column(index)
    for column in table.columns:
        drawn.add_column(str(column), justify="left" if table[column].dtype == object and column == "audio" else "right")
    for name, row in table.iterrows():
        drawn.add_row(str(name), *(_cell(value) for value in row))
    Console(width=None if sys.stdout.isatty() else 200).print(drawn)


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value == int(value) and value > 1 else f"{value:.3f}"
    return str(value)

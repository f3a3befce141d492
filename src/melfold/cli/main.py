"""The program `melfold`: every command in one place."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from melfold import __version__
from melfold.cli import clean, data, kernels, ledger, recipes, report, runs, scores, submissions, training, weights
from melfold.cli.output import fail

app = typer.Typer(
    name="melfold",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
UsageError: Any = typer.BadParameter.__base__
"""Of the click that Typer brings, which has no public name."""

for group in (data, training, runs, scores, report, submissions, kernels, ledger, clean):
    app.add_typer(group.app)
app.add_typer(recipes.app, name="recipe")
app.add_typer(weights.app, name="weights")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"melfold {__version__}")
        raise typer.Exit


@app.callback()
def melfold(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """From the Freesound Audio Tagging 2019 download to a scored Kaggle submission."""


def main() -> None:
    """The console script. A wrong option or argument is told in one line, where Typer would draw a box."""
    try:
        sys.exit(app(prog_name="melfold", standalone_mode=False))
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.ctx.get_help())
            sys.exit(2)
        what, command = " ".join(error.format_message().split()), error.ctx.command_path if error.ctx else "melfold"
        fail([f"{what}{'' if what.endswith(('.', '?')) else '.'} See `{command} --help`"])

"""Commands that submit, and that keep and show the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melfold.cli.options import HomeOpt, IdArg, JsonOpt
from melfold.cli.output import command, print_json, print_table, score
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.kaggle.client import COMPETITION

if TYPE_CHECKING:
    from melfold.kaggle.ledger import Row
    from melfold.kaggle.submit import Kernel

app = typer.Typer()
ledger_app = typer.Typer(help="The ledger: every submission's OOF score beside its leaderboard scores.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")

CompetitionOpt = Annotated[str, typer.Option("--competition", help="The competition's name in its address.")]
AgainOpt = Annotated[bool, typer.Option("--again", help="Submit although Kaggle has it, or may have it, already.")]

SCORES = ("oof_lwlrap", "public_score", "private_score")


@command(app, "submit", "melfold submit audioset --kernel", continues=True)
def submit(
    id: IdArg,
    kernel: Annotated[bool, typer.Option("--kernel/--file", help="The pushed kernel's output, or the file itself.")] = False,
    again: AgainOpt = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the score.")] = False,
    competition: CompetitionOpt = COMPETITION,
    home: HomeOpt = None,
) -> None:
    """Submit once. If an earlier try may have succeeded, it is looked up and never repeated."""
    from melfold.combine.submission import open_submission
    from melfold.kaggle.client import Kaggle
    from melfold.kaggle.submit import submit as spend
    from melfold.kaggle.submit import wait_for_score

    client, place = Kaggle(competition), Home.find(home)
    open_submission(place, id)
    row = spend(client, place, id, kernel=_find_kernel(place, id) if kernel else None, again=again)
    if wait and row.status == "submitted":
        row = wait_for_score(client, place, row.tag)
    print_row(row)


def _find_kernel(home: Home, id: str) -> Kernel:
    """The pushed kernel of a submission.

    Raises:
        MelfoldError: it was not pushed since it was built.
    """
    from melfold.kaggle.built import built_for
    from melfold.kaggle.submit import Kernel

    built = built_for(home, "infer", id)
    pushed = built.pushed
    if not pushed:
        raise MelfoldError("this kernel was not pushed since it was built", str(built.folder), "Run `melfold kernel push`")
    return Kernel(pushed["kernel"], pushed["version"])


def print_row(row: Row) -> None:
    """A submission's state and scores in a line."""
    private = f", private {score(float(row.private_score))}" if row.private_score else ""
    public = f"public {score(float(row.public_score))}{private}" if row.public_score else "no score yet: `melfold ledger sync`"
    oof = f"OOF {score(float(row.oof_lwlrap))}, " if row.oof_lwlrap else ""
    typer.echo(f"{row.id}: {row.status}, {oof}{public} (ref {row.ref or '-'}, melfold:{row.tag})")


@command(ledger_app, "sync", "melfold ledger sync")
def ledger_sync(competition: CompetitionOpt = COMPETITION, home: HomeOpt = None) -> None:
    """Fetch states and scores from Kaggle, and look again for submissions whose state is unknown."""
    from melfold.kaggle.client import Kaggle
    from melfold.kaggle.submit import sync

    for line in sync(Kaggle(competition), Home.find(home)) or ["Nothing new."]:
        typer.echo(line)


@command(ledger_app, "show", "melfold ledger show --sort public_score")
def ledger_show(
    sort: Annotated[str, typer.Option("--sort", metavar="COLUMN", help="Any column of ledger.csv.")] = "time",
    json: JsonOpt = False,
    home: HomeOpt = None,
) -> None:
    """Show every submission, and the two to select."""
    from melfold.kaggle.ledger import COLUMNS, Ledger, choose_two

    if sort not in COLUMNS:
        raise MelfoldError("no such column", sort, f"Use one of {', '.join(COLUMNS)}")
    ledger = Ledger.of(Home.find(home))
    rows = ledger.rows()
    if sort in SCORES:
        rows.sort(key=lambda row: -float(getattr(row, sort) or "-inf"))
    else:
        rows.sort(key=lambda row: getattr(row, sort))
    choices = choose_two(rows)
    if json:
        selected = [{"id": c.row.id, "tag": c.row.tag, "ref": c.row.ref, "reason": c.reason} for c in choices]
        print_json({"ledger": ledger.path, "rows": [_values(row) for row in rows], "select": selected})
        return
    if not rows:
        typer.echo(f"There are no submissions in {ledger.path}. If yours are elsewhere, give the right --home.")
    shown = ("track", *SCORES, "status", "ref", "kernel", "version", "tag", "note")
    table = [_values(row) for row in rows]
    print_table([{c: values[c] if values[c] != "" else None for c in ("id", "time", *shown)} for values in table], left=["note"])
    for number, choice in enumerate(choices, 1):
        typer.echo(f"select {number}: {choice.row.id} ({choice.row.ref}), {choice.reason}")


def _values(row: Row) -> dict[str, Any]:
    """A row with its scores as numbers, and nothing for those that are not known."""
    return vars(row) | {key: float(text) if (text := getattr(row, key)) else None for key in SCORES}


@command(ledger_app, "plot", "melfold ledger plot -o ledger.png")
def ledger_plot(
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("ledger.png"), home: HomeOpt = None
) -> None:
    """Draw OOF scores against Public and Private scores."""
    from melfold.kaggle.ledger import Ledger
    from melfold.report.ledger import plot_ledger

    plot_ledger(Ledger.of(Home.find(home)).rows(), output)
    typer.echo(output)

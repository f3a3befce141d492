"""Commands that submit, and that keep and show the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from melfold.cli.options import HomeOpt, IdArg, JsonOpt
from melfold.cli.output import command, interval, note, print_json, print_table, score
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.kaggle.built import Kernel, built_for
from melfold.kaggle.client import COMPETITION, Kaggle
from melfold.kaggle.ledger import COLUMNS, Ledger, Row, choose_two
from melfold.kaggle.standings import Place, fetch_table, place_at

app = typer.Typer()
ledger_app = typer.Typer(help="The ledger: every submission's OOF score beside its leaderboard scores.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")

CompetitionOpt = Annotated[str, typer.Option("--competition", help="The competition's name in its address.")]
OwnCompetitionOpt = Annotated[
    str | None,
    typer.Option("--competition", help="The competition's name in its address (default: its data's)."),
]
AgainOpt = Annotated[bool, typer.Option("--again", help="Submit although Kaggle has it, or may have it, already.")]

SCORES = ("oof_lwlrap", "public_score", "private_score")


@command(app, "submit", "melfold submit audioset --kernel", continues=True)
def submit(
    id: IdArg,
    kernel: Annotated[bool, typer.Option("--kernel/--file", help="The pushed kernel's output, or the file itself.")] = False,
    again: AgainOpt = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the score.")] = False,
    competition: OwnCompetitionOpt = None,
    home: HomeOpt = None,
) -> None:
    """Submit once. If an earlier try may have succeeded, it is looked up and never repeated."""
    from melfold.combine.submission import open_submission
    from melfold.kaggle.reconcile import wait_for_score
    from melfold.kaggle.submit import competition_for
    from melfold.kaggle.submit import submit as spend

    place = Home.find(home)
    client = Kaggle(competition_for(open_submission(place, id), competition))
    row = spend(client, place, id, kernel=_find_kernel(place, id) if kernel else None, again=again)
    if wait or row.status == "error":
        row = wait_for_score(client, place, row)
    print_row(row, place)


def _find_kernel(home: Home, id: str) -> Kernel:
    """The kernel of a submission, one that predicts or one that copies, that was pushed last.

    Raises:
        MelfoldError: none was pushed since it was built.
    """
    builds = [built_for(home, kind, id) for kind in ("infer", "copy_csv")]
    pushed = [built for built in builds if built.artefact.stamp.exists() and built.pushed]
    if not pushed:
        raise MelfoldError("this kernel was not pushed since it was built", str(builds[0].folder), "Run `melfold kernel push`")
    last = max(pushed, key=lambda built: built.push_stamp.stamp.stat().st_mtime_ns).push_stamp.read()
    if len(pushed) > 1:
        note(f"two kernels were pushed; this is the later one: {last['kernel']}")
    return Kernel(last["kernel"], last["version"])


def print_row(row: Row, home: Home) -> None:
    """A submission's state, its scores, and where it stands."""
    halves = {"OOF": row.oof, "public": row.public, "private": row.private}
    known = [f"{half} {score(value)}" for half, value in halves.items() if value is not None]
    later = ["no score yet: `melfold ledger sync`"] if row.public is None and row.private is None else []
    typer.echo(f"{row.id}: {', '.join([row.status, *known, *later])} (ref {row.ref or '-'}, melfold:{row.tag})")
    if place := place_at(home, row.competition, row.private):
        typer.echo(f"On the final Private leaderboard: {place}")


@command(ledger_app, "sync", "melfold ledger sync")
def ledger_sync(
    competition: Annotated[
        str | None, typer.Option("--competition", help="The competition's name in its address (default: all in the ledger).")
    ] = None,
    leaderboard: Annotated[bool, typer.Option("--leaderboard", help="Download the final leaderboard again.")] = False,
    home: HomeOpt = None,
) -> None:
    """Fetch states and scores from Kaggle, look again for what is unknown, and once fetch the final leaderboard."""
    from melfold.kaggle.reconcile import sync

    place, lines = Home.find(home), []
    known = sorted({row.competition for row in Ledger.of(place).rows()}) or [COMPETITION]
    for client in map(Kaggle, [competition] if competition else known):
        lines += sync(client, place)
        fetch_table(client, place, refresh=leaderboard)
    for line in lines or ["Nothing new."]:
        typer.echo(line)


@command(ledger_app, "show", "melfold ledger show --sort public_score")
def ledger_show(
    sort: Annotated[str, typer.Option("--sort", metavar="COLUMN", help="Any column of ledger.csv.")] = "time",
    json: JsonOpt = False,
    home: HomeOpt = None,
) -> None:
    """Show every submission, where it stands on the final Private leaderboard, and the two to select."""
    from melfold.kaggle.board import line_of, newest, why_no_line

    if sort not in COLUMNS:
        raise MelfoldError("no such column", sort, f"Use one of {', '.join(COLUMNS)}")
    place = Home.find(home)
    ledger = Ledger.of(place)
    rows = sorted(
        ledger.rows(),
        key=lambda row: -float(getattr(row, sort) or "-inf") if sort in SCORES else getattr(row, sort),
    )
    line, choices = line_of(rows), choose_two(rows)
    places = [place_at(place, row.competition, row.private) for row in rows]
    if json:
        selected = [{"id": c.row.id, "tag": c.row.tag, "ref": c.row.ref, "reason": c.reason} for c in choices]
        table = [_values(row) | {"place": at and vars(at)} for row, at in zip(rows, places, strict=True)]
        print_json({"ledger": ledger.path, "rows": table, "select": selected, "private_from_oof": line and vars(line)})
        return
    if not rows:
        typer.echo(f"There are no submissions in {ledger.path}. If yours are elsewhere, give the right --home.")
    print_table([_shown(row, at) for row, at in zip(rows, places, strict=True)], left=["medal", "next", "status", "note"])
    for number, choice in enumerate(choices, 1):
        typer.echo(f"select {number}: {choice.row.id} ({choice.row.ref}), {choice.reason}")
    if rows:
        typer.echo(line or why_no_line(rows))
    for row in newest(rows):
        if line and row.oof is not None and row.private is None:
            value, low, high = line.predict(row.oof)
            typer.echo(f"{row.id}: expect Private {score(value)} (95 % {interval(low, high)}) from OOF {score(row.oof)}")


def _shown(row: Row, place: Place | None) -> dict[str, Any]:
    """A row of the table. A submission from before the deadline has a Public score, a late one stands among the final teams."""
    return {
        "id": row.id,
        "time": row.time[:16].replace("T", " "),
        "track": row.track,
        "OOF": row.oof,
        "Public": row.public,
        "Private": row.private,
        "rank": place and f"{'' if place.exact else '~'}{place.rank}/{place.teams}",
        "top": place and f"{place.top_percent:.0f} %",
        "medal": (place and place.medal) or None,
        "next": (place and place.next and f"{place.next} +{place.missing:.5f}") or None,
        "status": row.status,
        "ref": row.ref or None,
        "note": row.note or None,
    }


def _values(row: Row) -> dict[str, Any]:
    """A row with its scores as numbers, and nothing for those that are not known."""
    return vars(row) | {key: float(text) if (text := getattr(row, key)) else None for key in SCORES}


@command(ledger_app, "plot", "melfold ledger plot -o ledger.png")
def ledger_plot(
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("ledger.png"), home: HomeOpt = None
) -> None:
    """Draw OOF against leaderboard scores with the medals' lines and the line that predicts Private, and scores over time."""
    from melfold.report.ledger import plot_ledger

    plot_ledger(Ledger.of(Home.find(home)).rows(), output)
    typer.echo(output)

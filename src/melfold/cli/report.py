"""The command that writes reports: pages to look at, listen to and mail."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melfold.cli.options import HomeOpt, RunDataOpt
from melfold.cli.output import bar, command, note, size
from melfold.errors import MelfoldError
from melfold.files import Home

if TYPE_CHECKING:
    from melfold.data.competition import Competition
    from melfold.learn.predictions import Prediction

app = typer.Typer()


@command(app, "report", "melfold report audioset --review 100")
def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN...]", help="A run or RUN@NAME; two are shown side by side; none: all runs and submissions."),
    ] = None,
    review: Annotated[
        int, typer.Option("--review", metavar="N", min=0, help="Review the N most doubtful clips by keyboard.")
    ] = 0,
    clips: Annotated[int, typer.Option("--clips", min=0, help="How many of each label's worst clips to show.")] = 3,
    audio: Annotated[bool, typer.Option("--audio/--no-audio", help="Put the sounds of the clips into the page.")] = True,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page to write (default: named after the runs, in reports/).")
    ] = None,
    data: RunDataOpt = None,
    home: HomeOpt = None,
) -> None:
    """Write a page that opens in a browser without a network: scores, labels, clips to hear, or clips to review."""
    from melfold.learn.predictions import open_predictions

    place = Home.find(home)
    if not runs:
        if review:
            raise MelfoldError("a review is of one run", "no run", "Use melfold report RUN --review N")
        _tell(_home_page(place, output or place.reports / "index.html"))
        return
    if review and len(runs) > 1:
        raise MelfoldError("a review is of one run", ", ".join(runs), "Name one")
    predictions = open_predictions(place, runs)
    name = "-vs-".join(prediction.label for prediction in predictions) + ("-review" if review else "")
    path = output or place.reports / f"{name}.html"
    competition = _competition(predictions[0], data, audio)
    if review:
        from melfold.report.review_page import write_review_page

        write_review_page(predictions[0], path, count=review, competition=competition, audio=audio, progress=bar())
    else:
        from melfold.report.run_page import write_run_page

        write_run_page(predictions, path, competition=competition, audio=audio, clips=clips, progress=bar())
    _tell(path)


def _home_page(home: Home, path: Path) -> Path:
    from melfold.facts import facts_of
    from melfold.learn.runs import list_runs
    from melfold.report.home_page import write_home_page

    names = {run.info.competition for _, run in list_runs(home) if not isinstance(run, MelfoldError)}
    standings = next((facts.standings for name in sorted(names) if (facts := facts_of(name)).standings), None)
    lines = {f"{medal}, rank {standings.medals[medal]}": score for medal, score in standings.lines.items()} if standings else {}
    write_home_page(home, path, medals=lines)
    return path


def _competition(prediction: Prediction, data: Path | None, audio: bool) -> Competition | None:
    """Where the sounds are; without the download the page has none, which is said."""
    from melfold.data.competition import load_competition

    folder = data or Path(prediction.run.info.data_folder)
    if data is None and not folder.is_dir():
        if audio:
            note(f"the page has no sounds: the download is not in {folder} (give it with --data DATA)")
        return None
    return load_competition(folder)


def _tell(path: Path) -> None:
    typer.echo(f"{path}  ({size(path.stat().st_size)})")

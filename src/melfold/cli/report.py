"""The command that writes reports: pages to look at, listen to and mail."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from melfold.cli.options import HomeOpt, RunDataOpt
from melfold.cli.output import bar, command, note, size
from melfold.errors import MelfoldError
from melfold.files import Home

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
    from melfold.data.competition import load_competition
    from melfold.learn.predictions import open_predictions
    from melfold.report.home_page import write_home_page
    from melfold.report.review_page import write_review_page
    from melfold.report.run_page import write_run_page

    place, runs = Home.find(home), runs or []
    if review and len(runs) != 1:
        raise MelfoldError("a review is of one run", ", ".join(runs) or "no run", "Use melfold report RUN --review N")
    predictions = open_predictions(place, runs)
    name = "-vs-".join(prediction.label for prediction in predictions) + ("-review" if review else "")
    path = output or place.reports / f"{name or 'index'}.html"
    if not predictions:
        write_home_page(place, path)
    else:
        folder = data or Path(predictions[0].run.info.data_folder)
        competition = load_competition(folder) if data or folder.is_dir() else None
        if audio and not competition:
            note(f"the page has no sounds: the download is not in {folder} (give it with --data DATA)")
        if review:
            write_review_page(predictions[0], path, count=review, competition=competition, audio=audio, progress=bar())
        else:
            write_run_page(predictions, path, competition=competition, audio=audio, clips=clips, progress=bar())
    typer.echo(f"{path}  ({size(path.stat().st_size)})")

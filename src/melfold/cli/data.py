"""Commands about the competition's data: download, check, show, log-mels, folds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from melfold.cli.options import (
    DEFAULT_RECIPE,
    DataArg,
    EngineOpt,
    HomeOpt,
    JobsOpt,
    RecipeOpt,
    SchedulerOpt,
    SetOpt,
    resolve_compute,
    resolve_recipe,
)
from melfold.cli.output import bar, command, print_table, rows_of
from melfold.files import Home
from melfold.kaggle.client import COMPETITION

app = typer.Typer()


@command(app, "download", "melfold download", continues=True)
def download(
    to: Annotated[Path | None, typer.Option("--to", help="The folder (default: data/<competition>).")] = None,
    competition: Annotated[str, typer.Option("--competition", help="The competition's name in its address.")] = COMPETITION,
    home: HomeOpt = None,
) -> None:
    """Download the competition's files, check and unpack them."""
    from melfold.kaggle.client import Kaggle
    from melfold.kaggle.download import download as fetch

    target = (to or Home.find(home).data / competition).resolve()
    typer.echo(f"{fetch(Kaggle(competition), target, progress=bar())}\nNext: melfold check {target}")


@command(app, "check", "melfold check data/fat2019")
def check(data: DataArg, recipe: RecipeOpt = DEFAULT_RECIPE, home: HomeOpt = None, set_: SetOpt = None) -> None:
    """Is this download complete? Reads the tables and the header of every file."""
    from melfold.data.check import check as check_download

    place = Home.find(home)
    found = check_download(data, place, resolve_recipe(recipe, set_, place), resolve_compute())
    print_table(rows_of(found.splits, "split"), left=["audio"], digits=2)
    for line in found.notes:
        typer.echo(f"note: {line}")
    typer.echo("This download is complete.")


@command(app, "show", "melfold show data/fat2019 0006ae4e.wav -o clips.png")
def show(
    data: DataArg,
    fnames: Annotated[list[str], typer.Argument(metavar="FNAME...", help="Clips of any split.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG or JPEG to write.")] = Path("clips.png"),
    run: Annotated[
        str | None, typer.Option("--run", help="Draw the predictions of this run or RUN@NAME, with its recipe.")
    ] = None,
    recipe: RecipeOpt = DEFAULT_RECIPE,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Draw clips: the waveform, the log-mel with the windows the model sees, the labels, the predictions of a run."""
    from melfold.data.competition import load_competition
    from melfold.report.clips import draw_clips

    place = Home.find(home)
    if run:
        from melfold.learn.predictions import open_prediction

        prediction = open_prediction(place, run)
        draw_clips(load_competition(data), fnames, prediction.recipe, output, place, prediction=prediction)
    else:
        draw_clips(load_competition(data), fnames, resolve_recipe(recipe, set_, place), output, place)
    typer.echo(output)


@command(app, "cache", "melfold cache data/fat2019 --recipe audioset", continues=True)
def cache(
    data: DataArg,
    recipe: RecipeOpt = DEFAULT_RECIPE,
    verify: Annotated[bool, typer.Option("--verify", help="Also read every log-mel, and make damaged ones again.")] = False,
    jobs: JobsOpt = -1,
    engine: EngineOpt = "joblib",
    scheduler: SchedulerOpt = "",
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Turn audio into log-mel .npy files, once. Only files that are missing or whose audio changed are made."""
    from melfold import stages
    from melfold.data.competition import load_competition

    place, compute = Home.find(home), resolve_compute(jobs=jobs, engine=engine, scheduler=scheduler)
    resolved = resolve_recipe(recipe, set_, place)
    with compute.connected(place.root):
        typer.echo(stages.cache(load_competition(data.resolve()), place, resolved, compute, verify=verify))


@command(app, "folds", "melfold folds data/fat2019 --n-folds 5 --seed 42")
def folds(
    data: DataArg,
    n_folds: Annotated[int | None, typer.Option("--n-folds", min=2, help="Number of folds (default: the recipe's).")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the table (default: the recipe's).")] = None,
    group_identical: Annotated[
        bool,
        typer.Option("--group-identical", help="Keep clips with identical audio in the same fold, in a table of its own."),
    ] = False,
    recipe: RecipeOpt = DEFAULT_RECIPE,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Write the fold table, stratified by the labels: the same for everyone."""
    from melfold import stages
    from melfold.data.competition import load_competition

    asked = {"n_folds": n_folds, "seed": seed, "group_identical": "true" if group_identical else None}
    changes = [f"folds.{key}={value}" for key, value in asked.items() if value is not None]
    place = Home.find(home)
    resolved = resolve_recipe(recipe, [*(set_ or []), *changes], place)
    path, deviation = stages.folds(load_competition(data), place, resolved)
    typer.echo(f"{path}\nIn no fold is a label more than {deviation} clips away from an even split.")

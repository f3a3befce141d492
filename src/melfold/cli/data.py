"""Commands about the competition's data: download, check, show, log-mels, folds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melfold.cli import options as opt
from melfold.cli.output import bar, command, print_table, rows_of
from melfold.files import Home
from melfold.kaggle.client import COMPETITION

if TYPE_CHECKING:
    from melfold.config import Recipe
    from melfold.data.competition import Competition

app = typer.Typer()


@command(app, "download", "melfold download", continues=True)
def download(
    to: Annotated[Path | None, typer.Option("--to", help="The folder (default: data/<competition>).")] = None,
    tables: Annotated[bool, typer.Option("--tables", help="Only the three small tables: enough for `kaggle train`.")] = False,
    competition: Annotated[str, typer.Option("--competition", help="The competition's name in its address.")] = COMPETITION,
    home: opt.HomeOpt = None,
) -> None:
    """Download the competition's files, check and unpack them."""
    from melfold.kaggle.client import Kaggle
    from melfold.kaggle.download import download as fetch
    from melfold.kaggle.download import download_tables

    target = (to or Home.find(home).data / competition).resolve()
    if tables:
        typer.echo(f"{download_tables(Kaggle(competition), target)}\nNext: melfold kaggle train")
        return
    typer.echo(f"{fetch(Kaggle(competition), target, progress=bar())}\nNext: melfold check {target}")


@command(app, "check", "melfold check data/fat2019")
def check(
    data: opt.DataArg, recipe: opt.RecipeOpt = opt.DEFAULT_RECIPE, home: opt.HomeOpt = None, set_: opt.SetOpt = None
) -> None:
    """Is this download complete? Reads the tables and the header of every file."""
    from melfold.data.check import check as check_download

    place = Home.find(home)
    found = check_download(data, place, opt.resolve_recipe(recipe, set_, place), opt.resolve_compute())
    print_table(rows_of(found.splits, "split"), left=["audio"], digits=2)
    for line in found.notes:
        typer.echo(f"note: {line}")
    typer.echo("This download is complete." if found.complete else "This download can be used, but test clips are missing.")


@command(app, "show", "melfold show data/fat2019 0006ae4e.wav -o clips.png")
def show(
    data: opt.DataArg,
    fnames: Annotated[list[str], typer.Argument(metavar="FNAME...", help="Clips of any split.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG or JPEG to write.")] = Path("clips.png"),
    run: Annotated[
        str | None, typer.Option("--run", help="Draw the predictions of this run or RUN@NAME, with its recipe.")
    ] = None,
    recipe: opt.RecipeOpt = opt.DEFAULT_RECIPE,
    home: opt.HomeOpt = None,
    set_: opt.SetOpt = None,
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
        draw_clips(load_competition(data), fnames, opt.resolve_recipe(recipe, set_, place), output, place)
    typer.echo(output)


@command(app, "cache", "melfold cache data/fat2019 --recipe audioset", continues=True)
def cache(
    data: opt.DataArg,
    recipe: opt.RecipeOpt = opt.DEFAULT_RECIPE,
    verify: Annotated[bool, typer.Option("--verify", help="Also read every log-mel, and make damaged ones again.")] = False,
    jobs: opt.JobsOpt = -1,
    engine: opt.EngineOpt = "joblib",
    scheduler: opt.SchedulerOpt = "",
    home: opt.HomeOpt = None,
    set_: opt.SetOpt = None,
) -> None:
    """Turn audio into log-mel .npy files, once. Only files that are missing or whose audio changed are made."""
    from melfold import stages
    from melfold.data.competition import load_competition

    place, compute = Home.find(home), opt.resolve_compute(jobs=jobs, engine=engine, scheduler=scheduler)
    resolved = opt.resolve_recipe(recipe, set_, place)
    with compute.connected(place.root):
        typer.echo(stages.cache(load_competition(data.resolve(), resolved.data.exclude), place, resolved, compute, verify=verify))


@command(app, "folds", "melfold folds data/fat2019 --n-folds 5 --seed 42")
def folds(
    data: opt.DataArg,
    n_folds: Annotated[int | None, typer.Option("--n-folds", min=2, help="Number of folds (default: the recipe's).")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the table (default: the recipe's).")] = None,
    groups: Annotated[
        str | None,
        typer.Option("--groups", help="Clips that share a fold: auto, identical, none or a table (default: the recipe's)."),
    ] = None,
    suggest_groups: Annotated[
        bool, typer.Option("--suggest-groups", help="Instead of a table, propose near-duplicates by audio, to listen to.")
    ] = False,
    recipe: opt.RecipeOpt = opt.DEFAULT_RECIPE,
    home: opt.HomeOpt = None,
    set_: opt.SetOpt = None,
) -> None:
    """Write the fold table, even in every label, with groups of clips kept together: the same for everyone."""
    from melfold import stages
    from melfold.data.competition import load_competition
    from melfold.data.groups import groups_path

    asked = {"n_folds": n_folds, "seed": seed, "groups": groups}
    changes = [f"folds.{key}={value}" for key, value in asked.items() if value is not None]
    place = Home.find(home)
    resolved = opt.resolve_recipe(recipe, [*(set_ or []), *changes], place)
    competition = load_competition(data, resolved.data.exclude)
    if suggest_groups:
        _suggest_groups(competition, place, resolved)
        return
    path, balance = stages.folds(competition, place, resolved)
    how = resolved.folds.groups
    grouped_by = groups_path(competition.name, place, how) or ("none" if how == "none" else "clips with identical audio")
    typer.echo(f"{path}\nGroups: {grouped_by}\n{balance}")


def _suggest_groups(competition: Competition, home: Home, recipe: Recipe) -> None:
    from melfold.data.cache import build_cache, read_manifest, stop_workers, unreadable
    from melfold.data.duplicates import suggest_groups
    from melfold.data.groups import write_groups

    folder = build_cache(competition, recipe.logmel, home, splits=["curated"], compute=opt.resolve_compute())
    stop_workers()
    readable = competition.curated.index.difference(unreadable(read_manifest(folder)))
    found, pairs = suggest_groups(competition.curated.loc[readable, "labels"], folder, bar())
    print_table(rows_of(pairs.set_index("one").head(50), "one"), left=["other"], digits=2)
    typer.echo(f"{len(pairs)} pairs, {len(found)} clips in {found.nunique()} groups. Some are false alarms: listen to them.")
    if len(found):
        path = home.folds / f"{competition.name}_suggested_groups.csv"
        write_groups(path, found)
        typer.echo(f"{path}\nDelete rows you do not believe, then use it with --groups {path}")


@command(app, "groups", "melfold groups FSDKaggle2019.meta/train_curated_post_competition.csv")
def groups(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="fname,labels,freesound_id, as published with FSDKaggle2019.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write them as fname,group.")] = None,
    home: opt.HomeOpt = None,
) -> None:
    """Group clips of one series of uploads by their Freesound ids; and count, for each fold table, the clips whose twin is in
    the training set of the model that scores them."""
    from melfold.data import groups as grouping

    clips = grouping.read_ids(table)
    pairs = grouping.twin_pairs(clips)
    found = grouping.join_pairs(list(clips.index), pairs)
    sizes = found.value_counts()
    typer.echo(f"{len(clips)} clips in {len(sizes)} groups, {(sizes > 1).sum()} of several clips, the largest of {sizes.max()}.")
    rows = []
    for path, folds in grouping.tables_of(Home.find(home).folds, clips.index):
        outside = grouping.clips_with_twin_outside(pairs, folds.to_numpy())
        rows.append({"fold table": path.name, "clips with a twin in training": outside, "share %": 100 * outside / len(clips)})
    print_table(rows, digits=1)
    if output:
        grouping.write_groups(output, found)
        typer.echo(output)

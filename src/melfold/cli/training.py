"""Commands that train: a run, its folds, everything from the download to a submission, the demo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melfold.cli import options as opt
from melfold.cli.output import command, interval, score
from melfold.cli.scores import print_oof
from melfold.files import Home

if TYPE_CHECKING:
    from melfold.learn.runs import Run

app = typer.Typer()


@command(app, "train", "melfold train data/fat2019 --recipe audioset --folds 0,1", continues=True)
def train(
    data: opt.DataArg,
    recipe: opt.RecipeOpt = opt.DEFAULT_RECIPE,
    folds: opt.FoldsOpt = "all",
    run: opt.RunOpt = None,
    device: opt.DevicesOpt = "auto",
    jobs: opt.JobsOpt = -1,
    engine: opt.EngineOpt = "joblib",
    scheduler: opt.SchedulerOpt = "",
    tracker: opt.TrackerOpt = "",
    home: opt.HomeOpt = None,
    set_: opt.SetOpt = None,
) -> None:
    """Train folds of a run. It can be stopped at any moment; the same command, or `melfold resume`, continues."""
    from melfold import stages
    from melfold.data.competition import load_competition
    from melfold.learn.start import parse_folds
    from melfold.learn.tracker import tracked

    place, compute = Home.find(home), opt.resolve_compute(device, jobs, engine, scheduler)
    resolved = opt.resolve_recipe(recipe, set_, place)
    which = parse_folds(folds, resolved)
    name = opt.resolve_run_name(run, recipe, resolved, place)
    competition = load_competition(data.resolve(), resolved.data.exclude)
    with compute.connected(place.root), tracked(tracker, place.runs / name, resolved.model_dump(mode="json")):
        _print_trained(stages.train(competition, place, resolved, name, which, compute))


@command(app, "resume", "melfold resume audioset", continues=True)
def resume(
    run: opt.RunArg,
    data: opt.RunDataOpt = None,
    device: opt.DevicesOpt = "auto",
    jobs: opt.JobsOpt = -1,
    engine: opt.EngineOpt = "joblib",
    scheduler: opt.SchedulerOpt = "",
    tracker: opt.TrackerOpt = "",
    home: opt.HomeOpt = None,
) -> None:
    """Continue training a run, with its own recipe and data."""
    from melfold import stages
    from melfold.learn.runs import open_run
    from melfold.learn.tracker import tracked

    place, compute = Home.find(home), opt.resolve_compute(device, jobs, engine, scheduler)
    opened = open_run(place, run)
    with compute.connected(place.root), tracked(tracker, opened.folder, opened.recipe.model_dump(mode="json")):
        _print_trained(stages.resume(place, run, compute, data and data.resolve()))


@command(app, "student", "melfold student imagenet scratch --rounds 2 --set noisy.power=2", continues=True)
def student(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="The first teachers: runs with all folds trained.")],
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds; the students of one are the teachers of the next.")] = 1,
    data: opt.RunDataOpt = None,
    device: opt.DevicesOpt = "auto",
    jobs: opt.JobsOpt = -1,
    engine: opt.EngineOpt = "joblib",
    scheduler: opt.SchedulerOpt = "",
    home: opt.HomeOpt = None,
    set_: opt.SetOpt = None,
) -> None:
    """Train each run again with soft targets from all of them, in rounds: RUN-r1, RUN-r2 and so on, fold by fold."""
    from melfold import stages

    place, compute = Home.find(home), opt.resolve_compute(device, jobs, engine, scheduler)
    with compute.connected(place.root):
        students = stages.students(place, runs, rounds, set_ or [], compute, data and data.resolve())
    names = [run.name for run in students]
    typer.echo("\n".join(str(run.folder) for run in students))
    typer.echo(f"Trained: {', '.join(names)}. Next: melfold compare {' '.join([*runs, *names])}")


def _print_trained(run: Run) -> None:
    done = run.done_folds()
    scored = any(fold != "full" for fold in done)
    typer.echo(f"{run.folder}\nTrained: {', '.join(done)}. Next: melfold {'oof' if scored else 'predict'} {run.name}")


@command(app, "run", "melfold run data/fat2019 --recipe audioset", continues=True)
def run(
    data: opt.DataArg,
    recipe: opt.RecipeOpt = opt.DEFAULT_RECIPE,
    run: opt.RunOpt = None,
    device: opt.DevicesOpt = "auto",
    jobs: opt.JobsOpt = -1,
    engine: opt.EngineOpt = "joblib",
    scheduler: opt.SchedulerOpt = "",
    tracker: opt.TrackerOpt = "",
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Every stage with a few clips and steps: does it run, and how fast?")
    ] = False,
    home: opt.HomeOpt = None,
    set_: opt.SetOpt = None,
) -> None:
    """Everything from a download to a checked submission.csv. What is already done is skipped."""
    from melfold import stages
    from melfold.learn.tracker import tracked

    place, compute = Home.find(home), opt.resolve_compute(device, jobs, engine, scheduler)
    resolved = opt.resolve_recipe(recipe, set_, place)
    if dry:
        from melfold.dry_run import dry_run

        tried = dry_run(data, place, resolved, compute)
        typer.echo(f"Every stage runs: {tried.submission} is no result.")
        typer.echo("\n".join(tried.forecast.lines()))
        return
    name = opt.resolve_run_name(run, recipe, resolved, place)
    with compute.connected(place.root), tracked(tracker, place.runs / name, resolved.model_dump(mode="json")):
        prediction, scores, path = stages.run(data.resolve(), place, resolved, name, compute)
    print_oof(scores)
    typer.echo(f"{path}  (track: {prediction.run.info.track})")


@command(app, "demo", "melfold demo", continues=True)
def demo(
    home: Annotated[Path, typer.Option("--home", help="The folder for all that the demo makes.")] = Path("build/demo"),
    device: opt.DeviceOpt = "auto",
    set_: opt.SetOpt = None,
) -> None:
    """The whole job on a small synthetic competition."""
    from melfold import stages
    from melfold.combine.check import score_submission
    from melfold.data.demo import write_demo

    started = time.monotonic()
    place, compute = Home(home.resolve()), opt.resolve_compute(device)
    recipe = opt.resolve_recipe("demo", set_, place)
    name = opt.resolve_run_name(None, "demo", recipe, place)
    data = write_demo(place.data / "demo")
    prediction, scores, path = stages.run(data, place, recipe, name, compute)
    test = score_submission(path, data / "test_post_competition.csv")
    typer.echo(f"\nThe demo took {time.monotonic() - started:.0f} s.")
    typer.echo(f"lwlrap with 95 % interval (a constant prediction scores {score(scores.constant_lwlrap)}):")
    typer.echo(f"  out-of-fold   {score(scores.oof_lwlrap)}  ({interval(scores.low, scores.high)}, {scores.clips} clips)")
    for half, row in test.iterrows():
        clips = f"{row['clips']:.0f} clips"
        typer.echo(f"  test {half:<8} {score(row['lwlrap'])}  ({interval(row['low'], row['high'])}, {clips})")
    typer.echo("Files:")
    for what, where in (
        ("synthetic competition", data),
        ("log-mels", place.cache),
        ("fold table", place.folds),
        ("run: weights, logs, OOF", prediction.run.folder),
        ("submission", path),
    ):
        typer.echo(f"  {what:<24} {where}")
    clip = min(path.name for path in (data / "test").iterdir())
    typer.echo(f"Next: melfold oof {prediction.run.name} --home {place.root}")
    typer.echo(f"      melfold show {data} {clip} --recipe demo --home {place.root} -o clips.png")
    typer.echo("      melfold run PATH/TO/THE/DOWNLOAD --recipe audioset")

"""Commands that predict, and build, check and score submissions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melfold.cli.options import (
    DataOpt,
    DevicesOpt,
    EngineOpt,
    HomeOpt,
    IdArg,
    JobsOpt,
    JsonOpt,
    PredictionArg,
    RunDataOpt,
    SchedulerOpt,
    resolve_compute,
)
from melfold.cli.output import command, interval, note, print_json, print_table, rows_of, score
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.kaggle.standings import place_at

if TYPE_CHECKING:
    from melfold.data.competition import Competition
    from melfold.learn.predictions import Prediction
    from melfold.learn.runs import Run

app = typer.Typer()
submission_app = typer.Typer(help="Submissions: build, check and score a submission.csv.", no_args_is_help=True)
app.add_typer(submission_app, name="submission")


@command(app, "predict", "melfold predict audioset --set predict.shift_seconds='[0,0.25]' --name tta", continues=True)
def predict(
    run: PredictionArg,
    data: RunDataOpt = None,
    name: Annotated[str | None, typer.Option("--name", help="Another prediction of the same weights: RUN@NAME.")] = None,
    device: DevicesOpt = "auto",
    jobs: JobsOpt = -1,
    engine: EngineOpt = "joblib",
    scheduler: SchedulerOpt = "",
    home: HomeOpt = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="predict.KEY=VALUE", help="Change a setting of prediction; repeatable; needs --name."),
    ] = None,
) -> None:
    """Predict the test clips with the trained folds of a run; with --name also the held-out clips."""
    from melfold import stages

    place, compute = Home.find(home), resolve_compute(device, jobs, engine, scheduler)
    prediction = _open_or_start(place, run, name, set_ or [])
    competition = _competition(data, prediction.run)
    with compute.connected(place.root):
        typer.echo(stages.predict(prediction, competition, place, compute).test)


def _open_or_start(home: Home, label: str, name: str | None, sets: list[str]) -> Prediction:
    from melfold.learn.predictions import list_predictions, open_prediction, start_prediction
    from melfold.recipes import change_recipe, parse_set

    if sets and not name:
        fix = f"Add --name NAME; it makes the prediction {label.partition('@')[0]}@NAME"
        raise MelfoldError("other settings are another prediction, which needs a name", f"--set {' '.join(sets)}", fix)
    if odd := [item for item in sets if not parse_set(item)[0].startswith("predict.")]:
        raise MelfoldError("only predict.* can be changed after training", odd[0], "Train another run for other settings")
    opened = open_prediction(home, label)
    if not name:
        return opened
    if opened.name:
        raise MelfoldError("--name needs a run", f"{label} is a prediction already", f"Give {opened.run.name} --name {name}")
    if not sets and any(prediction.name == name for prediction in list_predictions(opened.run)):
        return open_prediction(home, f"{label}@{name}")
    return start_prediction(opened.run, name, change_recipe(opened.run.recipe, sets).predict)


def _competition(data: Path | None, run: Run) -> Competition:
    """The download that is given, or the one a run was trained on."""
    from melfold.data.competition import load_competition

    folder = data or Path(run.info.data_folder)
    if not data and not folder.is_dir():
        raise MelfoldError(f"the download of run {run.name} is gone", str(folder), "Give its folder: --data DATA")
    return load_competition(folder.resolve())


@command(submission_app, "build", "melfold submission build audioset small --mean logit --weights 2,1")
def submission_build(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="One run or RUN@NAME, or several to combine.")],
    data: RunDataOpt = None,
    id: Annotated[str | None, typer.Option("--id", help="The submission's name (default: the runs').")] = None,
    mean: Annotated[str, typer.Option("--mean", help="Of several runs: arithmetic, geometric, logit or rank.")] = "geometric",
    weights: Annotated[str | None, typer.Option("--weights", help="One per run, as in 3,1 (default: equal).")] = None,
    home: HomeOpt = None,
) -> None:
    """Combine runs into submissions/<id>/submission.csv, checked, with a manifest that says what it is made of."""
    from melfold.combine.submission import build_submission, open_submission
    from melfold.learn.predictions import open_predictions

    place = Home.find(home)
    opened = open_predictions(place, runs)
    try:
        shares = [float(part) for part in weights.split(",")] if weights is not None else None
    except ValueError:
        raise MelfoldError("--weights needs numbers", repr(weights), "For example --weights 3,1") from None
    id = id or "+".join(prediction.label.replace("@", "-") for prediction in opened)
    competition = _competition(data, opened[0].run)
    path = build_submission(place, opened, competition, id=id, mean=mean, weights=shares)
    manifest = open_submission(place, id)
    licences = f" Licences of initial weights: {', '.join(manifest['licences'])}." if manifest["licences"] else ""
    seen = f" They were trained on: {', '.join(manifest['seen'])}." if manifest["seen"] else ""
    typer.echo(f"{path}\nTrack: {manifest['track']}. Data: {'; '.join(manifest['data'])}.{licences}{seen}")
    for rule in manifest["breaks"]:
        typer.secho(f"BREAKS: {rule}", fg="yellow")
    _print_expected(opened, manifest, competition, place)


def _print_expected(predictions: Sequence[Prediction], manifest: dict[str, Any], competition: Competition, home: Home) -> None:
    """The score and the rank that a submission may expect, or why none can be told."""
    from melfold.combine.expect import expected_score
    from melfold.combine.rebuild import label_of

    shares = {label_of(member): member["share"] for member in manifest["runs"]}
    members = [prediction for prediction in predictions if prediction.label in shares]
    try:
        found = expected_score(members, manifest["mean"], list(shares.values()), len(competition.test))
    except MelfoldError as error:
        note(str(error))
        return
    typer.echo(f"Expected score: {score(found.score)} ({interval(found.low, found.high)}), from out-of-fold predictions alone")
    expected, best, worst = (place_at(home, competition.name, value) for value in (found.score, found.high, found.low))
    if expected and best and worst:
        typer.echo(f"On the final Private leaderboard: {expected} (rank {best.rank} to {worst.rank})")
    if not found.grouped:
        note("no groups of clips are known in these folds: if there are near-duplicates, expect less")


@command(submission_app, "rebuild", "melfold submission rebuild audioset --data data/fat2019")
def submission_rebuild(id: IdArg, data: DataOpt, home: HomeOpt = None) -> None:
    """Make a submission.csv again from its manifest, such as a colleague's; or print the commands that make what is missing."""
    from melfold.combine.rebuild import plan_rebuild, rebuild
    from melfold.data.competition import load_competition

    place = Home.find(home)
    plan = plan_rebuild(place, id, data)
    for line in plan.notes:
        note(line)
    if plan.commands:
        typer.echo("Something is missing here. These commands make it:")
        for line in [*plan.commands, f"melfold submission rebuild {id} --data {data}"]:
            typer.echo(line)
        raise typer.Exit(1)
    typer.echo(rebuild(place, id, load_competition(data)))


@command(submission_app, "check", "melfold submission check submission.csv --data data/fat2019")
def submission_check(file: Annotated[Path, typer.Argument(metavar="FILE", help="Any CSV.")], data: DataOpt) -> None:
    """Would the competition accept this file?"""
    from melfold.combine.check import check_submission
    from melfold.data.competition import load_competition

    probs = check_submission(file, load_competition(data))
    typer.echo(f"{file}: {len(probs)} clips, {len(probs.columns)} labels, in order.")


@command(submission_app, "score", "melfold submission score submission.csv --truth test_post_competition.csv")
def submission_score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A submission, rows in any order.")],
    truth: Annotated[Path, typer.Option("--truth", help="fname,labels,usage as published after the competition.")],
    json: JsonOpt = False,
) -> None:
    """Score a file as the leaderboard does, Public and Private separately. For scoring only: never choose by it."""
    from melfold.combine.check import score_submission
    from melfold.probs import read_probs

    scores = score_submission(file, truth)
    if json:
        print_json(rows_of(scores, "usage"))
        return
    print_table(rows_of(scores, "usage"))
    private = scores["lwlrap"].get("Private")
    if place := place_at(Home.find(), list(read_probs(file).columns), private):
        typer.echo(f"On the final Private leaderboard: {place}")
    for half in {"Public", "Private"} - set(scores.index):
        typer.echo(f"The {half} half is not covered by this file or this table.")

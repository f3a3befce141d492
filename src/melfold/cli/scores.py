"""Commands about out-of-fold scores: of a run, of several side by side, of ensembles; and doubtful labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melfold.cli.options import HomeOpt, JsonOpt, PredictionArg
from melfold.cli.output import command, interval, note, print_json, print_table, rows_of, score, warn_incomplete
from melfold.files import Home

if TYPE_CHECKING:
    from melfold.combine.ensemble import Suggestion
    from melfold.combine.oof import OofScores
    from melfold.learn.predictions import Prediction

app = typer.Typer()
ensemble_app = typer.Typer(help="Ensembles: which runs to combine, and how.", no_args_is_help=True)
relabel_app = typer.Typer(help="Doubtful labels.", no_args_is_help=True)
app.add_typer(ensemble_app, name="ensemble")
app.add_typer(relabel_app, name="relabel")


@command(app, "oof", "melfold oof audioset")
def oof(run: PredictionArg, json: JsonOpt = False, home: HomeOpt = None) -> None:
    """Score the held-out predictions of a run: pooled, by fold and by label."""
    from melfold.combine import oof as scoring
    from melfold.learn.predictions import open_prediction

    prediction = open_prediction(Home.find(home), run)
    scores = scoring.score(prediction)
    if json:
        print_json({"run": prediction.label, **scoring.to_json(scores)})
        return
    print_table(rows_of(scores.per_label.sort_values("lwlrap"), "label"))
    print_oof(scores)
    typer.echo(f"{prediction.oof}\n{prediction.scores}")


def print_oof(scores: OofScores) -> None:
    """The scores of a run in three lines, and a warning where folds are missing."""
    if scores.missing:
        missing = ", ".join(map(str, scores.missing))
        note(f"INCOMPLETE: folds {missing} are not trained; this covers only {scores.clips} clips")
    folds = "  ".join(f"{fold}: {score(value)}" for fold, value in scores.fold_lwlrap.items())
    where = f"95 % {interval(scores.low, scores.high)}, {scores.clips} clips"
    typer.echo(f"oof_lwlrap        {score(scores.oof_lwlrap)}  ({where})")
    typer.echo(f"mean_fold_lwlrap  {score(scores.mean_fold_lwlrap)}  ({folds})")
    typer.echo(f"constant          {score(scores.constant_lwlrap)}  (the same prediction for every clip)")


@command(app, "compare", "melfold compare audioset audioset-seed1 small")
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs or RUN@NAME; the others are compared with the first one.")
    ],
    labels: Annotated[bool, typer.Option("--labels", help="Compare each label as well.")] = False,
    common: Annotated[
        bool, typer.Option("--common", help="Compare unfinished runs too, all of them on the clips that every run has predicted.")
    ] = False,
    json: JsonOpt = False,
    home: HomeOpt = None,
) -> None:
    """Compare the OOF scores of runs: intervals, paired differences from the first run, the spread over seeds."""
    from melfold.combine import ensemble
    from melfold.learn.predictions import open_predictions

    opened = open_predictions(Home.find(home), runs)
    found = ensemble.compare(opened if common else _without_unfinished(opened), common=common)
    rows = rows_of(found.runs, "run")
    if json:
        seeds = [{"runs": names, "mean": mean, "standard_deviation": spread} for names, mean, spread in found.seeds]
        print_json({"clips": found.clips, "runs": rows, "seeds": seeds, "labels": rows_of(found.labels, "label")})
        return
    if labels:
        print_table(rows_of(found.labels, "label"))
    print_table(rows)
    of = max(len(prediction.run.clips) for prediction in opened)
    typer.echo(f"All scores are on {'the same' if found.clips == of else 'the'} {found.clips} of {of} clips.")
    for names, mean, spread in found.seeds:
        typer.echo(f"{len(names)} seeds ({', '.join(names)}): mean {score(mean)}, standard deviation {score(spread)}")
    if len(rows) > 1:
        typer.echo("difference: from the first run; d_low to d_high: its 95 % interval; better: the share of resamples above 0.")


def _without_unfinished(predictions: Sequence[Prediction]) -> Sequence[Prediction]:
    """The finished runs; if that leaves the first run out or leaves nothing to compare, all of them, which is refused."""
    finished = [prediction for prediction in predictions if not prediction.run.missing_folds()]
    if len(finished) < 2 or finished[0] is not predictions[0]:
        return predictions
    for prediction in predictions:
        if missing := prediction.run.missing_folds():
            folds = ", ".join(map(str, missing))
            note(f"left out: run {prediction.label} is not finished (fold {folds}); --common compares the clips in common")
    return finished


@command(ensemble_app, "suggest", "melfold ensemble suggest audioset small")
def ensemble_suggest(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN...]", help="Runs or RUN@NAME (default: all finished runs with the same folds)."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", metavar="MINUTES", min=0, help="Only what predicts the competition's test clips in this time."),
    ] = None,
    json: JsonOpt = False,
    home: HomeOpt = None,
) -> None:
    """Rank ways to combine runs by honest OOF scores: what a search chose is scored on folds it did not see."""
    from melfold.combine.ensemble import predictions_alike, suggest
    from melfold.errors import MelfoldError
    from melfold.learn.predictions import open_predictions

    place = Home.find(home)
    opened = open_predictions(place, runs) if runs else predictions_alike(place)
    if len(opened) < 2:
        found = f"{len(opened)} in {place.runs}" if not runs else ", ".join(runs)
        what = "an ensemble needs at least two finished runs with the same folds"
        raise MelfoldError(what, found, "Train another recipe or seed")
    suggestions = suggest(opened, None if budget is None else 60 * budget)
    if json:
        print_json([_as_json(item) for item in suggestions])
        return
    print_table([{"": number, **_as_row(item)} for number, item in enumerate(suggestions, 1)], left=["runs", "mean"])
    _print_next(suggestions[0], opened)
    typer.echo(
        "fitted: a search chose this row, by this score; its oof_lwlrap is of clips that it did not see. seconds: to predict the "
        "real test clips, as fast as each run's last prediction."
    )
    typer.echo("The best of many is a little lucky: if the interval of its gain includes 0, nothing is decided.")


def _as_json(item: Suggestion) -> dict[str, Any]:
    gain = {"gain": item.gain.value, "gain_low": item.gain.low, "gain_high": item.gain.high}
    return {key: value for key, value in vars(item).items() if key != "gain"} | gain


def _as_row(item: Suggestion) -> dict[str, Any]:
    row = _as_json(item) | {"runs": "+".join(item.runs), "seconds": None if item.seconds is None else round(item.seconds)}
    row["weights"] = _weights(item) or ("equal" if len(item.runs) > 1 else "-")
    return {"gain over best run" if key == "gain" else key: value for key, value in row.items() if key != "clips"}


def _weights(item: Suggestion) -> str:
    return ",".join(f"{weight:g}" for weight in item.weights or ())


def _print_next(best: Suggestion, opened: Sequence[Prediction]) -> None:
    for prediction in opened:
        if prediction.label in best.runs and not prediction.test.exists():
            typer.echo(f"Next: melfold predict {prediction.label}")
    how = f" --mean {best.mean}" if len(best.runs) > 1 else ""
    how += f" --weights {_weights(best)}" if best.weights and len(best.runs) > 1 else ""
    typer.echo(f"Next: melfold submission build {' '.join(best.runs)}{how}")


@command(relabel_app, "suggest", "melfold relabel suggest audioset -o corrections.csv")
def relabel_suggest(
    run: PredictionArg,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write them to a corrections.csv, for you to listen to and edit.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many.")] = 50,
    home: HomeOpt = None,
) -> None:
    """List curated clips whose held-out prediction contradicts their labels: likely wrong or missing labels."""
    from melfold.combine.relabel import suggest_corrections, write_corrections
    from melfold.learn.predictions import open_prediction

    prediction = open_prediction(Home.find(home), run)
    doubts = suggest_corrections(prediction)
    shown = doubts.head(top)
    table = shown.map(lambda value: ", ".join(value) if isinstance(value, tuple) else value)
    print_table(rows_of(table, "fname"), left=["labels", "suggested", "missing", "wrong"], digits=1)
    curated = prediction.run.clips
    covered = len(curated) - sum(len(prediction.run.held_out(fold)) for fold in prediction.run.missing_folds())
    first = f"; these are the first {top}" if len(doubts) > top else ""
    typer.echo(f"{len(doubts)} of {covered} clips are in doubt{first}.")
    warn_incomplete(covered, len(curated))
    if output:
        write_corrections(output, shown, prediction.label, prediction.run.info.track)
        typer.echo(f"{output}\nListen to them, delete rows you disagree with, then train with --set data.corrections={output}")

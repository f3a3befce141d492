"""The command line: one thin command a stage."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melfold.cli_kaggle import register
from melfold.errors import MelfoldError
from melfold.files import Home, read_json
from melfold.terminal import (
    DataArg,
    DataOpt,
    DeviceOpt,
    DevicesOpt,
    EngineOpt,
    HomeOpt,
    JobsOpt,
    RecipeOpt,
    RunArg,
    RunOpt,
    SchedulerOpt,
    SetOpt,
    bar,
    command,
    print_table,
    refuse_set,
)

if TYPE_CHECKING:
    from melfold.combine.oof import OofScores
    from melfold.config import Recipe
    from melfold.learn.predictions import Prediction

app = typer.Typer(
    name="melfold",
    help="From the Freesound Audio Tagging 2019 download to a scored Kaggle submission.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(help="What the recipes hold.", no_args_is_help=True)
submission_app = typer.Typer(help="Build, check and score submission.csv.", no_args_is_help=True)
ensemble_app = typer.Typer(help="Which runs to combine, and how.", no_args_is_help=True)
relabel_app = typer.Typer(help="Doubtful labels.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
app.add_typer(ensemble_app, name="ensemble")
app.add_typer(relabel_app, name="relabel")
app.add_typer(submission_app, name="submission")


@command(app, "check", "melfold check data/fat2019")
def check(data: DataArg, recipe: RecipeOpt = "open", home: HomeOpt = None, set_: SetOpt = None) -> None:
    """Is this download complete and sane? Reads the tables and every file's header."""
    from melfold.compute import Compute
    from melfold.data.check import check as check_download

    checked = check_download(data, Home.find(home), _recipe(recipe, set_), Compute(progress=bar()))
    print_table(checked.splits, "split")
    for note in checked.notes:
        typer.echo(f"note: {note}")
    typer.echo("This download is complete and sane.")


@command(app, "show", "melfold show data/fat2019 0006ae4e.wav -o clips.png")
def show(
    data: DataArg,
    fnames: Annotated[list[str], typer.Argument(metavar="FNAME...", help="Clips of any split.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("clips.png"),
    recipe: RecipeOpt = "open",
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Draw clips: waveform, the log-mel as the model sees it, labels."""
    from melfold.data.competition import load_competition
    from melfold.report.clips import draw_clips

    draw_clips(load_competition(data), fnames, _recipe(recipe, set_), output)
    typer.echo(output)


@command(app, "cache", "melfold cache data/fat2019 --recipe open")
def cache(
    data: DataArg,
    recipe: RecipeOpt = "open",
    jobs: JobsOpt = -1,
    engine: EngineOpt = "joblib",
    scheduler: SchedulerOpt = "",
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Turn audio into log-mel .npy files, once; only what is missing or has changed is made."""
    from melfold import stages
    from melfold.compute import Compute
    from melfold.data.competition import load_competition

    place, resolved = Home.find(home), _recipe(recipe, set_)
    compute = Compute(jobs=jobs, engine=engine, scheduler=scheduler, progress=bar())
    with compute.connected(place.root):
        typer.echo(stages.cache(load_competition(data.resolve()), place, resolved, compute))


@command(app, "folds", "melfold folds data/fat2019 --n-folds 5 --seed 42")
def folds(
    data: DataArg,
    n_folds: Annotated[int | None, typer.Option("--n-folds", min=2, help="How many folds (else as the recipe says).")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Another seed is another table (else the recipe's).")] = None,
    group_identical: Annotated[
        bool, typer.Option("--group-identical", help="Keep clips with identical audio together, in a table of another name.")
    ] = False,
    recipe: RecipeOpt = "open",
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Write the fold table: stratified on the labels alone, the same for everyone."""
    from melfold import stages
    from melfold.data.competition import load_competition

    asked = {"n_folds": n_folds, "seed": seed, "group_identical": "true" if group_identical else None}
    changes = [f"folds.{key}={value}" for key, value in asked.items() if value is not None]
    path, deviation = stages.folds(load_competition(data), Home.find(home), _recipe(recipe, [*(set_ or []), *changes]))
    typer.echo(f"{path}\nNo label is more than {deviation} clips off an even split.")


@command(app, "train", "melfold train data/fat2019 --recipe open --folds 0,1")
def train(
    data: DataArg,
    recipe: RecipeOpt = "open",
    folds: Annotated[str, typer.Option("--folds", help="0,1 or all or full (every curated clip, no held-out fold).")] = "all",
    run: RunOpt = None,
    device: DevicesOpt = "auto",
    jobs: JobsOpt = -1,
    engine: EngineOpt = "joblib",
    scheduler: SchedulerOpt = "",
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Train folds of a run. Can be stopped at any moment; the same command goes on."""
    from melfold import stages
    from melfold.compute import Compute
    from melfold.data.competition import load_competition
    from melfold.learn.start import parse_folds

    resolved, place = _recipe(recipe, set_), Home.find(home)
    which = parse_folds(folds, resolved)
    competition = load_competition(data.resolve())
    compute = Compute(tuple(device.split(",")), jobs, engine, scheduler, bar())
    name = _run_name(run, recipe, resolved)
    with compute.connected(place.root):
        result = stages.train(competition, place, resolved, name, which, compute)
    scored = any(fold != "full" for fold in result.done_folds())
    follow = f"melfold oof {result.name}" if scored else f"melfold predict {result.name} --data {data}"
    typer.echo(f"{result.folder}\nDone: {', '.join(result.done_folds())}. Next: {follow}")


@command(app, "oof", "melfold oof open")
def oof(run: RunArg, home: HomeOpt = None, set_: SetOpt = None) -> None:
    """Score a run's held-out predictions: pooled, by fold and by label."""
    from melfold.combine.oof import score

    _, (opened,) = _open_runs([run], home, set_)
    scores = score(opened)
    print_table(scores.per_label.sort_values("lwlrap"), "label")
    _print_oof(scores)
    typer.echo(f"{opened.oof}\n{opened.scores}")


@command(app, "predict", "melfold predict open --data data/fat2019")
def predict(
    run: RunArg,
    data: DataOpt,
    device: DeviceOpt = "auto",
    engine: EngineOpt = "joblib",
    scheduler: SchedulerOpt = "",
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Predict the test clips with a run's trained folds, as its saved recipe says."""
    from melfold import stages
    from melfold.compute import Compute
    from melfold.data.competition import load_competition

    place, (opened,) = _open_runs([run], home, set_)
    compute = Compute((device,), engine=engine, scheduler=scheduler, progress=bar())
    with compute.connected(place.root):
        typer.echo(stages.predict(opened, load_competition(data.resolve()), place, compute).test)


@command(submission_app, "build", "melfold submission build open --data data/fat2019")
def submission_build(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="One run, or several to average.")],
    data: DataOpt,
    id: Annotated[str | None, typer.Option("--id", help="The submission's name (else the runs').")] = None,
    mean: Annotated[str, typer.Option("--mean", help="Between runs: arithmetic, geometric, logit or rank.")] = "geometric",
    weights: Annotated[str | None, typer.Option("--weights", help="One a run, as in 3,1 (else equal).")] = None,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Combine runs into submissions/<id>/submission.csv, checked, with the recipe that rebuilds it."""
    from melfold.combine.submission import build_submission
    from melfold.data.competition import load_competition

    place, opened = _open_runs(runs, home, set_)
    name = id or "+".join(p.label.replace("@", "-") for p in opened)
    path = build_submission(place, opened, load_competition(data), id=name, mean=mean, weights=_numbers(weights))
    noted = read_json(path.with_name("manifest.json"))
    typer.echo(f"{path}\nTrack: {noted['track']}. Data: {'; '.join(noted['data'])}.", nl=False)
    typer.echo(f" Licences of first weights: {', '.join(noted['licences'])}." if noted["licences"] else "")
    for rule in noted["breaks"]:
        typer.secho(f"BREAKS: {rule}", fg="yellow")


@command(ensemble_app, "suggest", "melfold ensemble suggest open small")
def ensemble_suggest(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN...]", help="Runs to combine (else all that hold out the same clips).")
    ] = None,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Rank ways to combine runs by honest OOF scores: fitted weights are scored on folds they were not fitted on."""
    import pandas as pd

    from melfold.combine.ensemble import predictions_alike, suggest

    place, opened = _open_runs(runs or [], home, set_)
    opened = opened or predictions_alike(place)
    found = suggest(opened)
    rows = {}
    for number, item in enumerate(found):
        weights = ",".join(f"{w:g}" for w in item.weights) if item.weights else "equal" if len(item.runs) > 1 else ""
        rows[number + 1] = {
            "runs": "+".join(item.runs),
            "mean": item.mean,
            "weights": weights,
            "oof_lwlrap": item.oof_lwlrap,
            "low": item.low,
            "high": item.high,
            "fitted": item.fitted,
            "over best run": item.gain.value,
            "from": item.gain.low,
            "to": item.gain.high,
        }
    print_table(pd.DataFrame.from_dict(rows, orient="index"), "")
    _warn_incomplete(found[0].clips, max(len(p.run.clips) for p in opened))
    best = found[0]
    how = f" --mean {best.mean}" + (f" --weights {','.join(f'{w:g}' for w in best.weights)}" if best.weights else "")
    for run in opened:
        if run.label in best.runs and not run.test.exists():
            typer.echo(f"Next: melfold predict {run.label} --data DATA")
    typer.echo(f"Next: melfold submission build {' '.join(best.runs)}{how if len(best.runs) > 1 else ''} --data DATA")
    typer.echo("The best of many is a little lucky: where an interval over the best run holds 0, nothing is decided.")


@command(relabel_app, "suggest", "melfold relabel suggest open -o corrections.csv")
def relabel_suggest(
    run: RunArg,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write them as a corrections.csv, to be listened through and pruned.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many.")] = 50,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """List curated clips whose held-out prediction contradicts their labels: wrong labels, and likely missing ones."""
    from melfold.combine.relabel import suggest_corrections, write_corrections

    _, (opened,) = _open_runs([run], home, set_)
    doubts = suggest_corrections(opened)
    shown = doubts.head(top)
    print_table(shown.map(lambda value: ", ".join(value) if isinstance(value, tuple) else value), "fname")
    rest = f"; these are the first {top}" if len(doubts) > top else ""
    source = opened.run
    heard = len(source.clips) - sum(len(source.held_out(fold)) for fold in source.missing_folds())
    typer.echo(f"{len(doubts)} of {heard} clips are in doubt{rest}.")
    _warn_incomplete(heard, len(source.clips))
    if output:
        write_corrections(output, shown, opened.label)
        typer.echo(f"{output}\nListen, strike out, then: --set data.corrections={output}")


@command(app, "compare", "melfold compare open open-seed1 small")
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="The first is the one the others are held against.")],
    labels: Annotated[bool, typer.Option("--labels", help="By label as well.")] = False,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Set runs side by side: OOF scores with intervals, paired differences from the first, the spread over seeds."""
    from melfold.combine import ensemble

    _, opened = _open_runs(runs, home, set_)
    found = ensemble.compare(opened)
    if labels:
        print_table(found.labels, "label")
    print_table(found.runs, "run")
    _warn_incomplete(found.clips, max(len(p.run.clips) for p in opened))
    for names, mean, spread in found.seeds:
        typer.echo(f"{len(names)} seeds ({', '.join(names)}): mean {mean:.4f}, standard deviation {spread:.4f}")
    if len(opened) > 1:
        typer.echo("difference: from the first run, d_low to d_high its 95 % interval on paired clips, better its share above 0.")


@command(submission_app, "check", "melfold submission check submission.csv --data data/fat2019")
def submission_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Any CSV.")],
    data: DataOpt,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Would the competition take this file?"""
    from melfold.combine.check import check_submission
    from melfold.data.competition import load_competition

    refuse_set(set_)
    probs = check_submission(file, load_competition(data))
    typer.echo(f"{file}: {len(probs)} clips, {len(probs.columns)} labels, in order.")


@command(submission_app, "score", "melfold submission score submission.csv --truth test_post_competition.csv")
def submission_score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A submission, rows in any order.")],
    truth: Annotated[Path, typer.Option("--truth", help="fname,labels,usage as published after the competition.")],
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Score a file as the leaderboard would, Public and Private apart. For scoring only: never choose by it."""
    from melfold.combine.check import score_submission

    refuse_set(set_)
    scores = score_submission(file, truth)
    print_table(scores, "usage")
    for half in {"Public", "Private"} - set(scores.index):
        typer.echo(f"The {half} half is not covered by this file or this truth.")


@command(app, "run", "melfold run data/fat2019 --recipe open")
def run(
    data: DataArg,
    recipe: RecipeOpt = "open",
    run: RunOpt = None,
    device: DevicesOpt = "auto",
    jobs: JobsOpt = -1,
    engine: EngineOpt = "joblib",
    scheduler: SchedulerOpt = "",
    dry: Annotated[
        bool, typer.Option("--dry-run", help="All of it with a few clips and steps: does it run, and how fast?")
    ] = False,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """The whole road, from a download to a checked submission.csv, skipping what is done."""
    from melfold import stages
    from melfold.compute import Compute
    from melfold.dry_run import dry_run

    resolved, place = _recipe(recipe, set_), Home.find(home)
    name = _run_name(run, recipe, resolved)
    compute = Compute(tuple(device.split(",")), jobs, engine, scheduler, bar())
    if dry:
        tried = dry_run(data, place, resolved, compute)
        hours = tried.steps * tried.seconds_per_step * resolved.train.batch_size / tried.batch_size / 3600
        typer.echo(f"Every stage runs: {tried.submission} is no result.")
        typer.echo(f"A fold will be {tried.steps:,} steps of {resolved.train.batch_size}: about {hours:,.1f} h on this device.")
        return
    with compute.connected(place.root):
        result, scores, path = stages.run(data.resolve(), place, resolved, name, compute)
    _print_oof(scores)
    typer.echo(f"{path}  (track: {result.run.info.track})")


@command(app, "demo", "melfold demo")
def demo(home: HomeOpt = None, set_: SetOpt = None, device: DeviceOpt = "auto") -> None:
    """The whole job on a synthetic competition, in a home of its own (build/demo)."""
    from melfold import stages
    from melfold.combine.check import score_submission
    from melfold.compute import Compute
    from melfold.data.demo import write_demo

    started = time.monotonic()
    place = Home((home or Path("build/demo")).resolve())
    resolved = _recipe("demo", set_)
    name = _run_name(None, "demo", resolved)
    data = write_demo(place.data / "demo")
    result, scores, path = stages.run(data, place, resolved, name, Compute((device,), progress=bar()))
    test = score_submission(path, data / "test_post_competition.csv")
    constant = scores.constant_lwlrap
    typer.echo(f"\nThe demo took {time.monotonic() - started:.0f} s. lwlrap, beside a constant prediction's {constant:.3f}:")
    typer.echo(f"  out-of-fold   {scores.oof_lwlrap:.3f}  ({scores.low:.3f} to {scores.high:.3f}, {scores.clips} clips)")
    for half, row in test.iterrows():
        typer.echo(f"  test {half:<8} {row['lwlrap']:.3f}  ({row['low']:.3f} to {row['high']:.3f}, {row['clips']:.0f} clips)")
    typer.echo("Files:")
    for what, where in (
        ("synthetic competition", data),
        ("log-mels", place.cache),
        ("fold table", place.folds),
        ("run: weights, logs, OOF", result.folder),
        ("submission", path),
    ):
        typer.echo(f"  {what:<24} {where}")
    at = f"--home {place.root}"
    typer.echo(f"Next: melfold oof {result.label} {at}")
    typer.echo(f"      melfold show {data} {next(p.name for p in sorted((data / 'test').iterdir()))} --recipe demo -o clips.png")
    typer.echo("      melfold run PATH/TO/THE/DOWNLOAD --recipe open")


@command(recipe_app, "list", "melfold recipe list")
def recipe_list(home: HomeOpt = None, set_: SetOpt = None) -> None:
    """The recipes that come with the kit."""
    from melfold.recipes import load_recipe, recipe_names

    refuse_set(set_)
    for name in recipe_names():
        resolved = load_recipe(name)
        typer.echo(f"{name:<10} {'' if name == 'base' else f'[{resolved.track}] '}{resolved.about}")


@command(recipe_app, "show", "melfold recipe show open --set train.epochs=10")
def recipe_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe's name, or the path of a .toml file.")],
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """What a recipe resolves to: every value, and the reason where one is given."""
    from melfold.recipes import explain_recipe, load_recipe

    resolved = load_recipe(name, set_ or [])
    reasons = {key: reason for key, (_, reason) in explain_recipe(name).items()}
    changed = {item.partition("=")[0].strip() for item in set_ or []}
    typer.echo(f"# {resolved.name}: {resolved.about}\n# track {resolved.track}, fingerprint {resolved.fingerprint()}")
    for section, value in resolved.model_dump(mode="json", exclude={"name", "about"}).items():
        if not isinstance(value, dict):
            _show_value(section, value, reasons.get(section, ""))
            continue
        typer.echo(f"\n[{section}]")
        for key, inner in value.items():
            full = f"{section}.{key}"
            _show_value(key, inner, "set on the command line" if full in changed else reasons.get(full, ""))


def _show_value(key: str, value: object, reason: str) -> None:
    line = f"{key} = {value!r}"
    typer.echo(f"{line:<40} # {reason}" if reason else line)


def _open_runs(names: list[str], home: Path | None, sets: list[str] | None) -> tuple[Home, list[Prediction]]:
    """What commands that read finished runs begin with."""
    from melfold.learn.predictions import open_prediction

    refuse_set(sets)
    place = Home.find(home)
    return place, [open_prediction(place, name) for name in names]


def _warn_incomplete(clips: int, all_clips: int) -> None:
    if clips < all_clips:
        typer.secho(f"INCOMPLETE: this covers {clips} of {all_clips} clips.", fg="yellow")


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise MelfoldError("--weights needs numbers", repr(text), "For example --weights 3,1") from None


def _recipe(name: str, sets: list[str] | None) -> Recipe:
    from melfold.recipes import load_recipe

    return load_recipe(name, sets or [])


def _run_name(given: str | None, recipe: str, resolved: Recipe) -> str:
    from melfold.learn.start import default_run_name
    from melfold.recipes import load_recipe

    return given or default_run_name(resolved, load_recipe(recipe))


def _print_oof(scores: OofScores) -> None:
    missing = scores.missing
    if missing:
        typer.secho(
            f"INCOMPLETE: folds {', '.join(map(str, missing))} are missing; this covers {scores.clips} clips only.", fg="yellow"
        )
    folds = "  ".join(f"{fold}: {value:.4f}" for fold, value in scores.fold_lwlrap.items())
    typer.echo(f"oof_lwlrap        {scores.oof_lwlrap:.4f}  (95 % {scores.low:.3f} to {scores.high:.3f}, {scores.clips} clips)")
    typer.echo(f"mean_fold_lwlrap  {scores.mean_fold_lwlrap:.4f}  ({folds})")
    typer.echo(f"constant          {scores.constant_lwlrap:.4f}")


register(app)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()

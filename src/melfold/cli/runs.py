"""Commands about the runs of a home: list, remove, rename."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melfold.artefacts import Artefact
from melfold.cli.options import HomeOpt, JsonOpt, RunArg, YesOpt
from melfold.cli.output import age, command, guarded, note, print_json, print_table, size
from melfold.errors import MelfoldError
from melfold.files import Home, is_locked, locked, read_json

if TYPE_CHECKING:
    from melfold.learn.runs import Run

app = typer.Typer()
runs_app = typer.Typer()
app.add_typer(runs_app, name="runs")


@runs_app.callback(
    invoke_without_command=True, help="List runs; `runs rm` and `runs mv` remove and rename them.\n\nExample: melfold runs"
)
@guarded
def runs(context: typer.Context, json: JsonOpt = False, home: HomeOpt = None) -> None:
    """List the runs of a home: state, folds, OOF score, size on disk, time of the last change."""
    from melfold.learn.runs import list_runs

    if context.invoked_subcommand:
        if home or json:
            raise MelfoldError("options come last", f"melfold runs {context.invoked_subcommand} … --home HOME")
        return
    place = Home.find(home)
    found = [_describe(place.runs / name, name, run) for name, run in list_runs(place)]
    if json:
        print_json(found)
        return
    if not found:
        typer.echo(f"There are no runs in {place.runs}. Make one with `melfold run`, or give the right --home.")
    print_table([_as_row(item) for item in found], left=["state", "track", "predictions"])
    for item in found:
        if item["problem"]:
            note(f"run {item['run']} cannot be opened: {item['problem']}")


def _describe(folder: Path, name: str, run: Run | MelfoldError) -> dict[str, Any]:
    from melfold.combine.oof import score
    from melfold.learn.predictions import list_predictions

    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    scores: dict[str, Any] = dict.fromkeys(("oof_lwlrap", "low", "high"))
    found = {"run": name, "state": "unreadable", "track": None, "folds_done": [], "n_folds": None, **scores, "predictions": []}
    found |= {"bytes": sum(s.st_size for s in files), "changed": max((s.st_mtime for s in files), default=0.0), "problem": ""}
    if isinstance(run, MelfoldError):
        return found | {"problem": str(run)}
    done = run.done_folds()
    found |= {"track": run.info.track, "folds_done": done, "n_folds": run.recipe.folds.n_folds}
    if any(is_locked(lock) for lock in folder.glob("*/.lock")):
        found["state"] = "training"
    elif not run.missing_folds() or done == ["full"]:
        found["state"] = "done"
    else:
        found["state"] = "unfinished" if run.has_data() else "empty"
    try:
        predictions = list_predictions(run)
        if any(fold != "full" for fold in done):
            scored = score(predictions[0])
            found |= {key: getattr(scored, key) for key in scores}
        found["predictions"] = [prediction.label for prediction in predictions if prediction.name]
    except MelfoldError as error:
        found["problem"] = str(error)
    return found


def _as_row(item: dict[str, Any]) -> dict[str, Any]:
    numbered = [fold for fold in item["folds_done"] if fold != "full"]
    folds = f"{len(numbered)}/{item['n_folds']}" if item["n_folds"] else "-"
    return {
        **{key: item[key] for key in ("run", "state", "track")},
        "folds": folds + (" + full" if "full" in item["folds_done"] else ""),
        **{key: item[key] for key in ("oof_lwlrap", "low", "high")},
        "size": size(item["bytes"]),
        "changed": f"{age(time.time() - item['changed'])} ago",
        "predictions": ", ".join(item["predictions"]) or "-",
    }


@command(runs_app, "rm", "melfold runs rm old-run --yes")
def runs_rm(run: RunArg, yes: YesOpt = False, home: HomeOpt = None) -> None:
    """Delete a run. One with trained folds, or that something else uses, is deleted only with --yes."""
    place = Home.find(home)
    folder = _find(place, run)
    with _not_in_training(folder):
        trained = sorted(path.parent.name for path in folder.glob("*/result.json"))
        losses = ([f"trained: {', '.join(trained)}"] if trained else []) + _users(place, run)
        if losses and not yes:
            raise MelfoldError(f"run {run} has something to lose", "; ".join(losses), "To delete it all the same, add --yes")
        freed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        doomed = folder.with_name(f".{run}.{os.getpid()}.tmp")  # a run disappears at once, even if deleting is stopped halfway
        folder.rename(doomed)
        shutil.rmtree(doomed)
    typer.echo(f"Deleted {folder}: {size(freed)}.")


@command(runs_app, "mv", "melfold runs mv audioset-3f2a1c best")
def runs_mv(
    run: RunArg,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new name.")],
    yes: YesOpt = False,
    home: HomeOpt = None,
) -> None:
    """Rename a run. One that something else uses under its old name is renamed only with --yes."""
    from melfold.learn.start import NAME

    place = Home.find(home)
    folder, target = _find(place, run), place.runs / new
    if not NAME.fullmatch(new):
        raise MelfoldError("a run's name is letters, digits, dots, dashes", repr(new), "Choose another name")
    if target.exists():
        raise MelfoldError(f"run {new} already exists", str(target), "Choose another name")
    with _not_in_training(folder):
        if (users := _users(place, run)) and not yes:
            raise MelfoldError(f"run {run} is used by its name", "; ".join(users), "To rename it all the same, add --yes")
        folder.rename(target)
    typer.echo(target)


def _find(home: Home, run: str) -> Path:
    folder = home.runs / run
    if "/" in run or not (folder / "run.json").exists():
        known = ", ".join(sorted(path.parent.name for path in home.runs.glob("*/run.json"))) or "none"
        raise MelfoldError("no such run", f"{run} in {home.runs}", f"Known: {known}")
    return folder


@contextmanager
def _not_in_training(folder: Path) -> Iterator[None]:
    """Hold every fold of a run, so that none can be trained meanwhile."""

    def busy() -> None:
        raise MelfoldError(f"run {folder.name} is in training", str(folder), "Wait for it, or stop it")

    with ExitStack() as held:
        for lock in sorted(folder.glob("*/.lock")):
            held.enter_context(locked(lock, busy))
        yield


def _users(home: Home, name: str) -> list[str]:
    """What refers to a run by its name."""
    from melfold.recipes import parse_recipe

    users = []
    for path in sorted(home.runs.glob("*/recipe.json")):
        recipe = parse_recipe(read_json(path), str(path))
        if name in recipe.noisy.teachers:
            users.append(f"a teacher of run {path.parent.name}")
        if recipe.model.weights == f"run:{name}":
            users.append(f"where run {path.parent.name} starts from")
    for path in sorted(home.submissions.glob("*/manifest.json")):
        if any(part["name"] == name for part in Artefact(path).read()["runs"]):
            users.append(f"part of submission {path.parent.name}")
    return users

"""Rebuild a submission from its manifest: what is missing here, and the commands that make it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melfold.artefacts import differences
from melfold.combine.submission import build_submission, submission_artefact
from melfold.config import Recipe
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.files import Home, write_text
from melfold.learn.predictions import open_prediction
from melfold.learn.runs import open_run
from melfold.recipe_text import recipe_toml, toml_value
from melfold.recipes import parse_recipe


@dataclass(frozen=True)
class Plan:
    """What stands between a manifest and its `submission.csv`.

    `commands`: to run first, in order. `notes`: why the result may differ from the original.
    """

    commands: list[str]
    notes: list[str]


def plan_rebuild(home: Home, id: str, data: Path) -> Plan:
    """Find out what a submission needs and this home lacks. The recipes of missing runs are written to `build/rebuild/<id>`.

    Raises:
        MelfoldError: no such submission.
    """
    artefact = submission_artefact(home, id)
    if not artefact.stamp.exists():
        raise MelfoldError("no such submission", str(artefact.stamp), "Get its manifest.json, for example with git")
    plan = Plan([], [])
    for member in artefact.read()["runs"]:
        _plan_member(home, member, home.root / "build" / "rebuild" / id, data, plan)
    return Plan(list(dict.fromkeys(plan.commands)), list(dict.fromkeys(plan.notes)))


def _plan_member(home: Home, member: dict[str, Any], folder: Path, data: Path, plan: Plan) -> None:
    """Add to a plan what a part of a submission needs."""
    name, commands, notes = member["name"], plan.commands, plan.notes
    recipe = parse_recipe(member["recipe"], f"the manifest's recipe of {name}")
    if not (home.runs / name / "run.json").exists():
        path = folder / f"{name}.toml"
        write_text(path, recipe_toml(recipe, {}))
        commands.append(f"melfold train {data} --recipe {path} --run {name}")
        notes.append(f"run {name} has to be trained again: only the same machine and versions give the same bytes")
        commands.append(_predict_command(member, recipe, recipe, data))
        return
    run = open_run(home, name)
    found = run.weights_sha256(run.used_folds())
    for fold in member["weights_sha256"]:
        if fold not in found:
            commands.append(f"melfold train {data} --recipe {name} --run {name} --folds {fold}")
    if changed := [fold for fold, sha in member["weights_sha256"].items() if found.get(fold, sha) != sha]:
        notes.append(f"run {name} has other weights here than in the manifest: fold {', '.join(changed)}")
    try:
        open_prediction(home, label_of(member)).read_test()
    except MelfoldError:
        commands.append(_predict_command(member, run.recipe, recipe, data))


def _predict_command(member: dict[str, Any], own: Recipe, wanted: Recipe, data: Path) -> str:
    command = f"melfold predict {member['name']} --data {data}"
    if not member["prediction"]:
        return command
    before, after = own.predict.model_dump(mode="json"), wanted.predict.model_dump(mode="json")
    keys = {line.split(":")[0] for line in differences(before, after)}
    sets = "".join(f" --set predict.{key}='{toml_value(after[key])}'" for key in sorted(keys))
    return f"{command}{sets} --name {member['prediction']}"


def label_of(member: dict[str, Any]) -> str:
    """`RUN` or `RUN@NAME` of a row of a manifest's `runs`."""
    return f"{member['name']}@{member['prediction']}" if member["prediction"] else member["name"]


def rebuild(home: Home, id: str, competition: Competition) -> Path:
    """Make `submission.csv` again from its manifest.

    Raises:
        MelfoldError: something is missing (see `plan_rebuild`), or it would not be the same submission.
    """
    content = submission_artefact(home, id).read()
    members = [open_prediction(home, label_of(member)) for member in content["runs"]]
    weights = [member["share"] for member in content["runs"]]
    return build_submission(home, members, competition, id=id, mean=content["mean"], weights=weights)

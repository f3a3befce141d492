"""How a run was trained: learning curves, time, speed, settings that differ from the base recipe, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from melfold.config import Recipe
from melfold.errors import MelfoldError
from melfold.files import read_json_lines
from melfold.learn.runs import FULL, Run
from melfold.recipes import explain_recipe, load_recipe, recipe_names
from melfold.report.charts import Chart, Line
from melfold.report.pages import number, span

Rows = list[dict[str, Any]]

CURVES = (("lwlrap", "held-out lwlrap"), ("loss", "training loss"), ("lr", "learning rate"))


def read_log(run: Run, fold: str) -> Rows:
    """The rows of a fold's log; a last line that a killed process left unfinished is dropped."""
    return [row for row in read_json_lines(run.fold(fold).log) if "epoch" in row]


def learning_curves(runs: Sequence[Run]) -> list[tuple[str, list[Markup]]]:
    """For each curve its name and a chart for each run, all with the same y axis; a line for each fold."""
    logs = [[(fold, read_log(run, fold)) for fold in run.done_folds()] for run in runs]
    found = []
    for key, name in CURVES:
        sets = [_lines(folds, key) for folds in logs]
        values = [y for lines in sets for line in lines for y in line.y]
        if not values:
            continue
        room = (max(values) - min(values)) * 0.06 or 0.01
        low, high = min(values) - room, max(values) + room
        y_range = (max(low, 0.0), high)
        charts = [
            Chart(f"{name} of {run.name}", "epoch", name, lines, y_range=y_range, about="A line for each fold").svg()
            for run, lines in zip(runs, sets, strict=True)
        ]
        found.append((name, charts))
    return found


def _lines(folds: list[tuple[str, Rows]], key: str) -> list[Line]:
    lines = []
    for number_, (fold, rows) in enumerate(folds):
        points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
        dots = key == "lwlrap"
        names = [f"fold {fold}, epoch {x:g}: {y:.5f}" for x, y in points] if dots else ()
        lines.append(Line(f"fold {fold}", [p[0] for p in points], [p[1] for p in points], number_ % 8, dots=dots, names=names))
    return lines


@dataclass(frozen=True)
class Cost:
    """What a run's trained folds took. `seconds` are of one device, summed over the folds."""

    folds: int
    seconds: float
    crops: int
    devices: tuple[str, ...]
    versions: tuple[str, ...]

    @property
    def crops_per_second(self) -> float:
        return self.crops / self.seconds if self.seconds else float("nan")


def cost_of(run: Run) -> Cost:
    """The time and crops of a run's trained folds.

    Raises:
        MelfoldError: a result that cannot be read.
    """
    results = [run.fold(fold).artefact.read() for fold in run.done_folds()]
    seconds = sum(float(result.get("seconds", 0)) for result in results)
    crops = sum(int(result.get("steps", 0)) for result in results) * run.recipe.train.batch_size
    devices = tuple(dict.fromkeys(str(result["device"]) for result in results if result.get("device")))
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items()) for result in results)
    return Cost(len(results), seconds, crops, devices, tuple(text for text in versions if text))


def facts(run: Run) -> list[tuple[str, str]]:
    """The short facts under a run's score."""
    cost = cost_of(run)
    folds = [fold for fold in run.done_folds() if fold != FULL]
    return [
        ("Model", run.recipe.model.name),
        ("Track", run.info.track),
        ("Folds trained", f"{len(folds)} of {run.recipe.folds.n_folds}"),
        ("Training time", span(cost.seconds) if cost.seconds else "–"),
        ("Speed", f"{number(cost.crops_per_second)} crops/s" if cost.seconds else "–"),
    ]


def provenance(run: Run) -> list[tuple[str, str]]:
    """Where a run's numbers come from."""
    info, cost = run.info, cost_of(run)
    rows = [
        ("Competition", info.competition),
        ("Training data", info.data),
        ("Track", info.track),
        ("Licence of the first weights", info.licence or "none needed"),
        ("The first weights were trained on", ", ".join(info.seen) or "none needed"),
        ("Teachers", ", ".join(info.teachers)),
        ("Fold table", f"{info.fold_table}, {info.folds_sha256[:12]}"),
        ("Recipe", f"{run.recipe.name}, {run.recipe.fingerprint()}"),
        ("Commit", info.commit[:12] + ("+ (with changes)" if info.commit.endswith("+") else "")),
        ("Device", "; ".join(cost.devices)),
        ("Versions", "; ".join(cost.versions)),
        ("Time for each fold", span(cost.seconds / cost.folds) if cost.folds else ""),
    ]
    return [(name, value) for name, value in rows if value]


def recipe_rows(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """Every setting in which a recipe differs from `base`, or two recipes from each other: `key base here why differs`."""
    base = _flat(load_recipe("base"))
    tables = [_flat(recipe) for recipe in recipes]
    reasons = [_reasons(recipe) for recipe in recipes]
    rows = []
    for key in dict.fromkeys(key for table in (base, *tables) for key in table):
        values = [table.get(key, "") for table in tables]
        if any(value != base.get(key, "") for value in values):
            why = next((r[key][1] for r, v in zip(reasons, values, strict=True) if key in r and _shown(r[key][0]) == v), "")
            rows.append({"key": key, "base": base.get(key, ""), "here": values, "why": why, "differs": len(set(values)) > 1})
    return rows


def _reasons(recipe: Recipe) -> dict[str, tuple[Any, str]]:
    """`section.key` -> value and reason, as the shipped recipe of this name gives them."""
    if recipe.name not in recipe_names():
        return {}
    try:
        return explain_recipe(recipe.name)
    except MelfoldError:
        return {}


def _flat(recipe: Recipe) -> dict[str, str]:
    flat: dict[str, str] = {}
    for section, value in recipe.model_dump(mode="json", exclude={"name", "about"}).items():
        if section == "phases":
            value = {f"{number}.{key}": inner for number, phase in enumerate(value) for key, inner in phase.items()}
        if not isinstance(value, dict):
            flat[section] = _shown(value)
            continue
        for key, inner in value.items():
            own = inner
            if section == "data":
                own = f"{len(inner)} clip{'' if len(inner) == 1 else 's'}"
            flat[f"{section}.{key}"] = _shown(own)
    return flat


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_shown(inner)}" for key, inner in value.items())
    return "none" if value is None else str(value)

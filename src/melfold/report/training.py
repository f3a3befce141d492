"""How a run was trained: learning curves, time, speed, settings that differ from the base recipe, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from melfold.config import DataConfig, Recipe
from melfold.files import read_json_lines
from melfold.learn.runs import FULL, Run
from melfold.recipe_text import compare_recipes, toml_value
from melfold.recipes import explain_recipe, load_recipe, recipe_names
from melfold.report.charts import new_chart, svg
from melfold.report.pages import number, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = (("lwlrap", "held-out lwlrap"), ("loss", "training loss"), ("lr", "learning rate"))


def learning_curves(runs: Sequence[Run]) -> list[tuple[str, list[Markup]]]:
    """For each curve its name and a chart for each run, all with the same y axis; a line for each fold."""
    logs = [{fold: read_json_lines(run.fold(fold).log) for fold in run.done_folds()} for run in runs]
    found = []
    for key, name in CURVES:
        charts = [_draw_curve(key, name, list(log.values())) for log in logs]
        drawn = [axes for axes in charts if axes.lines]
        for axes in drawn:
            axes.set_ylim(min(each.get_ylim()[0] for each in drawn), max(each.get_ylim()[1] for each in drawn))
        abouts = [f"{name} of {run.name}, a line for each fold" for run in runs]
        found.append((name, [svg(axes, about) if axes.lines else Markup() for axes, about in zip(charts, abouts, strict=True)]))
    return found


def _draw_curve(key: str, name: str, logs: Sequence[list[dict[str, Any]]]) -> Axes:
    axes = new_chart("epoch", name)
    for style, rows in enumerate(logs):
        points = [(row["epoch"], row[key]) for row in rows if "epoch" in row and row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=f"C{style % 8}", marker="." if key == "lwlrap" else "", linewidth=1.3)
    return axes


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
    devices = dict.fromkeys(str(result.get("device", "")) for result in results)
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items()) for result in results)
    return Cost(len(results), seconds, crops, tuple(filter(None, devices)), tuple(filter(None, versions)))


def facts(run: Run) -> dict[str, str]:
    """The short facts under a run's score."""
    cost = cost_of(run)
    folds = [fold for fold in run.done_folds() if fold != FULL]
    return {
        "Model": run.recipe.model.name,
        "Track": run.info.track,
        "Folds trained": f"{len(folds)} of {run.recipe.folds.n_folds}",
        "Training time": span(cost.seconds or None),
        "Speed": f"{number(cost.crops_per_second)} crops/s",
    }


def provenance(run: Run) -> dict[str, str]:
    """Where a run's numbers come from; empty where nothing is to be said."""
    info, cost, data = run.info, cost_of(run), run.recipe.data
    return {
        "Competition": info.competition,
        "Training data": info.data,
        "Clips left out": str(len(data.exclude) or ""),
        "Clips with corrected labels": str(len(data.corrections) or ""),
        "Licence of the first weights": info.licence or "none needed",
        "The first weights were trained on": ", ".join(info.seen) or "none needed",
        "Teachers": ", ".join(info.teachers),
        "Fold table": f"{info.fold_table}, {info.folds_sha256[:12]}",
        "Recipe": f"{run.recipe.name}, {run.recipe.fingerprint()}",
        "Commit": info.commit[:12] + ("+ (with changes)" if info.commit.endswith("+") else ""),
        "Device": "; ".join(cost.devices),
        "Versions": "; ".join(cost.versions),
        "Time for each fold": span(cost.seconds / cost.folds) if cost.folds else "",
    }


def recipe_rows(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """Every setting in which a recipe differs from `base`: `key base here why differs`; `here` is its value in each recipe.

    Clips that are left out or corrected are not listed.
    """
    base = load_recipe("base")
    bare = [recipe.model_copy(update={"data": DataConfig()}) for recipe in recipes]
    changes = [{key: (before, after) for key, before, after in compare_recipes(base, recipe)} for recipe in bare]
    reasons = [explain_recipe(recipe.name) if recipe.name in recipe_names() else {} for recipe in recipes]
    rows = []
    for key, (before, _) in {key: both for own in changes for key, both in own.items()}.items():
        here = [own.get(key, (before, before))[1] for own in changes]
        why = (own[key][1] for own, value in zip(reasons, here, strict=True) if key in own and toml_value(own[key][0]) == value)
        rows.append({"key": key, "base": before, "here": here, "why": next(why, ""), "differs": len(set(here)) > 1})
    return rows

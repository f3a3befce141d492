"""Options and arguments that commands share, and what they resolve to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melfold.cli.output import bar
from melfold.errors import MelfoldError
from melfold.files import Home

if TYPE_CHECKING:
    from melfold.compute import Compute
    from melfold.config import Recipe

DataArg = Annotated[
    Path, typer.Argument(metavar="DATA", help="The folder of the competition's download, in Kaggle's or Zenodo's layout.")
]
DataOpt = Annotated[Path, typer.Option("--data", help="The folder of the competition's download.")]
RunDataOpt = Annotated[
    Path | None,
    typer.Option("--data", help="The folder of the competition's download (default: the one the run was trained on)."),
]
RunArg = Annotated[str, typer.Argument(metavar="RUN", help="A run's name in runs/.")]
PredictionArg = Annotated[
    str, typer.Argument(metavar="RUN", help="A run, or RUN@NAME for another prediction of it (see `melfold predict`).")
]
IdArg = Annotated[str, typer.Argument(metavar="ID", help="A submission's name in submissions/.")]
HomeOpt = Annotated[
    Path | None,
    typer.Option("--home", help="The folder of caches, folds, runs and submissions (default: MELFOLD_HOME, else here)."),
]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the recipe; repeatable.")
]
DEFAULT_RECIPE = "audioset"
"""The strongest that fits this kit, on the open track; `scratch` is legal under the rules."""
RecipeOpt = Annotated[
    str,
    typer.Option(
        "--recipe", help="The name of a shipped recipe, a .toml file, or the name of a run (a shipped recipe's name wins)."
    ),
]
RunOpt = Annotated[
    str | None,
    typer.Option("--run", help="The run's name (default: the recipe's, with a piece of its hash if --set changed it)."),
]
FoldsOpt = Annotated[str, typer.Option("--folds", help="0,1 or all or full (one model trained on every curated clip).")]
DeviceOpt = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DevicesOpt = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or cuda:N; several, as in cuda:0,cuda:1, work at the same time.")
]
EngineOpt = Annotated[str, typer.Option("--engine", help="joblib: this machine. dask: the workers of --scheduler.")]
SchedulerOpt = Annotated[str, typer.Option("--scheduler", metavar="ADDRESS", help="The address of the Dask scheduler.")]
JobsOpt = Annotated[int, typer.Option("--jobs", help="Worker processes for log-mels; -1 is one per core.")]
TrackerOpt = Annotated[
    str, typer.Option("--tracker", metavar="NAME", help="Mirror the training log to trackio, wandb or tensorboard.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
YesOpt = Annotated[bool, typer.Option("--yes", help="Do it.")]


def resolve_recipe(name: str, sets: list[str] | None, home: Home) -> Recipe:
    """The recipe that `--recipe` and `--set` ask for."""
    from melfold.recipes import load_recipe

    return load_recipe(name, sets or [], home)


def resolve_run_name(given: str | None, recipe_name: str, recipe: Recipe, home: Home) -> str:
    """The run that `--run` names, or one named after the recipe."""
    from melfold.learn.start import default_run_name
    from melfold.recipes import load_recipe

    return given or default_run_name(recipe, load_recipe(recipe_name, home=home))


def resolve_compute(device: str = "auto", jobs: int = -1, engine: str = "joblib", scheduler: str = "") -> Compute:
    """Where work runs, with a progress bar.

    Raises:
        MelfoldError: a word that is no device (without loading torch), or a GPU that this machine does not have.
    """
    from melfold.compute import Compute

    devices = tuple(device.split(","))
    for name in devices:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
            raise MelfoldError("unknown device", repr(name), "Use auto, cpu, cuda or cuda:N")
        if engine == "joblib" and name.startswith("cuda"):
            from melfold.learn.devices import pick_device

            pick_device(name)  # now, not after an hour of log-mels
    return Compute(devices=devices, jobs=jobs, engine=engine, scheduler=scheduler, progress=bar())

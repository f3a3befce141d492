"""What a recipe needs: the dry run's forecast against the real time, and memory and operations of the shipped recipes."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from melfold import dry_run, stages
from melfold.compute import Compute
from melfold.data.competition import Competition, load_competition
from melfold.files import Home
from melfold.learn.devices import pick_device
from melfold.learn.train import train_fold
from melfold.recipes import load_recipe, recipe_names
from tests.bench.footprint import T4_BYTES, footprint, largest_batch
from tests.bench.harness import RESULTS, Result
from tests.bench.workspace import REAL, Workspace

FORECASTS = {
    "small": ("small", "train.crop_seconds=2.56", "train.batch_size=32", "train.epochs=1"),
    "atto": ("scratch", "model.name=convnext_atto", "model.kwargs={}", "train.crop_seconds=1.28", "train.epochs=2"),
    "demo": ("demo", "train.epochs=6", "train.batch_size=8", "train.validate_every=2"),
}
"""Recipe and changes: different bodies, batches and crops."""
_COMMON = ("train.clips=curated", "phases=[]", "train.warmup_epochs=0.1")


def forecast(work: Workspace) -> list[Result]:
    """Seconds of a fold's training as the dry run forecasts them, against those that it then takes, for three recipes."""
    competition = load_competition(REAL) if REAL.is_dir() and not work.quick else work.competition
    names = ["demo"] if work.quick else list(FORECASTS)
    return [_forecast(work, name, competition) for name in names]


def _forecast(work: Workspace, name: str, competition: Competition) -> Result:
    base, *sets = FORECASTS[name]
    recipe, home = load_recipe(base, [*sets, *_COMMON]), Home(work.folder / f"forecast_{name}")
    compute, device = Compute(), pick_device()
    before, dry_run._MEASURED_SECONDS = dry_run._MEASURED_SECONDS, work.pick(20, 1)
    try:
        told = dry_run.dry_run(competition.root, home, recipe, compute).forecast
    finally:
        dry_run._MEASURED_SECONDS = before
    run = stages.start(competition, home, recipe, "real", [0])
    cache = stages.cache(competition, home, recipe, compute)
    begin = time.perf_counter()
    train_fold(run, 0, cache, device)
    took = time.perf_counter() - begin
    off = abs(told.fold_seconds / took - 1)
    notes = {"steps": told.steps, "batch_size": told.batch_size, "crops_per_second": round(told.crops_per_second, 1)}
    return Result(
        "forecast", name, told.fold_seconds, took, "s", off, "off", 0.25, 0.1, higher=False, notes=notes | {"device": told.device}
    )


def recipes(work: Workspace) -> list[Result]:
    """What each shipped recipe takes on a GPU, on fake tensors: no GPU is needed. Leaves `results/recipes.md`."""
    names = ["demo"] if work.quick else [name for name in recipe_names() if name != "base"]
    rows, results = [], []
    for name in names:
        recipe = load_recipe(name)
        half = load_recipe(name, [f"train.batch_size={recipe.train.batch_size // 2}"])
        small, large = footprint(half), footprint(recipe)
        most = largest_batch(small, large)
        gib = large.needed / 2**30
        rows.append(
            f"| {name} | {recipe.model.name} | {large.parameters / 1e6:.1f} | {large.flops / 1e9:.1f} | {large.batch_size} "
            f"| {large.peak / 2**30:.1f} | {gib:.1f} | {'yes' if large.needed <= T4_BYTES else 'no'} | {most} |"
        )
        results.append(
            Result("recipes", name, gib, None, "GiB", gib, "GiB", T4_BYTES / 2**30, T4_BYTES / 2**30, higher=False,
                   notes={"largest_batch": most})
        )  # fmt: skip
    if not work.quick:
        write_table(RESULTS / "recipes.md", rows)
    return results


def write_table(path: Path, rows: list[str]) -> None:
    """The shipped recipes' table, with what it was made from."""
    path.write_text(
        "# The shipped recipes on a GPU\n\n"
        "Computed by `python -m tests.bench recipes` on fake tensors, without a GPU: one training step in fp16 with the\n"
        "recipe's crops, augmentation, optimizer and moving average. `tensors` is the most that tensors take at once; `card`\n"
        'adds a tenth for what the allocator loses and 1 GiB for CUDA and its libraries, and is an estimate. A "16 GB" T4 lets\n'
        f"a process use {T4_BYTES / 2**30:.1f} GiB. Where a batch does not fit, `train.micro_batch` computes it in parts.\n"
        f"torch {torch.__version__.split('+')[0]}.\n\n"
        "| recipe | model | M weights | GFLOP a crop | batch | tensors, GiB | card, GiB | fits 16 GB | largest batch |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |\n" + "\n".join(rows) + "\n"
    )

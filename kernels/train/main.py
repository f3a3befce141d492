"""Training inside a Kaggle kernel, a fold a GPU, saved in time; a second session goes on from the first one's output.

`melfold kernel build train` puts the package's source and the bundle (recipe, fold table, folds, session length) in front of this
file. The run's folder is the kernel's output; log-mels stay in /tmp.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from melfold.combine.oof import score
from melfold.compute import Compute
from melfold.data.cache import build_cache, stop_workers
from melfold.data.competition import load_competition
from melfold.errors import MelfoldError
from melfold.files import Home, sha256_file, write_json, write_text
from melfold.learn.launch import train_folds
from melfold.learn.predictions import own_prediction
from melfold.learn.runs import FULL, Run
from melfold.learn.start import start_run
from melfold.recipes import parse_recipe

STARTED = time.monotonic()

SAVE_SHARE = 0.04
"""Of the session, kept for saving and for handing the output over."""


def main(bundle: dict[str, Any], root: Path) -> None:
    """Args: bundle: as built. root: `/`, or where a rehearsal lays out `/kaggle` and `/tmp`."""
    logging.basicConfig(level=logging.INFO, format="melfold: %(message)s")
    inputs, working, scratch = root / "kaggle/input", root / "kaggle/working", root / "tmp/melfold"
    minutes = float(os.environ.get("MELFOLD_MINUTES", bundle["budget_minutes"]))
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    say(f"melfold {bundle['build_id'][:12]}: run {bundle['name']}, folds {bundle['folds']}, {devices}, {minutes:.0f} minutes")
    for facts in bundle["provenance"]:
        say(", ".join(f"{key} {value[:16]}" for key, value in facts.items()))
    recipe = parse_recipe(bundle["recipe"] | weights(bundle, inputs, scratch), bundle["name"])
    found = sorted(inputs.rglob("train_curated.csv"), key=lambda p: len(p.parts))
    if not found:
        raise MelfoldError("no competition is mounted", f"no train_curated.csv below {inputs}", "Add the competition's data")
    competition = load_competition(found[0].parent)
    fetch_earlier(inputs, working / "runs" / bundle["name"], bundle["name"])
    table = working / "folds" / bundle["folds_name"]
    write_text(table, bundle["folds_table"])
    splits = ["curated", "noisy"] if recipe.noisy.use else ["curated"]
    cache = build_cache(competition, recipe.logmel, Home(scratch), splits=splits, exclude=recipe.data.exclude)
    stop_workers()
    say("log-mels are made")
    run = start_run(Home(working), bundle["name"], recipe, competition, table)
    left = 60 * minutes * (1 - SAVE_SHARE) - (time.monotonic() - STARTED)
    train_folds(run, bundle["folds"], cache, Compute(tuple(devices)), seconds=left)
    done = [fold for fold in bundle["folds"] if run.fold(fold).done]
    if any(fold != FULL for fold in run.done_folds()):
        scores = score(own_prediction(run))
        say(f"OOF lwlrap {scores.oof_lwlrap:.4f} of {scores.clips} clips, folds missing: {scores.missing or 'none'}")
    state = {fold: "done" if fold in done else where(run, fold) for fold in bundle["folds"]}
    seconds = round(time.monotonic() - STARTED, 1)
    write_json(working / "melfold.json", {"build_id": bundle["build_id"], "seconds": seconds, "folds": state})
    say(f"{state}; {'all done' if len(done) == len(state) else 'build and push the next session to go on'}")


def where(run: Run, fold: str) -> str:
    """How far an unfinished fold is."""
    return "saved, to be gone on with" if run.fold(fold).checkpoint.exists() else "not begun"


def weights(bundle: dict[str, Any], inputs: Path, scratch: Path) -> dict[str, Any]:
    """The recipe's model section, its weights file at a place that does not change with the mount."""
    if not bundle["weights_sha256"]:
        return {}
    for path in sorted(inputs.rglob("*.safetensors")):
        if sha256_file(path) == bundle["weights_sha256"]:
            target = scratch / "weights.safetensors"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            return {"model": bundle["recipe"]["model"] | {"weights": f"file:{target}"}}
    raise MelfoldError("the weights to start from are missing or damaged", f"below {inputs}", "Push the dataset again")


def fetch_earlier(inputs: Path, target: Path, name: str) -> None:
    """Copy what an earlier session left of this run."""
    for facts in sorted(inputs.rglob("run.json")):
        if facts.parent.name == name and not target.exists():
            shutil.copytree(facts.parent, target)
            say(f"going on from {facts.parent.relative_to(inputs)}")


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:7.1f} s] {text}", flush=True)


def run(bundle: dict[str, Any], root: Path) -> None:
    """`main`, with an expected error told in its own lines."""
    try:
        main(bundle, root)
    except MelfoldError as error:
        say(f"melfold: {error}")
        sys.exit(2)


if __name__ == "__main__" and "BUNDLE" in globals():
    run(BUNDLE, ROOT)  # noqa: F821 - put in front by `melfold kernel build`

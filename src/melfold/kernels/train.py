"""Training in a kernel: one fold per GPU, saved before time is up. The next session continues from this one's output.

The run's folder is the kernel's output; log-mels stay in /tmp.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from melfold.combine.oof import score
from melfold.compute import Compute
from melfold.config import Recipe
from melfold.data.cache import build_cache, stop_workers
from melfold.data.competition import Competition, load_competition, with_bad_clips
from melfold.files import Home, write_json, write_text
from melfold.kernels import boot
from melfold.learn.launch import train_folds
from melfold.learn.predictions import own_prediction
from melfold.learn.runs import FULL, Run
from melfold.learn.start import start_run
from melfold.recipes import parse_recipe

SAVE_SHARE = 0.04
"""Of the session, kept for saving the run and handing it over."""


def read_recipe(session: boot.Session) -> Recipe:
    """The bundle's recipe. The weights it starts from are copied to a path that does not change with the mount."""
    settings, sha256 = session.bundle["recipe"], session.bundle["weights_sha256"]
    if sha256:
        target = session.scratch / "weights.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(session.weights({sha256})[sha256], target)
        settings = settings | {"model": settings["model"] | {"weights": f"file:{target}"}}
    return parse_recipe(settings, session.bundle["name"])


def fetch_earlier(session: boot.Session) -> None:
    """Copy the run's folder from the output of an earlier session, if one is mounted."""
    name = session.bundle["name"]
    for path in session.mounted("run.json"):
        if path.parent.name == name:
            session.say(f"continuing from {path.parent.relative_to(session.inputs)}")
            shutil.copytree(path.parent, session.working / "runs" / name)
            return


def make_log_mels(session: boot.Session, competition: Competition, recipe: Recipe) -> Path:
    """Cache the clips that the recipe trains on. Returns: the cache's folder."""
    splits = ["curated", "noisy"] if recipe.uses_noisy else ["curated"]
    cache = build_cache(competition, recipe.logmel, Home(session.scratch), splits=splits, exclude=recipe.data.exclude)
    stop_workers()
    session.say("log-mels are made")
    return cache


def state_of(run: Run, fold: str) -> str:
    """How far a fold is, in words."""
    if run.fold(fold).done:
        return "done"
    return "saved, not finished" if run.fold(fold).checkpoint.exists() else boot.NOT_STARTED


def train(session: boot.Session) -> None:
    """Train the bundle's folds until they are done or the session's time is nearly up."""
    bundle = session.bundle
    minutes = float(os.environ.get("MELFOLD_MINUTES", bundle["budget_minutes"]))
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    session.introduce(f"run {bundle['name']}, folds {bundle['folds']}, {devices}, {minutes:.0f} minutes")
    competition = load_competition(session.competition_folder("train_curated.csv"))
    recipe = with_bad_clips(read_recipe(session), competition)
    fetch_earlier(session)
    table = session.working / "folds" / bundle["folds_name"]
    write_text(table, bundle["folds_table"])
    cache = make_log_mels(session, competition, recipe)
    run = start_run(Home(session.working), bundle["name"], recipe, competition, table)
    left = 60 * minutes * (1 - SAVE_SHARE) - session.elapsed()
    train_folds(run, bundle["folds"], cache, Compute(tuple(devices)), seconds=left)
    if any(fold != FULL for fold in run.done_folds()):
        scores = score(own_prediction(run))
        session.say(f"OOF lwlrap {scores.oof_lwlrap:.5f} of {scores.clips} clips, folds missing: {scores.missing or 'none'}")
    states = {fold: state_of(run, fold) for fold in bundle["folds"]}
    record = {"build_id": bundle["build_id"], "seconds": round(session.elapsed(), 1), "folds": states}
    write_json(session.working / "melfold.json", record)
    done = all(state == "done" for state in states.values())
    session.say(f"{states}; {'all done' if done else 'build and push the next session to continue'}")


def main(bundle: dict[str, Any], root: Path, started: float) -> None:
    """Run `train` as a kernel. Arguments as in `boot.Session`."""
    boot.start(train, bundle, root, started)

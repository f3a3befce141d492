"""Training in a kernel: one fold per GPU, saved before time is up. The next session continues from this one's output.

The run's folder is the kernel's output; log-mels stay in /tmp.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import torch

from melfold.combine.oof import score
from melfold.compute import Compute
from melfold.config import Recipe
from melfold.data.cache import build_cache, stop_workers
from melfold.data.competition import Split, load_competition, with_bad_clips
from melfold.errors import MelfoldError
from melfold.files import Home, read_json, write_text
from melfold.kernels import boot
from melfold.learn.fetch import share_weights
from melfold.learn.launch import train_folds
from melfold.learn.predictions import own_prediction
from melfold.learn.runs import FULL
from melfold.learn.shorten import shorten
from melfold.learn.start import start_run
from melfold.recipes import parse_recipe

REHEARSAL_MINUTES = 60

SAVE_SHARE = 0.04
"""Of the session, kept for saving the run and handing it over."""


def read_recipe(session: boot.Session) -> Recipe:
    """The bundle's recipe. The file of weights it starts from is copied to a path that does not change with the mount.

    In a rehearsal, weights that are not here are left out.
    """
    bundle, settings = session.bundle, session.bundle["recipe"]
    weights, sha256, target = settings["model"]["weights"], bundle["weights_sha256"], session.scratch / "weights.safetensors"
    if session.rehearsal and not sha256:
        settings = settings | {"model": settings["model"] | {"weights": "none", "normalise": "scalar"}}
    elif weights.startswith("file:"):
        found = [session.weights({sha256})[sha256]] if sha256 else session.mounted(weights.removeprefix("file:"))
        if not found:
            raise MelfoldError("the weights are not attached", weights.removeprefix("file:"), "Check --weights-from")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found[0], target)
        settings = settings | {"model": settings["model"] | {"weights": f"file:{target}"}}
    return parse_recipe(settings, bundle["name"])


def fetch_earlier(session: boot.Session) -> None:
    """Copy the run's folder from the output of the session before, if there was one.

    Raises:
        MelfoldError: it is not mounted, or it belongs to another build.
    """
    name, continues = session.bundle["name"], session.bundle["continues"]
    if not continues:
        return
    found = [path.parent for path in session.mounted("run.json") if path.parent.name == name]
    if not found:
        fix = "Attach the output of the session before, and push again"
        raise MelfoldError("the session before left nothing here", f"no run {name} below {session.inputs}", fix)
    build_id = read_json(found[0].parents[1] / "melfold.json")["build_id"]
    if continues["build_id"] not in ("", build_id):
        found_build = f"{build_id[:12]}, not {continues['build_id'][:12]}"
        raise MelfoldError("the session before is of another build", found_build, "Push it again")
    session.say(f"continuing from {found[0].relative_to(session.inputs)}")
    if not session.rehearsal:
        shutil.copytree(found[0], session.working / "runs" / name)


def train(session: boot.Session) -> None:
    """Train the bundle's folds until they are done or the session's time is nearly up."""
    bundle = session.bundle
    minutes = REHEARSAL_MINUTES if session.rehearsal else bundle["budget_minutes"]
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    session.introduce(f"run {bundle['name']}, folds {bundle['folds']}, {devices}, {minutes:.0f} minutes")
    if bundle["gpu"] and devices == ["cpu"]:
        session.say("NO GPU: this kernel asked for two")
    recipe = read_recipe(session)
    competition = load_competition(session.competition_folder("train_curated.csv"), recipe.data.exclude)
    competition = replace(competition, name=bundle["competition"])
    recipe = with_bad_clips(recipe, competition)
    fetch_earlier(session)
    folds, folds_table = bundle["folds"], bundle["folds_table"]
    if session.rehearsal:
        session.say("a rehearsal: a few clips, a few steps of one fold")
        recipe = shorten(recipe, competition, batch_size=min(4, recipe.train.batch_size), steps=3)
        numbers = [f"{fname},{i % recipe.folds.n_folds}\n" for i, fname in enumerate(competition.curated.index)]
        folds, folds_table = folds[:1], "".join(["fname,fold\n", *numbers])
    table = session.working / "folds" / bundle["folds_name"]
    write_text(table, folds_table)
    home, scratch = Home(session.working), Home(session.scratch)
    share_weights(scratch, home)  # what the hub gives is no output
    splits: list[Split] = ["curated", "noisy"] if recipe.uses_noisy else ["curated"]
    cache = build_cache(competition, recipe.logmel, scratch, splits=splits, exclude=recipe.data.exclude)
    stop_workers()
    session.say("log-mels are made")
    run = start_run(home, bundle["name"], recipe, competition, table)
    left = 60 * minutes * (1 - SAVE_SHARE) - session.elapsed()
    failure = ""
    try:
        train_folds(run, folds, cache, Compute(tuple(devices)), seconds=left)
    except MelfoldError as error:  # what the other folds did must not be lost: Kaggle keeps no output of a kernel that fails
        failure = error.lines[0]
        session.say(f"FAILED: {failure}")
    (home.root / "weights").unlink()
    if any(fold != FULL for fold in run.done_folds()):
        scores = score(own_prediction(run))
        session.say(f"OOF lwlrap {scores.oof_lwlrap:.5f} of {scores.clips} clips, folds missing: {scores.missing or 'none'}")
    states = {}
    for fold in folds:
        saved = "saved, not finished" if run.fold(fold).checkpoint.exists() else boot.NOT_STARTED
        states[fold] = "done" if run.fold(fold).done else saved
    session.write_record({"folds": states, "failure": failure})
    done = all(state == "done" for state in states.values())
    session.say(f"{states}; {'all done' if done else 'the next session continues'}")


main = partial(boot.start, train)
"""Run it as a kernel. Arguments as in `boot.Session`."""

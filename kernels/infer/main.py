"""Inference inside a Kaggle kernel: a whole, valid submission.csv at any moment, and a better one as time allows.

`melfold kernel build infer` puts the package's source and the bundle (recipes, labels, priors, the weights' hashes, the budget)
in front of this file and calls `main`.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from melfold.compute import Compute
from melfold.config import Recipe, View
from melfold.data.cache import build_cache, read_manifest, stop_workers, unreadable
from melfold.data.clips import ClipStore, window_starts
from melfold.data.competition import Competition, read_test
from melfold.errors import MelfoldError
from melfold.files import Home, sha256_file, write_json
from melfold.learn.devices import Device, pick_device
from melfold.learn.model import Tagger, build_model
from melfold.learn.predict import predict_logits, sigmoid
from melfold.learn.weights import load_weights
from melfold.probs import Probs, make_probs, mean_probs, write_probs
from melfold.recipes import parse_recipe

OWN_SHARE = 0.93
"""Of the session's limit: the rest is for starting it and for handing the output over."""

CACHE_SHARE = 0.5
"""Of the budget, at most, for log-mels: what is not made by then keeps the prior."""

CACHE_STEP = 256
"""Clips between looks at the clock."""

CACHE_FIRST = 16
"""Clips of the first step, with which the worker processes start."""

SAMPLE = 24
"""Clips by which a model's speed is measured before its first pass."""

SLACK = 1.15
"""A pass is begun when this many times its expected seconds are left."""


@dataclass
class Part:
    """A run's share: its recipe, its folds' weights, the prior of clips it cannot hear, and what is predicted so far."""

    name: str
    recipe: Recipe
    weights: dict[str, Path]
    prior: np.ndarray
    share: float
    store: ClipStore | None = None
    seconds_per_frame: float | None = None

    def __post_init__(self) -> None:
        self.logits: dict[str, np.ndarray] = {}
        self.views: dict[str, int] = {}

    def windows(self, view: View, clips: int | None = None) -> int:
        """How many windows a pass has."""
        assert self.store
        overlap = self.recipe.predict.overlap
        return sum(len(window_starts(int(n), view.length, overlap, view.shift, view.pad)) for n in self.store.frames[:clips])

    def probs(self, fnames: list[str], labels: list[str]) -> Probs:
        """The mean of the folds predicted so far; the prior where there is nothing."""
        values = pd.DataFrame(np.tile(self.prior.astype(np.float32), (len(fnames), 1)), index=fnames, columns=labels)
        if self.logits and self.store:
            tables = [
                make_probs(sigmoid(total / self.views[fold]), self.store.fnames, labels) for fold, total in self.logits.items()
            ]
            values.loc[self.store.fnames] = mean_probs(tables, self.recipe.predict.fold_mean)
        return make_probs(values.to_numpy(), fnames, labels)


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:7.1f} s] {text}", flush=True)


STARTED = time.monotonic()


def main(bundle: dict[str, Any], root: Path) -> None:
    """Args: bundle: as built. root: `/`, or where a rehearsal lays out `/kaggle` and `/tmp`."""
    inputs, working, scratch = root / "kaggle/input", root / "kaggle/working", root / "tmp/melfold"
    device = pick_device("auto", "off")
    budget = OWN_SHARE * 60 * bundle["budget_minutes"]["cpu" if device.torch.type == "cpu" else "gpu"]
    say(f"melfold {bundle['build_id'][:12]}: submission {bundle['id']}, {bundle['track']}, on {device.torch}, {budget:.0f} s")
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "timm", "librosa", "numpy")}
    say(", ".join(f"{name} {number}" for name, number in versions.items()))
    for facts in bundle["provenance"]:
        say(", ".join(f"{key} {value[:16]}" for key, value in facts.items()))
    record: dict[str, Any] = {
        "build_id": bundle["build_id"],
        "device": str(device.torch),
        "budget_s": budget,
        "versions": versions,
        "passes": [],
    }

    test = find_test(inputs, bundle["labels"])
    fnames, labels = list(test.test.index), list(test.labels)
    weights = find_weights(inputs, {sha for run in bundle["runs"] for sha in run["weights"].values()})
    parts = [
        Part(
            run["name"],
            parse_recipe(run["recipe"], run["name"]),
            {fold: weights[sha] for fold, sha in run["weights"].items()},
            np.array([run["prior"][label] for label in labels]),
            run["share"],
        )
        for run in bundle["runs"]
    ]
    say(f"{len(fnames)} test clips, {len(labels)} labels, {len(weights)} files of weights, all sums right")

    def write() -> None:
        with_news = [part for part in parts if part.logits] or parts
        shares = [part.share for part in with_news]
        tables = [part.probs(fnames, labels) for part in with_news]
        probs = tables[0] if len(tables) == 1 else mean_probs(tables, bundle["mean"], shares)
        write_probs(working / "submission.csv", probs)
        record["seconds"] = round(time.monotonic() - STARTED, 2)
        write_json(working / "melfold.json", record)

    write()
    say("submission.csv holds the prior")
    record["setup_s"] = round(time.monotonic() - STARTED, 2)
    if "MELFOLD_STOP_AFTER_SETUP" in os.environ:
        return
    make_log_mels(test, parts, Home(scratch), budget, record)
    write()
    predict_passes(parts, device, budget, record, write)
    say(f"done: {sum(p['done'] for p in record['passes'])} of {len(record['passes'])} passes")


def find_test(inputs: Path, labels: list[str]) -> Competition:
    """The mounted competition, by its sample submission, in whichever layout; clips without a file are named and left out."""
    found = sorted(inputs.rglob("sample_submission.csv"), key=lambda p: len(p.parts))
    if not found:
        raise MelfoldError("no competition is mounted", f"no sample_submission.csv below {inputs}", "Add the competition's data")
    test = read_test(found[0].parent)
    if list(test.labels) != labels:
        raise MelfoldError("the mounted competition has other labels", f"{len(test.labels)}, the runs {len(labels)}")
    return test


def find_weights(inputs: Path, wanted: set[str]) -> dict[str, Path]:
    """The files of weights by their SHA-256, wherever they are mounted."""
    found: dict[str, Path] = {}
    for path in sorted(inputs.rglob("*.safetensors")):
        if (sha := sha256_file(path)) in wanted:
            found[sha] = path
    if missing := wanted - found.keys():
        seen = ", ".join(p.name for p in sorted(inputs.rglob("*.safetensors"))) or "none"
        raise MelfoldError(f"{len(missing)} files of weights are missing or damaged", f"found {seen}", "Push the dataset again")
    return found


def make_log_mels(test: Competition, parts: list[Part], home: Home, budget: float, record: dict[str, Any]) -> None:
    """Cache every front-end in use, by steps, until its share of the budget is used up."""
    there = test.test[[path is not None for path in test.test["path"]]]
    for fname in test.test.index.difference(there.index):
        say(f"TEST CLIP {fname} has no file: it keeps the prior")
    limit = CACHE_SHARE * budget
    record |= {"clips": len(test.test), "cache_s": 0.0, "cache_start_s": 0.0}
    compute = Compute(jobs=-1 if len(there) < 400 else os.cpu_count() or 1)  # the steps below are too small to decide it by
    fronts = list({part.recipe.logmel.fingerprint(): part.recipe.logmel for part in parts}.values())
    stores: dict[str, ClipStore | None] = {}
    for number, front in enumerate(fronts):
        begun = time.monotonic()
        made, pace = 0, 0.0
        folder = None
        while made < len(there):
            step = time.monotonic()
            count = min(CACHE_STEP if made else 2 * CACHE_FIRST, len(there) - made)
            if step - STARTED + SLACK * pace * count > limit * (number + 1) / len(fronts):
                say(f"no time for more log-mels: {len(there) - made} clips keep the prior")
                break
            if not made:  # a few clips first, with which the worker processes start: their pace would say little
                folder = build_cache(test, front, home, splits=["test"], fnames=there.index[:CACHE_FIRST], compute=compute)
                start = time.monotonic()
                record["cache_start_s"] += round(start - step, 2)
                step, count = start, max(count - CACHE_FIRST, 1)
                made = min(CACHE_FIRST, len(there))
            made = min(made + count, len(there))
            folder = build_cache(test, front, home, splits=["test"], fnames=there.index[:made], compute=compute)
            pace = (time.monotonic() - step) / count
        stores[front.fingerprint()] = None
        if folder and made:
            manifest = read_manifest(folder).loc[list(there.index[:made])]
            lost = unreadable(manifest)
            heard = list(manifest.index.drop(lost))
            for fname in lost:
                say(f"TEST CLIP {fname} cannot be read: it keeps the prior")
            record["audio_s"] = float(manifest["seconds"].sum())
            if heard:
                stores[front.fingerprint()] = ClipStore(folder, heard, front.n_mels, front.top_db)
        record["cache_s"] += round(time.monotonic() - begun, 2)
        say(f"log-mels of {made} clips in {time.monotonic() - begun:.1f} s")
    stop_workers()
    for part in parts:
        part.store = stores[part.recipe.logmel.fingerprint()]


def predict_passes(parts: list[Part], device: Device, budget: float, record: dict[str, Any], write: Any) -> None:
    """Fold by fold in the first view, runs taking turns, then the other views; none that its own speed says won't fit."""
    parts = [part for part in parts if part.store]
    order = [
        (part, fold, number)
        for number in range(max((len(part.recipe.views) for part in parts), default=0))
        for rank in range(max(len(part.weights) for part in parts))
        for part in parts
        for fold in [*part.weights][rank : rank + 1]
        if number < len(part.recipe.views)
    ]
    writing = 0.0
    for part, fold, number in order:
        view = part.recipe.views[number]
        name = f"{part.name} fold {fold}, view {number}"
        entry = {"run": part.name, "fold": fold, "view": number, "windows": part.windows(view), "done": False}
        record["passes"].append(entry)
        left = budget - (time.monotonic() - STARTED)
        if number and fold not in part.logits:
            say(f"{name}: no first pass, so no other")
            continue
        if left < 0.02 * budget:
            continue
        model = load_model(part, fold, len(part.prior), device)
        if part.seconds_per_frame is None:
            part.seconds_per_frame = measure(model, part, device, view)
        expected = part.seconds_per_frame * entry["windows"] * view.length + writing
        left = budget - (time.monotonic() - STARTED)
        if SLACK * expected > left:
            say(f"{name}: {expected:.0f} s do not fit into the {left:.0f} s left")
            continue
        begun = time.monotonic()
        logits = predict_logits(model, part.store, part.recipe, device, view)
        seconds = time.monotonic() - begun
        part.seconds_per_frame = seconds / (entry["windows"] * view.length)
        part.logits[fold] = part.logits.get(fold, 0.0) + logits
        part.views[fold] = part.views.get(fold, 0) + 1
        entry |= {"done": True, "predict_s": round(seconds, 3)}
        write()
        writing = time.monotonic() - begun - seconds
        entry["seconds"] = round(seconds + writing, 3)
        say(f"{name}: {entry['windows']} windows in {seconds:.1f} s")
    write()


def load_model(part: Part, fold: str, n_labels: int, device: Device) -> Tagger:
    """A fold's model from its weights alone."""
    recipe = part.recipe
    model = build_model(recipe.model, n_labels, recipe.logmel.n_mels, recipe.window_frames, initial=False)
    load_weights(part.weights[fold], model)
    return model.to(device.torch).eval()


def measure(model: Tagger, part: Part, device: Device, view: View) -> float:
    """Seconds a frame of windows, from a few clips; the first call, which warms up, is not counted."""
    assert part.store
    recipe = part.recipe
    few = part.store.head(SAMPLE)
    predict_logits(model, part.store.head(1), recipe, device, view)
    begun = time.monotonic()
    predict_logits(model, few, recipe, device, view)
    return (time.monotonic() - begun) / (part.windows(view, SAMPLE) * view.length)


def run(bundle: dict[str, Any], root: Path) -> None:
    """`main`, with an expected error told in its own lines."""
    try:
        main(bundle, root)
    except MelfoldError as error:
        say(f"melfold: {error}")
        sys.exit(2)


if __name__ == "__main__" and "BUNDLE" in globals():
    run(BUNDLE, ROOT)  # noqa: F821 - put in front by `melfold kernel build`

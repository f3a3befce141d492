"""Inference within a time budget: a complete, valid `submission.csv` at any moment, and a better one as time allows.

The first file holds the prior: each label's mean out-of-fold probability. It is written before PyTorch is loaded. Every pass
(one fold's model, one view) improves it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from melfold.compute import Compute
from melfold.config import LogMelConfig, Recipe, View
from melfold.data.cache import build_cache, read_manifest, stop_workers, unreadable
from melfold.data.clips import ClipStore, window_starts
from melfold.data.competition import read_test
from melfold.errors import MelfoldError, first_line
from melfold.files import Home
from melfold.kernels import boot
from melfold.probs import Probs, make_probs, mean_probs, sigmoid, write_probs
from melfold.recipes import parse_recipe

if TYPE_CHECKING:
    from melfold.learn.devices import Device
    from melfold.learn.model import Tagger

BUDGET_SHARE = 0.93
"""Of the time limit. The rest is for starting the session and for saving its output."""

CACHE_SHARE = 0.5
"""Of the budget, at most, for log-mels. Clips without one by then keep the prior."""

CACHE_STEP = 256
"""Clips between two looks at the clock."""

FIRST_STEP = 16
"""Clips of the first two steps. The first one is mostly the start of worker processes, the second tells the speed."""

MANY_CLIPS = 400
"""From here on, worker processes are worth their start. `build_cache` cannot decide that, since it sees one step at a time."""

SAMPLE_CLIPS = 24
"""A model's speed is measured with these before its first pass."""

SAFETY = 1.15
"""A pass starts only if this many times its expected seconds are left."""


@dataclass
class Member:
    """One run of the submission: its models, and what they have predicted so far.

    Args:
        weights: fold -> file.
        prior: `(labels,)`, for clips that cannot be predicted.
        share: its weight in the ensemble.
    """

    name: str
    recipe: Recipe
    weights: dict[str, Path]
    prior: np.ndarray
    share: float
    store: ClipStore | None = None
    """Its log-mels, once they are made; None if no clip has one."""
    logits: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Fold -> those of each view so far."""
    seconds_per_frame: float | None = None

    def windows(self, view: View, clips: int | None = None) -> int:
        """How many windows the first clips (by default all) have in a view."""
        assert self.store
        overlap = self.recipe.predict.overlap
        return sum(len(window_starts(int(n), view.length, overlap, view.shift, view.pad)) for n in self.store.frames[:clips])

    def probs(self, fnames: list[str], labels: list[str]) -> Probs:
        """The mean of the folds so far; the prior for clips without a prediction."""
        values = pd.DataFrame(np.tile(self.prior.astype(np.float32), (len(fnames), 1)), index=fnames, columns=labels)
        if self.logits and self.store:
            means = [sigmoid(sum(views) / len(views)) for views in self.logits.values()]
            tables = [make_probs(mean, self.store.fnames, labels) for mean in means]
            values.loc[self.store.fnames] = mean_probs(tables, self.recipe.predict.fold_mean)
        return make_probs(values.to_numpy(), fnames, labels)


class Inference:
    """The members of a submission, the test clips, and the time that is left. `record` becomes `melfold.json`.

    Raises:
        MelfoldError: no competition, other labels than the models have, or weights that are missing or damaged.
    """

    device: Device
    budget: float
    """Seconds; like the device, known after `pick_device`."""

    def __init__(self, session: boot.Session) -> None:
        self.session = session
        self.test = read_test(session.competition_folder("sample_submission.csv"))
        labels, known = list(self.test.labels), session.bundle["labels"]
        if labels != known:
            raise MelfoldError("the mounted competition has other labels", f"{len(labels)} labels, the runs have {len(known)}")
        runs = session.bundle["runs"]
        files = session.weights({sha256 for run in runs for sha256 in run["weights"].values()})
        self.members = [
            Member(
                name=run["name"],
                recipe=parse_recipe(run["recipe"], run["name"]),
                weights={fold: files[sha256] for fold, sha256 in run["weights"].items()},
                prior=np.array([run["prior"][label] for label in labels]),
                share=run["share"],
            )
            for run in runs
        ]
        self.record: dict[str, Any] = {"clips": len(self.test.test), "late": 0, "unreadable": 0, "passes": []}
        self.write_seconds = 0.0

    def pick_device(self) -> None:
        """Load PyTorch and timm, find the device, and with it the budget."""
        from melfold.learn.devices import pick_device
        from melfold.learn.predict import predict_logits

        self.predict_logits = predict_logits
        self.device, minutes = pick_device("auto", "off"), self.session.bundle["budget_minutes"]
        lost = self.session.bundle["gpu"] and self.device.torch.type == "cpu"
        if lost:  # the session is as long as was asked for; only a rehearsal may take longer
            minutes = float(os.environ.get("MELFOLD_CPU_MINUTES", minutes))
            self.session.say("NO GPU: this kernel asked for one, and plans for this CPU")
        self.budget = BUDGET_SHARE * 60 * minutes
        self.session.say(f"{self.device.torch}, {self.budget:.0f} s")
        setup = round(self.session.elapsed(), 2)
        self.record |= {"device": str(self.device.torch), "budget_s": self.budget, "setup_s": setup}

    def time_left(self) -> float:
        """Seconds of the budget."""
        return self.budget - self.session.elapsed()

    def write(self) -> None:
        """Write `submission.csv` and `melfold.json` as things are now. Members without any prediction are left out."""
        fnames, labels = list(self.test.test.index), list(self.test.labels)
        members = [member for member in self.members if member.logits] or self.members
        tables = [member.probs(fnames, labels) for member in members]
        shares = [member.share for member in members]
        probs = tables[0] if len(tables) == 1 else mean_probs(tables, self.session.bundle["mean"], shares)
        write_probs(self.session.working / "submission.csv", probs)
        self.session.write_record(self.record)

    def make_log_mels(self) -> None:
        """Fill the cache for every front-end of the members, until its share of the budget is used up."""
        self.record |= {"cache_s": 0.0, "cache_start_s": 0.0}
        front_ends = {member.recipe.logmel.fingerprint(): member.recipe.logmel for member in self.members}
        for number, (fingerprint, config) in enumerate(front_ends.items(), 1):
            began = self.session.elapsed()
            store = self._make_store(config, CACHE_SHARE * self.budget * number / len(front_ends))
            for member in self.members:
                if member.recipe.logmel.fingerprint() == fingerprint:
                    member.store = store
            seconds = self.session.elapsed() - began
            self.record["cache_s"] += round(seconds, 2)
            self.session.say(f"log-mels of {len(store.fnames) if store else 0} clips in {seconds:.1f} s")
        stop_workers()

    def _make_store(self, config: LogMelConfig, deadline: float) -> ClipStore | None:
        """Make log-mels step by step. Returns: the readable clips that were reached in time, if any."""
        clips = self.test.test
        compute = Compute(jobs=-1 if len(clips) < MANY_CLIPS else os.cpu_count() or 1)
        place = Home(self.session.scratch)
        folder, made, pace = Path(), 0, 0.0
        while made < len(clips):
            began = self.session.elapsed()
            count = min(CACHE_STEP if pace else FIRST_STEP, len(clips) - made)
            if began + SAFETY * pace * count > deadline:
                late = len(clips) - made
                self.session.say(f"NO TIME for more log-mels: {late} clips keep the prior")
                self.record["late"] = max(late, self.record["late"])
                break
            reached = clips.index[: made + count]
            folder = build_cache(self.test, config, place, splits=["test"], fnames=reached, compute=compute)
            seconds = self.session.elapsed() - began
            if made:
                pace = seconds / count
            else:
                self.record["cache_start_s"] += round(seconds, 2)
            made += count
        if not made:
            return None
        manifest = read_manifest(folder).loc[list(clips.index[:made])]
        failed = unreadable(manifest)
        self.record["unreadable"] = max(self.record["unreadable"], len(failed))
        for fname in failed:
            self.session.say(f"TEST CLIP {fname} cannot be read: it keeps the prior")
        self.record["audio_s"] = float(manifest["seconds"].sum())
        readable = list(manifest.index.difference(failed, sort=False))
        return ClipStore(folder, readable, config.n_mels, config.top_db) if readable else None

    def predict(self) -> None:
        """Do all passes that fit into the time left: every fold in the first view, members in turn, then the other views.

        A pass that fails, for lack of memory say, is recorded and left out.

        Raises:
            Exception: the last one, if no pass could be done.
        """
        failure = None
        for member, fold, number in self._passes():
            try:
                self._predict_pass(member, fold, number)
            except Exception as error:
                failure, entry = error, self.record["passes"][-1]
                entry["error"] = f"{type(error).__name__}: {first_line(error)}"
                self.session.say(f"{member.name} fold {fold}, view {number} FAILED and is left out: {entry['error']}")
        self.write()
        if failure and not any(entry["done"] for entry in self.record["passes"]):
            raise failure
        done = sum(entry["done"] for entry in self.record["passes"])
        self.session.say(f"done: {done} of {len(self.record['passes'])} passes")

    def _passes(self) -> Iterator[tuple[Member, str, int]]:
        members = [member for member in self.members if member.store]
        for number in range(max((len(member.recipe.views) for member in members), default=0)):
            for rank in range(max(len(member.weights) for member in members)):
                for member in members:
                    if number < len(member.recipe.views) and rank < len(member.weights):
                        yield member, list(member.weights)[rank], number

    def _predict_pass(self, member: Member, fold: str, number: int) -> None:
        from melfold.learn.model import load_model

        view, name = member.recipe.views[number], f"{member.name} fold {fold}, view {number}"
        entry: dict[str, Any] = {"run": member.name, "fold": fold, "view": number, "windows": member.windows(view), "done": False}
        self.record["passes"].append(entry)
        if number and fold not in member.logits:
            self.session.say(f"{name}: skipped, as its first view was")
            return
        if self.time_left() < 0.02 * self.budget:
            return
        model = load_model(member.recipe, len(member.prior), member.weights[fold], self.device)
        frames = entry["windows"] * view.length
        if member.seconds_per_frame is None:
            member.seconds_per_frame = self._measure(model, member, view)
        expected = member.seconds_per_frame * frames + self.write_seconds
        if SAFETY * expected > self.time_left():
            self.session.say(f"{name}: {expected:.0f} s do not fit into the {self.time_left():.0f} s left")
            return
        began = self.session.elapsed()
        assert member.store  # `_passes` leaves the others out
        logits = self.predict_logits(model, member.store, member.recipe, self.device, view)
        member.logits.setdefault(fold, []).append(logits)
        seconds = self.session.elapsed() - began
        member.seconds_per_frame = seconds / frames
        entry |= {"done": True, "predict_s": round(seconds, 3)}
        self.write()
        total = self.session.elapsed() - began
        self.write_seconds = total - seconds
        entry["seconds"] = round(total, 3)
        self.session.say(f"{name}: {entry['windows']} windows in {seconds:.1f} s")

    def _measure(self, model: Tagger, member: Member, view: View) -> float:
        """Seconds per frame of windows, from a few clips. A first call warms up and is not counted."""
        assert member.store
        for clips in (1, SAMPLE_CLIPS):
            began = self.session.elapsed()
            self.predict_logits(model, member.store.head(clips), member.recipe, self.device, view)
        return (self.session.elapsed() - began) / (member.windows(view, SAMPLE_CLIPS) * view.length)


def infer(session: boot.Session) -> None:
    """Predict the mounted test clips within the bundle's time limit."""
    versions = session.introduce(f"submission {session.bundle['id']}, {session.bundle['track']}")
    job = Inference(session)
    job.record["versions"] = versions
    files = sum(len(member.weights) for member in job.members)
    session.say(f"{len(job.test.test)} test clips, {len(job.test.labels)} labels, {files} files of weights as expected")
    job.write()
    session.say("submission.csv holds the prior")
    if "MELFOLD_STOP_AFTER_SETUP" in os.environ:  # a rehearsal that only asks whether everything is found
        return
    job.pick_device()
    job.make_log_mels()
    job.write()
    job.predict()


main = partial(boot.start, infer)
"""Run it as a kernel. Arguments as in `boot.Session`."""

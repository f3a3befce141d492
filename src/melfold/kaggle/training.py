"""Training on Kaggle: a kernel for each session, each continuing from the output of the one before."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melfold.compute import Progress, silent
from melfold.config import Recipe
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.files import Home, digest, read_json, sha256_file
from melfold.kaggle.build import NAME, Plan, Target, build, provenance
from melfold.kaggle.built import Built, built_for
from melfold.kaggle.client import Kaggle
from melfold.kaggle.push import fetch_run, is_there, push, wait_for_kernel
from melfold.kaggle.rehearsal import rehearse
from melfold.kernels.boot import RECORD
from melfold.learn.fetch import hub_file
from melfold.learn.provenance import current_commit
from melfold.learn.start import check_name

log = logging.getLogger(__name__)

SESSION_MINUTES = 660  # a session may last 12 hours; this leaves an hour


@dataclass(frozen=True)
class Training:
    """A run that is trained on Kaggle.

    Args:
        table: the fold table, which is part of the script.
        competition: its tables are enough.
        weights_from: where the file that `model.weights=file:NAME` names is, unless it is here: `OWNER/KERNEL`,
            `dataset:OWNER/NAME` or `model:OWNER/MODEL/FRAMEWORK/VARIATION/VERSION`.
    """

    name: str
    recipe: Recipe
    table: Path
    competition: Competition
    folds: Sequence[int | str]
    weights_from: str = ""

    @property
    def inputs(self) -> dict[str, Any]:
        """What must not change from one session to the next."""
        folds = [str(fold) for fold in self.folds]
        return {"recipe": self.recipe.training(), "fold_table": sha256_file(self.table), "folds": folds}


def build_train(home: Home, training: Training, target: Target, *, session: int = 1) -> Built:
    """Build a kernel that trains folds and continues from the output of the session before.

    It has a network only if its weights come from the hub.

    Args:
        session: 1, or a later one, which continues where the one before stopped, and fails if it does not find its output.

    Raises:
        MelfoldError: a name that no run can have, weights that are not here, a recipe with teachers, or a script that would be
            too large.
    """
    check_name(training.name)
    if training.recipe.noisy.teachers:
        found = f"noisy.teachers = {list(training.recipe.noisy.teachers)}"
        raise MelfoldError("a kernel cannot use teachers", found, "Train this recipe where its teachers are")
    if training.recipe.model.first_run:
        found = f"model.weights = {training.recipe.model.weights}"
        raise MelfoldError("a training kernel cannot start from a run", found, "Train this recipe where that run is")
    name, inputs = training.name, training.inputs
    recipe, weights, sources = _first_weights(training)
    before = built_for(home, "train", name, session - 1)
    continues = {"build_id": before.facts["build_id"] if before.artefact.stamp.exists() else ""} if session > 1 else {}
    bundle = {
        "name": name,
        "competition": training.competition.name,
        "recipe": recipe.model_dump(mode="json"),
        "folds_name": training.table.name,
        "folds_table": training.table.read_text(),
        "folds": inputs["folds"],
        "continues": continues,
        "gpu": target.gpu,
        "weights_sha256": sha256_file(*weights.values()) if weights else "",
        "budget_minutes": target.minutes or SESSION_MINUTES,
        "provenance": [provenance(name, recipe, inputs["fold_table"], recipe.track, current_commit())],
    }
    if continues:
        sources["kernel_sources"].append(f"{target.owner}/{before.folder.name}")
    sources |= {"enable_internet": hub_file(recipe.model) is not None}
    made_from = {"fold_table": inputs["fold_table"]}
    facts = {"competition": training.competition.name, "training": digest(inputs), "n_folds": recipe.folds.n_folds}
    return build(home, Plan("train", name, target, bundle, made_from, weights, facts, sources, session))


SOURCES = {
    "kernel_sources": f"(?:kernel:)?({NAME}/{NAME})",
    "dataset_sources": f"dataset:({NAME}/{NAME})",
    "model_sources": rf"model:({NAME}/{NAME}/{NAME}/{NAME}/\d+)",
}
"""What can be attached to a kernel: its key in the metadata -> how it is named."""


def _first_weights(training: Training) -> tuple[Recipe, dict[str, Path], dict[str, Any]]:
    """The recipe as the kernel gets it, the file of weights to upload (if any), and what to attach."""
    recipe = training.recipe
    sources: dict[str, Any] = {key: [] for key in SOURCES}
    if not recipe.model.weights.startswith("file:"):
        if training.weights_from:
            found = f"model.weights = {recipe.model.weights}"
            raise MelfoldError("only weights in a file can be attached", found, "Use model.weights=file:NAME")
        return recipe, {}, sources
    path = Path(recipe.model.weights.removeprefix("file:")).expanduser()
    if path.suffix != ".safetensors":
        raise MelfoldError("a kernel takes weights as safetensors", path.name, "Convert the file")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": f"file:{path.name}"})})
    if training.weights_from:
        for key, pattern in SOURCES.items():
            if named := re.fullmatch(pattern, training.weights_from):
                return recipe, {}, sources | {key: [named[1]]}
        fix = "Use OWNER/KERNEL, dataset:OWNER/NAME or model:OWNER/MODEL/FRAMEWORK/VARIATION/VERSION"
        raise MelfoldError("no kernel, dataset or model of Kaggle", repr(training.weights_from), fix)
    if not path.is_file():
        raise MelfoldError("no such weights file", str(path), "Check model.weights=file:PATH, or attach it: --weights-from")
    return recipe, {path.name: path}, sources


def train_on_kaggle(
    client: Kaggle, home: Home, training: Training, target: Target, *, sessions: int, progress: Progress = silent
) -> Built:
    """Train a run on Kaggle, session after session, until all of its folds are done, and bring it home.

    A repeated call continues where the last one stopped: what was pushed is waited for, what was fetched stays.
    Returns: the kernel of the last session, whose output holds the whole run.

    Args:
        sessions: at most so many, with those before this call.

    Raises:
        MelfoldError: a rehearsal or a session that failed; settings that differ from an earlier session's; folds that are not
            done after the last session.
    """
    states: dict[str, str] = {}
    for session in range(1, sessions + 1):
        built = _run_session(client, home, training, target, session, progress)
        states = built.fetch_stamp.read()["folds"]
        log.info("session %d of run %s: %s", session, training.name, ", ".join(f"fold {k} {v}" for k, v in states.items()))
        if all(state == "done" for state in states.values()):
            return built
    found = ", ".join(fold for fold, state in states.items() if state != "done")
    fix = f"Continue with --sessions {sessions + 1}"
    raise MelfoldError(f"folds of run {training.name} are not done after {sessions} sessions", found, fix)


def _run_session(client: Kaggle, home: Home, training: Training, target: Target, session: int, progress: Progress) -> Built:
    """Build, rehearse, push and fetch a session, each unless it is done."""
    built = built_for(home, "train", training.name, session)
    if built.artefact.stamp.exists() and (built.asked or built.fetched):
        # Not built again, whatever changed in melfold since: an hour of a GPU must not be spent twice.
        if built.facts["training"] != digest(training.inputs):
            fix = f"Use another name (--run NAME), or delete {built.folder}"
            raise MelfoldError(f"run {training.name} was started on Kaggle with other settings", built.folder.name, fix)
    else:
        built = build_train(home, training, target, session=session)
    if built.fetched:
        return built
    if not built.passed:
        log.info("rehearsing %s with a few clips and steps", built.folder.name)
        if failures := rehearse(built, training.competition, home).failures:
            raise MelfoldError("the rehearsal failed", failures[0], f"Its report is in {built.folder}")
    if not built.pushed and not (built.asked and is_there(client, built)):
        version = push(client, built, progress=progress)
        log.info("pushed %s, version %d", built.facts["kernel"], version)
    output = wait_for_kernel(client, built)
    fetch_run(built, output, home)
    record = read_json(output / RECORD)
    built.fetch_stamp.commit(built.inputs, folds=record["folds"])
    if record["failure"]:
        fix = "What it trained is here; the same command continues with the next session"
        raise MelfoldError(f"session {session} of run {training.name} failed", record["failure"], fix)
    return built

"""Build kernels: a script that holds the package, and a dataset that holds the weights."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from melfold.artefacts import listed
from melfold.combine.oof import prior_of
from melfold.combine.rebuild import label_of
from melfold.combine.submission import open_submission, submission_artefact
from melfold.config import Recipe
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.files import Home, digest, sha256_file, write_json, write_text
from melfold.kaggle.built import Built, built_for, kernel_id, title_for
from melfold.kaggle.pack import make_script, read_source
from melfold.learn.fetch import first_weights, hub_file
from melfold.learn.predictions import Prediction, open_prediction
from melfold.learn.provenance import current_commit, licence_of, seen_data

log = logging.getLogger(__name__)

INFER_MINUTES = {"cpu": 240, "gpu": 60}
"""The competition's limits for an inference kernel."""

TRAIN_MINUTES = 660
"""A session may last 12 hours; this leaves an hour."""

COPY_MINUTES = 15


@dataclass(frozen=True)
class Target:
    """Where a kernel will run.

    Args:
        owner: the Kaggle user.
        competition: the slug of the competition whose data is mounted.
        gpu: ask for two T4s.
        minutes: the time limit; None for `INFER_MINUTES` or `TRAIN_MINUTES`.
    """

    owner: str
    competition: str
    gpu: bool = True
    minutes: float | None = None


def build_infer(home: Home, id: str, target: Target, *, source: str = "") -> Built:
    """Build the kernel that predicts a submission again from its runs' weights.

    Args:
        source: a training kernel (`owner/slug`) whose output holds the weights; without it, a dataset of them is built.

    Raises:
        MelfoldError: no such submission, a run that has changed since, or a script that would be too large.
    """
    submission = open_submission(home, id)
    members = [open_prediction(home, label_of(part)) for part in submission["runs"]]
    weights: dict[str, Path] = {}
    for member, part in zip(members, submission["runs"], strict=True):
        run = member.run
        if part["weights_sha256"] != run.weights_sha256(run.used_folds()):
            what = f"run {run.name} has changed since submission {id} was built"
            raise MelfoldError(what, str(run.folder), "Build the submission again")
        for folder in () if source else map(run.fold, run.used_folds()):
            folder.verify()
            weights[f"{run.name}-{folder.path.name}.safetensors"] = folder.weights
    minutes = {"cpu": target.minutes, "gpu": target.minutes} if target.minutes else INFER_MINUTES
    bundle = {
        "id": id,
        "track": submission["track"],
        "labels": members[0].run.info.labels,
        "mean": submission["mean"],
        "runs": [_member(*pair) for pair in zip(members, submission["runs"], strict=True)],
        "budget_minutes": minutes,
        "provenance": [
            _provenance(run.name, run.recipe, run.info.folds_sha256, run.info.track, run.info.commit)
            for run in {member.run.name: member.run for member in members}.values()
        ],
    }
    plan = _Plan(
        kind="infer",
        name=id,
        target=target,
        bundle=bundle,
        made_from={"submission": submission["files"]["submission.csv"]},
        weights=weights,
        source=source,
        facts={"id": id, "competition": submission["competition"]},
        minutes=minutes["gpu" if target.gpu else "cpu"],
    )
    return _build(home, plan)


def build_copy(home: Home, id: str, target: Target) -> Built:
    """Build the kernel that copies a finished `submission.csv`, which is mounted as a dataset.

    Raises:
        MelfoldError: no such submission.
    """
    submission = open_submission(home, id)
    sha256 = submission["files"]["submission.csv"]
    (path,) = submission_artefact(home, id).files
    plan = _Plan(
        kind="copy_csv",
        name=id,
        target=replace(target, gpu=False),
        bundle={
            "id": id,
            "submission_sha256": sha256,
            "budget_minutes": {"cpu": COPY_MINUTES},
            "provenance": [{"submission": id, "track": submission["track"], "sha256": sha256}],
        },
        made_from={"submission": sha256},
        weights={"submission.csv": path},
        source="",
        facts={"id": id, "competition": submission["competition"]},
        minutes=COPY_MINUTES,
    )
    return _build(home, plan)


def build_train(
    home: Home,
    recipe: Recipe,
    name: str,
    table: Path,
    competition: Competition,
    target: Target,
    *,
    folds: list[int | str],
    session: int = 1,
) -> Built:
    """Build a kernel that trains folds and continues from the output of the session before.

    Args:
        name: the run's name.
        table: the fold table, which is part of the script.
        session: 1, or a later one, which continues where the one before stopped.

    Raises:
        MelfoldError: weights that cannot be downloaded, a recipe with a teacher, or a script that would be too large.
    """
    recipe, weights = _first_weights(recipe, home)
    if recipe.noisy.teachers:
        raise MelfoldError(
            "a kernel cannot use teachers",
            f"noisy.teachers = {list(recipe.noisy.teachers)}",
            "Train this recipe where its teachers are",
        )
    if recipe.model.first_run:
        fix = "Train this recipe where that run is"
        raise MelfoldError("a training kernel cannot start from a run", f"model.weights = {recipe.model.weights}", fix)
    minutes, table_sha256 = target.minutes or TRAIN_MINUTES, sha256_file(table)
    bundle = {
        "name": name,
        "recipe": recipe.model_dump(mode="json"),
        "folds_name": table.name,
        "folds_table": table.read_text(),
        "folds": [str(fold) for fold in folds],
        "weights_sha256": sha256_file(*weights.values()) if weights else "",
        "budget_minutes": minutes,
        "provenance": [_provenance(name, recipe, table_sha256, recipe.track, current_commit())],
    }
    plan = _Plan(
        kind="train",
        name=f"{name} s{session}",
        target=target,
        bundle=bundle,
        made_from={"fold_table": table_sha256},
        weights=weights,
        source=kernel_id(target.owner, "train", f"{name} s{session - 1}") if session > 1 else "",
        facts={"id": name, "competition": competition.name},
        minutes=minutes,
    )
    return _build(home, plan)


def _first_weights(recipe: Recipe, home: Home) -> tuple[Recipe, dict[str, Path]]:
    """The recipe with its weights' file name alone, and the file, if it starts from one; weights from the hub become a file."""
    path = first_weights(recipe.model, home)
    if path is None:
        return recipe, {}
    if path.suffix != ".safetensors":
        raise MelfoldError("a kernel takes weights as safetensors", path.name, "Convert the file")
    file, facts = hub_file(recipe.model), {}
    if file:
        facts = {"licence": licence_of(recipe, home), "seen": seen_data(recipe)}
    name = str(file).replace("/", "--") if file else path.name
    model = recipe.model.model_copy(update={"weights": f"file:{name}", **facts})
    return recipe.model_copy(update={"model": model}), {name: path}


def _member(prediction: Prediction, part: dict[str, Any]) -> dict[str, Any]:
    """A run of a submission, as the kernel needs it."""
    return {
        "name": prediction.label,
        "recipe": part["recipe"],
        "weights": part["weights_sha256"],
        "prior": {label: float(value) for label, value in prior_of(prediction).items()},
        "share": part["share"],
    }


def _provenance(run: str, recipe: Recipe, folds_sha256: str, track: str, commit: str) -> dict[str, str]:
    return {
        "run": run,
        "recipe": recipe.fingerprint(),
        "folds_sha256": folds_sha256,
        "logmel": recipe.logmel.fingerprint(),
        "track": track,
        "commit": commit,
    }


@dataclass(frozen=True)
class _Plan:
    """All that decides a kernel.

    Args:
        kind: `infer`, `train` or `copy_csv`: its folder in `kernels/`.
        name: tells it from others of its kind.
        bundle: what the script is told to do.
        weights: file name in the dataset -> file, which may be a submission; without any, there is no dataset.
        source: another kernel, whose output is mounted.
        minutes: the time limit of the session.
    """

    kind: str
    name: str
    target: Target
    bundle: dict[str, Any]
    made_from: dict[str, str]
    weights: dict[str, Path]
    source: str
    facts: dict[str, Any]
    minutes: float


def _build(home: Home, plan: _Plan) -> Built:
    """Build a kernel, unless it exists and was made from the same inputs. A build replaces the one before it as a whole.

    Raises:
        MelfoldError: a script that would be too large.
    """
    script = make_script(plan.kind, plan.bundle)
    sums = {file: sha256_file(path) for file, path in sorted(plan.weights.items())}
    # A dataset is named by its content: one that was uploaded completely is never replaced.
    content = "submission" if plan.kind == "copy_csv" else "weights"
    dataset = f"{plan.target.owner}/melfold-{content}-{digest(sums)[:16]}" if sums else ""
    metadata = _metadata(plan, dataset)
    made_from = plan.made_from | script.made_from | {"weights": sums, "metadata": metadata}
    built = built_for(home, plan.kind, plan.name)
    changes = built.artefact.changes(made_from)
    if not changes:
        return built
    if built.folder.exists():
        log.info("building %s again: %s", built.folder.name, listed(changes))
    temporary = Built(built.folder.with_name(f".{built.folder.name}.tmp"))
    shutil.rmtree(temporary.folder, ignore_errors=True)
    write_text(temporary.kernel / "kernel.py", script.text)
    write_json(temporary.kernel / "kernel-metadata.json", metadata)
    if dataset:
        _write_dataset(temporary.dataset, dataset, plan, sums)
    temporary.artefact.commit(
        made_from,
        kind=plan.kind,
        **plan.facts,
        build_id=script.build_id,
        kernel=metadata["id"],
        dataset=dataset,
        competition_slug=plan.target.competition,
        limit_seconds=round(60 * plan.minutes),
        budget_minutes=plan.bundle["budget_minutes"],
        gpu=plan.target.gpu,
        provenance=plan.bundle["provenance"],
    )
    shutil.rmtree(built.folder, ignore_errors=True)
    temporary.folder.rename(built.folder)
    return built


def _metadata(plan: _Plan, dataset: str) -> dict[str, Any]:
    """`kernel-metadata.json`: the one in `kernels/`, filled in."""
    metadata = json.loads(read_source(plan.kind, "kernel-metadata.json"))
    if not plan.target.gpu:
        metadata.pop("machine_shape", None)
    return metadata | {
        "id": kernel_id(plan.target.owner, plan.kind, plan.name),
        "title": title_for(plan.kind, plan.name),
        "enable_gpu": plan.target.gpu,
        "dataset_sources": [dataset] if dataset else [],
        "competition_sources": [plan.target.competition],
        "kernel_sources": [plan.source] if plan.source else [],
    }


def _write_dataset(folder: Path, dataset: str, plan: _Plan, sums: dict[str, str]) -> None:
    folder.mkdir()
    for file, path in plan.weights.items():
        try:
            os.link(path, folder / file)
        except OSError:  # another file system
            shutil.copyfile(path, folder / file)
    write_json(folder / "manifest.json", {"files": sums, "provenance": plan.bundle["provenance"]})
    title = dataset.split("/")[1].replace("-", " ")
    write_json(folder / "dataset-metadata.json", {"id": dataset, "title": title, "licenses": [{"name": "other"}]})

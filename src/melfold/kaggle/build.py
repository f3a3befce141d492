"""Build kernels: a script that holds the package, and a dataset that holds the weights."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from melfold.artefacts import listed
from melfold.combine.oof import prior_of
from melfold.combine.rebuild import label_of
from melfold.combine.submission import open_submission, submission_artefact
from melfold.config import Recipe
from melfold.errors import MelfoldError
from melfold.facts import facts_of
from melfold.files import Home, digest, sha256_file, write_json, write_text
from melfold.kaggle.built import Built, built_for, title_for
from melfold.kaggle.pack import make_script, read_source
from melfold.learn.predictions import open_prediction

log = logging.getLogger(__name__)

NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"  # of a user, a kernel or a dataset in an address
COPY_MINUTES = 15
MARGIN_MINUTES = {"infer": 0, "copy_csv": 0, "train": 10}  # by which a session may exceed its own limit
MOST_MINUTES = 720  # of any session


@dataclass(frozen=True)
class Target:
    """Where a kernel will run.

    Args:
        owner: the Kaggle user.
        competition: the slug of the competition whose data is mounted.
        gpu: ask for two T4s.
        minutes: the time limit; None for the competition's, or for `training.SESSION_MINUTES`.

    Raises:
        MelfoldError: an owner that cannot be a user name.
    """

    owner: str
    competition: str
    gpu: bool = True
    minutes: float | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.owner):
            raise MelfoldError("not a Kaggle user name", repr(self.owner), "Use the one in the address of your profile")


def build_infer(home: Home, id: str, target: Target, *, source: str = "") -> Built:
    """Build the kernel that predicts a submission again from its runs' weights.

    Args:
        source: a training kernel (`owner/slug`) whose output holds the weights; without it, a dataset of them is built.

    Raises:
        MelfoldError: no such submission, a run that has changed since, no such form of a source, or a script that would be too
            large.
    """
    if source and not re.fullmatch(f"{NAME}/{NAME}", source):
        raise MelfoldError("not a kernel", repr(source), "Use OWNER/KERNEL, as in its address")
    submission, gpu = open_submission(home, id), target.gpu
    runs, weights, sources = [], {}, {}
    for part in submission["runs"]:
        member = open_prediction(home, label_of(part))
        run = member.run
        if part["weights_sha256"] != run.weights_sha256(run.used_folds()):
            what = f"run {run.name} has changed since submission {id} was built"
            raise MelfoldError(what, str(run.folder), "Build the submission again")
        for folder in () if source else map(run.fold, run.used_folds()):
            folder.verify()
            weights[f"{run.name}-{folder.path.name}.safetensors"] = folder.weights
        prior = {label: float(value) for label, value in prior_of(member).items()}
        own = {"name": member.label, "recipe": part["recipe"], "weights": part["weights_sha256"]}
        runs.append(own | {"prior": prior, "share": part["share"]})
        # Once for each run, of which a submission may have several predictions.
        sources[run.name] = provenance(run.name, run.recipe, run.info.folds_sha256, run.info.track, run.info.commit)
    bundle = {
        "id": id,
        "track": submission["track"],
        "labels": run.info.labels,
        "mean": submission["mean"],
        "runs": runs,
        "gpu": gpu,
        "budget_minutes": target.minutes or facts_of(target.competition).kernel_minutes["gpu" if gpu else "cpu"],
        "provenance": list(sources.values()),
    }
    made_from, facts = {"submission": submission["files"]["submission.csv"]}, {"competition": submission["competition"]}
    attached = {"kernel_sources": [source] if source else []}
    return build(home, Plan("infer", id, target, bundle, made_from, weights, facts, attached))


def build_copy(home: Home, id: str, target: Target) -> Built:
    """Build the kernel that copies a finished `submission.csv`, which is mounted as a dataset.

    Raises:
        MelfoldError: no such submission.
    """
    submission = open_submission(home, id)
    sha256 = submission["files"]["submission.csv"]
    (path,) = submission_artefact(home, id).files
    bundle = {
        "id": id,
        "submission_sha256": sha256,
        "budget_minutes": COPY_MINUTES,
        "provenance": [{"submission": id, "track": submission["track"], "sha256": sha256}],
    }
    weights, facts = {"submission.csv": path}, {"competition": submission["competition"]}
    return build(home, Plan("copy_csv", id, replace(target, gpu=False), bundle, {"submission": sha256}, weights, facts))


def provenance(run: str, recipe: Recipe, folds_sha256: str, track: str, commit: str) -> dict[str, str]:
    """Where the numbers of a run come from."""
    return {
        "run": run,
        "recipe": recipe.fingerprint(),
        "folds_sha256": folds_sha256,
        "logmel": recipe.logmel.fingerprint(),
        "track": track,
        "commit": commit,
    }


@dataclass(frozen=True)
class Plan:
    """What a kernel is to do.

    Args:
        kind: `infer`, `train` or `copy_csv`: its folder in `kernels/`.
        name: of the submission or run.
        bundle: what the script is told to do.
        made_from: inputs beside the script and the weights.
        weights: file name in the dataset -> file, which may be a submission; without any, there is no dataset.
        facts: what else `build.json` says.
        metadata: what is attached, and whether there is a network.
        session: of a training kernel; else 0.
    """

    kind: str
    name: str
    target: Target
    bundle: dict[str, Any]
    made_from: dict[str, Any]
    weights: dict[str, Path]
    facts: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    session: int = 0


def build(home: Home, plan: Plan) -> Built:
    """Build a kernel, unless it exists and was made from the same inputs. A build replaces the one before it as a whole.

    Raises:
        MelfoldError: a script that would be too large.
    """
    target, budget = plan.target, plan.bundle["budget_minutes"]
    script, parts = make_script(plan.kind, plan.bundle)
    sums = {file: sha256_file(path) for file, path in sorted(plan.weights.items())}
    # A dataset is named by its content: one that was uploaded completely is never replaced.
    content = "submission" if plan.kind == "copy_csv" else "weights"
    dataset = f"{target.owner}/melfold-{content}-{digest(sums)[:16]}" if sums else ""
    built = built_for(home, plan.kind, plan.name, plan.session)
    kernel = f"{target.owner}/{built.folder.name}"
    metadata = _metadata(plan, kernel, dataset)
    made_from = plan.made_from | parts | {"weights": sums, "metadata": metadata}
    changes = built.artefact.changes(made_from)
    if not changes:
        return built
    if built.folder.exists():
        log.info("building %s again: %s", built.folder.name, listed(changes))
    temporary = Built(built.folder.with_name(f".{built.folder.name}.tmp"))
    shutil.rmtree(temporary.folder, ignore_errors=True)
    write_text(temporary.kernel / "kernel.py", script)
    write_json(temporary.kernel / "kernel-metadata.json", metadata)
    if dataset:
        _write_dataset(temporary.dataset, dataset, plan, sums)
    temporary.artefact.commit(
        made_from,
        kind=plan.kind,
        id=plan.name,
        **plan.facts,
        build_id=digest(parts),
        kernel=kernel,
        dataset=dataset,
        competition_slug=target.competition,
        limit_seconds=round(60 * min(budget + MARGIN_MINUTES[plan.kind], MOST_MINUTES)),
        budget_minutes=budget,
        gpu=target.gpu,
        provenance=plan.bundle["provenance"],
    )
    shutil.rmtree(built.folder, ignore_errors=True)
    temporary.folder.rename(built.folder)
    return built


def _metadata(plan: Plan, kernel: str, dataset: str) -> dict[str, Any]:
    """`kernel-metadata.json`: the one in `kernels/`, filled in."""
    metadata = json.loads(read_source(f"{plan.kind}/kernel-metadata.json"))
    if not plan.target.gpu:
        metadata.pop("machine_shape", None)
    filled = {
        "id": kernel,
        "title": title_for(plan.kind, plan.name, plan.session),
        "enable_gpu": plan.target.gpu,
        "competition_sources": [plan.target.competition],
    }
    attached = [*plan.metadata.get("dataset_sources", []), *([dataset] if dataset else [])]
    return metadata | filled | plan.metadata | {"dataset_sources": attached}


def _write_dataset(folder: Path, dataset: str, plan: Plan, sums: dict[str, str]) -> None:
    folder.mkdir()
    for file, path in plan.weights.items():
        try:
            os.link(path, folder / file)
        except OSError:  # another file system
            shutil.copyfile(path, folder / file)
    write_json(folder / "manifest.json", {"files": sums, "provenance": plan.bundle["provenance"]})
    title = dataset.split("/")[1].replace("-", " ")
    write_json(folder / "dataset-metadata.json", {"id": dataset, "title": title, "licenses": [{"name": "other"}]})

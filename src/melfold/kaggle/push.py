"""Push a built kernel, wait until it has run, and fetch what it made."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from melfold.artefacts import listed
from melfold.combine.check import check_submission
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.files import Home, read_json
from melfold.kaggle.built import Built
from melfold.kaggle.client import Kaggle, wait_until
from melfold.kaggle.command import KaggleError
from melfold.learn.runs import FoldFolder

log = logging.getLogger(__name__)

UPLOADS = 3  # attempts
DATASET_MINUTES = 60  # for Kaggle to process a dataset
QUEUE_MINUTES = 120  # for a kernel to get a machine
LOG_LINES = 5  # of a failed kernel's log that are shown


def push(client: Kaggle, built: Built, *, unrehearsed: bool = False) -> int:
    """Upload the weights, once, and push the kernel. Returns: the kernel's version.

    Raises:
        MelfoldError: changed or not rehearsed since it was built, or refused by Kaggle.
    """
    facts = built.verify()
    if not unrehearsed:
        _check_rehearsed(built)
    if facts["dataset"]:
        publish_dataset(client, built.dataset, facts["dataset"])
    if facts["gpu"] and (hours := client.gpu_hours()) is not None:
        log.info("%.1f GPU hours are left this week", hours)
    version = client.push_kernel(built.kernel, facts["limit_seconds"])
    built.push_stamp.commit(built.inputs, kernel=facts["kernel"], version=version)
    return version


def _check_rehearsed(built: Built) -> None:
    fix = "Run `melfold kernel rehearse`, or push with --unrehearsed"
    if changes := built.rehearsal_stamp.changes(built.inputs):
        raise MelfoldError("this kernel was not rehearsed since it was built", listed(changes), fix)
    if not built.passed:
        raise MelfoldError("this kernel did not pass its rehearsal", built.rehearsal_stamp.read()["failures"][0], fix)


def publish_dataset(client: Kaggle, folder: Path, dataset: str) -> None:
    """Make sure that Kaggle has a dataset, complete and ready.

    Args:
        folder: its files and `dataset-metadata.json`.
        dataset: `owner/slug`.

    Raises:
        MelfoldError: refused, still incomplete after several uploads, or not ready in time.
    """
    wanted = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "dataset-metadata.json"}
    for attempt in range(UPLOADS):
        status = client.dataset_status(dataset)
        try:
            if status is None:
                log.info("uploading %d files (%.0f MB) to %s", len(wanted), sum(wanted.values()) / 1e6, dataset)
                client.create_dataset(folder)
            elif status == "ready":
                if _is_complete(client, dataset, wanted):
                    return
                # One refused file leaves a dataset without it. A new version replaces all files.
                log.warning("dataset %s is incomplete: uploading it again", dataset)
                client.version_dataset(folder, "complete")
            elif status != "pending":
                raise KaggleError(f"dataset {dataset} is in a bad state", status, "Delete it on kaggle.com, then push again")
        except KaggleError as error:
            if error.outcome == "refused" or attempt == UPLOADS - 1:
                raise
            log.warning("%s; checking whether the upload arrived", error)
            client.wait(10)
            if client.dataset_status(dataset) is None:  # it did not
                continue
        if not wait_until(
            client,
            lambda: client.dataset_status(dataset) == "ready",
            minutes=DATASET_MINUTES,
            tell=lambda: log.info("waiting until dataset %s is ready", dataset),
        ):
            raise MelfoldError(f"dataset {dataset} is not ready", f"after {DATASET_MINUTES} minutes", "Push again later")
    if not _is_complete(client, dataset, wanted):
        raise MelfoldError(
            f"dataset {dataset} is incomplete", f"after {UPLOADS} uploads", "Look at it on kaggle.com, then push again"
        )


def _is_complete(client: Kaggle, dataset: str, wanted: dict[str, int]) -> bool:
    found = client.dataset_files(dataset)
    return all(name in found and found[name] in (0, size) for name, size in wanted.items())


def wait_for_kernel(client: Kaggle, built: Built) -> Path:
    """Wait until the pushed version has run; fetch its log and output.

    Returns:
        The folder of its output.

    Raises:
        MelfoldError: it failed, or its output belongs to another build.
    """
    facts = built.facts
    if changes := built.push_stamp.changes(built.inputs):
        raise MelfoldError("this kernel was not pushed since it was built", listed(changes), "Run `melfold kernel push`")
    kernel, version = facts["kernel"], built.push_stamp.read()["version"]
    status, message = _wait_until_ended(client, kernel, version, facts["limit_seconds"] / 60 + QUEUE_MINUTES)
    output = built.folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    try:
        client.kernel_output(kernel, version, output)
    except KaggleError:
        if status == "COMPLETE":
            raise
    if status != "COMPLETE":
        tail = [line.strip() for line in _log_text(output).splitlines() if line.strip()][-LOG_LINES:]
        said = "; its log ends: ".join(filter(None, [message, " | ".join(tail)[-600:]])) or "no message"
        raise MelfoldError(f"kernel {kernel} version {version} ended with {status}", said, f"The whole log is in {output}")
    record = read_json(output / "melfold.json")
    if record["build_id"] != facts["build_id"]:
        raise MelfoldError(
            f"the output of kernel {kernel} belongs to another build", record["build_id"][:12], "Push again and wait for it"
        )
    return output


def _wait_until_ended(client: Kaggle, kernel: str, version: int, minutes: float) -> tuple[str, str]:
    """The status a kernel ended with, and Kaggle's message."""
    seen = [("", "")]

    def ended() -> bool:
        seen[0] = client.kernel_status(kernel, version)
        return seen[0][0] not in ("QUEUED", "RUNNING", "NEW_SCRIPT", "CANCEL_REQUESTED")

    def tell() -> None:
        log.info("waiting for kernel %s: %s", kernel, seen[0][0].lower())

    if not wait_until(client, ended, minutes=minutes, tell=tell):
        raise MelfoldError(f"kernel {kernel} has not ended", f"after {minutes:.0f} minutes", "Look at it on kaggle.com")
    return seen[0]


def _log_text(output: Path) -> str:
    text = "\n".join(p.read_text(errors="replace") for p in output.glob("*.log"))
    try:
        return "".join(entry.get("data", "") for entry in json.loads(text))
    except (ValueError, AttributeError):
        return text


def fetch_run(built: Built, output: Path, home: Home) -> Path:
    """Copy a training kernel's run into the home folder. Folds that are done there already stay.

    Args:
        output: the kernel's output.

    Returns:
        The run's folder.

    Raises:
        MelfoldError: no run in the output.
    """
    name = built.facts["id"]
    source, target = output / "runs" / name, home.runs / name
    if not (source / "run.json").exists():
        raise MelfoldError("the kernel left no run", str(source), "Its log says why")
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        own = target / path.name
        if path.is_dir() and not FoldFolder(own, path.name).done:
            shutil.rmtree(own, ignore_errors=True)
            shutil.copytree(path, own)
        elif path.is_file() and not own.exists():
            shutil.copy2(path, own)
    return target


def check_output(output: Path, competition: Competition) -> None:
    """Check a kernel's submission against the competition.

    Raises:
        MelfoldError: with a line for each problem.
    """
    check_submission(output / "submission.csv", competition)

"""Push a built kernel, wait until it has run, and fetch what it made."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from melfold.artefacts import differences, listed
from melfold.combine.check import check_submission
from melfold.compute import Progress, silent
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.files import Home, read_json, sha256_file
from melfold.kaggle.built import Built
from melfold.kaggle.client import Kaggle, looks
from melfold.kaggle.command import KaggleError, Upload
from melfold.kernels.boot import RECORD
from melfold.learn.runs import FoldFolder, open_run

log = logging.getLogger(__name__)

UPLOADS = FETCHES = 3  # attempts
DATASET_MINUTES = 60  # for Kaggle to process a dataset
QUEUE_MINUTES = 120  # for a kernel to get a machine
RUNNING = ("QUEUED", "RUNNING", "NEW_SCRIPT", "CANCEL_REQUESTED")
LOG_LINES = 5  # of a failed kernel's log that are shown


def push(client: Kaggle, built: Built, *, unrehearsed: bool = False, progress: Progress = silent) -> int:
    """Upload the weights, once, and push the kernel. Returns: the kernel's version.

    Raises:
        MelfoldError: changed or not rehearsed since it was built, or refused by Kaggle.
    """
    facts = built.verify()
    fix = "Run `melfold kernel rehearse`, or push with --unrehearsed"
    if not unrehearsed and (changes := built.rehearsal_stamp.changes(built.inputs)):
        raise MelfoldError("this kernel was not rehearsed since it was built", listed(changes), fix)
    if not (unrehearsed or built.passed):
        raise MelfoldError("this kernel did not pass its rehearsal", built.rehearsal_stamp.read()["failures"][0], fix)
    if facts["dataset"]:
        publish_dataset(client, built.dataset, facts["dataset"], progress)
    if facts["gpu"] and (hours := client.gpu_hours()) is not None:
        log.info("%.1f GPU hours are left this week", hours)
    built.push_stamp.commit(built.inputs, kernel=facts["kernel"], version=0)  # if no answer comes, it may be running
    try:
        version = client.push_kernel(built.kernel, facts["limit_seconds"])
    except KaggleError as error:
        if error.outcome == "refused":
            built.push_stamp.remove()
        raise
    built.push_stamp.commit(built.inputs, kernel=facts["kernel"], version=version)
    return version


def is_there(client: Kaggle, built: Built) -> bool:
    """Whether Kaggle is running, or has run, a kernel of this name. Its output says whether it is this build."""
    try:
        status, _ = client.kernel_status(built.facts["kernel"], 0)
    except KaggleError as error:
        if error.outcome == "refused":
            return False
        raise
    return status in RUNNING or status == "COMPLETE"


def publish_dataset(client: Kaggle, folder: Path, dataset: str, progress: Progress = silent) -> None:
    """Make sure that Kaggle has a dataset, complete and ready. An upload that was stopped is continued.

    Args:
        folder: its files and `dataset-metadata.json`.

    Raises:
        MelfoldError: refused, still incomplete after several uploads, or not ready in time.
    """
    upload = Upload(folder.with_name("uploads"), lambda name, percent: progress(percent, 100, f"uploading {name}"))
    wanted = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "dataset-metadata.json"}
    for attempt in range(UPLOADS + 1):
        status = client.dataset_status(dataset)
        if status not in (None, "ready", "pending"):
            raise KaggleError(f"dataset {dataset} is in a bad state", status, "Delete it on kaggle.com, then push again")
        found = client.dataset_files(dataset) if status == "ready" else {}
        if found and all(found.get(name) in (0, size) for name, size in wanted.items()):
            shutil.rmtree(upload.folder, ignore_errors=True)
            return
        if attempt == UPLOADS:
            break
        try:
            if status is None:
                log.info("uploading %d files (%.0f MB) to %s", len(wanted), sum(wanted.values()) / 1e6, dataset)
                client.publish_dataset(folder, upload)
            elif status == "ready":
                # One refused file leaves a dataset without it. A new version replaces all files.
                log.warning("dataset %s is incomplete: uploading it again", dataset)
                shutil.rmtree(upload.folder, ignore_errors=True)  # what it says may be the reason
                client.publish_dataset(folder, upload, new=False)
        except KaggleError as error:
            if error.outcome == "refused" or attempt == UPLOADS - 1:
                raise
            log.warning("%s; checking whether the upload arrived", error)
            client.wait(10)
            if client.dataset_status(dataset) is None:  # it did not
                continue
        for _ in looks(client, minutes=DATASET_MINUTES):
            if client.dataset_status(dataset) == "ready":
                break
            log.info("waiting until dataset %s is ready", dataset)
        else:
            raise MelfoldError(f"dataset {dataset} is not ready", f"after {DATASET_MINUTES} minutes", "Push again later")
    fix = "Look at it on kaggle.com, then push again"
    raise MelfoldError(f"dataset {dataset} is incomplete", f"after {UPLOADS} uploads", fix)


def wait_for_kernel(client: Kaggle, built: Built) -> Path:
    """Wait until the pushed version has run; fetch its log and output. Returns: their folder.

    Raises:
        MelfoldError: it failed, or its output belongs to another build.
    """
    facts = built.facts
    if changes := built.push_stamp.changes(built.inputs):
        raise MelfoldError("this kernel was not pushed since it was built", listed(changes), "Run `melfold kernel push`")
    kernel, version = facts["kernel"], built.push_stamp.read()["version"]
    status, message = _wait_until_ended(client, kernel, version, facts["limit_seconds"] / 60 + QUEUE_MINUTES)
    output = built.folder / "output"
    if status != "COMPLETE":
        built.push_stamp.remove()  # so that it can be pushed again
        shutil.rmtree(output, ignore_errors=True)
        with suppress(KaggleError):
            client.kernel_output(kernel, version, output)
        said = "; its log ends: ".join(filter(None, [message, _end_of_log(output)])) or "no message"
        raise MelfoldError(f"kernel {kernel} version {version} ended with {status}", said, f"The whole log is in {output}")
    record = _fetch(client, kernel, version, output)
    if record["build_id"] != facts["build_id"]:
        built.push_stamp.remove()
        raise MelfoldError(
            f"the output of kernel {kernel} belongs to another build", record["build_id"][:12], "Push again and wait for it"
        )
    return output


def _fetch(client: Kaggle, kernel: str, version: int, output: Path) -> dict[str, Any]:
    """Fetch a kernel's output and log; again, if files are not as the kernel's own record says (kaggle 2.2.4 saves an error page
    as the file). Returns: that record."""
    for _ in range(FETCHES):
        shutil.rmtree(output, ignore_errors=True)
        client.kernel_output(kernel, version, output)
        try:
            record = read_json(output / RECORD)
            files = [(name, output / name, sha256) for name, sha256 in record["files"].items()]
            damaged = [name for name, path, sha256 in files if not path.is_file() or sha256_file(path) != sha256]
        except (MelfoldError, KeyError, AttributeError):
            damaged = [RECORD]
        if not damaged:
            return record
        log.warning("%d files of the output of %s are missing or damaged", len(damaged), kernel)
        client.wait(10)
    raise MelfoldError(f"the output of kernel {kernel} is damaged", f"{damaged[0]}, after {FETCHES} downloads", "Try again later")


def _wait_until_ended(client: Kaggle, kernel: str, version: int, minutes: float) -> tuple[str, str]:
    """The status a kernel ended with, and Kaggle's message. Meanwhile its log is shown."""
    stop: Callable[[float], None] | None = None
    try:
        for _ in looks(client, minutes=minutes):
            status, message = client.kernel_status(kernel, version)
            if status not in RUNNING:
                return status, message
            if status == "RUNNING" and not stop:
                stop = client.follow_log(kernel, version, lambda line: log.info("%s | %s", kernel.split("/")[1], line))
            log.info("waiting for kernel %s: %s", kernel, status.lower())
    finally:
        if stop:
            stop(5 * client.pace)
    raise MelfoldError(f"kernel {kernel} has not ended", f"after {minutes:.0f} minutes", "Look at it on kaggle.com")


def _end_of_log(output: Path) -> str:
    text = "\n".join(p.read_text(errors="replace") for p in output.glob("*.log"))
    with suppress(ValueError, AttributeError):
        text = "".join(entry.get("data", "") for entry in json.loads(text))
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-LOG_LINES:])[-600:]


def fetch_run(built: Built, output: Path, home: Home) -> Path:
    """Verify the run in a training kernel's output and copy it into the home folder. Folds that are done there already stay.

    Raises:
        MelfoldError: no run in the output, one that was damaged on its way, or another run of this name here.
    """
    name = built.facts["id"]
    source, target = output / "runs" / name, home.runs / name
    if not (source / "run.json").exists():
        raise MelfoldError("the kernel left no run", str(source), "Its log says why")
    run = open_run(Home(output), name)
    for fold in run.done_folds():
        run.fold(fold).verify()
    if (target / "run.json").exists():
        ours, theirs = (each.recipe.training() | each.info.made_from() for each in (open_run(home, name), run))
        if changes := differences(ours, theirs):
            what, fix = f"run {name} here was trained with different settings", f"Move it away: melfold runs mv {name} NAME"
            raise MelfoldError(what, listed(changes), f"{fix}; then repeat the command")
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "run.json"):  # last: it makes the folder a run
        own, temporary = target / path.name, target / f".{path.name}.tmp"
        if not (FoldFolder(own, path.name).done if path.is_dir() else own.exists()):
            shutil.rmtree(temporary, ignore_errors=True)
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, temporary)
            shutil.rmtree(own, ignore_errors=True)
            temporary.rename(own)
    return target


def check_output(output: Path, competition: Competition) -> None:
    """Check a kernel's submission against the competition, and that it is more than the prior.

    Raises:
        MelfoldError: a line for each problem of the file; a kernel that predicted nothing, or not all clips in its time.
    """
    check_submission(output / "submission.csv", competition)
    record = read_json(output / RECORD)
    if "passes" not in record:  # a copy
        return
    passes, clips = record["passes"], record["clips"]
    done = sum(p["done"] for p in passes)
    if not done:
        found = f"0 of {len(passes)} passes are done"
        raise MelfoldError(
            "the kernel predicted nothing: its submission holds the prior alone", found, f"See its log in {output}"
        )
    if record["late"]:
        found, fix = f"{record['late']} of {clips} clips keep the prior", "`melfold submit ID --kernel` submits it all the same"
        raise MelfoldError("the kernel had no time for all log-mels", found, fix)
    if record["unreadable"]:
        log.warning("THE KERNEL COULD NOT READ %d of %d clips: they keep the prior", record["unreadable"], clips)
    if done < len(passes):
        log.warning("the kernel did %d of %d passes; its log in %s says why", done, len(passes), output)

"""Build and push kernels: a script that holds the package, and a dataset that holds the weights."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import shutil
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from melfold.combine.check import check_submission
from melfold.combine.oof import prior_of
from melfold.combine.submission import open_submission
from melfold.config import Recipe
from melfold.data.competition import Competition, with_bad_clips
from melfold.errors import MelfoldError
from melfold.facts import facts_of
from melfold.files import Home, digest, read_json, sha256_file, write_json, write_text
from melfold.kaggle.client import Kaggle, KaggleError, wait_until
from melfold.learn.predictions import open_prediction
from melfold.learn.provenance import current_commit
from melfold.learn.runs import Run, open_run

log = logging.getLogger(__name__)

MOST_BYTES = 1_000_000
"""Kaggle refuses a larger kernel source, without saying so."""

_PACKAGE = Path(str(resources.files("melfold")))

LEFT_OUT = ("__main__.py", "cli", "pipeline.py", "dry_run.py", "kaggle", "report", "data/demo.py")
"""Of the package, what no kernel needs."""

_BOOT = '''"""{title}: made by `melfold kernel build`; sources and readable text are in the melfold repository."""
import base64, io, json, os, sys, time, zipfile
from pathlib import Path

STARTED = time.monotonic()

ROOT = Path(os.environ.get("MELFOLD_KERNEL_ROOT", "/"))
os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / "tmp" / "numba"))
BUNDLE = json.loads({bundle!r})
SOURCE = ROOT / "tmp" / ("melfold-" + BUNDLE["build_id"][:12])
if not (SOURCE / "melfold").exists():
    PACK = zipfile.ZipFile(io.BytesIO(base64.b85decode({packed!r})))
    PACK.extractall(str(SOURCE) + f".{{os.getpid()}}")
    try:
        os.rename(str(SOURCE) + f".{{os.getpid()}}", SOURCE)
    except OSError:
        pass  # another process of this kernel was first
sys.path.insert(0, str(SOURCE))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
import melfold
assert Path(melfold.__file__).is_relative_to(SOURCE), melfold.__file__

'''


@dataclass(frozen=True)
class Built:
    """A kernel ready to be rehearsed and pushed: `kernel/`, `dataset/` (where it has weights) and the facts of both."""

    folder: Path

    @property
    def kernel(self) -> Path:
        return self.folder / "kernel"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    @property
    def facts(self) -> dict[str, Any]:
        """`build.json`.

        Raises:
            MelfoldError: no built kernel.
        """
        if not (self.folder / "build.json").exists():
            raise MelfoldError("no built kernel", str(self.folder), "Run `melfold kernel build`")
        return read_json(self.folder / "build.json")

    @property
    def sha256(self) -> str:
        """The hash of all that would be pushed."""
        files = sorted(p for d in (self.kernel, self.dataset) if d.exists() for p in d.iterdir())
        return digest([(p.parent.name, p.name, sha256_file(p)) for p in files])

    def noted(self, name: str) -> dict[str, Any] | None:
        """`rehearsal.json` or `pushed.json`, where it is of this very build."""
        path = self.folder / name
        found = read_json(path) if path.exists() else None
        return found if found and found.get("sha256") == self.sha256 else None


def slug_of(title: str) -> str:
    """The slug Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def title_for(kind: str, name: str) -> str:
    """A kernel's title, of which its slug follows: at most 50 characters, cut names told apart by a hash."""
    words = slug_of(f"melfold {kind} {name}")
    return words.replace("-", " ") if len(words) <= 50 else f"{words[:41].rstrip('-')}-{digest(name)[:8]}".replace("-", " ")


def build_infer(
    home: Home,
    id: str,
    owner: str,
    competition_slug: str,
    *,
    budget: dict[str, int] | None = None,
    gpu: bool = True,
    source: str = "",
) -> Built:
    """Build the kernel that makes a submission anew from its runs' weights.

    Args:
        source: a training kernel (`owner/slug`) whose output holds the weights; without, a dataset of them is built.

    Raises:
        MelfoldError: no such submission, a run that has changed since, or a script that would be too large.
    """
    recipe = open_submission(home, id)
    runs, files = [], {}
    for part in recipe["runs"]:
        label = f"{part['name']}@{part['prediction']}" if part["prediction"] else part["name"]
        prediction = open_prediction(home, label)
        run = prediction.run
        if part["weights_sha256"] != run.weights_sha256(run.used_folds()):
            raise MelfoldError(f"run {run.name} has changed since submission {id} was built", str(run.folder), "Build it anew")
        for fold in run.used_folds():
            run.fold(fold).verify()
            files[f"{run.name}-{run.fold(fold).path.name}.safetensors"] = run.fold(fold).weights
        prior = {name: float(value) for name, value in prior_of(prediction).items()}
        member = {"name": label, "recipe": part["recipe"], "weights": part["weights_sha256"], "prior": prior}
        runs.append(member | {"share": part["share"]})
    bundle = {
        "id": id,
        "track": recipe["track"],
        "labels": run.info.labels,
        "mean": recipe["mean"],
        "runs": runs,
        "budget_minutes": budget or facts_of(competition_slug).kernel_minutes,
    }
    facts = {
        "kind": "infer",
        "id": id,
        "competition": recipe["competition"],
        "submission_sha256": recipe["files"]["submission.csv"],
        "provenance": _provenance([open_run(home, part["name"]) for part in recipe["runs"]]),
    }
    return _build(home, "infer", id, owner, competition_slug, bundle, files, facts, gpu=gpu, source=source)


def build_train(
    home: Home,
    recipe: Recipe,
    name: str,
    table: Path,
    competition: Competition,
    owner: str,
    competition_slug: str,
    *,
    folds: list[int | str],
    session: int = 1,
    minutes: int = 11 * 60,
    gpu: bool = True,
) -> Built:
    """Build a kernel that trains folds, and goes on from the output of the session before.

    Args:
        table: the fold table, which travels inside the script.
        session: 1, or a later one, which takes up where the one before was stopped.
        minutes: the session's length; training stops in time to save.

    Raises:
        MelfoldError: weights that would have to be downloaded, or a script that would be too large.
    """
    recipe = with_bad_clips(recipe, competition)
    if recipe.model.weights == "hub":
        raise MelfoldError(
            "a kernel has no network to download weights", "model.weights = hub", "Use --set model.weights=file:PATH"
        )
    if recipe.noisy.teacher:
        raise MelfoldError(
            "a kernel cannot ask a teacher", f"noisy.teacher = {recipe.noisy.teacher}", "Train this recipe where its teacher is"
        )
    files = {}
    wanted = ""
    if recipe.model.weights.startswith("file:"):
        path = Path(recipe.model.weights.removeprefix("file:")).expanduser()
        if path.suffix != ".safetensors":
            raise MelfoldError("a kernel takes weights as safetensors", path.name, "Convert the file")
        files[path.name] = path
        wanted = sha256_file(path)
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": f"file:{path.name}"})})
    bundle = {
        "name": name,
        "recipe": recipe.model_dump(mode="json"),
        "folds_name": table.name,
        "folds_table": table.read_text(),
        "folds": [str(fold) for fold in folds],
        "weights_sha256": wanted,
        "labels": list(competition.labels),
        "budget_minutes": minutes,
        "track": recipe.track,
    }
    facts = {
        "kind": "train",
        "id": name,
        "competition": competition.name,
        "provenance": [
            {
                "run": name,
                "recipe": recipe.fingerprint(),
                "folds_sha256": sha256_file(table),
                "logmel": recipe.logmel.fingerprint(),
                "track": recipe.track,
                "commit": current_commit(),
            }
        ],
    }
    before = f"{owner}/{slug_of(title_for('train', f'{name} s{session - 1}'))}" if session > 1 else ""
    return _build(
        home, "train", f"{name} s{session}", owner, competition_slug, bundle, files, facts, gpu=gpu, source=before, keep=True
    )


def _provenance(runs: list[Run]) -> list[dict[str, str]]:
    return [
        {
            "run": run.name,
            "recipe": run.recipe.fingerprint(),
            "folds_sha256": run.info.folds_sha256,
            "logmel": run.recipe.logmel.fingerprint(),
            "track": run.info.track,
            "commit": run.info.commit,
        }
        for run in runs
    ]


def _build(
    home: Home,
    kind: str,
    name: str,
    owner: str,
    competition_slug: str,
    bundle: dict[str, Any],
    files: dict[str, Path],
    facts: dict[str, Any],
    *,
    gpu: bool,
    source: str,
    keep: bool = False,
) -> Built:
    title = title_for(kind, name)
    packed = base64.b85encode(pack_source())
    bundle["provenance"] = facts["provenance"]
    bundle["build_id"] = digest([bundle, packed.decode(), _main_source(kind)])
    script = _BOOT.format(title=title, bundle=json.dumps(bundle), packed=packed) + _main_source(kind)
    size = len(script.encode())
    if size >= MOST_BYTES:
        raise MelfoldError("the kernel's script is too large for Kaggle", f"{size:,} bytes, under {MOST_BYTES:,} wanted")
    target = home.root / "build" / "kernels" / slug_of(title)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    built = Built(temporary)
    built.kernel.mkdir(parents=True)
    dataset = ""
    if files and (not source or keep):
        sums = {file: sha256_file(path) for file, path in sorted(files.items())}
        # A dataset is named by its contents: what was uploaded once is complete and is never replaced.
        dataset = f"melfold-weights-{digest(sums)[:16]}"
        built.dataset.mkdir()
        for file, path in files.items():
            _link(path, built.dataset / file)
        write_json(built.dataset / "manifest.json", {"files": sums, "provenance": facts["provenance"]})
        metadata = {"id": f"{owner}/{dataset}", "title": dataset.replace("-", " "), "licenses": [{"name": "other"}]}
        write_json(built.dataset / "dataset-metadata.json", metadata)
    write_text(built.kernel / "kernel.py", script)
    metadata = {
        "id": f"{owner}/{slug_of(title)}",
        "title": title,
        "code_file": "kernel.py",
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": gpu,
        "enable_tpu": False,
        "enable_internet": False,
        "dataset_sources": [f"{owner}/{dataset}"] if dataset else [],
        "competition_sources": [competition_slug],
        "kernel_sources": [source] if source else [],
        "model_sources": [],
    } | ({"machine_shape": "NvidiaTeslaT4"} if gpu else {})
    write_json(built.kernel / "kernel-metadata.json", metadata)
    minutes = bundle["budget_minutes"]
    limit = (max(minutes.values()) if isinstance(minutes, dict) and not gpu else minutes["gpu"]) if kind == "infer" else minutes
    facts |= {
        "build_id": bundle["build_id"],
        "kernel": metadata["id"],
        "dataset": f"{owner}/{dataset}" if dataset else "",
        "competition_slug": competition_slug,
        "limit_seconds": 60 * limit,
        "budget_minutes": minutes,
        "gpu": gpu,
    }
    write_json(temporary / "build.json", facts)
    for name_ in ("rehearsal.json", "pushed.json"):
        if (target / name_).exists():  # they carry the hash of what they are about: stale ones are not believed
            shutil.copy2(target / name_, temporary / name_)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return Built(target)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _main_source(kind: str) -> str:
    path = _PACKAGE.parents[1] / "kernels" / kind / "main.py"
    if not path.exists():
        raise MelfoldError("the kernels' sources are missing", str(path), "Run melfold from a clone of its repository")
    text = path.read_text().replace("from __future__ import annotations\n", "", 1)
    return text.replace("STARTED = time.monotonic()\n", "", 1)  # the clock has begun in the lines before


def pack_source() -> bytes:
    """The package's source as a zip: the same bytes for the same source."""
    root = _PACKAGE
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as pack:
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.toml")]):
            inner = path.relative_to(root)
            if not any(inner.as_posix() == out_ or inner.parts[0] == out_ for out_ in LEFT_OUT):
                pack.writestr(zipfile.ZipInfo(f"melfold/{inner.as_posix()}"), path.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    return out.getvalue()


def push(client: Kaggle, built: Built, *, unrehearsed: bool = False) -> int:
    """Upload the weights, once, and push the kernel. Returns: the kernel's version.

    Raises:
        MelfoldError: not rehearsed since it was built, or refused by Kaggle.
    """
    facts = built.facts
    if not unrehearsed and not (built.noted("rehearsal.json") or {}).get("blessed"):
        raise MelfoldError(
            "this kernel was not rehearsed since it was built",
            str(built.folder),
            "Run `melfold kernel rehearse`, or --unrehearsed",
        )
    if facts["dataset"]:
        _publish(client, built, facts["dataset"])
    version = client.push_kernel(built.kernel, facts["limit_seconds"])
    pushed = {"sha256": built.sha256, "kernel": facts["kernel"], "version": version, "build_id": facts["build_id"]}
    write_json(built.folder / "pushed.json", pushed)
    return version


def _publish(client: Kaggle, built: Built, dataset: str) -> None:
    """Make sure that the dataset is there, whole and ready."""
    wanted = {p.name: p.stat().st_size for p in built.dataset.iterdir() if p.name != "dataset-metadata.json"}
    for attempt in range(3):
        status, failure = client.dataset_status(dataset), None
        try:
            if status is None:
                log.info("uploading %d files (%.0f MB) to %s", len(wanted), sum(wanted.values()) / 1e6, dataset)
                client.create_dataset(built.dataset)
            elif status == "ready":
                if _same(client.dataset_files(dataset), wanted):
                    return
                # One refused file leaves a dataset without it; a version replaces the whole.
                log.warning("dataset %s is incomplete: uploading it anew", dataset)
                client.version_dataset(built.dataset, "complete")
            elif status != "pending":
                raise KaggleError(f"dataset {dataset} is in a bad state", status, "Delete it on kaggle.com, push again")
        except KaggleError as error:
            if error.outcome == "refused" or attempt == 2:
                raise
            log.warning("%s; looking whether it arrived", error)
            failure = error
            client.wait(10)
        if not wait_until(
            client,
            lambda failure=failure: _ready(client, dataset, failure),
            minutes=60,
            tell=lambda: log.info("waiting until dataset %s is ready", dataset),
        ):
            raise MelfoldError(f"dataset {dataset} is not ready", "after 60 minutes", "Push again later")
    if not _same(client.dataset_files(dataset), wanted):
        raise MelfoldError(f"dataset {dataset} is incomplete", "after three uploads", "Look at it on kaggle.com, push again")


def _ready(client: Kaggle, dataset: str, failure: KaggleError | None) -> bool:
    status = client.dataset_status(dataset)
    if status is None and failure:
        raise failure
    return status == "ready"


def _same(found: dict[str, int], wanted: dict[str, int]) -> bool:
    return all(name in found and found[name] in (0, size) for name, size in wanted.items())


def wait_for_kernel(client: Kaggle, built: Built) -> Path:
    """Wait until the pushed version has run; fetch its log and output.

    Returns:
        The folder of its output.

    Raises:
        MelfoldError: it failed, or what came back is not of this build.
    """
    facts = built.facts
    pushed = built.noted("pushed.json")
    if not pushed:
        raise MelfoldError("this kernel was not pushed since it was built", str(built.folder), "Run `melfold kernel push`")
    kernel = facts["kernel"]
    seen = [("", "")]

    def look() -> bool:
        seen[0] = client.kernel_status(kernel)
        return seen[0][0] not in ("QUEUED", "RUNNING", "NEW_SCRIPT", "CANCEL_REQUESTED")

    minutes = facts["limit_seconds"] / 60 + 120  # the queue has its time too
    if not wait_until(
        client, look, minutes=minutes, tell=lambda: log.info("waiting for kernel %s: %s", kernel, seen[0][0].lower())
    ):
        raise MelfoldError(f"kernel {kernel} has not ended", f"after {minutes:.0f} minutes", "Look at it on kaggle.com")
    status, message = seen[0]
    output = built.folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    try:
        client.kernel_output(kernel, output)
    except KaggleError:
        if status == "COMPLETE":
            raise
    if status != "COMPLETE":
        tail = " ".join(_log_text(output).split())[-300:]
        raise MelfoldError(f"kernel {kernel} ended with {status}", message or tail or "no message", f"Its log is in {output}")
    record = read_json(output / "melfold.json")
    if record["build_id"] != facts["build_id"]:
        raise MelfoldError(
            f"kernel {kernel} shows the output of another build", record["build_id"][:12], "Push again and wait for it"
        )
    return output


def fetch_run(built: Built, output: Path, home: Home) -> Path:
    """Bring a training kernel's run home: folds that are done here already stay.

    Returns:
        The run's folder.
    """
    name = built.facts["id"]
    source, target = output / "runs" / name, home.runs / name
    if not (source / "run.json").exists():
        raise MelfoldError("the kernel left no run", str(source), "Its log says why")
    for path in sorted(source.iterdir()):
        there = target / path.name
        if path.is_dir() and not (there / "result.json").exists():
            shutil.rmtree(there, ignore_errors=True)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(path, there)
        elif path.is_file() and not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, there)
    return target


def _log_text(output: Path) -> str:
    text = "\n".join(p.read_text(errors="replace") for p in output.glob("*.log"))
    try:
        return "".join(entry.get("data", "") for entry in json.loads(text))
    except (ValueError, AttributeError):
        return text


def check_output(output: Path, competition: Competition) -> None:
    """Hold a kernel's submission against the competition.

    Raises:
        MelfoldError: with a line for each problem.
    """
    check_submission(output / "submission.csv", competition)

"""Run a built kernel as Kaggle would, with the network cut off, and say whether it may be pushed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from melfold.combine.check import check_submission
from melfold.data.competition import Competition
from melfold.errors import MelfoldError
from melfold.facts import DEFAULT, facts_of
from melfold.files import Home, read_json, write_json, write_text
from melfold.kaggle import sandbox
from melfold.kaggle.built import Built
from melfold.kernels.boot import NOT_STARTED
from melfold.probs import read_probs

log = logging.getLogger(__name__)

Layout = Literal["nested", "flat"]
LAYOUTS: tuple[Layout, ...] = ("nested", "flat")
"""How Kaggle mounts inputs: in `competitions/`, `datasets/<owner>/` and `notebooks/<owner>/`, or all side by side."""

REAL_SECONDS = facts_of(DEFAULT).mean_test_seconds
"""The mean length of a FAT2019 test clip."""

REAL_CLIPS = facts_of(DEFAULT).test_clips
"""Test clips of the two stages."""

MAX_DIFFERENCE = 1e-5
"""Between a kernel's probabilities and those predicted at home."""


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal found."""

    isolation: str
    failures: list[str]
    seconds: float
    peak_mib: float
    equality: str = ""
    predicted_seconds: dict[str, float] = field(default_factory=dict)
    log: str = ""

    @property
    def passed(self) -> bool:
        return not self.failures


def rehearse(
    built: Built,
    competition: Competition,
    home: Home,
    *,
    minutes: float = 5,
    isolation: str = "auto",
    keep: Path | None = None,
    python: Path | None = None,
) -> Rehearsal:
    """Run a kernel on a competition's real inputs in a new process and file tree, without a network.

    The inference kernel runs to its end in the nested mount layout, and up to its first submission in the flat one.

    Args:
        competition: the download that is mounted, without the truth of its test clips.
        minutes: how long a training kernel may run before it must save.
        isolation: `namespaces`, `prefix` (a path prefix and an audit hook), or `auto`: namespaces if the system has them.
        keep: a folder for the kernel's output and log; without it, they are deleted.
        python: the interpreter of another environment, such as one with the versions of Kaggle's image.

    Returns:
        What was found; it is also written to `rehearsal.json` beside the kernel.

    Raises:
        MelfoldError: no built kernel, one that was changed after the build, or an input that is missing here.
    """
    facts = built.verify()
    training = facts["kind"] == "train"
    limit = 60 * (minutes if training else max(facts["budget_minutes"].values()))
    if isolation == "auto":
        isolation = "namespaces" if sandbox.available() else "prefix"
    equality, predicted = "", {}
    with tempfile.TemporaryDirectory(prefix="melfold-rehearsal-") as folder:
        stages = (_Stage(built, competition, home, Path(folder) / layout, layout, isolation, python) for layout in LAYOUTS)
        stage = next(stages)
        run = stage.run(limit, {"MELFOLD_MINUTES": str(minutes)} if training else {})
        failures = run.failures
        if not failures and training:
            failures = _judge_train(stage.working)
        elif not failures:
            failures, equality, predicted = _judge_infer(stage.working, facts, competition, home)
            failures += _try_set_up(next(stages), limit) if not failures else []
        if keep:
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(stage.working, keep)
            write_text(keep / "log.txt", run.log)
    found = Rehearsal(isolation, failures, round(run.seconds, 1), round(run.peak_mib), equality, predicted, run.log)
    built.rehearsal_stamp.commit(built.inputs, passed=found.passed, **asdict(found))
    return found


def _try_set_up(stage: _Stage, limit: float) -> list[str]:
    """Failures of a kernel that runs up to its first submission."""
    run = stage.run(limit, {"MELFOLD_STOP_AFTER_SETUP": "1"})
    failures = run.failures or ([] if (stage.working / "submission.csv").exists() else ["no submission.csv"])
    return [f"in the {stage.layout} layout: {failure}" for failure in failures]


@dataclass(frozen=True)
class _Run:
    failures: list[str]
    seconds: float
    peak_mib: float
    log: str


class _Stage:
    """A file tree as Kaggle lays it out, below `root`."""

    def __init__(
        self, built: Built, competition: Competition, home: Home, root: Path, layout: Layout, isolation: str, python: Path | None
    ) -> None:
        self.python = python or Path(sys.executable)
        self.built, self.root, self.layout, self.isolation = built, root, layout, isolation
        self.working, self.tmp, self.watch = root / "kaggle/working", root / "tmp", root / "watch"
        for path in (self.working, self.tmp, self.watch, root / "kaggle/src", root / "kaggle/input", root / "new"):
            path.mkdir(parents=True)
        write_text(self.watch / "sitecustomize.py", sandbox.WATCH)
        shutil.copy2(built.kernel / "kernel.py", root / "kaggle/src/script.py")
        self.record = self.watch / "record.txt"
        self.inputs = mounts(built, competition, home, root, layout)

    def run(self, limit: float, extra: dict[str, str]) -> _Run:
        """Run the script; kill it when it exceeds its limit."""
        before = _state(self.inputs.values())
        command, environment = self._command(extra)
        out = self.root / "log.txt"
        started = time.monotonic()
        with out.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.working,
                start_new_session=True,
            )
            try:
                peak, late = sandbox.wait(process, 1.05 * limit + 20)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        seconds = time.monotonic() - started
        text = out.read_text(errors="replace")
        failures = []
        if late:
            failures.append(f"it exceeds its time limit: still running after {seconds:.0f} s of {limit:.0f} s")
        elif process.returncode:
            tail = [line for line in text.splitlines() if line.strip()][-1:] or ["no output"]
            failures.append(f"it fails with exit code {process.returncode}: {tail[0][:300]}")
        return _Run(failures + self._violations(before), seconds, peak, text)

    def _violations(self, before: list[tuple[str, int, int]]) -> list[str]:
        """Uses of the network and writes to the inputs, whose state was `before`."""
        lines = sorted(set(self.record.read_text().splitlines())) if self.record.exists() else []
        network = [line.removeprefix("network: ") for line in lines if line.startswith("network: ")]
        counters = self.root / "counters"
        if not network and counters.exists() and int(counters.read_text() or 0):
            network = ["packets for which there was no route"]
        writes = [line.removeprefix("inputs: ") for line in lines if line.startswith("inputs: ")]
        if not writes and _state(self.inputs.values()) != before:
            writes = ["files have changed"]
        found = [f"it uses the network: {network[0]}"] if network else []
        return found + ([f"it writes to its inputs: {writes[0]}"] if writes else [])

    def _command(self, extra: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """The command, and its environment."""
        kept = ("PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LD_LIBRARY_PATH")
        environment = {name: os.environ[name] for name in kept if name in os.environ} | extra
        spaces = self.isolation == "namespaces"
        place = Path("/") if spaces else self.root
        environment |= {
            "HOME": str(place / "tmp"),
            "TMPDIR": str(place / "tmp"),
            "PYTHONPATH": str(place / "watch"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MELFOLD_WATCH": str(place / "watch" / self.record.name),
            "MELFOLD_KERNEL_ROOT": str(place),
        }
        if not spaces:
            link_inputs(self.inputs, self.root)
            tops = [self.root / "kaggle/input", *self.inputs.values()]
            environment |= {"MELFOLD_REFUSE": "1", "MELFOLD_INPUTS": os.pathsep.join(map(str, tops))}
            return [str(self.python), str(self.root / "kaggle/src/script.py")], environment
        environment["MELFOLD_INPUTS"] = "/kaggle/input"
        prefixes = sorted({str(self.python.parents[1]), str(self.python.resolve().parents[1]), sys.base_prefix})
        binds = [
            [str(self.tmp), "/tmp", False],
            # An interpreter below /tmp must stay visible.
            *([prefix, prefix, True] for prefix in prefixes if Path(prefix).is_relative_to("/tmp")),
            [str(self.working), "/kaggle/working", False],
            [str(self.root / "kaggle/src"), "/kaggle/src", True],
            [str(self.watch), "/watch", False],
            *([str(source), f"/{target}", True] for target, source in self.inputs.items()),
        ]
        spec = {
            "root": str(self.root / "new"),
            "binds": binds,
            "argv": [str(self.python), "/kaggle/src/script.py"],
            "env": environment,
            "cwd": "/kaggle/working",
            "counters": str(self.root / "counters"),
        }
        write_json(self.root / "spec.json", spec)
        command = [*sandbox.UNSHARE, sys.executable, sandbox.__file__, str(self.root / "spec.json")]
        return command, os.environ.copy()


def link_inputs(inputs: dict[str, Path], root: Path) -> None:
    """Lay out the inputs of a kernel below `root`, as symbolic links."""
    for target, source in inputs.items():
        path = root / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(source)


def mounts(built: Built, competition: Competition, home: Home, root: Path, layout: Layout) -> dict[str, Path]:
    """Mount point -> what is mounted: the competition without its test truth, the dataset, an earlier kernel's output.

    Args:
        root: a folder for files that the competition lacks.

    Raises:
        MelfoldError: an earlier kernel's output that was not fetched.
    """
    metadata, slug = read_json(built.kernel / "kernel-metadata.json"), built.facts["competition_slug"]
    base = f"kaggle/input/competitions/{slug}" if layout == "nested" else f"kaggle/input/{slug}"
    found: dict[str, Path] = {}
    sample = competition.root / "sample_submission.csv"
    if not sample.exists():
        sample = root / "sample_submission.csv"
        rows = "".join(f"{fname},{','.join('0' for _ in competition.labels)}\n" for fname in competition.test.index)
        write_text(sample, f"{','.join(['fname', *competition.labels])}\n{rows}")
    found[f"{base}/sample_submission.csv"] = sample
    for split, name in (("curated", "train_curated"), ("noisy", "train_noisy"), ("test", "test")):
        table = competition.split(split)  # type: ignore[arg-type]
        if len(table):
            found[f"{base}/{name}"] = Path(table["path"].iloc[0]).parent.resolve()
        for csv in (f"{name}.csv", f"FSDKaggle2019.meta/{name}_post_competition.csv"):
            if split != "test" and len(table) and (competition.root / csv).exists():
                found[f"{base}/{name}.csv"] = (competition.root / csv).resolve()
    for dataset in metadata["dataset_sources"]:
        name = f"datasets/{dataset}" if layout == "nested" else dataset.split("/")[1]
        for path in built.dataset.iterdir():
            if path.name != "dataset-metadata.json":
                found[f"kaggle/input/{name}/{path.name}"] = path.resolve()
    for kernel in metadata["kernel_sources"]:
        name = f"notebooks/{kernel}" if layout == "nested" else kernel.split("/")[1]
        output = home.root / "build" / "kernels" / kernel.split("/")[1] / "output"
        if not output.exists():
            raise MelfoldError(f"the output of kernel {kernel} is not here", str(output), "Fetch it: `kernel push DIR --wait`")
        found[f"kaggle/input/{name}"] = output.resolve()
    return found


def _state(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all files that are mounted."""
    files = [p for path in paths for p in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]


def _judge_infer(
    working: Path, facts: dict[str, Any], competition: Competition, home: Home
) -> tuple[list[str], str, dict[str, float]]:
    """Failures, how close it is to the submission made at home, and the expected seconds for the real numbers of clips."""
    path = working / "submission.csv"
    try:
        check_submission(path, competition)
        record = read_json(working / "melfold.json")
    except MelfoldError as error:
        return list(error.lines), "", {}
    failures = []
    passes, copied = record.get("passes", []), facts["kind"] == "copy_csv"
    skipped = [p for p in passes if not p["done"]]
    if not copied and (skipped or not passes):
        budget = record["budget_s"]
        failures.append(f"it exceeds its budget: {len(skipped)} of {len(passes)} passes do not fit into {budget:.0f} s")
    equality = ""
    at_home = home.submissions / facts["id"] / "submission.csv"
    if not at_home.exists():
        failures.append(f"there is nothing to compare with: {at_home} is missing")
    elif at_home.read_bytes() == path.read_bytes():
        equality = "the same bytes as at home"
    else:
        ours, theirs = read_probs(path), read_probs(at_home)
        same = list(ours.index) == list(theirs.index)
        apart = float(np.abs(ours.to_numpy() - theirs.to_numpy()).max()) if same else float("inf")
        equality = f"within {apart:.1e} of what was predicted at home"
        if apart > MAX_DIFFERENCE and not skipped:
            failures.append(
                f"its probabilities differ by {apart:.1e} from those predicted at home; {MAX_DIFFERENCE:.0e} is allowed"
            )
    if copied:
        return failures, equality, {}
    longer = max(1.0, REAL_SECONDS / max(record.get("audio_s", 0) / record["clips"], 1e-9)) if record.get("audio_s") else 1.0
    steady = record["cache_s"] - record["cache_start_s"] + sum(p.get("seconds", 0) for p in passes)
    start = record["setup_s"] + record["cache_start_s"]
    predicted = {str(clips): round(start + longer * steady * clips / record["clips"], 1) for clips in REAL_CLIPS}
    unknown = facts["gpu"] and record["device"] == "cpu"  # a CPU does not tell how long a GPU will take
    if predicted[str(REAL_CLIPS[1])] > record["budget_s"] and not skipped and not unknown:
        failures.append(
            f"it would exceed its budget: {predicted[str(REAL_CLIPS[1])]:.0f} s expected for {REAL_CLIPS[1]:,} clips,"
            f" {record['budget_s']:.0f} s allowed on {record['device']}"
        )
    return failures, equality, predicted


def _judge_train(working: Path) -> list[str]:
    try:
        state = read_json(working / "melfold.json")["folds"]
    except MelfoldError as error:
        return list(error.lines)
    return [] if any(value != NOT_STARTED for value in state.values()) else [f"nothing was trained: {json.dumps(state)}"]

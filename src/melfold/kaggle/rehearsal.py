"""Run a built kernel as Kaggle would, with the network cut off, and say whether it may be pushed."""

from __future__ import annotations

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

import numpy as np
import pandas as pd

from melfold.data.competition import Competition, load_competition
from melfold.facts import facts_of, join_labels
from melfold.files import Home, read_json, write_text
from melfold.kaggle import sandbox
from melfold.kaggle.built import Built
from melfold.kaggle.judge import judge_infer, judge_train
from melfold.kernels.boot import RECORD
from melfold.learn.shorten import few_clips

LAYOUTS = ("nested", "flat")
"""How Kaggle mounts inputs: in `competitions/`, `datasets/<owner>/` and `notebooks/<owner>/`, or all side by side."""

NOISE_RATE = 44_100
TRAIN_MINUTES = 10  # in which a rehearsed training kernel must end


@dataclass
class Rehearsal:
    """What a rehearsal found. `note`: what it cannot tell."""

    isolation: str
    failures: list[str]
    seconds: float
    peak_mib: float
    equality: str = ""
    note: str = ""
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
    isolation: str = "auto",
    keep: Path | None = None,
    python: Path | None = None,
) -> Rehearsal:
    """Run a kernel as Kaggle would, in a new process and file tree, without a network.

    An inference kernel gets the real test clips; it runs to its end in the nested mount layout, and up to its first submission in
    the flat one. A training kernel gets a few clips (made up where there is no audio), and does a few steps of one fold.
    What was found is also written to `rehearsal.json` beside the kernel.

    Args:
        competition: the download that is mounted, without the truth of its test clips.
        isolation: `namespaces`, `prefix` (a path prefix and an audit hook), or `auto`: namespaces if the system has them.
        keep: a folder for the kernel's output and log; without it, they are deleted.
        python: the interpreter of another environment, such as one with the versions of Kaggle's image.

    Raises:
        MelfoldError: no built kernel, one that was changed after the build, or an input that is missing here.
    """
    facts = built.verify()
    training = facts["kind"] == "train"
    longest = facts_of(facts["competition_slug"]).kernel_minutes["cpu"]
    limit = 60 * (TRAIN_MINUTES if training else max(facts["budget_minutes"], longest if facts["gpu"] else 0))
    settings = {"MELFOLD_REHEARSAL": "1", "MELFOLD_CPU_MINUTES": str(longest)}
    settings |= {} if facts["gpu"] else {"CUDA_VISIBLE_DEVICES": ""}
    if isolation == "auto":
        isolation = "namespaces" if sandbox.available() else "prefix"
    with tempfile.TemporaryDirectory(prefix="melfold-rehearsal-") as folder:
        if training:
            competition = write_few(competition, facts["n_folds"], Path(folder) / "few")
        stages = (_Stage(built, competition, home, Path(folder) / layout, layout, isolation, python) for layout in LAYOUTS)
        stage = next(stages)
        found = stage.run(limit, settings)
        if not found.failures and training:
            found.failures = judge_train(stage.working)
        elif not found.failures:
            found.failures, found.equality, found.predicted_seconds = judge_infer(stage.working, facts, competition, home)
            found.failures = found.failures or _try_set_up(next(stages), limit)
            record = stage.working / RECORD
            if facts["gpu"] and record.exists() and read_json(record).get("device") == "cpu":
                found.note = "This machine has no GPU: nothing is known of the time that the kernel takes on Kaggle's."
        if keep:
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(stage.working, keep, symlinks=True)
            write_text(keep / "log.txt", found.log)
    built.rehearsal_stamp.commit(built.inputs, passed=found.passed, **asdict(found))
    return found


def _try_set_up(stage: _Stage, limit: float) -> list[str]:
    """Failures of a kernel that runs up to its first submission."""
    failures = stage.run(limit, {"MELFOLD_STOP_AFTER_SETUP": "1"}).failures
    if not failures and not (stage.working / "submission.csv").exists():
        failures = ["no submission.csv"]
    return [f"in the {stage.layout} layout: {failure}" for failure in failures]


class _Stage:
    """A file tree as Kaggle lays it out, below `root`."""

    def __init__(
        self, built: Built, competition: Competition, home: Home, root: Path, layout: str, isolation: str, python: Path | None
    ) -> None:
        self.python = python or Path(sys.executable)
        self.root, self.layout, self.isolation = root, layout, isolation
        self.working, self.record = root / "kaggle/working", root / "watch/record.txt"
        for name in ("kaggle/working", "kaggle/src", "kaggle/input", "tmp", "watch"):
            (root / name).mkdir(parents=True)
        write_text(root / "watch/sitecustomize.py", sandbox.WATCH)
        shutil.copy2(built.kernel / "kernel.py", root / "kaggle/src/script.py")
        self.inputs = mounts(built, competition, home, root, layout)

    def run(self, limit: float, extra: dict[str, str]) -> Rehearsal:
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
        failures += self._violations(before)
        return Rehearsal(self.isolation, failures, round(seconds, 1), round(peak), log=text)

    def _violations(self, before: list[tuple[str, int, int]]) -> list[str]:
        """Uses of the network and writes to the inputs, whose state was `before`."""
        seen: dict[str, str] = {}
        for line in sorted(self.record.read_text().splitlines()) if self.record.exists() else ():
            seen.setdefault(*line.split(": ", 1))
        counters = self.root / "counters"
        if counters.exists() and int(counters.read_text() or 0):
            seen.setdefault("network", "packets for which there was no route")
        if _state(self.inputs.values()) != before:
            seen.setdefault("inputs", "files have changed")
        told = {"network": "uses the network", "inputs": "writes to its inputs", "outside": "writes outside its folders"}
        return [f"it {what}: {seen[kind]}" for kind, what in told.items() if kind in seen]

    def _command(self, extra: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """The command, and its environment."""
        kept = ("PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LD_LIBRARY_PATH")
        environment = {name: os.environ[name] for name in kept if name in os.environ} | extra
        spaces = self.isolation == "namespaces"
        top = "" if spaces else str(self.root)
        environment |= {
            "HOME": f"{top}/tmp",
            "TMPDIR": f"{top}/tmp",
            "PYTHONPATH": f"{top}/watch",
            "PYTHONDONTWRITEBYTECODE": "1",
            "MELFOLD_WATCH": f"{top}/watch/{self.record.name}",
            "MELFOLD_KERNEL_ROOT": top or "/",
            "MELFOLD_WRITABLE": os.pathsep.join([f"{top}/kaggle/working", f"{top}/tmp", "/dev"]),
            "MELFOLD_INPUTS": f"{top}/kaggle/input",
        }
        argv = [str(self.python), f"{top}/kaggle/src/script.py"]
        if not spaces:
            link_inputs(self.inputs, self.root)
            environment["MELFOLD_INPUTS"] += "".join(f"{os.pathsep}{source}" for source in self.inputs.values())
            return argv, environment | {"MELFOLD_REFUSE": "1"}
        prefixes = sorted({str(self.python.parents[1]), str(self.python.resolve().parents[1]), sys.base_prefix})
        binds = [
            [f"{self.root}/tmp", "/tmp", False],
            # An interpreter below /tmp must stay visible.
            *([prefix, prefix, True] for prefix in prefixes if Path(prefix).is_relative_to("/tmp")),
            [f"{self.root}/kaggle/working", "/kaggle/working", False],
            [f"{self.root}/kaggle/src", "/kaggle/src", True],
            [f"{self.root}/watch", "/watch", False],
            *([str(source), f"/{target}", True] for target, source in self.inputs.items()),
        ]
        spec = {"binds": binds, "argv": argv, "env": environment, "cwd": "/kaggle/working"}
        return sandbox.command(spec, self.root), {name: value for name, value in environment.items() if name in kept}


def link_inputs(inputs: dict[str, Path], root: Path) -> None:
    """Lay out the inputs of a kernel below `root`, as symbolic links."""
    for target, source in inputs.items():
        path = root / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(source)


def mounts(built: Built, competition: Competition, home: Home, root: Path, layout: str) -> dict[str, Path]:
    """Mount point -> what is mounted: the competition without its test truth, the dataset, an earlier kernel's output.

    Args:
        root: a folder for files that the competition lacks.
    """
    metadata, slug = read_json(built.kernel / "kernel-metadata.json"), built.facts["competition_slug"]
    base = f"kaggle/input/competitions/{slug}" if layout == "nested" else f"kaggle/input/{slug}"
    found: dict[str, Path] = {}
    sample = (competition.root / "sample_submission.csv").resolve()
    if not sample.exists():
        sample = write_sample(competition, root)
    found[f"{base}/sample_submission.csv"] = sample
    for split, name in (("curated", "train_curated"), ("noisy", "train_noisy"), ("test", "test")):
        table = competition.split(split)  # type: ignore[arg-type]
        if not len(table):
            continue
        if (folder := Path(table["path"].iloc[0]).parent.resolve()).is_dir():
            found[f"{base}/{name}"] = folder
        for rows in (f"{name}.csv", f"FSDKaggle2019.meta/{name}_post_competition.csv"):
            if split != "test" and (competition.root / rows).exists():
                found[f"{base}/{name}.csv"] = (competition.root / rows).resolve()
    if dataset := built.facts["dataset"]:
        name = f"datasets/{dataset}" if layout == "nested" else dataset.split("/")[1]
        for path in built.dataset.iterdir():
            if path.name != "dataset-metadata.json":
                found[f"kaggle/input/{name}/{path.name}"] = path.resolve()
    for kernel in metadata["kernel_sources"]:
        name = f"notebooks/{kernel}" if layout == "nested" else kernel.split("/")[1]
        output = home.root / "build" / "kernels" / kernel.split("/")[1] / "output"
        if output.exists():
            found[f"kaggle/input/{name}"] = output.resolve()
        elif built.facts["kind"] == "infer":  # the kernel itself checks that it finds the very same weights
            runs = {facts["run"] for facts in built.facts["provenance"]}
            found |= {f"kaggle/input/{name}/runs/{run}": (home.runs / run).resolve() for run in runs}
    return found


def write_few(whole: Competition, n_folds: int, folder: Path) -> Competition:
    """The first clips of a competition as a download in Kaggle's layout; noise in place of audio that is not here."""
    import soundfile

    few = few_clips(whole, n_folds)
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 2 * NOISE_RATE)
    for name, table in (("train_curated", few.curated), ("train_noisy", few.noisy), ("test", few.test)):
        if not len(table):
            continue
        (folder / name).mkdir(parents=True)
        for fname, path in table["path"].items():
            if path.is_file():
                shutil.copyfile(path, folder / name / fname)
            else:
                soundfile.write(folder / name / fname, noise, NOISE_RATE)
        if name != "test":
            table["labels"].map(join_labels).to_csv(folder / f"{name}.csv")
    write_sample(few, folder)
    return load_competition(folder)


def write_sample(competition: Competition, folder: Path) -> Path:
    """Write the `sample_submission.csv` of a competition."""
    pd.DataFrame(0, competition.test.index, competition.labels).to_csv(folder / "sample_submission.csv")
    return folder / "sample_submission.csv"


def _state(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all files that are mounted."""
    files = [p for path in paths for p in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in files if p.exists()]

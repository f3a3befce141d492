"""What every kernel shares: its folders and its clock, finding what is mounted, and how it reports."""

from __future__ import annotations

import fnmatch
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from melfold.errors import MelfoldError
from melfold.files import sha256_file, write_json

RECORD = "melfold.json"
"""What a kernel says about itself, in its output."""

NOT_STARTED = "not started"
"""The state of a fold in `melfold.json` before its first checkpoint."""


class Session:
    """One run of a kernel: what it was built to do, its folders, and its clock.

    Args:
        bundle: as built.
        root: `/`, or the folder in which a rehearsal lays out `/kaggle` and `/tmp`.
        started: what `clock` (seconds) said when the process started.
    """

    def __init__(self, bundle: dict[str, Any], root: Path, started: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.bundle, self.started, self.clock = bundle, started, clock
        self.inputs = root / "kaggle/input"
        self.working = root / "kaggle/working"  # kept as the kernel's output
        self.scratch = root / "tmp/melfold"
        self.rehearsal = "MELFOLD_REHEARSAL" in os.environ

    def elapsed(self) -> float:
        """Seconds since the process started."""
        return self.clock() - self.started

    def say(self, text: str) -> None:
        """Print a line of the kernel's log, with the time."""
        print(f"[{self.elapsed():7.1f} s] {text}", flush=True)

    def introduce(self, text: str) -> dict[str, str]:
        """Say which build this is, on which versions it runs and where its numbers come from. Returns: the versions."""
        versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "timm", "librosa", "numpy")}
        self.say(f"melfold {self.bundle['build_id'][:12]}: {text}")
        self.say(", ".join(f"{name} {number}" for name, number in versions.items()))
        for facts in self.bundle["provenance"]:
            self.say(", ".join(f"{key} {value[:16]}" for key, value in facts.items()))
        return versions

    def mounted(self, pattern: str) -> list[Path]:
        """The mounted files with such a name (`*.csv`), those near the top first.

        Kaggle mounts inputs in two layouts, so nothing is looked up by its path.
        """
        folders = os.walk(self.inputs, followlinks=True)
        found = [Path(folder, name) for folder, _, names in folders for name in fnmatch.filter(names, pattern)]
        return sorted(found, key=lambda path: (len(path.parts), path))

    def competition_folder(self, marker: str) -> Path:
        """The mounted competition, known by one of its files. Raises: MelfoldError: no such file."""
        if found := self.mounted(marker):
            return found[0].parent
        raise MelfoldError("no competition is mounted", f"no {marker} below {self.inputs}", "Add the competition's data")

    def weights(self, wanted: set[str]) -> dict[str, Path]:
        """Mounted files of weights by their SHA-256. Raises: MelfoldError: some are missing or damaged."""
        files = self.mounted("*.safetensors") if wanted else []
        found = {sha256: path for path in files if (sha256 := sha256_file(path)) in wanted}
        if missing := wanted - found.keys():
            seen = ", ".join(sorted(path.name for path in files)) or "none"
            what = f"{len(missing)} files of weights are missing or damaged"
            raise MelfoldError(what, f"found {seen}", "Push the dataset again")
        return found

    def write_record(self, record: dict[str, Any]) -> None:
        """Write `melfold.json`, with the hashes of all other files of the output: some may be damaged on their way home."""
        names = sorted(path for path in self.working.rglob("*") if path.is_file() and path.name != RECORD)
        files = {path.relative_to(self.working).as_posix(): sha256_file(path) for path in names}
        seconds = round(self.elapsed(), 2)
        write_json(self.working / RECORD, {"build_id": self.bundle["build_id"], "seconds": seconds, **record, "files": files})


def start(work: Callable[[Session], None], bundle: dict[str, Any], root: Path, started: float) -> None:
    """Do a kernel's work. A `MelfoldError` becomes lines of its log and exit code 2."""
    logging.basicConfig(format="melfold: %(message)s")
    logging.getLogger("melfold").setLevel(logging.INFO)
    session = Session(bundle, root, started)
    try:
        work(session)
    except MelfoldError as error:
        for line in error.lines:
            session.say(f"melfold: {line}")
        sys.exit(2)

"""Kaggle, as far as melfold uses it: each method is one call of the kaggle command, and only this module knows its arguments.

Every call has a time limit, since the command has none. Only calls that change nothing are repeated.
"""

from __future__ import annotations

import csv
import json
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from melfold.facts import DEFAULT, facts_of
from melfold.kaggle.command import LOGIN, KaggleError, Said, Upload, call, failure, follow, hint, last_line
from melfold.kaggle.courier import send

COMPETITION = facts_of(DEFAULT).slug
SLOWEST_UPLOAD = 100_000  # bytes per second; one that is slower is stopped


@dataclass(frozen=True)
class Submission:
    """A row of Kaggle's list of submissions. `status`: PENDING, COMPLETE or ERROR. Scores are None until Kaggle has them."""

    ref: str
    date: str
    description: str
    status: str
    public_score: float | None
    private_score: float | None


@dataclass(frozen=True)
class Kaggle:
    """Calls to Kaggle for one competition.

    Args:
        timeout: seconds for a call that moves little; uploads get more.
        pace: all waits between calls are multiplied by this; tests use less than 1.
    """

    competition: str = COMPETITION
    timeout: float = field(default_factory=lambda: float(os.environ.get("MELFOLD_KAGGLE_TIMEOUT", "120")))
    pace: float = field(default_factory=lambda: float(os.environ.get("MELFOLD_PACE", "1")))

    def username(self) -> str:
        """The account's name.

        Raises:
            KaggleError: no credentials.
        """
        found = re.search(r"^- username: (\S+)", self._ask("config", "view"), re.M)
        if not found or found[1] == "None":
            raise KaggleError("no Kaggle credentials", "the kaggle command knows no user name", LOGIN, code=401)
        return found[1]

    def remaining(self) -> int:
        """How many submissions are left today.

        Raises:
            KaggleError: among others for a kaggle command that does not show what it asks Kaggle for. After a call that was cut
                short it would be unknown whether it has submitted.
        """
        said = self._call("competitions", "submission-limits", self.competition, "--json", "-q", safe=True)
        if "GetSubmissionLimits" not in (said.asked or []):
            raise KaggleError("this version of the kaggle command shows no trace", "VERBOSE=true", "pip install kaggle==2.2.5")
        try:
            limits = json.loads(said.text[said.text.index("{") :])
            return int(limits.get("numAllowedNow", limits.get("num_allowed_now", 0)))
        except ValueError:
            raise KaggleError("kaggle: no submission limits", last_line(said.text)) from None

    def gpu_hours(self) -> float | None:
        """GPU hours that are left this week; None if Kaggle does not tell."""
        try:
            rows = _table(self._run("quota", "--csv"), "resource,")
            return next(float(row["remaining"].rstrip("h")) for row in rows or [] if row["resource"] == "GPU")
        except (KaggleError, ValueError, KeyError, StopIteration):
            return None

    def submissions(self) -> list[Submission]:
        """The latest 200, newest first."""
        out = self._ask("competitions", "submissions", self.competition, "--csv", "-q", "--page-size", "200")
        if "No submissions found" in out:
            return []
        rows = _table(out, "ref,")
        if rows is None:
            raise KaggleError("kaggle: the list of submissions cannot be read", last_line(out))
        return [
            Submission(
                ref=row.get("ref", ""),
                date=row["date"],
                description=row["description"],
                status=row["status"].rsplit(".", 1)[-1].upper(),
                public_score=_score(row["publicScore"]),
                private_score=_score(row["privateScore"]),
            )
            for row in rows
        ]

    def why_failed(self, ref: str) -> str:
        """Kaggle's own words about a submission that it could not score; empty if it has none, or before kaggle 2.2.5."""
        try:
            out = self._ask("competitions", "submission", ref)
        except KaggleError:
            return ""
        found = re.search(r"^Error:\s*(.*?)\n(?=Public Score:)", out, re.M | re.S)
        return " ".join(found[1].split()) if found else ""

    def submit_file(self, path: Path, message: str, record: Path) -> Said:
        """Submit a file. Whatever happens to this process, the call ends, and `record` says how."""
        args = ["-f", str(path), "-m", message, "-q"]
        return send(["competitions", "submit", self.competition, *args], 5 * self.timeout, record)

    def submit_kernel(self, kernel: str, version: int, message: str, record: Path) -> Said:
        """Submit `submission.csv` of a kernel version; as `submit_file`."""
        args = ["-k", kernel, "-v", str(version), "-f", "submission.csv", "-m", message, "-q"]
        return send(["competitions", "submit", self.competition, *args], self.timeout, record)

    def leaderboard(self) -> str:
        """The leaderboard as Kaggle's CSV: the Private one, once a competition is over."""
        content = self._download_one("competitions", "leaderboard", self.competition, "--download")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise KaggleError("kaggle: the leaderboard cannot be read", str(error), "Try again") from None

    def download_file(self, name: str) -> bytes:
        """The content of one of the competition's files."""
        return self._download_one("competitions", "download", self.competition, "-f", name, timeout=10 * self.timeout)

    def _download_one(self, *args: str, timeout: float | None = None) -> bytes:
        """The content of the only file of a download, which may come as a zip."""
        with tempfile.TemporaryDirectory(prefix="melfold-download-") as folder:
            self._ask(*args, "-p", folder, "-q", timeout=timeout, trace=False)
            for path in Path(folder).glob("*"):
                if path.suffix == ".kaggle-partial":
                    continue
                if path.suffix != ".zip":
                    return path.read_bytes()
                try:
                    with zipfile.ZipFile(path) as pack:
                        return pack.read(pack.namelist()[0])
                except (IndexError, zipfile.BadZipFile) as error:
                    raise KaggleError("kaggle: a download cannot be read", f"{path.name} ({error})", "Try again") from None
        raise KaggleError("kaggle: nothing was downloaded", " ".join(args), "Try again")

    def download(self, folder: Path, *, stall: float = 600) -> Path:
        """The competition's files as one archive in `folder`; a partial download is continued.

        Args:
            stall: seconds without a new byte after which the command is started again.

        Raises:
            KaggleError: among others when it stalls again and again.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._ask(
            *("competitions", "download", self.competition, "-p", str(folder), "-q"), timeout=stall, trace=False, growing=folder
        )
        found = sorted(folder.glob("*.zip"))
        if partial := sorted(folder.glob("*.kaggle-partial")):
            raise KaggleError("kaggle: the download is incomplete", partial[0].stem, "Run the command again to continue it")
        if not found:
            raise KaggleError("kaggle: nothing was downloaded", ", ".join(p.name for p in folder.iterdir()) or "an empty folder")
        return found[0]

    def dataset_status(self, dataset: str) -> str | None:
        """`ready`, `pending`, ...; None where there is no such dataset."""
        try:
            out = self._ask("datasets", "status", dataset)
        except KaggleError as error:
            if error.code in (403, 404):
                return None
            raise
        return last_line(out).lower().rsplit(".", 1)[-1]

    def dataset_files(self, dataset: str) -> dict[str, int]:
        """Names and bytes of a dataset's files."""
        rows = _table(self._ask("datasets", "files", dataset, "--csv", "--page-size", "200"), "name,") or []
        return {row["name"]: int(row.get("size") or row.get("totalBytes") or 0) for row in rows}

    def publish_dataset(self, folder: Path, upload: Upload | None = None, *, new: bool = True) -> None:
        """Upload a folder's files as a new private dataset, or as a version that replaces all files of the previous one."""
        size = sum(path.stat().st_size for path in folder.iterdir())
        timeout = 5 * self.timeout + size / SLOWEST_UPLOAD
        how = ["create"] if new else ["version", "-m", "complete"]
        out = self._run("datasets", *how, "-p", str(folder), timeout=timeout, upload=upload)
        if "is being created" not in out:
            raise KaggleError("kaggle: the dataset was not published", last_line(out) or "no output", outcome="doubtful")

    def push_kernel(self, folder: Path, seconds: int) -> int:
        """Push a kernel; it runs at once. Returns: its version.

        Raises:
            KaggleError: refused, or accepted without one of its sources.
        """
        out = self._run("kernels", "push", "-p", str(folder), "-t", str(seconds))
        if lost := re.search(r"not valid (\w+) sources[^:]*: (.*)", out):
            raise KaggleError(
                f"kaggle: the kernel was pushed without its {lost[1]} sources", lost[2], "Wait until they are ready, push again"
            )
        version = re.search(r"Kernel version (\d+) successfully pushed", out)
        if not version:
            reason = last_line(out) or "no output"
            raise KaggleError("kaggle: the kernel was not pushed", reason, hint("kernels push", reason))
        if "does not resolve to the specified id" in out:
            raise KaggleError("kaggle: the kernel's title does not give its slug", str(folder), "Build it again")
        return int(version[1])

    def kernel_status(self, kernel: str, version: int) -> tuple[str, str]:
        """A version's status (QUEUED, RUNNING, COMPLETE, ERROR, ...), and its failure message.

        kaggle 2.2.4 looks at the latest version, as does version 0.
        """
        out = self._ask("kernels", "status", _versioned(kernel, version))
        found = re.search(r'has status "([^"]+)"', out)
        if not found:
            raise KaggleError("kaggle: no kernel status", last_line(out))
        message = re.search(r'Failure message: "(.*)"', out, re.S)
        return found[1].rsplit(".", 1)[-1].upper(), message[1].strip() if message else ""

    def kernel_output(self, kernel: str, version: int, folder: Path) -> None:
        """A version's files and log. 2.2.4 fetches those of the latest one, as does version 0."""
        args = ("kernels", "output", _versioned(kernel, version), "-p", str(folder), "-o", "-q")
        self._ask(*args, timeout=30 * self.timeout)

    def follow_log(self, kernel: str, version: int, tell: Callable[[str], None]) -> Callable[[float], None]:
        """Tell each line of a running kernel's log, as `command.follow` does. What fails here is of no account."""
        return follow(["kernels", "logs", _versioned(kernel, version), "--follow"], tell)

    def wait(self, seconds: float) -> None:
        """Sleep at this client's pace."""
        time.sleep(seconds * self.pace)

    def _ask(self, *args: str, **options: Any) -> str:
        """Run a command that changes nothing, see `_call`. Returns: what it printed."""
        return self._call(*args, safe=True, **options).text

    def _run(self, *args: str, **options: Any) -> str:
        """Run a command once, see `_call`. Returns: what it printed."""
        return self._call(*args, **options).text

    def _call(self, *args: str, safe: bool = False, timeout: float | None = None, **options: Any) -> Said:
        """Run a command.

        Args:
            safe: repeating changes nothing, so a doubtful failure is repeated, up to four calls in all.
            options: see `command.call`.
        """
        limit, pauses = timeout or self.timeout, [2, 6, 18] if safe else []
        while True:
            said = call(args, limit, **options)
            if said.ok:
                return said
            error = failure(f"kaggle {' '.join(args[:2])}", said, limit)
            passing = error.outcome == "doubtful" or error.code in (408, 429)
            if not (pauses and passing):
                raise error
            self.wait(pauses.pop(0))


def looks(client: Kaggle, *, minutes: float) -> Iterator[None]:
    """Times to look whether something has happened: now, then less and less often, until the minutes are over."""
    started, pause = time.monotonic(), 5.0
    yield
    while time.monotonic() - started <= 60 * minutes:
        client.wait(pause)
        pause = min(60, 1.3 * pause)
        yield


def _table(out: str, start: str) -> list[dict[str, str]] | None:
    """The CSV in an output, which begins with the line that starts so; None without one."""
    lines = out.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if line.startswith(start)), None)
    return None if first is None else list(csv.DictReader(lines[first:]))


def _versioned(kernel: str, version: int) -> str:
    return f"{kernel}/{version}" if version else kernel


def _score(text: str) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if value == value else None

"""The kaggle CLI as a subprocess: the only module that calls it.

Success is decided by the exit code *and* by what the CLI printed, since it exits with 0 on many failures. Every call has a
timeout, since the CLI has none. Only calls that change nothing are repeated.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from melfold.errors import MelfoldError
from melfold.facts import DEFAULT, facts_of

COMPETITION = facts_of(DEFAULT).slug

Outcome = Literal["refused", "doubtful"]
"""What a failed call left behind: nothing, or something unknown."""


class KaggleError(MelfoldError):
    """A failed call. `outcome`: whether it may have taken effect anyway."""

    def __init__(self, what: str, found: str = "", fix: str = "", *, outcome: Outcome = "refused", code: int = 0) -> None:
        super().__init__(what, found, fix)
        self.outcome, self.code = outcome, code


@dataclass(frozen=True)
class Submission:
    """A row of Kaggle's list of submissions; scores are None until it has them."""

    ref: str
    date: str
    description: str
    file_name: str
    status: str
    """PENDING, COMPLETE or ERROR."""
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
        out = self._run(["config", "view"], safe=True)
        found = re.search(r"^- username: (\S+)", out, re.M)
        if not found or found[1] == "None":
            raise _no_credentials("the CLI knows no user name")
        return found[1]

    def remaining(self) -> int:
        """How many submissions are left today."""
        out = self._run(["competitions", "submission-limits", self.competition, "--json", "-q"], safe=True)
        try:
            limits = json.loads(out[out.index("{") :])
            return int(limits.get("numAllowedNow", limits.get("num_allowed_now", 0)))
        except ValueError:
            raise KaggleError("kaggle: no submission limits", _last_line(out)) from None

    def submissions(self) -> list[Submission]:
        """The latest 200, newest first."""
        out = self._run(["competitions", "submissions", self.competition, "--csv", "-q", "--page-size", "200"], safe=True)
        if "No submissions found" in out:
            return []
        lines = out.splitlines()
        start = next((i for i, line in enumerate(lines) if line.startswith("ref,") or ",status," in line), None)
        if start is None:
            raise KaggleError("kaggle: the list of submissions cannot be read", _last_line(out))
        return [
            Submission(
                ref=row.get("ref", ""),
                date=row["date"],
                description=row["description"],
                file_name=row.get("fileName", ""),
                status=row["status"].rsplit(".", 1)[-1].upper(),
                public_score=_score(row["publicScore"]),
                private_score=_score(row["privateScore"]),
            )
            for row in csv.DictReader(io.StringIO("\n".join(lines[start:]) + "\n"))
        ]

    def find(self, tag: str) -> Submission | None:
        """The submission whose message carries a tag."""
        return next((s for s in self.submissions() if tag in s.description), None)

    def submit_file(self, path: Path, message: str) -> None:
        """Submit a file."""
        out = self._run(
            ["competitions", "submit", self.competition, "-f", str(path), "-m", message, "-q"], timeout=5 * self.timeout
        )
        self._submitted(out)

    def submit_kernel(self, kernel: str, version: int, file_name: str, message: str) -> None:
        """Submit the output of a kernel version."""
        args = ["-k", kernel, "-v", str(version), "-f", file_name, "-m", message, "-q"]
        self._submitted(self._run(["competitions", "submit", self.competition, *args]))

    def _submitted(self, out: str) -> None:
        if "Could not submit" in out:  # 2.2.4: the upload was refused, and the exit code is 0
            raise KaggleError("kaggle: the upload was refused", _last_line(out), "Try again")
        if "Could not find competition" in out:
            raise KaggleError("kaggle: no such competition", self.competition)
        if not re.search(r"success", out, re.I):
            raise KaggleError("kaggle: neither success nor failure", _last_line(out) or "no output", outcome="doubtful")

    def download(self, folder: Path, *, stall: float = 600) -> Path:
        """The competition's files as one archive in `folder`; a partial download is continued.

        Args:
            stall: seconds without a new byte after which the CLI is started again.

        Raises:
            KaggleError: among others when it stalls again and again.
        """
        folder.mkdir(parents=True, exist_ok=True)
        args = ["competitions", "download", self.competition, "-p", str(folder), "-q"]
        self._run(args, safe=True, timeout=stall, growing=folder)
        found = sorted(folder.glob("*.zip"))
        if partial := sorted(folder.glob("*.kaggle-partial")):
            raise KaggleError("kaggle: the download is incomplete", partial[0].stem, "Run the command again to continue it")
        if not found:
            raise KaggleError("kaggle: nothing was downloaded", ", ".join(p.name for p in folder.iterdir()) or "an empty folder")
        return found[0]

    def download_file(self, name: str, path: Path) -> None:
        """One of the competition's files, written to `path`."""
        with tempfile.TemporaryDirectory(prefix="melfold-download-") as folder:
            args = ["competitions", "download", self.competition, "-f", name, "-p", folder, "-q"]
            self._run(args, safe=True, timeout=10 * self.timeout)
            found = [file for file in Path(folder).rglob("*") if file.name in (name, f"{name}.zip")]
            if not found:
                raise KaggleError("kaggle: the file was not downloaded", name, "Try again")
            if found[0].suffix == ".zip" and not name.endswith(".zip"):
                with zipfile.ZipFile(found[0]) as pack:
                    path.write_bytes(pack.read(name))
            else:
                shutil.copyfile(found[0], path)

    def dataset_status(self, dataset: str) -> str | None:
        """`ready`, `pending`, ...; None where there is no such dataset."""
        try:
            out = self._run(["datasets", "status", dataset], safe=True)
        except KaggleError as error:
            if error.code in (403, 404):
                return None
            raise
        return _last_line(out).strip().lower().rsplit(".", 1)[-1]

    def dataset_files(self, dataset: str) -> dict[str, int]:
        """Names and bytes of a dataset's files."""
        out = self._run(["datasets", "files", dataset, "--csv", "--page-size", "200"], safe=True)
        lines = out.splitlines()
        start = next((i for i, line in enumerate(lines) if line.startswith("name,")), None)
        if start is None:
            return {}
        rows = csv.DictReader(io.StringIO("\n".join(lines[start:]) + "\n"))
        return {row["name"]: int(row.get("size") or row.get("totalBytes") or 0) for row in rows}

    def create_dataset(self, folder: Path) -> None:
        """A new private dataset of a folder's files."""
        self._published(self._run(["datasets", "create", "-p", str(folder)], timeout=30 * self.timeout))

    def version_dataset(self, folder: Path, notes: str) -> None:
        """A new version, which replaces all files of the previous one."""
        self._published(self._run(["datasets", "version", "-p", str(folder), "-m", notes], timeout=30 * self.timeout))

    def _published(self, out: str) -> None:
        if not re.search(r"is being created", out):
            raise KaggleError("kaggle: the dataset was not published", _last_line(out) or "no output", outcome="doubtful")

    def push_kernel(self, folder: Path, seconds: int) -> int:
        """Push a kernel; it runs at once. Returns: its version.

        Raises:
            KaggleError: refused, or accepted without one of its sources.
        """
        out = self._run(["kernels", "push", "-p", str(folder), "-t", str(seconds)])
        if lost := re.search(r"not valid (\w+) sources[^:]*: (.*)", out):
            raise KaggleError(
                f"kaggle: the kernel was pushed without its {lost[1]} sources", lost[2], "Wait until they are ready, push again"
            )
        version = re.search(r"Kernel version (\d+) successfully pushed", out)
        if not version:
            raise KaggleError("kaggle: the kernel was not pushed", _last_line(out) or "no output", _KERNEL_HINT)
        if "does not resolve to the specified id" in out:
            raise KaggleError("kaggle: the kernel's title does not give its slug", str(folder), "Build it again")
        return int(version[1])

    def kernel_status(self, kernel: str) -> tuple[str, str]:
        """The latest session's status (QUEUED, RUNNING, COMPLETE, ERROR, ...), and its failure message."""
        out = self._run(["kernels", "status", kernel], safe=True)
        found = re.search(r'has status "([^"]+)"', out)
        if not found:
            raise KaggleError("kaggle: no kernel status", _last_line(out))
        message = re.search(r'Failure message: "(.*)"', out, re.S)
        return found[1].rsplit(".", 1)[-1].upper(), message[1].strip() if message else ""

    def kernel_output(self, kernel: str, folder: Path) -> None:
        """The latest session's files and log."""
        self._run(["kernels", "output", kernel, "-p", str(folder), "-o", "-q"], safe=True, timeout=30 * self.timeout)

    def wait(self, seconds: float) -> None:
        """Sleep at this client's pace."""
        time.sleep(seconds * self.pace)

    def _run(self, args: Sequence[str], *, safe: bool = False, timeout: float | None = None, growing: Path | None = None) -> str:
        """Run the CLI. Returns: what it printed.

        Args:
            safe: repeating changes nothing, so a doubtful failure is repeated, up to four calls in all.
            growing: the timeout counts from the last new byte in this folder.
        """
        for attempt in range(4):
            try:
                return self._once(args, timeout or self.timeout, growing)
            except KaggleError as error:
                passing = error.outcome == "doubtful" or error.code == 429
                if not safe or not passing or attempt == 3:
                    raise
            self.wait(2 * 3**attempt)
        raise AssertionError("unreachable")

    def _once(self, args: Sequence[str], timeout: float, growing: Path | None) -> str:
        what = f"kaggle {' '.join(args[:2])}"
        command = [_executable(), "-W", *args]
        # The CLI remembers half-finished uploads below TMPDIR, and silently leaves a file out if Kaggle has forgotten it.
        with tempfile.TemporaryDirectory(prefix="melfold-kaggle-") as scratch:
            return self._call(what, command, timeout, growing, os.environ | {"TMPDIR": scratch, "PYTHONWARNINGS": "ignore"})

    def _call(self, what: str, command: list[str], timeout: float, growing: Path | None, environment: dict[str, str]) -> str:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C must not interrupt a call
        )
        try:
            out = _communicate(process, timeout, growing)
        except subprocess.TimeoutExpired:
            raise KaggleError(
                f"{what}: no answer", f"within {timeout:.0f} s", "Look at kaggle.com, then try again", outcome="doubtful"
            ) from None
        finally:
            _kill(process)
        text = redact(out.decode(errors="replace"))
        if process.returncode == 0 and not re.search(r"\b[45]\d\d (Client|Server) Error", text):
            return text
        raise _failure(what, text)


def _communicate(process: subprocess.Popen[bytes], limit: float, growing: Path | None) -> bytes:
    if growing is None:
        return process.communicate(timeout=limit)[0]
    size, since = -1, time.monotonic()
    while True:
        try:
            return process.communicate(timeout=min(limit, 5))[0]
        except subprocess.TimeoutExpired:
            now = sum(p.stat().st_size for p in growing.iterdir() if p.is_file())
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > limit:
                raise


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout:
        process.stdout.close()


_KERNEL_HINT = "Kaggle refuses sources over 1 MB, titles in use and inputs that are not ready"


def _failure(what: str, text: str) -> KaggleError:
    code = int(found[1]) if (found := re.search(r"\b([45]\d\d) (?:Client|Server) Error", text)) else 0
    reason = _last_line(text) or "no output"
    if re.search(
        r"could not find kaggle\.json|authentication required|must authenticate|kaggle auth login|KAGGLE_API_TOKEN", text, re.I
    ):
        return _no_credentials(f"{what} was not authorised")
    if code in (401, 403):
        error = KaggleError(
            f"{what}: no access",
            reason,
            "Check kaggle.json or KAGGLE_API_TOKEN, and accept the competition's rules on its page",
            code=code,
        )
        return error
    if "Permission 'kernels.get' was denied" in text:
        return KaggleError(f"{what}: no such kernel, or no access", reason.split(". ")[0], code=403)
    if 400 <= code < 500:
        return KaggleError(f"{what}: refused", reason, _KERNEL_HINT if "kernels" in what else "", code=code)
    return KaggleError(f"{what}: failed", reason, "Try again later", outcome="doubtful", code=code)


def _no_credentials(found: str) -> KaggleError:
    return KaggleError(
        "no Kaggle credentials",
        found,
        "Put kaggle.json (Settings > Create New Token) into ~/.kaggle or set KAGGLE_API_TOKEN; accept the competition's rules",
        code=401,
    )


def _executable() -> str:
    beside = Path(sys.executable).with_name("kaggle")
    found = str(beside) if beside.exists() else shutil.which("kaggle")
    if not found:
        raise KaggleError("the kaggle command is missing", "", "pip install 'kaggle>=2.2.4,<3'")
    return found


def redact(text: str) -> str:
    """The text without any secret this process could know."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    return text


def _secrets() -> set[str]:
    found = {os.environ.get(name, "") for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_API_V1_TOKEN")}
    folders = [os.environ.get("KAGGLE_CONFIG_DIR"), "~/.kaggle", "~/.config/kaggle"]
    for folder in (Path(f).expanduser() for f in folders if f):
        for read in (
            lambda f=folder: json.loads((f / "kaggle.json").read_text()).get("key", ""),
            lambda f=folder: (f / "access_token").read_text().strip(),
        ):
            try:
                found.add(read())
            except (OSError, ValueError, AttributeError):
                continue
    return {secret for secret in found if isinstance(secret, str) and len(secret) >= 5}


def wait_until(
    client: Kaggle, look: Callable[[], bool], *, minutes: float, first: float = 5, most: float = 60, tell: Callable[[], None]
) -> bool:
    """Call `look` until it returns true, less and less often. Returns: whether it did so in time."""
    started, pause = time.monotonic(), first
    while not look():
        if time.monotonic() - started > 60 * minutes:
            return False
        tell()
        client.wait(pause)
        pause = min(most, 1.3 * pause)
    return True


def _score(text: str) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if value == value else None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""

"""A stand-in for Kaggle: a real server on loopback that the unmodified `kaggle` command talks to.

    with FakeKaggle(tmp_path, data=download, truth=truth) as kaggle:
        subprocess.run(["kaggle", "-W", "competitions", "submissions", kaggle.competition], env=kaggle.env(tmp_path / "home"))

It keeps uploads, datasets, kernels and submissions in memory (their bytes below `root`), really runs kernels, really scores
submissions, and misbehaves on demand (`Fault`). Its shapes come from the client's own types; beyond them it is a guess at Kaggle.

From a shell: `python -m tests.fake_kaggle --root DIR --data DATA --truth FILE -- COMMAND ...`
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

MAX_SOURCE = 1_000_000
"""Bytes; a kernel's source must be smaller."""
SITE = "http://localhost"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ftp_proxy")
TRUTH = "test_post_competition.csv"
KINDS = "delay hang hang_after drop_before drop_after late cut refuse_upload reply_error error_body"

Request = dict[str, Any]


class Call(NamedTuple):
    """One request as it came; `rpc` is `PUT` for uploaded bytes and `GET` for downloads."""

    rpc: str
    request: Request
    time: float


@dataclass
class Fault:
    """What the server does wrong, the next `times` times that `rpc` is called, after `after` calls that go well.

    Kinds: `delay` (`seconds`, then as usual); `hang` (no reply until `seconds` pass or the server stops, nothing done);
    `hang_after` (done, then no reply); `drop_before`, `drop_after` (connection closed, before or after it is done); `late`
    (connection closed at once, done after `seconds`); `cut` (half of the reply); a status as `500_before` (or `429`, `403`;
    nothing done) or `500_after` (done all the same); `error_body` (400, nothing done); `refuse_upload` (403 to the PUT);
    `reply_error` (200 with `error` set, nothing done).

    Args:
        rpc: its name, `PUT`, `GET` or `*`.
        seconds: for `delay` and `late` (1 if not given) and `hang*` (for ever); for `429` the `Retry-After`.
    """

    rpc: str
    kind: str
    after: int = 0
    times: int = 1
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS.split() and not re.fullmatch(r"[45]\d\d(_before|_after)?", self.kind):
            raise ValueError(f"unknown fault {self.kind!r}: {KINDS}, or 429, 500_before, 500_after and the like")


class Reply(NamedTuple):
    """What goes back: JSON, or a file's bytes."""

    code: int = 200
    body: Request | Path | None = None
    headers: Mapping[str, str] = {}
    start: int = 0


class Refused(Exception):
    """Kaggle says no."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Blob:
    """Bytes on their way up."""

    name: str
    size: int
    path: Path

    @property
    def received(self) -> int:
        return self.path.stat().st_size


@dataclass
class Submission:
    """A submission, `PENDING` until scored; scores are text, empty where the truth does not reach."""

    ref: int
    description: str
    file_name: str
    path: Path
    kernel: str | None = None
    date: datetime = field(default_factory=lambda: datetime.now(UTC))
    status: str = "PENDING"
    public_score: str = ""
    private_score: str = ""
    error: str = ""


@dataclass
class DatasetVersion:
    """One snapshot of a dataset, `ready` some time after it was made."""

    number: int
    notes: str
    folder: Path
    ready_at: float

    @property
    def ready(self) -> bool:
        return time.monotonic() >= self.ready_at


@dataclass
class Session:
    """One version of a kernel, and its only run. `tree` stands for the root of the machine it runs on."""

    number: int
    request: Request
    sources: dict[str, list[str]]
    tree: Path
    status: str = "QUEUED"
    failure: str = ""

    @property
    def done(self) -> bool:
        return self.status in ("COMPLETE", "ERROR")

    @property
    def text(self) -> str:
        """Everything it printed."""
        log = self.tree / "log.txt"
        return log.read_text(errors="replace") if log.exists() else ""

    @property
    def outputs(self) -> dict[str, Path]:
        """What it left in its working folder; a failed run leaves nothing."""
        return _tree_files(self.tree / "kaggle" / "working") if self.status == "COMPLETE" else {}


class FakeKaggle:
    """The server and all it knows. Use it as a context manager; a fault of its own makes the exit raise.

    Set at any time: `faults`; `layout` (`nested` or `flat` mounts); `rules_accepted`; `kernels_only` (no file submissions);
    `score_delay` and `dataset_delay` in seconds; `missing_code`, the status for what is not there; `flat_errors` (error bodies
    whose message the client prints); `python`, the command that runs kernels, and `kernel_env` on top of their environment.

    To look at: `calls`, `connects`, `submissions`, `datasets` and `kernels` (versions by slug), `blobs`, `errors`.

    Args:
        root: a folder; `sessions/<slug>/<version>/` holds what a kernel saw and left, `store/` the rest; both start empty.
        data: the competition's download; published tables of truth in it are held back.
        truth: `fname,labels,usage`; without it, submissions are complete without scores.
        run_kernels: run what is pushed; else versions stay QUEUED until `finish_kernel`.
    """

    def __init__(
        self,
        root: Path,
        *,
        competition: str = "freesound-audio-tagging-2019",
        data: Path | None = None,
        truth: Path | None = None,
        owner: str = "tester",
        daily_limit: int = 5,
        run_kernels: bool = True,
        port: int = 0,
    ) -> None:
        self.root, self.competition, self.data, self.truth = Path(root).resolve(), competition, data, truth
        self.store = self.root / "store"
        self.owner, self.daily_limit, self.run_kernels = owner, daily_limit, run_kernels
        self.layout, self.rules_accepted, self.kernels_only, self.flat_errors = "nested", True, False, False
        self.score_delay = self.dataset_delay = 0.0
        self.missing_code = 403
        self.python: Sequence[str] = [sys.executable]
        self.kernel_env: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.calls: list[Call] = []
        self.connects: list[str] = []
        self.errors: list[str] = []
        self.submissions: list[Submission] = []
        self.datasets: dict[str, list[DatasetVersion]] = {}
        self.kernels: dict[str, list[Session]] = {}
        self.blobs: dict[str, Blob] = {}
        self.links: list[Path] = []
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.port = port

    # Life

    def __enter__(self) -> FakeKaggle:
        for folder in (self.store, self.root / "sessions"):  # nothing is remembered from one server to the next
            shutil.rmtree(folder, ignore_errors=True)
        (self.store / "blobs").mkdir(parents=True)
        self._server = _Server(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        self.spawn(self._server.serve_forever, 0.05)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop()
        if self.errors and kind is None:
            raise RuntimeError("the stand-in for Kaggle failed:\n" + "\n".join(self.errors))

    def stop(self) -> None:
        """Let go of held connections, kill running kernels, and wait for every thread."""
        self._stopping.set()
        self._server.shutdown()
        for connection in list(self._server.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        for thread in self._threads:
            thread.join()

    def spawn(self, work: Callable[..., object], *args: object) -> None:
        """Do something beside the requests; what it raises ends up in `errors`."""

        def run() -> None:
            try:
                work(*args)
            except Exception:
                self.errors.append(traceback.format_exc())

        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()

    def pause(self, seconds: float | None) -> bool:
        """Wait, at most until the server stops; true if it did not."""
        return not self._stopping.wait(seconds)

    def settings(self, home: Path) -> dict[str, str]:
        """The variables that point the client here."""
        here = f"http://127.0.0.1:{self.port}"
        return {
            "HOME": str(home),
            "TMPDIR": str(home / "tmp"),  # where the client remembers half-finished uploads
            "KAGGLE_CONFIG_DIR": str(home),
            "KAGGLE_USERNAME": self.owner,
            "KAGGLE_KEY": "dummy",
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            **{name: here for proxy in PROXIES[:2] for name in (proxy, proxy.upper())},
        }

    def env(self, home: Path) -> dict[str, str]:
        """A whole environment for a subprocess, with a home of its own; nothing can leave the machine."""
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        return _clean_environ() | self.settings(home)

    # What every request goes through

    def note(self, rpc: str, request: Request) -> Fault | None:
        """Record a call and find the fault that hits it."""
        with self._lock:
            self.calls.append(Call(rpc, request, time.time()))
            hit = None
            for fault in [f for f in self.faults if f.rpc in (rpc, "*")]:
                if fault.after:
                    fault.after -= 1
                elif fault.times and hit is None:
                    fault.times -= 1
                    hit = fault
            return hit

    def answer(self, rpc: str, request: Request, authorization: str) -> Reply:
        """Carry out one RPC."""
        if rpc != "IntrospectToken":
            self.authorise(authorization)
        action = getattr(self, f"_{rpc}", None)
        if action is None:
            raise Refused(404, f"this stand-in has no {rpc}")
        with self._lock:
            if request.get("competitionName", self.competition) != self.competition:
                raise Refused(404, "Competition not found")
            result = action(request)
        return result if isinstance(result, Reply) else Reply(body=result)

    def authorise(self, authorization: str) -> None:
        """Everything is private: `owner` with any key but `bad`, or any token but `bad`."""
        scheme, _, secret = authorization.partition(" ")
        user, key = self.owner, secret
        if scheme == "Basic":
            user, _, key = base64.b64decode(secret).decode().partition(":")
        if key in ("", "bad"):
            raise Refused(401, "Unauthenticated")
        if user != self.owner:
            raise Refused(403, "Permission denied")

    def _IntrospectToken(self, request: Request) -> Request:
        return {"active": request.get("token") != "bad", "username": self.owner}

    def _entered(self) -> None:
        if not self.rules_accepted:
            raise Refused(403, "You must accept this competition's rules before you can continue")

    # Bytes

    def _start_upload(self, name: str, size: int) -> Request:
        token = f"blob-{len(self.blobs) + 1}"
        path = self.store / "blobs" / token
        path.touch()
        self.blobs[token] = Blob(name, size, path)
        return {"token": token, "createUrl": f"{SITE}/upload/{token}"}

    def _StartBlobUpload(self, request: Request) -> Request:
        return self._start_upload(request["name"], request.get("contentLength", 0))

    def put(self, token: str, span: str | None, body: Path) -> Reply:
        """Take bytes: all of them, a rest (`bytes 10-19/20`), or none, to ask how many are here (`bytes */20`)."""
        with self._lock:
            blob = self.blobs.get(token)
            if blob is None:
                raise Refused(404, "no such upload")
            if not (span or "").startswith("bytes */"):
                start = int(re.findall(r"\d+", span)[0]) if span else 0
                with blob.path.open("r+b") as file, body.open("rb") as rest:
                    file.truncate(start)
                    file.seek(start)
                    shutil.copyfileobj(rest, file)
            body.unlink()
            if blob.received >= blob.size:
                return Reply(body={})
            return Reply(308, headers={"Range": f"bytes=0-{blob.received - 1}"} if blob.received else {})

    def _uploaded(self, token: str) -> Blob:
        blob = self.blobs.get(token)
        if blob is None or blob.received != blob.size:
            raise Refused(400, "The uploaded file is missing or incomplete")
        return blob

    def _link(self, path: Path, name: str = "") -> str:
        """A short-lived address, as Kaggle's storage gives; it needs no authorization."""
        if path not in self.links:
            self.links.append(path)
        return f"{SITE}/files/{self.links.index(path)}/{quote(name or path.name)}"

    # Competitions

    def data_files(self) -> dict[str, Path]:
        """The competition's download, without the truth."""
        if self.data is None:
            return {}
        hidden = self.truth and self.truth.resolve()
        return {n: p for n, p in _tree_files(self.data.resolve()).items() if p.name != TRUTH and p != hidden}

    def _ListCompetitions(self, _: Request) -> Request:
        own = {"id": 1, "ref": f"{SITE}/competitions/{self.competition}", "title": _title(self.competition)}
        entered = {"userHasEntered": self.rules_accepted, "maxDailySubmissions": self.daily_limit}
        return {"competitions": [own | entered | {"isKernelsSubmissionsOnly": self.kernels_only}]}

    def _ListDataFiles(self, request: Request) -> Request:
        return _page("files", [_file_entry(name, path) for name, path in self.data_files().items()], request)

    def _DownloadDataFile(self, request: Request) -> Reply:
        self._entered()
        path = self.data_files().get(request["fileName"])
        if path is None:
            raise Refused(404, "File not found")
        return Reply(302, headers={"Location": self._link(path)})

    def _DownloadDataFiles(self, request: Request) -> Reply:
        self._entered()
        path = self.store / "downloads" / f"{self.competition}.zip"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(path, "w", strict_timestamps=False) as archive:
                for name, file in self.data_files().items():
                    archive.write(file, name)
        return Reply(302, headers={"Location": self._link(path, "archive.zip")})

    def _StartSubmissionUpload(self, request: Request) -> Request:
        self._entered()
        return self._start_upload(request["fileName"], request.get("contentLength", 0))

    def _CreateSubmission(self, request: Request) -> Request:
        if self.kernels_only:
            raise Refused(400, "This competition only accepts submissions from notebooks")
        blob = self._uploaded(request.get("blobFileTokens", ""))
        return self._submit(blob.path, blob.name, request)

    def _CreateCodeSubmission(self, request: Request) -> Request:
        session = self._session(request["kernelOwner"], request["kernelSlug"], request.get("kernelVersion"))
        path = session.outputs.get(request.get("fileName", ""))
        if path is None:
            raise Refused(400, f"Version {session.number} is {session.status} and has no output {request.get('fileName')}")
        return self._submit(path, path.name, request, f"{self.owner}/{request['kernelSlug']}/{session.number}")

    def _submit(self, path: Path, name: str, request: Request, kernel: str | None = None) -> Request:
        self._entered()
        if self._limits()["numAllowedNow"] <= 0:
            raise Refused(400, "You have reached the daily limit of submissions")
        ref = len(self.submissions) + 1
        kept = _copy(path, self.store / "submissions" / f"{ref}.csv")
        self.submissions.append(Submission(ref, request.get("submissionDescription", ""), name, kept, kernel))
        self.spawn(self._score, self.submissions[-1])
        return {"message": f"Successfully submitted to {_title(self.competition)}", "ref": ref}

    def _score(self, submission: Submission) -> None:
        from melfold.combine.check import score_submission
        from melfold.errors import MelfoldError

        if not self.pause(self.score_delay):
            return
        error, scores = self._what_is_wrong(submission.path), {}
        try:
            if self.truth and not error:
                scores = score_submission(submission.path, self.truth)["lwlrap"].map("{:.5f}".format).to_dict()
        except MelfoldError as refused:
            error = str(refused)
        submission.public_score, submission.private_score = scores.get("Public", ""), scores.get("Private", "")
        submission.error = error
        submission.status = "ERROR" if error else "COMPLETE"

    def _what_is_wrong(self, path: Path) -> str:
        """What `sample_submission.csv` says against a file."""
        try:
            header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        except (ValueError, csv.Error):
            return "Submission is not a CSV file"
        if any(len(row) != len(header) or any(v.strip().lower() in ("", "nan") for v in row) for row in rows):
            return "Submission contains null values"
        sample = self.data_files().get("sample_submission.csv")
        if sample is not None:
            wanted, *asked = csv.reader(io.StringIO(sample.read_text(encoding="utf-8-sig"), newline=""))
            if sorted(header) != sorted(wanted):
                return "Submission must have the columns of sample_submission.csv"
            if sorted(row[0] for row in rows) != sorted(row[0] for row in asked):
                return f"Submission must have the {len(asked)} rows of sample_submission.csv; it has {len(rows)}"
        return ""

    def _limits(self) -> dict[str, int]:
        today = sum(s.date.date() == datetime.now(UTC).date() for s in self.submissions)
        return {"numToday": today, "numTotal": len(self.submissions), "numAllowedNow": max(0, self.daily_limit - today)}

    def _GetSubmissionLimits(self, _: Request) -> Request:
        return self._limits()

    def _ListSubmissions(self, request: Request) -> Request:
        return _page("submissions", [self._shown(s) for s in reversed(self.submissions)], request)

    def _GetSubmission(self, request: Request) -> Request:
        for submission in self.submissions:
            if submission.ref == request.get("ref"):
                return self._shown(submission)
        raise Refused(404, "Submission not found")

    def _GetLeaderboard(self, request: Request) -> Request:
        scored = [s for s in self.submissions if s.public_score]
        best = sorted(scored, key=lambda s: float(s.public_score))[-1:]
        rows = [{"teamId": 1, "teamName": self.owner, "submissionDate": _stamp(s.date), "score": s.public_score} for s in best]
        return _page("submissions", rows, request)

    def _shown(self, s: Submission) -> Request:
        return {
            **{"ref": s.ref, "date": _stamp(s.date), "description": s.description, "fileName": s.file_name},
            **{"status": s.status, "publicScore": s.public_score, "privateScore": s.private_score},
            **{"errorDescription": s.error, "totalBytes": s.path.stat().st_size},
            **{"submittedBy": self.owner, "teamName": self.owner},
        }

    # Datasets

    def _versions(self, request: Request) -> list[DatasetVersion]:
        versions = self.datasets.get(request.get("datasetSlug", ""))
        if versions is None or request.get("ownerSlug") != self.owner:
            raise Refused(self.missing_code, "Permission 'datasets.get' was denied")
        return versions

    def _CreateDataset(self, request: Request) -> Request:
        if request.get("ownerSlug") != self.owner:
            raise Refused(403, "Permission 'datasets.create' was denied")
        if request["slug"] in self.datasets:
            return {"status": "error", "error": f'The requested title "{request["title"]}" is already in use by a dataset.'}
        return self._add_version(request["slug"], request, "Initial release")

    def _CreateDatasetVersion(self, request: Request) -> Request:
        if not self._versions(request)[-1].ready:
            raise Refused(403, "The previous version is still being processed")
        return self._add_version(request["datasetSlug"], request["body"], request["body"].get("versionNotes", ""))

    def _add_version(self, slug: str, request: Request, notes: str) -> Request:
        blobs = [self._uploaded(file.get("token", "")) for file in request.get("files", [])]
        if not blobs:
            return {"status": "error", "error": "A dataset needs at least one file"}
        number = len(self.datasets.get(slug, [])) + 1
        folder = self.store / "datasets" / slug / str(number)
        for blob in blobs:
            _unpack(blob, folder)
        version = DatasetVersion(number, notes, folder, time.monotonic() + self.dataset_delay)
        self.datasets.setdefault(slug, []).append(version)
        return {"status": "ok", "ref": f"/{self.owner}/{slug}", "url": f"{SITE}/datasets/{self.owner}/{slug}"}

    def _GetDatasetStatus(self, request: Request) -> Request:
        return {"status": "READY" if self._versions(request)[-1].ready else "BLOBS_RECEIVED"}

    def _GetDataset(self, request: Request) -> Request:
        number = max((version.number for version in self._versions(request) if version.ready), default=None)
        return {"ref": f"{self.owner}/{request['datasetSlug']}", "ownerRef": self.owner, "currentVersionNumber": number}

    def _ListDatasetFiles(self, request: Request) -> Request:
        versions = self._versions(request)
        wanted = request.get("datasetVersionNumber") or len(versions)
        if not 0 < wanted <= len(versions):
            raise Refused(404, "Version not found")
        files = _tree_files(versions[wanted - 1].folder)
        return _page("datasetFiles", [_file_entry(name, path) for name, path in files.items()], request)

    # Kernels

    def _source(self, kind: str, name: str) -> dict[str, Path] | None:
        """What a kernel finds mounted for one of its sources; none if there is no such thing."""
        owner, _, slug = name.partition("/")
        slug = slug.partition("/")[0]
        if kind == "competition" and name == self.competition and self.rules_accepted:
            return self.data_files()
        if kind == "dataset" and owner == self.owner and slug in self.datasets:
            ready = [version for version in self.datasets[slug] if version.ready]
            return _tree_files(ready[-1].folder) if ready else None
        if kind == "kernel" and owner == self.owner and slug in self.kernels:
            return next((s.outputs for s in reversed(self.kernels[slug]) if s.status == "COMPLETE"), None)
        return None

    def _session(self, owner: str, slug: str, version: object = None) -> Session:
        sessions = self.kernels.get(slug)
        if owner != self.owner or sessions is None:
            raise Refused(self.missing_code, "Permission 'kernels.get' was denied")
        number = int(version) if version else len(sessions)
        if not 0 < number <= len(sessions):
            raise Refused(404, "Version not found")
        return sessions[number - 1]

    def _SaveKernel(self, request: Request) -> Request:
        owner, _, slug = request.get("slug", "").partition("/")
        if owner != self.owner:
            raise Refused(403, "Permission 'kernels.update' was denied")
        if len(request.get("text", "").encode()) >= MAX_SOURCE:
            raise Refused(400, "The source of a kernel must be smaller than 1 MB")
        title = request.get("newTitle") or _title(slug)
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")  # the title decides, whatever slug was asked for
        asked = {kind: request.get(f"{kind}DataSources", []) for kind in ("dataset", "competition", "kernel", "model")}
        valid = {kind: [name for name in names if self._source(kind, name) is not None] for kind, names in asked.items()}
        sessions = self.kernels.setdefault(slug, [])
        number = len(sessions) + 1
        sessions.append(Session(number, request, valid, self.root / "sessions" / slug / str(number)))
        if self.run_kernels:
            self.spawn(self._run, sessions[-1])
        invalid = {f"invalid{kind.title()}Sources": [n for n in asked[kind] if n not in valid[kind]] for kind in asked}
        named = {"ref": f"/{owner}/{slug}", "url": f"{SITE}/code/{owner}/{slug}", "kernelId": 1 + list(self.kernels).index(slug)}
        return named | {"versionNumber": number} | invalid

    def _run(self, session: Session) -> None:
        """Run one version on a machine of its own, as far as folders, environment and network go."""
        tree, limit = session.tree, session.request.get("sessionTimeoutSeconds") or 12 * 3600
        working, script = tree / "kaggle" / "working", tree / "kaggle" / "src" / "script.py"
        for folder in (working, script.parent, tree / "kaggle" / "input", tree / "tmp"):
            folder.mkdir(parents=True)
        script.write_text(session.request.get("text", ""))
        with self._lock:
            self._mount(session)
        inside = {"MELFOLD_KERNEL_ROOT": str(tree), "TMPDIR": str(tree / "tmp")}
        command = [*self.python, str(script)]
        if not session.request.get("enableInternet", True) and self._can_unshare:
            command = ["unshare", "-rn", *command]
        env = _clean_environ("MELFOLD_") | inside | self.kernel_env
        session.status, deadline = "RUNNING", time.monotonic() + limit
        with (tree / "log.txt").open("wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=working, env=env, start_new_session=True, **streams)
            while process.poll() is None and time.monotonic() < deadline and self.pause(0.02):
                pass
        late = process.poll() is None
        with contextlib.suppress(ProcessLookupError):  # whatever it started goes with it
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        if late:
            session.failure = f"Your notebook was stopped because it ran longer than {limit} seconds"
        elif code:
            session.failure = f"Your notebook threw an exception (exit code {code})"
        session.status = "ERROR" if session.failure else "COMPLETE"

    def _mount(self, session: Session) -> None:
        """Lay out the sources below `kaggle/input`, read-only and linked; the competition, which is not ours, is copied once."""
        for kind, room in (("competition", "competitions"), ("dataset", "datasets"), ("kernel", "notebooks")):
            for source in session.sources[kind]:
                place = source if kind == "competition" else "/".join(source.split("/")[:2])
                place = f"{room}/{place}" if self.layout == "nested" else place.rpartition("/")[2]
                (session.tree / "kaggle" / "input" / place).mkdir(parents=True)
                for name, path in (self._source(kind, source) or {}).items():
                    if kind == "competition":
                        path = _copy(path, self.store / "competition" / name)
                    mounted = session.tree / "kaggle" / "input" / place / name
                    mounted.parent.mkdir(parents=True, exist_ok=True)
                    os.link(path, mounted)
                    mounted.chmod(0o444)

    @cached_property
    def _can_unshare(self) -> bool:
        try:
            return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
        except OSError:
            return False

    def finish_kernel(
        self, slug: str, outputs: Mapping[str, bytes] | None = None, *, status: str = "COMPLETE", failure: str = "", log: str = ""
    ) -> Session:
        """End the newest version of a kernel by hand (with `run_kernels=False`)."""
        session = self.kernels[slug][-1]
        files = {"log.txt": log.encode()} | {f"kaggle/working/{n}": c for n, c in (outputs or {}).items()}
        for name, content in files.items():
            path = session.tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        session.failure, session.status = failure, status
        return session

    def _GetKernelSessionStatus(self, request: Request) -> Request:
        session = self._session(request["userName"], request["kernelSlug"], request.get("versionLabel"))
        return {"status": session.status, "failureMessage": session.failure or None}

    def _ListKernelSessionOutput(self, request: Request) -> Request:
        session = self._session(request["userName"], request["kernelSlug"], request.get("versionLabel"))
        files = [{"fileName": name, "url": self._link(path)} for name, path in session.outputs.items()]
        return _page("files", files, request) | {"log": _log(session) if session.done else ""}


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for every handler
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], fake: FakeKaggle) -> None:
        self.fake, self.open = fake, set[socket.socket]()
        super().__init__(address, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is none of our business; anything else is."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            self.fake.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    """One connection, one request (HTTP/1.0): applies faults around what `FakeKaggle` does."""

    server: _Server

    def setup(self) -> None:
        super().setup()
        self.fake = self.server.fake
        self.server.open.add(self.connection)

    def finish(self) -> None:
        self.server.open.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        """Silence."""

    def do_CONNECT(self) -> None:
        """Nothing leaves the machine."""
        self.fake.connects.append(self.path)
        self._send(Reply(403))

    def do_POST(self) -> None:
        """Every RPC is one."""
        rpc = urlsplit(self.path).path.rpartition("/")[2]
        request = json.loads(self._body() or b"{}")
        self._serve(rpc, request, lambda: self.fake.answer(rpc, request, self.headers.get("Authorization", "")))

    def do_PUT(self) -> None:
        """An upload's bytes; those that came before the connection broke are kept."""
        token, span = urlsplit(self.path).path.rpartition("/")[2], self.headers.get("Content-Range")
        body = self.fake.store / "blobs" / f"put-{threading.get_ident()}-{time.monotonic_ns()}"
        body.write_bytes(self._body())
        request = {"token": token, "range": span, "bytes": body.stat().st_size}
        self._serve("PUT", request, lambda: self.fake.put(token, span, body))

    def do_GET(self) -> None:
        """Files that were linked to."""
        _, number, *name = urlsplit(self.path).path.rsplit("/", 2)
        request = {"path": "/".join(name), "range": self.headers.get("Range")}
        self._serve("GET", request, lambda: self._part(number))

    def _body(self) -> bytes:
        """The request's body; that of an empty file comes chunked."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline() or b"0", 16):
            body += self.rfile.read(size) + self.rfile.readline()[:0]
        self.rfile.readline()
        return body

    def _serve(self, rpc: str, request: Request, action: Callable[[], Reply]) -> None:
        fault = self.fake.note(rpc, request) or Fault(rpc, "delay", seconds=0)
        kind, when = fault.kind, 1.0 if fault.seconds is None else fault.seconds
        if kind == "hang":
            self.fake.pause(fault.seconds)
        if kind == "late":
            self.fake.spawn(lambda: self.fake.pause(when) and self._done(action))
        if kind in ("hang", "late", "drop_before"):
            return self._drop()
        status = re.match(r"\d+", {"error_body": "400", "refuse_upload": "403"}.get(kind, kind))
        if kind == "reply_error":
            return self._send(Reply(body={"status": "error", "error": "Something went wrong"}))
        if status and not kind.endswith("_after"):
            retry = {"Retry-After": f"{fault.seconds:g}"} if fault.seconds is not None else {}
            return self._send(self._error(int(status[0]), "Something went wrong", retry))
        if kind == "delay":
            self.fake.pause(when)
        reply = self._done(action)
        if kind == "hang_after":
            self.fake.pause(fault.seconds)
        if kind in ("hang_after", "drop_after"):
            return self._drop()
        if status:
            reply = self._error(int(status[0]), "Something went wrong")
        return self._send(reply, cut=kind == "cut")

    def _done(self, action: Callable[[], Reply]) -> Reply:
        try:
            return action()
        except Refused as refused:
            return self._error(refused.code, str(refused))
        except Exception:
            self.fake.errors.append(traceback.format_exc())
            return self._error(500, "the stand-in failed")

    def _error(self, code: int, message: str, headers: Mapping[str, str] | None = None) -> Reply:
        body = {"code": code, "message": message}
        return Reply(code, body if self.fake.flat_errors else {"error": body}, headers or {})

    def _drop(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _part(self, number: str) -> Reply:
        """A file, or the rest of it from `Range` on if it is still the one that `If-Range` names."""
        path = self.fake.links[int(number)]
        stat = path.stat()
        tag = '"' + hashlib.sha256(f"{path}{stat.st_size}{stat.st_mtime_ns}".encode()).hexdigest()[:16] + '"'
        headers = {"ETag": tag, "Accept-Ranges": "bytes", "Last-Modified": formatdate(stat.st_mtime, usegmt=True)}
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not span or self.headers.get("If-Range", tag) != tag:
            return Reply(200, path, headers)
        if int(span[1]) >= stat.st_size:
            return Reply(416, headers={"Content-Range": f"bytes */{stat.st_size}"})
        headers["Content-Range"] = f"bytes {span[1]}-{stat.st_size - 1}/{stat.st_size}"
        return Reply(206, path, headers, int(span[1]))

    def _send(self, reply: Reply, *, cut: bool = False) -> None:
        is_file = isinstance(reply.body, Path)
        with reply.body.open("rb") if is_file else io.BytesIO(json.dumps(reply.body or {}).encode()) as content:
            left = content.seek(0, io.SEEK_END) - content.seek(reply.start)
            self.send_response(reply.code)
            kind = "application/octet-stream" if is_file else "application/json"
            for name, value in {"Content-Type": kind, "Content-Length": str(left), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            left //= 2 if cut else 1
            while left > 0:
                left -= self.wfile.write(content.read(min(left, 1 << 20)))


def _clean_environ(*more: str) -> dict[str, str]:
    """This process's environment without a trace of Kaggle, proxies, or the prefixes named."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("KAGGLE_", *more)) and k.lower() not in PROXIES}


def _stamp(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _title(slug: str) -> str:
    return slug.replace("-", " ").title()


def _tree_files(folder: Path) -> dict[str, Path]:
    """Every regular file below a folder, by its relative name."""
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()}


def _file_entry(name: str, path: Path) -> Request:
    made = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return {"ref": name, "name": name, "totalBytes": path.stat().st_size, "creationDate": _stamp(made)}


def _page(name: str, items: Sequence[Request], request: Request) -> Request:
    """One page of a list: `pageSize` (20, at most 200) from `pageToken` or `page` on."""
    size = min(request.get("pageSize") or 20, 200)
    start = int(request.get("pageToken") or (request.get("page", 1) - 1) * size)
    return {name: items[start : start + size], "nextPageToken": str(start + size) if start + size < len(items) else ""}


def _copy(path: Path, target: Path) -> Path:
    """A copy, unless it is there already."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return target


def _log(session: Session) -> str:
    """As Kaggle gives it: JSON, an entry for each line."""
    lines = session.text.splitlines(keepends=True)
    return "[" + "\n,".join(json.dumps({"stream_name": "stdout", "time": 0.0, "data": line}) for line in lines) + "]"


def _unpack(blob: Blob, folder: Path) -> None:
    """Keep one uploaded file as Kaggle does: an archive becomes a folder, a gzip file what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, dot, kind = blob.name.rpartition(".")
    if dot and kind in ("zip", "tar"):
        shutil.unpack_archive(blob.path, folder / stem, kind)
    elif dot and kind == "gz":
        with gzip.open(blob.path) as packed, (folder / stem).open("wb") as file:
            shutil.copyfileobj(packed, file)
    else:
        shutil.copyfile(blob.path, folder / blob.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a command, or whoever comes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    command = argv[cut + 1 :]
    parser = argparse.ArgumentParser(prog="python -m tests.fake_kaggle", usage="%(prog)s --root DIR [options] [-- COMMAND ...]")
    parser.add_argument("--root", type=Path, required=True, help="a folder for everything it keeps")
    parser.add_argument("--data", type=Path, help="the competition's download")
    parser.add_argument("--truth", type=Path, help="fname,labels,usage: what submissions are scored against")
    parser.add_argument("--competition", default="freesound-audio-tagging-2019")
    parser.add_argument("--layout", choices=("nested", "flat"), default="nested", help="how kernels find their inputs")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args(argv[:cut])
    names = ("competition", "data", "truth", "port")
    with FakeKaggle(options.root, **{name: getattr(options, name) for name in names}) as fake:
        fake.layout = options.layout
        home = fake.root / "home"
        env = fake.env(home)
        print("This is a LOCAL stand-in for Kaggle: nothing leaves this machine, no real submission is made.", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            if command:
                return subprocess.run(command, env=env).returncode
            print("unset NO_PROXY no_proxy ALL_PROXY all_proxy")
            for name, value in fake.settings(home).items():
                print(f"export {name}={shlex.quote(value)}", flush=True)
            while True:
                time.sleep(3600)
    return 130


if __name__ == "__main__":
    sys.exit(main())

"""Kernels: pushed, mounted, run for real, and their output."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.fake_kaggle.competitions import Competitions
from tests.fake_kaggle.datasets import Datasets
from tests.fake_kaggle.wire import SITE, Refused, Request, clean_environ, copy_once, page, title_of, tree_files

MAX_SOURCE = 1_000_000
"""Bytes; a kernel's source must be smaller."""


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
        return tree_files(self.tree / "kaggle" / "working") if self.status == "COMPLETE" else {}


class Kernels(Competitions, Datasets):
    """The calls about kernels, whose inputs are the competition, datasets and other kernels."""

    def _source(self, kind: str, name: str) -> dict[str, Path] | None:
        """What a kernel finds mounted for one of its sources; none if there is no such thing."""
        owner, _, slug = name.partition("/")
        slug = slug.partition("/")[0]
        if kind == "competition" and name == self.competition and self.rules_accepted:
            return self.data_files()
        if kind == "dataset" and owner == self.owner and slug in self.datasets:
            ready = [version for version in self.datasets[slug] if version.ready]
            return tree_files(ready[-1].folder) if ready else None
        if kind == "kernel" and owner == self.owner and slug in self.kernels:
            return next((s.outputs for s in reversed(self.kernels[slug]) if s.status == "COMPLETE"), None)
        return None

    def _session(self, owner: str, slug: str, version: object = None) -> Session:
        sessions = self.kernels.get(slug)
        if owner != self.owner or sessions is None:
            raise Refused(self.missing_code, "Permission 'kernels.get' was denied")
        number = int(str(version).removeprefix("v")) if version else len(sessions)
        if not 0 < number <= len(sessions):
            raise Refused(404, "Version not found")
        return sessions[number - 1]

    def _SaveKernel(self, request: Request) -> Request:
        owner, _, slug = request.get("slug", "").partition("/")
        if owner != self.owner:
            raise Refused(403, "Permission 'kernels.update' was denied")
        if len(request.get("text", "").encode()) >= MAX_SOURCE:
            raise Refused(400, "The source of a kernel must be smaller than 1 MB")
        title = request.get("newTitle") or title_of(slug)
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
        with self.lock:
            self._mount(session)
        inside = {"MELFOLD_KERNEL_ROOT": str(tree), "TMPDIR": str(tree / "tmp")}
        command = [*self.python, str(script)]
        if not session.request.get("enableInternet", True) and self._can_unshare:
            command = ["unshare", "-rn", *command]
        env = clean_environ("MELFOLD_") | inside | self.kernel_env
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
                        path = copy_once(path, self.store / "competition" / name)
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

    def add_kernel(self, slug: str, outputs: Mapping[str, bytes]) -> int:
        """A version of a kernel that has run, as if it had been pushed. Returns: its number."""
        sessions = self.kernels.setdefault(slug, [])
        number = len(sessions) + 1
        sessions.append(Session(number, {}, {}, self.root / "sessions" / slug / str(number)))
        self.finish_kernel(slug, outputs)
        return number

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

    def _GetAcceleratorQuotaStatistics(self, _: Request) -> Request:
        quota = {"timeUsed": f"{(30 - self.gpu_hours) * 3600:.0f}s", "totalTimeAllowed": "108000s"}
        return {"gpuQuota": quota, "tpuQuota": quota, "quotaRefreshTime": "2026-11-28T00:00:00Z"}

    def _GetKernelSessionStatus(self, request: Request) -> Request:
        session = self._session(request["userName"], request["kernelSlug"], request.get("versionLabel"))
        return {"status": session.status, "failureMessage": session.failure or None}

    def _ListKernelSessionOutput(self, request: Request) -> Request:
        session = self._session(request["userName"], request["kernelSlug"], request.get("versionLabel"))
        files = [{"fileName": name, "url": self.link(path)} for name, path in session.outputs.items()]
        return page("files", files, request) | {"log": _log(session) if session.done else ""}


def _log(session: Session) -> str:
    """As Kaggle gives it: JSON, an entry for each line."""
    lines = session.text.splitlines(keepends=True)
    return "[" + "\n,".join(json.dumps({"stream_name": "stdout", "time": 0.0, "data": line}) for line in lines) + "]"

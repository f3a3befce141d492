"""What all parts of the server share: its settings and what it knows, its threads, and the bytes on their way up and down."""

from __future__ import annotations

import re
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from tests.fake_kaggle.wire import SITE, Call, Refused, Reply, Request

if TYPE_CHECKING:
    from tests.fake_kaggle.competitions import Submission
    from tests.fake_kaggle.datasets import DatasetVersion
    from tests.fake_kaggle.faults import Fault
    from tests.fake_kaggle.kernels import Session


@dataclass
class Blob:
    """Bytes on their way up."""

    name: str
    size: int
    path: Path

    @property
    def received(self) -> int:
        return self.path.stat().st_size


class State:
    """Everything the server knows; see `FakeKaggle`."""

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
        self.late = False
        self.leaderboard: Sequence[float] = ()
        self.gpu_hours = 30.0
        self.score_delay = self.dataset_delay = 0.0
        self.list_late = 0
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
        self.lock = threading.RLock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.port = port

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

    def entered(self) -> None:
        if not self.rules_accepted:
            raise Refused(403, "You must accept this competition's rules before you can continue")

    # Bytes

    def start_upload(self, name: str, size: int) -> Request:
        token = f"blob-{len(self.blobs) + 1}"
        path = self.store / "blobs" / token
        path.touch()
        self.blobs[token] = Blob(name, size, path)
        return {"token": token, "createUrl": f"{SITE}/upload/{token}"}

    def _StartBlobUpload(self, request: Request) -> Request:
        return self.start_upload(request["name"], request.get("contentLength", 0))

    def put(self, token: str, span: str | None, body: Path) -> Reply:
        """Take bytes: all of them, a rest (`bytes 10-19/20`), or none, to ask how many are here (`bytes */20`)."""
        with self.lock:
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

    def uploaded(self, token: str) -> Blob:
        blob = self.blobs.get(token)
        if blob is None or blob.received != blob.size:
            raise Refused(400, "The uploaded file is missing or incomplete")
        return blob

    def link(self, path: Path, name: str = "") -> str:
        """A short-lived address, as Kaggle's storage gives; it needs no authorization."""
        if path not in self.links:
            self.links.append(path)
        return f"{SITE}/files/{self.links.index(path)}/{quote(name or path.name)}"

"""The stand-in as a whole."""

from __future__ import annotations

import base64
import contextlib
import shutil
import socket
import time
from pathlib import Path

from tests.fake_kaggle.faults import Fault
from tests.fake_kaggle.kernels import Kernels
from tests.fake_kaggle.web import Server
from tests.fake_kaggle.wire import PROXIES, Call, Refused, Reply, Request, clean_environ


class FakeKaggle(Kernels):
    """The server and all it knows. Use it as a context manager; a fault of its own makes the exit raise.

    Set at any time: `faults`; `layout` (`nested` or `flat` mounts); `rules_accepted`; `kernels_only` (no file submissions);
    `late` (after the deadline: Public 0.00000); `leaderboard` (scores, best first); `gpu_hours` (left this week); `score_delay`
    and `dataset_delay` in seconds; `list_late` (so many lists lack a new submission); `missing_code`, the status for what is not
    there; `flat_errors` (error bodies whose message the client prints); `python`, the command that runs kernels, and `kernel_env`
    on top of their environment.

    To look at: `calls`, `connects`, `submissions`, `datasets` and `kernels` (versions by slug), `blobs`, `errors`.

    Args:
        root: a folder; `sessions/<slug>/<version>/` holds what a kernel saw and left, `store/` the rest; both start empty.
        data: the competition's download; published tables of truth in it are held back.
        truth: `fname,labels,usage`; without it, submissions are complete without scores.
        run_kernels: run what is pushed; else versions stay QUEUED until `finish_kernel`.
    """

    def __enter__(self) -> FakeKaggle:
        for folder in (self.store, self.root / "sessions"):  # nothing is remembered from one server to the next
            shutil.rmtree(folder, ignore_errors=True)
        (self.store / "blobs").mkdir(parents=True)
        self._server = Server(("127.0.0.1", self.port), self)
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

    def settings(self, home: Path, token: str = "") -> dict[str, str]:
        """The variables that point the client here, with a key or an access token."""
        login = {"KAGGLE_API_TOKEN": token} if token else {"KAGGLE_USERNAME": self.owner, "KAGGLE_KEY": "dummy"}
        here = f"http://127.0.0.1:{self.port}"
        return {
            "HOME": str(home),
            "TMPDIR": str(home / "tmp"),  # where the client remembers half-finished uploads
            "KAGGLE_CONFIG_DIR": str(home),
            **login,
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            **{name: here for proxy in PROXIES[:2] for name in (proxy, proxy.upper())},
        }

    def env(self, home: Path, token: str = "") -> dict[str, str]:
        """A whole environment for a subprocess, with a home of its own; nothing can leave the machine."""
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        return clean_environ() | self.settings(home, token)

    # What every request goes through

    def note(self, rpc: str, request: Request) -> Fault | None:
        """Record a call and find the fault that hits it."""
        with self.lock:
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
        with self.lock:
            if request.get("competitionName", self.competition) != self.competition:
                raise Refused(404, "Competition not found")
            result = action(request)
        return result if isinstance(result, Reply) else Reply(body=result)

    def authorise(self, authorization: str) -> None:
        """Everything is private: `owner` with any key or token that does not begin with `bad`."""
        scheme, _, secret = authorization.partition(" ")
        user, key = self.owner, secret
        if scheme == "Basic":
            user, _, key = base64.b64decode(secret).decode().partition(":")
        if not key or key.startswith("bad"):
            raise Refused(401, "Unauthenticated")
        if user != self.owner:
            raise Refused(403, "Permission denied")

    def _IntrospectToken(self, request: Request) -> Request:
        return {"active": not request.get("token", "bad").startswith("bad"), "username": self.owner}

"""The server on loopback, and the faults around each request."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tests.fake_kaggle.faults import Fault
from tests.fake_kaggle.wire import Refused, Reply, Request

if TYPE_CHECKING:
    from tests.fake_kaggle.server import FakeKaggle


class Server(ThreadingHTTPServer):
    """Closing it waits for every handler."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], fake: FakeKaggle) -> None:
        self.fake, self.open = fake, set[socket.socket]()
        super().__init__(address, Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is none of our business; anything else is."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            self.fake.errors.append(traceback.format_exc())


class Handler(BaseHTTPRequestHandler):
    """One connection, one request (HTTP/1.0): applies faults around what `FakeKaggle` does."""

    server: Server

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
            return self._send(Reply(body={"status": "error", "error": fault.message}))
        if status and not kind.endswith("_after"):
            retry = {"Retry-After": f"{fault.seconds:g}"} if fault.seconds is not None else {}
            return self._send(self._error(int(status[0]), fault.message, retry))
        if kind == "delay":
            self.fake.pause(when)
        reply = self._done(action)
        if kind == "hang_after":
            self.fake.pause(fault.seconds)
        if kind in ("hang_after", "drop_after"):
            return self._drop()
        if status:
            reply = self._error(int(status[0]), fault.message)
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

"""A small real server that answers as the Hugging Face hub does, for one repository after another."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Files by `OWNER/REPO/FILE`, licences by `OWNER/REPO`; `asked` is the paths of all requests."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    damaged: bool = False

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/")
            tags = [f"license:{self.licences[repo]}"] if repo in self.licences else []
            return 200, {"Content-Type": "application/json"}, json.dumps({"id": repo, "tags": tags, "siblings": []}).encode()
        owner, repo, _, _, file = [*path.strip("/").split("/", 4), "", "", "", ""][:5]
        content = self.files.get(f"{owner}/{repo}/{file}")
        if content is None:
            known = any(name.startswith(f"{owner}/{repo}/") for name in self.files)
            return 404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"}, b""
        sent = content[:-1] + bytes([content[-1] ^ 1]) if self.damaged else content
        return 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": REVISION}, sent


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on this machine, until the context ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.reply(body=False)

        def do_GET(self) -> None:
            self.reply(body=True)

        def reply(self, *, body: bool) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            status, headers, content = hub.answer(self.path.split("?")[0])
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

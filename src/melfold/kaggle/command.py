"""The kaggle command in a process of its own: how it is called, and what its output means.

Its exit code says little: it is 0 on many failures. With `VERBOSE` the command also prints the requests and replies (the
trace), which tell how far a call came and what Kaggle answered. The trace holds secrets, so only what is needed is taken from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melfold.errors import MelfoldError

LOGIN = "Run `kaggle auth login`, or set KAGGLE_API_TOKEN, or put kaggle.json into ~/.kaggle; accept the competition's rules"

_BLOCK = re.compile(r"^-{10,}(Request|Response)-{10,}\n(.*?)(?:^-{50}\n|\Z)", re.M | re.S)
_LOGGED = re.compile(r"^(?:DEBUG|INFO):[\w.]+:.*\n?", re.M)
_ADVICE = re.compile(
    r"If this is unexpected|You don't have access|The resource was not|You have been rate limited|This is a problem on Kaggle"
)
_STATUS = {"You don't have access": 403, "The resource was not": 404, "You have been rate limited": 429}


class KaggleError(MelfoldError):
    """A failed call. `outcome`: `refused`, or `doubtful` if it may have had effects. `code`: the HTTP status, if it is known."""

    def __init__(self, what: str, found: str = "", fix: str = "", *, outcome: str = "refused", code: int = 0) -> None:
        super().__init__(what, found, fix)
        self.outcome, self.code = outcome, code


@dataclass(frozen=True)
class Said:
    """What a call of the command left behind.

    Args:
        code: its exit code; None if it did not end in time.
        text: what it printed, without the trace and without secrets.
        asked: the names of Kaggle's functions that it called, or was about to call; None without a trace.
        status: the HTTP status of the last reply; 0 if there was none.
        reply: the last reply, if it was JSON.
    """

    code: int | None
    text: str
    asked: list[str] | None = None
    status: int = 0
    reply: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether the call succeeded."""
        return self.code == 0 and not re.search(r"\b[45]\d\d (Client|Server) Error", self.text)

    @property
    def message(self) -> str:
        """Kaggle's own words about an error; in its replies they come in two forms."""
        inner = (self.reply or {}).get("error")
        found = inner if isinstance(inner, dict) else self.reply or {}
        return str(found.get("message", "")) if self.status >= 400 else ""

    def may_have(self, function: str) -> bool:
        """Whether a function of Kaggle whose name matches a pattern may have been called."""
        return self.asked is None or any(re.fullmatch(function, name) for name in self.asked)


@dataclass(frozen=True)
class Upload:
    """An upload, which can be continued.

    Args:
        folder: where the command remembers half-finished uploads. It silently leaves out a file that Kaggle has forgotten since,
            so what was uploaded must be checked.
        tell: called with the file's name and percent.
    """

    folder: Path
    tell: Callable[[str, int], None]


def call(
    args: Sequence[str],
    timeout: float,
    *,
    trace: bool = True,
    growing: Path | None = None,
    upload: Upload | None = None,
) -> Said:
    """Run the command once.

    Args:
        timeout: seconds after which it is killed.
        trace: ask for the trace; not for downloads, which it would read into memory.
        growing: the timeout counts from the last new byte in this folder.
        upload: the call uploads files.
    """
    lines: list[str] = []
    file = ""

    def tell(line: str) -> None:
        nonlocal file
        lines.append(line)
        if upload and (found := re.search(r"Starting upload for file (\S+)|(\d+)%\|", line)):
            file = found[1] or file
            if found[2]:  # of the bar that the command draws
                upload.tell(file, int(found[2]))

    if upload:
        upload.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="melfold-kaggle-") as scratch:
        environment = {"TMPDIR": str(upload.folder if upload else scratch)} | ({"VERBOSE": "true"} if trace else {})
        process, reader = _start(args, environment, tell)
        try:
            code = _wait(process, timeout, growing)
        finally:
            _kill(process)
            reader.join()
    return read("".join(lines), code, trace)


def follow(args: Sequence[str], tell: Callable[[str], None]) -> Callable[[float], None]:
    """Run the command beside everything else, and tell each line that it prints.

    Returns: what ends it, after some seconds in which it may end by itself.
    """
    process, reader = _start(args, {}, lambda line: tell(redact(line.rstrip())), subprocess.DEVNULL)

    def stop(patience: float) -> None:
        _wait(process, patience)
        _kill(process)
        reader.join()

    return stop


def _start(
    args: Sequence[str], environment: dict[str, str], tell: Callable[[str], None], errors: int = subprocess.STDOUT
) -> tuple[subprocess.Popen[str], threading.Thread]:
    """Start the command, and a thread that tells each line it prints; a progress bar is told as lines too."""
    process = subprocess.Popen(
        [executable(), "-W", *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"} | environment,
        start_new_session=True,  # Ctrl-C must not interrupt a call
        encoding="utf-8",
        errors="replace",
    )

    def read_on() -> None:
        assert process.stdout
        with process.stdout as lines:
            for line in lines:
                tell(line)

    reader = threading.Thread(target=read_on, daemon=True)
    reader.start()
    return process, reader


def _wait(process: subprocess.Popen[str], limit: float, growing: Path | None = None) -> int | None:
    """The exit code; None if the process does not end in time."""
    size, since = -1, time.monotonic()
    while (left := since + limit - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(left, 5))
        now = sum(p.stat().st_size for p in growing.iterdir() if p.is_file()) if growing else size
        if now != size:
            size, since = now, time.monotonic()
    return None


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(text: str, code: int | None, trace: bool) -> Said:
    """Take a call's output apart."""
    text = redact(text)
    blocks: list[tuple[str, str]] = _BLOCK.findall(text)
    plain = _LOGGED.sub("", _BLOCK.sub("", text))
    asked = [body.split("\n", 1)[0].rpartition("/")[2].strip() for kind, body in blocks if kind == "Request"]
    status, reply = 0, None
    if blocks and blocks[-1][0] == "Response":
        head, _, body = blocks[-1][1].partition("\n\n")
        status = int(found[0]) if (found := re.match(r"\d+", head)) else 0
        with contextlib.suppress(ValueError):
            reply = json.loads(body)
    return Said(code, plain, asked if trace else None, status, reply if isinstance(reply, dict) else None)


def failure(what: str, said: Said, timeout: float = 0) -> KaggleError:
    """The error that a failed call is."""
    if said.code is None:
        found, fix = f"within {timeout:.0f} s", "Look at kaggle.com, then try again"
        return KaggleError(f"{what}: no answer", found, fix, outcome="doubtful")
    text, code = said.text, status_of(said)
    reason = said.message or last_line(text) or "no output"
    if code == 401 or re.search(r"authentication required|must authenticate|could not find kaggle\.json", text, re.I):
        if _secrets():
            return KaggleError("Kaggle does not accept these credentials", what, LOGIN, code=401)
        return KaggleError("no Kaggle credentials", f"{what} was not authorised", LOGIN, code=401)
    if "Permission 'kernels.get' was denied" in text:
        return KaggleError(f"{what}: no such kernel, or no access", reason.split(". ")[0], code=403)
    if code == 403:
        fix = "Check your login (`kaggle config view`; a token or kaggle.json), and accept the competition's rules on its page"
        return KaggleError(f"{what}: no access", reason, fix, code=code)
    found = reason if not code or str(code) in reason else f"{code} {reason}"
    if 400 <= code < 500:
        return KaggleError(f"{what}: refused", found, hint(what, reason), code=code)
    return KaggleError(f"{what}: failed", found, "Try again later", outcome="doubtful", code=code)


def status_of(said: Said) -> int:
    """The HTTP status of a failed call, from the trace or from the text; 0 if neither has it."""
    if said.status >= 400:
        return said.status
    if found := re.search(r"\b([45]\d\d) (?:Client|Server) Error", said.text):
        return int(found[1])
    return next((code for words, code in _STATUS.items() if words in said.text), 0)


def hint(what: str, reason: str) -> str:
    """What may be wrong with a kernel, where Kaggle does not say it."""
    if "kernels push" not in what or re.search(r"quota|hours|verif", reason, re.I):
        return ""
    return "Kaggle refuses sources over 1 MB, titles in use and inputs that are not ready"


def last_line(text: str) -> str:
    """The last line that says what happened, without the command's advice."""
    parts = [part for part in re.split(r"\n\s*\n", text.strip()) if not _ADVICE.match(part.strip())]
    lines = [line.strip() for line in "\n".join(parts).splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def executable() -> str:
    """The kaggle command: what `MELFOLD_KAGGLE` names, else that of this environment, else the one on the path."""
    beside = Path(sys.executable).with_name("kaggle")
    found = os.environ.get("MELFOLD_KAGGLE") or (str(beside) if beside.exists() else shutil.which("kaggle"))
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
        for name in ("access_token", "access_token.txt", "kaggle.json", "credentials.json"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                text = (folder / name).read_text().strip()
                values = json.loads(text) if name.endswith(".json") else {"key": text}
                found |= {str(values.get(key, "")) for key in ("key", "access_token", "refresh_token")}
    return {secret for secret in found if len(secret) >= 5}

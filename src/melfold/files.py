"""The home folder; writing without half-written files; hashes; locks."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from melfold.errors import MelfoldError, first_line


class Home:
    """The folder that holds all that melfold makes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data, self.cache, self.folds = root / "data", root / "cache", root / "folds"
        self.runs, self.submissions, self.reports = root / "runs", root / "submissions", root / "reports"

    @classmethod
    def find(cls, root: str | Path | None = None) -> Home:
        """`root` if given, else `MELFOLD_HOME`, else the current folder."""
        return cls(Path(root or os.environ.get("MELFOLD_HOME") or ".").expanduser().resolve())


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` that is renamed to it on success and removed on failure.

    What a killed process left of the same file is removed first. If `durable`, it waits for the disk, so that a power cut cannot
    leave a name with nothing behind it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp") if durable else ():  # caches are too large to look each time
        if is_left_behind(old):
            old.unlink(missing_ok=True)
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            error.filename = str(path)  # a write that fails does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, naming the file when it is missing, broken, or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MelfoldError("a file is missing", str(path), "Run the stage that makes it") from None
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise MelfoldError(f"{path} is not JSON", first_line(error), "Delete it and run the stage again") from None
    if not isinstance(content, dict):
        what = f"{path} was not written by this version of melfold"
        raise MelfoldError(what, "no JSON object", "Delete it and run the stage again")
    return content


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line, up to the first line that a kill or damage left unreadable."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not line.endswith("\n"):
            break
        rows.append(row)
    return rows


def is_left_behind(path: Path) -> bool:
    """Whether the process that was writing a temporary file is gone."""
    writer = re.search(r"\.(\d+)\.tmp$", path.name)
    if not writer:
        return False
    try:
        os.kill(int(writer[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process left in `folder`."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[IO[str]]:
    """Hold an exclusive lock, and give its open file; the system lets go of it when the process dies, however it dies.

    The file is left in place. `waiting` is called once if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock now. A lock's file that does not exist is not made."""
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

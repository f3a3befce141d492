"""What travels: requests, replies, refusals, pages; and helpers on files that every part uses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

SITE = "http://localhost"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ftp_proxy")

Request = dict[str, Any]


class Call(NamedTuple):
    """One request as it came; `rpc` is `PUT` for uploaded bytes and `GET` for downloads."""

    rpc: str
    request: Request
    time: float


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


def clean_environ(*more: str) -> dict[str, str]:
    """This process's environment without a trace of Kaggle, proxies, or the prefixes named."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("KAGGLE_", *more)) and k.lower() not in PROXIES}


def stamp(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def title_of(slug: str) -> str:
    return slug.replace("-", " ").title()


def tree_files(folder: Path) -> dict[str, Path]:
    """Every regular file below a folder, by its relative name."""
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()}


def file_entry(name: str, path: Path) -> Request:
    made = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return {"ref": name, "name": name, "totalBytes": path.stat().st_size, "creationDate": stamp(made)}


def page(name: str, items: Sequence[Request], request: Request) -> Request:
    """One page of a list: `pageSize` (20, at most 200) from `pageToken` or `page` on."""
    size = min(request.get("pageSize") or 20, 200)
    start = int(request.get("pageToken") or (request.get("page", 1) - 1) * size)
    return {name: items[start : start + size], "nextPageToken": str(start + size) if start + size < len(items) else ""}


def copy_once(path: Path, target: Path) -> Path:
    """A copy, unless it is there already."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return target

"""The command that frees disk space."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import typer

from melfold.cli.options import HomeOpt, YesOpt
from melfold.cli.output import command, note, print_table, size
from melfold.errors import MelfoldError
from melfold.files import Home, is_left_behind, is_locked, read_json

app = typer.Typer()

KINDS = ("checkpoints", "temporary", "build", "caches")

YOUNG_SECONDS = 600
"""A temporary file this young may belong to a process of another machine that shares the folder."""


@dataclass(frozen=True)
class Item:
    """Something that may go: of a kind, a file or folder, and why nothing needs it."""

    kind: str
    path: Path
    why: str

    @cached_property
    def bytes(self) -> int:
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(path.lstat().st_size for path in files if path.is_file() or path.is_symlink())

    @property
    def in_use(self) -> bool:
        """Whether a process holds a lock within."""
        return self.path.is_dir() and any(is_locked(lock) for lock in self.path.rglob(".*lock"))


@command(app, "clean", "melfold clean checkpoints caches --yes")
def clean(
    kinds: Annotated[
        list[str] | None, typer.Argument(metavar="[KIND...]", help=f"{', '.join(KINDS)} (default: all of them).")
    ] = None,
    yes: YesOpt = False,
    home: HomeOpt = None,
) -> None:
    """Show what could be deleted to free disk space, and delete it with --yes. Runs and submissions always stay."""
    for kind in kinds or []:
        if kind not in KINDS:
            raise MelfoldError("unknown kind", repr(kind), f"Use {', '.join(KINDS)}")
    place = Home.find(home)
    rest = []
    for item in [*_checkpoints(place), *_temporary(place), *_build(place), *_caches(place)]:
        if item.kind in (kinds or KINDS) and item.in_use:
            note(f"{item.path} is in use and stays")
        elif item.kind in (kinds or KINDS):
            rest.append(item)
    if not rest:
        typer.echo(f"There is nothing to delete in {place.root}.")
        return
    rows = [{"kind": i.kind, "size": size(i.bytes), "path": i.path.relative_to(place.root), "why": i.why} for i in rest]
    print_table(rows, left=["path", "why"])
    total = size(sum(item.bytes for item in rest))
    if not yes:
        typer.echo(f"{total} in all. To delete this, add --yes.")
        return
    for item in rest:
        shutil.rmtree(item.path) if item.path.is_dir() else item.path.unlink(missing_ok=True)
    typer.echo(f"Deleted {total}.")


def _checkpoints(home: Home) -> Iterator[Item]:
    for path in sorted(home.runs.glob("*/*/checkpoint.pt")):
        if path.with_name("result.json").exists():
            yield Item("checkpoints", path, "this fold is trained")


def _temporary(home: Home) -> Iterator[Item]:
    """What killed processes left half-written, by the names that `atomic_path` gives."""
    for root in (home.data, home.cache, home.folds, home.runs, home.submissions):
        for path in sorted(root.rglob(".*.tmp")):
            if is_left_behind(path) and time.time() - path.stat().st_mtime > YOUNG_SECONDS:
                yield Item("temporary", path, "its process was killed")


def _build(home: Home) -> Iterator[Item]:
    whys = {"demo": "`melfold demo` makes it again", "dry-run": "left by `melfold run --dry-run`"}
    folder = home.root / "build"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name == "kernels":
            yield from (Item("build", kernel, "`melfold kernel build` makes it again") for kernel in sorted(path.iterdir()))
        else:
            yield Item("build", path, whys.get(path.name, "made by a build"))


def _caches(home: Home) -> Iterator[Item]:
    """Log-mels of front-ends that no run uses."""
    from melfold.config import LogMelConfig

    used = set()
    for path in sorted(home.runs.glob("*/recipe.json")):
        try:
            used.add(LogMelConfig.model_validate(read_json(path)["logmel"]).fingerprint())
        except (MelfoldError, ValueError, KeyError, TypeError):
            note(f"caches stay, since {path} cannot be read")
            return
    for folder in sorted(home.cache.glob("*/*/")):
        if folder.name not in used:
            yield Item("caches", folder, "no run uses this front-end")

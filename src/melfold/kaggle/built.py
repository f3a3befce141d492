"""A built kernel: its name at Kaggle, its files, and whether it was rehearsed, pushed and fetched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melfold.artefacts import Artefact
from melfold.errors import MelfoldError
from melfold.files import Home, digest


@dataclass(frozen=True)
class Kernel:
    """A kernel's version at Kaggle."""

    slug: str
    version: int


class Built:
    """A built kernel: the folders `kernel/` and (if it has weights) `dataset/`, as Kaggle's tool takes them, and four stamps.

    `build.json` says what it was made from; `rehearsal.json`, `pushed.json` and `fetched.json` say which build they are about.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.kernel, self.dataset = folder, folder / "kernel", folder / "dataset"
        stamps = ("rehearsal.json", "pushed.json", "fetched.json")
        self.rehearsal_stamp, self.push_stamp, self.fetch_stamp = (Artefact(folder / name) for name in stamps)

    @property
    def artefact(self) -> Artefact:
        """All that would be pushed: the files of both folders, and those that were built there."""
        stamp = self.folder / "build.json"
        present = {path for folder in (self.kernel, self.dataset) if folder.exists() for path in folder.iterdir()}
        try:
            recorded = {self.folder / name for name in Artefact(stamp).read()["files"]}
        except MelfoldError:  # no stamp, or an old one: whoever needs it says so
            recorded = set()
        return Artefact(stamp, tuple(sorted(present | recorded)))

    @property
    def facts(self) -> dict[str, Any]:
        """What `build.json` says.

        Raises:
            MelfoldError: no built kernel.
        """
        if not self.artefact.stamp.exists():
            raise MelfoldError("no built kernel", str(self.folder), "Run `melfold kernel build`")
        return self.artefact.read()

    def verify(self) -> dict[str, Any]:
        """As `facts`, after checking that no file was changed since the build.

        Raises:
            MelfoldError: no built kernel, or one with other files.
        """
        facts = self.facts
        self.artefact.verify()
        return facts

    @property
    def inputs(self) -> dict[str, str]:
        """What the other stamps are made from: this build, named by the hash of all that would be pushed."""
        return {"build": digest(self.facts["files"])}

    @property
    def passed(self) -> bool:
        """Whether this build has passed its rehearsal."""
        return self.rehearsal_stamp.is_fresh(self.inputs) and bool(self.rehearsal_stamp.read().get("passed"))

    @property
    def pushed(self) -> int | None:
        """Its version at Kaggle, if this build was pushed."""
        return self.push_stamp.read()["version"] or None if self.asked else None

    @property
    def asked(self) -> bool:
        """Whether this build was pushed, or Kaggle was asked to take it without an answer so far."""
        return self.push_stamp.is_fresh(self.inputs)

    @property
    def fetched(self) -> bool:
        """Whether the run of a training kernel was brought home."""
        return self.fetch_stamp.is_fresh(self.inputs)


def slug_of(title: str) -> str:
    """The slug Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def title_for(kind: str, name: str, session: int = 0) -> str:
    """A kernel's title, which decides its slug: at most 50 characters.

    Names that would be shortened, or that are not their own slug (`x_1` and `x-1` have the same), get a piece of their hash.
    """
    more = f"-s{session}" if session else ""
    words = slug_of(f"melfold {kind} {name}")
    if slug_of(name) != name or len(words + more) > 50:
        words = f"{words[: 41 - len(more)].rstrip('-')}-{digest(name)[:8]}"
    return (words + more).replace("-", " ")


def built_for(home: Home, kind: str, name: str, session: int = 0) -> Built:
    """Where a kernel is built, whether it exists or not: in a folder that is named by its slug.

    Args:
        name: of the submission, or of the run.
    """
    return Built(home.root / "build" / "kernels" / slug_of(title_for(kind, name, session)))

"""A built kernel: its name at Kaggle, its files, and whether it was rehearsed and pushed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melfold.artefacts import Artefact
from melfold.errors import MelfoldError
from melfold.files import Home, digest


@dataclass(frozen=True)
class Built:
    """A built kernel: the folders `kernel/` and (if it has weights) `dataset/`, as Kaggle's tool takes them, and three stamps.

    `build.json` says what it was made from; `rehearsal.json` and `pushed.json` say which build they are about.
    """

    folder: Path

    @property
    def kernel(self) -> Path:
        return self.folder / "kernel"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

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
        """What `rehearsal.json` and `pushed.json` are made from: this build, named by the hash of all that would be pushed."""
        return {"build": digest(self.facts["files"])}

    @property
    def rehearsal_stamp(self) -> Artefact:
        return Artefact(self.folder / "rehearsal.json")

    @property
    def push_stamp(self) -> Artefact:
        return Artefact(self.folder / "pushed.json")

    @property
    def passed(self) -> bool:
        """Whether this build has passed its rehearsal."""
        return self.rehearsal_stamp.is_fresh(self.inputs) and bool(self.rehearsal_stamp.read().get("passed"))

    @property
    def pushed(self) -> dict[str, Any] | None:
        """`kernel` and `version`, if this build was pushed."""
        return self.push_stamp.read() if self.push_stamp.is_fresh(self.inputs) else None


def slug_of(title: str) -> str:
    """The slug Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def title_for(kind: str, name: str) -> str:
    """A kernel's title, which decides its slug: at most 50 characters; shortened names differ by a hash."""
    words = slug_of(f"melfold {kind} {name}")
    return words.replace("-", " ") if len(words) <= 50 else f"{words[:41].rstrip('-')}-{digest(name)[:8]}".replace("-", " ")


def kernel_id(owner: str, kind: str, name: str) -> str:
    """`owner/slug`."""
    return f"{owner}/{slug_of(title_for(kind, name))}"


def built_for(home: Home, kind: str, name: str) -> Built:
    """Where a kernel is built, whether it exists or not. The name of an inference kernel is its submission's."""
    return Built(home.root / "build" / "kernels" / slug_of(title_for(kind, name)))

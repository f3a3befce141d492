"""Artefacts: files that remember what they were made from.

An artefact is one or more files and a *stamp*, a JSON file that is written last. The stamp holds the named inputs the files were
made from, the SHA-256 of each file, any facts worth keeping, and a digest of all this. So it can say whether the artefact is
fresh, what changed, and whether a file or the stamp itself was changed since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melfold.errors import MelfoldError
from melfold.files import digest, read_json, sha256_file, write_json

SHOWN = 6
"""How many differences a message lists."""


@dataclass(frozen=True)
class Artefact:
    """Files made from named inputs, all in the folder of their stamp or below it."""

    stamp: Path
    files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, path: Path) -> Artefact:
        """A single file `x.csv`, with its stamp `x.json` beside it."""
        return cls(path.with_suffix(".json"), (path,))

    @property
    def exists(self) -> bool:
        """Whether the stamp and all files exist; says nothing of their content."""
        return self.stamp.exists() and all(path.exists() for path in self.files)

    def read(self) -> dict[str, Any]:
        """The stamp: `made_from`, `files`, and the facts.

        Raises:
            MelfoldError: no stamp, or one that cannot be read or was changed after it was written.
        """
        content = read_json(self.stamp)
        if not all(key in content for key in ("made_from", "files", "digest")):
            what = f"{self.stamp} was not written by this version of melfold"
            raise MelfoldError(what, "no made_from, files and digest", "Make it again")
        if content.pop("digest") != digest(content):
            raise MelfoldError(f"{self.stamp} was changed after it was written", "its digest differs", "Make it again")
        return content

    def changes(self, inputs: Mapping[str, Any]) -> list[str]:
        """What differs from these inputs, in words; nothing if the artefact is fresh.

        An input that the stamp has and `inputs` lacks is not compared: the caller may not know all of them.
        """
        if not self.stamp.exists():
            return [f"{self.stamp.name} does not exist"]
        try:
            content = self.read()
        except MelfoldError:
            return [f"{self.stamp.name} cannot be read"]
        before = {key: value for key, value in content["made_from"].items() if key in inputs}
        return differences(before, summary(inputs)) + self._damage(content)

    def is_fresh(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the files exist, are as they were written, and were made from just these inputs."""
        return not self.changes(inputs)

    def verify(self) -> dict[str, Any]:
        """The stamp's content, after checking every file against its recorded hash.

        Raises:
            MelfoldError: a missing stamp, or a file that is missing or was changed.
        """
        content = self.read()
        if damage := self._damage(content):
            raise MelfoldError(f"{self.stamp.parent} is damaged", "; ".join(damage), "Delete it and make it again")
        return content

    def _damage(self, content: Mapping[str, Any]) -> list[str]:
        damage = []
        for path in self.files:
            name = path.relative_to(self.stamp.parent).as_posix()
            if not path.exists():
                damage.append(f"{name} is missing")
            elif content["files"].get(name) != sha256_file(path):
                damage.append(f"{name} was changed after it was written")
        return damage

    def commit(self, inputs: Mapping[str, Any], *, draft: Path | None = None, **facts: Any) -> None:
        """Write the stamp for files that are in place; `draft` stands for a file that is moved there after the stamp."""
        files = {path.relative_to(self.stamp.parent).as_posix(): sha256_file(draft or path) for path in self.files}
        # As JSON will give it back: keys are text, tuples are lists.
        content = json.loads(json.dumps({"made_from": summary(inputs), "files": files, **facts}))
        write_json(self.stamp, content | {"digest": digest(content)})

    def remove(self) -> None:
        """Delete the stamp, then the files."""
        for path in (self.stamp, *self.files):
            path.unlink(missing_ok=True)


def summary(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs as a stamp holds them: short values and tables of settings as they are, everything else as a digest."""
    return {key: _short(value) for key, value in inputs.items()}


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _short(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return digest(value)
    return list(value) if isinstance(value, tuple) else value


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every value that differs, with dotted keys for nested tables."""
    lines = []
    for key in [*after, *(k for k in before if k not in after)]:
        name, old, new = f"{prefix}{key}", before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{name}.")
        elif old != new:
            lines.append(f"{name}: {_shown(old)} -> {_shown(new)}")
    return lines


def listed(lines: Sequence[str]) -> str:
    """The first differences in one line."""
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "none"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:8]}… ({digest(text)[:8]})"

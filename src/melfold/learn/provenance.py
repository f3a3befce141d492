"""Where a run's numbers come from: its track, data, licences, versions and commit."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

from melfold.config import Recipe
from melfold.errors import MelfoldError
from melfold.files import sha256_file


def licence_of(recipe: Recipe) -> str:
    """The licence of the weights a recipe starts from: what the recipe says, or what timm knows. Empty for random weights."""
    if recipe.model.weights == "none":
        return ""
    if recipe.model.licence:
        return recipe.model.licence
    if recipe.model.weights != "hub":
        return "unknown"
    import timm

    known = timm.get_pretrained_cfg(recipe.model.name)
    return (known and known.license) or "unknown"


def join_licences(*licences: str) -> str:
    """Several comma-separated lists of licences as one, without duplicates."""
    return ", ".join(sorted({part for text in licences for part in text.split(", ") if part}))


def first_weights_sha256(weights: str) -> str:
    """The hash of the file in `file:PATH`; empty for `none` and `hub`.

    Raises:
        MelfoldError: no such file.
    """
    if not weights.startswith("file:"):
        return ""
    path = Path(weights.removeprefix("file:")).expanduser()
    if not path.is_file():
        raise MelfoldError("no such weights file", str(path), "Check model.weights=file:PATH")
    return sha256_file(path)


def current_commit(exclude: str = "") -> str:
    """The commit of the working folder, with `+` if anything outside the folder `exclude` is not committed.

    Empty outside a repository.
    """
    outside = ["--", ".", f":(exclude){exclude}"] if exclude else []

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", *outside) else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    """The versions that decide the numbers."""
    return {name: importlib.metadata.version(name) for name in ("melfold", "torch", "timm", "numpy")}

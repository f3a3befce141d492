"""Where a run's numbers come from: its track, data, licences, versions and commit."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess

from melfold.artefacts import Artefact
from melfold.config import Recipe
from melfold.files import Home
from melfold.learn.fetch import hub_file

UNKNOWN = "unknown"

KNOWN_REPOSITORIES = {"topel/ConvNeXt-Tiny-AT": ("AudioSet",)}
"""Hub repository -> what its weights were trained on, for those that timm's tags do not tell of."""

DATA_OF_TAGS = {
    "in1k|in|imagenet": "ImageNet-1k",
    "in12k": "ImageNet-12k",
    "in21k|in22k|miil": "ImageNet-21k",
    "jft|jft300m|jft4b|ns": "JFT",
    "laion|laion2b|laion400m": "LAION",
    "openai|clip": "WIT-400M",
    "webli": "WebLI",
    "dfn2b|dfn5b": "DFN",
    "datacomp.*": "DataComp",
    "merged2b": "Merged-2B",
    "metaclip2?": "MetaCLIP",
    "lvd142m": "LVD-142M",
    "lvd1689m": "LVD-1689M",
    "sat493m": "SAT-493M",
    "yfcc100m|yfcc15m|ssl": "YFCC-100M",
    "ig1b|wsl|swsl|swag": "Instagram",
    "as2m|as20k|audioset": "AudioSet",
    "fsd50k": "FSD50K",
}
"""A part of a timm tag -> its data set."""


def licence_of(recipe: Recipe, home: Home | None = None) -> str:
    """The licence of the weights a recipe starts from: what the recipe says, or timm knows, or the hub said at the download.

    Empty for random weights and another run's, `unknown` if no source says.
    """
    if recipe.model.weights == "none" or recipe.model.first_run:
        return ""
    if recipe.model.licence:
        return recipe.model.licence
    file = hub_file(recipe.model)
    stamp = Artefact.of(file.path(home)) if file and home else None
    return (file and file.licence) or (stamp and stamp.exists and stamp.read().get("licence")) or UNKNOWN


def seen_data(recipe: Recipe) -> tuple[str, ...]:
    """The data sets that the weights a recipe starts from were trained on: what the recipe says, or timm's tags tell.

    Empty for random weights and another run's; `unknown` is a data set without a known name.
    """
    model = recipe.model
    if model.weights == "none" or model.first_run:
        return ()
    if model.seen:
        return model.seen
    file = hub_file(model)
    if file and file.repo in KNOWN_REPOSITORIES:
        return KNOWN_REPOSITORIES[file.repo]
    _, _, tag = (file.repo if file else model.name).partition(".")
    if not file and not tag:
        return (UNKNOWN,)
    found = {name for part in re.split("[_.]", tag) for pattern, name in DATA_OF_TAGS.items() if re.fullmatch(pattern, part)}
    return tuple(sorted(found)) or (UNKNOWN,)


def freesound_warning(recipe: Recipe) -> str:
    """A warning if a recipe's first weights may have seen Freesound's recordings, the test clips among them; else empty."""
    images = recipe.model.weights == "hub"  # timm's own models: whatever they saw was not sound
    told = [name for name in seen_data(recipe) if name != UNKNOWN or not images]
    doubtful = [name for name in told if name == UNKNOWN or re.search("freesound|fsd|wavcaps|clap", name.lower())]
    if not doubtful:
        return ""
    weights = recipe.model.weights.rpartition("/")[2]
    text = f"the weights of {recipe.model.name} ({weights}) may have seen clips of this competition: "
    if doubtful == [UNKNOWN]:
        return f"{text}their data sets are not known. Name them with --set model.seen=…"
    return f"{text}data sets {', '.join(doubtful)}. FAT2019's clips come from Freesound, as FSD50K's do"


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

"""A finished run and its submission, small, and the means to call melfold on them with the real CLI and a local Kaggle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from melfold import pipeline
from melfold.config import Recipe
from melfold.data.competition import Competition, load_competition
from melfold.data.demo import write_demo
from melfold.files import Home
from melfold.kaggle.kernels import Built, build_infer
from melfold.learn.devices import pick_device
from melfold.recipes import load_recipe

SLUG = "freesound-audio-tagging-2019"
SETS = (
    "logmel.n_fft=256",
    "logmel.hop_length=320",
    "logmel.n_mels=32",
    "model.kwargs={depths=[1, 1, 1, 1], dims=[8, 16, 16, 16]}",
    "train.epochs=1",
    "train.crop_seconds=0.64",
    "folds.n_folds=2",
    "predict.shift_seconds=[0, 0.16]",
)


@dataclass(frozen=True)
class World:
    """`home` holds run and submission `tiny`; copy it before changing it."""

    home: Home
    data: Path

    @classmethod
    def make(cls, root: Path) -> World:
        data = write_demo(root / "demo")
        made = cls(Home(root / "home"), data)
        pipeline.run_all(data, made.home, made.recipe, "tiny", pick_device("cpu", "off"), jobs=1)
        return made

    @property
    def recipe(self) -> Recipe:
        return load_recipe("demo", SETS)

    @property
    def competition(self) -> Competition:
        return load_competition(self.data)

    @property
    def truth(self) -> Path:
        return self.data / "test_post_competition.csv"

    def copy(self, target: Path) -> World:
        """A home of one's own; the cache is shared by hard links."""
        shutil.copytree(self.home.root, target, copy_function=os.link)
        for path in target.joinpath("submissions").rglob("*.*"):
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        return World(Home(target), self.data)

    def build(self, **options: object) -> Built:
        return build_infer(self.home, "tiny", "tester", SLUG, gpu=False, **options)  # type: ignore[arg-type]


def melfold(*args: object, env: Mapping[str, str], home: Home, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        command(*args, home=home), env=dict(env), capture_output=True, text=True, timeout=timeout, cwd=home.root.parent
    )


def command(*args: object, home: Home) -> list[str]:
    """`melfold ...` as a list."""
    return [sys.executable, "-m", "melfold", *map(str, args), "--home", str(home.root)]


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """This process under another environment, so that library calls meet the local server too."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def rewrite(built: Built, code: str) -> None:
    """Put another script in a built kernel's place."""
    (built.kernel / "kernel.py").write_text(code)


def record(folder: Path) -> dict:
    """`melfold.json` of a kernel's working folder."""
    return json.loads((folder / "melfold.json").read_text())

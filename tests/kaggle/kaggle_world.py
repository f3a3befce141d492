"""A small finished run with its submission, and helpers to call melfold on them with the real CLI and a local Kaggle."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from melfold import stages
from melfold.compute import Compute
from melfold.config import Recipe
from melfold.data.competition import Competition, load_competition
from melfold.data.demo import write_demo
from melfold.files import Home
from melfold.kaggle.build import Target, build_infer
from melfold.kaggle.built import Built
from melfold.kaggle.rehearsal import link_inputs, mounts
from melfold.recipes import load_recipe

SLUG = "freesound-audio-tagging-2019"
DEMO = "demo"
"""A competition of the demo's data, which takes files; the real one is not for it."""
OLD_CLIENT = version("kaggle") == "2.2.4"
"""It ignores the version of a kernel that is asked for, and has no words about a submission that failed."""
SETS = (
    "logmel.n_fft=256",
    "logmel.hop_length=320",
    "logmel.n_mels=32",
    "model.kwargs={depths=[1, 1, 1, 1], dims=[8, 16, 16, 16]}",
    "train.epochs=1",
    "train.amp=off",
    "train.crop_seconds=0.64",
    "folds.n_folds=2",
    "predict.shift_seconds=[0, 0.16]",
)


CPU = Compute(("cpu",), jobs=1)


@dataclass(frozen=True)
class World:
    """`home` holds run and submission `tiny`; copy it before changing it."""

    home: Home
    data: Path

    @classmethod
    def make(cls, root: Path) -> World:
        data = write_demo(root / "demo")
        made = cls(Home(root / "home"), data)
        stages.run(data, made.home, made.recipe, "tiny", CPU)
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
        """A home of its own; large files are shared by hard links."""
        shutil.copytree(self.home.root, target, copy_function=os.link)
        for path in target.joinpath("submissions").rglob("*.*"):
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        return World(Home(target), self.data)

    def build(self, *, gpu: bool = False, minutes: float | None = None, source: str = "") -> Built:
        return build_infer(self.home, "tiny", Target("tester", SLUG, gpu=gpu, minutes=minutes), source=source)


def melfold(
    *args: object, env: Mapping[str, str], home: Home, timeout: float = 300, program: str = ""
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    line = command(*args, home=home, program=program)
    return subprocess.run(line, env=dict(env), capture_output=True, text=True, timeout=timeout, cwd=home.root.parent)


def command(*args: object, home: Home, program: str = "") -> list[str]:
    """`melfold ...` as a list; `program`: of a `QuickStart`, which need not import libraries first."""
    return [*([program] if program else [sys.executable, "-m", "melfold"]), *map(str, args), "--home", str(home.root)]


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Change the environment of this process, so that library calls reach the local server too."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def restamp(built: Built) -> None:
    """Accept the files of a built kernel as they are now, as if they had been built so."""
    facts = built.facts
    built.artefact.commit(facts["made_from"], **{k: v for k, v in facts.items() if k not in ("made_from", "files")})


def rewrite(built: Built, code: str) -> None:
    """Replace the script of a built kernel, as if it had been built so."""
    (built.kernel / "kernel.py").write_text(code)
    restamp(built)


def bundle_of(built: Built) -> dict:
    """What the script of a built kernel is told to do."""
    last = ast.parse((built.kernel / "kernel.py").read_text()).body[-1]
    (call,) = (node for node in ast.walk(last) if isinstance(node, ast.Call))
    return json.loads(ast.literal_eval(call.keywords[0].value))


def record(folder: Path) -> dict:
    """`melfold.json` of a kernel's working folder."""
    return json.loads((folder / "melfold.json").read_text())


def lay_out(built: Built, world: World, root: Path) -> Path:
    """The folders of a kernel. Returns: the working folder."""
    link_inputs(mounts(built, world.competition, world.home, root, "nested"), root)
    working = root / "kaggle/working"
    working.mkdir(parents=True)
    return working

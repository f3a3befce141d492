"""The small world that these tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kaggle_world import World

from tests.quick_start import QuickStart


@pytest.fixture(scope="session")
def quick() -> Iterator[QuickStart]:
    """Commands that start at once."""
    with tempfile.TemporaryDirectory(prefix="quick") as folder, QuickStart(Path(folder)) as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def _quick_kaggle(quick: QuickStart) -> Iterator[None]:
    """The kaggle command of every test here, but for those of the stand-in itself."""
    os.environ["MELFOLD_KAGGLE"] = quick.program("kaggle")
    yield
    del os.environ["MELFOLD_KAGGLE"]


@pytest.fixture(scope="session")
def kaggle_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Treat it as read-only: `copy` it."""
    return World.make(tmp_path_factory.mktemp("kaggle"))


@pytest.fixture
def own(kaggle_world: World, tmp_path: Path) -> World:
    """A world that a test may change."""
    return kaggle_world.copy(tmp_path / "own")

"""The small world that these tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from kaggle_world import World


@pytest.fixture(scope="session")
def kaggle_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Treat it as read-only: `copy` it."""
    return World.make(tmp_path_factory.mktemp("kaggle"))


@pytest.fixture
def own(kaggle_world: World, tmp_path: Path) -> World:
    """A world that a test may change."""
    return kaggle_world.copy(tmp_path / "own")

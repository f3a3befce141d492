"""The small competition that this layer's tests share."""

from __future__ import annotations

import pytest
from learn_world import World

from melfold import stages
from melfold.compute import Compute
from melfold.data.competition import load_competition
from melfold.data.demo import write_demo
from melfold.files import Home
from melfold.learn.devices import pick_device


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Treat it as read-only: start runs in a `tmp_path`."""
    root = tmp_path_factory.mktemp("world")
    made = World(load_competition(write_demo(root / "demo")), Home(root), pick_device("cpu", "off"))
    stages.cache(made.competition, made.home, made.recipe("train.clips=both"), Compute(jobs=1))
    stages.folds(made.competition, made.home, made.recipe())
    made.folds.with_suffix(".json").unlink()  # a table without a stamp may be used with other labels, as some tests do
    return made

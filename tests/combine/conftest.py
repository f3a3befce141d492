"""Runs whose predictions are made up: this layer reads tables, it does not train."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from made_up import LABELS, MadeUp

from melfold.data.competition import Competition
from melfold.data.folds import write_folds
from melfold.files import Home


@pytest.fixture
def made_up(tmp_path: Path) -> MadeUp:
    """Twelve curated clips in three folds of unequal weight, and six test clips in an order of their own."""
    fnames = [f"c{i:02}.wav" for i in range(12)]
    labels = [tuple(LABELS[: 3 if i < 4 else 1]) if i % 2 else (LABELS[i % 4],) for i in range(12)]
    curated = pd.DataFrame({"labels": labels, "path": [tmp_path / f for f in fnames]}, index=pd.Index(fnames, name="fname"))
    asked = [f"t{i}.wav" for i in (3, 0, 5, 1, 4, 2)]
    test = pd.DataFrame({"path": [tmp_path / f for f in asked]}, index=pd.Index(asked, name="fname"))
    competition = Competition("made_up", tmp_path, LABELS, curated, curated.iloc[:0], test)
    folds = tmp_path / "folds" / "table.csv"
    write_folds(folds, pd.DataFrame({"fold": [i // 4 for i in range(12)]}, index=curated.index))
    return MadeUp(competition, Home(tmp_path / "home"), folds)

"""Near-duplicates by audio: cuts of one recording are found, other clips of the label are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from typer.testing import CliRunner

from melfold.cli.main import app
from melfold.data.cache import cache_folder
from melfold.data.competition import load_competition
from melfold.data.duplicates import suggest_groups
from melfold.data.groups import read_groups
from melfold.files import Home
from melfold.recipes import load_recipe


def test_cuts_of_one_texture_are_proposed_and_louder_ones_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = {}
    for number in range(12):  # twelve textures of a label, two cuts of each of the first three
        colour, level = rng.normal(0, 8, 64), rng.uniform(-50, -20)
        for cut in range(2 if number < 3 else 1):
            fname = f"t{number}c{cut}.wav"
            log_mel = level + 10 * cut + colour + rng.normal(0, 4, (80, 64))
            np.save(tmp_path / f"{Path(fname).stem}.npy", log_mel.astype(np.float16))
            labels[fname] = ("Rain",)
    groups, pairs = suggest_groups(pd.Series(labels), tmp_path)
    assert {frozenset(own) for own in groups.groupby(groups).groups.values()} == {
        frozenset({f"t{n}c0.wav", f"t{n}c1.wav"}) for n in range(3)
    }
    assert len(pairs) == 3
    assert pairs["distance"].is_monotonic_increasing
    labels["t0c1.wav"] = ("Bark",)
    groups, _ = suggest_groups(pd.Series(labels), tmp_path)
    assert "t0c0.wav" not in groups, "only clips with a common label are compared"


def test_the_command_proposes_groups_of_real_recordings_and_most_are_right(esc10: Path, tmp_path: Path) -> None:
    args = ["folds", str(esc10), "--suggest-groups", "--recipe", "quick_pretrained", "--home", str(tmp_path)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    found = read_groups(tmp_path / "folds" / "esc10_suggested_groups.csv")
    assert not list((tmp_path / "folds").glob("*seed*")), "it makes no fold table"
    folder = cache_folder(Home(tmp_path), "esc10", load_recipe("quick_pretrained").logmel)
    groups, pairs = suggest_groups(load_competition(esc10).curated["labels"], folder)
    assert groups.index.sort_values().equals(found.index)
    sources = pd.read_csv(esc10 / "groups.csv", dtype=str, index_col="fname")["sources"].str.split("+").map(set)
    right = [bool(sources[a] & sources[b]) for a, b in zip(pairs["one"], pairs["other"], strict=True)]
    assert len(right) >= 20
    assert np.mean(right) >= 0.8

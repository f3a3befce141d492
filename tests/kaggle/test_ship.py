"""From a finished run to a scored row, through the command line and the real CLI, in both forms."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import kaggle_world
import pytest
from kaggle_world import DEMO, World, melfold

from melfold.kaggle.ledger import COLUMNS, Ledger
from tests.fake_kaggle import FakeKaggle
from tests.quick_start import QuickStart

QUICK = {"MELFOLD_PACE": "0.05"}
TO = ("--competition", DEMO)


@pytest.mark.parametrize("layout", ["nested", pytest.param("flat", marks=pytest.mark.soak)])
def test_the_code_form(layout: str, own: World, tmp_path: Path) -> None:
    with FakeKaggle(tmp_path / "kaggle", competition=DEMO, data=own.data, truth=own.truth) as fake:
        fake.layout = layout
        env = fake.env(tmp_path / "user") | QUICK
        relative = os.path.relpath(own.data, own.home.root.parent)
        shipped = melfold("ship", "tiny", "--cpu", *TO, "--data", relative, env=env, home=own.home)
        assert shipped.returncode == 0, shipped.stdout + shipped.stderr
        assert "the same bytes as at home" in shipped.stdout
        (row,) = Ledger.of(own.home).rows()
        assert (row.status, row.kernel, row.version) == ("complete", "tester/melfold-infer-tiny", "1")
        (theirs,) = fake.submissions
        assert theirs.path.read_bytes() == (own.home.submissions / "tiny" / "submission.csv").read_bytes()
        again = melfold("ship", "tiny", "--cpu", *TO, "--data", own.data, env=env, home=own.home)
        assert again.returncode == 0, again.stderr
        assert "rehearsing" not in again.stderr
        assert len(fake.submissions) == 1
        assert sum(call.rpc == "SaveKernel" for call in fake.calls) == 1


def test_the_file_form_and_the_ledgers_commands(own: World, tmp_path: Path, quick: QuickStart) -> None:
    with FakeKaggle(tmp_path / "kaggle", competition=DEMO, data=own.data, truth=own.truth) as fake:
        env = fake.env(tmp_path / "user") | QUICK
        melfold = partial(kaggle_world.melfold, env=env, home=own.home, program=quick.program("melfold"))
        shipped = melfold("ship", "tiny", "--file", *TO)
        assert shipped.returncode == 0, shipped.stdout + shipped.stderr
        assert melfold("submit", "tiny", "--again", *TO).returncode == 0
        synced = melfold("ledger", "sync")
        assert synced.returncode == 0, synced.stderr
        for column in ("oof_lwlrap", "time"):
            shown = melfold("ledger", "show", "--sort", column)
            assert "select 1: tiny" in shown.stdout
        found = json.loads(melfold("ledger", "show", "--json").stdout)
        assert found.keys() == {"ledger", "rows", "select", "private_from_oof"}
        assert [row["id"] for row in found["rows"]] == ["tiny", "tiny"]
        assert found["rows"][0].keys() == {*COLUMNS, "place"}
        assert f"public {found['rows'][0]['public_score']:.5f}" in shipped.stdout
        assert found["select"][0].keys() == {"id", "tag", "ref", "reason"}
        picture = tmp_path / "ledger.png"
        assert melfold("ledger", "plot", "-o", picture).returncode == 0
        assert picture.stat().st_size > 5000
        bad = melfold("ledger", "show", "--sort", "luck")
        assert (bad.returncode, len(bad.stderr.splitlines())) == (2, 1)
        assert {row.status for row in Ledger.of(own.home).rows()} == {"complete"}


@pytest.mark.parametrize("layout", ["nested", pytest.param("flat", marks=pytest.mark.soak)])
def test_the_copy(layout: str, own: World, tmp_path: Path, quick: QuickStart) -> None:
    with FakeKaggle(tmp_path / "kaggle", competition=DEMO, data=own.data, truth=own.truth) as fake:
        fake.layout, fake.kernels_only, fake.late = layout, True, True
        env = fake.env(tmp_path / "user") | QUICK
        for _ in range(2):
            shipped = melfold(
                "ship", "tiny", "--copy", *TO, "--data", own.data, env=env, home=own.home, program=quick.program("melfold")
            )
            assert shipped.returncode == 0, shipped.stdout + shipped.stderr
        (row,) = Ledger.of(own.home).rows()
        assert (row.status, row.kernel, row.public_score) == ("complete", "tester/melfold-copy-csv-tiny", "0.00000")
        assert "public" not in shipped.stdout
        assert f"private {row.private_score}" in shipped.stdout
        (theirs,) = fake.submissions
        assert theirs.path.read_bytes() == (own.home.submissions / "tiny" / "submission.csv").read_bytes()
        (kernel,) = fake.kernels["melfold-copy-csv-tiny"]
        assert len(kernel.request["text"]) < 30_000, "it holds only what copying needs"
        assert kernel.request.get("enableInternet", False) is False
        assert fake.kernels.keys() == {"melfold-copy-csv-tiny"}
        # The other form is not built and pushed first, to be told then that Kaggle has this submission.
        shipped = melfold("ship", "tiny", "--cpu", *TO, env=env, home=own.home, program=quick.program("melfold"))
        assert shipped.returncode == 0, shipped.stderr
        assert "tiny is at Kaggle already: 1, complete" in shipped.stderr
        assert not (own.home.root / "build/kernels/melfold-infer-tiny").exists()


def test_download_by_command(own: World, tmp_path: Path, quick: QuickStart) -> None:
    with FakeKaggle(tmp_path / "kaggle", data=own.data) as fake:
        env = fake.env(tmp_path / "user") | QUICK
        done = melfold("download", env=env, home=own.home, program=quick.program("melfold"))
        assert done.returncode == 0, done.stderr
        assert (own.home.data / fake.competition / "sample_submission.csv").exists()
        fake.rules_accepted = False
        refused = melfold("download", "--to", tmp_path / "other", env=env, home=own.home, program=quick.program("melfold"))
        assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)

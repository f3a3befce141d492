"""Artefacts: fresh, stale or damaged, and the reason in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from melfold.artefacts import Artefact, differences, listed
from melfold.errors import MelfoldError
from melfold.files import sha256_file

INPUTS = {"weights": "aaaa", "predict": {"overlap": 0.5, "views": [[1, 0, "wrap"]]}, "clips": list(range(100))}


@pytest.fixture
def artefact(tmp_path: Path) -> Artefact:
    """Two files, one in a subfolder, committed with `INPUTS`."""
    made = Artefact(tmp_path / "stamp.json", (tmp_path / "a.csv", tmp_path / "sub" / "b.csv"))
    for path in made.files:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"content of {path.name}")
    made.commit(INPUTS, seconds=1.5)
    return made


def test_what_was_just_made_is_fresh_and_knows_its_inputs_files_and_facts(artefact: Artefact) -> None:
    assert artefact.exists
    assert artefact.is_fresh(INPUTS)
    assert artefact.changes(INPUTS) == []
    content = artefact.verify()
    assert content == artefact.read()
    assert content["files"] == {"a.csv": sha256_file(artefact.files[0]), "sub/b.csv": sha256_file(artefact.files[1])}
    assert content["seconds"] == 1.5
    assert content["made_from"]["predict"] == INPUTS["predict"]


def test_what_changed_is_described_in_words(artefact: Artefact) -> None:
    now = INPUTS | {"weights": "bbbb", "predict": {"overlap": 0.75, "views": [[1, 0, "wrap"]]}}
    assert artefact.changes(now) == ["weights: aaaa -> bbbb", "predict.overlap: 0.5 -> 0.75"]
    assert artefact.changes(INPUTS | {"new": 1}) == ["new: none -> 1"]
    (change,) = artefact.changes(INPUTS | {"clips": list(range(101))})
    assert change.startswith("clips: ")
    assert len(change) < 60, "a long list is told by its digest"


def test_only_the_inputs_that_are_given_are_compared(artefact: Artefact) -> None:
    assert artefact.is_fresh({"weights": "aaaa"})
    assert artefact.is_fresh({})
    assert artefact.changes({"weights": "cccc"}) == ["weights: aaaa -> cccc"]


def test_tuples_and_lists_are_the_same_input(tmp_path: Path) -> None:
    (tmp_path / "x.csv").touch()
    artefact = Artefact.of(tmp_path / "x.csv")
    artefact.commit({"few": (1, 2), "nested": {"many": tuple(range(20))}})
    assert artefact.stamp == tmp_path / "x.json"
    assert artefact.is_fresh({"few": [1, 2], "nested": {"many": list(range(20))}})


def test_a_damaged_file_is_named(artefact: Artefact) -> None:
    artefact.files[1].write_text("edited")
    assert artefact.changes(INPUTS) == ["sub/b.csv was changed after it was written"]
    assert artefact.exists, "it says nothing of the content"
    with pytest.raises(MelfoldError, match="is damaged: sub/b.csv was changed after it was written. Delete it and make it again"):
        artefact.verify()
    artefact.files[0].unlink()
    assert not artefact.exists
    with pytest.raises(MelfoldError, match="a.csv is missing; sub/b.csv was changed") as caught:
        artefact.verify()
    assert len(caught.value.lines) == 1


def test_without_a_stamp_or_with_a_broken_one_nothing_is_fresh(artefact: Artefact) -> None:
    artefact.stamp.write_text('{"made_from": ')
    assert artefact.changes(INPUTS) == ["stamp.json cannot be read"]
    with pytest.raises(MelfoldError, match="stamp.json is not JSON"):
        artefact.verify()
    artefact.stamp.write_text("[]")
    with pytest.raises(MelfoldError, match="was not written by this version of melfold: no made_from and files"):
        artefact.verify()
    artefact.stamp.write_text(json.dumps({"made_from": {}, "files": {}}))
    assert not artefact.is_fresh({}), "files that the stamp does not know are no part of it"
    artefact.stamp.unlink()
    assert artefact.changes(INPUTS) == ["stamp.json does not exist"]
    assert not artefact.exists


def test_removing_takes_the_stamp_and_the_files(artefact: Artefact) -> None:
    artefact.remove()
    assert [p for p in artefact.stamp.parent.rglob("*") if p.is_file()] == []
    artefact.remove()


def test_a_file_that_is_missing_is_never_committed(tmp_path: Path) -> None:
    artefact = Artefact(tmp_path / "stamp.json", (tmp_path / "a.csv", tmp_path / "b.csv"))
    artefact.files[0].touch()
    with pytest.raises(FileNotFoundError):
        artefact.commit({})
    assert not artefact.stamp.exists()


def test_killed_before_the_stamp_is_in_place_the_old_one_still_tells_that_a_file_changed(artefact: Artefact) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom melfold.artefacts import Artefact\n"
        "artefact = Artefact(Path(sys.argv[1]), tuple(map(Path, sys.argv[2:])))\n"
        "artefact.files[0].write_text('new')\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "artefact.commit({'weights': 'new'})"
    )
    command = [sys.executable, "-c", code, str(artefact.stamp), *map(str, artefact.files)]
    assert subprocess.run(command, env=os.environ).returncode == -signal.SIGKILL
    assert artefact.changes({"weights": "new"}) == ["weights: aaaa -> new", "a.csv was changed after it was written"]


def test_differences_name_added_removed_and_nested_values() -> None:
    before = {"a": 1, "gone": 2, "table": {"x": 1, "y": ""}}
    after = {"a": 1, "table": {"x": 3, "y": ""}, "new": [1]}
    assert differences(before, after) == ["table.x: 1 -> 3", "new: none -> [1]", "gone: 2 -> none"]
    assert differences(before, before) == []


def test_a_long_list_of_differences_is_cut() -> None:
    assert listed([str(i) for i in range(6)]) == "0; 1; 2; 3; 4; 5"
    assert listed([str(i) for i in range(8)]) == "0; 1; 2; 3; 4; 5; and 2 more"

"""The home folder, atomic writes, hashes and locks."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from melfold.errors import MelfoldError
from melfold.files import (
    Home,
    atomic_path,
    digest,
    locked,
    read_json,
    remove_leftovers,
    sha256_file,
    write_bytes,
    write_json,
    write_text,
)


def test_home_is_the_argument_else_the_variable_else_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MELFOLD_HOME", raising=False)
    assert Home.find().root == tmp_path
    monkeypatch.setenv("MELFOLD_HOME", str(tmp_path / "variable"))
    assert Home.find().root == tmp_path / "variable"
    home = Home.find(tmp_path / "argument")
    assert home.root == tmp_path / "argument"
    assert {p.parent for p in (home.data, home.cache, home.folds, home.runs, home.submissions)} == {home.root}
    assert not home.root.exists()


@pytest.mark.parametrize("durable", [True, False])
def test_an_atomic_write_appears_whole_and_makes_its_folder(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "file"
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("file", "whole")]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_failed_write_leaves_what_was_there_and_no_temporary(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "file"
    if before:
        path.write_text(before)

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert [p.read_text() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_a_killed_write_leaves_the_old_file_and_a_leftover_that_can_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path; from melfold.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as t:\n    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "größer"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_unreadable_json_is_reported_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(MelfoldError, match=r"missing: .*none\.json"):
        read_json(tmp_path / "none.json")
    write_text(tmp_path / "broken.json", '{"a": ')
    with pytest.raises(MelfoldError, match=r"broken\.json is not JSON"):
        read_json(tmp_path / "broken.json")


def test_digest_ignores_the_order_of_keys_and_sees_every_value() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(v) for v in ({"a": 1}, {"a": 1.5}, {"a": "1"}, {"b": 1}, [1], {})}) == 6


def test_a_files_hash_is_its_bytes_sha256(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"abc")
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_a_second_holder_waits_for_the_lock_and_is_told_so_once(tmp_path: Path) -> None:
    lock, order, told = tmp_path / "deep" / ".lock", [], threading.Event()

    def second() -> None:
        with locked(lock, told.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(lock, lambda: order.append("must not wait")):
        thread.start()
        assert told.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    lock, waited = tmp_path / ".lock", []
    code = (
        "import os, signal, sys; from pathlib import Path; from melfold.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(lock)]).returncode == -9
    with locked(lock, lambda: waited.append(True)):
        assert lock.exists()
    assert not waited

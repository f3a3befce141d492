"""The start of a kernel: the package on the path, finding what is mounted, and reporting."""

from __future__ import annotations

import base64
import io
import json
import logging
import subprocess
import sys
import time
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from melfold.errors import MelfoldError
from melfold.files import sha256_file
from melfold.kernels.boot import Session, start

KINDS = ("infer", "train")

STAND_IN = """
import json, os, subprocess, sys, time

def main(bundle, root, started):
    child = "import melfold.kernels, os; print(melfold.kernels.__file__)"
    child = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout.strip()
    facts = {"bundle": bundle, "root": str(root), "elapsed": time.monotonic() - started, "own": __file__, "child": child}
    print(json.dumps(facts | {"numba": os.environ["NUMBA_CACHE_DIR"]}))
"""
"""In the package's place: it says how it was started, and where a process that it starts finds the package."""


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session({"build_id": "f" * 64, "provenance": []}, tmp_path, time.monotonic())


def test_importing_a_kernel_does_nothing(repo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MELFOLD_KERNEL_ROOT", str(tmp_path))
    spec = spec_from_file_location("kernel", repo / "kernels" / "kernel.py")
    assert spec
    assert spec.loader
    kernel = module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(kernel)
    assert callable(kernel.run)
    assert (sys.path, list(tmp_path.iterdir())) == (before, [])


@pytest.mark.parametrize("kind", KINDS)
def test_processes_of_one_kernel_may_start_at_the_same_time(kind: str, repo: Path, tmp_path: Path) -> None:
    pack = io.BytesIO()
    with zipfile.ZipFile(pack, "w") as archive:
        archive.writestr(f"melfold/kernels/{kind}.py", STAND_IN)
        archive.writestr("melfold/kernels/__init__.py", "")
        archive.writestr("melfold/__init__.py", "")
        archive.writestr("melfold/more.txt", "x" * 1_000_000)  # so that writing it takes a while
    bundle = json.dumps({"build_id": "a1" * 32, "kind": kind, "text": 'it\'s "quoted"'})
    call = f"run(bundle={bundle!r}, pack={base64.b85encode(pack.getvalue()).decode()!r})"
    (tmp_path / "tmp").mkdir()
    script = tmp_path / "script.py"
    script.write_text(f"{(repo / 'kernels' / 'kernel.py').read_text()}\n{call}\n")
    environment = {"MELFOLD_KERNEL_ROOT": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        facts = json.loads(out)
        assert facts["bundle"] == json.loads(bundle)
        assert facts["root"] == str(tmp_path)
        assert 0 < facts["elapsed"] < 60
        assert facts["own"] == str(tmp_path / f"tmp/melfold-a1a1a1a1a1a1.zip/melfold/kernels/{kind}.py")
        assert Path(facts["child"]).parent == Path(facts["own"]).parent
        assert facts["numba"] == str(tmp_path / "tmp/numba")
    assert [p.name for p in (tmp_path / "tmp").iterdir()] == ["melfold-a1a1a1a1a1a1.zip"], "nothing is left over"


def test_inputs_are_found_by_name_in_any_layout_and_through_links(session: Session, tmp_path: Path) -> None:
    deep = tmp_path / "kaggle/input/datasets/someone/weights/more"
    deep.mkdir(parents=True)
    output = tmp_path / "output"
    output.mkdir()
    (deep / "a.safetensors").write_bytes(b"a")
    (output / "b.safetensors").write_bytes(b"b")
    (tmp_path / "kaggle/input/notebook").symlink_to(output)
    first, second = session.mounted("*.safetensors")
    assert (first.name, second.name) == ("b.safetensors", "a.safetensors"), "near the top first"
    assert session.weights({sha256_file(second)}) == {sha256_file(second): second}
    with pytest.raises(MelfoldError, match=r"1 files of weights are missing or damaged: found a.safetensors, b.safetensors"):
        session.weights({sha256_file(second), "0" * 64})
    with pytest.raises(MelfoldError, match=r"no competition is mounted: no sample_submission.csv"):
        session.competition_folder("sample_submission.csv")


def test_an_expected_error_is_shown_as_its_lines_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "melfold")  # restored after the test

    def work(session: Session) -> None:
        raise MelfoldError.many([MelfoldError("one", "found"), MelfoldError("two", fix="Do this")])

    with pytest.raises(SystemExit) as caught:
        start(work, {}, tmp_path, time.monotonic() - 5)
    assert caught.value.code == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["melfold: one: found", "melfold: two. Do this"]
    assert lines[0].startswith("[    5.")

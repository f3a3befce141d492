"""The download: verified, unpacked, continued."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kaggle_world import World, environment

from melfold.data.competition import load_competition
from melfold.errors import MelfoldError
from melfold.kaggle.client import Kaggle
from melfold.kaggle.download import TABLES, download, download_tables
from tests.fake_kaggle import FakeKaggle, Fault


@pytest.fixture
def fake(kaggle_world: World, tmp_path: Path) -> Iterator[FakeKaggle]:
    with (
        FakeKaggle(tmp_path / "kaggle", data=kaggle_world.data) as server,
        environment(server.env(tmp_path / "user") | {"MELFOLD_PACE": "0.01"}),
    ):
        yield server


def test_the_download_is_the_competition(fake: FakeKaggle, kaggle_world: World, tmp_path: Path) -> None:
    target = download(Kaggle(), tmp_path / "data")
    found, wanted = load_competition(target), kaggle_world.competition
    assert found.labels == wanted.labels
    for split in ("curated", "noisy", "test"):
        for ours, theirs in zip(found.split(split)["path"], wanted.split(split)["path"], strict=True):
            assert ours.read_bytes() == theirs.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"data", "kaggle", "user"}
    calls = len(fake.calls)
    assert download(Kaggle(), target) == target
    assert len(fake.calls) == calls, "what is complete is not asked for again"


def test_the_tables_alone(fake: FakeKaggle, kaggle_world: World, tmp_path: Path) -> None:
    target = download_tables(Kaggle(), tmp_path / "data")
    assert {p.name for p in target.iterdir()} == set(TABLES)
    assert all((target / name).read_bytes() == (kaggle_world.data / name).read_bytes() for name in TABLES)
    calls = len(fake.calls)
    download_tables(Kaggle(), target)
    assert len(fake.calls) == calls
    assert len(load_competition(download(Kaggle(), target)).test) == 60


def test_a_refused_download_leaves_nothing(fake: FakeKaggle, tmp_path: Path) -> None:
    fake.rules_accepted = False
    with pytest.raises(MelfoldError, match="rules"):
        download(Kaggle(), tmp_path / "data")
    assert {p.name for p in tmp_path.iterdir()} == {"kaggle", "user"}


def test_an_interrupted_download_is_continued(fake: FakeKaggle, tmp_path: Path) -> None:
    fake.faults.append(Fault("GET", "cut"))
    assert len(load_competition(download(Kaggle(), tmp_path / "data")).test) == 60


def test_unpacking_continues_where_it_was_stopped(fake: FakeKaggle, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, text: str) -> None:
        if done == 40:
            raise Stop

    target = tmp_path / "data"
    with pytest.raises(Stop):
        download(Kaggle(), target, progress=stop)
    first = {p: p.stat().st_mtime_ns for p in target.rglob("*.wav")}
    assert first
    told = []
    load_competition(download(Kaggle(), target, progress=lambda done, total, text: told.append(total)))
    assert {p: p.stat().st_mtime_ns for p in first} == first
    assert told[0] < 150 + 60 + 60


def test_a_damaged_archive_is_reported_and_removed(fake: FakeKaggle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "data"
    whole = Kaggle.download

    def damaged(self: Kaggle, folder: Path) -> Path:
        archive = whole(self, folder)
        content = bytearray(archive.read_bytes())
        content[2000] ^= 255
        archive.write_bytes(content)
        return archive

    with monkeypatch.context() as patch:
        patch.setattr(Kaggle, "download", damaged)
        with pytest.raises(MelfoldError, match="broken download"):
            download(Kaggle(), target)
    load_competition(download(Kaggle(), target))


def test_an_archive_within_the_archive_is_unpacked_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(self: Kaggle, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "inner.zip", "w") as inner:
            inner.writestr("a.wav", b"a")
        with zipfile.ZipFile(folder / "all.zip", "w") as outer:
            outer.write(folder / "inner.zip", "test.zip")
            outer.writestr("sample_submission.csv", "fname,A\na.wav,0\n")
        (folder / "inner.zip").unlink()
        return folder / "all.zip"

    monkeypatch.setattr(Kaggle, "download", made)
    target = download(Kaggle(), tmp_path / "data")
    visible = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert visible == {"test/a.wav", "sample_submission.csv"}


@pytest.mark.parametrize("name", ["../out.csv", "...zip"])
def test_a_path_that_leads_out_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(self: Kaggle, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "all.zip", "w") as pack:
            inner = io.BytesIO()
            zipfile.ZipFile(inner, "w").writestr("out.csv", b"a")
            pack.writestr(name, inner.getvalue())
        return folder / "all.zip"

    monkeypatch.setattr(Kaggle, "download", made)
    with pytest.raises(MelfoldError, match="path outside"):
        download(Kaggle(), tmp_path / "data")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(("field", "value", "said"), [("flags", 1, "encrypted"), ("method", 97, "compression method")])
def test_an_archive_that_cannot_be_unpacked_is_reported_and_kept(
    field: str, value: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(self: Kaggle, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "all.zip", "w") as pack:
            pack.writestr("a.csv", b"a")
        content = bytearray((folder / "all.zip").read_bytes())
        for header, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the file's own header, and the one in the directory
            content[content.index(header) + offset + (2 if field == "method" else 0)] = value
        (folder / "all.zip").write_bytes(content)
        return folder / "all.zip"

    monkeypatch.setattr(Kaggle, "download", made)
    with pytest.raises(MelfoldError, match=f"all.zip cannot be unpacked: .*{said}") as caught:
        download(Kaggle(), tmp_path / "data")
    assert len(caught.value.lines) == 1

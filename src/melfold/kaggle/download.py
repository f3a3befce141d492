"""The competition's files: downloaded, verified, unpacked; every step continues where it was stopped."""

from __future__ import annotations

import logging
import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from melfold.compute import Progress, silent
from melfold.errors import MelfoldError, first_line
from melfold.files import atomic_path, locked, remove_leftovers, write_bytes
from melfold.kaggle.client import Kaggle

log = logging.getLogger(__name__)

TABLES = ("train_curated.csv", "train_noisy.csv", "sample_submission.csv")

_DONE = ".melfold-downloaded"


def download(client: Kaggle, target: Path, *, progress: Progress = silent) -> Path:
    """Download a competition into a folder, in Kaggle's layout. A folder that is complete is left as it is.

    Every unpacked file is checked against the archive's checksum. An archive within it is unpacked into a folder of its name;
    both are removed at the end.

    Raises:
        MelfoldError: no credentials, rules not accepted, a broken archive, too little disk space.
    """
    if (target / _DONE).exists():
        return target
    parts = target.with_name(f".{target.name}.download")  # beside it, so that a refused download leaves no empty folder
    with locked(parts / ".lock", lambda: log.warning("waiting for another download into %s", target)):
        if (target / _DONE).exists():
            return target
        try:
            archive = client.download(parts)
        except MelfoldError:
            if {path.name for path in parts.iterdir()} == {".lock"}:
                shutil.rmtree(parts)
            raise
        target.mkdir(parents=True, exist_ok=True)
        _unpack(archive, target, progress)
        for inner in sorted(target.glob("*.zip")):
            if not inner.stem.strip("."):
                raise MelfoldError("the archive holds a path outside it", inner.name, "Do not unpack it")
            _unpack(inner, target / inner.stem, progress)
            inner.unlink()
        (target / _DONE).touch()
        shutil.rmtree(parts)
    return target


def download_tables(client: Kaggle, target: Path) -> Path:
    """Download the tables of a competition alone: enough to train on Kaggle. Those that are there stay.

    Raises:
        MelfoldError: no credentials, rules not accepted.
    """
    for name in TABLES:
        if not (target / name).exists():
            write_bytes(target / name, client.download_file(name))
    return target


def _unpack(archive: Path, target: Path, progress: Progress) -> None:
    try:
        with zipfile.ZipFile(archive) as pack:
            members = [(m, _place(target, m)) for m in pack.infolist() if not m.is_dir()]
            todo = [(m, path) for m, path in members if not path.exists() or path.stat().st_size != m.file_size]
            free, wanted = shutil.disk_usage(archive.parent).free, sum(m.file_size for m, _ in todo)
            if wanted > free:
                raise MelfoldError(
                    f"not enough disk space to unpack {archive.name}",
                    f"{wanted / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free",
                    "Free some",
                )
            for folder in {path.parent for _, path in todo}:
                folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(folder)
            for number, (member, path) in enumerate(todo, 1):
                with pack.open(member) as source, atomic_path(path, durable=False) as temporary, temporary.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)  # the last read checks the checksum
                progress(number, len(todo), f"unpacking {archive.name}")
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or compressed in a way that Python does not know
        raise MelfoldError(f"{archive.name} cannot be unpacked", first_line(error), f"Unpack it into {target}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink()
        raise MelfoldError("a broken download was removed", f"{archive.name}: {error}", "Run the command again") from None


def _place(target: Path, member: zipfile.ZipInfo) -> Path:
    inner = PurePosixPath(member.filename)
    if inner.is_absolute() or ".." in inner.parts:
        raise MelfoldError("the archive holds a path outside it", member.filename, "Do not unpack it")
    # Some archives nest a folder in one of its own name.
    parts = inner.parts[1:] if inner.parts[0] == target.name and len(inner.parts) > 1 else inner.parts
    return target.joinpath(*parts)

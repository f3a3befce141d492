"""The cache of log-mels on disk: one `.npy` per clip, and a manifest with one row per clip.

A folder holds the log-mels of one competition under one configuration. While clips are made, their rows go to a journal, so that
a stopped stage loses at most the clips of the moment.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from melfold.artefacts import Artefact, listed
from melfold.compute import Compute, end_with_parent, remote
from melfold.config import LogMelConfig
from melfold.data.arrays import NPY_HEADER, ClipInfo, crc32_of, make_clip, npy_path, size_and_time
from melfold.data.competition import Competition, Split
from melfold.data.logmel import LogMel, log_mel_of
from melfold.errors import MelfoldError
from melfold.files import Home, atomic_path, digest, locked, read_json_lines, remove_leftovers, sha256_file, write_json

log = logging.getLogger(__name__)

FEW_CLIPS = 400
"""Fewer clips than these are made before worker processes have started."""

CHUNK_CLIPS = 8
"""Clips per task: enough to hide the cost of passing a task, few enough that a kill loses little."""


def flags_of(text: str) -> tuple[str, ...]:
    """The flags in a cell of the manifest: of silent, clipped, short, resampled, downmixed, unreadable; joined by `|`."""
    return tuple(text.split("|")) if text else ()


def unreadable(manifest: pd.DataFrame) -> list[str]:
    """The clips of a manifest, or of a part of it, that could not be read and so have no log-mel."""
    return [fname for fname, text in manifest["flags"].items() if "unreadable" in flags_of(text)]


def cache_folder(home: Home, competition_name: str, config: LogMelConfig) -> Path:
    """The folder of a competition's log-mels under a configuration."""
    return home.cache / competition_name / config.fingerprint()


def build_cache(
    competition: Competition,
    config: LogMelConfig,
    home: Home,
    *,
    splits: Iterable[Split] = ("curated", "test"),
    exclude: Iterable[str] = (),
    fnames: Iterable[str] | None = None,
    compute: Compute = Compute(),
    verify: bool = False,
) -> Path:
    """Make every log-mel that is missing or whose audio has changed. Returns the cache's folder.

    Args:
        exclude: training clips to leave out; they need not be readable.
        fnames: only these clips of the splits; all of them if None.
        compute: its `jobs` and `progress` are used. With `jobs=-1`, few clips are made without worker processes, whose start
            would take longer.
        verify: read every array and make damaged ones again. Without, only sizes are compared here; an array is checked when
            it is first read.

    Raises:
        MelfoldError: one line for each training clip that cannot be read. An unreadable test clip only gets a warning.
    """
    folder = cache_folder(home, competition.name, config)
    splits, exclude = list(splits), set(exclude)
    only = None if fnames is None else set(fnames)
    paths = {
        fname: path
        for split in splits
        for fname, path in competition.split(split)["path"].items()
        if (split == "test" or fname not in exclude) and (only is None or fname in only)
    }
    with locked(folder / ".lock", lambda: log.warning("waiting for another melfold that fills %s", folder)):
        remove_leftovers(folder)
        write_json(folder / "config.json", config.model_dump())
        known = _read_known(folder)
        work = {fname: paths[fname] for fname in _stale(folder, paths, known, config)}
        if verify:
            others = [fname for fname in paths if fname not in work]
            work |= {fname: paths[fname] for fname in _damaged(folder, others, known, compute)}
        if work:
            _make(folder, work, config, known, compute)
            _write_manifest(folder, known)
    _report_unreadable(competition, splits, [known[fname] for fname in paths])
    return folder


def read_manifest(folder: Path) -> pd.DataFrame:
    """The manifest of a cache, indexed by `fname`; columns as in `ClipInfo`.

    Raises:
        MelfoldError: a missing or damaged manifest.
    """
    path = folder / "manifest.csv"
    if not path.exists():
        raise MelfoldError("no cache", str(folder), "Run `melfold cache`")
    fix = "Delete it and run `melfold cache`"
    stamp = Artefact.of(path)
    damage = stamp.changes({})
    # The stage may have been killed between writing the manifest and its stamp.
    if damage and {"manifest": sha256_file(path)} not in _journal_rows(folder):
        raise MelfoldError("damaged manifest", f"{path} ({listed(damage)})", fix)
    try:
        table = pd.read_csv(path, index_col="fname", dtype={"fname": str}, keep_default_na=False, float_precision="round_trip")
        return table[list(ClipInfo._fields[1:])]
    except (ValueError, KeyError) as error:
        raise MelfoldError("damaged manifest", f"{path} ({error})", fix) from None


def _stale(folder: Path, paths: dict[str, Path], known: dict[str, ClipInfo], config: LogMelConfig) -> Iterator[str]:
    """The clips without an up-to-date array."""
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".npy")}
    for fname, path in paths.items():
        info = known.get(fname)
        same = info and (info.size, info.mtime_ns) == size_and_time(path)
        # A clip that was unreadable is tried again: the disk may have been full, or a network drive away.
        if not info or not same or sizes.get(npy_path(folder, fname).name) != NPY_HEADER + 2 * config.n_mels * info.frames:
            yield fname


def _damaged(folder: Path, fnames: Sequence[str], known: dict[str, ClipInfo], compute: Compute) -> Iterator[str]:
    """The clips whose array is not what was written."""
    for number, fname in enumerate(fnames, 1):
        if known[fname].frames and crc32_of(npy_path(folder, fname)) != known[fname].crc32:
            log.warning("%s: its log-mel is damaged and is made again", fname)
            yield fname
        compute.progress(number, len(fnames), "verifying log-mels")


def audio_digest(folder: Path, fnames: Sequence[str]) -> str:
    """The digest of some clips' audio files, as they were when their log-mels were made."""
    known = read_manifest(folder)["audio_crc32"].reindex(list(fnames), fill_value=0)
    return digest(list(zip(known.index, known.tolist(), strict=True)))


def _make(folder: Path, work: dict[str, Path], config: LogMelConfig, known: dict[str, ClipInfo], compute: Compute) -> None:
    from joblib import Parallel, delayed

    done, items = 0, list(work.items())
    chunks = [items[i : i + CHUNK_CLIPS] for i in range(0, len(items), CHUNK_CLIPS)]
    # Made here, so that no worker of this machine has to import librosa; other machines get only the configuration.
    transform = config if remote() else log_mel_of(config)
    jobs = 1 if compute.jobs == -1 and len(work) < FEW_CLIPS else compute.jobs
    with (folder / "journal.jsonl").open("a") as journal:
        results: Iterator[list[ClipInfo]] = Parallel(n_jobs=jobs, return_as="generator_unordered")(
            delayed(_make_chunk)(folder, chunk, transform, os.getpid()) for chunk in chunks
        )
        for infos in results:
            for info in infos:
                known[info.fname] = info
                journal.write(_journal_line(info._asdict()))
            journal.flush()
            done += len(infos)
            compute.progress(done, len(work), "caching log-mels")


def stop_workers() -> None:
    """End the worker processes that `build_cache` may have left waiting for more: they would keep their memory for minutes."""
    loky = sys.modules.get("joblib.externals.loky.reusable_executor")
    if loky and loky._executor is not None:
        loky._executor.shutdown(wait=True)


def _make_chunk(folder: Path, chunk: list[tuple[str, Path]], transform: LogMel | LogMelConfig, caller: int) -> list[ClipInfo]:
    _end_with(caller)
    if isinstance(transform, LogMelConfig):
        transform = log_mel_of(transform)
    return [make_clip(folder, fname, path, transform) for fname, path in chunk]


@lru_cache(maxsize=1)
def _end_with(caller: int) -> None:
    """In a worker process that `caller` started: end when the caller does. Only the first call in a process does anything."""
    if os.getppid() == caller:
        end_with_parent()


def _read_known(folder: Path) -> dict[str, ClipInfo]:
    """The rows of the manifest and those that an interrupted stage left in its journal."""
    known = {}
    if (folder / "manifest.csv").exists():
        try:
            known = {row.Index: ClipInfo(*row) for row in read_manifest(folder).itertuples()}
        except MelfoldError as error:
            log.warning("%s: making its log-mels again", error.lines[0].split(". ")[0])
    if (folder / "journal.jsonl").exists():
        known |= {row["fname"]: ClipInfo(**row) for row in _journal_rows(folder) if "fname" in row}
        _write_manifest(folder, known)
    return known


def _journal_line(row: dict[str, Any]) -> str:
    return json.dumps(row | {"digest": digest(row)}) + "\n"


def _journal_rows(folder: Path) -> list[dict[str, Any]]:
    """What an interrupted stage wrote to its journal: a row for each clip, and the hash of the manifest it was about to write."""
    return [row for row in read_json_lines(folder / "journal.jsonl") if row.pop("digest", "") == digest(row)]


def _write_manifest(folder: Path, known: dict[str, ClipInfo]) -> None:
    table = pd.DataFrame([known[fname] for fname in sorted(known)], columns=ClipInfo._fields)
    with atomic_path(folder / "manifest.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
        with (folder / "journal.jsonl").open("a") as journal:
            journal.write(_journal_line({"manifest": sha256_file(temporary)}))
    Artefact.of(folder / "manifest.csv").commit({})
    (folder / "journal.jsonl").unlink(missing_ok=True)


def _report_unreadable(competition: Competition, splits: list[Split], infos: Iterable[ClipInfo]) -> None:
    failed = {info.fname: info.error for info in infos if "unreadable" in flags_of(info.flags)}
    test = set(competition.test.index) if "test" in splits else set()
    for fname in sorted(failed.keys() & test):
        log.warning("TEST CLIP %s: it will get the mean out-of-fold probabilities", failed[fname])
    fatal = []
    for fname in failed:
        if fname not in test:
            fix = f"Download it again, or --set data.exclude.'{fname}'='why'"
            fatal.append(MelfoldError(failed[fname].removesuffix(". Download it again"), "", fix))
    if fatal:
        raise MelfoldError.many(fatal)

"""The cache of log-mels: what it holds, what is made again, and that a kill loses nothing that was recorded."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from melfold.compute import Compute, Progress, silent
from melfold.config import LogMelConfig
from melfold.data.arrays import NPY_HEADER, npy_path
from melfold.data.audio import read_waveform
from melfold.data.cache import build_cache, cache_folder, read_manifest, unreadable
from melfold.data.clips import ClipStore
from melfold.data.competition import Competition, load_competition
from melfold.data.logmel import LogMel
from melfold.errors import MelfoldError
from melfold.files import Home, digest, locked, sha256_file
from tests.conftest import write_wav

Maker = Callable[..., Path]
CONFIG = LogMelConfig(sr=16_000, n_fft=512, hop_length=160, n_mels=32, fmax=8_000)


def build(
    competition: Competition,
    home: Home,
    *,
    jobs: int = 1,
    progress: Progress = silent,
    config: LogMelConfig = CONFIG,
    **options: Any,
) -> Path:
    return build_cache(competition, config, home, compute=Compute(jobs=jobs, progress=progress), **options)


def stamps(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.npy")}


def content(folder: Path) -> dict[str, bytes]:
    """The arrays and the manifest."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".npy", ".csv")}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_only_one_process_at_a_time_fills_a_cache(tiny_download: Maker, home: Home) -> None:
    competition = load_competition(tiny_download())
    folder = cache_folder(home, "tiny", CONFIG)
    with warnings_of("melfold.data.cache") as messages:
        with locked(folder / ".lock"):
            second = threading.Thread(target=build, args=(competition, home))
            second.start()
            while not messages:
                second.join(0.01)
                assert second.is_alive(), "it did not wait"
            assert {p.name for p in folder.iterdir()} == {".lock"}
        second.join()
    assert messages == [f"waiting for another melfold that fills {folder}"]
    assert len(read_manifest(folder)) == 12


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """The messages of a logger, whether or not the command line has set up `melfold`'s handlers."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def test_an_array_is_float16_frames_by_mels_in_c_order_behind_128_bytes(tiny_download: Maker, home: Home) -> None:
    competition = load_competition(tiny_download())
    folder = build(competition, home)
    assert folder == cache_folder(home, "tiny", CONFIG)
    for fname, path in competition.curated["path"].items():
        array = np.load(npy_path(folder, str(fname)))
        waveform, _ = read_waveform(path, CONFIG.sr)
        assert (array.dtype, array.shape) == (np.float16, (1 + len(waveform) // 160, 32))
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, LogMel(CONFIG)(waveform).astype(np.float16))
        assert npy_path(folder, str(fname)).stat().st_size == NPY_HEADER + array.nbytes
        assert npy_path(folder, str(fname)).read_bytes()[NPY_HEADER:] == array.tobytes()
    assert json.loads((folder / "config.json").read_text()) == CONFIG.model_dump()


def test_a_long_clip_is_limited_by_a_peak_that_comes_last(tiny_download: Maker, home: Home) -> None:
    root = tiny_download()
    rng = np.random.default_rng(0)
    sound = 1e-4 * rng.standard_normal(140 * 22_050)
    sound[-1000:] *= 5000
    path = write_wav(root / "train_curated" / "c0000.wav", sound, 22_050)
    folder = build(load_competition(root), home)
    array, row = np.load(npy_path(folder, "c0000.wav")), read_manifest(folder).loc["c0000.wav"]
    whole, rate = soundfile.read(path, dtype="float32")
    expected = LogMel(CONFIG)(soxr.resample(whole, rate, CONFIG.sr))
    assert len(array) > 1.5 * 8192
    np.testing.assert_allclose(array, expected.astype(np.float16), rtol=2**-10)  # a step of float16
    assert (row["frames"], row["seconds"]) == (len(array), 140)
    assert row["peak_db"] == pytest.approx(expected.max(), abs=1e-4)
    assert row["mean_db"] == pytest.approx(array.mean(dtype=np.float64))
    assert row["mean_square_db"] == pytest.approx(np.square(array.astype(np.float64)).mean())


def test_memory_does_not_grow_with_a_clips_length(tmp_path: Path) -> None:
    for minutes in (1, 20):
        write_wav(tmp_path / f"{minutes}.wav", np.tile(np.sin(np.arange(16_000)), 60 * minutes))
    script = f"""
import resource, sys
from pathlib import Path
from melfold.config import LogMelConfig
from melfold.data.arrays import make_clip
from melfold.data.logmel import LogMel
transform, folder = LogMel(LogMelConfig(**{CONFIG.model_dump()!r})), Path({str(tmp_path)!r})
for minutes in (1, 20):
    assert make_clip(folder, f"{{minutes}}.wav", folder / f"{{minutes}}.wav", transform).seconds == 60 * minutes
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    one, twenty = map(int, out.split())
    assert twenty - one < 30 * 2**20  # its samples alone are 77 MB as float32


def test_the_manifest_has_the_facts_and_flags_of_each_clip(tiny_download: Maker, home: Home) -> None:
    root = tiny_download()
    curated, t = root / "train_curated", np.arange(16_000) / 16_000
    tone = np.sin(2 * np.pi * 440 * t)
    write_wav(curated / "c0000.wav", np.zeros(8_000))
    write_wav(curated / "c0001.wav", np.clip(3 * tone, -1, 1))
    write_wav(curated / "c0002.wav", 0.1 * tone[:511])
    write_wav(curated / "c0003.wav", 0.1 * tone, 22_050)
    write_wav(curated / "c0004.wav", 0.1 * np.stack([tone, tone], 1))
    write_wav(curated / "c0005.wav", 0.1 * np.zeros((100, 2)), 32_000)
    folder = build(load_competition(root), home)
    manifest = read_manifest(folder)
    assert manifest["flags"].to_dict() | {"c0006.wav": ""} == manifest["flags"].to_dict()
    assert [manifest.at[f"c000{i}.wav", "flags"] for i in range(6)] == [
        "silent",
        "clipped",
        "short",
        "resampled",
        "downmixed",
        "downmixed|resampled|silent|short",
    ]
    assert len(manifest) == 12
    assert list(manifest.index) == sorted(manifest.index)
    for fname in ("c0001.wav", "c0003.wav", "t0000.wav"):
        row, array = manifest.loc[fname], np.load(npy_path(folder, fname)).astype(np.float64)
        assert row["frames"] == len(array)
        assert row["peak_db"] == pytest.approx(array.max(), abs=0.05)
        assert row["mean_db"] == pytest.approx(array.mean())
        assert row["mean_square_db"] == pytest.approx(np.square(array).mean())
    assert manifest.at["c0003.wav", "seconds"] == pytest.approx(16_000 / 22_050, abs=1e-3)


def test_a_second_run_computes_nothing(tiny_download: Maker, home: Home) -> None:
    competition = load_competition(tiny_download())
    folder = build(competition, home)
    before, steps = (stamps(folder), content(folder)), []
    assert build(competition, home, progress=lambda *step: steps.append(step)) == folder
    assert (stamps(folder), content(folder)) == before
    assert steps == []
    assert not (folder / "journal.jsonl").exists()


@pytest.mark.parametrize("spoil", ["changed audio", "other audio of the same size", "lost array", "cut array"])
def test_only_the_clip_that_is_out_of_date_is_made_again(spoil: str, tiny_download: Maker, home: Home) -> None:
    root = tiny_download()
    competition = load_competition(root)
    folder = build(competition, home)
    before, array = stamps(folder), npy_path(folder, "c0004.wav")
    if spoil == "changed audio":
        write_wav(root / "train_curated/c0004.wav", np.random.default_rng(1).normal(0, 0.1, 9_000))
    elif spoil == "other audio of the same size":
        path = root / "train_curated/c0004.wav"
        size = path.stat().st_size
        write_wav(path, np.random.default_rng(1).normal(0, 0.1, (size - 44) // 2))
        assert path.stat().st_size == size
    elif spoil == "lost array":
        array.unlink()
    else:
        array.write_bytes(array.read_bytes()[:-10])
    build(competition, home)
    after = stamps(folder)
    assert {name for name in after if after[name] != before[name]} == {"c0004.npy"}
    fresh = build(competition, Home(home.root / "fresh"))
    assert content(folder) == content(fresh)


def test_splits_are_added_to_the_same_cache(tiny_download: Maker, home: Home) -> None:
    competition = load_competition(tiny_download())
    folder = build(competition, home, splits=["test"])
    before = stamps(folder)
    assert len(before) == 4
    build(competition, home, splits=["curated", "noisy"])
    assert len(stamps(folder)) == 15 == len(read_manifest(folder))
    assert stamps(folder).items() >= before.items()


def test_some_clips_of_a_split_can_be_made_alone(tiny_download: Maker, home: Home) -> None:
    root = tiny_download()
    (root / "test/t0003.wav").write_bytes(b"")
    competition = load_competition(root)
    steps: list[tuple[int, int, str]] = []
    with warnings_of("melfold.data.cache") as messages:
        folder = build(competition, home, splits=["test"], fnames=["t0001.wav", "c0001.wav"], progress=lambda *s: steps.append(s))
        assert set(stamps(folder)) == {"t0001.npy"}
        assert steps[-1][:2] == (1, 1)
        build(competition, home, splits=["test"], fnames=[])
        assert (len(read_manifest(folder)), messages) == (1, [])
        build(competition, home)
    assert len(messages) == 1
    assert content(folder) == content(build(competition, Home(home.root / "at once")))


def test_another_configuration_has_another_folder(tiny_download: Maker, home: Home) -> None:
    competition = load_competition(tiny_download())
    one = build(competition, home)
    other = build_cache(competition, CONFIG.model_copy(update={"hop_length": 161}), home, compute=Compute(jobs=1))
    assert one != other
    assert one.parent == other.parent == home.cache / "tiny"


def test_workers_make_the_same_cache_as_one_process(tiny_download: Maker, home: Home) -> None:
    competition = load_competition(tiny_download(curated=20))
    steps: list[tuple[int, int, str]] = []
    parallel = build(competition, home, jobs=2, progress=lambda *step: steps.append(step))
    assert content(parallel) == content(build(competition, Home(home.root / "one")))
    assert steps[-1][:2] == (24, 24)


def test_every_unreadable_curated_clip_is_listed_and_stops_the_stage(tiny_download: Maker, home: Home) -> None:
    root = tiny_download()
    (root / "train_curated/c0001.wav").write_bytes(b"")
    (root / "train_curated/c0005.wav").write_bytes(b"no audio")
    competition = load_competition(root)
    for _ in range(2):  # also the second time
        with pytest.raises(MelfoldError) as caught:
            build(competition, home)
        assert [line[:27] for line in caught.value.lines] == ["unreadable audio: c0001.wav", "unreadable audio: c0005.wav"]
        assert all("--set data.exclude." in line and "Download it again" in line for line in caught.value.lines)
    folder = cache_folder(home, "tiny", CONFIG)
    assert not npy_path(folder, "c0001.wav").exists()
    assert read_manifest(folder).at["c0001.wav", "flags"] == "unreadable"
    assert unreadable(read_manifest(folder)) == ["c0001.wav", "c0005.wav"]
    assert len(stamps(folder)) == 10, "the readable ones are kept"


def test_excluded_clips_need_not_be_readable(tiny_download: Maker, home: Home) -> None:
    root = tiny_download()
    (root / "train_curated/c0001.wav").write_bytes(b"")
    folder = build(load_competition(root), home, exclude=["c0001.wav", "elsewhere.wav"])
    assert "c0001.wav" not in read_manifest(folder).index


def test_an_unreadable_clip_is_tried_again(tiny_download: Maker, home: Home) -> None:
    root = tiny_download()
    path = root / "train_curated/c0001.wav"
    good = path.read_bytes()
    path.write_bytes(b"")
    competition = load_competition(root)
    with pytest.raises(MelfoldError, match=r"c0001\.wav"):
        build(competition, home)
    path.write_bytes(good)
    folder = build(competition, home)
    assert read_manifest(folder).at["c0001.wav", "flags"] == ""
    assert npy_path(folder, "c0001.wav").exists()


def test_unreadable_test_clips_only_get_a_warning_and_cannot_be_excluded(tiny_download: Maker, home: Home) -> None:
    root = tiny_download()
    for name in ("t0002.wav", "t0001.wav"):
        (root / "test" / name).write_bytes(b"")
    (root / "test" / "t0003.wav").unlink()
    with warnings_of("melfold.data.cache") as messages:
        folder = build(load_competition(root), home, exclude=["t0001.wav"])
    assert [line[:39] for line in messages] == [f"TEST CLIP unreadable audio: t000{i}.wav (" for i in (1, 2, 3)]
    assert "mean out-of-fold probabilities" in messages[0]
    assert read_manifest(folder).at["t0001.wav", "error"].startswith("unreadable audio")


KILLED = """
import sys, time
from pathlib import Path
from melfold.compute import Compute
from melfold.config import LogMelConfig
from melfold.data.cache import build_cache
from melfold.data.competition import load_competition
from melfold.files import Home

root, home, config, jobs = sys.argv[1:]
slowly = lambda *step: time.sleep(0.05)  # so that the kill comes in the middle
config = LogMelConfig.model_validate_json(config)
compute = Compute(jobs=int(jobs), progress=slowly)
build_cache(load_competition(Path(root)), config, Home(Path(home)), compute=compute)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_stage_resumes_without_making_recorded_clips_again(jobs: int, tiny_download: Maker, home: Home) -> None:
    root = tiny_download(curated=240, noisy=0, seconds=0.1)
    folder = cache_folder(home, "tiny", CONFIG)
    journal = folder / "journal.jsonl"
    command = [sys.executable, "-c", KILLED, str(root), str(home.root), CONFIG.model_dump_json(), str(jobs)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.stat().st_size > 5_000):
            assert process.poll() is None, "the stage ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    recorded = {json.loads(line)["fname"] for line in journal.read_text().splitlines() if line.endswith("}")}
    assert 0 < len(recorded) < 244
    before = stamps(folder)

    build(load_competition(root), home)
    after = stamps(folder)
    assert len(after) == 244
    kept = {npy_path(folder, fname).name for fname in recorded}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert content(folder) == content(build(load_competition(root), Home(home.root / "uninterrupted")))
    assert not list(folder.glob(".*.tmp"))
    assert not journal.exists()


ORPHANS = """
import sys, time
from pathlib import Path
from joblib.externals.loky import reusable_executor
from melfold.compute import Compute
from melfold.config import LogMelConfig
from melfold.data.cache import build_cache
from melfold.data.competition import load_competition
from melfold.files import Home

root, home, config = sys.argv[1:]
tell = lambda *step: print(*reusable_executor._executor._processes)  # the workers' process ids
config = LogMelConfig.model_validate_json(config)
build_cache(load_competition(Path(root)), config, Home(Path(home)), compute=Compute(jobs=2, progress=tell))
time.sleep(60)
"""


def test_workers_end_when_their_parent_is_killed(tiny_download: Maker, home: Home) -> None:
    command = [sys.executable, "-uc", ORPHANS, str(tiny_download(curated=20)), str(home.root), CONFIG.model_dump_json()]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout
        workers = {int(pid) for _ in range(3) for pid in process.stdout.readline().split()}  # a line for each of three tasks
        assert len(workers) == 2
        assert all(alive(pid) for pid in workers)
        process.kill()
        deadline = time.monotonic() + 60
        while any(alive(pid) for pid in workers):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(found.strip()) and not found.strip().startswith("Z")


def test_a_torn_last_line_of_the_journal_costs_one_clip(tiny_download: Maker, home: Home) -> None:
    competition = load_competition(tiny_download())
    folder = build(competition, home)
    whole = content(folder)
    rows = read_manifest(folder).reset_index().to_dict("records")
    lines = [json.dumps(row | {"digest": digest(row)}) for row in rows]
    (folder / "manifest.csv").unlink()
    (folder / "journal.jsonl").write_text("\n".join(lines)[: -len(lines[-1]) // 2])
    (folder / ".c0001.npy.123.tmp").write_bytes(b"left behind")
    before = stamps(folder)
    build(competition, home)
    after = stamps(folder)
    assert {name for name in after if after[name] != before[name]} == {npy_path(folder, rows[-1]["fname"]).name}
    assert content(folder) == whole
    assert not (folder / ".c0001.npy.123.tmp").exists()


def test_a_missing_cache_is_reported_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(MelfoldError, match=r"no cache: .*Run `melfold cache`"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "\n", "fname\n", "fname,other\na,1\n", 'a "garbled\n1,2'])
def test_a_damaged_manifest_is_reported_and_made_again(content: str, tiny_download: Maker, tmp_path: Path) -> None:
    competition, home = load_competition(tiny_download()), Home(tmp_path / "home")
    folder = build(competition, home)
    whole = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(content)
    with pytest.raises(MelfoldError, match="manifest"):
        read_manifest(folder).loc[list(competition.curated.index)]["frames"].sum() or pytest.fail("read as if whole")
    build(competition, home)
    assert (folder / "manifest.csv").read_text() == whole


def test_a_stage_stopped_before_its_first_clip_can_continue(tiny_download: Maker, tmp_path: Path) -> None:
    competition, home = load_competition(tiny_download()), Home(tmp_path / "home")
    folder = cache_folder(home, competition.name, CONFIG)
    folder.mkdir(parents=True)
    (folder / "journal.jsonl").touch()
    build(competition, home, splits=[])
    build(competition, home)
    assert len(read_manifest(folder)) == len(competition.curated) + len(competition.test)


def test_a_wav_that_was_cut_short_is_unreadable(tiny_download: Maker, tmp_path: Path) -> None:
    root = tiny_download()
    competition = load_competition(root)
    path = competition.curated["path"].iloc[0]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(MelfoldError, match=r"unreadable audio: c0000.wav \(cut short: 3,000 of"):
        build(competition, Home(tmp_path / "home"))


@pytest.mark.parametrize("damage", ["flipped bit", "zeros", "another clip's array"])
def test_a_damaged_array_is_reported_when_it_is_read_and_made_again_by_verify(
    damage: str, tiny_download: Maker, tmp_path: Path
) -> None:
    competition, home = load_competition(tiny_download()), Home(tmp_path / "home")
    folder = build_cache(competition, CONFIG, home, compute=Compute(jobs=1))
    first, second = list(competition.curated.index[:2])
    path = npy_path(folder, first)
    before = path.read_bytes()
    if damage == "flipped bit":
        path.write_bytes(before[:300] + bytes([before[300] ^ 1]) + before[301:])
    elif damage == "zeros":
        path.write_bytes(before[:NPY_HEADER] + bytes(len(before) - NPY_HEADER))
    else:
        path.write_bytes((npy_path(folder, second).read_bytes() + before)[: len(before)])
    store = ClipStore(folder, [first, second], CONFIG.n_mels, CONFIG.top_db)
    out = np.empty((2, CONFIG.n_mels), np.float16)
    store.read(1, 0, out, "wrap")
    with pytest.raises(MelfoldError, match=f"a cached log-mel is damaged: .*{path.name}.*--verify"):
        store.read(0, 0, out, "wrap")
    build_cache(competition, CONFIG, home, compute=Compute(jobs=1))
    assert path.read_bytes() != before, "without verify only sizes are compared"
    build_cache(competition, CONFIG, home, compute=Compute(jobs=1), verify=True)
    assert path.read_bytes() == before


def test_an_edited_manifest_is_made_again(tiny_download: Maker, tmp_path: Path) -> None:
    competition, home = load_competition(tiny_download()), Home(tmp_path / "home")
    folder = build_cache(competition, CONFIG, home, compute=Compute(jobs=1))
    manifest = folder / "manifest.csv"
    before = manifest.read_text()
    manifest.write_text(before.replace("-", "", 1))
    with pytest.raises(MelfoldError, match=r"damaged manifest: .*changed after it was written.*melfold cache"):
        ClipStore(folder, list(competition.test.index), CONFIG.n_mels, CONFIG.top_db)
    build_cache(competition, CONFIG, home, compute=Compute(jobs=1))
    assert manifest.read_text() == before


def test_damage_beside_a_journal_is_found_too(tiny_download: Maker, home: Home) -> None:
    competition = load_competition(tiny_download())
    folder = build(competition, home)
    whole, manifest, journal = content(folder), folder / "manifest.csv", folder / "journal.jsonl"
    rows = read_manifest(folder).reset_index().to_dict("records")
    edited = json.dumps(rows[0] | {"digest": digest(rows[0])}).replace('"peak_db": -', '"peak_db": -1')
    text = manifest.read_text()
    for damaged in (text[:-40], text.replace("-", "-1", 1), text):
        manifest.write_text(damaged)
        journal.write_text(edited + "\n")
        build(competition, home)
        assert content(folder) == whole
        assert manifest.read_text() == text


def test_killed_between_the_manifest_and_its_stamp_nothing_is_made_again(tiny_download: Maker, home: Home) -> None:
    competition = load_competition(tiny_download())
    folder = build(competition, home, splits=["test"])
    stamp, before = (folder / "manifest.json").read_bytes(), stamps(folder)
    build(competition, home)
    added = stamps(folder)
    row = {"manifest": sha256_file(folder / "manifest.csv")}
    (folder / "manifest.json").write_bytes(stamp)
    (folder / "journal.jsonl").write_text(json.dumps(row | {"digest": digest(row)}) + "\n")
    build(competition, home)
    assert stamps(folder) == added
    assert added.items() >= before.items()

"""The cache: making it, against librosa and against pictures, reading crops from it, and finding it complete."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import soundfile
import torch
from torch.nn import functional

from melfold.compute import Compute
from melfold.config import LogMelConfig
from melfold.data.arrays import make_clip
from melfold.data.audio import read_waveform
from melfold.data.cache import build_cache
from melfold.data.clips import ClipStore
from melfold.data.logmel import log_mel_of
from melfold.files import Home
from melfold.learn.batches import draw_start, train_batches
from melfold.learn.phases import Phase
from melfold.recipes import load_recipe
from tests.bench.harness import Result, one_thread, ratio_result, seconds_of, take_turns
from tests.bench.workspace import Workspace, synthesise, write_competition

MELFOLD = [sys.executable, "-m", "melfold"]
"""The command line, in a fresh process."""


def librosa_log_mel(path: Path, front: LogMelConfig) -> np.ndarray:
    """A clip's log-mel `(n_mels, frames)` as anyone would make it."""
    waveform, sr = librosa.load(path, sr=None)
    power = librosa.feature.melspectrogram(
        y=waveform,
        sr=sr,
        n_fft=front.n_fft,
        hop_length=front.hop_length,
        n_mels=front.n_mels,
        fmin=front.fmin,
        fmax=front.fmax,
    )
    return librosa.power_to_db(power, top_db=front.top_db)


class Fresh:
    """A new folder at each call.

    Some file systems wait for the disk where a file replaces another (ext4's `auto_da_alloc`); a cache is made once, so
    that no turn may write over the files of the one before.
    """

    def __init__(self, path: Path) -> None:
        self.last = path
        self._numbers = count()

    def __call__(self) -> Path:
        self.last = self.last.with_name(f"{self.last.name.split('-')[0]}-{next(self._numbers)}")
        self.last.mkdir()
        return self.last


def librosa_loop(paths: Sequence[Path], front: LogMelConfig, folder: Path) -> None:
    """Clip after clip to float16 `.npy`, in this process."""
    for path in paths:
        np.save(folder / f"{path.stem}.npy", librosa_log_mel(path, front).astype(np.float16))


def melfold_loop(paths: Sequence[Path], front: LogMelConfig, folder: Path) -> None:
    """What one worker of `build_cache` does."""
    transform = log_mel_of(front)
    for path in paths:
        make_clip(folder, path.name, path, transform)


def decode_and_fft(paths: Sequence[Path], front: LogMelConfig) -> None:
    """What no log-mel can do without: samples, and the spectra of windowed frames, in the float64 that librosa's values need."""
    window = torch.hann_window(front.n_fft, dtype=torch.float64)
    half = front.n_fft // 2
    for path in paths:
        samples, _ = soundfile.read(path, dtype="float32")
        frames = functional.pad(torch.from_numpy(samples).double(), (half, half)).unfold(0, front.n_fft, front.hop_length)
        for start in range(0, len(frames), 32):  # the quickest of 8 to 128
            torch.fft.rfft(frames[start : start + 32] * window)


def cache_bound(work: Workspace) -> list[Result]:
    """Log-mels a second in one thread, against decoding and FFT alone; and where the time goes."""
    ours = Fresh(work.folder / "bound_ours")
    with one_thread():
        turns = take_turns(
            lambda: melfold_loop(work.wavs, work.front, ours()),
            lambda: decode_and_fft(work.wavs, work.front),
            work.pick(9, 1),
        )
        shares = _shares(work, ours)
    return [
        ratio_result(
            "cache_bound",
            "bare decode + FFT",
            turns,
            work.seconds,
            "s audio/s",
            bound=0.35,
            aim=0.8,
            **{f"share_{name}": round(share, 2) for name, share in shares.items()},
        )
    ]


def _shares(work: Workspace, folders: Fresh) -> dict[str, float]:
    """Which part of making log-mels is reading, FFT, the rest of the transform, and writing and noting."""
    transform = log_mel_of(work.front)
    waveforms = [read_waveform(path, work.front.sr)[0] for path in work.wavs]

    def median(part: Callable[[], object]) -> float:
        return statistics.median(seconds_of(part) for _ in range(work.pick(9, 1)))

    whole = median(lambda: melfold_loop(work.wavs, work.front, folders()))
    read = median(lambda: [read_waveform(path, work.front.sr) for path in work.wavs])
    made = median(lambda: [transform(waveform) for waveform in waveforms])
    fft = median(lambda: decode_and_fft(work.wavs, work.front)) - read
    return {"read": read / whole, "fft": fft / whole, "mel": (made - fft) / whole, "write": 1 - (read + made) / whole}


def cache_one(work: Workspace) -> list[Result]:
    """Log-mels a second in one thread, melfold's and librosa's; both must hold the same numbers."""
    ours, theirs = Fresh(work.folder / "one_ours"), Fresh(work.folder / "one_theirs")
    with one_thread():
        turns = take_turns(
            lambda: melfold_loop(work.wavs, work.front, ours()),
            lambda: librosa_loop(work.wavs, work.front, theirs()),
            work.pick(5, 1),
        )
    name = f"{work.wavs[0].stem}.npy"
    pair = [np.load(folder.last / name).astype(np.float32) for folder in (ours, theirs)]
    difference = float(np.abs(pair[0] - pair[1].T).max())
    assert difference < 0.2, f"melfold's and librosa's log-mels differ by {difference} dB"
    return [
        ratio_result(
            "cache_one",
            "librosa, one thread",
            turns,
            len(work.wavs),
            "clips/s",
            bound=1.7,
            aim=2.0,
            clips=f"{len(work.wavs)} {work.source}",
            mean_seconds=round(work.seconds / len(work.wavs), 1),
            largest_difference_db=difference,
        )
    ]


def cache_workers(work: Workspace) -> list[Result]:
    """`build_cache` on two workers against one, end to end, workers of both kinds already started."""
    clips = work.pick(1500, 16)
    competition = write_competition(work.folder / "workers", work.wavs, clips - 2, 2)
    homes = {jobs: Fresh(work.folder / f"workers{jobs}_home") for jobs in (1, 2)}

    def build(jobs: int) -> None:
        with one_thread():
            build_cache(competition, work.front, Home(homes[jobs]()), compute=Compute(jobs=jobs))

    turns = take_turns(lambda: build(2), lambda: build(1), work.pick(5, 1))
    return [ratio_result("cache_workers", "one worker", turns, clips, "clips/s", bound=1.6, aim=1.9, clips=clips)]


FAT2019_CLIPS, FAT2019_HOURS = 24_785, 90.0


def cache_fat2019(work: Workspace) -> list[Result]:
    """Minutes that the competition's training clips would take: `melfold cache` of a sample, start and end included, scaled up.

    The sample's clips are shorter than the real ones, so the part of the work that a clip costs, whatever its length, is over-
    rather than understated.
    """
    copies = work.pick(1600, 12)
    competition = write_competition(work.folder / "sample", work.wavs, copies - 2, 2)
    hours = copies * work.seconds / len(work.wavs) / 3600
    homes, logs = Fresh(work.folder / "sample_home"), work.folder / "sample.log"

    def ours() -> None:
        command = [*MELFOLD, "cache", str(competition.root), "--recipe", "open", "--home", str(homes()), "--jobs", "2"]
        with logs.open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)

    ours()
    seconds = statistics.median(seconds_of(ours) for _ in range(work.pick(3, 1)))
    minutes = seconds / hours * FAT2019_HOURS / 60
    notes = {"sample_hours": round(hours, 2), "clips": copies, "speed_x": round(hours * 3600 / seconds)}
    return [Result("cache_fat2019", f"{hours:.1f} h sampled", minutes, None, "min", minutes, "min", 8, 8, False, notes)]


def cache_two(work: Workspace) -> list[Result]:
    """`build_cache` on two workers, end to end, against the librosa loop in one thread of one process.

    The workers are started by a first call, which is not timed: over a whole competition that second does not matter.
    `librosa_free` is the librosa loop's rate when its BLAS may use every core.
    """
    clips = work.pick(240, 16)
    competition = write_competition(work.folder / "two", work.wavs, clips - 2, 2)
    paths = [*competition.curated["path"], *competition.test["path"]]
    homes, folders = Fresh(work.folder / "two_home"), Fresh(work.folder / "two_theirs")

    def ours() -> None:
        build_cache(competition, work.front, Home(homes()), compute=Compute(jobs=2))

    def theirs() -> None:
        with one_thread():
            librosa_loop(paths, work.front, folders())

    turns = take_turns(ours, theirs, work.pick(5, 1))
    free = clips / seconds_of(lambda: librosa_loop(paths, work.front, folders()))
    return [
        ratio_result(
            "cache_two",
            "librosa, one process",
            turns,
            clips,
            "clips/s",
            bound=3.0,
            aim=3.5,
            clips=clips,
            librosa_free=round(free, 1),
        )
    ]


def png(work: Workspace) -> list[Result]:
    """A clip from wav to training input: log-mel, cache and crop, against a matplotlib picture saved, read back and resized.

    The picture is drawn as librosa's documentation did it in 2019 and as articles copy it: 10 x 4 inches, axes, a colour bar,
    tight layout; then 224 x 224 as ImageNet models take it. `without_axes` is the ratio to the barest picture: a default figure
    that holds nothing but the mesh, saved tight.
    """
    import matplotlib

    matplotlib.use("Agg")
    fnames = list(work.competition.curated.index)[: work.pick(16, 2)]
    paths = list(work.competition.curated["path"])[: len(fnames)]
    store = ClipStore(work.cache, fnames, work.front.n_mels, work.front.top_db)
    rng = np.random.default_rng(0)
    folders = Fresh(work.folder / "png")

    def ours() -> None:
        transform, folder = log_mel_of(work.front), folders()
        for row, (fname, path) in enumerate(zip(fnames, paths, strict=True)):
            make_clip(folder, fname, path, transform)
            crop = np.empty((256, work.front.n_mels), np.float16)
            store.read(row, draw_start(int(store.frames[row]), len(crop), "wrap", rng), crop, "wrap")

    def pictures(*, axes: bool) -> None:
        for path in paths:
            _picture(path, work.front, work.folder / "picture.png", axes=axes)

    with one_thread():
        turns = take_turns(ours, lambda: pictures(axes=True), work.pick(5, 1))
        bare = take_turns(ours, lambda: pictures(axes=False), work.pick(3, 1))
    return [
        ratio_result(
            "png",
            "specshow to PNG to 224 x 224",
            turns,
            len(fnames),
            "clips/s",
            bound=25,
            aim=25,
            without_axes=round(bare.ratio, 1),
        )
    ]


def _picture(path: Path, front: LogMelConfig, target: Path, *, axes: bool) -> np.ndarray:
    import librosa.display
    import matplotlib.pyplot as plt
    from PIL import Image

    figure, ax = plt.subplots(figsize=(10, 4) if axes else None)
    scales: dict[str, Any] = {"x_axis": "time", "y_axis": "mel"} if axes else {}
    image = librosa.display.specshow(
        librosa_log_mel(path, front), sr=front.sr, hop_length=front.hop_length, fmin=front.fmin, fmax=front.fmax, ax=ax, **scales
    )
    if axes:
        figure.colorbar(image, ax=ax, format="%+2.0f dB")
        figure.tight_layout()
        figure.savefig(target)
    else:
        ax.axis("off")
        figure.savefig(target, bbox_inches="tight", pad_inches=0)
    plt.close(figure)
    with Image.open(target) as opened:
        small = np.asarray(opened.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR), np.float32) / 255
        return (small - small.mean(axis=(0, 1))) / small.std(axis=(0, 1))


def crops(work: Workspace) -> list[Result]:
    """Random crops of 256 x 128 a second from the cache, in one thread, without reading ahead.

    Against copies of as many bytes from one array in memory, and, beside it, against whole files.
    """
    fnames = list(work.competition.curated.index)
    store = ClipStore(work.cache, fnames, work.front.n_mels, work.front.top_db)
    batch, steps = 64, work.pick(40, 3)
    config = load_recipe("base", [f"train.batch_size={batch}", "train.pad=wrap"]).train
    phase = Phase(config, 0, steps, np.arange(len(fnames)))
    rng = np.random.default_rng(0)

    def ours() -> None:
        for _ in train_batches(store, [phase], length=256, seeds=(0, 0)):
            pass

    def theirs() -> None:
        for _ in range(steps):
            out = np.empty((batch, 256, work.front.n_mels), np.float16)
            for crop in out:
                np_load_crop(work.cache / f"{fnames[rng.integers(len(fnames))][:-4]}.npy", crop, rng)

    memory = np.concatenate([np.load(work.cache / f"{fname[:-4]}.npy") for fname in fnames])
    starts = rng.integers(0, len(memory) - 256, batch * steps)

    def copies() -> None:
        for step in range(steps):
            out = np.empty((batch, 256, work.front.n_mels), np.float16)
            for crop, start in zip(out, starts[step * batch : (step + 1) * batch], strict=True):
                crop[:] = memory[start : start + 256]

    with one_thread():
        turns = take_turns(ours, copies, work.pick(9, 1))
        peer = take_turns(ours, theirs, work.pick(9, 1))
    return [
        ratio_result("crops", "copies in memory", turns, batch * steps, "crops/s", bound=0.05, aim=0.1),
        ratio_result("crops", "np.load and slice", peer, batch * steps, "crops/s", bound=1.5, aim=2),
    ]


def np_load_crop(path: Path, out: np.ndarray, rng: np.random.Generator) -> None:
    """A random crop out of a whole file, read anew."""
    log_mel = np.load(path)
    spare = len(log_mel) - len(out)
    if spare >= 0:
        start = rng.integers(spare + 1)
        out[:] = log_mel[start : start + len(out)]
    else:
        out[:] = np.take(log_mel, np.arange(len(out)), axis=0, mode="wrap")


def recache(work: Workspace) -> list[Result]:
    """Seconds of a fresh `melfold cache` that finds 5,000 clips done, beside `melfold --help`, which does nothing."""
    clips = work.pick(5000, 50)
    wavs = synthesise(work.folder / "tiny_wavs", 20, 0.3, 0.5)
    competition = write_competition(work.folder / "tiny", wavs, clips - clips // 10, clips // 10)
    home = Home(work.folder / "tiny_home")
    build_cache(competition, work.front, home)

    def ours() -> None:
        command = [*MELFOLD, "cache", str(competition.root), "--recipe", "open", "--home", str(home.root)]
        subprocess.run(command, check=True, capture_output=True)

    def theirs() -> None:
        subprocess.run([*MELFOLD, "--help"], check=True, capture_output=True)

    turns = take_turns(ours, theirs, work.pick(5, 1))
    ours_s, theirs_s = statistics.median(turns.ours), statistics.median(turns.theirs)
    return [Result("recache", "melfold --help", ours_s, theirs_s, "s", ours_s, "s", 2.0, 2.0, False, {"clips": clips})]

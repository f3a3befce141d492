"""Waveform -> log-mel, and the cache of log-mels on disk."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from io import BytesIO, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from melfold.compute import Progress, remote, silent
from melfold.config import LogMelConfig
from melfold.data.competition import Competition, Split
from melfold.errors import MelfoldError
from melfold.files import Home, atomic_path, locked, remove_leftovers, write_json

if TYPE_CHECKING:
    import soundfile
    import torch

log = logging.getLogger(__name__)

NPY_HEADER = 128
"""Bytes before the data in a `.npy` of this cache: crops are read at an offset without parsing it."""

_AMIN = 1e-10  # the power below which librosa's power_to_db cuts off: -100 dB
_BLOCK = 48  # frames at a time: windows, spectra and powers of a block stay in the processor's cache
_SAMPLES = 1 << 20  # at a time, so that a clip of an hour needs no more memory than one of half a minute
_LIMITED = 8192  # frames at a time
_FULL_SCALE = 0.999
_FEW = 400  # clips: fewer are made before workers have started
_GROUP = 16  # neighbouring mel bands that share one small matrix product over the bins they cover


class LogMel:
    """`power_to_db(melspectrogram(y, ...), ref=1.0, top_db=top_db)` of librosa 0.11, faster.

    The same frames, window and float64 FFT as librosa's (a float32 FFT is up to 4e-2 dB off, 80 dB below a pure tone), but
    PyTorch's FFT, a block at a time; no square root; and the mel matrix, nearly all zeros, is applied only to the bins that
    its bands cover.
    """

    def __init__(self, config: LogMelConfig) -> None:
        import librosa
        import scipy.signal
        import torch  # slow to import, all three, and a complete cache needs none of them

        bank = librosa.filters.mel(
            sr=config.sr,
            n_fft=config.n_fft,
            n_mels=config.n_mels,
            fmin=config.fmin,
            fmax=config.fmax,
            htk=config.htk,
            norm=config.norm,
            dtype=np.float32,
        )
        self.config = config
        try:
            window = scipy.signal.get_window(config.window, config.n_fft, fftbins=True)
        except ValueError as error:
            raise MelfoldError("unknown window", config.window, "logmel.window takes SciPy's names, such as hann") from error
        self._window = torch.from_numpy(window.astype(np.float64))
        self._bands: list[tuple[slice, slice, np.ndarray]] = []
        for start in range(0, config.n_mels, _GROUP):
            rows = bank[start : start + _GROUP]
            covered = np.flatnonzero(rows.any(axis=0))
            if len(covered):
                bins = slice(int(covered[0]), int(covered[-1]) + 1)
                self._bands.append((slice(start, start + len(rows)), bins, np.ascontiguousarray(rows[:, bins].T)))

    def __call__(self, waveform: np.ndarray) -> np.ndarray:
        """Args: waveform: float32 `(samples,)` at the configured rate, not empty. Returns: float32 dB `(frames, n_mels)`."""
        out = np.concatenate(list(self.stream([waveform])))
        return np.maximum(out, out.max() - (self.config.top_db or np.inf), out=out)

    def stream(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The log-mel of a waveform that comes in blocks, in parts as they become known, before `top_db` limits it."""
        import torch

        n_fft, hop = self.config.n_fft, self.config.hop_length
        rest = torch.zeros(n_fft // 2, dtype=torch.float64)
        skip = 0  # samples between two frames, where the hop is longer than a frame
        for block, last in _marked(blocks):
            block, skip = block[skip:], max(0, skip - len(block))
            known = torch.zeros(len(rest) + len(block) + last * (n_fft // 2), dtype=torch.float64)
            known[: len(rest)] = rest
            known[len(rest) : len(rest) + len(block)] = torch.from_numpy(block)
            rest = known
            if len(known) >= n_fft:
                frames = known.unfold(0, n_fft, hop)
                yield self._decibels(frames)
                rest = known[len(frames) * hop :]
                skip = max(0, len(frames) * hop - len(known))

    def _decibels(self, frames: torch.Tensor) -> np.ndarray:
        import torch

        out = np.zeros((len(frames), self.config.n_mels), np.float32)
        windowed = torch.empty(min(_BLOCK, len(frames)), self.config.n_fft, dtype=torch.float64)
        for start in range(0, len(frames), _BLOCK):
            block = frames[start : start + _BLOCK]
            torch.mul(block, self._window, out=windowed[: len(block)])
            parts = torch.fft.rfft(windowed[: len(block)]).numpy().view(np.float64)
            np.square(parts, out=parts)
            power = (parts[:, 0::2] + parts[:, 1::2]).astype(np.float32)
            for mels, bins, weights in self._bands:
                np.matmul(power[:, bins], weights, out=out[start : start + len(power), mels])
        np.maximum(out, _AMIN, out=out)
        np.log10(out, out=out)
        out *= 10
        return out


def _marked(blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    """Each block, and whether it is the last one."""
    before = None
    for block in blocks:
        if before is not None:
            yield before, False
        before = block
    if before is not None:
        yield before, True


@lru_cache(maxsize=4)
def log_mel_of(config: LogMelConfig) -> LogMel:
    """The `LogMel` of a configuration, made once a process."""
    return LogMel(config)


@dataclass(frozen=True)
class ClipInfo:
    """A row of a cache's manifest. Bytes, ns, seconds, frames, dB."""

    fname: str
    size: int
    mtime_ns: int
    seconds: float = 0.0
    frames: int = 0
    peak_db: float = 0.0
    mean_db: float = 0.0
    mean_square_db: float = 0.0
    flags: str = ""
    """Of silent, clipped, short, resampled, downmixed, unreadable, joined by |."""
    error: str = ""


def read_waveform(path: Path, sr: int) -> tuple[np.ndarray, list[str]]:
    """A clip's samples as mono float32 at `sr`, and which of `resampled` and `downmixed` was needed.

    Raises:
        MelfoldError: a file that cannot be read, holds no samples, or holds samples that are not finite.
    """
    blocks, flags = open_waveform(path, sr)
    return np.concatenate(list(blocks)), flags


def open_waveform(path: Path, sr: int) -> tuple[Iterator[np.ndarray], list[str]]:
    """As `read_waveform`, in blocks of some 24 s; errors also come while the blocks are read."""
    import soundfile

    try:
        file = soundfile.SoundFile(path)
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(path, str(error).strip()) from None
    flags = (["downmixed"] if file.channels > 1 else []) + (["resampled"] if file.samplerate != sr else [])
    return _waveform_blocks(file, path, sr), flags


def _waveform_blocks(file: soundfile.SoundFile, path: Path, sr: int) -> Iterator[np.ndarray]:
    import soundfile

    with file:
        if cut := cut_short(path):
            raise _unreadable(path, cut)
        resampler = None
        if file.samplerate != sr:
            import soxr

            resampler = soxr.ResampleStream(file.samplerate, sr, 1, dtype="float32", quality="HQ")
        read = given = 0
        last = False
        while not last:
            try:
                samples = file.read(min(_SAMPLES, file.frames - read), dtype="float32", always_2d=True)
            except (soundfile.SoundFileError, OSError) as error:
                raise _unreadable(path, str(error).strip()) from None
            read += len(samples)
            last = len(samples) < _SAMPLES or read == file.frames
            if not np.isfinite(samples).all():
                raise _unreadable(path, "samples that are not finite")
            block = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
            if resampler:
                block = resampler.resample_chunk(block, last=last)
            given += len(block)
            if len(block):
                yield block
        if not given:
            raise _unreadable(path, f"no samples left at {sr} Hz" if read else "no samples")


def _unreadable(path: Path, why: str) -> MelfoldError:
    return MelfoldError("unreadable audio", f"{path.name} ({why})", "Download it again")


def cut_short(path: Path) -> str:
    """What tells that a wav holds less than its header says, as a broken-off download does; libsndfile reads it in silence."""
    with path.open("rb") as file:
        head = file.read(8)
        size = os.fstat(file.fileno()).st_size
    said = int.from_bytes(head[4:8], "little") + 8
    # Programs that write to a pipe leave 0 or the largest number; an odd chunk may lack its padding byte.
    if head[:4] == b"RIFF" and 8 < said < 2**32 - 8 and said > size + 1:
        return f"cut short: {size:,} of {said:,} bytes"
    return ""


def cache_folder(home: Home, competition_name: str, config: LogMelConfig) -> Path:
    """Where the log-mels of a competition under a configuration lie."""
    return home.cache / competition_name / config.fingerprint()


def npy_path(folder: Path, fname: str) -> Path:
    """Where a clip's log-mel lies."""
    return folder / f"{fname.rsplit('.', 1)[0]}.npy"


def build_cache(
    competition: Competition,
    config: LogMelConfig,
    home: Home,
    *,
    splits: Iterable[Split] = ("curated", "test"),
    exclude: Iterable[str] = (),
    jobs: int = -1,
    progress: Progress = silent,
) -> Path:
    """Make every log-mel that is missing or whose audio has changed.

    Args:
        splits: which parts of the competition.
        exclude: training clips to leave out; they need not be readable.
        jobs: worker processes; -1 for one a core, or none where there is too little to do for them to pay.

    Returns:
        The cache's folder.

    Raises:
        MelfoldError: listing every training clip that cannot be read. Unreadable test clips are only warned of.
    """
    folder = cache_folder(home, competition.name, config)
    splits, exclude = list(splits), set(exclude)
    paths = {
        fname: path
        for split in splits
        for fname, path in competition.split(split)["path"].items()
        if split == "test" or fname not in exclude
    }
    with locked(folder / ".lock", lambda: log.warning("waiting for another melfold that fills %s", folder)):
        remove_leftovers(folder)
        write_json(folder / "config.json", config.model_dump())
        known = _read_manifest(folder)
        work = _stale(folder, paths, known, config)
        if work:
            _make(folder, work, config, jobs, known, progress)
            _write_manifest(folder, known)
    _report_unreadable(competition, splits, paths, known)
    return folder


def read_manifest(folder: Path) -> pd.DataFrame:
    """The manifest of a cache, indexed by `fname`; columns as in `ClipInfo`."""
    path = folder / "manifest.csv"
    if not path.exists():
        raise MelfoldError("no cache", str(folder), "Run `melfold cache`")
    try:
        table = pd.read_csv(path, index_col="fname", dtype={"fname": str}, keep_default_na=False, float_precision="round_trip")
        return table[[f.name for f in fields(ClipInfo) if f.name != "fname"]]
    except (ValueError, KeyError) as error:
        raise MelfoldError("a broken manifest", f"{path} ({error})", "Delete it and run `melfold cache`") from None


def _stale(folder: Path, paths: dict[str, Path], known: dict[str, ClipInfo], config: LogMelConfig) -> dict[str, Path]:
    """The clips without an up-to-date array."""
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".npy")}
    stale = {}
    for fname, path in paths.items():
        info = known.get(fname)
        stat = path.stat()
        whole = info and sizes.get(npy_path(folder, fname).name) == NPY_HEADER + 2 * config.n_mels * info.frames
        # A clip that was unreadable is tried again: it may have been a full disk or a hiccup of a network drive.
        if not whole or (info.size, info.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            stale[fname] = path
    return stale


def _make(
    folder: Path,
    work: dict[str, Path],
    config: LogMelConfig,
    jobs: int,
    known: dict[str, ClipInfo],
    progress: Progress,
) -> None:
    from joblib import Parallel, delayed

    done = 0
    items = list(work.items())
    # A chunk is one task: large enough to hide the cost of passing it, small enough that a kill loses little.
    chunks = [items[i : i + 8] for i in range(0, len(items), 8)]
    # Made here, so that no worker of this machine has to import librosa; to others the configuration alone is sent.
    transform = config if remote() else log_mel_of(config)
    if jobs == -1 and len(work) < _FEW:
        jobs = 1
    with (folder / "journal.jsonl").open("a") as journal:
        results: Iterator[list[ClipInfo]] = Parallel(n_jobs=jobs, return_as="generator_unordered")(
            delayed(_make_chunk)(folder, chunk, transform) for chunk in chunks
        )
        for infos in results:
            for info in infos:
                known[info.fname] = info
                journal.write(json.dumps(asdict(info)) + "\n")
            journal.flush()
            done += len(infos)
            progress(done, len(work), "caching log-mels")


def stop_workers() -> None:
    """End the worker processes that `build_cache` may have left waiting for more: they would hold their memory for minutes."""
    loky = sys.modules.get("joblib.externals.loky.reusable_executor")
    if loky and loky._executor is not None:
        loky._executor.shutdown(wait=True)


def _make_chunk(folder: Path, chunk: list[tuple[str, Path]], transform: LogMel | LogMelConfig) -> list[ClipInfo]:
    if isinstance(transform, LogMelConfig):
        transform = log_mel_of(transform)
    return [make_clip(folder, fname, path, transform) for fname, path in chunk]


def make_clip(folder: Path, fname: str, path: Path, transform: LogMel) -> ClipInfo:
    """Write one clip's array and return its row; a clip that cannot be read gets the flag `unreadable` and no array.

    Memory does not grow with the clip's length.
    """
    stat = path.stat()
    target = npy_path(folder, fname)
    try:
        blocks, flags = open_waveform(path, transform.config.sr)
        sound = _Sound()
        # Not made durable: thousands of waits for the disk cost more than remaking clips after a power cut.
        with atomic_path(target, durable=False) as temporary, temporary.open("w+b", buffering=0) as file:
            frames, peak, mean, mean_square = _write_array(file, transform.stream(sound.listen(blocks)), transform.config)
    except MelfoldError as error:
        target.unlink(missing_ok=True)
        return ClipInfo(fname, stat.st_size, stat.st_mtime_ns, flags="unreadable", error=str(error))
    if sound.peak == 0:
        flags.append("silent")
    if sound.full_scale >= 10:
        flags.append("clipped")
    if sound.samples < transform.config.n_fft:
        flags.append("short")
    return ClipInfo(
        fname,
        stat.st_size,
        stat.st_mtime_ns,
        seconds=round(sound.samples / transform.config.sr, 4),
        frames=frames,
        peak_db=round(peak, 4),
        mean_db=mean,
        mean_square_db=mean_square,
        flags="|".join(flags),
    )


@dataclass
class _Sound:
    """What is noted of a waveform on its way to the transform."""

    samples: int = 0
    peak: float = 0.0
    full_scale: int = 0

    def listen(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            self.samples += len(block)
            peak = max(float(block.max()), -float(block.min()))
            self.peak = max(self.peak, peak)
            if peak >= _FULL_SCALE:
                self.full_scale += int((np.abs(block) >= _FULL_SCALE).sum())
            yield block


def _write_array(file: FileIO, parts: Iterator[np.ndarray], config: LogMelConfig) -> tuple[int, float, float, float]:
    """Write a `.npy` of float16 dB, limited to `top_db` below its peak. Returns frames, peak, mean and mean square."""
    import torch

    file.seek(NPY_HEADER)
    frames, peak = 0, -np.inf
    for part in parts:
        frames, peak = frames + len(part), max(peak, float(part.max()))
        file.write(torch.from_numpy(part).half().numpy())  # NumPy's conversions to and from float16 are ten times slower
    # Rounding keeps the order, so that limiting afterwards gives what limiting before it would have given.
    floor = float(np.float16(np.float32(peak) - np.float32(config.top_db or np.inf)))
    total = squares = 0.0
    for start in range(0, frames, _LIMITED):
        stored = np.empty((min(_LIMITED, frames - start), config.n_mels), np.float16)
        at = NPY_HEADER + start * config.n_mels * stored.itemsize
        file.seek(at)
        if file.readinto(stored) != stored.nbytes:
            raise OSError(f"{file.name}: fewer bytes than were written")
        values = torch.from_numpy(stored).float().clamp_(min=floor)
        file.seek(at)
        file.write(values.half().numpy())
        values = values.numpy()
        total += float(values.sum(dtype=np.float64))
        squares += float(np.square(values).sum(dtype=np.float64))
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": (frames, config.n_mels)})
    if len(header.getvalue()) != NPY_HEADER:
        raise RuntimeError(f"a .npy header of {len(header.getvalue())} bytes")
    file.seek(0)
    file.write(header.getvalue())
    cells = frames * config.n_mels
    return frames, peak, total / cells, squares / cells


def _read_manifest(folder: Path) -> dict[str, ClipInfo]:
    """The manifest, and what an interrupted stage had noted in its journal."""
    known = {}
    if (folder / "manifest.csv").exists():
        try:
            for row in read_manifest(folder).itertuples():
                known[row.Index] = ClipInfo(*row)
        except MelfoldError as error:
            log.warning("%s: making its log-mels again", error.lines[0].split(". ")[0])
    journal = folder / "journal.jsonl"
    if journal.exists():
        for line in journal.read_text().splitlines():
            try:
                info = ClipInfo(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                break  # the kill fell into this line
            known[info.fname] = info
        _write_manifest(folder, known)
    return known


def _write_manifest(folder: Path, known: dict[str, ClipInfo]) -> None:
    rows: list[dict[str, Any]] = [asdict(known[fname]) for fname in sorted(known)]
    with atomic_path(folder / "manifest.csv") as temporary:
        pd.DataFrame(rows, columns=[f.name for f in fields(ClipInfo)]).to_csv(temporary, index=False, lineterminator="\n")
    (folder / "journal.jsonl").unlink(missing_ok=True)


def _report_unreadable(competition: Competition, splits: list[Split], paths: dict[str, Path], known: dict[str, ClipInfo]) -> None:
    failed = {fname: known[fname].error for fname in paths if "unreadable" in known[fname].flags.split("|")}
    test = set(competition.test.index) if "test" in splits else set()
    for fname in sorted(failed.keys() & test):
        log.warning("TEST CLIP %s: it will get the mean out-of-fold probabilities", failed[fname])
    fatal = [fname for fname in failed if fname not in test]
    if fatal:
        raise MelfoldError.many(
            MelfoldError(
                failed[fname].removesuffix(". Download it again"), "", f"Download it again, or --set data.exclude.'{fname}'='why'"
            )
            for fname in fatal
        )

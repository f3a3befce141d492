"""What AudioSet would ask of this kit, worked out from this machine's results: `python -m tests.bench.audioset > PAGE`."""

from __future__ import annotations

import sys
from typing import Any

from tests.bench.__main__ import read_rows, result_path

CLIPS, LABELS, SECONDS, GPUS, CORES = 2_000_000, 527, 10.0, 8, 64
FPS, MELS, WAV_BYTES = 100, 128, 88_200
GMAC = 5.7 * SECONDS * FPS / 500
"""`convnext_tiny`, a forward pass over a crop of 128 x 1000; a training step costs three of them."""
GPU_TFLOPS = {"T4": 12.0, "A100": 90.0}
"""Sustained in mixed precision: a fifth to a third of what the cards claim. Assumed, not measured."""


def page(rows: list[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    by = {(row["name"], row["against"]): row for row in rows}
    scored = by["lwlrap", "bare sort"]["ours"]
    cached = by["cache_bound", "bare decode + FFT"]
    audio_rate = cached["ours"]
    scaling = by["cache_workers", "one worker"]["value"] / 2
    feed = by["feed", "goal"]["notes"]["without_augmentation"]
    finding = (by["recache", "melfold --help"]["ours"] - by["recache", "melfold --help"]["theirs"]) / 5000
    cells = by["tables", "np.save and np.load"]["ours"]
    folds_key, train_key = (f"growth {stage}, {LABELS} labels" for stage in ("folds", "train"))
    folds = by[folds_key, "time, linear is 1"]["notes"]
    train = by[train_key, "time, linear is 1"]["notes"]
    per_clip_folds = (folds["seconds"][2] - folds["seconds"][1]) / 12_000
    folds_mib = (folds["MiB"][2] - folds["MiB"][1]) / 12_000
    per_clip_mib = (train["MiB"][2] - train["MiB"][1]) / 12_000

    read_size = SECONDS * FPS * MELS * 2
    core_hours = CLIPS * SECONDS / audio_rate / 3600
    all_cores = CORES * scaling
    cells_of_table = CLIPS * LABELS
    table = [
        ("what", "from", "comes to"),
        ("---", "---", "---"),
        (
            "cache, on disk",
            f"{read_size / 1000:.0f} kB a clip, float16",
            f"{CLIPS * read_size / 1e9:,.0f} GB (as 44.1 kHz wav: {CLIPS * SECONDS * WAV_BYTES / 1e9:,.0f} GB)",
        ),
        (
            "cache, time",
            f"{audio_rate:,.0f} s of wav a core-second, {100 * scaling:.0f} % of it on each of two workers",
            f"{core_hours:.1f} core-hours: {60 * core_hours / all_cores:.0f} min on {CORES} cores, "
            f"if the disk gives {all_cores * audio_rate * WAV_BYTES / 1e9:.1f} GB/s",
        ),
        (
            "finding the cache complete",
            f"{1e6 * finding:.0f} us a clip",
            f"{CLIPS * finding / 60:.1f} min at the start of each command",
        ),
        (
            "fold table",
            f"{1000 * per_clip_folds:.2f} ms a clip at {LABELS} labels, if it stays linear beyond 16,000",
            f"{CLIPS * per_clip_folds / 60:.0f} min and {CLIPS * folds_mib / 1024:.0f} GB, once, in one thread",
        ),
    ]
    for gpu, tflops in GPU_TFLOPS.items():
        rate = tflops * 1e12 / (GMAC * 1e9 * 2 * 3)
        epoch = CLIPS / rate / 3600
        table += [
            (
                f"an epoch, {gpu}",
                f"{rate:,.0f} crops/s a GPU (assumed {tflops:.0f} TFLOP/s; {GMAC:.1f} GMAC a crop forward)",
                f"{epoch:.1f} h of one GPU; {epoch / GPUS:.2f} h if {GPUS} could share it",
            ),
            (
                f"feeding {GPUS} x {gpu}",
                f"{GPUS * rate:,.0f} crops/s; two cores read {feed:,.0f} crops/s of 2.56 s from memory",
                f"{GPUS * rate * read_size / 1e9:.2f} GB/s in reads of {read_size / 1000:.0f} kB",
            ),
        ]
    table += [
        (
            "out-of-fold table",
            f"{cells_of_table / 1e9:.2f} billion cells; CSV written and read back at {cells / 1e6:.1f} million cells/s",
            f"{cells_of_table / cells / 60:.0f} min, {10 * cells_of_table / 1e9:.0f} GB of text, "
            f"{4 * cells_of_table / 1e9:.1f} GB as float32",
        ),
        (
            "memory of a training process",
            f"{1024 * per_clip_mib:.0f} KiB a clip at {LABELS} labels (4,000 to 16,000 clips)",
            f"{CLIPS * per_clip_mib / 1024:.0f} GB a fold",
        ),
        (
            "lwlrap",
            f"{scored * 80 / 1e6:.0f} million cells/s",
            f"{cells_of_table / (scored * 80):.0f} s",
        ),
    ]
    head = f"""# AudioSet's size, by arithmetic

{CLIPS:,} clips of {SECONDS:.0f} s ({CLIPS * SECONDS / 3600:,.0f} h), {LABELS} labels, {GPUS} GPUs and {CORES} cores.
Log-mels of {MELS} bands at {FPS} frames/s. The rates are those of the JSON beside this page, measured on two cores;
GPU speeds are assumed, no GPU was at hand. Made by `python -m tests.bench.audioset`.

"""
    return head + "".join(f"| {' | '.join(row)} |\n" for row in table) + "\n" + BREAKS


BREAKS = """\
**What breaks first: the tables of probabilities.** They are CSV, to be read by people and by Kaggle: every stage that writes
or reads one of this size takes a quarter of an hour, and several copies of it in memory. They would have to become arrays.

**Then the trainer.** A fold is one process on one GPU: five folds leave three of eight GPUs idle, and one model cannot use
two. Data parallelism within a fold is not in the kit.

**Then the file system.** Two million small files in one folder, each looked at whenever a command asks whether the cache is
complete; on a network drive that is not minutes but hours. And the cache fits no memory: eight fast GPUs want random reads of
whole clips at gigabytes a second, which a local NVMe gives and a network drive does not. Shorter crops and fewer bands are
the cheap way out; shards of many clips the right one.

**What does not break:** making log-mels (bounded by the disk, spread by Dask; its memory does not grow at all), and lwlrap
and its intervals, which work in pieces.
"""


def main() -> int:
    """Print the page."""
    rows = read_rows(result_path())
    if not rows:
        print("no results of this machine: run `make bench` first", file=sys.stderr)
        return 2
    sys.stdout.write(page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

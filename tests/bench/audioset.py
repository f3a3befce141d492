"""What AudioSet would ask of this kit, worked out from this machine's results: `python -m tests.bench.audioset > PAGE`."""

from __future__ import annotations

import sys
from typing import Any

from tests.bench.__main__ import read_rows, result_path

CLIPS, LABELS, SECONDS, GPUS, CORES = 2_000_000, 527, 10.0, 8, 64
FPS, MELS = 100, 128
GMAC = 5.7 * SECONDS * FPS / 500
"""`convnext_tiny`, a forward pass over a crop of 128 x 1000; a training step costs three of them."""
GPU_TFLOPS = {"T4": 12.0, "A100": 90.0}
"""Sustained in mixed precision: a fifth to a third of what the cards claim. Assumed, not measured."""


def page(rows: list[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    by = {(row["name"], row["against"]): row for row in rows}
    value = {name: row["ours"] for (name, _), row in by.items()}
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
    per_clip_mib = (train["MiB"][2] - train["MiB"][1]) / 12_000

    hours = CLIPS * SECONDS / 3600
    crop_bytes = SECONDS * FPS * MELS * 2
    storage = CLIPS * crop_bytes / 1e9
    core_hours = CLIPS * SECONDS / audio_rate / 3600
    probs = CLIPS * LABELS
    lines = [
        "# AudioSet's size, by arithmetic",
        "",
        f"{CLIPS:,} clips of {SECONDS:.0f} s ({hours:,.0f} h), {LABELS} labels, {GPUS} GPUs and {CORES} cores, log-mels of {MELS} bands at",
        f"{FPS} frames/s. Rates are those of this folder's JSON, measured on 2 cores; GPU speeds are assumed (no GPU was at hand).",
        "Made by `python -m tests.bench.audioset`.",
        "",
        "| what | from | comes to |",
        "| --- | --- | --- |",
        f"| cache, on disk | {crop_bytes / 1000:.0f} kB a clip, float16 | {storage:,.0f} GB (as 44.1 kHz wav: {CLIPS * SECONDS * 88_200 / 1e9:,.0f} GB) |",
        f"| cache, time | {audio_rate:,.0f} s of wav a core-second, {100 * scaling:.0f} % of it on each of two workers | {core_hours:.1f} core-hours: {60 * core_hours / CORES / scaling:.0f} min on {CORES} cores, if the disk gives {CORES * audio_rate * scaling * 88_200 / 1e9:.1f} GB/s |",
        f"| finding the cache complete | {1e6 * finding:.0f} us a clip | {CLIPS * finding / 60:.1f} min at the start of each command |",
        f"| fold table | {1000 * per_clip_folds:.2f} ms a clip at {LABELS} labels (16,000 clips; if it stays linear) | {CLIPS * per_clip_folds / 60:.0f} min, once, in one thread |",
    ]
    for gpu, tflops in GPU_TFLOPS.items():
        rate = tflops * 1e12 / (GMAC * 1e9 * 2 * 3)
        lines.append(
            f"| an epoch, {gpu} | {rate:,.0f} crops/s a GPU (assumed {tflops:.0f} TFLOP/s, {GMAC:.1f} GMAC a crop forward) "
            f"| {CLIPS / rate / 3600:.1f} h for one fold on its one GPU; {CLIPS / rate / GPUS / 3600:.1f} h if {GPUS} shared it |"
        )
        lines.append(
            f"| feeding {GPUS} x {gpu} | {GPUS * rate:,.0f} crops/s; two cores read {feed:,.0f} crops/s of 2.56 s from memory "
            f"| {GPUS * rate * crop_bytes / 1e9:.2f} GB/s in reads of {crop_bytes / 1000:.0f} kB |"
        )
    lines += [
        f"| out-of-fold table | {probs / 1e9:.2f} billion cells; CSV written and read back at {cells / 1e6:.1f} million cells/s | {probs / cells / 60:.0f} min, {10 * probs / 1e9:.0f} GB of text, {4 * probs / 1e9:.1f} GB as float32 |",
        f"| memory of a training process | {1024 * per_clip_mib:.0f} KiB a clip at {LABELS} labels (4,000 to 16,000 clips) | {CLIPS * per_clip_mib / 1024:.0f} GB a fold |",
        f"| lwlrap | {value['lwlrap'] * 80 / 1e6:.0f} million cells/s | {probs / (value['lwlrap'] * 80):.0f} s |",
        "",
        *BREAKS.splitlines(),
    ]
    return "\n".join(lines) + "\n"


BREAKS = """\
TODO"""


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

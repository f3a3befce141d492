"""Memory and time of caching, training and scoring as clips, labels and lengths grow."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import soundfile

from tests.bench.caching import MELFOLD
from tests.bench.harness import RESULTS, Result
from tests.bench.workspace import Workspace, synthesise, write_competition

INTERVAL = 0.02


def memory(work: Workspace) -> list[Result]:
    """Peak USS, children included, of `melfold cache` and of `melfold train` at 200 and at 2,000 clips.

    USS is what would be freed if the processes ended: pages shared with others do not count. Training takes the same
    number of steps at both sizes; its model is small so that growth would show.
    """
    small, large = work.pick(200, 24), work.pick(2000, 48)
    wavs = synthesise(work.folder / "memory_wavs", 20, 0.4, 1.0, sr=16_000)
    peaks: dict[str, list[float]] = {"cache": [], "train": []}
    for clips in (small, large):
        data = work.folder / f"memory{clips}"
        write_competition(data, wavs, clips, 10)
        for stage, command in _commands(data, clips, work.folder / f"memory_home{clips}", work.pick(40, 2)).items():
            peaks[stage].append(peak_uss(command, work.folder / "memory.log") / 2**20)
    against = f"{small:,} clips"
    notes = {"clips": large}
    return [
        Result(f"memory {stage}", against, there, here, "MiB", there / here, "x", 1.2, 1.1, False, notes)
        for stage, (here, there) in peaks.items()
    ]


def hour(work: Workspace) -> list[Result]:
    """Peak memory of making the log-mel of an hour, against that of a minute, and how long it takes."""
    paths = {}
    for minutes in (1, work.pick(60, 2)):
        paths[minutes] = work.folder / f"{minutes}min.wav"
        minute = np.random.default_rng(0).integers(-3000, 3000, 60 * work.front.sr, dtype=np.int16)
        with soundfile.SoundFile(paths[minutes], "w", work.front.sr, 1, "PCM_16") as file:
            for _ in range(minutes):
                file.write(minute)
    peaks, seconds = [], 0.0
    for path in paths.values():
        script = (
            "import resource, sys, time; from pathlib import Path; from melfold.recipes import load_recipe\n"
            "from melfold.data.arrays import make_clip; from melfold.data.logmel import LogMel\n"
            "log_mel, path = LogMel(load_recipe('imagenet').logmel), Path(sys.argv[1]); begin = time.perf_counter()\n"
            "assert make_clip(path.parent, path.name, path, log_mel).seconds >= 60\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter() - begin)\n"
        )
        out = subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True).stdout
        peak, seconds = map(float, out.split())
        peaks.append(peak)
    here, there = peaks
    notes = {"seconds_for_the_long_one": round(seconds, 1)}
    return [Result("hour", "a clip of a minute", there, here, "MiB", there / here, "x", 1.1, 1.05, False, notes)]


SIZES = (1_000, 4_000, 16_000)
VOCABULARIES = (80, 527)


def growth(work: Workspace) -> list[Result]:
    """Seconds and peak USS of each stage against the number of short clips and of labels, drawn to `growth.png`.

    Training takes the same number of steps everywhere, then predicts the held-out third: only that part may grow.
    """
    sizes = SIZES if not work.quick else (20, 40, 80)
    wavs = synthesise(work.folder / "growth_wavs", 20, 0.3, 0.5, sr=16_000)
    measured: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for clips in sizes:
        for labels in VOCABULARIES if not work.quick else (10, 20):
            data, home = work.folder / f"growth{clips}x{labels}", work.folder / f"growth_home{clips}x{labels}"
            write_competition(data, wavs, clips, 10, labels)
            for stage, command in _stages(data, clips, home, work.pick(20, 2)).items():
                times, peaks = [], []
                for number in range(work.pick(2, 1)):  # the quicker of two: what disturbs only ever adds
                    begin = time.perf_counter()
                    peaks.append(peak_uss([*command, "--home", f"{home}-{number}"], work.folder / "growth.log", interval=0.1))
                    times.append(time.perf_counter() - begin)
                measured.setdefault((stage, labels), []).append((min(times), max(peaks) / 2**20))
    draw_growth(RESULTS / "growth.png" if not work.quick else work.folder / "growth.png", sizes, measured)
    results = []
    for (stage, labels), points in measured.items():
        (t1, _), (t4, m4), (t16, m16) = points
        # 1 where the second stretch, four times as long as the first, takes four times as long.
        linear = (t16 - t4) / (sizes[2] - sizes[1]) / max((t4 - t1) / (sizes[1] - sizes[0]), 1e-4)
        name, notes = f"growth {stage}, {labels} labels", {"seconds": [round(t, 1) for t, _ in points]}
        notes["MiB"] = [round(m) for _, m in points]
        results.append(Result(name, "time, linear is 1", t16, t4, "s", linear, "x", 1.6, 1.25, False, notes))
        results.append(Result(name, "memory at a quarter", m16, m4, "MiB", m16 / m4, "x", 2.0, 1.1, False))
    return results


def _stages(data: Path, clips: int, home: Path, steps: int) -> dict[str, list[str]]:
    commands = _commands(data, clips, home, steps)
    common = [str(data), "--recipe", "demo", "--home", str(home)]
    return {"cache": commands["cache"], "folds": [*MELFOLD, "folds", *common], "train": commands["train"]}


def draw_growth(path: Path, sizes: Sequence[int], measured: dict[tuple[str, int], list[tuple[float, float]]]) -> None:
    """Time above, memory below, a column a stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = list(dict.fromkeys(stage for stage, _ in measured))
    figure, axes = plt.subplots(2, len(stages), figsize=(10, 5.5), sharex=True, layout="constrained")
    for (stage, labels), points in measured.items():
        for row, unit in enumerate(("seconds", "MiB at the peak")):
            ax = axes[row, stages.index(stage)]
            ax.plot(sizes, [point[row] for point in points], marker="o", label=f"{labels} labels")
            ax.grid(alpha=0.3)
            ax.set_title(f"melfold {stage}" if row == 0 else "")
            ax.set_xlabel("clips" if row else "")
            ax.set_ylabel(unit if stages[0] == stage else "")
    for ax in axes.flat:
        ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    axes[0, 0].legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _commands(data: Path, clips: int, home: Path, steps: int) -> dict[str, list[str]]:
    common = [str(data), "--recipe", "demo", "--home", str(home), "--jobs", "2"]
    # Two of three folds are trained on, 16 clips a step.
    sets = [f"train.epochs={steps * 16 / (clips * 2 / 3)}", "train.validate_every=0"]
    train = [*common, "--folds", "0", "--run", "memory", "--device", "cpu"]
    return {
        "cache": [*MELFOLD, "cache", *common],
        "train": [*MELFOLD, "train", *train, *(part for value in sets for part in ("--set", value))],
    }


def peak_uss(command: list[str], log: Path, interval: float = INTERVAL) -> int:
    """The largest USS in bytes, of a command's process and its children together, looked at every 20 ms."""
    peak = 0
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _uss(root))
            time.sleep(interval)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()}")
    return peak


def _uss(root: psutil.Process) -> int:
    total = 0
    try:
        for process in [root, *root.children(recursive=True)]:
            total += _uss_of(process)
    except psutil.NoSuchProcess:
        pass  # the command just ended
    return total


def _uss_of(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().uss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # ended between listing and looking

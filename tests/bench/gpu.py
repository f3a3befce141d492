"""What only a GPU can show, in a few minutes: `make gpu`, or `python -m tests.bench.gpu`.

Placement, kill and resume, the same seed twice, two devices if there are two, training and prediction against a bare step, peak
memory beside its estimate, and one fold of the demo. Leaves a JSON for each card in `tests/bench/results`, and the table of all
cards in `tests/bench/README.md`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melfold.data.demo import write_demo
from melfold.files import Home
from melfold.learn.devices import Device, pick_device, repeatable
from melfold.learn.provenance import current_commit, versions
from melfold.learn.runs import FoldFolder, open_run
from melfold.learn.state import TrainState
from melfold.learn.train import train_step
from melfold.recipes import load_recipe
from tests.bench import learning
from tests.bench.footprint import fake_batch, footprint, trained_model
from tests.bench.harness import RESULTS
from tests.bench.workspace import Workspace

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- cards -->", "<!-- end of cards -->"
EXACT = ("train.benchmark=false", "train.validate_every=0", "train.checkpoint_minutes=0")
SHORT = ("train.epochs=12", *EXACT)
QUICK = ("train.epochs=1", "model.kwargs={depths=[1, 1, 1, 1], dims=[8, 16, 16, 16]}")
"""On the CPU: do the parts run at all?"""
EVERYTHING = (
    "train.clips=both",
    "noisy.bootstrap=0.2",
    "augment.concat_prob=0.5",
    "augment.resize_prob=0.5",
    "augment.gain_db=3",
    "train.micro_batch=6",
)


@dataclass(frozen=True)
class Row:
    """One thing that was tried. `shown`: what to read in the table."""

    name: str
    ok: bool
    shown: str
    notes: dict[str, Any] = field(default_factory=dict)


class Trial:
    """The device under trial, and the demo's competition in a temporary folder."""

    def __init__(self, folder: Path, name: str, *, quick: bool) -> None:
        self.name, self.quick, self.device = name, quick, pick_device(name)
        self.data = write_demo(folder / "demo")
        self.home = Home(folder / "home")

    def start(self, run: str, *sets: str, device: str = "", folds: str = "0") -> subprocess.Popen[bytes]:
        """Train in a process of its own."""
        sets = (*sets, *(QUICK if self.quick else ()))
        words = ["train", str(self.data), "--recipe", "demo", "--run", run, "--folds", folds, "--home", str(self.home.root)]
        words += ["--device", device or self.name, "--jobs", "1", *(word for item in sets for word in ("--set", item))]
        return subprocess.Popen([sys.executable, "-m", "melfold", *words])

    def train(self, run: str, *sets: str, device: str = "", folds: str = "0") -> FoldFolder:
        """Train to the end. Returns: the folder of the first fold."""
        if code := self.start(run, *sets, device=device, folds=folds).wait():
            raise RuntimeError(f"melfold train ended with {code}")
        return open_run(self.home, run).fold(0)


def placement(trial: Trial) -> Row:
    """Two training steps with everything a recipe can ask for, on the real device."""
    recipe = load_recipe("demo", EVERYTHING)
    batch, targets = fake_batch(recipe, recipe.train.batch_size, 8)
    with repeatable(0, trial.device):
        state = TrainState(trained_model(recipe, 8), recipe.train, trial.device)
        for step in range(2):
            loss, _ = train_step(state, batch, targets, recipe, np.random.default_rng(step))
    kinds = {value.device.type for value in state.averaged.state_dict().values()} | {loss.device.type}
    return Row("placement", kinds == {trial.device.torch.type} and bool(torch.isfinite(loss)), ", ".join(sorted(kinds)))


def same_seed(trial: Trial) -> Row:
    """Two trainings with one seed leave the same bytes."""
    first, second = (trial.train(name, *SHORT).weights.read_bytes() for name in ("first", "second"))
    return Row("same seed twice", first == second, "same bytes" if first == second else "other bytes")


def kill_and_resume(trial: Trial) -> Row:
    """A training that was killed and resumed leaves the bytes of one that was not."""
    folder = open_run(trial.home, "first").fold(0)
    killed = FoldFolder(trial.home.runs / "killed" / "fold0", "0")
    process = trial.start("killed", *SHORT)
    while process.poll() is None and not killed.checkpoint.exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    was_killed = killed.checkpoint.exists() and not killed.done
    same = trial.train("killed", *SHORT).weights.read_bytes() == folder.weights.read_bytes()
    return Row("kill and resume", was_killed and same, "same bytes" if same else "other bytes", {"killed": was_killed})


def two_devices(trial: Trial) -> Row:
    """Two folds on two devices leave the weights of one device."""
    cuda = trial.device.torch.type == "cuda"
    if cuda and torch.cuda.device_count() < 2:
        return Row("two devices", True, "one device only")
    trial.train("one", *SHORT, folds="0,1")
    trial.train("two", *SHORT, folds="0,1", device="cuda:0,cuda:1" if cuda else "cpu,cpu")
    weights = [[open_run(trial.home, run).fold(n).weights.read_bytes() for n in (0, 1)] for run in ("one", "two")]
    return Row("two devices", weights[0] == weights[1], "same bytes" if weights[0] == weights[1] else "other bytes")


def speed(*, quick: bool) -> list[Row]:
    """Training and prediction against a bare step and a bare forward pass."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="melfold-gpu-") as folder:
        work = Workspace(Path(folder), quick=quick)
        for result in [*learning.train(work), *learning.predict(work)]:
            shown = f"{result.ours:.0f} {result.unit}, {result.value:.2f} of a {result.against}"
            rows.append(Row(result.name, quick or result.ok, shown, asdict(result)))
    return rows


def memory(trial: Trial, names: list[str]) -> list[Row]:
    """Peak memory of a training step of each recipe, beside the estimate made without a GPU."""
    return [_memory(trial.device, name) for name in names]


def _memory(device: Device, name: str) -> Row:
    recipe = load_recipe(name)
    batch, targets = fake_batch(recipe, recipe.train.batch_size, 80)
    device.reset_peak_memory()
    with repeatable(0, device, benchmark=recipe.train.benchmark):
        state = TrainState(trained_model(recipe, 80), recipe.train, device)
        for step in range(3):
            train_step(state, batch, targets, recipe, np.random.default_rng(step))
        device.wait()
    peak, told = device.peak_memory(), footprint(recipe, amp=device.amp)
    ok = device.torch.type == "cpu" or peak <= told.needed
    shown = f"{peak / 2**30:.2f} GiB, {told.peak / 2**30:.2f} of tensors and {told.needed / 2**30:.2f} of a card expected"
    return Row(f"memory {name}", ok, shown, {"peak": peak, "tensors": told.peak, "card": told.needed})


def demo(trial: Trial) -> Row:
    """One fold of the demo."""
    result = json.loads(trial.train("demo").result.read_text())
    shown = f"lwlrap {result['lwlrap']:.3f} in {result['seconds']:.0f} s"
    return Row("one fold of the demo", result["lwlrap"] > (0 if trial.quick else 0.5), shown, {"result": result})


def run(name: str, *, quick: bool) -> list[Row]:
    """Everything, one after the other; what fails is a row that says why."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="melfold-gpu-") as folder:
        trial = Trial(Path(folder), name, quick=quick)
        names = ["demo"] if quick else ["demo", "small", "scratch", "open", "article"]
        parts: list[tuple[str, Callable[[], Row | list[Row]]]] = [
            ("placement", lambda: placement(trial)),
            ("same seed twice", lambda: same_seed(trial)),
            ("kill and resume", lambda: kill_and_resume(trial)),
            ("two devices", lambda: two_devices(trial)),
            ("speed", lambda: speed(quick=quick)),
            ("memory", lambda: memory(trial, names)),
            ("one fold of the demo", lambda: demo(trial)),
        ]
        for title, part in parts:
            try:
                found = part()
            except Exception as error:  # one fault must not hide what the rest would show
                found = Row(title, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200])
            for row in found if isinstance(found, list) else [found]:
                print(f"{'ok    ' if row.ok else 'FAILED'} {row.name}: {row.shown}", flush=True)
                rows.append(row)
    return rows


def write_card(path: Path, device: Device, rows: list[Row]) -> None:
    """One card's results as JSON."""
    card = {"card": card_name(device), "precision": device.precision, "commit": current_commit(), **versions()}
    path.write_text(json.dumps({"card": card, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def card_name(device: Device) -> str:
    """The GPU's model, or `cpu`."""
    return torch.cuda.get_device_name(device.torch) if device.torch.type == "cuda" else "cpu"


def table(folder: Path) -> str:
    """The results of all cards, as Markdown."""
    cards = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))]
    if not cards:
        return "No card has been tried yet: this was written on a machine without a GPU.\n"
    lines = ["| card | what | | result |", "| --- | --- | --- | --- |"]
    for card in cards:
        name = f"{card['card']['card']}, {card['card']['precision']}"
        lines += [f"| {name} | {r['name']} | {'ok' if r['ok'] else '**failed**'} | {r['shown']} |" for r in card["rows"]]
    return "\n".join(lines) + "\n"


def write_readme(path: Path = README, folder: Path = RESULTS) -> None:
    """Put the table of all cards into the README, between its marks."""
    text = path.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{table(folder)}{END}{after}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser("python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: do the parts run at all?
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    quick = args.device == "cpu"
    if not quick and not torch.cuda.is_available():
        built = (
            f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch has no CUDA"
        )
        print(f"make gpu needs a GPU, and PyTorch finds none here ({built}).", file=sys.stderr)
        return 2
    rows, device = run(args.device, quick=quick), pick_device(args.device)
    slug = re.sub(r"[^a-z0-9]+", "-", card_name(device).lower()).strip("-")
    if args.out or not quick:
        write_card(args.out or RESULTS / f"gpu-{slug}.json", device, rows)
    if not quick:
        write_readme()
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

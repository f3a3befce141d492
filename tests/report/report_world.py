"""Competitions and finished runs for reports: made on the spot, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from melfold import stages
from melfold.data.competition import Competition, load_competition
from melfold.files import Home, digest, sha256_file, write_text
from melfold.learn.predictions import own_prediction, write_current
from melfold.learn.runs import Run
from melfold.learn.start import start_run
from melfold.probs import make_probs
from melfold.recipes import load_recipe

SR = 16_000
LABELS = ("Bark", "Church_bell", "Hiss_(air)", "Male_speech", "Rain", "Zipper_(clothing)")
HOSTILE_LABELS = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    '"><svg onload="window.hacked = 3">',
    "{{ 7 * 7 }}${7 * 7}",
    "'; DROP TABLE labels; --",
    "A_label_that_never_ends_" * 4,
)


def made_competition(
    root: Path, labels: Sequence[str] = LABELS, *, clips: int = 48, seconds: float = 1.0, names: Sequence[str] = ()
) -> Competition:
    """A valid download in Kaggle's layout; every fourth clip has two labels. `names` are the first clips' names."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(clips):
        fname = names[number] if number < len(names) else f"{number:08x}.wav"
        own = [labels[number % len(labels)]]
        if number % 4 == 3:
            own.append(labels[(number + 1) % len(labels)])
        rows.append((fname, own))
    for folder, part in (("train_curated", rows), ("test", [("test0000.wav", [])])):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for fname, _ in part:
            length = int(SR * seconds * (0.5 + rng.random()))
            soundfile.write(root / folder / fname, 0.1 * rng.standard_normal(length), SR, subtype="PCM_16")

    def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
        quote = '"'
        return "".join(",".join(f'"{str(c).replace(quote, quote * 2)}"' for c in line) + "\n" for line in (header, *lines))

    write_text(root / "train_curated.csv", table(["fname", "labels"], [(f, ",".join(own)) for f, own in rows]))
    write_text(root / "sample_submission.csv", table(["fname", *labels], [("test0000.wav", *["0"] * len(labels))]))
    return load_competition(root)


def made_run(home: Home, name: str, competition: Competition, *sets: str, skill: float = 4.0, seed: int = 0) -> Run:
    """A run whose folds are all done: its probabilities are drawn, the true labels' higher by `skill` logits."""
    recipe = load_recipe("demo", ["predict.overlap=0.5", *sets])
    table, _ = stages.folds(competition, home, recipe)
    run = start_run(home, name, recipe, competition, table)
    rng = np.random.default_rng(seed)
    own = own_prediction(run)
    for fold in range(recipe.folds.n_folds):
        folder, fnames = run.fold(fold), run.held_out(fold)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.weights.write_bytes(rng.bytes(64))
        targets = run.targets(fnames).to_numpy()
        logits = rng.normal(-3, 1.5, targets.shape) + skill * targets
        probs = make_probs(1 / (1 + np.exp(-logits)), fnames, run.info.labels)
        write_current(own.fold_oof(fold), probs, own.inputs(fold, digest(fnames), sha256_file(folder.weights)))
        folder.log.write_text("".join(json.dumps(row) + "\n" for row in _log(rng)))
        facts = {"steps": 400, "seconds": 120.5, "device": "cpu, fp32", "versions": {"melfold": "0.1.0", "torch": "2.14.1"}}
        folder.artefact.commit({"fold": str(fold), **folder.made_from}, lwlrap=0.8, **facts)
    return run


def _log(rng: np.random.Generator) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(20, 401, 20):
        loss = 0.1 + 0.6 * np.exp(-step / 120) + rng.normal(0, 0.01)
        rows.append({"step": step, "epoch": step / 40, "seconds": step * 0.3, "loss": loss, "lr": 1e-3 * (1 - step / 401)})
        if step % 80 == 0:
            rows.append({"step": step, "epoch": step / 40, "seconds": step * 0.3, "lwlrap": 0.9 - 0.5 * np.exp(-step / 120)})
    return rows


@dataclass(frozen=True)
class Pages:
    """A home with two runs and a ledger, and its pages."""

    home: Home
    competition: Competition
    runs: tuple[Run, Run]
    run: Path
    two: Path
    review: Path
    index: Path

    @property
    def all(self) -> tuple[Path, ...]:
        return self.run, self.two, self.review, self.index

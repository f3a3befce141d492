"""What each method brings on real recordings: one recipe, a change a row, the same folds, clips and number of crops.

    python -m tests.bench.ablation esc10 --groups esc10/groups.csv --home build/ablation

Every row is a run of its own: a stopped command continues, and a finished row is not trained again.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from melfold import stages
from melfold.combine.ensemble import compare
from melfold.combine.oof import score
from melfold.compute import Compute
from melfold.config import Recipe
from melfold.data.competition import Competition, load_competition
from melfold.files import Home, read_json, write_text
from melfold.learn.predictions import own_prediction, start_prediction
from melfold.learn.runs import Run
from melfold.recipes import load_recipe

COMMON = (
    "logmel.n_mels=64",
    "logmel.hop_length=1323",
    "train.epochs=20",
    "train.batch_size=16",
    "train.crop_seconds=4",
    "train.lr=2e-3",
    "train.warmup_epochs=1",
    "train.ema_decay=0.99",
    "train.validate_every=0",
    "augment.mixup_prob=0.5",
    "augment.freq_masks=1",
    "augment.time_masks=1",
    "phases=[]",
    "train.clips=curated",
)
"""On the recipe `small`: its settings for the whole competition, cut down to 200 clips and two cores."""

BOTH = ("train.clips=both", "train.curated_times=3", "train.warmup_epochs=0.5", "train.epochs=4.29")
END = 'phases=[{}, {clips = "curated", epochs = 5, lr = 2e-4}]'
"""Curated clips alone, at a tenth of the rate, for a quarter of the crops."""
STUDENT = (*BOTH, END, "noisy.own_head=false", "noisy.top=0", "noisy.per_label=0", "noisy.pseudo=0.5", "noisy.missing=0.02")
"""All noisy clips, half of each target the teachers' probabilities; and the 2 % likeliest missing curated labels."""


@dataclass(frozen=True)
class Row:
    """A method: its name, and what it changes."""

    name: str
    what: str
    sets: tuple[str, ...]


# A fold has 160 curated and 80 noisy clips: 3,200 crops in every row.
ROWS = (
    Row("baseline", "BCE, power mixup .5, SpecAugment 1 + 1, curated clips", ()),
    Row("seed1", "another seed, nothing else", ("seed=1",)),
    Row("student1", "student of the baseline", (*STUDENT, "noisy.teachers=baseline")),
    Row("student1-power2", "the same, probabilities squared", (*STUDENT, "noisy.teachers=baseline", "noisy.power=2")),
    Row("student-of-2", "student of the first two rows together", (*STUDENT, 'noisy.teachers=["baseline","seed1"]')),
    Row("student2", "second round: student of the baseline's student", (*STUDENT, "noisy.teachers=student1")),
    Row(
        "student2-of-2",
        "second round: student of both students together",
        (*STUDENT, 'noisy.teachers=["student1","student-of-2"]'),
    ),
    Row("noisy-joint", "noisy clips with an own head and normalisation, then curated alone at a tenth of the rate", (*BOTH, END)),
    Row(
        "noisy-first",
        "noisy clips alone for a quarter of the crops, then curated ones at the full rate",
        ('phases=[{clips = "noisy", epochs = 10}, {epochs = 15}]',),
    ),
    Row(
        "phases",
        "the last 2 epochs without augmentation, at a tenth of the rate",
        ("train.epochs=18", "phases=[{}, {epochs = 2, lr = 2e-4, augment = false}]"),
    ),
    Row("no-mixup", "without mixup", ("augment.mixup_prob=0",)),
    Row("lsep", "LSEP instead of BCE", ("train.loss=lsep",)),
)

VIEWS = {
    "windows of the crop's length, half overlap": (),
    "no overlap": ("predict.overlap=0",),
    "3/4 overlap": ("predict.overlap=0.75",),
    "3 shifts": ("predict.shift_seconds=[0, 0.25, -0.25]",),
    "silence instead of wrapping": ("predict.pads=floor",),
    "both paddings": ('predict.pads=["wrap", "floor"]',),
    "half-length windows": ("predict.window_seconds=2",),
    "windows of 2 and 4 s": ("predict.window_seconds=[4, 2]",),
    "windows of 2, 4 and 8 s": ("predict.window_seconds=[4, 2, 8]",),
    "windows of 4 and 8 s": ("predict.window_seconds=[4, 8]",),
}


def recipe_of(row: Row, groups: str) -> Recipe:
    """The recipe of a row, on folds that keep these groups together."""
    return load_recipe("small", [*COMMON, f"folds.groups={groups}", *row.sets])


def train_rows(competition: Competition, home: Home, groups: str) -> list[Run]:
    """Train what is not trained yet, in the order of `ROWS`: teachers come before their students."""
    runs = []
    for row in ROWS:
        recipe = recipe_of(row, groups)
        runs.append(stages.train(competition, home, recipe, row.name, range(recipe.folds.n_folds), Compute()))
        scores = score(own_prediction(runs[-1]))
        logging.info("%s: OOF %.4f, %.0f s", row.name, scores.oof_lwlrap, sum(_seconds(runs[-1])))
        write_text(home.root / "ablation.md", table_of(runs))
    return runs


def _seconds(run: Run) -> list[float]:
    return [read_json(run.fold(k).result)["seconds"] for k in range(run.recipe.folds.n_folds)]


def table_of(runs: list[Run]) -> str:
    """Rows in Markdown: OOF, difference from the baseline with its paired interval, and a verdict."""
    found = compare([own_prediction(run) for run in runs])
    what = {row.name: row.what for row in ROWS}
    lines = ["| method | OOF lwlrap | difference (95 %) | |", "| --- | --- | --- | --- |"]
    for name, row in found.runs.iterrows():
        if name == runs[0].name:
            lines.append(f"| {what[name]} | {row['oof_lwlrap']:.3f} ({row['low']:.3f} to {row['high']:.3f}) | | |")
            continue
        verdict = "better" if row["d_low"] > 0 else "worse" if row["d_high"] < 0 else "undecided"
        difference = f"{row['difference']:+.3f} ({row['d_low']:+.3f} to {row['d_high']:+.3f})"
        lines.append(f"| {what[name]} | {row['oof_lwlrap']:.3f} | {difference} | {verdict} |")
    return "\n".join(lines) + "\n"


def views_table(run: Run, competition: Competition, home: Home) -> str:
    """What test-time augmentation brings: the same weights, other windows; cost in seconds, relative to the first row."""
    predictions, seconds = [], []
    for number, sets in enumerate(VIEWS.values()):
        config = load_recipe("small", [*COMMON, *sets]).predict
        prediction = start_prediction(run, f"views{number}", config)
        started = time.monotonic()
        predictions.append(stages.predict(prediction, competition, home, Compute()))
        seconds.append(time.monotonic() - started)
    lines = ["| windows | OOF lwlrap | difference (95 %) | cost |", "| --- | --- | --- | --- |"]
    rows = zip(VIEWS, compare(predictions).runs.iterrows(), seconds, strict=True)
    for number, (what, (_, row), spent) in enumerate(rows):
        difference = f"{row['difference']:+.4f} ({row['d_low']:+.4f} to {row['d_high']:+.4f})" if number else ""
        lines.append(f"| {what} | {row['oof_lwlrap']:.4f} | {difference} | {spent / seconds[0]:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="an unpacked download; the settings are for about 200 clips")
    parser.add_argument("--home", type=Path, default=Path("build/ablation"))
    parser.add_argument("--groups", default="auto", help="folds.groups: a table of clips that must share a fold")
    given = parser.parse_args()
    home, competition = Home(given.home.resolve()), load_competition(given.data)
    runs = train_rows(competition, home, given.groups)
    text = f"{table_of(runs)}\n{views_table(runs[0], competition, home)}"
    write_text(home.root / "ablation.md", text)
    print(text)


if __name__ == "__main__":
    main()

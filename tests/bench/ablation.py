"""What each method brings on real recordings: one recipe, a change a row, the same folds, clips and number of crops.

    python -m tests.bench.ablation esc10 --home build/ablation

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
from melfold.files import Home, read_json, write_json, write_text
from melfold.learn.predictions import own_prediction, start_prediction
from melfold.learn.runs import Run
from melfold.recipes import load_recipe

COMMON = (
    "logmel.n_mels=64",
    "logmel.hop_length=1323",
    "train.epochs=60",
    "train.batch_size=16",
    "train.crop_seconds=4",
    "train.lr=2e-3",
    "train.warmup_epochs=3",
    "train.ema_decay=0.99",
    "train.validate_every=0",
    "augment.mixup_prob=0.5",
    "augment.freq_masks=1",
    "augment.time_masks=1",
    "phases=[]",
    "train.clips=curated",
)
"""On the recipe `small`: its settings for the whole competition, cut down to 200 clips and two cores."""

NOISY = ("train.clips=both", "train.warmup_epochs=1")
ALONE = 'phases=[{}, {clips = "curated", epochs = 15, lr = 2e-4}]'


PLAIN_END = "phases=[{}, {epochs = 6, lr = 2e-4, augment = false}]"


@dataclass(frozen=True)
class Row:
    """A method: its name, and what it changes."""

    name: str
    what: str
    sets: tuple[str, ...]


# A fold has 160 curated and 80 noisy clips: 9,600 crops in every row.
ROWS = (
    Row("baseline", "BCE, power mixup .5, SpecAugment 1 + 1", ()),
    Row("seed1", "another seed, nothing else", ("seed=1",)),
    Row("phases", "the last 6 epochs without augmentation, at a tenth of the rate", ("train.epochs=54", PLAIN_END)),
    Row("no-mixup", "without mixup", ("augment.mixup_prob=0",)),
    Row("concat", "sigmoid joining in time, .3", ("augment.concat_prob=0.3",)),
    Row("resize", "stretched windows, .33", ("augment.resize_prob=0.33",)),
    Row("lsep", "LSEP instead of BCE", ("train.loss=lsep",)),
    Row("lsep-bce", "LSEP + BCE", ("train.loss=lsep_bce",)),
    Row(
        "noisy-joint",
        "noisy clips too: curated drawn 3 times as often, own head and normalisation",
        (*NOISY, "train.curated_times=3", "train.epochs=12.86", ALONE),
    ),
    Row(
        "noisy-first",
        "noisy clips alone for a quarter of the crops, then curated ones",
        ("train.warmup_epochs=1", 'phases=[{clips = "noisy", epochs = 30}, {epochs = 45}]'),
    ),
    Row(
        "noisy-teacher",
        "the 40 noisy clips that the baseline agrees with most, half its probabilities as targets",
        (
            *NOISY,
            "train.curated_times=3",
            "noisy.teachers=baseline",
            "noisy.top=40",
            "noisy.per_label=0",
            "noisy.pseudo=0.5",
            "noisy.own_head=false",
            "train.epochs=13.85",
            ALONE,
        ),
    ),
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


def recipe_of(row: Row) -> Recipe:
    """The recipe of a row."""
    return load_recipe("small", [*COMMON, *row.sets])


def train_rows(competition: Competition, home: Home, part: tuple[int, int]) -> list[Run]:
    """Train what is not trained yet. Returns: the runs of all rows that are whole."""
    runs = []
    for number, row in enumerate(ROWS):
        recipe = recipe_of(row)
        if not number or number % part[1] == part[0]:
            runs.append(stages.train(competition, home, recipe, row.name, range(recipe.folds.n_folds), Compute()))
            scores = score(own_prediction(runs[-1]))
            seconds = sum(_seconds(runs[-1]))
            logging.info("%s: OOF %.4f, %.0f s", row.name, scores.oof_lwlrap, seconds)
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
    parser.add_argument("--part", default="0/1", help="i/n: every n-th row, for n processes at a time; the last call without it")
    given = parser.parse_args()
    home, competition = Home(given.home.resolve()), load_competition(given.data)
    i, n = (int(x) for x in given.part.split("/"))
    runs = train_rows(competition, home, (i, n))
    if n == 1:
        text = f"{table_of(runs)}\n{views_table(runs[0], competition, home)}"
        write_text(home.root / "ablation.md", text)
        write_json(home.root / "ablation.json", {run.name: {"seconds": sum(_seconds(run))} for run in runs})
        print(text)


if __name__ == "__main__":
    main()

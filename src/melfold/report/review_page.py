"""The page to listen to doubtful clips and decide: keep, change labels, exclude. It ends with a `corrections.csv`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from melfold.combine.relabel import doubtful
from melfold.compute import Progress, silent
from melfold.data.competition import Competition
from melfold.files import digest
from melfold.learn.predictions import Prediction
from melfold.probs import Probs
from melfold.report.diagnosis import true_pairs
from melfold.report.media import Media
from melfold.report.pages import write_page
from melfold.report.pictures import mel_ticks

CHOICES = 9
"""Labels of a clip that have a key of their own: 1 to 9."""


def write_review_page(
    prediction: Prediction,
    path: Path,
    *,
    count: int,
    competition: Competition | None = None,
    audio: bool = True,
    progress: Progress = silent,
) -> Media:
    """Write the page to review a run's most doubtful clips.

    Args:
        count: how many clips; after the doubtful ones come those with the worst score.
        competition, audio: as in `Media`, which is returned.

    Raises:
        MelfoldError: no trained fold.
    """
    run, oof = prediction.run, prediction.read_oof()
    targets = run.targets(oof.index)
    media = Media(run, competition, audio)
    clips = list(review_clips(prediction, targets, oof, media, count))
    media.make(progress)
    data = {
        "run": run.name,
        "prediction": prediction.label,
        "key": digest([prediction.label, run.info.clips_sha256, [clip["fname"] for clip in clips]])[:16],
        "labels": run.info.labels,
        "clips": clips,
        "track": run.info.track,
        "corrections": [[fname, list(c.labels), c.why, c.track] for fname, c in sorted(run.recipe.data.corrections.items())],
        "data": run.info.data_folder,
    }
    write_page(
        path,
        "review.html",
        script="page.js review.js",
        data=data,
        media=media,
        doubts=sum(clip["doubt"] is not None for clip in clips),
        competition=run.info.competition,
        ticks=mel_ticks(run.recipe.logmel),
    )
    return media


def review_clips(prediction: Prediction, targets: pd.DataFrame, oof: Probs, media: Media, count: int) -> Iterator[dict[str, Any]]:
    """The most doubtful clips, then those with the worst score; what the page's script needs of each.

    Labels are what the run learned from: the table's, or the corrections of its recipe.
    """
    doubts = doubtful(targets, oof)
    worst = true_pairs(targets, oof).groupby("fname")["precision"].mean().sort_values(kind="stable")
    fnames = list(dict.fromkeys([*doubts.index, *worst.index]))[:count]
    learned = prediction.run.train_targets(fnames)
    for fname in fnames:
        labels = [label for label, own in learned.loc[fname].items() if own]
        doubted = fname in doubts.index
        suggested = list(doubts.at[fname, "suggested"]) if doubted else labels
        probs = oof.loc[fname].sort_values(ascending=False, kind="stable")
        choices = list(dict.fromkeys([*labels, *suggested, *probs.index]))[: max(CHOICES, len(labels))]
        yield media.card(fname, targets, []) | {
            "labels": labels,
            "suggested": suggested,
            "choices": [[label, round(float(probs[label]), 4)] for label in choices],
            "doubt": round(float(doubts.at[fname, "doubt"]), 1) if doubted else None,
        }

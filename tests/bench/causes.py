"""Why out-of-fold scores are above the leaderboard, cause by cause, on recordings whose sources and Public labels are known.

    python -m tests.bench.causes esc10 --weights tf_efficientnet_lite0.safetensors

The systems are logistic regressions on a frozen network: a fold takes a fraction of a second, so every figure is
the mean of six fold tables. Public is only scored; nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from melfold.compute import Compute
from melfold.data.cache import build_cache
from melfold.data.clips import ClipStore
from melfold.data.competition import Competition, load_competition, multi_hot
from melfold.data.folds import make_folds
from melfold.facts import split_labels
from melfold.files import Home
from melfold.learn.model import build_model
from melfold.metrics import pair_precisions
from melfold.recipes import load_recipe

FOLDS, TABLES, DRAWS, RIDGE = 5, 6, 2000, 0.1
SYSTEMS = {
    "mean and spread of each mel band": ("mel",),
    "nearest clip": (),
    "second block": (1,),
    "fourth block": (3,),
    "last layer": (-1,),
    "six layers": (1, 2, 3, 4, 5, -1),
}


def read_features(data: Path, competition: Competition, weights: str) -> tuple[list[str], dict[object, np.ndarray]]:
    """The curated and test clips, and what each layer of the frozen network, and `mel`, says of them: `(clips, values)`."""
    sets = ["logmel.hop_length=1323", f"model.weights=file:{Path(weights).resolve()}"]
    recipe = load_recipe("quick_pretrained", sets)
    frames, front = recipe.crop_frames, recipe.logmel
    with tempfile.TemporaryDirectory() as folder:
        cache = build_cache(competition, front, Home(Path(folder)), splits=["curated", "test"], compute=Compute(jobs=1))
        names = [*competition.curated.index, *competition.test.index]
        model = build_model(recipe.model, len(competition.labels), front.n_mels, frames).eval()
        model.normalise.set(*ClipStore(cache, list(competition.curated.index), front.n_mels, front.top_db).statistics())
        clips = [np.load(cache / f"{Path(name).stem}.npy").astype(np.float32) for name in names]
    clips = [np.maximum(clip, clip.max() - front.top_db) for clip in clips]
    layers: dict[object, list[np.ndarray]] = {-1: [], **{k: [] for k in range(1, 6)}}

    def keep(key: int, maps: torch.Tensor) -> None:
        rows = maps.mean(2)
        layers[key].append(torch.cat([rows.mean(2), rows.amax(2)], 1).mean(0).numpy())

    for k in range(1, 6):
        model.backbone.blocks[k].register_forward_hook(lambda _, __, maps, k=k: keep(k, maps))
    with torch.inference_mode():
        for clip in clips:
            wrapped = np.pad(clip, ((0, max(0, frames - len(clip))), (0, 0)), mode="wrap")
            windows = np.stack([wrapped[:frames].T, wrapped[-frames:].T])[:, None]
            keep(-1, model.features(torch.from_numpy(windows)))
    mel = np.stack([np.r_[clip.mean(0), clip.std(0)] for clip in clips])
    return names, {"mel": mel, **{key: np.stack(rows) for key, rows in layers.items()}}


@dataclass(frozen=True)
class System:
    """A way to tell labels from a clip's likeness to the training clips."""

    likeness: np.ndarray
    """`(clips, clips)`, the curated ones first."""
    targets: np.ndarray
    nearest: bool

    def fit(self, train: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Scores `(rows, labels)` of some clips by a model of others."""
        known, asked, wanted = self.likeness[np.ix_(train, train)], self.likeness[np.ix_(rows, train)], self.targets[train]
        if self.nearest:
            return np.stack([np.where(own > 0, asked, -1).max(1) for own in wanted.T], 1)
        scores = []
        for own in wanted.T:  # kernel logistic regression, by Newton's method
            alpha, bias = np.zeros(len(train)), 0.0
            for _ in range(12):
                probs = 1 / (1 + np.exp(-(known @ alpha + bias)))
                curve = np.maximum(probs * (1 - probs), 1e-4)
                aim = known @ alpha + bias + (own - probs) / curve
                solved = np.linalg.solve(known + np.diag(RIDGE / curve), np.stack([aim, np.ones(len(aim))], 1))
                bias = solved[:, 0].sum() / solved[:, 1].sum()
                alpha = solved[:, 0] - bias * solved[:, 1]
            scores.append(asked @ alpha + bias)
        return np.stack(scores, 1)

    def fit_folds(self, fold: np.ndarray, train: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Out-of-fold scores of `train`, and every fold's scores of further clips."""
        held_out, others = np.zeros((len(train), self.targets.shape[1])), []
        for k in range(FOLDS):
            own = fold == k
            scores = self.fit(train[~own], np.r_[train[own], more])
            held_out[own] = scores[: own.sum()]
            others.append(scores[own.sum() :])
        return held_out, others


@dataclass(frozen=True)
class Truth:
    """Clips to score on. A score is an array: lwlrap first, then its values over resampled groups."""

    targets: pd.DataFrame
    draws: np.ndarray

    @classmethod
    def of(cls, targets: pd.DataFrame, groups: pd.Series | None, seed: int) -> Truth:
        """Groups of clips are drawn together."""
        codes = np.arange(len(targets)) if groups is None else pd.factorize(groups.loc[targets.index])[0]
        count = codes.max() + 1
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)
        return cls(targets, np.concatenate([np.ones((1, count)), draws])[:, codes])

    def score(self, scores: np.ndarray, several: float | None = None) -> np.ndarray:
        """Args: several: the share of labels on clips with several labels to weight the clips to."""
        table = pd.DataFrame(scores, self.targets.index, self.targets.columns)
        precision, clip, _ = pair_precisions(self.targets, table)
        sums, counts = (np.bincount(clip, w, len(table)) for w in (precision, np.ones(len(clip))))
        if several is None:
            return (self.draws @ sums) / (self.draws @ counts)
        one, more = ((self.draws @ (sums * part)) / (self.draws @ (counts * part)) for part in (counts == 1, counts > 1))
        return (1 - several) * one + several * more


def measure(
    system: System, tables: dict[str, list[np.ndarray]], curated: Truth, public: Truth, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """All scores of a system, each a mean over the tables of one kind."""
    train, truth = np.arange(len(curated.targets)), public.targets.to_numpy()
    several = float(truth[truth.sum(1) > 1].sum() / truth.sum())
    found: dict[str, list[np.ndarray]] = {}
    for kind, folds in tables.items():
        for fold in folds:
            oof, tests = system.fit_folds(fold, train, rows)
            add = {"oof": curated.score(oof), "as public": curated.score(oof, several), "five": public.score(np.mean(tests, 0))}
            add["one"] = np.mean([public.score(test) for test in tests], 0)
            for name, value in add.items():
                found.setdefault(f"{kind} {name}", []).append(value)
    scores = {name: np.mean(values, 0) for name, values in found.items()}
    return scores | {"all": public.score(system.fit(train, rows))}


def averaging(system: System, outer: np.ndarray, folds_of: dict[int, np.ndarray], curated: Truth) -> np.ndarray:
    """What five models gain over one on clips that none of them saw, without the test set: folds within each fold."""
    whole = np.zeros((FOLDS, *curated.targets.shape))
    for k in range(FOLDS):
        _, others = system.fit_folds(folds_of[k], np.flatnonzero(outer != k), np.flatnonzero(outer == k))
        whole[:, outer == k] = others
    return curated.score(whole.mean(0)) - np.mean([curated.score(one) for one in whole], 0)


def short(value: float, digits: int = 3, sign: str = "") -> str:
    """A number below 1 without its 0."""
    return f"{value:{sign}.{digits}f}".replace("0.", ".", 1)


def text(score: np.ndarray, sign: str = "") -> str:
    """A score or difference with its interval."""
    low, high = np.quantile(score[1:], [0.025, 0.975])
    return f"{short(score[0], 3, sign)} ({short(low, 3, sign)} to {short(high, 3, sign)})"


def steps(s: dict[str, np.ndarray]) -> list[np.ndarray]:
    """From the plain OOF score to Public, a cause at a time; they sum to the difference."""
    sources = s["grouped one"] - s["plain one"]
    twins = s["grouped oof"] - s["plain oof"] - sources
    labels, clips = s["grouped as public"] - s["grouped oof"], s["grouped one"] - s["grouped as public"]
    return [s["grouped five"] - s["plain oof"], twins, sources, labels, clips, s["grouped five"] - s["grouped one"]]


def systems_of(features: dict[object, np.ndarray], targets: np.ndarray) -> dict[str, System]:
    """All systems; features are scaled by the curated clips, and every layer counts alike."""
    known = {}
    for key, values in features.items():
        own = values[: len(targets)]
        scaled = (values - own.mean(0)) / (own.std(0) + 1e-6)
        known[key] = scaled @ scaled.T / scaled.shape[1]
    length = np.sqrt(np.diag(known[-1]))
    cosine = known[-1] / np.outer(length, length)
    return {
        name: System(np.mean([known[key] for key in layers], 0) if layers else cosine, targets, not layers)
        for name, layers in SYSTEMS.items()
    }


def print_table(head: str, rows: dict[str, list[str]]) -> None:
    """A table in Markdown."""
    print(f"\n| {head} |", "| --- " * (head.count("|") + 1) + "|", sep="\n")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="a download with groups.csv and the Public half of its truth")
    parser.add_argument("--weights", required=True, help="ImageNet weights of tf_efficientnet_lite0")
    given = parser.parse_args()
    competition = load_competition(given.data)
    groups = pd.read_csv(given.data / "groups.csv", dtype=str).set_index("fname")["group"]
    table = pd.read_csv(given.data / "test_post_competition.csv", dtype=str).set_index("fname")
    labels = table.loc[table["usage"] == "Public", "labels"].map(split_labels)
    curated, public = Truth.of(competition.targets(), groups, 0), Truth.of(multi_hot(labels, competition.labels), None, 1)
    names, features = read_features(given.data, competition, given.weights)
    rows = pd.Index(names).get_indexer(public.targets.index)
    train = curated.targets

    def table_of(targets: pd.DataFrame, seed: int, by: pd.Series | None) -> np.ndarray:
        return make_folds(targets, FOLDS, seed, by)["fold"].loc[targets.index].to_numpy()

    tables = {kind: [table_of(train, 42 + n, by) for n in range(TABLES)] for kind, by in (("plain", None), ("grouped", groups))}
    outer = tables["grouped"][0]
    inner = {k: table_of(train[outer != k], 42, groups) for k in range(FOLDS)}
    scores = {}
    for name, system in systems_of(features, train.to_numpy()).items():
        s = scores[name] = measure(system, tables, curated, public, rows)
        s["grouped oof + averaging"] = s["grouped oof"] + averaging(system, outer, inner, curated)
    print_all(scores)


def print_all(scores: dict[str, dict[str, np.ndarray]]) -> None:
    """All tables."""
    columns = ["plain oof", "grouped oof", "grouped oof + averaging", "grouped five"]
    head = "system | plain OOF | grouped OOF | grouped OOF + averaging | Public, mean of five"
    print_table(head, {name: [text(s[column]) for column in columns] for name, s in scores.items()})
    head = "system | Public - plain OOF | twins | fewer sources | clips with more labels | other clips | five models"
    print_table(head, {name: [text(step, "+") for step in steps(s)] for name, s in scores.items()})
    print_table(
        "system | all clips instead of four fifths", {n: [text(s["all"] - s["grouped one"], "+")] for n, s in scores.items()}
    )
    board = [s["grouped five"][0] for s in scores.values()]
    rows_of = {}
    for kind in ("plain oof", "grouped oof", "grouped oof + averaging"):
        own = [s[kind] for s in scores.values()]
        error = np.mean([abs(score[0] - value) for score, value in zip(own, board, strict=True)])
        inside = [
            np.quantile(score[1:], 0.025) <= value <= np.quantile(score[1:], 0.975)
            for score, value in zip(own, board, strict=True)
        ]
        rows_of[kind] = [short(spearmanr([score[0] for score in own], board)[0], 2), short(error), f"{sum(inside)} of {len(own)}"]
    print_table("estimate of Public | rank correlation | mean error | Public within its interval", rows_of)


if __name__ == "__main__":
    main()

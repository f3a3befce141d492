"""The files of a run: their names, and the facts that every fold of it must share."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from melfold.artefacts import differences
from melfold.config import Recipe
from melfold.data.competition import Competition, multi_hot
from melfold.data.folds import read_folds
from melfold.errors import MelfoldError
from melfold.facts import join_labels, split_labels
from melfold.files import Home, digest, read_json, sha256_file, write_json, write_text
from melfold.probs import align, read_probs
from melfold.recipes import parse_recipe

FULL = "full"
"""The name, in place of a fold's number, of a model trained on every curated clip."""


@dataclass(frozen=True)
class RunInfo:
    """What a run rests on, beside its recipe."""

    competition: str
    labels: list[str]
    folds_table: str
    folds_sha256: str
    clips_sha256: str
    logmel_fingerprint: str
    weights_sha256: str
    track: str
    data: str
    """`curated`, or `curated and noisy`."""
    licence: str
    """Of the weights it starts from; empty where it starts from none, `unknown` where nobody says."""
    noisy_sha256: str
    """Of the noisy clips and their labels, where they are used."""
    teacher: str
    """The teacher's name and its recipe's fingerprint."""
    commit: str


@dataclass(frozen=True)
class FoldFolder:
    """The files of one fold's model; `fold` is a number or `full`."""

    path: Path
    fold: str

    @property
    def weights(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def oof(self) -> Path:
        return self.path / "oof.csv"

    @property
    def test(self) -> Path:
        return self.path / "test.csv"

    @property
    def noisy(self) -> Path:
        """What this fold's model thinks of the noisy clips, once it has been a teacher."""
        return self.path / "noisy.csv"

    @property
    def lesson(self) -> Path:
        """The noisy clips that the teacher's model of this fold kept, and their targets."""
        return self.path / "lesson.csv"

    @property
    def result(self) -> Path:
        """Written last: where it stands, the fold is done."""
        return self.path / "result.json"

    @property
    def done(self) -> bool:
        return self.result.exists()


@dataclass(frozen=True)
class Run:
    """An execution of a recipe, in `runs/<name>`."""

    folder: Path
    recipe: Recipe
    info: RunInfo

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def oof(self) -> Path:
        return self.folder / "oof.csv"

    @property
    def test(self) -> Path:
        return self.folder / "test.csv"

    @property
    def scores(self) -> Path:
        return self.folder / "scores.json"

    def fold(self, fold: int | str) -> FoldFolder:
        """The folder of a fold by its number, or of `full`."""
        return FoldFolder(self.folder / (FULL if fold == FULL else f"fold{fold}"), str(fold))

    @cached_property
    def clips(self) -> pd.DataFrame:
        """`fold` and `labels` (a tuple) of the curated clips that take part, indexed by `fname`, sorted."""
        dtypes = {"fname": str, "labels": str}
        table = pd.read_csv(self.folder / "clips.csv", index_col="fname", dtype=dtypes, keep_default_na=False)
        table["labels"] = [split_labels(text) for text in table["labels"]]
        return table.loc[~table.index.isin(self.recipe.data.exclude)]

    @cached_property
    def noisy(self) -> pd.Series:
        """The labels (a tuple) of the noisy clips that take part, by `fname`, sorted; none where the recipe does not use them."""
        if not self.recipe.noisy.use:
            return pd.Series([], index=pd.Index([], name="fname", dtype=str), dtype=object)
        table = pd.read_csv(self.folder / "noisy.csv", index_col="fname", dtype=str, keep_default_na=False)["labels"]
        table = table.loc[~table.index.isin(self.recipe.data.exclude)]
        return pd.Series([split_labels(text) for text in table], index=table.index, dtype=object)

    def targets(self, fnames: Sequence[str]) -> pd.DataFrame:
        """Multi-hot `(clips, labels)` of some curated clips, to score by."""
        return multi_hot(self.clips["labels"].loc[list(fnames)], self.info.labels)

    def taught(self, fnames: Sequence[str]) -> pd.DataFrame:
        """As `targets`, to learn from: with the recipe's corrections."""
        labels = self.clips["labels"].loc[list(fnames)]
        corrections = self.recipe.data.corrections
        labels = pd.Series(
            [corrections[f].labels if f in corrections else own for f, own in labels.items()], index=labels.index, dtype=object
        )
        return multi_hot(labels, self.info.labels)

    def noisy_targets(self, fold: int | str) -> pd.DataFrame:
        """`(clips, labels)` in 0..1 of the noisy clips a fold learns from: its lesson where there is a teacher, else the table's.

        Raises:
            MelfoldError: a teacher has given no lesson yet.
        """
        if not self.recipe.noisy.teacher:
            return multi_hot(self.noisy, self.info.labels)
        path = self.fold(fold).lesson
        if not path.exists():
            raise MelfoldError(f"fold {fold} of {self.name} has no lesson", str(path), "`melfold train` asks the teacher for it")
        lesson = read_probs(path)
        return align(lesson, lesson.index, self.info.labels, str(path))

    def held_out(self, fold: int | str) -> list[str]:
        """The clips a fold is scored on; none for `full`."""
        return [] if fold == FULL else list(self.clips.index[self.clips["fold"] == int(fold)])

    def trained_on(self, fold: int | str) -> list[str]:
        """The curated clips a fold learns from."""
        return list(self.clips.index if fold == FULL else self.clips.index[self.clips["fold"] != int(fold)])

    def missing_folds(self) -> list[int]:
        """The folds that are not trained."""
        return [k for k in range(self.recipe.folds.n_folds) if not self.fold(k).done]

    def used_folds(self) -> list[str]:
        """The folds that predict: `full` only where there is no other."""
        done = self.done_folds()
        return [fold for fold in done if fold != FULL] or done

    def weights_sha256(self, folds: Sequence[str]) -> dict[str, str]:
        """The hashes of some trained folds' weights."""
        return {fold: read_json(self.fold(fold).result)["weights_sha256"] for fold in folds}

    def done_folds(self) -> list[str]:
        """The folds (and `full`) that are trained."""
        return [f for f in [*map(str, range(self.recipe.folds.n_folds)), FULL] if self.fold(f).done]


def parse_folds(text: str, recipe: Recipe) -> list[int | str]:
    """`0,1`, `all` or `full` -> folds.

    Raises:
        MelfoldError: a fold the recipe does not have.
    """
    if text == "all":
        return list(range(recipe.folds.n_folds))
    which: list[int | str] = []
    for part in text.split(","):
        if part == FULL:
            which.append(FULL)
        elif part.strip().isdigit() and int(part) < recipe.folds.n_folds:
            which.append(int(part))
        else:
            raise MelfoldError("no such fold", repr(part), f"Use 0 to {recipe.folds.n_folds - 1}, all, or {FULL}")
    return which


def default_run_name(recipe: Recipe, shipped: Recipe | None) -> str:
    """The recipe's name, with a piece of the fingerprint where `--set` changed it."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", recipe.name)
    return name if shipped and shipped.fingerprint() == recipe.fingerprint() else f"{name}-{recipe.fingerprint()[:6]}"


def start_run(home: Home, name: str, recipe: Recipe, competition: Competition, folds_path: Path) -> Run:
    """Make a run's folder, or open it to go on with the same recipe, folds and data.

    Raises:
        MelfoldError: the run stands already and rests on something else.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise MelfoldError("a run's name is letters, digits, dots, dashes", repr(name), "Use --run NAME")
    folder = home.runs / name
    check_corrections(recipe, competition)
    folds = read_folds(folds_path, competition).sort_index()
    labels = [join_labels(competition.curated.at[f, "labels"]) for f in folds.index]
    clips = folds.assign(labels=labels).to_csv(lineterminator="\n")
    clips_sha256 = hashlib.sha256(clips.encode()).hexdigest()
    teacher = find_teacher(home, recipe, clips_sha256)
    noisy = ""
    if recipe.noisy.use:
        check_noisy(competition)
        noisy = competition.noisy[["labels"]].sort_index()["labels"].map(join_labels).to_csv(lineterminator="\n")
    info = RunInfo(
        competition=competition.name,
        labels=list(competition.labels),
        folds_table=folds_path.name,
        folds_sha256=sha256_file(folds_path),
        clips_sha256=clips_sha256,
        logmel_fingerprint=recipe.logmel.fingerprint(),
        weights_sha256=weights_sha256(recipe.model.weights),
        track="open" if teacher and teacher.info.track == "open" else recipe.track,
        data="curated and noisy" if noisy or (teacher and teacher.info.noisy_sha256) else "curated",
        licence=_licences(licence_of(recipe), teacher.info.licence if teacher else ""),
        noisy_sha256=hashlib.sha256(noisy.encode()).hexdigest() if noisy else "",
        teacher=f"{teacher.name} {teacher.recipe.fingerprint()}" if teacher else "",
        commit=current_commit(),
    )
    if begun(home, name):
        run = open_run(home, name)
        changes = []
        for key, old in asdict(run.info).items():
            new = getattr(info, key)
            if key not in ("commit", "logmel_fingerprint") and new != old:
                changes.append(f"{key}: {_short(old)} -> {_short(new)}")
        refuse_changes(run, recipe, changes)
        return run
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "clips.csv", clips)
    if noisy:
        write_text(folder / "noisy.csv", noisy)
    write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
    write_json(folder / "run.json", asdict(info))  # last: it marks the folder as a run
    return Run(folder, recipe, info)


def check_noisy(competition: Competition) -> None:
    """Raises: MelfoldError: a download without noisy clips."""
    if not len(competition.noisy):
        raise MelfoldError("this download has no noisy clips", str(competition.root), "Use a recipe without noisy.use")


def check_corrections(recipe: Recipe, competition: Competition) -> None:
    """Hold a recipe's corrections against the competition.

    Raises:
        MelfoldError: with a line for each clip that is not curated and each label that there is not.
    """
    problems = []
    for fname, correction in recipe.data.corrections.items():
        if fname not in competition.curated.index:
            problems.append(MelfoldError("a correction is about no curated clip", fname, "Mend data.corrections"))
        for label in set(correction.labels) - set(competition.labels):
            problems.append(MelfoldError("a correction has an unknown label", f"{fname}: {label!r}", "Mend data.corrections"))
    if problems:
        raise MelfoldError.many(problems)


def find_teacher(home: Home, recipe: Recipe, clips_sha256: str) -> Run | None:
    """The run that judges the noisy clips for a recipe.

    Raises:
        MelfoldError: no such run, or one of other folds or labels: its models would have seen what the student is scored on.
    """
    if not recipe.noisy.teacher:
        return None
    teacher = open_run(home, recipe.noisy.teacher)
    if teacher.info.clips_sha256 != clips_sha256:
        raise MelfoldError(
            "a teacher must have the student's folds and labels", teacher.name, "Train it on the same fold table and download"
        )
    return teacher


def licence_of(recipe: Recipe) -> str:
    """The licence of the weights a recipe starts from, as it says itself or as timm knows it."""
    if recipe.model.weights == "none":
        return ""
    if recipe.model.licence:
        return recipe.model.licence
    import timm

    known = timm.get_pretrained_cfg(recipe.model.name) if recipe.model.weights == "hub" else None
    return (known and known.license) or "unknown"


def _licences(*licences: str) -> str:
    return ", ".join(sorted({part for text in licences for part in text.split(", ") if part}))


def begun(home: Home, name: str) -> bool:
    """Whether a run holds something to lose: one of which no fold was begun gives way to a mended recipe of the same name."""
    folder = home.runs / name
    return (folder / "run.json").exists() and any(folder.glob("*/[!.]*"))


def refuse_changes(run: Run, recipe: Recipe, others: Sequence[str] = ()) -> None:
    """Refuse to go on with a run under another recipe, or with other changes.

    Raises:
        MelfoldError: naming what differs.
    """
    changes = [*differences(run.recipe.training(), recipe.training()), *others]
    if changes:
        more = f"; and {len(changes) - 6} more" if len(changes) > 6 else ""
        raise MelfoldError(
            f"run {run.name} rests on something else", "; ".join(changes[:6]) + more, "Use another name: --run NAME"
        )


def open_run(home: Home, name: str | Path) -> Run:
    """Open a run by its name, or by its folder's path.

    Raises:
        MelfoldError: no such run.
    """
    folder = Path(name) if (Path(name) / "run.json").exists() else home.runs / str(name)
    if not (folder / "run.json").exists():
        known = sorted(p.parent.name for p in home.runs.glob("*/run.json"))
        mend = f"Known: {', '.join(known)}" if known else "Give the right --home, or run `melfold train` first"
        raise MelfoldError("no such run", f"{name} in {home.runs}", mend)
    recipe = parse_recipe(read_json(folder / "recipe.json"), f"{folder}/recipe.json")
    try:
        info = RunInfo(**read_json(folder / "run.json"))
    except TypeError as error:
        raise MelfoldError(f"{folder}/run.json is not of this melfold", str(error), "Train anew under another name") from None
    return Run(folder.resolve(), recipe, info)


def weights_sha256(weights: str) -> str:
    """The hash of a `file:PATH`, else an empty string.

    Raises:
        MelfoldError: no such file.
    """
    if not weights.startswith("file:"):
        return ""
    path = Path(weights.removeprefix("file:")).expanduser()
    if not path.is_file():
        raise MelfoldError("no such weights file", str(path), "Mend model.weights=file:PATH")
    return sha256_file(path)


def current_commit(but: str = "") -> str:
    """The commit of the working folder, `+` behind it where something (outside the folder `but`) is not committed.

    Empty outside a repository.
    """
    outside = ["--", ".", f":(exclude){but}"] if but else []

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", *outside) else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    """The versions that decide the numbers."""
    return {name: importlib.metadata.version(name) for name in ("melfold", "torch", "timm", "numpy")}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:8]}… ({digest(text)[:8]})"

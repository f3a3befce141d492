"""Starting a run: its name, its tables, and the refusal to mix settings or data in one run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from melfold.artefacts import differences, listed
from melfold.config import Recipe
from melfold.data.competition import Competition
from melfold.data.folds import read_folds
from melfold.errors import MelfoldError
from melfold.facts import join_labels
from melfold.files import Home, sha256_file, write_json, write_text
from melfold.learn.fetch import first_weights_sha256, hub_file, local_copy
from melfold.learn.provenance import current_commit, freesound_warning, licence_of, seen_data
from melfold.learn.runs import FULL, Run, RunInfo, open_run, run_stamp

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def parse_folds(text: str, recipe: Recipe) -> list[int | str]:
    """`0,1`, `all` or `full` -> folds. Raises: MelfoldError: a fold the recipe does not have."""
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
    """The recipe's name, with a piece of the fingerprint if `--set` changed it."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", recipe.name)
    return name if shipped and shipped.fingerprint() == recipe.fingerprint() else f"{name}-{recipe.fingerprint()[:6]}"


def check_name(name: str) -> None:
    """Refuse a name that no run can have. Raises: MelfoldError: parts of a path, or other characters."""
    if not NAME.fullmatch(name):
        raise MelfoldError("a run's name is letters, digits, dots, dashes", repr(name), "Use --run NAME")


def start_run(
    home: Home, name: str, recipe: Recipe, competition: Competition, folds_path: Path, which: Sequence[int | str] | None = None
) -> Run:
    """Make a run's folder, or open it to continue with the same training settings, folds and data.

    Args:
        which: the folds that are to be trained, if known. Once all are done, a hub's weights need not be here: they may have been
            trained elsewhere.

    Raises:
        MelfoldError: a run of this name exists and was trained with different settings or data.
    """
    check_name(name)
    folder = home.runs / name
    folds = read_folds(folds_path, competition).sort_index()
    _check_exclude(recipe, folds["fold"])
    labels = [join_labels(competition.curated.at[fname, "labels"]) for fname in folds.index]
    clips, noisy = folds.assign(labels=labels).to_csv(lineterminator="\n"), ""
    if recipe.uses_noisy:
        noisy = competition.noisy[["labels"]].sort_index()["labels"].map(join_labels).to_csv(lineterminator="\n")
    run = open_run(home, name) if (folder / "run.json").exists() else None
    run = run if run and run.has_data() else None
    known = ""
    if run and which is not None and all(run.fold(fold).done for fold in which):
        file = hub_file(recipe.model)
        known = run.info.first_weights if file and not local_copy(file, home) else ""
    info = _info(home, recipe, competition, folds_path, clips, noisy, known)
    if run:
        refuse_changes(run, recipe, info)
        if run.recipe != recipe:  # settings that change no weight take their new values
            write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
        return Run(folder, recipe, run.info)
    info = replace(info, commit=current_commit())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    write_text(folder / "clips.csv", clips)
    if noisy:
        write_text(folder / "noisy.csv", noisy)
    write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
    run_stamp(folder, bool(noisy)).commit(recipe.training() | info.made_from(), info=asdict(info))
    return Run(folder, recipe, info)


def _check_exclude(recipe: Recipe, folds: pd.Series) -> None:
    left = folds[~folds.index.isin(recipe.data.exclude)]
    if empty := sorted(set(folds) - set(left)):
        found = f"fold {', '.join(map(str, empty))}, {len(left)} of {len(folds)} clips are left"
        raise MelfoldError("data.exclude leaves a fold without clips", found, "Exclude fewer clips, or use fewer folds")


def _info(home: Home, recipe: Recipe, competition: Competition, folds_path: Path, clips: str, noisy: str, known: str) -> RunInfo:
    """The facts of a new run but for the commit: its own, and what the runs that it learns from pass on to it.

    Args:
        clips, noisy: the text of its tables.
        known: the hash of its first weights, if they are not here.
    """
    clips_sha256 = hashlib.sha256(clips.encode()).hexdigest()
    first = _with_folds(home, recipe.model.first_run, clips_sha256, "the run that another one starts from")
    teachers = [_with_folds(home, name, clips_sha256, "a teacher") for name in recipe.noisy.teachers]
    parents = [run.info for run in (first, *teachers) if run]
    weights = f"{first.name} {first.recipe.fingerprint()}" if first else known or first_weights_sha256(recipe.model, home)
    licences = [licence_of(recipe, home), *(parent.licence for parent in parents)]
    warnings = [freesound_warning(recipe), *(text for parent in parents for text in parent.warnings)]
    return RunInfo(
        competition=competition.name,
        labels=list(competition.labels),
        fold_table=folds_path.name,
        folds_sha256=sha256_file(folds_path),
        clips_sha256=clips_sha256,
        noisy_sha256=hashlib.sha256(noisy.encode()).hexdigest() if noisy else "",
        first_weights=weights,
        teachers=[f"{teacher.name} {teacher.recipe.fingerprint()}" for teacher in teachers if teacher],
        track="open" if any(parent.track == "open" for parent in parents) else recipe.track,
        data="curated and noisy" if noisy or any(parent.data != "curated" for parent in parents) else "curated",
        licence=", ".join(sorted({part for text in licences for part in text.split(", ") if part})),
        seen=sorted({*seen_data(recipe), *(name for parent in parents for name in parent.seen)}),
        warnings=sorted({text for text in warnings if text}),
        commit="",
        data_folder=str(competition.root.resolve()),
    )


def check_recipe(recipe: Recipe, competition: Competition) -> None:
    """Check a recipe's noisy set and corrections against the competition.

    Raises:
        MelfoldError: no noisy clips, or one line for each correction of an unknown clip or with an unknown label.
    """
    if recipe.uses_noisy and not len(competition.noisy):
        fix = "Use --set train.clips=curated --set phases=[]"
        raise MelfoldError("this download has no noisy clips", str(competition.root), fix)
    problems = []
    for fname, correction in recipe.data.corrections.items():
        if fname not in competition.curated.index:
            problems.append(MelfoldError("a correction names no curated clip", fname, "Check data.corrections"))
        for label in set(correction.labels) - set(competition.labels):
            problems.append(MelfoldError("a correction has an unknown label", f"{fname}: {label!r}", "Check data.corrections"))
    if problems:
        raise MelfoldError.many(problems)


def _with_folds(home: Home, name: str, clips_sha256: str, what: str) -> Run | None:
    """A run that another one learns from, fold by fold; None without a name.

    Raises:
        MelfoldError: no such run, or one with other folds or labels: its models would have seen what the new run is scored on.
    """
    run = open_run(home, name) if name else None
    if run and run.info.clips_sha256 != clips_sha256:
        raise MelfoldError(f"{what} must have the same folds and labels", name, "Train it on the same fold table and download")
    return run


def refuse_changes(run: Run, recipe: Recipe, info: RunInfo | None = None) -> None:
    """Refuse to continue a run under other training settings, data or, for its own prediction, prediction settings.

    Raises:
        MelfoldError: naming what differs.
    """
    before, after = run.recipe.training(), recipe.training()
    if info:
        before, after = before | run.info.made_from(), after | info.made_from()
    if changes := differences(before, after):
        what = f"run {run.name} exists and was trained with different settings"
        raise MelfoldError(what, listed(changes), "Use another name: --run NAME")
    if changes := differences({"predict": run.recipe.model_dump()["predict"]}, {"predict": recipe.model_dump()["predict"]}):
        fix = f"Its weights can be used again: melfold predict {run.name} --data DATA --set predict.… --name NAME"
        raise MelfoldError(f"run {run.name} exists and predicts with different settings", listed(changes), fix)

"""Every stage, through the command line, on a small synthetic competition."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from melfold.cli.main import app
from melfold.data.competition import load_competition
from melfold.data.demo import write_demo
from melfold.files import Home, locked
from melfold.kaggle.ledger import Ledger, Row
from melfold.probs import read_probs
from melfold.recipes import load_recipe

KWARGS = {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16]}
SETS = (
    "logmel.n_fft=256",
    "logmel.hop_length=320",
    "logmel.n_mels=32",
    "model.kwargs={depths=[1, 1, 1, 1], dims=[8, 16, 16, 16]}",
    "train.epochs=2",
    "train.crop_seconds=0.64",
)


HOMELESS = {("submission", "check"), ("submission", "score")}


class Road:
    """A home, a download, and a file of initial weights."""

    def __init__(self, root: Path) -> None:
        self.home, self.data, self.weights = root / "home", write_demo(root / "demo"), root / "initial.safetensors"
        save_file(timm.create_model("convnext_atto", **KWARGS).state_dict(), self.weights)
        self.run, self.submission = self.home / "runs" / "road", self.home / "submissions" / "road" / "submission.csv"
        self.manifest = self.submission.with_name("manifest.json")

    def __call__(self, *args: object, code: int = 0, recipe: bool = False, home: Path | None = None) -> Result:
        """Run a command; `recipe` adds the tiny recipe, starting from the weights file."""
        words = [*map(str, args), *([] if args[:2] in HOMELESS else ["--home", str(home or self.home)])]
        if recipe:
            words += ["--recipe", "demo"]
            for item in (*SETS, f"model.weights=file:{self.weights}"):
                words += ["--set", item]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == code, f"{words}: {result.output} {result.exception!r}"
        return result

    def train(self, *args: object, command: str = "train") -> Result:
        return self(command, self.data, "--run", "road", "--device", "cpu", "--jobs", 1, *args, recipe=True)


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    """The tests below run in their order; each continues where the one before stopped."""
    logger = logging.getLogger("melfold")
    before = logger.handlers, logger.propagate, logger.level
    yield Road(tmp_path_factory.mktemp("road"))
    logger.handlers, logger.propagate, logger.level = before


def times(folder: Path, *patterns: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in folder.glob(pattern)}


def test_1_the_stages_up_to_a_first_fold(road: Road) -> None:
    checked = road("check", road.data, recipe=True)
    assert "This download is complete." in checked.stdout
    assert re.search(r"curated\s+150\b", checked.stdout)
    cached = Path(road("cache", road.data, "--jobs", 1, recipe=True).stdout.strip())
    assert len(list(cached.glob("*.npy"))) == 150 + 60  # noisy clips are not used
    made = times(cached, "*.npy")
    table = Path(road("folds", road.data, "--n-folds", 3, recipe=True).stdout.splitlines()[0])
    assert len(table.read_text().splitlines()) == 1 + 150
    trained = road.train("--folds", 0)
    assert trained.stdout.splitlines()[0] == str(road.run)
    assert "Trained: 0. Next: melfold oof road" in trained.stdout
    assert times(cached, "*.npy") == made
    assert json.loads((road.run / "run.json").read_text())["info"]["track"] == "open"


def test_2_a_score_that_is_not_whole_says_so(road: Road) -> None:
    shown = road("oof", "road")
    assert re.search(r"INCOMPLETE: folds 1, 2 are not trained; this covers only \d+ clips", shown.stderr)
    assert re.search(r"oof_lwlrap +0\.\d{5}  \(95 % 0\.\d{5} to [01]\.\d{5}, \d+ clips\)", shown.stdout)
    assert re.search(r"mean_fold_lwlrap +0\.\d{5}  \(0: 0\.\d{5}\)", shown.stdout)
    assert json.loads(road("oof", "road", "--json").stdout)["missing"] == [1, 2]
    predicted = road("predict", "road")
    built = road("submission", "build", "road")
    assert "INCOMPLETE" in predicted.stderr
    assert "INCOMPLETE" in built.stderr


def test_3_run_completes_what_is_missing(road: Road) -> None:
    first, partial = times(road.run, "fold0/weights.safetensors"), road.submission.read_bytes()
    shown = road.train(command="run").stdout
    assert road.submission.read_bytes() != partial, "the partial run's submission, which Kaggle never had, is replaced"
    assert "INCOMPLETE" not in shown
    assert f"{road.submission}  (track: open)" in shown
    assert times(road.run, "fold0/weights.safetensors") == first
    assert len(list(road.run.glob("fold?/weights.safetensors"))) == 3
    scores = json.loads(road("oof", "road", "--json").stdout)
    assert (scores["run"], scores["clips"], scores["missing"], len(scores["per_label"])) == ("road", 150, [], 10)
    assert scores["oof_lwlrap"] == pytest.approx(json.loads(road.manifest.read_text())["oof_lwlrap"])
    assert set(read_probs(road.run / "oof.csv").index) == set(load_competition(road.data).curated.index)


def test_4_a_second_run_makes_nothing_again(road: Road) -> None:
    kept = ("fold?/weights.safetensors", "fold?/result.json", "fold?/oof.csv", "fold?/test.csv", "test.csv")
    before, bytes_before = times(road.run, *kept), road.submission.read_bytes()
    assert len(before) == 13
    road.train(command="run")
    road.train()
    road("predict", "road", "--data", road.data)
    assert times(road.run, *kept) == before
    assert road.submission.read_bytes() == bytes_before


def test_4b_a_submission_that_kaggle_has_is_never_replaced(road: Road, tmp_path: Path) -> None:
    home, audio = tmp_path / "home", road.data / "test" / load_competition(road.data).test.index[0]
    shutil.copytree(road.home, home)
    sound, folder = audio.read_bytes(), home / "submissions" / "road"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    args = ("run", road.data, "--run", "road", "--device", "cpu", "--jobs", 1)
    Ledger.of(Home(home)).add(Row("tag", "road", *[""] * 8))
    try:
        audio.write_bytes(b"RIFF and then nothing")
        assert "submission road exists and was made from different inputs" in road(*args, recipe=True, home=home, code=2).stderr
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        (home / "submissions" / "ledger.csv").unlink()
        road(*args, recipe=True, home=home)
        assert {path: path.read_bytes() for path in folder.iterdir()} != before
    finally:
        audio.write_bytes(sound)


def test_5_prediction_needs_no_initial_weights(road: Road) -> None:
    road.weights.unlink()
    predicted = (road.run / "test.csv").read_bytes()
    for path in [*road.run.glob("fold?/test.*"), *road.run.glob("test.*")]:
        path.unlink()
    shown = road("predict", "road", "--data", road.data)
    assert shown.stdout.strip() == str(road.run / "test.csv")
    assert (road.run / "test.csv").read_bytes() == predicted


def test_6_a_submission_built_again_is_the_same_and_passes_and_scores(road: Road) -> None:
    before = road.submission.read_bytes(), road.manifest.read_bytes()
    road.submission.unlink()
    built = road("submission", "build", "road", "--data", road.data)
    *lines, expected = built.stdout.splitlines()
    wanted = r"Expected score: 0\.\d{5} \(0\.\d{5} to [01]\.\d{5}\), from out-of-fold predictions alone"
    assert re.fullmatch(wanted, expected), expected
    assert lines == [
        str(road.submission),
        "Track: open. Data: curated. Licences of initial weights: unknown. They were trained on: unknown.",
        "BREAKS: the weights of convnext_atto (initial.safetensors) may have seen clips of this competition: "
        "their data sets are not known. Name them with --set model.seen=…",
        "BREAKS: no pretrained models and no external data (road)",
        "BREAKS: the licence of its first weights is not known: name it with --set model.licence=…",
    ]
    assert (road.submission.read_bytes(), road.manifest.read_bytes()) == before
    checked = road("submission", "check", road.submission, "--data", road.data)
    assert "60 clips, 10 labels, in order." in checked.stdout
    scored = road("submission", "score", road.submission, "--truth", road.data / "test_post_competition.csv").stdout
    assert re.search(r"Public\s+\d+\s+0\.\d{5}", scored)
    args = ("submission", "score", road.submission, "--truth", road.data / "test_post_competition.csv", "--json")
    halves = json.loads(road(*args).stdout)
    assert [half["usage"] for half in halves] == ["Public", "Private"]
    assert halves[0].keys() == {"usage", "clips", "lwlrap", "low", "high"}
    assert f"{halves[1]['lwlrap']:.5f}" in scored


def test_7_an_unreadable_test_clip_gets_the_mean_probabilities(road: Road, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(road.home, home)
    broken, *whole = load_competition(road.data).test.index
    audio = road.data / "test" / broken
    sound = audio.read_bytes()
    audio.write_bytes(b"RIFF and then nothing")
    try:
        shown = road("predict", "road", "--data", road.data, home=home)
        assert re.search(f"WARNING: TEST CLIP unreadable audio: {broken}.*mean out-of-fold probabilities", shown.stderr)
        probs, before = (read_probs(place / "runs" / "road" / "test.csv") for place in (home, road.home))
        prior = read_probs(home / "runs" / "road" / "oof.csv").mean()
        np.testing.assert_allclose(probs.loc[broken], prior, rtol=1e-5)
        np.testing.assert_allclose(probs.loc[whole], before.loc[whole], atol=1e-5)
        road("submission", "build", "road", "--data", road.data, code=2, home=home)  # the id exists, made from different inputs
        road("submission", "build", "road", "--data", road.data, "--id", "broken", home=home)
        file = home / "submissions" / "broken" / "submission.csv"
        assert "in order" in road("submission", "check", file, "--data", road.data, home=home).stdout
        refused = road("check", road.data, code=2, home=home)
        assert f"test: unreadable audio: {broken}" in refused.stderr
    finally:
        audio.write_bytes(sound)


def test_8_another_recipe_under_the_same_name_is_refused(road: Road) -> None:
    before = times(road.run, "**/*")
    refused = road("train", road.data, "--run", "road", "--recipe", "demo", "--device", "cpu", "--jobs", 1, code=2)
    assert "run road exists and was trained with different settings" in refused.stderr
    assert "logmel.n_fft: 256 -> 512" in refused.stderr
    assert times(road.run, "**/*") == before


def test_9_a_model_of_every_clip_predicts_where_there_is_no_other(road: Road) -> None:
    save_file(timm.create_model("convnext_atto", **KWARGS).state_dict(), road.weights)  # other weights than the run's
    refused = road("train", road.data, "--run", "road", "--folds", "full", "--device", "cpu", code=2, recipe=True)
    assert "first_weights" in refused.stderr
    args = ("train", road.data, "--run", "all", "--folds", "full", "--device", "cpu", "--jobs", 1)
    assert "Trained: full." in road(*args, recipe=True).stdout
    assert "run all holds no clip out, so it has no out-of-fold score" in road("oof", "all", code=2).stderr
    road("predict", "all")
    assert len(read_probs(road.home / "runs" / "all" / "test.csv")) == 60


def test_runs_are_compared_and_combined_and_doubtful_labels_are_listed(road: Road, tmp_path: Path) -> None:
    args = ("train", road.data, "--run", "seed1", "--device", "cpu", "--jobs", 1, "--set", "seed=1")
    road(*args, "--set", "train.clips=both", "--set", "noisy.teachers=road", "--set", "train.curated_times=2", recipe=True)
    compared = road("compare", "road", "seed1", "--labels").stdout
    assert re.search(r"seed1\s+open\s+1\s+0\.\d{5}\s+0\.\d{5}\s+[01]\.\d{5}\s+-?0\.\d{5}", compared), compared
    suggested = road("ensemble", "suggest").stdout
    (following,) = re.findall(r"Next: melfold (submission build .*)", suggested)
    assert ("Next: melfold predict seed1" in suggested) == ("seed1" in following)
    road("predict", "seed1")
    road(*following.split(), "--id", "best")
    noted = json.loads((road.home / "submissions" / "best" / "manifest.json").read_text())
    assert noted["runs"][-1]["data"] in ("curated", "curated and noisy")
    doubts = tmp_path / "corrections.csv"
    listed = road("relabel", "suggest", "road", "--top", 5, "-o", doubts).stdout
    assert re.search(r"\d+ of 150 clips are in doubt", listed)
    assert len(doubts.read_text().splitlines()) == 6
    assert "the file exists already" in road("relabel", "suggest", "road", "-o", doubts, code=2).stderr
    corrected = ("train", road.data, "--run", "corrected", "--folds", 0, "--device", "cpu", "--jobs", 1)
    road(*corrected, "--set", f"data.corrections={doubts}", recipe=True)
    kept = json.loads((road.home / "runs" / "corrected" / "recipe.json").read_text())["data"]["corrections"]
    assert len(kept) == 5
    assert all(row["why"].startswith("road: ") for row in kept.values())


@pytest.mark.parametrize(
    "more", [(), ("train.clips=both", 'phases=[{}, {clips="curated"}]'), ("train.clips=both", "noisy.teachers=road")]
)
def test_a_dry_run_runs_every_stage_and_leaves_the_home_alone(
    road: Road, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("melfold.dry_run._MEASURED_SECONDS", 0.5)
    before = times(road.home, "runs/*/*", "submissions/**/*", "folds/*")
    last = sorted(load_competition(road.data).curated.index)[-1]  # a clip that a dry run does not hold
    (road.home.parent / "c.csv").write_text(f"fname,labels,why\n{last},Bell,heard\n")
    words = [word for item in (*more, f"data.corrections={road.home.parent / 'c.csv'}") for word in ("--set", item)]
    shown = road("run", road.data, "--dry-run", "--device", "cpu", "--jobs", 1, *words, recipe=True).stdout
    assert "Every stage runs: " in shown
    assert re.search(r"One fold: [\d,]+ steps of 16, about \d+ (s|min)\nAll 3 folds on 1 device: about ", shown)
    assert times(road.home, "runs/*/*", "submissions/**/*", "folds/*") == before


def test_other_views_of_the_same_weights_are_another_prediction(road: Road) -> None:
    views = ("--set", "predict.shift_seconds=[0, 0.16]", "--set", "predict.overlap=0.25")
    before = times(road.run, "fold?/*", "oof.csv", "test.csv", "recipe.json")
    made = Path(road("predict", "road", *views, "--name", "tta").stdout.strip())
    assert made == road.run / "predictions" / "tta" / "test.csv"
    assert times(road.run, "fold?/*", "oof.csv", "test.csv", "recipe.json") == before
    own, other = (json.loads(road("oof", label, "--json").stdout) for label in ("road", "road@tta"))
    assert (other["run"], other["clips"]) == ("road@tta", 150)
    assert read_probs(made).shape == read_probs(road.run / "test.csv").shape
    assert not read_probs(made).equals(read_probs(road.run / "test.csv"))
    compared = json.loads(road("compare", "road", "road@tta", "--json").stdout)
    assert [row["run"] for row in compared["runs"]] == ["road", "road@tta"]
    assert [row["oof_lwlrap"] for row in compared["runs"]] == [own["oof_lwlrap"], other["oof_lwlrap"]]
    assert [(row["low"], row["high"]) for row in compared["runs"]] == [(s["low"], s["high"]) for s in (own, other)]
    road("submission", "build", "road@tta", "--id", "views")
    assert json.loads((road.home / "submissions" / "views" / "manifest.json").read_text())["runs"][0]["prediction"] == "tta"
    road("report")
    assert "<td>road@tta</td>" in (road.home / "reports/index.html").read_text(), "the submission's row names the prediction"
    stamp = times(made.parent, "**/*")
    road("predict", "road@tta")
    assert times(made.parent, "**/*") == stamp
    refused = road("predict", "road", "--set", "predict.overlap=0", "--name", "tta", code=2).stderr
    assert "prediction road@tta has different settings" in refused
    road("predict", "road", "--name", "tta")
    assert times(made.parent, "**/*") == stamp
    assert "road@tta is a prediction already" in road("predict", "road@tta", "--name", "more", *views, code=2).stderr
    assert "no such prediction: road@other. Known: road, road@tta" in road("oof", "road@other", code=2).stderr


def test_reports_of_a_run_of_two_of_doubtful_clips_and_of_the_home(road: Road, tmp_path: Path) -> None:
    reports = road.home / "reports"
    for args, name in (
        (("road", "--clips", 1), "road.html"),
        (("road", "seed1", "--no-audio", "--clips", 1), "road-vs-seed1.html"),
        (("road", "--review", 3, "--no-audio"), "road-review.html"),
        ((), "index.html"),
    ):
        shown = road("report", *args).stdout
        assert shown.startswith(str(reports / name)), shown
        assert "road" in (reports / name).read_text()
    road("report", "road", "--no-audio", "--data", road.data, "-o", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < (reports / "road.html").stat().st_size
    assert "a review is of one run: no run" in road("report", "--review", 3, code=2).stderr
    assert "a review is of one run: road, seed1" in road("report", "road", "seed1", "--review", 3, code=2).stderr


def test_suggestions_as_json(road: Road) -> None:
    found = json.loads(road("ensemble", "suggest", "road", "seed1", "--json").stdout)
    keys = {"runs", "mean", "weights", "oof_lwlrap", "low", "high", "fitted", "gain", "gain_low", "gain_high", "clips", "seconds"}
    assert all(item.keys() == keys for item in found)
    assert [item["oof_lwlrap"] for item in found] == sorted((item["oof_lwlrap"] for item in found), reverse=True)
    assert {tuple(item["runs"]) for item in found} >= {("road",), ("seed1",), ("road", "seed1")}


def test_an_unfinished_run_is_left_out_of_a_comparison_or_compared_on_the_clips_in_common(road: Road) -> None:
    whole = road("compare", "road", "seed1", "corrected")
    assert "left out: run corrected is not finished (fold 1, 2); --common compares the clips in common" in whole.stderr
    assert "corrected" not in whole.stdout
    assert "All scores are on the same 150 of 150 clips." in whole.stdout
    common = json.loads(road("compare", "road", "seed1", "corrected", "--common", "--json").stdout)
    assert [row["run"] for row in common["runs"]] == ["road", "seed1", "corrected"]
    assert common["clips"] == json.loads(road("oof", "corrected", "--json").stdout)["clips"] < 150
    for runs in (("corrected", "road", "seed1"), ("road", "corrected")):
        assert "run corrected is not finished: folds missing: 1, 2" in road("compare", *runs, code=2).stderr


def test_resume_needs_only_the_name_of_the_run(road: Road) -> None:
    shown = road("resume", "corrected", "--device", "cpu", "--jobs", 1).stdout
    assert "Trained: 0, 1, 2. Next: melfold oof corrected" in shown
    kept = times(road.home / "runs" / "corrected", "fold?/*")
    road("resume", "corrected")
    assert times(road.home / "runs" / "corrected", "fold?/*") == kept


def test_a_runs_recipe_can_be_used_for_another_run(road: Road) -> None:
    args = ("--recipe", "road", "--folds", 0, "--device", "cpu", "--jobs", 1)
    shown = road("train", road.data, *args, "--set", "seed=7", "--set", "train.epochs=1").stdout
    name = Path(shown.splitlines()[0]).name
    assert re.fullmatch(r"road-[0-9a-f]{6}", name)
    rows = [line.split() for line in road("recipe", "diff", "road", name).stdout.splitlines()]
    assert rows == [["key", "road", name], ["seed", "0", "7"], ["train.epochs", "2.0", "1.0"]]
    (road.home / "mine.toml").write_text(road("recipe", "show", name).stdout)
    assert road("recipe", "diff", name, road.home / "mine.toml").stdout.endswith("have the same settings.\n")


def test_runs_are_listed_renamed_and_deleted(road: Road) -> None:
    listed = {run["run"]: run for run in json.loads(road("runs", "--json").stdout)}
    unfinished = next(name for name in listed if name.startswith("road-"))
    assert (listed["road"]["state"], listed[unfinished]["state"], listed["all"]["state"]) == ("done", "unfinished", "done")
    assert (listed["road"]["folds_done"], listed["all"]["folds_done"]) == (["0", "1", "2"], ["full"])
    assert listed["road"]["oof_lwlrap"] == json.loads(road("oof", "road", "--json").stdout)["oof_lwlrap"]
    assert (listed["road"]["predictions"], listed["all"]["oof_lwlrap"]) == (["road@tta"], None)
    assert listed["road"]["bytes"] > 100_000
    table = road("runs").stdout
    assert re.search(rf"{unfinished} +unfinished +open +1/3 +[01]\.\d{{5}}", table)
    assert re.search(r"all +done +open +0/3 \+ full +- ", table)

    assert (
        "run road is used by its name: a teacher of run seed1; part of submission "
        in road("runs", "mv", "road", "x", code=2).stderr
    )
    assert "run road already exists" in road("runs", "mv", unfinished, "road", code=2).stderr
    assert "a run's name is letters" in road("runs", "mv", unfinished, "a/b", code=2).stderr
    moved = Path(road("runs", "mv", unfinished, "short").stdout.strip())
    assert "Trained: 0" in road("train", road.data, "--recipe", "short", "--folds", 0).stdout
    with locked(moved / "fold1" / ".lock"):
        assert next(r for r in json.loads(road("runs", "--json").stdout) if r["run"] == "short")["state"] == "training"
        assert "run short is in training" in road("runs", "rm", "short", "--yes", code=2).stderr
    assert "run short has something to lose: trained: fold0" in road("runs", "rm", "short", code=2).stderr
    assert moved.exists()
    road("runs", "rm", "short", "--yes")
    assert not moved.exists()
    assert "short" not in road("runs").stdout

    info = road.home / "runs" / "corrected" / "run.json"
    saved = info.read_text()
    info.write_text('{"competition": "of an older version"}')
    broken = road("runs")
    info.write_text(saved)
    assert re.search(r"corrected +unreadable", broken.stdout)
    assert "run corrected cannot be opened: run corrected was made by another version of melfold" in broken.stderr


def test_clean_shows_what_nothing_needs_and_deletes_it_when_asked(road: Road, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(road.home, home)
    needed = times(home, "runs/*/fold?/weights.safetensors", "submissions/*/*", "folds/*", "cache/*/*/*.npy")
    dead = subprocess.Popen(["true"])
    dead.wait()
    checkpoint, unfinished = home / "runs/road/fold0/checkpoint.pt", home / "runs/road/fold9/checkpoint.pt"
    temporary = home / "runs/road/fold0" / f".oof.csv.{dead.pid}.tmp"
    young, living = temporary.with_name(f".test.csv.{dead.pid}.tmp"), temporary.with_name(f".oof.csv.{os.getpid()}.tmp")
    other_cache, busy_cache = home / "cache/demo/0123456789abcdef", home / "cache/demo/fedcba9876543210"
    for path in (checkpoint, unfinished, temporary, young, living, other_cache / "a.npy", busy_cache / "a.npy"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
    for path in (temporary, living):
        os.utime(path, (0, 0))
    shutil.rmtree(home / "build", ignore_errors=True)
    (home / "build" / "dry-run").mkdir(parents=True)

    with locked(busy_cache / ".lock"):
        shown = road("clean", home=home)
        assert f"{busy_cache} is in use and stays" in shown.stderr
        rows = {line.split()[3] for line in shown.stdout.splitlines()[1:-1]}
        assert rows == {str(p.relative_to(home)) for p in (checkpoint, temporary, other_cache, home / "build/dry-run")}
        assert shown.stdout.endswith("3.0 kB in all. To delete this, add --yes.\n")
        assert checkpoint.exists()
        assert "Deleted 1.0 kB." in road("clean", "checkpoints", "--yes", home=home).stdout
        assert (checkpoint.exists(), other_cache.exists()) == (False, True)
        road("clean", "--yes", home=home)
        assert [p.exists() for p in (temporary, other_cache, home / "build/dry-run")] == [False] * 3
        assert all(p.exists() for p in (unfinished, young, living, busy_cache / "a.npy"))
    assert (
        times(home, "runs/*/fold?/weights.safetensors", "submissions/*/*", "folds/*", "cache/*/*/*.npy").items() >= needed.items()
    )


def test_a_colleagues_submission_is_rebuilt_or_the_missing_commands_are_printed(road: Road, tmp_path: Path) -> None:
    before = road.submission.read_bytes()
    road.submission.unlink()
    assert road("submission", "rebuild", "road", "--data", road.data).stdout == f"{road.submission}\n"
    assert road.submission.read_bytes() == before
    home = tmp_path / "home"
    for id in ("road", "views"):
        shutil.copytree(road.home / "submissions" / id, home / "submissions" / id)
    recipe = home / "build" / "rebuild" / "road" / "road.toml"
    lines = road("submission", "rebuild", "road", "--data", road.data, home=home, code=1).stdout.splitlines()
    assert lines[1:] == [
        f"melfold train {road.data} --recipe {recipe} --run road",
        f"melfold predict road --data {road.data}",
        f"melfold submission rebuild road --data {road.data}",
    ]
    assert load_recipe(str(recipe)).training() == load_recipe("road", home=Home(road.home)).training()
    views = road("submission", "rebuild", "views", "--data", road.data, home=home, code=1).stdout
    assert f"melfold predict road --data {road.data} --name tta" in views
    assert load_recipe(str(recipe.parents[1] / "views" / "road.toml")).predict.shift_seconds == (0, 0.16)


def test_the_demo_ends_with_its_scores_and_its_files(road: Road, tmp_path: Path) -> None:
    sets = [word for item in SETS for word in ("--set", item)]
    shown = road("demo", "--device", "cpu", *sets, home=tmp_path).stdout
    for half in ("out-of-fold", "test Public", "test Private"):
        assert re.search(rf"  {half} +0\.\d{{5}}  \(0\.\d{{5}} to [01]\.\d{{5}}, \d+ clips\)", shown), shown
    for name in ("synthetic competition", "log-mels", "fold table", "run: weights, logs, OOF", "submission"):
        (path,) = re.findall(rf"  {name} +(/.*)", shown)
        assert Path(path).exists()
    assert re.search(rf"Next: melfold oof demo\S* --home {tmp_path}", shown), shown


LIGHT: dict[str, tuple[tuple[object, ...], int]] = {
    "a finished predict": (("predict", "road"), 0),
    "a finished train": (("train", "DATA", "--recipe", "corrected"), 0),
    "a finished resume": (("resume", "corrected"), 0),
    "relabel suggest": (("relabel", "suggest", "road"), 0),
    "oof": (("oof", "road"), 0),
    "compare": (("compare", "road", "seed1"), 0),
    "runs": (("runs",), 0),
    "submission build": (("submission", "build", "road"), 0),
    "train with an unknown recipe": (("train", "DATA", "--recipe", "opne"), 2),
    "train with a bad fold": (("train", "DATA", "--recipe", "road", "--folds", "9"), 2),
    "train with a bad device": (("train", "DATA", "--recipe", "road", "--device", "gpu"), 2),
    "train with other settings": (("train", "DATA", "--recipe", "road", "--run", "road", "--set", "train.lr=1"), 2),
    "show": (("show", "DATA", "CLIP", "--recipe", "road", "-o", "OUT"), 0),
}


def loaded_by(commands: dict[str, list[str]], libraries: set[str], cwd: Path) -> dict[str, tuple[int, list[str]]]:
    """The exit codes of commands, run one after the other in a new process, and which of the libraries are loaded by then."""
    script = f"""
import json, sys
from melfold.cli.main import app
found = {{}}
for name, args in {commands!r}.items():
    try:
        app(args)
    except SystemExit as error:
        found[name] = [error.code or 0, sorted({libraries!r} & sys.modules.keys())]
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {name: tuple(result) for name, result in json.loads(done.stdout.splitlines()[-1]).items()}


def test_what_needs_no_model_loads_neither_torch_nor_librosa(road: Road, tmp_path: Path) -> None:
    road("predict", "road")  # a test before this one changed the time of an audio file
    words = {"DATA": road.data, "CLIP": load_competition(road.data).curated.index[0], "OUT": tmp_path / "x.png"}
    commands = {
        name: [*(str(words.get(str(arg), arg)) for arg in args), "--home", str(road.home)] for name, (args, _) in LIGHT.items()
    }
    heavy = {"torch", "timm", "librosa", "sklearn", "scipy", "numba", "joblib", "matplotlib.pyplot", "kaggle"}
    assert loaded_by(commands, heavy, tmp_path) == {name: (code, []) for name, (_, code) in LIGHT.items()}


def test_the_lightest_commands_do_not_even_load_pandas(tmp_path: Path) -> None:
    commands = {args: args.split() for args in ("--help", "train --help", "recipe list", "ledger show", "clean")}
    heavy = {"torch", "pandas", "librosa", "scipy", "matplotlib", "numpy"}
    assert loaded_by(commands, heavy, tmp_path) == {args: (0, []) for args in commands}
    assert loaded_by({"--help": ["--help"]}, {"pydantic"}, tmp_path) == {"--help": (0, [])}

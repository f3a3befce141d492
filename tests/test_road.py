"""The whole road, through the command line, on a small synthetic competition."""

from __future__ import annotations

import json
import logging
import re
import shutil
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
from melfold.probs import read_probs

KWARGS = {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16]}
SETS = (
    "logmel.n_fft=256",
    "logmel.hop_length=320",
    "logmel.n_mels=32",
    "model.kwargs={depths=[1, 1, 1, 1], dims=[8, 16, 16, 16]}",
    "train.epochs=2",
    "train.crop_seconds=0.64",
)


class Road:
    """A home, a download, and a file of initial weights."""

    def __init__(self, root: Path) -> None:
        self.home, self.data, self.weights = root / "home", write_demo(root / "demo"), root / "initial.safetensors"
        save_file(timm.create_model("convnext_atto", **KWARGS).state_dict(), self.weights)
        self.run, self.submission = self.home / "runs" / "road", self.home / "submissions" / "road" / "submission.csv"
        self.recipe = self.submission.with_name("recipe.json")

    def __call__(self, *args: object, code: int = 0, recipe: bool = False, home: Path | None = None) -> Result:
        """Run a command; `recipe` adds the tiny recipe, starting from the weights file."""
        words = [*map(str, args), "--home", str(home or self.home)]
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
    """The tests below walk it in their order, each from where the one before has got."""
    logger = logging.getLogger("melfold")
    before = logger.handlers, logger.propagate, logger.level
    yield Road(tmp_path_factory.mktemp("road"))
    logger.handlers, logger.propagate, logger.level = before


def times(folder: Path, *patterns: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in folder.glob(pattern)}


def test_1_the_stages_up_to_a_first_fold(road: Road) -> None:
    checked = road("check", road.data, recipe=True)
    assert "This download is complete and sane." in checked.stdout
    assert re.search(r"curated\s+150\b", checked.stdout)
    cached = Path(road("cache", road.data, "--jobs", 1, recipe=True).stdout.strip())
    assert len(list(cached.glob("*.npy"))) == 150 + 60  # noisy clips are not used
    made = times(cached, "*.npy")
    table = Path(road("folds", road.data, "--n-folds", 3, recipe=True).stdout.splitlines()[0])
    assert len(table.read_text().splitlines()) == 1 + 150
    trained = road.train("--folds", 0)
    assert trained.stdout.splitlines()[0] == str(road.run)
    assert "Done: 0. Next: melfold oof road" in trained.stdout
    assert times(cached, "*.npy") == made
    assert json.loads((road.run / "run.json").read_text())["track"] == "open"


def test_2_a_score_that_is_not_whole_says_so(road: Road) -> None:
    shown = road("oof", "road").stdout
    assert re.search(r"INCOMPLETE: folds 1, 2 are missing; this covers \d+ clips only.", shown)
    assert "mean_fold_lwlrap" in shown
    assert json.loads((road.run / "scores.json").read_text())["missing"] == [1, 2]
    predicted = road("predict", "road", "--data", road.data)
    built = road("submission", "build", "road", "--data", road.data)
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
    scores = json.loads((road.run / "scores.json").read_text())
    assert (scores["clips"], scores["missing"]) == (150, [])
    assert scores["oof_lwlrap"] == pytest.approx(json.loads(road.recipe.read_text())["oof_lwlrap"])
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


def test_5_prediction_needs_no_initial_weights(road: Road) -> None:
    road.weights.unlink()
    predicted = (road.run / "test.csv").read_bytes()
    for path in [*road.run.glob("fold?/test.*"), *road.run.glob("test.*")]:
        path.unlink()
    shown = road("predict", "road", "--data", road.data)
    assert shown.stdout.strip() == str(road.run / "test.csv")
    assert (road.run / "test.csv").read_bytes() == predicted


def test_6_a_submission_built_again_is_the_same_and_passes_and_scores(road: Road) -> None:
    before = road.submission.read_bytes(), road.recipe.read_bytes()
    road.submission.unlink()
    built = road("submission", "build", "road", "--data", road.data)
    assert built.stdout.splitlines() == [
        str(road.submission),
        "Track: open. Data: curated. Licences of first weights: unknown.",
        "BREAKS: no pretrained models and no external data (road)",
        "BREAKS: the licence of its first weights is not known: name it with --set model.licence=…",
    ]
    assert (road.submission.read_bytes(), road.recipe.read_bytes()) == before
    checked = road("submission", "check", road.submission, "--data", road.data)
    assert "60 clips, 10 labels, in order." in checked.stdout
    scored = road("submission", "score", road.submission, "--truth", road.data / "test_post_competition.csv").stdout
    assert re.search(r"Public\s+\d+\s+0\.\d{3}", scored)
    assert re.search(r"Private\s+\d+\s+0\.\d{3}", scored)


def test_7_an_unreadable_test_clip_gets_the_mean_probabilities(road: Road, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(road.home, home)
    spoilt, *whole = load_competition(road.data).test.index
    audio = road.data / "test" / spoilt
    sound = audio.read_bytes()
    audio.write_bytes(b"RIFF and then nothing")
    try:
        shown = road("predict", "road", "--data", road.data, home=home)
        assert re.search(f"WARNING: TEST CLIP unreadable audio: {spoilt}.*mean out-of-fold probabilities", shown.stderr)
        probs, before = (read_probs(place / "runs" / "road" / "test.csv") for place in (home, road.home))
        prior = read_probs(home / "runs" / "road" / "oof.csv").mean()
        np.testing.assert_allclose(probs.loc[spoilt], prior, rtol=1e-5)
        np.testing.assert_allclose(probs.loc[whole], before.loc[whole], atol=1e-5)
        road("submission", "build", "road", "--data", road.data, code=2, home=home)  # the id stands, of other inputs
        road("submission", "build", "road", "--data", road.data, "--id", "spoilt", home=home)
        file = home / "submissions" / "spoilt" / "submission.csv"
        assert "in order" in road("submission", "check", file, "--data", road.data, home=home).stdout
        refused = road("check", road.data, code=2, home=home)
        assert f"test: unreadable audio: {spoilt}" in refused.stderr
    finally:
        audio.write_bytes(sound)


def test_8_another_recipe_under_the_same_name_is_refused(road: Road) -> None:
    before = times(road.run, "**/*")
    refused = road("train", road.data, "--run", "road", "--recipe", "demo", "--device", "cpu", "--jobs", 1, code=2)
    assert "run road rests on something else" in refused.stderr
    assert "logmel.n_fft: 256 -> 512" in refused.stderr
    assert times(road.run, "**/*") == before


def test_9_a_model_of_every_clip_predicts_where_there_is_no_other(road: Road) -> None:
    save_file(timm.create_model("convnext_atto", **KWARGS).state_dict(), road.weights)  # other weights than the run's
    refused = road("train", road.data, "--run", "road", "--folds", "full", "--device", "cpu", code=2, recipe=True)
    assert "weights_sha256" in refused.stderr
    args = ("train", road.data, "--run", "all", "--folds", "full", "--device", "cpu", "--jobs", 1)
    assert "Done: full." in road(*args, recipe=True).stdout
    assert "has no trained fold to score: full" in road("oof", "all", code=2).stderr
    road("predict", "all", "--data", road.data)
    assert len(read_probs(road.home / "runs" / "all" / "test.csv")) == 60


def test_runs_are_compared_and_combined_and_their_labels_doubted(road: Road, tmp_path: Path) -> None:
    args = ("train", road.data, "--run", "seed1", "--device", "cpu", "--jobs", 1, "--set", "seed=1")
    road(*args, "--set", "noisy.use=true", "--set", "noisy.teacher=road", "--set", "noisy.curated_times=2", recipe=True)
    compared = road("compare", "road", "seed1", "--labels").stdout
    assert re.search(r"seed1\s+open\s+1\s+0\.\d{3}\s+0\.\d{3}\s+0\.\d{3}\s+-?0\.\d{3}", compared), compared
    suggested = road("ensemble", "suggest").stdout
    (following,) = re.findall(r"Next: melfold (submission build .*) --data DATA", suggested)
    assert ("Next: melfold predict seed1 --data DATA" in suggested) == ("seed1" in following)
    road("predict", "seed1", "--data", road.data)
    road(*following.split(), "--data", road.data, "--id", "best")
    noted = json.loads((road.home / "submissions" / "best" / "recipe.json").read_text())
    assert noted["runs"][-1]["data"] in ("curated", "curated and noisy")
    doubts = tmp_path / "corrections.csv"
    listed = road("relabel", "suggest", "road", "--top", 5, "-o", doubts).stdout
    assert re.search(r"\d+ of 150 clips are in doubt", listed)
    assert len(doubts.read_text().splitlines()) == 6
    assert "a file stands there already" in road("relabel", "suggest", "road", "-o", doubts, code=2).stderr
    corrected = ("train", road.data, "--run", "corrected", "--folds", 0, "--device", "cpu", "--jobs", 1)
    road(*corrected, "--set", f"data.corrections={doubts}", recipe=True)
    kept = json.loads((road.home / "runs" / "corrected" / "recipe.json").read_text())["data"]["corrections"]
    assert len(kept) == 5
    assert all(row["why"].startswith("road: ") for row in kept.values())


@pytest.mark.parametrize("more", [(), ("noisy.use=true", "noisy.curated_epochs=1"), ("noisy.use=true", "noisy.teacher=road")])
def test_a_dry_run_walks_the_whole_road_and_leaves_the_home_alone(road: Road, more: tuple[str, ...]) -> None:
    before = times(road.home, "runs/*/*", "submissions/**/*", "folds/*")
    last = sorted(load_competition(road.data).curated.index)[-1]  # a clip that a dry run does not hold
    (road.home.parent / "c.csv").write_text(f"fname,labels,why\n{last},Bell,heard\n")
    words = [word for item in (*more, f"data.corrections={road.home.parent / 'c.csv'}") for word in ("--set", item)]
    shown = road("run", road.data, "--dry-run", "--device", "cpu", "--jobs", 1, *words, recipe=True).stdout
    assert "Every stage runs: " in shown
    assert re.search(r"A fold will be [\d,]+ steps of 16: about \d+\.\d h on this device", shown)
    assert times(road.home, "runs/*/*", "submissions/**/*", "folds/*") == before

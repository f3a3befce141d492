"""The command line: help with an example everywhere, and bad input told in a line that leaves nothing behind."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from melfold.cli.main import app


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """The command line sets up logging; other tests are not to find it so."""
    logger = logging.getLogger("melfold")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate, logger.level = before


@pytest.fixture
def data(tiny_download: Callable[..., Path]) -> Path:
    return tiny_download()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def commands() -> list[tuple[str, ...]]:
    """Every command's words."""

    def walk(command: object, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield words
        for name, sub in (inner or {}).items():
            yield from walk(sub, (*words, name))

    return list(walk(typer.main.get_command(app), ()))


def test_there_is_a_command_a_stage() -> None:
    words = {" ".join(w) for w in commands()}
    assert words >= {"check", "show", "cache", "folds", "train", "oof", "predict", "run", "demo", "recipe list", "recipe show"}
    assert words >= {"submission build", "submission check", "submission score"}
    assert words >= {"ensemble suggest", "relabel suggest", "compare"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert f"Example: melfold {' '.join(words)}" in result.stdout
    assert CliRunner().invoke(app, [*words, "-h"], terminal_width=200).stdout == result.stdout


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["recipe", "list"]], ids=" ".join)
def test_light_commands_import_neither_torch_nor_pandas(args: list[str]) -> None:
    code = f"""
import sys
from melfold.cli.main import app
try:
    app({args!r})
except SystemExit as error:
    assert not error.code
heavy = {{"torch", "timm", "pandas", "librosa", "sklearn", "scipy", "matplotlib"}} & sys.modules.keys()
print(sorted(heavy), file=sys.stderr)
"""
    done = _python(code)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    assert done.stdout


BAD: dict[str, tuple[list[str], str]] = {
    "check: no folder": (["check", "NOSUCH"], "no such data folder: NOSUCH"),
    "check: no download": (["check", "HOME"], "no such data folder"),
    "check: unknown recipe": (["check", "DATA", "--recipe", "opne"], "unknown recipe: 'opne' (nearest: open)"),
    "cache: no recipe file": (["cache", "DATA", "--recipe", "nosuch.toml"], "cannot read a recipe: nosuch.toml"),
    "cache: unknown key": (["cache", "DATA", "--set", "logmel.nmels=64"], "unknown key: logmel.nmels (nearest: logmel.n_mels)"),
    "cache: not a setting": (["cache", "DATA", "--set", "logmel"], "--set needs section.key=value: 'logmel'"),
    "cache: bad value": (["cache", "DATA", "--set", "logmel.fmax=99999.0"], "needs fmin < fmax <= sr / 2"),
    "folds: no folder": (["folds", "NOSUCH"], "no such data folder"),
    "folds: more than clips": (["folds", "DATA", "--n-folds", "9"], "more folds than clips: 9 folds, 8 clips"),
    "train: no folder": (["train", "NOSUCH", "--recipe", "demo"], "no such data folder"),
    "train: bad fold": (["train", "DATA", "--recipe", "demo", "--folds", "0,3"], "no such fold: '3'. Use 0 to 2, all, or full"),
    "train: not a fold": (["train", "DATA", "--recipe", "demo", "--folds", "first"], "no such fold: 'first'"),
    "train: no fold": (["train", "DATA", "--recipe", "demo", "--folds", ""], "no such fold: ''"),
    "train: bad device": (["train", "DATA", "--recipe", "demo", "--device", "gpu"], "unknown device: 'gpu'"),
    "train: no such device": (["train", "DATA", "--recipe", "demo", "--device", "cuda:99"], "no such device: cuda:99"),
    "train: bad type": (["train", "DATA", "--recipe", "demo", "--set", "train.lr=fast"], "train.lr"),
    "oof: no run": (["oof", "nosuch"], "no such run: nosuch in"),
    "oof: --set": (["oof", "nosuch", "--set", "seed=1"], "--set changes nothing here: seed=1"),
    "predict: no run": (["predict", "nosuch", "--data", "DATA"], "no such run: nosuch"),
    "predict: --set": (["predict", "nosuch", "--data", "DATA", "--set", "seed=1"], "--set changes nothing here"),
    "build: no run": (["submission", "build", "nosuch", "--data", "DATA"], "no such run: nosuch"),
    "build: bad weights": (["submission", "build", "nosuch", "--data", "DATA", "--weights", "a,b"], "no such run: nosuch"),
    "ensemble: no runs": (["ensemble", "suggest"], "an ensemble needs two runs: none. Train another recipe or seed"),
    "ensemble: no run": (["ensemble", "suggest", "nosuch"], "no such run: nosuch"),
    "ensemble: --set": (["ensemble", "suggest", "--set", "seed=1"], "--set changes nothing here"),
    "compare: no run": (["compare", "nosuch"], "no such run: nosuch"),
    "relabel: no run": (["relabel", "suggest", "nosuch"], "no such run: nosuch"),
    "train: no corrections": (
        ["train", "DATA", "--recipe", "demo", "--set", "data.corrections=no.csv"],
        "cannot read data.corrections: no.csv",
    ),
    "train: no teacher": (
        ["train", "DATA", "--recipe", "demo", "--set", "noisy.use=true", "--set", "noisy.teacher=nosuch"],
        "no such run: nosuch",
    ),
    "submission check: no file": (["submission", "check", "NOSUCH", "--data", "DATA"], "NOSUCH is no CSV"),
    "submission check: no table": (
        ["submission", "check", "DATA/train_curated.csv", "--data", "DATA"],
        "train_curated.csv: wrong columns",
    ),
    "submission check: all zeros": (
        ["submission", "check", "DATA/sample_submission.csv", "--data", "DATA"],
        "sample_submission.csv: all labels tie: 4 clips",
    ),
    "submission score: no file": (
        ["submission", "score", "NOSUCH", "--truth", "DATA/test_post_competition.csv"],
        "no such predictions: NOSUCH",
    ),
    "submission score: no truth": (
        ["submission", "score", "DATA/sample_submission.csv", "--truth", "NOSUCH"],
        "NOSUCH is no truth table",
    ),
    "show: no clip": (["show", "DATA", "nosuch.wav", "-o", "HOME/clips.png"], "no such clip: nosuch.wav"),
    "run: no folder": (["run", "NOSUCH", "--recipe", "demo"], "no such data folder"),
    "run: unknown key": (["run", "DATA", "--recipe", "demo", "--set", "train.epoch=1"], "unknown key: train.epoch (nearest: "),
    "demo: unknown key": (["demo", "--set", "train.epoch=1"], "unknown key: train.epoch (nearest: train.epochs)"),
    "recipe show: unknown": (["recipe", "show", "scrach"], "unknown recipe: 'scrach' (nearest: scratch)"),
    "recipe list: --set": (["recipe", "list", "--set", "seed=1"], "--set changes nothing here"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line_and_leaves_nothing(
    case: str, data: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    filled = [arg.replace("DATA", str(data)).replace("HOME", str(home)) for arg in args]
    result = CliRunner().invoke(app, [*filled, "--home", str(home)])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("melfold: ")
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_several_problems_are_several_lines(data: Path, home: Path) -> None:
    (data / "train_curated" / "c0000.wav").unlink()
    (data / "test" / "more.wav").write_bytes(b"")
    result = CliRunner().invoke(app, ["check", str(data), "--home", str(home)])
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("melfold: ") for line in lines)
    assert "train_curated/c0000.wav" in lines[0]
    assert "test/more.wav" in lines[1]


def test_without_home_melfold_home_is_used(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MELFOLD_HOME", str(tmp_path / "elsewhere"))
    result = CliRunner().invoke(app, ["folds", str(data), "--n-folds", "2"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "elsewhere" / "folds" / "tiny_curated_2fold_seed42.csv").exists()


def test_the_console_script_ends_with_the_same_code(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("melfold")
    done = subprocess.run(
        [script, "check", "nosuch"], capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("melfold: no such data folder: nosuch")
    assert len(done.stderr.splitlines()) == 1


def test_a_recipe_shows_its_reasons_and_what_was_set() -> None:
    result = CliRunner().invoke(app, ["recipe", "show", "demo", "--set", "train.lr=0.5"])
    assert result.exit_code == 0
    assert "lr = 0.5" in next(line for line in result.stdout.splitlines() if "set on the command line" in line)
    assert any(line.startswith("sr = 16000") and "the demo's recordings" in line for line in result.stdout.splitlines())
    assert "track scratch" in result.stdout


def test_every_shipped_recipe_is_listed_with_its_track() -> None:
    lines = CliRunner().invoke(app, ["recipe", "list"]).stdout.splitlines()
    tracks = {line.split()[0]: line.split()[1] for line in lines}
    assert tracks["open"] == tracks["article"] == "[open]"
    assert tracks["scratch"] == tracks["demo"] == "[scratch]"


def test_a_clip_is_drawn(data: Path, tmp_path: Path, home: Path) -> None:
    args = ["show", str(data), "c0000.wav", "-o", str(tmp_path / "clips.png"), "--recipe", "demo", "--home", str(home)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "clips.png")
    assert (tmp_path / "clips.png").read_bytes().startswith(b"\x89PNG")

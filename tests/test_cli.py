"""The command line: help with an example everywhere, and one line for bad input, which leaves nothing behind."""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import melfold
from melfold.cli.main import app, main
from melfold.recipe_text import recipe_keys
from melfold.recipes import load_recipe, recipe_names


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """The command line sets up logging; other tests must not see that."""
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


@functools.cache
def root_command() -> object:
    """The command line as click sees it."""
    return typer.main.get_command(app)


def commands() -> list[tuple[str, ...]]:
    """Every command's words."""

    def walk(command: object, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield words
        for name, sub in (inner or {}).items():
            yield from walk(sub, (*words, name))

    return list(walk(root_command(), ()))


def options_of(words: tuple[str, ...]) -> set[str]:
    """The long options of a command."""
    found: object = root_command()
    for word in words:
        found = found.commands[word]  # type: ignore[attr-defined]
    return {option for param in found.params for option in param.opts if option.startswith("--")}  # type: ignore[attr-defined]


def default_of(words: tuple[str, ...], option: str) -> object:
    """The value that an option of a command has if it is not given."""
    found: object = root_command()
    for word in words:
        found = found.commands[word]  # type: ignore[attr-defined]
    return next(param.default for param in found.params if option in param.opts)  # type: ignore[attr-defined]


def test_there_is_a_command_for_every_stage() -> None:
    words = {" ".join(w) for w in commands()}
    assert words >= {"download", "check", "show", "cache", "folds", "train", "resume", "oof", "predict", "run", "demo", "clean"}
    assert words >= {"submission build", "submission check", "submission score", "submission rebuild", "submit", "ship"}
    assert words >= {"ensemble suggest", "relabel suggest", "compare", "runs rm", "runs mv"}
    assert words >= {"recipe list", "recipe show", "recipe diff", "recipe keys"}


def test_set_is_offered_only_where_it_changes_something() -> None:
    takes = {" ".join(words) for words in commands() if "--set" in options_of(words)}
    from_a_recipe = {" ".join(words) for words in commands() if "--recipe" in options_of(words)}
    assert takes == from_a_recipe | {"demo", "recipe show", "predict", "student"}


def test_the_default_recipe_is_one_of_the_shipped_ones() -> None:
    taking = [words for words in commands() if "--recipe" in options_of(words)]
    assert ("run",) in taking
    assert {default_of(words, "--recipe") for words in taking} == {"audioset"} <= set(recipe_names())


def test_home_is_offered_only_where_it_is_used() -> None:
    without = {" ".join(words) for words in commands() if "--home" not in options_of(words)}
    assert without == {"recipe list", "recipe keys", "submission check", "submission score"}


def test_results_come_as_json_too() -> None:
    takes = {" ".join(words) for words in commands() if "--json" in options_of(words)}
    assert takes == {"oof", "compare", "ensemble suggest", "submission score", "ledger show", "weights fetch"}
    assert "--json" in options_of(("runs",)), "which is a group"


@pytest.mark.parametrize("words", [*commands(), ("runs",)], ids=" ".join)
def test_every_command_has_help_with_an_example(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert f"Example: melfold {' '.join(words)}" in result.stdout
    assert CliRunner().invoke(app, [*words, "-h"], terminal_width=200).stdout == result.stdout


def test_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "melfold", "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"melfold {melfold.__version__}\n"


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
    "train: bad device": (["train", "DATA", "--recipe", "demo", "--device", "cpu,gpu"], "unknown device: 'gpu'"),
    "train: no such device": (["train", "DATA", "--recipe", "demo", "--device", "cuda:99"], "no such device: cuda:99"),
    "train: bad type": (["train", "DATA", "--recipe", "demo", "--set", "train.lr=fast"], "train.lr"),
    "oof: no run": (["oof", "nosuch"], "no such run: nosuch in"),
    "predict: no run": (["predict", "nosuch", "--data", "DATA"], "no such run: nosuch"),
    "predict: --set without --name": (
        ["predict", "nosuch", "--data", "DATA", "--set", "predict.overlap=0"],
        "other settings are another prediction, which needs a name: --set predict.overlap=0. Add --name NAME",
    ),
    "predict: a setting of training": (
        ["predict", "nosuch", "--data", "DATA", "--set", "seed=1", "--name", "x"],
        "only predict.* can be changed after training: seed=1",
    ),
    "resume: no run": (["resume", "nosuch"], "no such run: nosuch in"),
    "resume: bad device": (["resume", "nosuch", "--device", "gpu0"], "unknown device: 'gpu0'"),
    "runs rm: no run": (["runs", "rm", "nosuch"], "no such run: nosuch in"),
    "runs mv: no run": (["runs", "mv", "nosuch", "other"], "no such run: nosuch in"),
    "clean: unknown kind": (["clean", "everything"], "unknown kind: 'everything'. Use checkpoints, temporary, build, caches"),
    "ship: no submission": (["ship", "nosuch"], "no such submission: nosuch in"),
    "submit: no submission": (["submit", "nosuch", "--kernel"], "no such submission: nosuch in"),
    "build infer: no submission": (["kernel", "build", "infer", "--submission", "nosuch"], "no such submission: nosuch in"),
    "rebuild: no submission": (
        ["submission", "rebuild", "nosuch", "--data", "DATA"],
        "no such submission: HOME/submissions/nosuch/manifest.json",
    ),
    "ledger show: no column": (["ledger", "show", "--sort", "luck"], "no such column: luck. Use one of tag, id"),
    "recipe diff: unknown": (["recipe", "diff", "open", "smal"], "unknown recipe: 'smal' (nearest: small)"),
    "build: no run": (["submission", "build", "nosuch", "--data", "DATA"], "no such run: nosuch"),
    "build: bad weights": (["submission", "build", "nosuch", "--data", "DATA", "--weights", "a,b"], "no such run: nosuch"),
    "ensemble: no runs": (
        ["ensemble", "suggest"],
        "an ensemble needs at least two finished runs with the same folds: 0 in HOME/runs. Train another",
    ),
    "ensemble: no run": (["ensemble", "suggest", "nosuch"], "no such run: nosuch"),
    "compare: no run": (["compare", "nosuch"], "no such run: nosuch"),
    "relabel: no run": (["relabel", "suggest", "nosuch"], "no such run: nosuch"),
    "train: no corrections": (
        ["train", "DATA", "--recipe", "demo", "--set", "data.corrections=no.csv"],
        "cannot read data.corrections: no.csv",
    ),
    "train: no teacher": (
        ["train", "DATA", "--recipe", "demo", "--set", "train.clips=both", "--set", "noisy.teachers=nosuch"],
        "no such run: nosuch",
    ),
    "submission check: no file": (["submission", "check", "NOSUCH", "--data", "DATA"], "no such file: NOSUCH"),
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
        "cannot read the truth: NOSUCH (No such file or directory)",
    ),
    "show: no clip": (["show", "DATA", "nosuch.wav", "-o", "HOME/clips.png"], "no such clip: nosuch.wav"),
    "run: no folder": (["run", "NOSUCH", "--recipe", "demo"], "no such data folder"),
    "run: unknown key": (["run", "DATA", "--recipe", "demo", "--set", "train.epoch=1"], "unknown key: train.epoch (nearest: "),
    "demo: unknown key": (["demo", "--set", "train.epoch=1"], "unknown key: train.epoch (nearest: train.epochs)"),
    "recipe show: unknown": (["recipe", "show", "scrach"], "unknown recipe: 'scrach' (nearest: scratch)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(
    case: str, data: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    filled = [arg.replace("DATA", str(data)).replace("HOME", str(home)) for arg in args]
    monkeypatch.setenv("MELFOLD_HOME", str(home))
    if args[0] == "demo":
        filled += ["--home", str(home)]
    result = CliRunner().invoke(app, filled)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("melfold: ")
    assert message.replace("HOME", str(home)) in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_several_problems_are_several_lines(data: Path, home: Path) -> None:
    (data / "train_curated" / "c0000.wav").unlink()
    (data / "train_noisy" / "n0000.wav").unlink()
    result = CliRunner().invoke(app, ["check", str(data), "--home", str(home)])
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("melfold: ") for line in lines)
    assert "train_curated/c0000.wav" in lines[0]
    assert "train_noisy/n0000.wav" in lines[1]


def test_without_home_melfold_home_is_used(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MELFOLD_HOME", str(tmp_path / "elsewhere"))
    result = CliRunner().invoke(app, ["folds", str(data), "--n-folds", "2"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "elsewhere" / "folds" / "tiny_curated_2fold_grouped_seed42.csv").exists()
    assert "\nGroups: clips with identical audio\n" in result.output


def test_the_console_script_ends_with_the_same_code(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("melfold")
    done = subprocess.run(
        [script, "check", "nosuch"], capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("melfold: no such data folder: nosuch")
    assert len(done.stderr.splitlines()) == 1


def test_a_recipe_shows_its_reasons_and_what_was_set(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["recipe", "show", "demo", "--set", "train.lr=0.5"])
    assert result.exit_code == 0
    (tmp_path / "demo.toml").write_text(result.stdout)
    assert load_recipe(str(tmp_path / "demo.toml")) == load_recipe("demo", ["train.lr=0.5"])
    assert "lr = 0.5" in next(line for line in result.stdout.splitlines() if "set on the command line" in line)
    assert any(line.startswith("sr = 16000") and "the demo's recordings" in line for line in result.stdout.splitlines())
    assert "track scratch" in result.stdout


def test_recipes_are_compared_by_their_settings(home: Path) -> None:
    shown = CliRunner().invoke(app, ["recipe", "diff", "scratch", "small", "--home", str(home)]).stdout.splitlines()
    assert [line.split() for line in shown[:2]] == [["key", "scratch", "small"], ["model.name", '"convnext_tiny"', '"resnet10t"']]
    assert next(line.split() for line in shown if "train.lr" in line) == ["train.lr", "0.001", "0.002"]
    alike = CliRunner().invoke(app, ["recipe", "diff", "open", "open"]).stdout
    assert alike == "open and open have the same settings.\n"


def test_every_key_is_in_the_table_of_keys() -> None:
    lines = CliRunner().invoke(app, ["recipe", "keys"]).stdout.splitlines()
    assert {line.split()[0] for line in lines if not line.startswith(" ")} == {"key", *(key.name for key in recipe_keys())}


def test_every_shipped_recipe_is_listed_with_its_track() -> None:
    lines = CliRunner().invoke(app, ["recipe", "list"]).stdout.splitlines()
    tracks = {line.split()[0]: line.split()[1] for line in lines}
    assert tracks["open"] == tracks["article"] == "[open]"
    assert tracks["scratch"] == tracks["demo"] == tracks["quick"] == "[scratch]"


def test_a_clip_is_drawn(data: Path, tmp_path: Path, home: Path) -> None:
    args = ["show", str(data), "c0000.wav", "-o", str(tmp_path / "clips.png"), "--recipe", "demo", "--home", str(home)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "clips.png")
    assert (tmp_path / "clips.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_home_says_where_it_looked(home: Path) -> None:
    ledger = CliRunner().invoke(app, ["ledger", "show", "--home", str(home)])
    assert (ledger.exit_code, str(home / "submissions" / "ledger.csv") in ledger.stdout) == (0, True)
    as_json = CliRunner().invoke(app, ["ledger", "show", "--json", "--home", str(home)]).stdout
    assert json.loads(as_json) == {
        "ledger": str(home / "submissions" / "ledger.csv"),
        "rows": [],
        "select": [],
        "private_from_oof": None,
    }
    runs = CliRunner().invoke(app, ["runs", "--home", str(home)])
    assert str(home / "runs") in runs.stdout
    assert json.loads(CliRunner().invoke(app, ["runs", "--json", "--home", str(home)]).stdout) == []
    misplaced = CliRunner().invoke(app, ["runs", "--home", str(home), "rm", "x"])
    assert (misplaced.exit_code, misplaced.stderr) == (2, "melfold: options come last: melfold runs rm … --home HOME\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["check", "DATA"], "melfold: stopped.\n"),
        (["cache", "DATA", "--recipe", "demo"], "melfold: stopped. The same command continues where it stopped.\n"),
    ],
)
def test_ctrl_c_says_whether_the_command_continues(
    args: list[str], said: str, data: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("melfold.data.competition.load_competition", interrupted)
    monkeypatch.setattr("melfold.data.check.load_competition", interrupted)
    result = CliRunner().invoke(app, [*(arg.replace("DATA", str(data)) for arg in args), "--home", str(home)])
    assert (result.exit_code, result.stderr) == (130, said)


@pytest.mark.parametrize("module", ["melfold.cli.main", "typer", "melfold.cli.training"])
def test_ctrl_c_while_the_program_is_still_being_loaded_is_one_line(module: str, tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
class Watch:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Watch)
from melfold.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "melfold: stopped.\n")


@pytest.mark.parametrize(
    ("command", "named", "where"),
    [
        ("trian", "train", "melfold"),
        ("train", "DATA", "melfold train"),
        ("train here --fold 1", "--folds", "melfold train"),
        ("train here --folds", "--folds", "melfold"),
        ("train here --jobs many", "--jobs", "melfold train"),
    ],
)
def test_a_wrong_option_is_one_line(
    command: str, named: str, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["melfold", *command.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("melfold: ")
    assert named in line
    assert line.endswith(f" See `{where} --help`")


def test_no_command_shows_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["melfold"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "ensemble" in capsys.readouterr().out

"""Every README is true: each command, option, recipe, file and make target that it names exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

from melfold.cli.main import app
from melfold.recipe_text import recipe_keys
from melfold.recipes import recipe_names

REPO = Path(__file__).resolve().parents[1]
READMES = sorted(
    path
    for path in REPO.rglob("README.md")
    if not {"build", "runs", "cache"} & set(parts := path.relative_to(REPO).parts) and not any(p.startswith(".") for p in parts)
)
COMMAND = typer.main.get_command(app)


def spans(text: str) -> list[str]:
    """Code in a README: `spans` and indented or fenced lines, continued lines joined, comments cut off."""
    text = text.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    inline = re.findall(r"`([^`\n]+)`", text)
    return [re.split(r"\s+#|\s+->", span)[0].strip() for span in [*lines, *inline]]


def melfold_commands(path: Path) -> list[list[str]]:
    """The words after `melfold` of every command that a README names."""
    found = []
    for span in spans(path.read_text()):
        words = shlex.split(span.replace("…", ""), comments=False) if span.count("'") % 2 == 0 else span.split()
        if words and words[0] in ("melfold", ".venv/bin/melfold") and len(words) > 1 and "COMMAND" not in words:
            found.append(words[1:])
    return found


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that some words name, and the rest of them."""
    command: click.Command = COMMAND
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            break
        inner = command.commands.get(words[0])  # type: ignore[attr-defined]
        assert inner or command.name == "runs", f"no command {words[0]!r}"
        if not inner:
            break
        command, words = inner, words[1:]
    return command, words


@pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(REPO)))
def test_every_command_and_option_exists(path: Path) -> None:
    for words in melfold_commands(path):
        command, rest = resolve(words)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        for word in rest:
            if word.startswith("-") and not re.fullmatch(r"-\d.*", word):
                assert word.split("=")[0] in known, f"{path}: melfold {' '.join(words)}: no option {word}"


@pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(REPO)))
def test_every_setting_and_recipe_exists(path: Path) -> None:
    keys = {key.name for key in recipe_keys()}
    for span in spans(path.read_text()):
        for key in re.findall(r"--set '?([a-z_]+\.[a-z_]+)", span):
            assert key in keys or key == "section.key", f"{path}: no setting {key}"
        for name in re.findall(r"--recipe ([a-z_]+)\b(?!\.)", span):
            assert name in recipe_names(), f"{path}: no recipe {name}"


@pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(REPO)))
def test_every_link_and_make_target_exists(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (path.parent / target).exists(), f"{path}: {target}"
    makefile = (REPO / "Makefile").read_text()
    for target in re.findall(r"`?\bmake ([a-z]+)\b`", text):
        assert re.search(rf"^{target}:", makefile, re.M), f"{path}: make {target}"


def test_the_front_page_is_short_and_lines_are_readable() -> None:
    assert len((REPO / "README.md").read_bytes()) <= 8192
    for path in READMES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 160 or line.startswith("|"), f"{path}:{number}"

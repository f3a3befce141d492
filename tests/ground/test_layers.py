"""The order of floors and rooms: design.md's, held by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CLI = [f"cli.{m}" for m in ("output", "options", "recipes", "data", "scores", "training", "runs", "clean", "submissions")]
CLI += ["cli.ledger", "cli.kernels", "cli.weights", "cli.main", "__main__"]
FLOORS: list[list[str]] = [
    ["errors", "files", "artefacts", "config", "facts", "recipes", "compute", "probs", "metrics"],
    [f"data.{m}" for m in ("competition", "audio", "logmel", "cache", "folds", "check", "clips", "demo")],
    [
        f"learn.{m}"
        for m in (
            "fetch",
            "provenance",
            "runs",
            "start",
            "predictions",
            "devices",
            "augment",
            "losses",
            "normalise",
            "batches",
            "backbones",
        )
    ],
    [
        f"learn.{m}"
        for m in (
            "backbones",
            "weights",
            "model",
            "predict",
            "fold_data",
            "state",
            "train_log",
            "train",
            "noisy",
            "jobs",
            "launch",
        )
    ],
    [f"combine.{m}" for m in ("oof", "ensemble", "relabel", "check", "submission", "rebuild")],
    [f"kernels.{m}" for m in ("boot", "infer", "train")],
    [f"kaggle.{m}" for m in ("client", "ledger", "download", "pack", "built", "build", "sandbox", "rehearsal", "push", "submit")],
    [f"report.{m}" for m in ("clips", "ledger")],
    ["stages", "dry_run"],
    CLI,
]
ORDER = [room for floor in FLOORS for room in floor]
PACKAGE = Path(__file__).resolve().parents[2] / "src" / "melfold"


def rooms() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, packages' own `__init__` left out."""
    paths = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): ast.parse(p.read_text()) for p in paths}


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str, known: list[str]) -> str | None:
    """The room that `melfold.data.clips.ClipStore` stands in: `data.clips`."""
    inner = name.removeprefix("melfold.")
    return next((room for room in known if inner == room or inner.startswith(f"{room}.")), None) if inner != name else None


def test_every_room_has_its_place_in_the_house() -> None:
    assert set(rooms()) <= set(ORDER)


@pytest.mark.parametrize("room", sorted(rooms()))
def test_a_room_imports_only_from_rooms_listed_before_it(room: str) -> None:
    tree = rooms()[room]
    own = {r for name in imported(tree) if (r := room_of(name, ORDER))}
    assert [r for r in sorted(own) if ORDER.index(r) >= ORDER.index(room)] == []
    ours = {n for n in imported(tree) if n == "melfold" or n.startswith("melfold.")}
    lost = {n for n in ours if not room_of(n, ORDER)} - {f"melfold.{r}" for r in ORDER} - {"melfold.__version__"}
    assert not lost, "imports that no room answers to"


def test_packages_import_nothing() -> None:
    assert [p for p in PACKAGE.rglob("__init__.py") if list(imported(ast.parse(p.read_text())))] == []


@pytest.mark.parametrize("room", sorted(set(rooms()) - {*CLI, "kernels.boot"}))
def test_library_code_never_prints_and_knows_no_terminal(room: str) -> None:
    tree = rooms()[room]
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" not in calls
    assert not {name.split(".")[0] for name in imported(tree)} & {"typer", "rich", "click"}


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = "import sys, melfold.cli.main; print(' '.join(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "melfold.cli.main" in loaded
    assert not loaded & {"torch", "timm", "librosa", "sklearn", "pandas", "scipy", "matplotlib", "iterstrat", "soundfile"}


def test_the_table_rooms_load_without_torch_and_librosa() -> None:
    code = "import sys, melfold.stages, melfold.metrics, melfold.data.clips; print(' '.join(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "melfold.data.clips" in loaded
    assert not loaded & {"torch", "timm", "librosa", "sklearn", "typer", "rich", "iterstrat"}

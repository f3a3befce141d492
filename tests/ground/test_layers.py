"""The order of layers and modules: design.md's, held by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

LAYERS = """
: errors files artefacts train_config config facts recipe_text recipes compute probs metrics
data: competition audio logmel arrays cache groups duplicates folds check clips demo
learn: fetch provenance runs start predictions devices augment losses normalise phases shorten batches
learn: backbones weights model predict fold_data state train_log tracker train noisy launch
combine: oof search ensemble expect relabel check submission rebuild
kernels: boot infer train copy_csv
kaggle: command courier client ledger board standings download pack built build sandbox judge rehearsal push training
kaggle: reconcile submit
report: pages charts pictures media diagnosis training clips ledger run_page review_page home_page
: stages dry_run
cli: output options recipes data scores training runs clean submissions ledger kernels weights report main
: __main__
"""
"""A package and its modules in each line; a module imports only from those before it."""


ORDER = [
    f"{package}.{module}".removeprefix(".")
    for package, modules in (line.split(":") for line in LAYERS.strip().splitlines())
    for module in modules.split()
]
PACKAGE = Path(__file__).resolve().parents[2] / "src" / "melfold"


@cache
def modules() -> dict[str, ast.Module]:
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


def module_of(name: str, known: list[str]) -> str | None:
    """The module that holds `melfold.data.clips.ClipStore`: `data.clips`."""
    inner = name.removeprefix("melfold.")
    return (
        next((module for module in known if inner == module or inner.startswith(f"{module}.")), None) if inner != name else None
    )


def test_every_module_has_its_place() -> None:
    assert set(modules()) <= set(ORDER)


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_from_modules_listed_before_it(module: str) -> None:
    tree = modules()[module]
    own = {r for name in imported(tree) if (r := module_of(name, ORDER))}
    assert [r for r in sorted(own) if ORDER.index(r) >= ORDER.index(module)] == []
    ours = {n for n in imported(tree) if n == "melfold" or n.startswith("melfold.")}
    lost = {n for n in ours if not module_of(n, ORDER)} - {f"melfold.{r}" for r in ORDER} - {"melfold.__version__"}
    assert not lost, "imports of modules that do not exist"


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_and_its_functions_are_short(module: str) -> None:
    tree = modules()[module]
    assert max((node.end_lineno for node in tree.body), default=0) <= 350
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 60] == []


def test_packages_import_nothing() -> None:
    assert [p for p in PACKAGE.rglob("__init__.py") if list(imported(ast.parse(p.read_text())))] == []


@pytest.mark.parametrize("module", sorted({m for m in modules() if not m.startswith("cli.")} - {"__main__", "kernels.boot"}))
def test_library_code_never_prints_and_knows_no_terminal(module: str) -> None:
    tree = modules()[module]
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" not in calls
    assert not {name.split(".")[0] for name in imported(tree)} & {"typer", "rich", "click"}


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = "import sys, melfold.cli.main; print(' '.join(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "melfold.cli.main" in loaded
    assert not loaded & {"torch", "timm", "librosa", "sklearn", "pandas", "scipy", "matplotlib", "iterstrat", "soundfile"}


def test_the_table_modules_load_without_torch_and_librosa() -> None:
    code = "import sys, melfold.stages, melfold.metrics, melfold.data.clips; print(' '.join(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "melfold.data.clips" in loaded
    assert not loaded & {"torch", "timm", "librosa", "sklearn", "typer", "rich", "iterstrat"}

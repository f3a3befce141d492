"""Recipes: short lists of changes to a base, each with its reason; shipped as TOML, written by the user, or saved with a run."""

from __future__ import annotations

import copy
import csv
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from melfold.config import Recipe
from melfold.errors import MelfoldError
from melfold.facts import split_labels
from melfold.files import Home, read_json
from melfold.recipe_text import recipe_keys
from melfold.train_config import Phase


def recipe_names() -> list[str]:
    """The recipes that come with the kit."""
    return sorted(p.name.removesuffix(".toml") for p in _shipped().iterdir() if p.name.endswith(".toml"))


def load_recipe(name: str, sets: Iterable[str] = (), home: Home | None = None) -> Recipe:
    """Resolve a recipe.

    Args:
        name: a shipped recipe's name, the path of a `.toml` file, or else the name of a run in `home`, whose saved recipe it is.
        sets: changes as `section.key=value`; the value is TOML, or else a plain string.

    Raises:
        MelfoldError: an unknown recipe or key (the nearest is named), or a value that does not fit.
    """
    values: dict[str, Any] = {"name": Path(name).stem if name.endswith(".toml") else name}
    for key, (value, _) in explain_recipe(name, home).items():
        _put(values, _path(key), value)
    return _parse_with(values, sets, f"recipe {name}")


def change_recipe(recipe: Recipe, sets: Iterable[str]) -> Recipe:
    """A recipe with some changes, given as for `load_recipe`, with the same errors."""
    return _parse_with(recipe.model_dump(mode="json"), sets, f"recipe {recipe.name}")


def parse_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """A `Recipe` from nested values, with one line for each thing that does not fit."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise MelfoldError.many(_explain(e, source) for e in error.errors()) from None


def parse_set(item: str) -> tuple[str, Any]:
    """`section.key=value` -> the key, and the value as TOML reads it, or else as plain text.

    Raises:
        MelfoldError: no `=`, or nothing before it.
    """
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise MelfoldError("--set needs section.key=value", repr(item), "For example --set train.epochs=10")
    try:
        return key.strip(), tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text


def read_corrections(path: Path) -> dict[str, dict[str, Any]]:
    """fname -> labels, why and track, of a `corrections.csv`.

    Raises:
        MelfoldError: a missing file, other columns, a duplicate clip or one without labels.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames not in (["fname", "labels", "why"], ["fname", "labels", "why", "track"]):
                found = ",".join(reader.fieldnames or ["an empty file"])
                raise MelfoldError(f"{path} is no table of corrections", found, "Its columns are fname,labels,why,track")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise MelfoldError("cannot read data.corrections", f"{path} ({why})", "Fix the path or the file") from None
    corrections: dict[str, dict[str, Any]] = {}
    for row in rows:
        fname = row["fname"]
        if None in row or fname in corrections or not row["labels"]:
            why = "more cells than columns" if None in row else "duplicate clip" if fname in corrections else "no labels"
            raise MelfoldError(f"{path}: {why}", fname, "Put several labels in quotes; to leave a clip out use data.exclude")
        own = {"labels": split_labels(row["labels"]), "why": row["why"] or ""}
        corrections[fname] = own | ({"track": row["track"]} if row.get("track") else {})
    return corrections


def explain_recipe(name: str, home: Home | None = None, _above: tuple[str, ...] = ()) -> dict[str, tuple[Any, str]]:
    """`section.key` -> (value, reason) for all that a recipe and its bases set, the nearest file winning.

    The saved recipe of a run sets every key, without reasons.
    """
    if name in _above:
        raise MelfoldError("a recipe is its own base", " -> ".join((*_above, name)), "Fix `base` in one of them")
    may_be_run = name not in recipe_names() and not name.endswith(".toml") and "/" not in name
    if home and may_be_run and (saved := home.runs / name / "recipe.json").exists():
        content = {key: value for key, value in read_json(saved).items() if key != "name"}
        return {key: (value, "") for key, value in _flat(content).items()}
    text = _recipe_text(name, home)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MelfoldError(f"recipe {name} is not TOML", str(error), "Fix that line") from None
    base = content.pop("base", None)
    result = explain_recipe(base, home, (*_above, name)) if base else {}
    if "phases" in content:  # a list replaces the base's list as a whole
        result = {key: own for key, own in result.items() if key.split(".")[0] != "phases"}
    reasons = _reasons(text)
    return result | {key: (value, reasons.get(key, "")) for key, value in _flat(content).items()}


def _shipped() -> Any:
    return resources.files("melfold") / "recipes"


def _recipe_text(name: str, home: Home | None) -> str:
    if name.endswith(".toml"):
        try:
            return Path(name).read_text()
        except OSError as error:
            raise MelfoldError("cannot read a recipe", f"{name} ({error.strerror})", "Give the path of a .toml file") from None
    known = recipe_names()
    if name not in known:
        runs = f"; and there is no such run in {home.runs}" if home else ""
        fix = f"Known: {', '.join(known)}; or give a .toml file"
        raise MelfoldError("unknown recipe", f"{name!r}{nearest(name, known)}{runs}", fix)
    return (_shipped() / f"{name}.toml").read_text()


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of settings -> `section.key` -> value; phases -> `phases.0.key` -> value, or `phases.0` if that one has no key."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if key == "phases" and isinstance(value, list) and value:
            for number, phase in enumerate(value):
                flat |= _flat({f"phases.{number}": phase}) or {f"phases.{number}": {}}
        else:
            flat |= {f"{key}.{field}": inner for field, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _reasons(text: str) -> dict[str, str]:
    """`section.key` -> the comment that ends its line."""
    reasons: dict[str, str] = {}
    section, phases = "", 0
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("["):
            section = stripped.split("#")[0].strip().strip("[]") + "."
            if section == "phases.":
                section, phases = f"phases.{phases}.", phases + 1
            continue
        for at in (i for i, c in enumerate(stripped) if c == "#"):
            try:
                parsed = tomllib.loads(stripped[:at])
            except tomllib.TOMLDecodeError:
                continue  # this # is inside a string
            reasons |= {section + key: stripped[at + 1 :].strip() for key in parsed}
            break
    return reasons


def _parse_with(values: dict[str, Any], sets: Iterable[str], source: str) -> Recipe:
    sets = list(sets)
    for item in sets:
        key, value = parse_set(item)
        _put(values, _path(key), value)
    data = values.get("data")
    if isinstance(data, dict) and isinstance(data.get("corrections"), str):
        data["corrections"] = read_corrections(Path(data["corrections"]))
    return parse_recipe(values, source + (f" with --set {' '.join(sets)}" if sets else ""))


def _path(key: str) -> list[str]:
    """`section.key`, and all of the rest as one name: `data.exclude.0a1b2c3d.wav` has a dot of its own, maybe in quotes."""
    return [part.strip("'\"") for part in key.split(".", 3 if key.startswith("phases.") else 2)]


def _put(nested: Any, path: list[str], value: Any) -> None:
    last: str | int = path[-1]
    if path[0] == "phases" and len(path) > 1:
        phases, number = nested.setdefault("phases", []), path[1]
        if not isinstance(phases, list) or not number.isdecimal() or int(number) > len(phases):
            raise MelfoldError("no such phase", ".".join(path), "Phases count from 0; --set can add one at the end")
        phases += [{}] * (int(number) == len(phases))
        nested, path, last = (phases, [], int(number)) if len(path) == 2 else (phases[int(number)], path[2:], last)
    for part in path[:-1]:
        inner = nested.setdefault(part, {})
        if not isinstance(inner, dict):
            raise MelfoldError("unknown key", ".".join(path) + nearest(".".join(path), _known_keys()))
        nested = inner
    nested[last] = copy.deepcopy(value)


def _explain(error: Any, source: str) -> MelfoldError:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        if isinstance(error["input"], dict) and error["input"]:
            where += f".{next(iter(error['input']))}"  # of an unknown section
        return MelfoldError(f"{source}: unknown key", f"{where}{nearest(where, _known_keys())}", "See `melfold recipe keys`")
    found = f", found {error['input']!r}" if "found" not in error["msg"] and not isinstance(error["input"], dict) else ""
    return MelfoldError(f"{source}: {where}", error["msg"].removeprefix("Value error, ") + found)


def _known_keys() -> list[str]:
    return ["name", *(key.name for key in recipe_keys()), *(f"phases.0.{key}" for key in Phase.model_fields)]


def nearest(word: str, known: Iterable[str]) -> str:
    """` (nearest: X)`, of the known words, or nothing."""
    known = list(known)
    close = [key for key in known if key.startswith(word)] or difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f" (nearest: {close[0]})" if close else ""

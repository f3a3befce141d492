"""Recipes: short lists of changes on a base, each with its reason; shipped as TOML or written by the user."""

from __future__ import annotations

import copy
import csv
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from melfold.config import Recipe
from melfold.errors import MelfoldError
from melfold.facts import split_labels


def recipe_names() -> list[str]:
    """The recipes that come with the kit."""
    return sorted(p.name.removesuffix(".toml") for p in _shipped().iterdir() if p.name.endswith(".toml"))


def load_recipe(name: str, sets: Iterable[str] = ()) -> Recipe:
    """Resolve a recipe.

    Args:
        name: a shipped recipe's name, or the path of a `.toml` file.
        sets: changes as `section.key=value`; the value is TOML, or else a plain string.

    Raises:
        MelfoldError: an unknown recipe or key (the nearest is named), or a value that does not fit.
    """
    values = {key: value for key, (value, _) in explain_recipe(name).items()}
    sets = list(sets)
    for item in sets:
        key, value = _parse_set(item)
        values[key] = value
    nested: dict[str, Any] = {"name": Path(name).stem}
    for key, value in values.items():
        _put(nested, _path(key), value)
    data = nested.get("data")
    if isinstance(data, dict) and isinstance(data.get("corrections"), str):
        data["corrections"] = read_corrections(Path(data["corrections"]))
    return parse_recipe(nested, f"recipe {name}" + (f" with --set {' '.join(sets)}" if sets else ""))


def parse_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """A `Recipe` from nested values, with one line for each thing that does not fit."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise MelfoldError.many(_explain(e, source) for e in error.errors()) from None


def read_corrections(path: Path) -> dict[str, dict[str, Any]]:
    """fname -> labels and why, of a `corrections.csv`.

    Raises:
        MelfoldError: a missing file, other columns, a clip that stands twice or one without labels.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames != ["fname", "labels", "why"]:
                found = ",".join(reader.fieldnames or ["an empty file"])
                raise MelfoldError(f"{path} is no table of corrections", found, "Its columns are fname,labels,why")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MelfoldError("cannot read data.corrections", f"{path} ({error})", "Mend the path, or the file") from None
    corrections: dict[str, dict[str, Any]] = {}
    for row in rows:
        fname = row["fname"]
        if None in row or fname in corrections or not row["labels"]:
            why = "more cells than columns" if None in row else "stands twice" if fname in corrections else "no labels"
            raise MelfoldError(f"{path}: {why}", fname, "Put several labels in quotes; to leave a clip out use data.exclude")
        corrections[fname] = {"labels": split_labels(row["labels"]), "why": row["why"] or ""}
    return corrections


def explain_recipe(name: str, _above: tuple[str, ...] = ()) -> dict[str, tuple[Any, str]]:
    """`section.key` -> (value, reason) for all that a recipe and its bases set, the nearest file winning."""
    if name in _above:
        raise MelfoldError("a recipe is its own base", " -> ".join((*_above, name)), "Mend `base` in one of them")
    text = _recipe_text(name)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MelfoldError(f"recipe {name} is not TOML", str(error), "Mend that line") from None
    base = content.pop("base", None)
    result = explain_recipe(base, (*_above, name)) if base else {}
    reasons = _reasons(text)
    for key, value in content.items():
        if isinstance(value, dict):
            for field, inner in value.items():
                result[f"{key}.{field}"] = (inner, reasons.get(f"{key}.{field}", ""))
        else:
            result[key] = (value, reasons.get(key, ""))
    return result


def _shipped() -> Any:
    return resources.files("melfold") / "recipes"


def _recipe_text(name: str) -> str:
    if name.endswith(".toml"):
        try:
            return Path(name).read_text()
        except OSError as error:
            raise MelfoldError("cannot read a recipe", f"{name} ({error.strerror})", "Give the path of a .toml file") from None
    if name not in recipe_names():
        raise MelfoldError("unknown recipe", f"{name!r}{_nearest(name, recipe_names())}", f"Known: {', '.join(recipe_names())}")
    return (_shipped() / f"{name}.toml").read_text()


def _reasons(text: str) -> dict[str, str]:
    """`section.key` -> the comment that ends its line."""
    reasons, section = {}, ""
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("["):
            section = stripped.split("#")[0].strip().strip("[]") + "."
            continue
        for at in (i for i, c in enumerate(stripped) if c == "#"):
            try:
                parsed = tomllib.loads(stripped[:at])
            except tomllib.TOMLDecodeError:
                continue  # this # stands inside a string
            reasons |= {section + key: stripped[at + 1 :].strip() for key in parsed}
            break
    return reasons


def _parse_set(item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise MelfoldError("--set needs section.key=value", repr(item), "For example --set train.epochs=10")
    try:
        return key.strip(), tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text


def _path(key: str) -> list[str]:
    """`section.key`, and all of the rest as one name: `data.exclude.0a1b2c3d.wav` has a dot of its own, maybe in quotes."""
    return [part.strip("'\"") for part in key.split(".", 2)]


def _put(nested: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        inner = nested.setdefault(part, {})
        if not isinstance(inner, dict):
            raise MelfoldError("unknown key", ".".join(path) + _nearest(".".join(path), _known_keys()))
        nested = inner
    nested[path[-1]] = copy.deepcopy(value)


def _explain(error: Any, source: str) -> MelfoldError:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return MelfoldError(
            f"{source}: unknown key", f"{where}{_nearest(where, _known_keys())}", "See `melfold recipe show NAME`"
        )
    found = f", found {error['input']!r}" if "found" not in error["msg"] and not isinstance(error["input"], dict) else ""
    return MelfoldError(f"{source}: {where}", error["msg"].removeprefix("Value error, ") + found)


def _known_keys() -> list[str]:
    keys = []
    for name, field in Recipe.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += [f"{name}.{key}" for key in inner.model_fields]
        else:
            keys.append(name)
    return keys


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = [key for key in known if key.startswith(word)] or difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f" (nearest: {close[0]})" if close else ""

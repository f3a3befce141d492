"""Recipes as text: every key with its meaning, a recipe as TOML, and the difference of two."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from melfold.config import Recipe


@dataclass(frozen=True)
class Key:
    """A setting of a recipe: `section.key`, the values it takes, its default as TOML, and its meaning in a line."""

    name: str
    allowed: str
    default: str
    meaning: str


def recipe_keys() -> list[Key]:
    """Every setting of a recipe, in the order of the configuration."""
    keys = []
    for section, field in Recipe.model_fields.items():
        if section == "name":
            continue  # a file's name gives it
        inner, fields = field.annotation, {section: field}
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            fields = {f"{section}.{key}": own for key, own in inner.model_fields.items()}
        for key, own in fields.items():
            meaning = " ".join((own.description or "").split())
            keys.append(Key(key, _allowed(own.annotation, own.metadata), toml_value(own.default), meaning))
    return keys


def compare_recipes(a: Recipe, b: Recipe) -> list[tuple[str, str, str]]:
    """Every setting in which two recipes differ: its key, and both values as TOML, empty where one has none."""
    one, other = (_leaves(recipe.model_dump(mode="json", exclude={"name", "about"})) for recipe in (a, b))
    keys = [*one, *(key for key in other if key not in one)]
    rows = [(key, *(toml_value(own[key]) if key in own else "" for own in (one, other))) for key in keys]
    return [(key, a, b) for key, a, b in rows if a != b]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values -> dotted keys; a phase has its number as a key."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        inner = dict(enumerate(value)) if key == "phases" else value
        leaves |= _leaves(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return leaves


def recipe_toml(recipe: Recipe, reasons: Mapping[str, str]) -> str:
    """A recipe as a TOML file that gives every setting, so that it needs no base; `reasons` end the lines of their keys."""

    def line(key: str, value: Any, full: str) -> str:
        text = f"{_toml_key(key)} = {toml_value(value)}"
        return f"{text:<24} # {reasons[full]}" if reasons.get(full) else text

    top: list[str] = []
    tables: list[tuple[str, dict[str, Any], str]] = []  # heading, content, and how the keys of the reasons begin
    for section, value in recipe.model_dump(mode="json", exclude={"name"}).items():
        if section == "phases" and value:
            tables += [("[[phases]]", phase, f"phases.{number}.") for number, phase in enumerate(value)]
        elif section == "data":  # clips are tables of their own: on one line they could not be read
            for key, clips in value.items():
                why = reasons.get(f"data.{key}")
                tables.append((f"[data.{key}]" + (f"  # {why}" if why else ""), clips, ""))
        elif isinstance(value, dict):
            tables.append((f"[{section}]", value, f"{section}."))
        else:
            top.append(line(section, value, section))
    for heading, content, start in tables:
        top += [f"\n{heading}", *(line(key, value, start + key) for key, value in content.items())]
    return "\n".join(top) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML writes it; None is the text `none`."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_toml_key(key)} = {toml_value(own)}" for key, own in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    return json.dumps("none" if value is None else str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def _allowed(annotation: Any, metadata: Iterable[Any]) -> str:
    """The values of a field in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        own = inner[1]
        return _allowed(inner[0], getattr(own, "metadata", [own]))
    if origin is Literal:
        return " | ".join(inner)
    if origin is tuple:
        return f"list of {_allowed(inner[0], [])}"
    if origin is dict or annotation is dict:
        return "table"
    if inner:  # X | None
        return " | ".join("none" if part is type(None) else _allowed(part, []) for part in inner)
    words = {int: "whole number", float: "number", bool: "true | false", str: "text"}
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [f"{sign} {getattr(own, name):g}" for name, sign in signs.items() for own in metadata if hasattr(own, name)]
    return ", ".join([words.get(annotation, "table"), *limits])

"""From YAML to frozen dataclasses: reading, merging, and checking every key and type against the annotations."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from utils.foreign_files import ForeignFileError, read_yaml
from utils.text import printable

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""


def read_tree(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file as nested dicts, over the file that its top-level `base:` names.

    Args:
        path: the file.
        above: the files whose `base:` led here.

    Raises:
        ConfigError: no such file, no sections, or a file that is its own base.
    """
    if path.resolve() in above:
        chain = " -> ".join(file.name for file in (*above, path))
        raise ConfigError(f"{path}: is its own base ({chain}); remove one of these 'base:' lines")
    if not path.is_file():
        found = "is a folder, not a file" if path.is_dir() else "no such file"
        remedy = "give --config_path one of configs/*.yaml or your own"
        raise ConfigError(f"{path}: {found}; {f'correct base: in {above[-1]}' if above else remedy}")
    try:
        tree = read_yaml(path) or {}
    except ForeignFileError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}; wanted sections such as 'data:' and 'model:'")
    base = tree.pop("base", None)
    if base is not None and (not isinstance(base, str) or "\0" in base):
        raise ConfigError(f"{path}: base is {_shown(base)}; wanted the name of another YAML file")
    return tree if base is None else _merge(read_tree(path.parent / base, (*above, path.resolve())), tree)


def _merge(base: dict[str, Any], difference: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in difference.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def set_dotted(tree: dict[str, Any], dotted: str, value: Any, place: str) -> None:
    """Set `a.b.c` in nested dicts; ConfigError, naming `place`, where a section on the way is a value."""
    *sections, last = dotted.split(".")
    for name in sections:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise ConfigError(f"{place}: {name} is a value, not a section")
    tree[last] = value


def build(cls: type[T], tree: Any, place: str) -> T:
    """A dataclass from nested dicts, every key known and every value of its field's type, else ConfigError."""
    if tree is None:
        return cls()
    if not isinstance(tree, dict):
        raise ConfigError(f"{place or 'the file'} is {_shown(tree)}; wanted a section with keys")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        dotted = f"{place}.{key}" if place else str(key)
        if key not in hints:
            near = difflib.get_close_matches(str(key)[:100], hints, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key {printable(dotted)}; did you mean {place + '.' if place else ''}{near}?")
        values[key] = _coerce(hints[key], value, dotted)
    return cls(**values)


def _shown(value: Any) -> str:
    return printable(repr(value))


def choices(cls: type, name: str) -> tuple[str, ...]:
    """What a field annotated as a Literal may hold, in order."""
    return typing.get_args(typing.get_type_hints(cls)[name])


def _coerce(hint: Any, value: Any, place: str) -> Any:
    """`value` as the type that `hint` asks for; YAML 1.1 reads 1e-4 as text, so numbers in text are accepted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        shorthand = getattr(hint, "shorthand", None)
        is_short = shorthand is not None and value is not None and not isinstance(value, dict)
        return build(hint, {shorthand: value} if is_short else value, place)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(next(arg for arg in args if arg is not type(None)), value, place)
    if origin is Literal:
        by_lower = {arg.lower(): arg for arg in args}
        if str(value).lower() not in by_lower:
            near = difflib.get_close_matches(str(value).lower()[:100], by_lower, n=1)
            hint_text = f"; did you mean {by_lower[near[0]]}?" if near else ""
            raise ConfigError(f"{place} is {_shown(value)}; choose from {', '.join(args)}{hint_text}")
        return by_lower[str(value).lower()]
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise ConfigError(f"{place} is {_shown(value)}; wanted a list of {len(args)} values")
        return tuple(_coerce(args[0], item, f"{place}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{place} is {_shown(value)}; wanted names and values, as in {{name: value}}")
        return {str(key): _coerce(args[1], item, f"{place}.{printable(key)}") for key, item in value.items()}
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return os.path.expanduser(value)  # only paths begin with ~, and YAML does not expand it
    if hint in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = None
        if (
            number is not None
            and math.isfinite(number)
            and (hint is float or (number.is_integer() and abs(number) < 2**63))
        ):
            return hint(number)
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]
    raise ConfigError(f"{place} is {_shown(value)} ({type(value).__name__}); wanted {wanted}")

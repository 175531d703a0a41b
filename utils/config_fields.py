"""What fields of the configuration are made with: a mark of free settings, and the checks that sections share."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from utils.config_reader import ConfigError


def free(default: Any) -> Any:
    """A field whose value may differ between a checkpoint and a run that goes on from it (see `is_free`)."""
    return dataclasses.field(default=default, metadata={"free": True})


def is_free(section: Any, name: str) -> bool:
    """Whether a setting alters no weight's meaning, so that it need not be what a checkpoint was trained with.

    Args:
        section: a section of the configuration or its class.
        name: of a field; `lora.rank` means the field of the section within it.

    Raises:
        KeyError: the section has no such field.
    """
    first, _, rest = name.partition(".")
    found = {field.name: field for field in dataclasses.fields(section)}[first]
    if not rest:
        return found.metadata.get("free", False)
    hint = typing.get_type_hints(section if isinstance(section, type) else type(section))[first]
    inner = next(part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part))
    return is_free(inner, rest)


def positive(section: Any, place: str, *names: str) -> None:
    """Raise a ConfigError, naming `place` and the field, where one of these fields is 0 or less."""
    for name in names:
        if getattr(section, name) <= 0:
            raise ConfigError(f"{place}.{name} is {getattr(section, name)}; it must be positive")


def not_negative(section: Any, place: str, *names: str) -> None:
    """Raise a ConfigError, naming `place` and the field, where one of these fields is below 0."""
    for name in names:
        if getattr(section, name) < 0:
            raise ConfigError(f"{place}.{name} is {getattr(section, name)}; give 0 or more")

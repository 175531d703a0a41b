"""Checks of what users give as options of a simulator. `--env_options KEY=VALUE` reads YAML, so any type may come."""

from __future__ import annotations

from typing import Any


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ValueError, naming the option, unless its value is a whole number in this range, ends included."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}, must be a whole number {wanted}")


def check_switch(name: str, value: Any) -> None:
    """Raises ValueError, naming the option, unless its value is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; give true or false")


def check_text(name: str, value: Any) -> None:
    """Raises ValueError, naming the option, unless its value is text."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, which YAML does not read as text; put it in quotes: {name}='\"...\"'")

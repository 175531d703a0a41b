"""Text that came from outside, made fit for a terminal, a log, a model card or a table."""

from __future__ import annotations

import itertools
import re
import unicodedata
from typing import Any

MAX_QUOTED = 200  # characters of foreign text that a message quotes
MAX_CELL = 32_000  # characters of a table's cell
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
_MARKUP = set("\\`*_{}[]()<>#|!&~$")


def printable(value: Any, limit: int = MAX_QUOTED) -> str:
    """A value as one line of text without control characters, at most `limit` characters and " ..." behind them.

    Newlines, escape codes and what turns the direction of writing become `\\n`, `\\x1b`, `\\u202e`: they can neither
    forge a line of a log nor steer a terminal.
    """
    text = value if isinstance(value, str) else str(value)
    cut = text[:limit]
    if not cut.isprintable():
        cut = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
        cut, text = cut[:limit], text if len(cut) <= limit else text + cut[limit:]
    return cut if len(text) <= limit else f"{cut} ..."


def shortened(text: str, columns: int) -> str:
    """A text in one line, or its beginning and "…", at most `columns` wide; Chinese and Japanese characters are two."""
    text = " ".join(text.split())
    widths = [2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text]
    if sum(widths) <= columns:
        return text
    return text[: sum(end < columns for end in itertools.accumulate(widths))] + "…"


def markdown_text(value: Any, limit: int = MAX_QUOTED) -> str:
    """Foreign text for a Markdown file: shown as written, never a link, a heading, a table's edge or HTML."""
    return "".join(f"&#{ord(c)};" if c in "<>&" else f"\\{c}" if c in _MARKUP else c for c in printable(value, limit))


def csv_text(value: Any) -> Any:
    """A cell of a CSV file: text that a spreadsheet would take for a formula gets a leading apostrophe."""
    if not isinstance(value, str):
        return value
    text = printable(value, MAX_CELL)
    return f"'{text}" if value.startswith(_FORMULAS) else text


def file_stem(name: str) -> str:
    """A name that may hold slashes and spaces, as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name.removesuffix(".parquet")).strip("_")

"""Values of a block as numbers, truths and texts, as a mapping says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.convert.conversion import check_names
from data.convert.mapping import Term, Where
from data.convert.readers.base import Block, Episode
from utils.parquet_utils import DataError
from utils.text import printable


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block lies, for messages."""

    episode: str
    begin: int

    def step(self, i: int) -> str:
        return f"{self.episode} step {self.begin + i}"


def vector(terms: Sequence[Term], block: Block, length: int, column: str, where: Place) -> np.ndarray:
    parts = [_values(term, block, length, column, where) for term in terms]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _values(term: Term, block: Block, length: int, column: str, where: Place) -> np.ndarray:
    """(N, values) of one term."""
    if term.key is None:
        return np.tile(np.asarray(term.constant, dtype=np.float32), (length, 1))
    try:
        values = np.asarray(block[term.key]).reshape(length, -1)
    except ValueError:  # rows of different lengths
        values = np.zeros((length, 0), dtype=object)
    if values.dtype.kind == "b":
        values = values.astype(np.float32)
    if values.dtype.kind not in "fiu" or values.shape[1] == 0:
        raise DataError(f"{where.step(0)}: {column} is made from {term.key!r}, which is no array of numbers; {_CHOOSE}")
    if term.dims is not None:
        if max(term.dims) >= values.shape[1]:
            raise DataError(
                f"{where.step(0)}: {column} takes value {max(term.dims)} of {term.key!r}, which has {values.shape[1]}; "
                "correct the mapping"
            )
        first, count = term.dims[0], len(term.dims)
        in_a_row = term.dims == tuple(range(first, first + count))
        values = values[:, first : first + count] if in_a_row else values[:, list(term.dims)]
    if term.scale != 1 or term.offset != 0 or term.invert or term.clip:
        values = values * np.float64(term.scale) + term.offset
        values = 1 - values if term.invert else values
        values = np.clip(values, *term.clip) if term.clip else values
    return values


def truths(values: np.ndarray | list[Any], key: str, where: Place) -> np.ndarray:
    array = _numbers(values, key, where, "true or false")
    if (missing := np.flatnonzero(np.isnan(array))).size:
        raise DataError(f"{where.step(int(missing[0]))}: {key!r} is nan; wanted true or false a step")
    return array.astype(bool)


def where_true(values: np.ndarray | list[Any], where: Where, place: Place) -> np.ndarray:
    """bool (N,), the rows that a condition holds at.

    Raises:
        DataError: values that are neither true nor false, or of another kind than the one they should equal.
    """
    if where.equals is None:
        result = truths(values, where.key, place)
    elif isinstance(where.equals, str):
        remedy = f"; equals is the text {where.equals!r}, so write a number without quotes"
        texts = [
            v if isinstance(v, str) else text_of(v, where.key, place.step(i), remedy) for i, v in enumerate(values)
        ]
        result = np.array([text == where.equals for text in texts], dtype=bool)
    else:
        wanted = f"one number, as equals is {where.equals!r} (write a text in quotes),"
        result = _numbers(values, where.key, place, wanted) == where.equals
    return ~result if where.invert else result


def _numbers(values: np.ndarray | list[Any], key: str, where: Place, wanted: str) -> np.ndarray:
    """(N,), the number or truth of each step."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.size != len(array):
        raise DataError(f"{where.step(0)}: {key!r} is {array.dtype} {array.shape}; wanted {wanted} a step")
    return array.reshape(-1)


def text_of(value: Any, key: str, where: str, remedy: str = "") -> str:
    """Bytes in UTF-8, or code points padded with zeros, as text.

    Raises:
        DataError: it is no text, a single number among others, naming the `remedy` or asking for another key.
    """
    try:
        if isinstance(value, bytes):
            return value.rstrip(b"\0").decode()
        array = np.asarray(value)
        if array.dtype.kind == "S" and array.size == 1:
            return bytes(array.item()).decode()
        is_number = array.size == 1
        if array.dtype == np.uint8 and not is_number:
            return array.tobytes().rstrip(b"\0").decode()
        if array.dtype.kind in "iu" and not is_number:
            return "".join(map(chr, array[array != 0].tolist()))
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: {key!r} is no text in UTF-8 ({printable(error)}); {_CHOOSE}") from None
    raise DataError(f"{where}: {key!r} is {printable(repr(value), 60)}; wanted a text{remedy or f'; {_CHOOSE}'}")


_CHOOSE = "choose another key (--inspect lists them)"


def attribute_value(attributes: dict[str, Any], name: str, json_key: str | None, episode: Episode) -> Any:
    """An attribute, or what its JSON has under a key; bytes as text."""
    check_names([name], list(attributes), "attribute", episode.name)
    value = attributes[name]
    if isinstance(value, np.ndarray | np.generic):
        value = value.item() if value.size == 1 else value.tolist()
    if isinstance(value, bytes):
        value = text_of(value, f"@{name}", episode.name)
    if json_key is None:
        return value
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise DataError(f"{episode.name}: attribute {name!r} is no JSON; leave out :{json_key}") from None
    if not isinstance(value, dict) or json_key not in value:
        found = ", ".join(map(str, value)) if isinstance(value, dict) else "no object"
        raise DataError(f"{episode.name}: attribute {name!r} has no {json_key!r} (found: {printable(found)})")
    return value[json_key]


def attribute_text(attributes: dict[str, Any], name: str, json_key: str | None, episode: Episode) -> str:
    """The text of an attribute, or what its JSON has under a key; a list of letters is joined, quotes are taken off."""
    value = attribute_value(attributes, name, json_key, episode)
    if isinstance(value, list) and value and all(isinstance(letter, str) for letter in value):
        value = "".join(value)
    if not isinstance(value, str):
        raise DataError(f"{episode.name}: attribute {name!r} is {printable(repr(value), 60)}; wanted a text")
    return value.strip().strip('"')

"""Odd values, damaged bytes and what a wrong reading raises: what benchmarks/odd_data.py's kinds share."""

from __future__ import annotations

import json
import math
import pathlib
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from benchmarks import crafted_files
from benchmarks.crafted_files import places

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures"
DIM = 3  # of states and actions
ODD = (
    None, True, False, 0, 1, -1, 2, 7, 1.5, 1e30, -1e30, 2**31, 2**63, 2**70, math.nan, math.inf, "", "x", "0", " \n",
    "\u0000", "\u00fc" * 50, "~", "../..", [], [[]], {}, [1], ["a", None], {"a": 1}, [math.nan], "{episode_index}",
)  # fmt: skip
Run = Callable[[], None]
Kind = Callable[[random.Random, pathlib.Path], Run]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, cut, doubled or put in."""
    try:
        return crafted_files.damaged(rng, data)
    except ValueError:  # nothing is left to change
        return b""


class WrongRowError(AssertionError):
    """A row was accepted that is not what the files hold."""


def require(fact: Any, what: str) -> None:
    """Raise a WrongRowError unless something holds."""
    if not fact:
        raise WrongRowError(what)


def replaced(table: pa.Table, i: int, name: str, values: list[Any], types: list[pa.DataType]) -> pa.Table:
    """A table with a column of the first of these types that can hold the values."""
    for kind in types:
        try:
            return table.set_column(i, name, pa.array(values, kind))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            continue
    return table


def odd_json(rng: random.Random, text: str) -> str:
    """JSON, or lines of it, with an odd value at one place, or damaged text."""
    if rng.random() < 0.3:
        return damaged(rng, text.encode()).decode("utf-8", errors="surrogateescape")
    lines = text.splitlines() if text.count("\n{") else [text]
    i = rng.randrange(len(lines))
    lines[i] = json.dumps(with_odd(rng, json.loads(lines[i])))
    if rng.random() < 0.1:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return "\n".join(lines) + "\n"


def with_odd(rng: random.Random, value: Any) -> Any:
    """A nested value with an odd one at a place, or an entry less."""
    place = rng.choice([(), *places(value)])
    if not place:
        return rng.choice(ODD)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if rng.random() < 0.25:
        del inner[place[-1]]
    else:
        inner[place[-1]] = rng.choice(ODD)
    return value

"""Which rows of an episode stay, block by block: all but the first and the last, with the action of a later one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data.convert.readers.base import Block

# Columns of a block under way, beside those of cameras.
STATE, ACTION, PROMPT, TERMINATED, KEPT, TIME = "state", "action", "prompt", "terminated", "kept", "time"
CORRECTED = "corrected"
OF_THE_ACTION = (ACTION, CORRECTED)  # what `action_shift` moves


def rows_of(block: Block, rows: np.ndarray | slice) -> Block:
    """Some rows of a block."""
    chosen = range(len(block[PROMPT]))[rows] if isinstance(rows, slice) else rows.tolist()
    return {
        name: values[rows] if isinstance(values, np.ndarray) else [values[i] for i in chosen]
        for name, values in block.items()
    }


def _joined(first: Block | None, second: Block) -> Block:
    if first is None or not len(first[PROMPT]):
        return second
    return {
        name: np.concatenate([first[name], values]) if isinstance(values, np.ndarray) else first[name] + values
        for name, values in second.items()
    }


def without_last(blocks: Iterator[Block], count: int) -> Iterator[Block]:
    """The last rows left out; the flag of the very last row goes to the last that stays."""
    if not count:
        yield from blocks
        return
    held: Block | None = None
    for block in blocks:
        block = _joined(held, block)
        split = max(len(block[PROMPT]) - count, 0)
        block[TERMINATED] = np.full(len(block[TERMINATED]), block[TERMINATED][-1])
        if split > 1:  # one row stays behind, to carry the flag
            yield rows_of(block, slice(0, split - 1))
        held = rows_of(block, slice(max(split - 1, 0), None))
    if held is not None and len(held[PROMPT]) > count:
        yield rows_of(held, slice(0, len(held[PROMPT]) - count))


def shifted(blocks: Iterator[Block], count: int) -> Iterator[Block]:
    """Row t with the action, and what is said of it, of row t + count; the last rows have none and are left out."""
    if not count:
        yield from blocks
        return
    held: Block | None = None
    for block in blocks:
        held = _joined(held, block)
        split = len(held[PROMPT]) - count
        if split > 1:  # one row stays behind, for the last row's flag
            yield rows_of(held, slice(0, split - 1)) | _of_action(held, slice(count, count + split - 1))
            held = rows_of(held, slice(split - 1, None))
    if held is not None and (split := len(held[PROMPT]) - count) > 0:
        flags = np.full(split, held[TERMINATED][-1])
        yield rows_of(held, slice(0, split)) | _of_action(held, slice(count, None)) | {TERMINATED: flags}


def _of_action(block: Block, rows: slice) -> Block:
    return {name: block[name][rows] for name in OF_THE_ACTION if name in block}


def without_first(blocks: Iterator[Block], count: int) -> Iterator[Block]:
    """The first rows left out, and blocks without rows."""
    for block in blocks:
        if count:
            length = len(block[PROMPT])
            block = rows_of(block, slice(min(count, length), None))
            count -= min(count, length)
        if len(block[PROMPT]):
            yield block

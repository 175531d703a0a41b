"""Reading the schema of docs/data_format.md episode by episode: numbers at once, images as they are needed."""

from __future__ import annotations

import bisect
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from utils.parquet_utils import DataError, open_parquet, require_columns, vectors

ROWS_PER_BLOCK = 64
READ_BUFFER = 2**20  # bytes
FLAGS = ("is_first", "is_last", "is_terminal")


@dataclass(frozen=True)
class Span:
    """Rows `begin` to `end` of one file."""

    path: Path
    begin: int
    end: int


@dataclass(frozen=True)
class Episode:
    """One episode without its images. T steps."""

    index: int
    begin: int  # first row of all
    spans: tuple[Span, ...]
    state: np.ndarray  # (T, state_dim) float32
    action: np.ndarray  # (T, per_action_dim) float32
    is_terminal: np.ndarray  # (T,) bool
    prompts: list[str]  # T

    def __len__(self) -> int:
        return len(self.prompts)


def read_episodes(files: Sequence[Path]) -> list[Episode]:
    """Everything but the images of a list of files, a hundred bytes or so for each step.

    Args:
        files: in order; an episode may go on from one file into the next.

    Raises:
        DataError: a file breaks the schema, or widths differ between files.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("state", "action", *FLAGS)}
    prompts: list[str] = []
    starts = [0]
    for path in files:
        with open_parquet(path) as file:
            require_columns(file, path, [*parts, "prompt"])
            table = file.read(columns=[*parts, "prompt"])
        for name in ("state", "action"):
            width = parts[name][0].shape[1] if parts[name] else len(table[name][0].as_py() or ())
            parts[name].append(vectors(table[name], width, path, 0, f"{name}|the first row's width,"))
        for name in FLAGS:
            parts[name].append(_flags(table[name], path, name))
        for row, prompt in enumerate(table["prompt"].to_pylist()):
            if not prompt or not prompt.strip():
                raise DataError(f"{path} row {row}: prompt is {prompt!r}; every time step needs its instruction")
            prompts.append(sys.intern(prompt))
        starts.append(starts[-1] + len(table))
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    begins = _episode_begins(*(columns[name] for name in FLAGS), files, starts)
    return [
        Episode(
            index=index,
            begin=begin,
            spans=tuple(_spans(files, starts, begin, end)),
            state=columns["state"][begin:end],
            action=columns["action"][begin:end],
            is_terminal=columns["is_terminal"][begin:end],
            prompts=prompts[begin:end],
        )
        for index, (begin, end) in enumerate(itertools.pairwise([*begins, len(prompts)]))
    ]


def _flags(column: pa.ChunkedArray, path: Path, name: str) -> np.ndarray:
    if not pa.types.is_boolean(column.type) or column.null_count:
        raise DataError(f"{path}: {name!r} is {column.type} with {column.null_count} nulls; wanted true or false")
    return column.to_numpy()


def _spans(files: Sequence[Path], starts: list[int], begin: int, end: int) -> Iterator[Span]:
    """Where the rows `begin` to `end` of all files lie in each."""
    for i in range(bisect.bisect_right(starts, begin) - 1, bisect.bisect_left(starts, end)):
        yield Span(files[i], max(begin - starts[i], 0), min(end, starts[i + 1]) - starts[i])


def _episode_begins(
    first: np.ndarray, last: np.ndarray, terminal: np.ndarray, files: Sequence[Path], starts: Sequence[int]
) -> list[int]:
    """First rows of the episodes, or a DataError at the first row whose flags contradict each other."""
    after_last = np.concatenate([[True], last[:-1]])
    wrong = np.flatnonzero((first != after_last) | (terminal & ~last))
    if len(wrong) or not last[-1]:
        row = int(wrong[0]) if len(wrong) else len(last) - 1
        file = int(np.searchsorted(starts, row, side="right")) - 1
        raise DataError(
            f"{files[file]} row {row - starts[file]}: is_first is {bool(first[row])}, is_last {bool(last[row])}, "
            f"is_terminal {bool(terminal[row])}, is_last of the row before {bool(after_last[row])}; an episode runs "
            "from is_first to is_last: mend the flags"
        )
    return np.flatnonzero(first).tolist()


def open_streaming(path: Path) -> pq.ParquetFile:
    """Open a file whose image columns are read block by block; otherwise pyarrow first fetches them whole.

    Raises:
        DataError: see `open_parquet`.
    """
    with open_parquet(path) as file:
        metadata = file.metadata
    return pq.ParquetFile(path, metadata=metadata, pre_buffer=False, buffer_size=READ_BUFFER)


def read_images(spans: Sequence[Span], camera: str) -> Iterator[bytes]:
    """The encoded frames of one camera (`image_1` or `image_2`), read as they are asked for.

    Raises:
        DataError: there is no such column, or a frame is null.
    """
    for span in spans:
        with open_streaming(span.path) as file:
            names = [name for name in (camera, f"{camera}_bytes") if name in file.schema_arrow.names]
            require_columns(file, span.path, names or [camera])
            first = 0  # of the row group
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first < span.end and first + rows > span.begin:
                    for batch in file.iter_batches(ROWS_PER_BLOCK, row_groups=[group], columns=names):
                        yield from _chosen(batch.column(0), first, span, camera)
                        first += batch.num_rows
                else:
                    first += rows


def _chosen(column: pa.Array, first: int, span: Span, camera: str) -> Iterator[bytes]:
    """Those frames of a block that lie in the span."""
    begin, end = max(span.begin - first, 0), min(span.end - first, len(column))
    if begin >= end:
        return
    column = column.slice(begin, end - begin)
    for i, value in enumerate(column.to_pylist()):
        value = value["bytes"] if isinstance(value, dict) else value
        if value is None:
            raise DataError(
                f"{span.path} row {first + begin + i}: {camera} is null; LeRobot has no absent frames, so leave that "
                "camera out (--cameras)"
            )
        yield value

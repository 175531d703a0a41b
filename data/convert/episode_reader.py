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

from data.schema import (
    ACTION,
    FLAGS,
    PROMPT,
    STATE,
    as_list,
    camera_column,
    encoded_frames,
    episode_starts,
    flags,
    missing_camera,
    prompts,
    require_frames,
    vector_width,
    vectors,
)
from utils.parquet_utils import DataError, batches, open_parquet

ROWS_PER_BLOCK = 64  # of images
ROWS_PER_READ = 16384  # of numbers


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
    begin: int  # its first row, counted over all files
    spans: tuple[Span, ...]
    states: dict[str, np.ndarray]  # of each column of the state (T, width) float32
    action: np.ndarray  # (T, per_action_dim) float32
    is_terminal: np.ndarray  # (T,) bool
    prompts: list[str]  # T
    labels: dict[str, np.ndarray]  # of each of LABELS that was asked for (T,) bool

    def __len__(self) -> int:
        return len(self.prompts)


def read_episodes(
    files: Sequence[Path], state_columns: Sequence[str] = (STATE,), labels: Sequence[str] = ()
) -> list[Episode]:
    """Everything but the images of a list of files, a hundred bytes or so for each step.

    Args:
        files: in order; an episode may go on from one file into the next.
        state_columns: what makes up the state.
        labels: those of LABELS that are read.

    Raises:
        DataError: a file breaks the schema, or widths differ between files.
    """
    numeric = (*state_columns, ACTION)
    bools = (*FLAGS, *labels)
    required = [*numeric, *bools, PROMPT]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*numeric, *bools)}
    all_prompts: list[str] = []
    file_starts = [0]
    for path in files:
        with open_parquet(path) as file:
            table = pa.Table.from_batches([batch for _, batch in batches(file, path, required, ROWS_PER_READ)])
        for name in numeric:
            column = as_list(table[name])
            width = parts[name][0].shape[1] if parts[name] else vector_width(column, name, path)
            parts[name].append(vectors(column, name, width, path, 0, width_from=None))
        for name in bools:
            parts[name].append(flags(table[name], name, path, 0))
        all_prompts += map(sys.intern, prompts(table[PROMPT], path, 0))
        file_starts.append(file_starts[-1] + len(table))
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    starts = episode_starts(columns, files, file_starts[:-1]).tolist()
    return [
        Episode(
            index=index,
            begin=begin,
            spans=tuple(_spans(files, file_starts, begin, end)),
            states={name: columns[name][begin:end] for name in state_columns},
            action=columns["action"][begin:end],
            is_terminal=columns["is_terminal"][begin:end],
            prompts=all_prompts[begin:end],
            labels={name: columns[name][begin:end] for name in labels},
        )
        for index, (begin, end) in enumerate(itertools.pairwise(starts))
    ]


def _spans(files: Sequence[Path], file_starts: list[int], begin: int, end: int) -> Iterator[Span]:
    """Where the rows `begin` to `end` of all files lie in each."""
    for i in range(bisect.bisect_right(file_starts, begin) - 1, bisect.bisect_left(file_starts, end)):
        yield Span(files[i], max(begin - file_starts[i], 0), min(end, file_starts[i + 1]) - file_starts[i])


def read_images(spans: Sequence[Span], camera: str) -> Iterator[bytes]:
    """The encoded frames of one camera, read as they are asked for.

    Raises:
        DataError: there is no such column, or a frame is null.
    """
    for span in spans:
        with open_parquet(span.path) as file:
            present = file.schema_arrow.names
            column = camera_column(camera, present, span.path)
            if column is None:
                raise DataError(f"{span.path}: {missing_camera(camera, present)}; name its cameras with --cameras")
            for row, batch in batches(file, span.path, [column], ROWS_PER_BLOCK, first_row=span.begin):
                if row >= span.end:
                    break
                frames = encoded_frames(batch.column(0), column, span.path).slice(0, span.end - row)
                if frames.null_count:
                    i = row + int(np.flatnonzero(np.asarray(frames.is_null()))[0])
                    raise DataError(
                        f"{span.path} row {i}: {camera} is null; LeRobot has no absent frames, so leave that camera "
                        "out (--cameras)"
                    )
                require_frames(frames, column, span.path, row, always=True)
                yield from frames.to_pylist()

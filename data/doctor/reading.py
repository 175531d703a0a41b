"""Reads raw Parquet into `Rows` without stopping at a fault.

`EpisodeStore` refuses a file at its first fault; this reader goes on, and marks what it could not read, so that one
look finds everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.doctor.findings import Findings
from data.doctor.rows import EMPTY, INVALID, NO_INDEX, NULL, UNREAD, Rows, common_width, hard_starts
from data.schema import (
    ACTION,
    FLAGS,
    INDICES,
    LABELS,
    MAIN_CAMERA,
    PROMPT,
    STATE,
    TIMESTAMP,
    ColumnType,
    as_list,
    camera_columns,
    column_type,
    image_columns,
    is_state,
    missing_camera,
)
from data.tables import Table, open_table
from utils.parquet_utils import READ_ERRORS, STREAM_BUFFER, DataError, Source, one_line, open_bytes, stream_batches
from utils.recordings import LeRobotFolder, Recording

ROWS_PER_BATCH = 8192


class _Vector:
    """A vector column while its width is not known yet: lengths and values one after the other."""

    def __init__(self, rows: int) -> None:
        self.lengths = np.full(rows, UNREAD, dtype=np.int32)
        self.values: list[np.ndarray] = []
        self.imprecise: list[np.ndarray] = []

    def put(self, first: int, array: pa.Array) -> None:
        array = as_list(array)
        lengths = np.asarray(array.value_lengths().fill_null(0)).astype(np.int32)
        wide = array.flatten()
        values = np.asarray(wide.cast(pa.float32(), safe=False).fill_null(float("nan")), dtype=np.float32)
        self.values.append(values)
        if not (pa.types.is_float32(wide.type) or pa.types.is_float16(wide.type)):
            exact = np.asarray(wide.cast(pa.float64(), safe=False).fill_null(0.0))
            lost = (np.abs(exact) >= 2**24) & np.isfinite(values) & (values.astype(np.float64) != exact)
            row = np.repeat(np.arange(len(lengths)), lengths)
            self.imprecise.append(first + np.unique(row[lost]))
        lengths[lengths == 0] = NULL
        self.lengths[first : first + len(lengths)] = lengths

    def matrix(self, width: int) -> np.ndarray:
        """float32 (rows, width); NaN in rows of another width."""
        values = np.concatenate(self.values) if self.values else np.empty(0, dtype=np.float32)
        fits = self.lengths == width
        if fits.all():
            return values.reshape(-1, width)
        result = np.full((len(fits), width), np.nan, dtype=np.float32)
        offsets = np.cumsum(np.maximum(self.lengths, 0)) - np.maximum(self.lengths, 0)
        result[fits] = values[offsets[fits][:, None] + np.arange(width)]
        return result


@dataclass
class _File:
    """One file's columns; `present` are the names of all of them."""

    rows: int
    present: list[str]
    cameras: dict[str, str]
    flags: dict[str, np.ndarray]  # and labels
    prompt: np.ndarray
    vectors: dict[str, _Vector]
    indices: dict[str, np.ndarray]
    timestamp: np.ndarray
    has_timestamp: bool


def open_raw(path: Recording) -> pq.ParquetFile | Table:
    """Open for streaming: batches are read through a small buffer, not a whole column chunk at a time."""
    if isinstance(path, LeRobotFolder):
        return open_table(path)
    return pq.ParquetFile(
        open_bytes(path), buffer_size=STREAM_BUFFER, pre_buffer=False, page_checksum_verification=True
    )


def stream(
    file: pq.ParquetFile | Table, path: Recording, column: str, batch_size: int, findings: Findings
) -> Iterator[tuple[int, pa.Array]]:
    """(first row, values) of one column, batch by batch; where it can't be read further, `corrupt_data` and the end."""
    first = 0
    try:
        read = stream_batches if isinstance(file, pq.ParquetFile) else type(file).batches
        for first, batch in read(file, [column], batch_size):
            yield first, batch.column(0)
            first += batch.num_rows
    except READ_ERRORS as error:
        message = f"column {column!r} can't be read from here on ({one_line(error)})"
        findings.add("corrupt_data", message, file=path, row=first)


@dataclass(frozen=True)
class Wanted:
    """Which columns are looked for.

    Attributes:
        cameras: that the config reads; without a config every file's own.
        state_columns: that make up the state.
        needs_state: whether a file without them is at fault.
    """

    cameras: tuple[str, ...] = ()
    state_columns: tuple[str, ...] = (STATE,)
    needs_state: bool = True


def read_rows(files: Sequence[tuple[Source, str]], findings: Findings, wanted: Wanted | None = None) -> Rows:
    """Read every file's columns except images; faults of files and columns become findings.

    Args:
        files: (path, split) in order, the training split first.
        findings: receives `unreadable_file`, `empty_file`, `missing_column`, `ambiguous_image_column`,
            `wrong_type` and `corrupt_data`.
        wanted: columns of the config; None: those that every config has.
    """
    wanted = wanted or Wanted()
    known: dict[str, int] = {}
    parts, opened = [], []
    for path, _ in files:
        part, readable = _read_file(path, known, findings, wanted)
        parts.append(part)
        opened.append(readable)
    with_main = [bool(camera_columns(MAIN_CAMERA, part.present)) for part in parts]
    if any(with_main) and not wanted.cameras:  # a config would say whether it reads that camera
        for (path, _), part, has_main in zip(files, parts, with_main, strict=True):
            if part.cameras and not has_main:
                findings.add("missing_column", missing_camera(MAIN_CAMERA, part.present), file=path)
    sizes = [part.rows for part in parts]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    file_of = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
    names = [*wanted.state_columns, ACTION]
    lengths = {name: np.concatenate([part.vectors[name].lengths for part in parts]) for name in names}
    if not wanted.needs_state:
        lengths = {name: found for name, found in lengths.items() if name == ACTION or (found != UNREAD).any()}
    vectors, imprecise = {}, {}
    for name in lengths:
        width = common_width(lengths[name])
        vectors[name] = np.concatenate([part.vectors[name].matrix(width) for part in parts])
        lost = [np.empty(0, dtype=np.int64)]
        for start, part in zip(starts[:-1], parts, strict=True):
            lost += [start + rows for rows in part.vectors[name].imprecise]
        imprecise[name] = np.concatenate(lost)
    rows = Rows(
        files=[path for path, _ in files],
        splits=[split for _, split in files],
        schema_ok=np.array(opened),
        file_starts=starts,
        cameras=[part.cameras for part in parts],
        flags={name: np.concatenate([part.flags[name] for part in parts]) for name in FLAGS},
        labels={name: np.concatenate([part.flags[name] for part in parts]) for name in LABELS},
        prompts=list(known),
        prompt=np.concatenate([part.prompt for part in parts]),
        lengths=lengths,
        vectors=vectors,
        imprecise=imprecise,
        indices={name: np.concatenate([part.indices[name] for part in parts]) for name in INDICES},
        timestamp=np.concatenate([part.timestamp for part in parts]),
        has_timestamp=np.array([part.has_timestamp for part in parts]),
        file_of=file_of,
        episode=np.zeros(len(file_of), dtype=np.int64),
        episode_starts=np.array([0, len(file_of)], dtype=np.int64),
    )
    _segment(rows)
    return rows


def _segment(rows: Rows) -> None:
    """Cut rows into episodes as well as the flags allow."""
    if not len(rows):
        rows.episode_starts = np.array([0], dtype=np.int64)
        return
    first, last = rows.flags["is_first"], rows.flags["is_last"]
    begins = first == 1
    begins[1:] |= last[:-1] == 1
    begins[hard_starts(rows)] = True
    rows.episode_starts = np.concatenate([np.flatnonzero(begins), [len(rows)]]).astype(np.int64)
    number = np.cumsum(begins) - 1
    in_val = np.array([split == "val" for split in rows.splits])[rows.file_of]
    rows.episode = np.where(in_val, number - (number[in_val][0] if in_val.any() else 0), number)


def _read_file(path: Source, known: dict[str, int], findings: Findings, wanted: Wanted) -> tuple[_File, bool]:
    try:
        file = open_raw(path)
        schema, count = _schema_and_rows(file)
    except DataError as error:
        findings.add("unreadable_file", one_line(error), file=path)
        return _blank(0, wanted), False
    except READ_ERRORS as error:
        findings.add("unreadable_file", f"not a readable Parquet file ({one_line(error)})", file=path)
        return _blank(0, wanted), False
    if count == 0:
        findings.add("empty_file", "the file holds no rows", file=path)
        return _blank(0, wanted), True
    part = _blank(count, wanted)
    cameras = _cameras(schema, wanted)
    columns = _check_columns(schema, path, findings, wanted, cameras)
    part.present = schema.names
    part.cameras = {camera: columns[camera] for camera in cameras if camera in columns}
    for name in part.vectors:
        if name in columns:
            for first, array in stream(file, path, name, ROWS_PER_BATCH, findings):
                part.vectors[name].put(first, array)
    for name in (*FLAGS, *LABELS):
        if name in columns:
            for first, array in stream(file, path, name, ROWS_PER_BATCH, findings):
                values = np.asarray(array.cast(pa.int8()).fill_null(NULL))
                part.flags[name][first : first + len(values)] = values
    if PROMPT in columns:
        for first, array in stream(file, path, PROMPT, ROWS_PER_BATCH, findings):
            part.prompt[first : first + len(array)] = _prompt_codes(array, known)
    for name in INDICES:
        if name in columns:
            for first, array in stream(file, path, name, ROWS_PER_BATCH, findings):
                part.indices[name][first : first + len(array)] = _integers(array)
    if TIMESTAMP in columns:
        part.has_timestamp = True
        for first, array in stream(file, path, TIMESTAMP, ROWS_PER_BATCH, findings):
            part.timestamp[first : first + len(array)] = _seconds(array)
        if pa.types.is_integer(schema.field(TIMESTAMP).type):
            part.timestamp /= _ticks_per_second(part.timestamp)
    return part, True


def _schema_and_rows(file: pq.ParquetFile | Table) -> tuple[pa.Schema, int]:
    """The columns, those of video cameras among them, and the number of rows; a ValueError where that contradicts."""
    if not isinstance(file, pq.ParquetFile):
        return file.schema_with_video, file.num_rows
    count = file.metadata.num_rows
    if count != sum(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)):
        raise ValueError("the row groups hold another number of rows than the file")
    return file.schema_arrow, count


def _blank(rows: int, wanted: Wanted) -> _File:
    return _File(
        rows=rows,
        present=[],
        cameras={},
        flags={name: np.full(rows, UNREAD, dtype=np.int8) for name in (*FLAGS, *LABELS)},
        prompt=np.full(rows, UNREAD, dtype=np.int32),
        vectors={name: _Vector(rows) for name in (*wanted.state_columns, ACTION)},
        indices={name: np.full(rows, NO_INDEX, dtype=np.int64) for name in INDICES},
        timestamp=np.full(rows, np.nan),
        has_timestamp=False,
    )


def _cameras(schema: pa.Schema, wanted: Wanted) -> list[str]:
    """The cameras to look at: the main one first, then those of the config, then the file's others."""
    here = image_columns(schema)
    main = [MAIN_CAMERA] if MAIN_CAMERA in here else []
    return list(dict.fromkeys([*main, *wanted.cameras, *here]))


def _check_columns(
    schema: pa.Schema, path: Source, findings: Findings, wanted: Wanted, cameras: Sequence[str]
) -> dict[str, str]:
    """Column or camera of the schema -> the file's column, where that is there once and of a type that can be read."""
    present = schema.names
    columns = {}
    states = [name for name in wanted.state_columns if wanted.needs_state or name in present]
    for name in (*states, ACTION, *FLAGS, PROMPT):
        if name in present:
            columns[name] = name
        else:
            findings.add("missing_column", f"no column {name!r} (found: {', '.join(present)})", file=path)
    for camera in cameras:
        spellings = camera_columns(camera, present)
        if len(spellings) == 2:
            message = f"both {spellings[0]!r} and {spellings[1]!r} are columns"
            findings.add("ambiguous_image_column", message, file=path, edit=("--drop_columns", spellings[1]))
        elif spellings:
            columns[camera] = spellings[0]
        elif camera == MAIN_CAMERA:
            findings.add("missing_column", missing_camera(camera, present), file=path)
    read = wanted.cameras or cameras
    if MAIN_CAMERA not in read and not any(camera_columns(camera, present) for camera in read):
        findings.add("missing_column", missing_camera((*read, MAIN_CAMERA)[0], present), file=path)
    for name in (*INDICES, TIMESTAMP, *LABELS):
        if present.count(name) == 1 and column_type(name).fits(schema.field(name).type):
            columns[name] = name
        elif present.count(name) == 1 and name in LABELS:
            message = f"column {name!r} is {schema.field(name).type}; data.sample_weighting reads bool"
            findings.add("label_contradicts", message, file=path, edit=("--drop_columns", name))
    for name, column in list(columns.items()):
        times, expected = present.count(column), _expected(name, states)
        if times > 1:
            findings.add("wrong_type", f"column {column!r} is there {times} times; wanted once", file=path)
            del columns[name]
        elif not expected.fits(schema.field(column).type):
            message = f"column {column!r} is {schema.field(column).type}; wanted {expected.description}"
            findings.add("wrong_type", message, file=path)
            del columns[name]
    return columns


def _expected(name: str, states: Sequence[str]) -> ColumnType:
    """The type that a column must have."""
    return column_type(name)._replace(fits=is_state) if name in states else column_type(name)


def _prompt_codes(array: pa.Array, known: dict[str, int]) -> np.ndarray:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    encoded = array.cast(pa.large_binary()).dictionary_encode()
    codes = []
    for value in encoded.dictionary.to_pylist():
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            codes.append(INVALID)
            continue
        codes.append(known.setdefault(text, len(known)) if text.strip() else EMPTY)
    table = np.array([*codes, NULL], dtype=np.int32)
    return table[np.asarray(encoded.indices.fill_null(len(codes)))]


def _integers(array: pa.Array) -> np.ndarray:
    return np.asarray(array.cast(pa.int64(), safe=False).fill_null(NO_INDEX))


def _seconds(array: pa.Array) -> np.ndarray:
    kind = array.type
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        per_second = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[kind.unit]
        return np.asarray(array.cast(pa.int64()).cast(pa.float64(), safe=False).fill_null(np.nan)) / per_second
    return np.asarray(array.cast(pa.float64(), safe=False).fill_null(np.nan))


def _ticks_per_second(ticks: np.ndarray) -> float:
    """The unit of whole-number timestamps: the first of s, ms, us, ns that makes the rate plausible for a robot."""
    steps = np.diff(ticks[np.isfinite(ticks)])
    step = float(np.median(steps[steps > 0])) if (steps > 0).any() else 1.0
    return next((unit for unit in (1.0, 1e3, 1e6, 1e9) if 1e-3 <= step / unit <= 2), 1.0)

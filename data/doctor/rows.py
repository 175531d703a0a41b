"""Every row's numbers, flags and prompts as arrays, read from raw Parquet without stopping at a fault.

`EpisodeStore` refuses a file at its first fault; this reader goes on, and marks what it could not read, so that
one look finds everything. Images are not read here. Numbers take about four bytes a value in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from data.doctor.findings import Findings
from utils.parquet_utils import Source, is_uri

READ_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)  # what pyarrow raises over damaged files
ROWS_PER_BATCH = 8192
READ_BUFFER = 1 << 20  # bytes; without it a whole column chunk is held in memory

FLAGS = ("is_first", "is_last", "is_terminal")
VECTORS = ("state", "action")
INDICES = ("episode_index", "frame_index")
CAMERAS = ("image_1", "image_2")

UNREAD, NULL = -1, -2  # in flags, prompt codes and vector lengths
EMPTY, INVALID = -3, -4  # in prompt codes only
NO_INDEX = np.iinfo(np.int64).min


@dataclass
class Rows:
    """N rows of all files in order, the training split first.

    Attributes:
        files: every file, also those that could not be read (they have no rows).
        splits: the split of each file, `train` or `val`.
        schema_ok: whether each file could be opened at all.
        file_starts: int64 (files + 1,), first global row of each file.
        cameras: per file, camera -> name of its column.
        flags: int8 (N,) per flag: 0, 1, `UNREAD` or `NULL`.
        prompt: int32 (N,), index into `prompts`, or `UNREAD`, `NULL`, `EMPTY`, `INVALID`.
        lengths: int32 (N,) per vector column: values in the row, or `UNREAD`, `NULL`.
        vectors: float32 (N, width) per vector column; NaN in rows that are not read, null or of another width.
        imprecise: int64 global rows per vector column where float32 can't hold the value.
        indices: int64 (N,) per index column, `NO_INDEX` where absent.
        timestamp: float64 (N,), seconds, NaN where absent.
        has_timestamp: bool (files,).
        file_of: int32 (N,), index into `files`.
        episode: int64 (N,), the episode within the split, as far as the flags tell.
        episode_starts: int64 (episodes + 1,), first global row of each episode over both splits.
    """

    files: list[Source]
    splits: list[str]
    schema_ok: np.ndarray
    file_starts: np.ndarray
    cameras: list[dict[str, str]]
    flags: dict[str, np.ndarray]
    prompts: list[str]
    prompt: np.ndarray
    lengths: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]
    imprecise: dict[str, np.ndarray]
    indices: dict[str, np.ndarray]
    timestamp: np.ndarray
    has_timestamp: np.ndarray
    file_of: np.ndarray
    episode: np.ndarray
    episode_starts: np.ndarray

    def __len__(self) -> int:
        return int(self.file_starts[-1])

    @property
    def num_episodes(self) -> int:
        """Episodes of both splits."""
        return len(self.episode_starts) - 1

    def place(self, index: int) -> tuple[Source, int, int]:
        """(file, row in it, episode of its split) of a global row."""
        file = int(self.file_of[index])
        return self.files[file], int(index - self.file_starts[file]), int(self.episode[index])

    def file_rows(self, file: int) -> slice:
        """The global rows of a file."""
        return slice(int(self.file_starts[file]), int(self.file_starts[file + 1]))

    def episode_rows(self, number: int) -> slice:
        """The global rows of the episode with this number over both splits."""
        return slice(int(self.episode_starts[number]), int(self.episode_starts[number + 1]))

    def same_episode(self) -> np.ndarray:
        """bool (N - 1,): whether each row and the next belong to one episode."""
        inner = np.ones(max(len(self) - 1, 0), dtype=bool)
        inner[self.episode_starts[1:-1] - 1] = False
        return inner


class _Vector:
    """A vector column while its width is not known yet: lengths and values one after the other."""

    def __init__(self, rows: int) -> None:
        self.lengths = np.full(rows, UNREAD, dtype=np.int32)
        self.values: list[np.ndarray] = []
        self.imprecise: list[np.ndarray] = []

    def put(self, first: int, array: pa.Array) -> None:
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
    """One file's columns."""

    rows: int
    cameras: dict[str, str]
    flags: dict[str, np.ndarray]
    prompt: np.ndarray
    vectors: dict[str, _Vector]
    indices: dict[str, np.ndarray]
    timestamp: np.ndarray
    has_timestamp: bool


def open_raw(path: Source) -> pq.ParquetFile:
    """Open for streaming: batches are read through a small buffer, not a whole column chunk at a time."""
    return pq.ParquetFile(open_bytes(path), buffer_size=READ_BUFFER, pre_buffer=False)


def stream(
    file: pq.ParquetFile, path: Source, column: str, batch_size: int, findings: Findings
) -> Iterator[tuple[int, pa.Array]]:
    """(first row, values) of one column, batch by batch; where it can't be read further, `corrupt_data` and the end."""
    first, rows = 0, file.metadata.num_rows
    try:
        for batch in file.iter_batches(batch_size=batch_size, columns=[column]):
            if first + batch.num_rows > rows:
                raise ValueError(f"more values than the file's {rows} rows")
            yield first, batch.column(0)
            first += batch.num_rows
        if first < rows:
            raise ValueError(f"the column ends after {first} of {rows} rows")
    except READ_ERRORS as error:
        message = f"column {column!r} can't be read from here on ({_first_line(error)})"
        findings.add("corrupt_data", message, file=path, row=first)


def open_bytes(path: Source) -> pa.NativeFile:
    """A local path or a URI as a file of bytes."""
    filesystem, name = fs.FileSystem.from_uri(str(path)) if is_uri(path) else (fs.LocalFileSystem(), str(path))
    return filesystem.open_input_file(name)


def read_rows(files: Sequence[tuple[Source, str]], findings: Findings) -> Rows:
    """Read every file's columns except images; faults of files and columns become findings.

    Args:
        files: (path, split) in order, the training split first.
        findings: receives `unreadable_file`, `empty_file`, `missing_column`, `ambiguous_image_column`,
            `wrong_type` and `corrupt_data`.
    """
    known: dict[str, int] = {}
    parts, opened = [], []
    for path, _ in files:
        part, readable = _read_file(path, known, findings)
        parts.append(part)
        opened.append(readable)
    sizes = [part.rows for part in parts]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    file_of = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
    lengths = {name: np.concatenate([part.vectors[name].lengths for part in parts]) for name in VECTORS}
    vectors, imprecise = {}, {}
    for name in VECTORS:
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


def common_width(lengths: np.ndarray) -> int:
    """The width that most rows have; 1 where no row has any value."""
    counts = np.bincount(lengths[lengths > 0]) if (lengths > 0).any() else np.array([0, 1])
    return int(counts.argmax())


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


def hard_starts(rows: Rows) -> np.ndarray:
    """Global rows where an episode begins whatever the flags say: a split's begin, after a gap, flags unknown."""
    starts = []
    for file, begin in enumerate(rows.file_starts[:-1]):
        if begin == rows.file_starts[file + 1]:
            continue
        new_split = file == 0 or rows.splits[file] != rows.splits[file - 1]
        unknown = rows.flags["is_first"][begin] < 0 or (begin > 0 and rows.flags["is_last"][begin - 1] < 0)
        if new_split or after_gap(rows, file) or unknown or begin == 0:
            starts.append(int(begin))
    return np.array(starts, dtype=np.int64)


def after_gap(rows: Rows, file: int) -> bool:
    """Whether the file before this one, in the same split, could not be read."""
    before = file - 1
    return before >= 0 and rows.splits[before] == rows.splits[file] and not _readable(rows, before)


def before_gap(rows: Rows, file: int) -> bool:
    """Whether the file after this one, in the same split, could not be read."""
    after = file + 1
    return after < len(rows.files) and rows.splits[after] == rows.splits[file] and not _readable(rows, after)


def _readable(rows: Rows, file: int) -> bool:
    return bool(rows.schema_ok[file]) and rows.file_starts[file] < rows.file_starts[file + 1]


def _read_file(path: Source, known: dict[str, int], findings: Findings) -> tuple[_File, bool]:
    try:
        file = open_raw(path)
        schema, count = file.schema_arrow, file.metadata.num_rows
        if count != sum(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)):
            raise ValueError("the row groups hold another number of rows than the file")
    except READ_ERRORS as error:
        findings.add("unreadable_file", f"not a readable Parquet file ({_first_line(error)})", file=path)
        return _blank(0), False
    if count == 0:
        findings.add("empty_file", "the file holds no rows", file=path)
        return _blank(0), True
    part = _blank(count)
    columns = _check_columns(schema, path, findings)
    part.cameras = {camera: columns[camera] for camera in CAMERAS if camera in columns}
    for name in VECTORS:
        if name in columns:
            for first, array in stream(file, path, name, ROWS_PER_BATCH, findings):
                part.vectors[name].put(first, array)
    for name in FLAGS:
        if name in columns:
            for first, array in stream(file, path, name, ROWS_PER_BATCH, findings):
                values = np.asarray(array.cast(pa.int8()).fill_null(NULL))
                part.flags[name][first : first + len(values)] = values
    if "prompt" in columns:
        for first, array in stream(file, path, "prompt", ROWS_PER_BATCH, findings):
            part.prompt[first : first + len(array)] = _prompt_codes(array, known)
    for name in INDICES:
        if name in columns:
            for first, array in stream(file, path, name, ROWS_PER_BATCH, findings):
                part.indices[name][first : first + len(array)] = _integers(array)
    if "timestamp" in columns:
        part.has_timestamp = True
        for first, array in stream(file, path, "timestamp", ROWS_PER_BATCH, findings):
            part.timestamp[first : first + len(array)] = _seconds(array)
        if pa.types.is_integer(schema.field("timestamp").type):
            part.timestamp /= _ticks_per_second(part.timestamp)
    return part, True


def _blank(rows: int) -> _File:
    return _File(
        rows=rows,
        cameras={},
        flags={name: np.full(rows, UNREAD, dtype=np.int8) for name in FLAGS},
        prompt=np.full(rows, UNREAD, dtype=np.int32),
        vectors={name: _Vector(rows) for name in VECTORS},
        indices={name: np.full(rows, NO_INDEX, dtype=np.int64) for name in INDICES},
        timestamp=np.full(rows, np.nan),
        has_timestamp=False,
    )


def _check_columns(schema: pa.Schema, path: Source, findings: Findings) -> dict[str, str]:
    """Role -> column, for every column that is there once and has a type that can be read."""
    present = schema.names
    columns = {}
    for role in (*VECTORS, *FLAGS, "prompt"):
        if role not in present:
            findings.add("missing_column", f"no column {role!r} (found: {', '.join(present)})", file=path)
            continue
        columns[role] = role
    for camera in CAMERAS:
        spellings = [name for name in (camera, f"{camera}_bytes") if name in present]
        if len(spellings) == 2:
            findings.add("ambiguous_image_column", f"both {camera!r} and '{camera}_bytes' are columns", file=path)
        elif spellings:
            columns[camera] = spellings[0]
        elif camera == "image_1":
            message = f"no column 'image_1' or 'image_1_bytes' (found: {', '.join(present)})"
            findings.add("missing_column", message, file=path)
    for role in (*INDICES, "timestamp"):
        if present.count(role) == 1 and _WANTED[role][0](schema.field(role).type):
            columns[role] = role
    for role, name in list(columns.items()):
        fits, wanted = _WANTED[role]
        if present.count(name) > 1:
            findings.add("wrong_type", f"column {name!r} is there {present.count(name)} times; wanted once", file=path)
            del columns[role]
        elif not fits(schema.field(name).type):
            message = f"column {name!r} is {schema.field(name).type}; wanted {wanted}"
            findings.add("wrong_type", message, file=path)
            del columns[role]
    return columns


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_image(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_time(kind: pa.DataType) -> bool:
    number = pa.types.is_floating(kind) or pa.types.is_integer(kind)
    return number or pa.types.is_timestamp(kind) or pa.types.is_duration(kind)


_WANTED: dict[str, tuple[Any, str]] = {
    **{name: (_is_vector, "a list of float32") for name in VECTORS},
    **{name: (pa.types.is_boolean, "bool") for name in FLAGS},
    **{name: (_is_image, "binary, or a struct with a 'bytes' field: encoded JPEG or PNG") for name in CAMERAS},
    **{name: (pa.types.is_integer, "int64") for name in INDICES},
    "prompt": (_is_text, "string"),
    "timestamp": (_is_time, "seconds"),
}


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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

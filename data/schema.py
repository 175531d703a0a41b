"""The Parquet schema of docs/data_format.md: columns, their types, how cameras are spelled, where episodes begin.

Cameras and state columns have any names; a config says which of them a policy reads.

No other file knows it. Readers that stop at the first fault call the functions below, whose DataError names file, row
and remedy. The doctor, which goes on and reports every fault, uses the names and the types alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from utils.parquet_utils import DataError, Source
from utils.text import printable

VECTORS = ("state", "action")
FLAGS = ("is_first", "is_last", "is_terminal")
PROMPT = "prompt"
STATE, ACTION = VECTORS
REQUIRED = (*VECTORS, *FLAGS, PROMPT)  # besides a camera
INDICES = ("episode_index", "frame_index")  # optional: recorders add them, the doctor checks them
TIMESTAMP = "timestamp"  # optional: seconds since the episode's start
SEED = "seed"  # optional: reset seed of a recorded episode
INTERVENTION = "intervention"  # optional: at this step somebody corrected the policy that acted before
SUCCESS = "success"  # optional: whether the episode succeeded, the same in all of its rows
LABELS = (INTERVENTION, SUCCESS)
PLAN = "plan"  # optional: the actions planned at this step, one after the other; null where none were
NOISE_SEED = "noise_seed"  # optional: seed of the noise that the plan was sampled from
MAIN_CAMERA = "image_1"  # whoever reads a camera of this name needs it in every row


class ColumnType(NamedTuple):
    """What a column may be read from, and what it is written as."""

    fits: Callable[[pa.DataType], bool]
    description: str
    written: pa.DataType | None  # None: depends on the width


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def is_state(kind: pa.DataType) -> bool:
    """Whether a column may be part of the state: lists of numbers, or plain numbers."""
    return _is_vector(kind) or pa.types.is_floating(kind) or pa.types.is_integer(kind)


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


IMAGE = ColumnType(_is_image, "binary, or a struct with a 'bytes' field: encoded JPEG or PNG", pa.binary())
COLUMN_TYPES = {
    **{name: ColumnType(_is_vector, "a list of float32", None) for name in VECTORS},
    **{name: ColumnType(pa.types.is_boolean, "bool", pa.bool_()) for name in (*FLAGS, *LABELS)},
    PROMPT: ColumnType(_is_text, "string", pa.string()),
    **{name: ColumnType(pa.types.is_integer, "int64", pa.int64()) for name in (*INDICES, SEED, NOISE_SEED)},
    TIMESTAMP: ColumnType(_is_time, "seconds", pa.float32()),
    PLAN: ColumnType(_is_vector, "a list of float32", pa.list_(pa.float32())),
}


def image_columns(schema: pa.Schema) -> list[str]:
    """The cameras of a file, in the order of its columns: those that hold encoded images, and `image_1`, whatever it
    holds."""
    main = (MAIN_CAMERA, f"{MAIN_CAMERA}_bytes")
    found = (f.name for f in schema if f.name not in COLUMN_TYPES and (_is_image(f.type) or f.name in main))
    return list(dict.fromkeys(name.removesuffix("_bytes") for name in found))


def column_type(name: str) -> ColumnType:
    """The type of a column of the schema; every other name is a camera's."""
    return COLUMN_TYPES.get(name, IMAGE)


def written_schema(
    cameras: Sequence[str],
    state_widths: Mapping[str, int],
    per_action_dim: int,
    *,
    extra: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> pa.Schema:
    """The columns of files that this repository writes.

    Args:
        cameras: names of the image columns.
        state_widths: values per row of each column of the state.
        per_action_dim: values per row of `action`.
        extra: optional columns at the end, names of COLUMN_TYPES.
        metadata: of the file.
    """
    names = (*FLAGS, PROMPT, *INDICES, *extra)
    fields = [(camera, IMAGE.written) for camera in cameras]
    widths = {**state_widths, ACTION: per_action_dim}
    fields += [(name, pa.list_(pa.float32(), width)) for name, width in widths.items()]
    return pa.schema(fields + [(name, COLUMN_TYPES[name].written) for name in names], metadata=metadata)


def camera_columns(camera: str, present: Sequence[str]) -> list[str]:
    """The columns among `present` that hold frames of a camera, in either spelling; a sound file has at most one."""
    return [name for name in (camera, f"{camera}_bytes") if name in present]


def camera_column(camera: str, present: Sequence[str], path: Source) -> str | None:
    """The column of a camera; None where the file has no such camera.

    Raises:
        DataError: the file has both spellings, or lacks the main camera.
    """
    columns = camera_columns(camera, present)
    if len(columns) == 2:
        raise DataError(f"{path}: both {columns[0]!r} and {columns[1]!r} are columns; keep one of them")
    if not columns and camera == MAIN_CAMERA:
        raise DataError(
            f"{path}: {missing_camera(camera, present)}; name the cameras that the files have (data.cameras), see "
            "docs/data_format.md"
        )
    return columns[0] if columns else None


def missing_camera(camera: str, present: Sequence[str]) -> str:
    """What to say of a file without a camera."""
    return f"no column '{camera}' or '{camera}_bytes' (found: {', '.join(present)})"


def require_a_frame(frames: Sequence[pa.Array], cameras: Sequence[str], path: Source, first_row: int) -> None:
    """Raise a DataError for a row in which every camera is absent.

    Args:
        frames: of each camera, from `encoded_frames` or all null.
        cameras: their names.
        path, first_row: where the first row lies, for the message.
    """
    if not frames:
        return
    absent = np.logical_and.reduce([np.asarray(column.is_null()) for column in frames])
    if absent.any():
        raise DataError(
            f"{path} row {first_row + int(absent.argmax())}: no frame of {', '.join(cameras)}; every step needs one of "
            "the cameras that the policy reads (data.cameras)"
        )


def encoded_frames(column: pa.Array, name: str, path: Source) -> pa.Array:
    """A camera's encoded frames as binary or large_binary, null where the camera is absent.

    Raises:
        DataError: the column is of another type.
    """
    if pa.types.is_struct(column.type):
        fields = [column.type.field(i).name for i in range(column.type.num_fields)]
        if "bytes" not in fields:
            raise DataError(f"{path}: column {name!r} is a struct of {', '.join(fields)}; wanted a field 'bytes'")
        column = column.flatten()[fields.index("bytes")]
    if not _is_image(column.type):
        raise DataError(f"{path}: column {name!r} is {column.type}; wanted binary (encoded JPEG or PNG)")
    return column


def require_frames(frames: pa.Array, name: str, path: Source, first_row: int, *, always: bool) -> None:
    """Raise a DataError for a frame of no bytes; also for a null one where the camera is needed `always`.

    Args:
        frames: from `encoded_frames`.
        name, path, first_row: of the column, for the message.
        always: at every step, as the main camera is.
    """
    if always and frames.null_count:
        raise DataError(f"{path} row {first_row + _first_null(frames)}: {name} is null; it is needed at every step")
    empty = np.flatnonzero(np.asarray(pc.equal(pc.binary_length(frames), 0).fill_null(False)))
    if len(empty):
        remedy = "it is needed at every step" if always else "write null where the camera is absent"
        raise DataError(f"{path} row {first_row + int(empty[0])}: {name} is empty (0 bytes); {remedy}")


def vector_width(column: pa.Array | pa.ChunkedArray, name: str, path: Source) -> int:
    """Values that the first row of a list column has.

    Raises:
        DataError: another type, or a first row without values.
    """
    if not _is_vector(column.type):
        raise DataError(f"{path}: column {name!r} is {column.type}; wanted a list of float32")
    first = column[0].as_py()
    if not first:
        raise DataError(
            f"{path} row 0: {name} is {'null' if first is None else 'an empty list'}; every time step needs its values"
        )
    return len(first)


def vector_names(metadata: Mapping[bytes, bytes] | None, name: str, width: int) -> list[str]:
    """What the values of a list column are called: as the metadata say (`state_names`, `action_names`, JSON lists),
    else `action[0]` and so on.

    Args:
        metadata: of a recording's schema.
        name: of the column.
        width: how many names to return; values that the metadata do not name are called by their number.
    """
    text = (metadata or {}).get(f"{name}_names".encode(), b"null")
    try:
        known = json.loads(text)
    except ValueError:
        known = None
    known = [printable(value) for value in known] if isinstance(known, list) else []
    return [known[d] if d < len(known) else f"{name}[{d}]" for d in range(width)]


def vectors(
    column: pa.ChunkedArray | pa.Array, name: str, width: int, path: Source, first_row: int, *, width_from: str | None
) -> np.ndarray:
    """A list column as float32 (rows, width).

    Args:
        column: list, large_list or fixed_size_list of numbers.
        name: of the column, for error messages.
        width: values that every row must have.
        path, first_row: where the column's first row lies, for error messages.
        width_from: the config key that sets the width, for error messages; None: the first row does.

    Raises:
        DataError: another type, a null row, another width, NaN or infinity.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # zero chunks stay chunked
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=array.type)
    if not _is_vector(array.type):
        raise DataError(
            f"{path}: column {name!r} is {array.type}; wanted a list of float32 with {width} values per row"
        )
    if array.null_count:
        raise DataError(
            f"{path} row {first_row + _first_null(array)}: {name} is null; every time step needs {width} values"
        )
    widths = np.asarray(array.value_lengths().fill_null(0))
    if (widths != width).any():
        row = int(np.flatnonzero(widths != width)[0])
        wanted, remedy = f"the first row has {width}", "drop or mend that episode"
        if width_from is not None:
            wanted = f"config wants {width_from} {width}"
            remedy = "mend the file, or train with a config of its width: a trained policy keeps the one it has"
        raise DataError(f"{path} row {first_row + row}: {name} has {widths[row]} values, {wanted}; {remedy}")
    values = array.flatten()
    flat = np.asarray(values.cast(pa.float32(), safe=False).fill_null(float("nan")), dtype=np.float32)
    matrix = flat.reshape(len(array), width)
    finite = np.isfinite(matrix)
    if not finite.all():
        row, dim = (int(index) for index in np.argwhere(~finite)[0])
        raise DataError(
            f"{path} row {first_row + row}: {name}[{dim}] is {matrix[row, dim]}; "
            "every value must be a finite number, so drop or mend that episode"
        )
    return matrix


def as_list(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A column of plain numbers as lists of one; others as they are."""
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        return column
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    offsets = pa.array(np.arange(len(values) + 1), pa.int32())
    return pa.ListArray.from_arrays(offsets, values, mask=values.is_null())


def flags(column: pa.ChunkedArray | pa.Array, name: str, path: Source, first_row: int) -> np.ndarray:
    """One of FLAGS or LABELS as bool (rows,).

    Raises:
        DataError: another type, or a null.
    """
    if not pa.types.is_boolean(column.type):
        raise DataError(f"{path}: column {name!r} is {column.type}; wanted bool")
    if column.null_count:
        raise DataError(f"{path} row {first_row + _first_null(column)}: {name} is null; wanted true or false")
    return np.asarray(column)


def prompts(column: pa.ChunkedArray | pa.Array, path: Source, first_row: int) -> list[str]:
    """The instruction of every row.

    Raises:
        DataError: another type than string, bytes that are no UTF-8, or a row without an instruction.
    """
    if not _is_text(column.type):
        raise DataError(f"{path}: column {PROMPT!r} is {column.type}; wanted string")
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        for row, value in enumerate(column):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{path} row {first_row + row}: prompt is not UTF-8 ({error}); write it anew") from None
        raise
    for i, text in enumerate(texts):
        if not text or not text.strip():
            raise DataError(f"{path} row {first_row + i}: prompt is {text!r}; every time step needs its instruction")
    return texts


def episode_starts(
    flags_by_name: Mapping[str, np.ndarray], files: Sequence[Source], file_starts: Sequence[int]
) -> np.ndarray:
    """Where episodes begin: at each `is_first`, which must follow an `is_last`.

    Args:
        flags_by_name: each of FLAGS over the rows of all files, bool (rows,).
        files: the files in order; an episode may go on from one into the next.
        file_starts: first row of each file.

    Returns:
        int64 (episodes + 1,), first row of each episode; the last entry is the row count.

    Raises:
        DataError: the flags contradict each other, naming the first row where they do.
    """
    first, last, terminal = (flags_by_name[name] for name in FLAGS)
    ends_before = np.concatenate([[True], last[:-1]])  # whether the row before ends an episode
    faults = {
        "is_first is true but the row before is not is_last": first & ~ends_before,
        "is_first is false but the row before is is_last": ~first & ends_before,
        "is_terminal is true but is_last is not": terminal & ~last,
    }
    faults = {message: np.flatnonzero(rows) for message, rows in faults.items() if rows.any()}
    if not last[-1]:
        faults["the data end here but is_last is false"] = np.array([len(last) - 1])
    if faults:
        message, rows = min(faults.items(), key=lambda item: item[1][0])
        file = int(np.searchsorted(file_starts, rows[0], side="right")) - 1
        if rows[0] == 0 and message.startswith("is_first is false"):
            message = "the data begin here but is_first is false"
        raise _bad_flags(files[file], int(rows[0] - file_starts[file]), message)
    return np.concatenate([np.flatnonzero(first), [len(first)]]).astype(np.int64)


def episode_numbers(is_first: np.ndarray, before: int, path: Source, first_row: int) -> np.ndarray:
    """The episode of each row, int64 (rows,), from `is_first` alone.

    Args:
        is_first: bool (rows,), not empty.
        before: how many episodes have begun in earlier rows.
        path, first_row: where the first row lies, for error messages.

    Raises:
        DataError: the data begin in the middle of an episode.
    """
    numbers = np.cumsum(is_first) + (before - 1)
    if numbers[0] < 0:
        raise _bad_flags(path, first_row, "the data begin here but is_first is false")
    return numbers


def _bad_flags(path: Source, row: int, message: str) -> DataError:
    return DataError(f"{path} row {row}: {message}; an episode runs from is_first to is_last")


def _first_null(column: pa.ChunkedArray | pa.Array) -> int:
    return int(np.flatnonzero(np.asarray(column.is_null()))[0])

"""Edited files: one for each file of the source, with its columns, their types and its metadata."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.convert.conversion import ConversionSummary, convert_files
from data.convert.episode_reader import Span, read_episodes, read_images
from data.convert.episode_writer import (
    BYTES_PER_GROUP,
    RECORD,
    ROWS_PER_GROUP,
    EpisodeFileWriter,
    ImageEncoding,
    OutputFile,
)
from data.decoding import decode_frame
from data.editing.edits import Edits
from data.editing.plan import RATE_KEYS, Piece, Plan
from data.editing.sources import path_of, read, schema_of, state_of, video_cameras
from data.schema import IMAGE, INDICES, PLAN, PROMPT, SUCCESS, TIMESTAMP, camera_columns, encoded_frames, image_columns
from utils.parquet_utils import DataError, one_line, resolve_parquet_files
from utils.recordings import Recording

HISTORY = "edited_from"  # metadata key: the records of the files that a file was made from, oldest first, as JSON


@dataclass(frozen=True)
class _Part:
    """A piece; the first global row of its episode; where its rows lie: (file, its first global row, the first after
    it); frames of added cameras for its episode."""

    piece: Piece
    begin: int
    places: tuple[tuple[Recording, int, int], ...]
    added: dict[str, tuple[Span, ...]]


@dataclass(frozen=True)
class _EditedFile(OutputFile):
    """A file to be made, and what of."""

    parts: tuple[_Part, ...] = ()


class _TableWriter(EpisodeFileWriter):
    """A whole file or none, of tables in any schema."""

    def __init__(self, path: Path, schema: pa.Schema, source: str) -> None:
        self._path, self._temporary, self._source = path, path.with_name(f".{path.name}.tmp"), source
        self._schema, self._pending, self._bytes = schema, [], 0

    def write_table(self, table: pa.Table, *, ends: bool) -> None:
        """Append rows; a row group ends with its episode, as those of converters do."""
        self._pending.append(table)
        size = sum(part.nbytes for part in self._pending)
        if ends or size >= BYTES_PER_GROUP or sum(map(len, self._pending)) >= ROWS_PER_GROUP:
            self._flush()


def write_edited(
    plan: Plan, edits: Edits, output_dir: Path, *, num_workers: int = 1, overwrite: bool = False
) -> dict[str, ConversionSummary]:
    """Write a plan, as a conversion is written: complete files only, resumable, with a record in their metadata.

    Args:
        plan: from `make_plan`.
        edits: what it was made of.
        output_dir: not a folder of the source.
        num_workers, overwrite: see `convert_files`.

    Returns:
        A summary per folder.

    Raises:
        DataError: the output folder holds files of the source, or others; a camera that can't be added or renamed; a
            frame that can't be decoded for `encoding`; some episodes without an outcome.
        WriteError: the disk is full.
    """
    rows = plan.rows
    for path in rows.files:
        if output_dir.resolve() in path_of(path).parents:
            raise DataError(f"--output_dir {output_dir} holds {path}: nothing is edited in place; choose another")
    names = _names(rows.files)
    added = {name: _added(plan, name, *source) for name, source in edits.add_camera.items()}
    groups: dict[tuple[str, int], list[_Part]] = defaultdict(list)
    for piece in plan.pieces:
        first, last = int(rows.file_of[piece.rows[0]]), int(rows.file_of[piece.rows[-1]])
        places = [
            (rows.files[i], int(rows.file_starts[i]), int(rows.file_starts[i + 1])) for i in range(first, last + 1)
        ]
        frames = {name: spans[piece.source] for name, spans in added.items()}
        groups[piece.folder, first].append(_Part(piece, int(rows.episode_starts[piece.source]), tuple(places), frames))
    settings = {"edits": edits.settings(), "source_files": [path_of(path).name for path in rows.files]}
    folders: dict[str, list[OutputFile]] = defaultdict(list)
    for (folder, file), parts in groups.items():
        paths = dict.fromkeys(path for part in parts for path, _, _ in part.places)
        folders[folder].append(
            _EditedFile(
                path=output_dir / folder / names[file],
                episodes=tuple(part.piece.number for part in parts),
                rows=sum(len(part.piece.rows) for part in parts),
                settings=settings,
                sources={
                    **{name: state for path in paths for name, state in state_of(path).items()},
                    "source_episodes": [part.piece.source for part in parts],
                },
                parts=tuple(parts),
            )
        )
    write = functools.partial(_write_file, edits, plan.reworded)
    return {
        folder: convert_files(files, write, num_workers=num_workers, overwrite=overwrite)
        for folder, files in folders.items()
    }


def _names(files: Sequence[Recording]) -> list[str]:
    """A name of each output file: the source's, with as many of its folders as tell it from the others."""
    parts = [[part.strip("/") for part in path_of(path).parts] for path in files]
    depth = 1
    while len({tuple(path[-depth:]) for path in parts}) < len(parts):
        depth += 1
    return ["_".join(path[-depth:]) for path in parts]


def _added(plan: Plan, name: str, spec: str, camera: str) -> list[tuple[Span, ...]]:
    """Per episode of the source where the frames of a camera to be added lie: as many episodes, as long."""
    episodes = read_episodes([Path(path) for path in resolve_parquet_files(spec, "--add_camera")])
    lengths, found = np.diff(plan.rows.episode_starts).tolist(), [len(episode) for episode in episodes]
    if found != lengths:
        at = next((i for i, pair in enumerate(zip(found, lengths, strict=False)) if len(set(pair)) == 2), len(found))
        raise DataError(
            f"--add_camera {name}={spec}: has {len(found)} episodes, this dataset {len(lengths)}, and they differ from "
            f"episode {at} on; every row needs its frame of {camera}"
        )
    return [episode.spans for episode in episodes]


def _write_file(edits: Edits, reworded: Mapping[str, str], file: _EditedFile) -> None:
    first = file.parts[0].places[0][0]
    before = _source_schema(list(dict.fromkeys(path for part in file.parts for path, _, _ in part.places)))
    schema, column_of = _output_schema(before, edits, first)
    videos = _video_columns(file, list(column_of.values()))
    if SUCCESS in schema.names and SUCCESS not in column_of and any(part.piece.success is None for part in file.parts):
        raise DataError(f"{first}: has no column {SUCCESS}, so --set_success must name every episode in it")
    schema = schema.with_metadata(_metadata(before.metadata or {}, file, edits))
    with _TableWriter(file.path, schema, str(first)) as writer:
        for part in file.parts:
            done = 0
            added = {name: list(read_images(spans, edits.add_camera[name][1])) for name, spans in part.added.items()}
            picked = part.piece.rows - part.begin
            frames = {name: [of_episode[i] for i in picked] for name, of_episode in added.items()}
            for table in _read(part, list(dict.fromkeys(column_of.values())), edits.encoding):
                steps = np.arange(done, done + len(table))
                columns: dict[str, Any] = {
                    name: table[origin] if origin in table.column_names else [None] * len(table)
                    for name, origin in column_of.items()
                }
                columns |= _changed(part.piece, steps, columns, reworded)
                columns |= {name: frames[name][done : done + len(table)] for name in frames}
                if edits.encoding is not None:
                    where = f"{first} episode {part.piece.source}"
                    columns |= {
                        name: _encoded(columns[name], name, edits, where, done)
                        for name in schema.names
                        if name in column_of
                        and column_of[name] not in videos
                        and IMAGE.fits(before.field(column_of[name]).type)
                    }
                done += len(table)
                writer.write_table(_table(columns, schema), ends=done == len(part.piece.rows))


def _video_columns(file: _EditedFile, columns: list[str]) -> set[str]:
    """Cameras whose frames are video in the source: they are encoded as they are read."""
    paths = dict.fromkeys(path for part in file.parts for path, _, _ in part.places)
    return {camera for path in paths for camera in video_cameras(path, columns)}


def _source_schema(paths: Sequence[Recording]) -> pa.Schema:
    """The columns of the files that one is made from, with the first one's metadata: an episode may go on from one file
    into the next."""
    try:
        return pa.unify_schemas([schema_of(path) for path in paths], promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"{paths[0]}: an episode goes on from it into {paths[-1]}, whose columns are of other types "
            f"({one_line(error)}); --delete that episode"
        ) from None


def _read(part: _Part, columns: list[str], encoding: ImageEncoding | None) -> Iterator[pa.Table]:
    """The rows of a piece, a few at a time, as they are in the source, without the columns that a file lacks."""
    for path, begin, end in part.places:
        mine = part.piece.rows[(part.piece.rows >= begin) & (part.piece.rows < end)] - begin
        for row, batch in read(path, columns, int(mine[0]), encoding):
            here = mine[np.searchsorted(mine, row) : np.searchsorted(mine, row + batch.num_rows)]
            if len(here):
                yield pa.Table.from_batches([batch]).take(pa.array(here - row))
            if row + batch.num_rows > mine[-1]:
                break


def _changed(
    piece: Piece, steps: np.ndarray, columns: Mapping[str, Any], reworded: Mapping[str, str]
) -> dict[str, Any]:
    """The columns of some steps of a piece that are not as they were."""
    last = steps == len(piece.rows) - 1
    changed: dict[str, Any] = {"is_first": steps == 0, "is_last": last, "is_terminal": last & piece.terminal}
    texts = columns[PROMPT].to_pylist()
    changed[PROMPT] = [reworded.get(text, text) if piece.prompt is None else piece.prompt for text in texts]
    numbers = dict(zip(INDICES, (np.full(len(steps), piece.number), steps), strict=True))
    changed |= {name: values for name, values in numbers.items() if name in columns}
    if piece.time is not None and TIMESTAMP in columns:
        changed[TIMESTAMP] = piece.time[steps]
    if piece.action is not None:
        changed["action"] = list(piece.action[steps])
    if piece.success is not None:
        changed[SUCCESS] = np.full(len(steps), piece.success)
    return changed


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Columns, in Arrow's form or as values, as a table of a schema."""
    arrays = []
    for field in schema:
        values = columns[field.name]
        if isinstance(values, (pa.Array, pa.ChunkedArray)):
            arrays.append(values.cast(field.type) if values.type != field.type else values)
        elif pa.types.is_timestamp(field.type) or pa.types.is_duration(field.type):
            per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[field.type.unit]
            arrays.append(pa.array(np.rint(values * per_second).astype(np.int64)).cast(field.type))
        elif pa.types.is_dictionary(field.type):
            arrays.append(pa.array(values, field.type.value_type).dictionary_encode().cast(field.type))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.table(arrays, schema=schema)


def _encoded(column: pa.ChunkedArray, name: str, edits: Edits, where: str, first: int) -> list[bytes | None]:
    """Frames, encoded anew; null where absent."""
    result: list[bytes | None] = []
    for i, frame in enumerate(encoded_frames(column.combine_chunks(), name, where).to_pylist()):
        try:
            result.append(None if frame is None else edits.encoding(decode_frame(frame, 0, 0)))
        except (ValueError, OSError, SyntaxError) as error:
            raise DataError(
                f"{where} step {first + i}: {name} can't be decoded ({one_line(error)}); --delete that episode"
            ) from None
    return result


def _output_schema(source: pa.Schema, edits: Edits, path: Recording) -> tuple[pa.Schema, dict[str, str]]:
    """The columns of an edited file, and of each that the source has the name there."""
    origin = {name: name for name in source.names if name not in edits.drop_columns}
    left = [name for name in image_columns(source) if camera_columns(name, list(origin))]
    if not left and not edits.add_camera:
        raise DataError(f"--drop_columns {' '.join(edits.drop_columns)}: leaves {path} without a camera")
    for old, new in edits.rename_camera.items():
        for column in camera_columns(old, list(origin)):
            if camera_columns(new, list(origin)):
                raise DataError(f"--rename_camera {old}={new}: {path} has {new} already")
            origin = {new if name == column else name: before for name, before in origin.items()}
    if edits.resample is not None:
        origin.pop(PLAN, None)  # plans of another rate
    fields = [source.field(before).with_name(name) for name, before in origin.items()]
    if edits.encoding is not None:
        fields = [field.with_type(IMAGE.written) if IMAGE.fits(field.type) else field for field in fields]
    for new in edits.add_camera:
        if camera_columns(new, list(origin)):
            raise DataError(f"--add_camera {new}: {path} has it already; leave that out with --drop_columns")
        fields.append(pa.field(new, IMAGE.written))
    if edits.set_success and SUCCESS not in origin:
        fields.append(pa.field(SUCCESS, pa.bool_()))
    return pa.schema(fields), origin


def _metadata(source: Mapping[bytes, bytes], file: _EditedFile, edits: Edits) -> dict[str, str]:
    """The source's metadata, its record moved into the history, and the edit's own record."""
    found = {key.decode(): value.decode(errors="replace") for key, value in source.items()}
    found.pop("ARROW:schema", None)
    history = json.loads(found.pop(HISTORY, "[]"))
    if RECORD in found:
        history.append(json.loads(found.pop(RECORD)))
    if edits.resample is not None:
        found |= {key.decode(): str(edits.resample) for key in RATE_KEYS if key.decode() in found}
    return file.metadata({**found, HISTORY: json.dumps(history)})

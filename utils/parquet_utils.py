"""Finding, opening and streaming Parquet files, here or on another filesystem, with errors that name file and row."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

STREAM_BUFFER = 1 << 20  # bytes read at a time of each column
Source = str | Path  # a local path, or a URI that pyarrow.fs understands


class DataError(ValueError):
    """A data file contradicts the schema or the configuration; the message names file, row and remedy."""


def resolve_parquet_files(specs: Sequence[Source] | Source, key: str) -> list[Source]:
    """Expand files, folders (searched recursively), globs and URIs of them into a list of Parquet files.

    Args:
        specs: one entry or several; the order of entries is kept, files within a folder or glob are sorted. An
            entry with a scheme (`s3://bucket/folder`, `gs://...`, `hdfs://...`) is read through
            `pyarrow.fs.FileSystem.from_uri`, whose options may follow a `?`.
        key: the config key or flag that the entries come from, for the error message.

    Raises:
        DataError: no entry at all, an entry that matches nothing, or a file named twice.
    """
    entries = [specs] if isinstance(specs, (str, Path)) else list(specs)
    if not entries:
        raise DataError(f"{key} is empty; give a Parquet file, a folder of them, or a glob")
    files: list[Source] = []
    for entry in entries:
        matches = _expand_uri(str(entry), key) if is_uri(entry) else _expand_path(str(entry))
        if not matches:
            raise DataError(f"{key}: {str(entry)!r} matches no Parquet file; give a file, a folder or a glob")
        files.extend(matches)
    repeated = sorted({str(path) for path in files if files.count(path) > 1})
    if repeated:
        raise DataError(f"{key} names {repeated[0]} more than once; every episode would count twice")
    return files


def is_uri(source: Source) -> bool:
    """Whether a source names a filesystem (`s3://...`) rather than a local path."""
    return "://" in str(source)


def open_parquet(path: Source) -> pq.ParquetFile:
    """Open one file, turning pyarrow's errors for damaged or empty files into a DataError that names it."""
    try:
        # Unbuffered ahead: pyarrow would read whole column chunks, images of hundreds of episodes, at once.
        file = pq.ParquetFile(open_bytes(path) if is_uri(path) else path, pre_buffer=False, buffer_size=STREAM_BUFFER)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); record or convert it again") from None
    if file.metadata.num_rows == 0:
        raise DataError(f"{path}: holds no rows; remove it or record it again")
    return file


def open_bytes(path: Source) -> pa.NativeFile:
    """A local path or a URI as a file of bytes."""
    filesystem, name = fs.FileSystem.from_uri(str(path)) if is_uri(path) else (fs.LocalFileSystem(), str(path))
    return filesystem.open_input_file(name)


def fingerprint(path: Source) -> list[str | int]:
    """What tells a source from a changed one: full name, size in bytes, modification time in ns.

    Raises:
        DataError: the source is gone.
    """
    if not is_uri(path):
        stat = Path(path).stat()
        return [str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns]
    filesystem, name = fs.FileSystem.from_uri(str(path))
    info = filesystem.get_file_info(name)
    if info.type != fs.FileType.File:
        raise DataError(f"{path}: no such file")
    return [str(path), info.size, info.mtime_ns or 0]


def _expand_path(entry: str) -> list[Source]:
    if Path(entry).is_dir():
        return sorted(Path(entry).rglob("*.parquet"))
    if Path(entry).is_file():
        return [Path(entry)]
    return sorted(Path(match) for match in glob.glob(entry, recursive=True) if Path(match).is_file())


def _expand_uri(entry: str, key: str) -> list[Source]:
    base, question, options = entry.partition("?")
    try:
        filesystem, name = fs.FileSystem.from_uri(entry)
        folder = name if "*" not in name else name[: name.index("*")].rpartition("/")[0]
        info = filesystem.get_file_info(folder)
        if info.type == fs.FileType.File:
            return [entry]
        entries = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{key}: {base} can't be listed ({error}); check the address and the credentials") from None
    pattern = name if "*" in name else "*.parquet"
    names = sorted(f.path for f in entries if f.type == fs.FileType.File and fnmatch.fnmatch(f.path, pattern))
    root = base[: len(base) - len(name)] if base.endswith(name) else base[: base.index("://") + 3]
    return [f"{root}{path}{question}{options}" for path in names]


def require_columns(file: pq.ParquetFile, path: Source, names: Sequence[str]) -> None:
    """Raise a DataError when one of `names` is not a column of the file."""
    present = file.schema_arrow.names
    for name in names:
        if name not in present:
            raise DataError(f"{path}: no column {name!r} (found: {', '.join(present)}); see docs/data_format.md")


def batches(
    file: pq.ParquetFile, path: Source, columns: list[str], batch_size: int, *, use_threads: bool = True
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(row in the file, batch of at most `batch_size` rows) of some columns.

    Raises:
        DataError: a column is not there, or the file is damaged, naming the row.
    """
    require_columns(file, path, columns)
    stream = file.iter_batches(batch_size=batch_size, columns=columns, use_threads=use_threads)
    row = 0
    while True:
        try:
            batch = next(stream, None)
        except (pa.ArrowInvalid, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{path}: {', '.join(columns)} can't be read from row {row} on ({reason}); record or convert it again"
            ) from None
        if batch is None:
            return
        yield row, batch
        row += batch.num_rows

"""Finding, opening and streaming Parquet files, here or on another filesystem, with errors that name file and row."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from utils.config_data import is_lerobot
from utils.text import printable

logger = logging.getLogger(__name__)

STREAM_BUFFER = 1 << 20  # bytes read at a time of each column
BYTES_PER_BATCH = 64 << 20  # of uncompressed values; batches of large rows are shorter
READ_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)  # what pyarrow raises over damaged files
Source = str | Path  # a local path, or a URI that pyarrow.fs understands


class DataError(ValueError):
    """A data file contradicts the schema or the configuration; the message names file, row and remedy."""


def resolve_parquet_files(specs: Sequence[Source] | Source, key: str) -> list[Source]:
    """Expand files, folders (searched recursively), globs and URIs of them into a list of Parquet files.

    Files and folders whose names begin with a dot (a trash folder, what macOS leaves on a disk) are left out, with a
    log line; linked folders are searched like any other. `~` is the home folder. A folder that a glob matches stands
    for the files in it.

    Args:
        specs: one entry or several; the order of entries is kept, files within a folder or glob are sorted. An
            entry with a scheme (`s3://bucket/folder`, `gs://...`, `hdfs://...`) is read through
            `pyarrow.fs.FileSystem.from_uri`, whose options may follow a `?`.
        key: the config key or flag that the entries come from, for the error message.

    Raises:
        DataError: no entry at all, an entry that matches nothing, a folder that can't be listed, a link to nothing,
            something else than a file, or a file that is named twice.
    """
    entries = [specs] if isinstance(specs, (str, Path)) else list(specs)
    if not entries:
        raise DataError(f"{key} is empty; give a Parquet file, a folder of them, or a glob")
    files: list[Source] = []
    known: dict[object, Source] = {}
    for entry in entries:
        matches = _expand_uri(str(entry), key) if is_uri(entry) else _expand_path(str(entry), key)
        if not matches:
            raise DataError(
                f"{key}: {str(entry)!r} matches no Parquet file{_instead(str(entry))}; give a file, a folder or a "
                "glob, or convert another format (scripts/convert.py)"
            )
        for path, identity in matches:
            files.append(path)
            first = known.setdefault(identity, path)
            if first is not path:
                also = "" if str(first) == str(path) else f" (as {first} too)"
                raise DataError(f"{key} names {path} more than once{also}; every episode would count twice")
    return files


def _instead(entry: str) -> str:
    """What is there where no Parquet file is, for a message."""
    entry = os.path.expanduser(entry)
    if os.path.isdir(entry):
        some = itertools.islice(Path(entry).rglob("*"), 1000)
        endings = Counter(path.suffix or path.name for path in some if path.is_file()).most_common(3)
        return f" (found: {', '.join(f'{count} {printable(end)}' for end, count in endings) or 'no file at all'})"
    return "" if is_uri(entry) or glob.has_magic(entry) else " (there is no such file or folder)"


def is_uri(source: Source) -> bool:
    """Whether a source names a filesystem (`s3://...`) rather than a local path."""
    return "://" in str(source)


def open_parquet(path: Source) -> pq.ParquetFile:
    """Open one file, turning pyarrow's errors for damaged or empty files into a DataError that names it."""
    try:
        # Unbuffered ahead: pyarrow would read whole column chunks, images of hundreds of episodes, at once.
        file = pq.ParquetFile(
            open_bytes(path) if is_uri(path) else path,
            pre_buffer=False,
            buffer_size=STREAM_BUFFER,
            page_checksum_verification=True,  # of files that have checksums, as those written here do
        )
        rows = file.metadata.num_rows
    except READ_ERRORS as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({one_line(error)}); record or convert it again"
        ) from None
    if rows == 0:
        raise DataError(f"{path}: holds no rows; remove it or record it again")
    return file


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


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
        try:
            found = Path(path).stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; record, convert or copy the file again") from None
        return [str(Path(path).resolve()), found.st_size, found.st_mtime_ns]
    filesystem, name = fs.FileSystem.from_uri(str(path))
    info = filesystem.get_file_info(name)
    if info.type != fs.FileType.File:
        raise DataError(f"{path}: no such file")
    return [str(path), info.size, info.mtime_ns or 0]


def files_below(folder: str | Path, suffixes: tuple[str, ...], key: str) -> list[Path]:
    """The files of a folder and of the folders in it, linked ones too, whose names end in one of `suffixes`.

    They are sorted by their names, folder by folder. Names that begin with a dot are left out, and a log line says so.
    A link back to a folder above it is not followed.

    Args:
        folder: where to look.
        suffixes: such as (".parquet",).
        key: the config key or flag that the folder comes from, for the error message.

    Raises:
        DataError: a folder can't be listed, a link to nothing, or something else than a file.
    """
    return [path for path, _ in _files_below(str(folder), suffixes, key)]


def _files_below(folder: str, suffixes: tuple[str, ...], key: str) -> list[tuple[Path, tuple[int, int]]]:
    """The same, with what tells a file from others: device and inode, which cost nothing while listing."""
    hidden: list[str] = []
    found = list(_walk(folder, suffixes, key, (), hidden))
    if hidden:
        more = f" and {len(hidden) - 1} more" if len(hidden) > 1 else ""
        logger.info("%s: left out, since its name begins with a dot: %s%s", key, hidden[0], more)
    return found


def _walk(
    folder: str, suffixes: tuple[str, ...], key: str, above: tuple[tuple[int, int], ...], hidden: list[str]
) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Files below a folder; `above` are the folders that led here, and names that begin with a dot go to `hidden`."""
    try:
        here = os.stat(folder)
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except FileNotFoundError:
        raise DataError(f"{key}: {folder}: no such folder; correct the path") from None
    except NotADirectoryError:
        raise DataError(f"{key}: {folder} is a file; give the folder that it is in") from None
    except OSError as error:
        raise DataError(f"{key}: {folder} can't be listed ({error.strerror}); make it readable") from None
    above = (*above, (here.st_dev, here.st_ino))
    for entry in entries:
        if entry.name.startswith("."):
            if entry.is_dir() or entry.name.endswith(suffixes):
                hidden.append(entry.path)
        elif entry.is_dir():
            if not (entry.is_symlink() and (entry.stat().st_dev, entry.stat().st_ino) in above):
                yield from _walk(entry.path, suffixes, key, above, hidden)
        elif entry.name.endswith(suffixes):
            plain = entry.is_file(follow_symlinks=False)
            yield Path(entry.path), (here.st_dev, entry.inode()) if plain else _identity(entry.path, key)


def _identity(path: str, key: str) -> tuple[int, int]:
    """Device and inode of a file, which all its names have in common."""
    try:
        found = os.stat(path)
    except OSError as error:
        reason = "is a link to nothing" if os.path.islink(path) else f"can't be read ({error.strerror})"
        raise DataError(f"{key}: {path} {reason}; remove it or copy the file again") from None
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{key}: {path} is no regular file; give Parquet files, or folders of them")
    return found.st_dev, found.st_ino


def _expand_path(entry: str, key: str) -> list[tuple[Source, object]]:
    """(file, what all names of that file have in common)."""
    if is_lerobot(entry):
        raise DataError(
            f"{key}: {entry} is a LeRobot dataset, and Parquet files are wanted here; convert it first "
            "(scripts/convert_lerobot.py)"
        )
    entry = os.path.expanduser(entry)
    if os.path.isdir(entry):
        return list(_files_below(entry, (".parquet",), key))
    if os.path.exists(entry) or os.path.islink(entry):
        return [(Path(entry), _identity(entry, key))]
    found: dict[Source, object] = {}
    for match in glob.glob(entry, recursive=True):
        is_folder = os.path.isdir(match)
        found.update(_files_below(match, (".parquet",), key) if is_folder else [(Path(match), _identity(match, key))])
    return sorted(found.items())


def _expand_uri(entry: str, key: str) -> list[tuple[Source, object]]:
    base, question, options = entry.partition("?")
    try:
        filesystem, name = fs.FileSystem.from_uri(entry)
        folder = name if "*" not in name else name[: name.index("*")].rpartition("/")[0]
        info = filesystem.get_file_info(folder)
        if info.type == fs.FileType.File:
            return [(entry, entry)]
        entries = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    except READ_ERRORS as error:
        raise DataError(
            f"{key}: {base} can't be listed ({one_line(error)}); check the address and the credentials"
        ) from None
    pattern = name if "*" in name else "*.parquet"
    hidden = [f.path for f in entries if "/." in f.path[len(folder) :]]
    if hidden:
        logger.info("%s: left out, since a name begins with a dot: %s", key, ", ".join(sorted(hidden)[:3]))
    entries = [f for f in entries if "/." not in f.path[len(folder) :]]
    names = sorted(f.path for f in entries if f.type == fs.FileType.File and fnmatch.fnmatch(f.path, pattern))
    root = base[: len(base) - len(name)] if base.endswith(name) else base[: base.index("://") + 3]
    uris = [f"{root}{path}{question}{options}" for path in names]
    return list(zip(uris, uris, strict=True))


def require_columns(file: pq.ParquetFile, path: Source, names: Sequence[str]) -> None:
    """Raise a DataError when one of `names` is not a column of the file, or is there twice."""
    present = file.schema_arrow.names
    for name in names:
        if name not in present:
            raise DataError(f"{path}: no column {name!r} (found: {', '.join(present)}); see docs/data_format.md")
        if present.count(name) > 1:
            raise DataError(f"{path}: column {name!r} is there {present.count(name)} times; keep one of them")


def batches(
    file: pq.ParquetFile,
    path: Source,
    columns: list[str],
    batch_size: int,
    *,
    first_row: int = 0,
    use_threads: bool = True,
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(row in the file, batch of at most `batch_size` rows) of some columns, from `first_row` on.

    Raises:
        DataError: a column is not there, or the file is damaged, naming the row.
    """
    require_columns(file, path, columns)
    row = first_row
    try:
        for row, batch in stream_batches(file, columns, batch_size, first_row=first_row, use_threads=use_threads):
            yield row, batch
            row += batch.num_rows
    except READ_ERRORS as error:
        raise DataError(
            f"{path}: {', '.join(columns)} can't be read from row {row} on ({one_line(error)}); record or convert it "
            "again"
        ) from None


def stream_batches(
    file: pq.ParquetFile, columns: list[str], batch_size: int, *, first_row: int = 0, use_threads: bool = True
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The same as `batches`, with pyarrow's own errors (READ_ERRORS); ValueError for another number of rows than told.

    Batches of large rows are shorter: pyarrow can't hold more than 2 GB of a struct's bytes in one.
    """
    total = file.metadata.num_rows
    row, size = first_row, min(batch_size, max(1, int(BYTES_PER_BATCH / _bytes_per_row(file, columns))))
    while True:
        try:
            for batch in _rows_from(file, columns, size, row, use_threads):
                if row + batch.num_rows > total:
                    raise ValueError(f"more values than the file's {total} rows")
                yield row, batch
                row += batch.num_rows
            break
        except pa.ArrowNotImplementedError:  # a struct beyond 2 GB that is small in the file, for its values repeat
            if size == 1:
                raise
            size = max(1, size // 8)
    if row < total:
        raise ValueError(f"the values end after {row} of {total} rows")


def _bytes_per_row(file: pq.ParquetFile, columns: list[str]) -> float:
    """Uncompressed bytes of a row, where that is most; 1 where none of `columns` is of bytes or structs.

    From the row groups alone: of a damaged column, pyarrow's metadata end the process.
    """
    kinds = [field.type for field in file.schema_arrow if field.name in columns]
    if not any(pa.types.is_struct(k) or pa.types.is_binary(k) or pa.types.is_large_binary(k) for k in kinds):
        return 1.0
    groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
    return max(1.0, *(group.total_byte_size / max(group.num_rows, 1) for group in groups))


def _rows_from(
    file: pq.ParquetFile, columns: list[str], batch_size: int, first_row: int, use_threads: bool
) -> Iterator[pa.RecordBatch]:
    """Batches from a row of the file on; the row groups before it are not read."""
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    ends = list(itertools.accumulate(sizes))
    groups = [i for i, end in enumerate(ends) if end > first_row]
    if not groups:
        return
    row = ends[groups[0]] - sizes[groups[0]]
    for batch in file.iter_batches(batch_size, row_groups=groups, columns=columns, use_threads=use_threads):
        skipped = max(0, first_row - row)
        row += batch.num_rows
        if skipped < batch.num_rows:
            yield batch.slice(skipped)


def bytes_needed(file: pq.ParquetFile, columns: Sequence[str]) -> int:
    """Compressed bytes of the columns' chunks, and of the footer."""
    metadata, leaves, following = file.metadata, [], 0
    for field in file.schema_arrow:  # not by the chunks' names: of a damaged column, their metadata end the process
        first, following = following, following + _num_leaves(field.type)
        leaves += range(first, following) if field.name in columns else ()
    chunks = (
        metadata.row_group(group).column(leaf).total_compressed_size
        for group in range(metadata.num_row_groups)
        for leaf in leaves
    )
    return metadata.serialized_size + sum(chunks)


def _num_leaves(kind: pa.DataType) -> int:
    """Columns of a Parquet file that a column of this type takes."""
    return sum(_num_leaves(kind.field(i).type) for i in range(kind.num_fields)) if kind.num_fields else 1

"""HDF5 files of others: opened, read in parts, and named where they are damaged or lead elsewhere."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np

with contextlib.suppress(ImportError):
    import hdf5plugin  # noqa: F401  (compression filters such as blosc, where it is installed)

from data.convert.conversion import check_names
from data.convert.foreign_sources import check_array, check_links, reading
from utils.parquet_utils import DataError, one_line

ROWS_PER_BLOCK = 64


def open_hdf5(path: Path) -> h5py.File:
    """A file for reading.

    Raises:
        DataError: another process writes it, or it is damaged.
    """
    try:
        return h5py.File(path, "r")
    except BlockingIOError:
        raise DataError(f"{path}: another process has it open for writing; close it there, then start again") from None
    except OSError as error:
        raise DataError(f"{path}: not a readable HDF5 file ({error}); record or fetch it again") from None


def get_item(file: h5py.File, key: str, kind: type, path: Path) -> Any:
    """A group or a dataset of a file, or a DataError that lists what there is, or says that it lies elsewhere."""
    check_links(file, key, path)
    with reading(path):
        try:
            item = file[key]
        except KeyError:
            item = None
        if isinstance(item, h5py.Dataset) and kind is h5py.Dataset:
            check_array(item, key, path, ROWS_PER_BLOCK)
    if not isinstance(item, kind):
        names: list[str] = []
        file.visititems(lambda name, item: names.append(str(name)) if isinstance(item, kind) else None)
        check_names([key], [name for name in names if name != key], kind.__name__.lower(), str(path))
    return item


def require_written(array: h5py.Dataset, path: Path) -> None:
    """Raise a DataError where parts of an array were never written: HDF5 would read them as zeros."""
    whole = array.id.get_storage_size() >= array.nbytes
    if array.chunks:
        wanted = math.prod(-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True))
        whole = array.id.get_num_chunks() >= wanted
    if not whole:
        raise DataError(f"{path}: parts of {array.name} were never written; the file is incomplete, so record it again")


def read_rows(array: h5py.Dataset, begin: int, end: int, path: Path) -> np.ndarray:
    """Rows of a dataset; a DataError that names the first which can't be read, or the filter that is not there."""
    try:
        return array[begin:end]
    except OSError:
        pass
    filters = array.id.get_create_plist()
    for i in range(filters.get_nfilters()):
        code, _, _, name = filters.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            shown = name.decode(errors="replace") or str(code)
            raise DataError(
                f"{path}: {array.name} is compressed with {shown!r} (filter {code}), which h5py alone can't read; pip "
                "install hdf5plugin and start again"
            )
    for row in range(begin, min(end, len(array))):
        try:
            array[row]
        except OSError as error:
            raise DataError(
                f"{path}: {array.name} is damaged at step {row} ({one_line(error)}); record or fetch that file again"
            ) from None
    raise DataError(f"{path}: {array.name} can't be read; record or fetch that file again")


def attribute_text(file: h5py.File, name: str, path: Path) -> str:
    """The text of an attribute, which may also be a list or an array of one text."""
    try:
        value = file.attrs[name]
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{path}: attribute {name!r} can't be read ({one_line(error)}); mend the file") from None
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bytes):
        value = value.rstrip(b"\0").decode("utf-8", errors="surrogateescape")
    if not isinstance(value, str):
        count = f"{value.size} values" if isinstance(value, np.ndarray) else repr(value)
        raise DataError(f"{path}: attribute {name!r} is {count}; wanted one text, the instruction: mend the file")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # what can't be decoded
        raise DataError(f"{path}: attribute {name!r} is {value!r}, not UTF-8; write it as UTF-8")
    return value

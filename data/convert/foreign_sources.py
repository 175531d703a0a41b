"""Recordings of others: what they may point at, and how much they may declare.

A folder's metadata, links and files decide what is read. Nothing outside of the folder is, unless --follow_links says
so; a file never refers to another file; and no array is larger than its stored bytes can make it.
"""

from __future__ import annotations

import contextlib
import errno
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from utils.foreign_files import inside
from utils.misc import WriteError
from utils.parquet_utils import DataError
from utils.text import printable

MAX_BLOCK_BYTES = 1 << 30  # of the steps of an array that are read at once
MAX_STEPS = 100_000_000  # of one episode
MAX_RATIO = 1100  # bytes of an array for each byte that is stored of it: deflate reaches 1,032
SPARE_BYTES = 1 << 26  # of an array that may be declared and not stored at all
# What h5py and Arrow run into in damaged or crafted files.
_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what is read does not cause these
_CONTAINERS = {  # the first bytes of a video file, from the fourth on in mp4, and the demuxer that reads it
    (4, b"ftyp"): "mov",
    (4, b"moov"): "mov",
    (4, b"mdat"): "mov",
    (4, b"free"): "mov",
    (4, b"wide"): "mov",
    (0, b"\x1aE\xdf\xa3"): "matroska",
    (0, b"RIFF"): "avi",
}


def file_in(folder: Path, name: str | Path, follow_links: bool) -> Path:
    """A file that a folder's metadata name.

    Raises:
        DataError: its path, or a link, leads out of the folder, and `follow_links` (of a link) is not given.
    """
    if inside(folder, name) is None:
        leads = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not (leads and follow_links):
            remedy = "give --follow_links if you trust it" if leads else "so nothing is read from it"
            raise DataError(f"{folder}: {printable(name)} leads to a file outside of that folder; {remedy}")
    return folder / name


def fill_template(template: Any, place: str, values: dict[str, Any]) -> str:
    """A path template of metadata with its values put in.

    Args:
        template: text with fields such as {episode_index:06d}.
        place: what it is called, for errors.
        values: the fields that it may have.

    Raises:
        DataError: another kind of value, another field, or a format that is no number of at most two digits.
    """
    if not isinstance(template, str):
        raise DataError(f"{place} is {printable(repr(template))}; wanted a template of paths")
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"{place} is {printable(repr(template))}, no template ({error})") from None
    for _, name, form, conversion in fields:
        digits = (form or "").removesuffix("d")
        if name is not None and (name not in values or conversion or not (digits == "" or _is_short_number(digits))):
            field = printable("{" + name + (f":{form}" if form else "") + "}")
            raise DataError(f"{place} has the field {field}; wanted {', '.join(values)}, as in {{episode_index:06d}}")
    return template.format(**values)


def _is_short_number(text: str) -> bool:
    return text.isdecimal() and text.isascii() and len(text) <= 2


def video_container(path: Path) -> str:
    """The demuxer for a video file, told by its first bytes; never that of a playlist, which names other files.

    Raises:
        DataError: another kind of file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None
    for (at, signature), container in _CONTAINERS.items():
        if start[at : at + len(signature)] == signature:
            return container
    raise DataError(f"{path}: not a readable video file (begins with {start[:8]!r}); wanted mp4, mkv, webm or avi")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name a file in whatever its reader runs into."""
    try:
        yield
    except _FAULTS as error:
        if isinstance(error, DataError | WriteError) or getattr(error, "errno", None) in _OF_WRITING:
            raise
        raise DataError(
            f"{path}: can't be read ({type(error).__name__}: {printable(error)}); the file is damaged, so record or "
            "fetch it again"
        ) from None


def check_links(file: h5py.File, key: str, path: Path) -> None:
    """Refuse a path within an HDF5 file that leads out of it, or round in circles.

    Raises:
        DataError: naming the link.
    """
    names = [name for name in key.split("/") if name]
    group: Any = file
    for i, name in enumerate(names):
        try:
            kind = group.id.links.get_info(name.encode()).type
        except (AttributeError, KeyError, RuntimeError, ValueError):  # not there, or below something that is no group
            return
        if kind == h5py.h5l.TYPE_EXTERNAL:
            target = group.get(name, getlink=True).filename
            raise DataError(
                f"{path}: {key} is a link to another file ({printable(target)}), which is not followed; put the data "
                "into one file (h5repack, h5copy)"
            )
        if kind == h5py.h5l.TYPE_SOFT and i > 100:
            raise DataError(f"{path}: {key} is a chain of links; put the data where it is named")
        if i + 1 < len(names):
            with reading(path):
                group = group.get(name)


def check_array(array: h5py.Dataset, key: str, path: Path, rows: int) -> None:
    """Check an array before any of it is read.

    Args:
        array, key: the array and its name.
        path: of the file.
        rows: how many steps are read at once.

    Raises:
        DataError: its values lie in other files, or it declares more than is stored.
    """
    layout = array.id.get_create_plist()
    elsewhere = layout.get_layout() == h5py.h5d.VIRTUAL or layout.get_external_count()
    if elsewhere or h5py.h5f.get_name(array.id) != str(path).encode():
        raise DataError(
            f"{path}: the values of {key} lie in another file, which is not read; put the data into one file (h5repack)"
        )
    steps = array.shape[0] if array.shape else 1
    stored, declared = array.id.get_storage_size(), array.nbytes
    if steps > MAX_STEPS or declared > MAX_RATIO * stored + SPARE_BYTES:
        raise DataError(
            f"{path}: {key} declares {array.shape} ({declared:,} bytes), and {stored:,} bytes of it are stored; "
            "the file is damaged, so record or fetch it again"
        )
    if declared // max(1, steps) * min(rows, max(1, steps)) > MAX_BLOCK_BYTES:
        raise DataError(
            f"{path}: {rows} steps of {key} {array.shape} take more than {MAX_BLOCK_BYTES:,} bytes; is its first axis "
            "the steps?"
        )

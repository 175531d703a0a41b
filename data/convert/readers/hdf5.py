"""HDF5 files of any layout: each file, or each of its groups that fits a pattern, is an episode.

    episodes: data/demo_*      groups, robomimic's and LIBERO's; without it, a file is one episode, as ALOHA's
    filter: train              robomimic's mask/<filter>: names of groups
    lengths: shortest          arrays may differ in length (an observation more than actions, as Minari's)

Keys are paths below the episode's group. Arrays of numbers, pixels, text and encoded images have the steps along their
first axis; a text alone is the whole episode's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.convert.conversion import check_names
from data.convert.foreign_sources import MAX_BLOCK_BYTES, check_links, reading
from data.convert.hdf5_files import get_item, open_hdf5, read_rows, require_written
from data.convert.readers.base import (
    ROWS_PER_BLOCK,
    Block,
    Episode,
    Key,
    Reader,
    check_lengths,
    chosen,
    natural_order,
    recordings,
)
from utils.encoded_images import JPEG_START, PNG_START
from utils.parquet_utils import DataError
from utils.text import printable

SUFFIXES = (".hdf5", ".h5", ".h5df")
LENGTHS = ("equal", "shortest")
MAX_KEYS = 10_000  # that are listed of one episode
MAX_BLOCK_ROWS = 256  # of which several arrays with chunks of different lengths are read at once


class Hdf5Reader(Reader):
    """The episodes of a file or of a folder of files."""

    OPTIONS = ("episodes", "filter", "lengths")
    WANTED = "HDF5 file, or a folder of them"
    DESCRIPTION = "HDF5"

    def __init__(self, path: Path, options: dict[str, Any], follow_links: bool = False) -> None:
        super().__init__(path, options, follow_links)
        for name in ("episodes", "filter"):
            if not isinstance(options.get(name, ""), str):
                raise DataError(f"mapping: {name} is {options[name]!r}; wanted a text")
        if options.get("lengths", "equal") not in LENGTHS:
            raise DataError(f"mapping: lengths is {options['lengths']!r}; wanted {' or '.join(LENGTHS)}")

    def episodes(self) -> list[Episode]:
        paths = recordings(self.path, SUFFIXES, self.follow_links, self.WANTED)
        pattern = self.options.get("episodes")
        if not pattern:
            return [Episode(str(path), (path,), "/") for path in paths]
        found = []
        for path in paths:
            with open_hdf5(path) as file, reading(path):
                groups = _groups(file, pattern, path)
                if "filter" in self.options:
                    groups = _filtered(file, groups, self.options["filter"], path)
            found += [Episode(f"{path} {group}", (path,), group) for group in groups]
        if not found:
            raise DataError(f"{self.path}: no group fits {pattern!r} (episodes); --inspect shows what there is")
        return found

    def suggested(self) -> dict[str, Any]:
        path = recordings(self.path, SUFFIXES, self.follow_links, self.WANTED)[0]
        with open_hdf5(path) as file, reading(path):
            for pattern in ("data/demo_*", "episode_*", "demo_*", "traj_*"):
                if "episodes" not in self.options and _groups(file, pattern, path, strict=False):
                    self.options["episodes"] = pattern
        return dict(self.options)

    def keys(self, episode: Episode) -> dict[str, Key]:
        path = episode.files[0]
        with open_hdf5(path) as file, reading(path):
            found: dict[str, Key] = {}
            _list(get_item(file, episode.place, h5py.Group, path), "", found, path)
            return dict(sorted(found.items(), key=lambda item: natural_order(item[0])))

    def attributes(self, episode: Episode) -> dict[str, Any]:
        """Those of the episode's group, of the groups around it and of the file; the nearest counts."""
        path = episode.files[0]
        found: dict[str, Any] = {}
        with open_hdf5(path) as file, reading(path):
            group = get_item(file, episode.place, h5py.Group, path)
            while True:
                for name in group.attrs:
                    try:
                        found.setdefault(str(name), group.attrs[name])
                    except (OSError, TypeError, ValueError):  # of a type that h5py can't show: not there
                        continue
                if group.name == "/":
                    return found
                group = group.parent

    def blocks(self, episode: Episode, keys: Sequence[str]) -> Iterator[Block]:
        path = episode.files[0]
        with open_hdf5(path) as file, reading(path):
            get_item(file, episode.place, h5py.Group, path)
            arrays, single = {}, {}
            for key in keys:
                array = self._array(file, episode, key)
                if _is_single(array):
                    single[key] = _decoded(np.atleast_1d(array[()]))[0]
                else:
                    arrays[key] = array
            length = self._length({key: len(array) for key, array in arrays.items()}, episode.name)
            rows = block_rows(arrays.values())
            for begin in range(0, length, rows):
                end = min(begin + rows, length)
                block: Block = {key: _decoded(read_rows(array, begin, end, path)) for key, array in arrays.items()}
                yield block | {key: [value] * (end - begin) for key, value in single.items()}

    def values(self, episode: Episode, key: str) -> Iterator[np.ndarray | list[Any]]:
        """Everything under one key, also what an episode has one value of."""
        path = episode.files[0]
        with open_hdf5(path) as file, reading(path):
            array = self._array(file, episode, key)
            if _is_single(array):
                yield _decoded(np.atleast_1d(array[()]))
                return
        yield from super().values(episode, key)

    def _array(self, file: h5py.File, episode: Episode, key: str) -> h5py.Dataset:
        path = episode.files[0]
        array = get_item(file, f"{episode.place.rstrip('/')}/{key}", h5py.Dataset, path)
        require_written(array, path)
        return array

    def _length(self, lengths: dict[str, int], where: str) -> int:
        if not lengths:
            raise DataError(f"{where}: none of the mapping's keys has steps; correct the mapping")
        if self.options.get("lengths") == "shortest":
            shortest = min(lengths.values())
            lengths = dict.fromkeys(lengths, shortest)
        return check_lengths(lengths, where)


def block_rows(arrays: Any) -> int:
    """How many rows are read at once: whole chunks of every array, so that none is decompressed twice.

    Args:
        arrays: anything with `chunks` (or None), `shape` and `dtype`.
    """
    arrays = list(arrays)
    chunks = {array.chunks[0] for array in arrays if array.chunks} or {1}
    rows = math.lcm(*chunks)
    if rows > MAX_BLOCK_ROWS:  # whole chunks of the largest array alone, or of one frame if these are too large
        largest = max((a for a in arrays if a.chunks), key=lambda a: math.prod(a.shape[1:]) * a.dtype.itemsize)
        rows = largest.chunks[0]
    rows *= max(1, ROWS_PER_BLOCK // rows)
    per_row = sum(math.prod(array.shape[1:]) * array.dtype.itemsize for array in arrays)
    return rows if rows * per_row <= MAX_BLOCK_BYTES else max(1, min(rows, MAX_BLOCK_BYTES // per_row))


def _groups(file: h5py.File, pattern: str, path: Path, *, strict: bool = True) -> list[str]:
    """The groups that fit a path whose parts may be patterns, in natural order."""
    found = [""]
    for part in pattern.strip("/").split("/"):
        below = []
        for name in found:
            if name:
                check_links(file, name, path)
            group = file.get(name) if name else file
            if isinstance(group, h5py.Group):
                below += [f"{name}/{child}".strip("/") for child in chosen(list(map(str, group)), part)]
        if not below:
            if not strict:
                return []
            names = ", ".join(map(str, list(file)[:20])) or "none"
            raise DataError(
                f"{path}: no group fits {pattern!r} (episodes; groups at the top: {printable(names)}); correct it"
            )
        found = below
    for name in found:
        check_links(file, name, path)
    groups = [name for name in found if isinstance(file.get(name), h5py.Group)]
    if strict and not groups:
        raise DataError(f"{path}: what fits {pattern!r} (episodes) is no group; correct it")
    return groups


def _filtered(file: h5py.File, groups: list[str], name: str, path: Path) -> list[str]:
    """The groups that a mask of robomimic's names."""
    masks = list(map(str, get_item(file, "mask", h5py.Group, path)))
    check_names([name], masks, "filter", f"{path} mask")
    values = get_item(file, f"mask/{name}", h5py.Dataset, path)[()]
    names = {value.decode() if isinstance(value, bytes) else str(value) for value in np.atleast_1d(values).tolist()}
    known = {group.rpartition("/")[2] for group in groups}
    if unknown := sorted(names - known):
        raise DataError(f"{path}: mask/{name} names {printable(unknown[0])}, which is not there; correct the file")
    return [group for group in groups if group.rpartition("/")[2] in names]


def _list(group: h5py.Group, prefix: str, found: dict[str, Key], path: Path) -> None:
    """Every array below a group."""
    for name in map(str, group):
        if len(found) > MAX_KEYS:
            raise DataError(f"{path}: more than {MAX_KEYS} arrays in one episode; is `episodes` missing?")
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            target = printable(link.filename, 80)
            found[f"{prefix}{name}"] = Key(
                f"not read: a link to another file ({target}); put the data into one file (h5repack, h5copy)"
            )
            continue
        item = group.get(name)
        if isinstance(item, h5py.Group) and isinstance(link, h5py.HardLink):
            _list(item, f"{prefix}{name}/", found, path)
        elif isinstance(item, h5py.Dataset):
            found[f"{prefix}{name}"] = _key(item)


def _key(array: h5py.Dataset) -> Key:
    if array.shape is None:
        return Key("not read: an empty array")
    once = _is_single(array)
    if array.dtype.kind in "biuf":
        return Key(array.dtype.name, () if once else array.shape[1:], once)
    if array.dtype.kind in "SOU" and array.ndim <= 1:
        return Key(_kind_of(array, once), (), once)
    return Key(f"not read: an array of {array.dtype} {array.shape}")


def _kind_of(array: h5py.Dataset, once: bool) -> str:
    """`image` or `text`: what the first value of an array of bytes is."""
    if len(array.shape) and not len(array):
        return "not read: an empty array"
    if array.external or array.is_virtual:
        return "not read: its values lie in another file"
    first = array[()] if not array.shape else array[0]
    start = first[:8] if isinstance(first, bytes | str) else np.asarray(first)[:8].astype(np.uint8).tobytes()
    is_image = isinstance(start, bytes) and (start.startswith(JPEG_START) or start.startswith(PNG_START))
    return "image" if is_image and not once else "text"


def _is_single(array: h5py.Dataset) -> bool:
    """Whether an array has one value for the whole episode: no axis, or one text."""
    return array.shape == () or (array.shape == (1,) and array.dtype.kind in "SO")


def _decoded(values: np.ndarray) -> np.ndarray | list[Any]:
    """Texts and encoded images as a list; numbers as they are."""
    return values.tolist() if values.dtype.kind in "SOU" else values

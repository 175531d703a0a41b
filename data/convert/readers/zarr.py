"""zarr groups of episodes one after the other (diffusion_policy's ReplayBuffer, UMI), as a folder or a zip.

    data/<key>           the steps of all episodes
    meta/episode_ends    where each episode ends, exclusive (`ends`: another array)

Arrays may be longer than the last end, which counts. The packages are in requirements-convert.txt.
"""

from __future__ import annotations

import functools
import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.convert.conversion import check_names
from data.convert.foreign_sources import MAX_STEPS, file_in, reading
from data.convert.readers.base import Block, Episode, Key, Reader, optional_module
from data.convert.readers.hdf5 import block_rows
from utils.parquet_utils import DataError
from utils.text import printable

ENDS = "meta/episode_ends"
# Codecs that turn bytes into bytes or numbers and nothing else; "pickle" is not among them.
CODECS = frozenset(
    "blosc zlib gzip zstd lz4 lzma bz2 shuffle delta fixedscaleoffset bitround quantize packbits crc32 crc32c adler32 "
    "fletcher32 jenkins_lookup3 vlen-utf8 vlen-bytes astype base64 bytes transpose sharding_indexed string "
    "numcodecs.blosc numcodecs.zlib numcodecs.gzip numcodecs.zstd numcodecs.lz4 numcodecs.shuffle".split()
)
_IMAGE_CODECS = ("imagecodecs_",)


class ZarrReader(Reader):
    """The episodes of one group."""

    OPTIONS = ("ends",)
    WANTED = "zarr folder, or a zip of one"
    DESCRIPTION = "zarr"

    def __init__(self, path: Path, options: dict[str, Any], follow_links: bool = False) -> None:
        super().__init__(path, options, follow_links)
        self._ends_key = str(options.get("ends", ENDS))

    @property
    def root(self) -> Path:
        return self.path.parent

    def episodes(self) -> list[Episode]:
        ends = self._ends()
        if not len(ends):
            raise DataError(f"{self.path}: {self._ends_key} names no episodes; record some, or fetch it again")
        spans = itertools.pairwise([0, *ends.tolist()])
        return [Episode(f"{self.path} episode {i}", (self.path,), span) for i, span in enumerate(spans)]

    def keys(self, episode: Episode) -> dict[str, Key]:
        return _array_keys(self._group())

    def attributes(self, episode: Episode) -> dict[str, Any]:
        with reading(self.path):
            return dict(self._group().attrs)

    def blocks(self, episode: Episode, keys: Sequence[str]) -> Iterator[Block]:
        begin, end = episode.place
        with reading(self.path):
            arrays = {key: self._array(key) for key in keys}
            for key, array in arrays.items():
                if array.shape[0] < end:
                    raise DataError(
                        f"{episode.name}: {key} has {array.shape[0]} steps, {self._ends_key} says {end} or more; the "
                        "file is incomplete: fetch or record it again"
                    )
            rows = block_rows(arrays.values())
            bounds = [begin, *range(begin // rows * rows + rows, end, rows), end]  # whole chunks of the array
            for first, last in itertools.pairwise(bounds):
                block = {key: self._rows(array, key, first, last) for key, array in arrays.items()}
                yield {k: v.tolist() if v.dtype.kind in "SOUT" else v for k, v in block.items()}

    def sources(self, episodes: Sequence[Episode]) -> dict[str, list[int]]:
        if self.path.is_file():
            return super().sources(episodes)
        # a folder of chunks: their number, and the newest change of any of them
        stats = [path.stat() for path in self.path.rglob("*") if path.is_file()]
        return {self.path.name: [sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)]}

    def _ends(self) -> np.ndarray:
        with reading(self.path):
            ends = np.asarray(self._array(self._ends_key)[:])
        if ends.ndim != 1 or ends.dtype.kind not in "iu" or (np.diff(ends.astype(np.int64), prepend=0) <= 0).any():
            raise DataError(
                f"{self.path}: {self._ends_key} is {ends.dtype} {ends.shape}; wanted ascending numbers, each episode's "
                "end: an episode without steps, or a damaged file"
            )
        if len(ends) and ends[-1] > MAX_STEPS:
            raise DataError(f"{self.path}: {self._ends_key} goes up to {ends[-1]}; at most {MAX_STEPS:,} are read")
        return ends.astype(np.int64)

    def _rows(self, array: Any, key: str, begin: int, end: int) -> np.ndarray:
        try:
            self._check_chunks(array, key, begin, end)
            return np.asarray(array[begin:end])
        except (ValueError, RuntimeError, OSError, TypeError) as error:
            raise DataError(
                f"{self.path}: {key} is damaged in steps {begin} to {end - 1} ({printable(error, 100)}); fetch or "
                "record it again"
            ) from None

    def _check_chunks(self, array: Any, key: str, begin: int, end: int) -> None:
        """Raise a ValueError for chunks in a folder that are cut short: Blosc does not notice (a zip does)."""
        content = array.metadata.to_dict()
        compressor = content.get("compressor") if content.get("zarr_format") == 2 and self.path.is_dir() else None
        if not isinstance(compressor, dict) or compressor.get("id") != "blosc":
            return
        counts = [-(-size // chunk) for size, chunk in zip(array.shape[1:], array.chunks[1:], strict=True)]
        for first in range(begin // array.chunks[0], -(-end // array.chunks[0])):
            for others in itertools.product(*map(range, counts)):
                name = content.get("dimension_separator", ".").join(map(str, (first, *others)))
                path = self.path / key / name
                if path.is_file():
                    with path.open("rb") as file:
                        announced = int.from_bytes(file.read(16)[12:], "little")
                    if announced != path.stat().st_size:
                        raise ValueError(f"chunk {name} has {path.stat().st_size:,} bytes of {announced:,}")

    def _array(self, key: str) -> Any:
        group = self._group()
        check_names([key], list(_array_keys(group)), "array", str(self.path))
        array = group[key]
        _check_codecs(array, key, self.path)
        return array

    def _group(self) -> Any:
        return _open(self.path, self.path.stat().st_mtime_ns, self.follow_links)


@functools.lru_cache(maxsize=1)
def _open(path: Path, _changed: int, follow_links: bool) -> Any:
    zarr = optional_module("zarr", path)
    storage = optional_module("zarr.storage", path)
    if path.is_file():
        _check_archive(path)
    else:
        _check_folder(path, follow_links)
    with reading(path):
        store = storage.ZipStore(path, mode="r") if path.is_file() else storage.LocalStore(path, read_only=True)
        try:
            return zarr.open_group(store, mode="r")
        except (FileNotFoundError, zarr.errors.GroupNotFoundError):
            raise DataError(f"{path}: no zarr group; give the {ZarrReader.WANTED}") from None


def _check_archive(path: Path) -> None:
    """Refuse an archive with names that lead out of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: not a readable zip ({error}); wanted the {ZarrReader.WANTED}") from None
    for name in names:
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts or ":" in name[:3]:
            raise DataError(f"{path}: holds the name {printable(name)}, which leads out of it; nothing is read from it")


def _check_folder(path: Path, follow_links: bool) -> None:
    for file in path.rglob("*"):
        if file.is_symlink():
            file_in(path, file.relative_to(path), follow_links)


def _array_keys(group: Any) -> dict[str, Key]:
    found = {}
    for name, item in sorted(group.members(max_depth=None)):
        if hasattr(item, "shape"):
            dtype = np.dtype(item.dtype) if not isinstance(item.dtype, str) else item.dtype
            kind = "text" if getattr(dtype, "kind", "U") in "OUST" else dtype.name
            found[name] = Key(kind, item.shape[1:])
    return found


def _check_codecs(array: Any, key: str, path: Path) -> None:
    """Refuse what is stored with a codec that is not known to turn bytes into numbers: zarr v2 has one for pickles."""
    metadata = json.dumps(array.metadata.to_dict(), default=str)
    content = json.loads(metadata)
    codecs = [content.get("compressor"), *(content.get("filters") or []), *(content.get("codecs") or [])]
    while codecs:
        codec = codecs.pop()
        if codec is None:
            continue
        name = codec.get("id") or codec.get("name") if isinstance(codec, dict) else None
        inner = codec.get("configuration") if isinstance(codec, dict) else None
        if isinstance(inner, dict):
            codecs += [*(inner.get("codecs") or []), *(inner.get("index_codecs") or [])]
        if name is None or not (name in CODECS or name.startswith(_IMAGE_CODECS)):
            raise DataError(f"{path}: {key} is stored with the codec {printable(name or codec, 60)}, which is not read")

"""CALVIN: one .npz file a step, episodes as spans of step numbers.

    training/episode_0358482.npz                   rgb_static, rgb_gripper, rel_actions, actions, robot_obs, ...
    training/lang_annotations/auto_lang_ann.npy    windows with their instruction: `language`, the key of the prompt
    training/ep_start_end_ids.npy                  whole recordings, without instructions (windows: episodes)

Source: the dataset's README and datasets/disk_dataset.py of mees/calvin. The annotation is a pickle. It is read by an
unpickler that knows NumPy's arrays and plain containers alone: whatever else a pickle names is refused, never run.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.convert.conversion import check_names
from data.convert.foreign_sources import MAX_BLOCK_BYTES, MAX_STEPS, file_in
from data.convert.readers.base import ROWS_PER_BLOCK, Block, Episode, Key, Reader
from utils.parquet_utils import DataError
from utils.text import printable

LANGUAGE = "language"
ANNOTATION, SPANS = "lang_annotations/auto_lang_ann.npy", "ep_start_end_ids.npy"
WINDOWS = ("language", "episodes")
MAX_PICKLE_BYTES = 1 << 28
FPS = 30
_STEP = re.compile(r"(?P<prefix>\D*)(?P<number>\d+)\.npz")


class CalvinReader(Reader):
    """The windows, or the recordings, of one split."""

    OPTIONS = ("windows",)
    WANTED = "folder of a split of CALVIN (training or validation)"
    DESCRIPTION = "CALVIN"

    def __init__(self, path: Path, options: dict[str, Any], follow_links: bool = False) -> None:
        super().__init__(path, options, follow_links)
        if options.get("windows", WINDOWS[0]) not in WINDOWS:
            raise DataError(f"mapping: windows is {options['windows']!r}; wanted {' or '.join(WINDOWS)}")
        first = next(iter(sorted(path.glob("*.npz"))), None) if path.is_dir() else None
        match = _STEP.fullmatch(first.name) if first else None
        if match is None:
            raise DataError(f"{path}: holds no step such as episode_0000001.npz; give the {self.WANTED}")
        self._prefix, self._digits = match["prefix"], len(match["number"])

    def episodes(self) -> list[Episode]:
        if self.options.get("windows") == "episodes":
            spans, texts = _array(file_in(self.path, SPANS, self.follow_links)), None
        else:
            spans, texts = self._annotation()
        spans = np.asarray(spans)
        good = spans.ndim == 2 and spans.shape[1] == 2 and spans.dtype.kind in "iu" and len(spans)
        if not good or (spans[:, 0] > spans[:, 1]).any() or (np.diff(spans, axis=1) > MAX_STEPS).any():
            raise DataError(f"{self.path}: spans are {spans.dtype} {spans.shape}; wanted first and last step of each")
        return [
            Episode(
                f"{self.path} steps {begin} to {end}",
                (self._file(begin),),
                (begin, end, None if texts is None else texts[i]),
            )
            for i, (begin, end) in enumerate(spans.tolist())
        ]

    def keys(self, episode: Episode) -> dict[str, Key]:
        with _open(episode.files[0]) as step:
            found = {name: Key(values.dtype.name, values.shape) for name, values in _values(step, step.files, episode)}
        return {**found, LANGUAGE: Key("text", (), True)} if episode.place[2] is not None else found

    def fps(self) -> float | None:
        return FPS

    def blocks(self, episode: Episode, keys: Sequence[str]) -> Iterator[Block]:
        begin, end, text = episode.place
        stored = [key for key in keys if key != LANGUAGE]
        for first in range(begin, end + 1, ROWS_PER_BLOCK):
            last = min(first + ROWS_PER_BLOCK, end + 1)
            columns: dict[str, list[np.ndarray]] = {key: [] for key in stored}
            for number in range(first, last):
                path = self._file(number)
                with _open(path) as step:
                    check_names(stored, step.files, "key", str(path))
                    for key, values in _values(step, stored, episode):
                        columns[key].append(values)
            for key, values in columns.items():
                shapes = {array.shape for array in values}
                if len(shapes) > 1:
                    raise DataError(f"{episode.name}: {key} has the shapes {shapes}; fetch the dataset again")
            block: Block = {key: np.stack(values) for key, values in columns.items()}
            yield block | ({LANGUAGE: [text] * (last - first)} if LANGUAGE in keys else {})

    def sources(self, episodes: Sequence[Episode]) -> dict[str, list[int]]:
        """The first and the last step of each span: a file a step is too many to look at."""
        ends = [Episode(e.name, (self._file(e.place[0]), self._file(e.place[1]))) for e in episodes]
        return super().sources(ends)

    def _file(self, number: int) -> Path:
        return file_in(self.path, f"{self._prefix}{number:0{self._digits}d}.npz", self.follow_links)

    def _annotation(self) -> tuple[Any, list[str]]:
        """(spans, the instruction of each)."""
        path = file_in(self.path, ANNOTATION, self.follow_links)
        if not path.is_file():
            raise DataError(f"{path}: no such file; say windows: episodes for recordings without instructions")
        content = read_object_array(path)
        try:
            spans, texts = content["info"]["indx"], content["language"]["ann"]
        except (KeyError, TypeError, IndexError):
            raise DataError(f"{path}: holds no language.ann and info.indx; fetch that file again") from None
        texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
        if len(texts) != len(spans) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}: has {len(spans)} windows and {len(texts)} instructions; fetch that file again")
        return np.asarray(spans), texts


def read_object_array(path: Path) -> Any:
    """What a .npy file of one Python object holds, read without running anything.

    Raises:
        DataError: it is no such file, or names something else than NumPy's arrays.
    """
    try:
        if path.stat().st_size > MAX_PICKLE_BYTES:
            raise DataError(f"{path}: is larger than {MAX_PICKLE_BYTES:,} bytes; wanted an annotation")
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
            header = (read_header or np.lib.format.read_array_header_2_0)(file)
            rest = file.read()
        if not header[2].hasobject:
            raise DataError(f"{path}: holds numbers ({header[2]}); wanted an annotation of CALVIN's")
        return _plain(_OnlyArrays(io.BytesIO(rest)).load())
    except DataError:
        raise
    except _Refused as error:
        raise DataError(f"{path}: {error}; nothing of it is run, and the file is not read") from None
    except (pickle.UnpicklingError, EOFError, *_DAMAGED) as error:
        raise DataError(f"{path}: not a readable annotation ({printable(error)}); fetch that file again") from None


class _Refused(Exception):
    """A pickle names something that is not NumPy's."""


class _Dtype:
    """Stands for numpy.dtype in a pickle: plain types by their code, and no flags that a pickle could forge."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufSU]\d{1,6}|O8?", code):
            raise _Refused(f"its pickle has an array of {printable(code, 40)}")
        self.code, self._order = code, "="

    def __setstate__(self, state: Any) -> None:
        self._order = state[1] if state[1] in ("<", ">") else "="

    @property
    def plain(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self._order)


class _Array:
    """Stands for numpy.ndarray: `value` is a real array of numbers or texts, or the list of an array of objects."""

    value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, data = state
        if not isinstance(dtype, _Dtype) or not all(type(size) is int and size >= 0 for size in shape):
            raise _Refused("its pickle makes something else than an array")
        if dtype.code.startswith("O"):
            if not isinstance(data, list) or len(shape) > 1 or len(data) != math.prod(shape):
                raise _Refused("its pickle has an array of objects of another form")
            self.value = data if shape else data[0]
        else:
            self.value = np.frombuffer(data, dtype.plain).reshape(shape, order="F" if by_columns else "C")


def _number(dtype: Any, data: Any) -> Any:
    """Stands for numpy's `scalar`."""
    if not isinstance(dtype, _Dtype) or dtype.code.startswith("O") or not isinstance(data, bytes):
        raise _Refused("its pickle makes something else than a number")
    return np.frombuffer(data, dtype.plain, count=1)[0]


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> _Array:
    """Stands for numpy's `_frombuffer`, which protocol 5 names."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


_NAMES = {  # what a pickle of arrays names, and what stands for it here; nothing of NumPy itself is called
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("core.multiarray", "scalar"): _number,
    ("core.numeric", "_frombuffer"): _from_buffer,
}


class _OnlyArrays(pickle.Unpickler):
    """An unpickler for which nothing exists but arrays; lists, dicts, numbers and texts need no name."""

    def find_class(self, module: str, name: str) -> Any:
        known = module.removeprefix("numpy.").replace("_core", "core"), name
        if known not in _NAMES or not module.startswith("numpy"):
            raise _Refused(f"its pickle names {printable(module, 40)}.{printable(name, 40)}, and only arrays are taken")
        return _NAMES[known]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("its pickle names objects elsewhere")


def _plain(value: Any, depth: int = 0) -> Any:
    """A value with real arrays in place of what stood for them."""
    if depth > 16:
        raise _Refused("its values lie in each other more than 16 deep")
    if isinstance(value, _Array):
        return _plain(value.value, depth + 1)
    if isinstance(value, dict):
        return {key: _plain(below, depth + 1) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below, depth + 1) for below in value]
    return value


_DAMAGED = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


def _open(path: Path) -> Any:
    try:
        return np.load(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; the dataset is incomplete, so fetch it again") from None
    except (*_DAMAGED, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: not a readable .npz file ({printable(error)}); fetch it again") from None


def _values(step: Any, keys: Sequence[str], episode: Episode) -> Iterator[tuple[str, np.ndarray]]:
    size = 0
    for key in keys:
        try:
            values = step[key]
        except (*_DAMAGED, zipfile.BadZipFile, EOFError) as error:
            raise DataError(f"{episode.name}: {key} can't be read ({printable(error)}); fetch it again") from None
        size += values.nbytes
        if size * ROWS_PER_BLOCK > MAX_BLOCK_BYTES:
            raise DataError(f"{episode.name}: a step of {size:,} bytes is too large; name fewer keys")
        yield key, values


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except (*_DAMAGED, EOFError) as error:
        raise DataError(f"{path}: not a readable array ({printable(error)}); fetch it again") from None

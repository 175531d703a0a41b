"""What every reader of a recording format can do, and what the readers share.

A reader lists episodes and yields their steps in blocks of `{key: values}`, as they are stored. It builds no column of
ours: `data/convert/columns.py` does that for all formats alike.
"""

from __future__ import annotations

import fnmatch
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from data.convert.conversion import fingerprint
from data.convert.foreign_sources import file_in
from utils.parquet_utils import DataError, files_below

ROWS_PER_BLOCK = 64
# Of each key the values of N steps: an array (N, ...), or a list of N texts or encoded images.
Block = dict[str, np.ndarray | list[Any]]


@dataclass(frozen=True)
class Key:
    """What a source holds under one name.

    Attributes:
        kind: `float32` and the like, `text`, `jpeg`, `png` or `image` (encoded, of either kind); what can't be read
            begins with "not read: " and says why.
        shape: of one step's value; () for a single number, a text or an encoded image.
        per_episode: whether there is one value for the whole episode.
    """

    kind: str
    shape: tuple[int | None, ...] = ()
    per_episode: bool = False

    def __str__(self) -> str:
        text = f"{self.kind} {self.shape}" if self.shape else self.kind
        return f"{text}, one an episode" if self.per_episode else text


@dataclass(frozen=True)
class Episode:
    """Where one episode lies: small, and sent to the process that converts it."""

    name: str  # for messages: file, and the place in it
    files: tuple[Path, ...]  # that it is read from
    place: Any = None  # what the reader needs to find it
    number: int | None = None  # in the source; None: its position


class Reader(ABC):
    """A recording in one format. Picklable, since worker processes get a copy."""

    OPTIONS: ClassVar[tuple[str, ...]] = ()  # what a mapping may say to this reader alone
    WANTED: ClassVar[str]  # what PATH must be, for messages
    DESCRIPTION: ClassVar[str]  # of the format, for the metadata of files
    WARN_OF_ZERO_ACTION: ClassVar[bool] = False  # whether a last step without an action is common

    def __init__(self, path: Path, options: dict[str, Any], follow_links: bool = False) -> None:
        self.path, self.options, self.follow_links = path, options, follow_links

    @property
    def root(self) -> Path:
        """The folder that files are named relative to."""
        return self.path if self.path.is_dir() else self.path.parent

    @abstractmethod
    def episodes(self) -> list[Episode]:
        """Every episode, in order, from metadata alone.

        Raises:
            DataError: there is none, or the metadata contradict themselves.
        """

    @abstractmethod
    def keys(self, episode: Episode) -> dict[str, Key]:
        """What an episode holds, for messages and --inspect."""

    def plain_key(self, key: str) -> str:
        """The name in `keys` of a key that a mapping may write at more length."""
        return key

    @abstractmethod
    def blocks(self, episode: Episode, keys: Sequence[str]) -> Iterator[Block]:
        """The steps of an episode, in blocks of bounded size.

        Args:
            episode: one of `episodes`.
            keys: those that are needed, each one of `keys`.

        Raises:
            DataError: the source is damaged there.
        """

    def values(self, episode: Episode, key: str) -> Iterator[np.ndarray | list[Any]]:
        """Everything that an episode holds under one key, in blocks."""
        for block in self.blocks(episode, [key]):
            yield block[key]

    def suggested(self) -> dict[str, Any]:
        """For --inspect: entries of OPTIONS that a mapping of this recording needs, taken as its options."""
        return {}

    def recommended(self) -> dict[str, Any] | None:
        """For --inspect: a mapping that the source's metadata name themselves; None where they name none."""
        return None

    def derived(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """A mapping's entries, with those added that follow from the source itself."""
        return dict(entries)

    def check_mapping(self, mapping: Any) -> None:
        """Raise a DataError where a mapping ignores what the source's own metadata say of its keys."""
        del mapping

    def attributes(self, episode: Episode) -> dict[str, Any]:
        """What the format says beside the steps: text, numbers and JSON by name."""
        return {}

    def fps(self) -> float | None:
        """Steps a second; None where the format does not say."""
        return None

    def time_key(self) -> str | None:
        """The key of the seconds since the episode's start; None where rows are `fps` apart."""
        return None

    def facts(self, mapping: Any) -> dict[str, Any]:
        """What the files' metadata should say besides; `mapping` is the conversion's."""
        return {"robot_type": None, "state_names": None, "action_names": None}

    def settings(self) -> dict[str, Any]:
        """What tells this state of the source's metadata from another one, for the record of a conversion."""
        return {}

    def sources(self, episodes: Sequence[Episode]) -> dict[str, list[int]]:
        """The state of each file that some episodes are read from."""
        files = sorted({path for episode in episodes for path in episode.files})
        return {path.relative_to(self.root).as_posix(): fingerprint(path) for path in files}


def natural_order(text: str) -> list[str | int]:
    """A sort key by which demo_2 comes before demo_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def recordings(path: Path, suffixes: tuple[str, ...], follow_links: bool, wanted: str) -> list[Path]:
    """The file `path`, or the files below the folder `path`, `episode_2` before `episode_10`.

    Raises:
        DataError: there are none, or one is a link to a file elsewhere and `follow_links` is not given.
    """
    if path.is_file():
        return [path]
    found = files_below(path, suffixes, "PATH")
    doubtful = {file.parent for file in found} - {path} | {file for file in found if file.is_symlink()}
    for file in sorted(doubtful):
        file_in(path, file.relative_to(path), follow_links)
    if not found:
        raise DataError(f"{path}: holds no file that ends in {' or '.join(suffixes)}; wanted the {wanted}")
    return sorted(found, key=lambda file: natural_order(str(file)))


def chosen(names: Sequence[str], pattern: str) -> list[str]:
    """The names that fit a pattern such as `demo_*`, in natural order."""
    return sorted(fnmatch.filter(names, pattern), key=natural_order)


def optional_module(name: str, path: Path) -> ModuleType:
    """A module of requirements-convert.txt.

    Raises:
        DataError: it is not installed; the line names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path}: reading this format needs the package of {error.name!r}; run: pip install -r "
            "requirements-convert.txt"
        ) from None


def check_lengths(lengths: Mapping[str, int], where: str) -> int:
    """The one length of all keys.

    Raises:
        DataError: they differ, or it is 0.
    """
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise DataError(f"{where}: steps differ ({counts}); the file is damaged or incomplete, so record it again")
    length = next(iter(lengths.values()))
    if length == 0:
        raise DataError(f"{where}: holds no steps; remove it or record it again")
    return length

"""Every row's numbers, flags and prompts as arrays, and where its episodes begin as far as the flags tell.

`data/doctor/reading.py` fills them. Images are not among them. Numbers take about four bytes a value in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.schema import ACTION, MAIN_CAMERA
from utils.parquet_utils import Source

UNREAD, NULL = -1, -2  # in flags, prompt codes and vector lengths
EMPTY, INVALID = -3, -4  # in prompt codes only
NO_INDEX = np.iinfo(np.int64).min


@dataclass
class Rows:
    """N rows of all files in order, the training split first.

    Attributes:
        files: every file, also those that could not be read (they have no rows).
        splits: the split of each file, `train` or `val`.
        schema_ok: whether each file could be opened at all.
        file_starts: int64 (files + 1,), first global row of each file.
        cameras: per file, camera -> name of its column.
        flags: int8 (N,) per flag: 0, 1, `UNREAD` or `NULL`.
        labels: the same per optional label; `UNREAD` where its column is absent.
        prompt: int32 (N,), index into `prompts`, or `UNREAD`, `NULL`, `EMPTY`, `INVALID`.
        lengths: int32 (N,) per vector column: values in the row, or `UNREAD`, `NULL`.
        vectors: float32 (N, width) per vector column (those of the state, in order, and `action`); NaN in rows that are
            not read, null or of another width.
        imprecise: int64 global rows per vector column where float32 can't hold the value.
        indices: int64 (N,) per index column, `NO_INDEX` where absent.
        timestamp: float64 (N,), seconds, NaN where absent.
        has_timestamp: bool (files,).
        file_of: int32 (N,), index into `files`.
        episode: int64 (N,), the episode within the split, as far as the flags tell.
        episode_starts: int64 (episodes + 1,), first global row of each episode over both splits.
    """

    files: list[Source]
    splits: list[str]
    schema_ok: np.ndarray
    file_starts: np.ndarray
    cameras: list[dict[str, str]]
    flags: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    prompts: list[str]
    prompt: np.ndarray
    lengths: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]
    imprecise: dict[str, np.ndarray]
    indices: dict[str, np.ndarray]
    timestamp: np.ndarray
    has_timestamp: np.ndarray
    file_of: np.ndarray
    episode: np.ndarray
    episode_starts: np.ndarray

    def __len__(self) -> int:
        return int(self.file_starts[-1])

    @property
    def state(self) -> np.ndarray:
        """float32 (N, state_dim), joined from its columns; zeros (N, 1) where there are none."""
        columns = [values for name, values in self.vectors.items() if name != ACTION]
        return np.concatenate(columns, axis=1) if columns else np.zeros((len(self), 1), np.float32)

    @property
    def all_cameras(self) -> list[str]:
        """Every camera of any file, in the order of the first file that has it; the main one first."""
        names = dict.fromkeys(camera for columns in self.cameras for camera in columns)
        return sorted(names, key=lambda name: name != MAIN_CAMERA)

    @property
    def num_episodes(self) -> int:
        """Episodes of both splits."""
        return len(self.episode_starts) - 1

    def place(self, index: int) -> tuple[Source, int, int]:
        """(file, row in it, episode of its split) of a global row."""
        file = int(self.file_of[index])
        return self.files[file], int(index - self.file_starts[file]), int(self.episode[index])

    def file_rows(self, file: int) -> slice:
        """The global rows of a file."""
        return slice(int(self.file_starts[file]), int(self.file_starts[file + 1]))

    def episode_rows(self, number: int) -> slice:
        """The global rows of the episode with this number over both splits."""
        return slice(int(self.episode_starts[number]), int(self.episode_starts[number + 1]))

    def same_episode(self) -> np.ndarray:
        """bool (N - 1,): whether each row and the next belong to one episode."""
        inner = np.ones(max(len(self) - 1, 0), dtype=bool)
        inner[self.episode_starts[1:-1] - 1] = False
        return inner


def common_width(lengths: np.ndarray) -> int:
    """The width that most rows have; 1 where no row has any value."""
    counts = np.bincount(lengths[lengths > 0]) if (lengths > 0).any() else np.array([0, 1])
    return int(counts.argmax())


def hard_starts(rows: Rows) -> np.ndarray:
    """Global rows where an episode begins whatever the flags say: a split's begin, after a gap, flags unknown."""
    starts = []
    for file, begin in enumerate(rows.file_starts[:-1]):
        if begin == rows.file_starts[file + 1]:
            continue
        new_split = file == 0 or rows.splits[file] != rows.splits[file - 1]
        unknown = rows.flags["is_first"][begin] < 0 or (begin > 0 and rows.flags["is_last"][begin - 1] < 0)
        if new_split or after_gap(rows, file) or unknown or begin == 0:
            starts.append(int(begin))
    return np.array(starts, dtype=np.int64)


def after_gap(rows: Rows, file: int) -> bool:
    """Whether the file before this one, in the same split, could not be read."""
    before = file - 1
    return before >= 0 and rows.splits[before] == rows.splits[file] and not _readable(rows, before)


def before_gap(rows: Rows, file: int) -> bool:
    """Whether the file after this one, in the same split, could not be read."""
    after = file + 1
    return after < len(rows.files) and rows.splits[after] == rows.splits[file] and not _readable(rows, after)


def _readable(rows: Rows, file: int) -> bool:
    return bool(rows.schema_ok[file]) and rows.file_starts[file] < rows.file_starts[file + 1]


def runs(indices: np.ndarray, rows: Rows) -> list[tuple[int, int]]:
    """(first, length) of each stretch of consecutive global rows that lie in one episode and one file."""
    if not len(indices):
        return []
    same = (np.diff(indices) == 1) & (rows.episode[indices[1:]] == rows.episode[indices[:-1]])
    same &= rows.file_of[indices[1:]] == rows.file_of[indices[:-1]]
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    lengths = np.diff(np.concatenate([starts, [len(indices)]]))
    return [(int(indices[start]), int(length)) for start, length in zip(starts, lengths, strict=True)]

"""The rows of a LeRobot dataset, episode by episode, checked: what the converter writes and what is read in place."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.convert.episode_writer import ImageEncoding, Steps
from data.convert.lerobot_metadata import EpisodeSource, LeRobotDataset, VideoSpan
from data.schema import INTERVENTION, SUCCESS, TIMESTAMP, encoded_frames
from utils.encoded_images import PNG_START, is_image
from utils.parquet_utils import DataError, batches, open_parquet, require_columns
from utils.text import printable

logger = logging.getLogger(__name__)

ROWS_PER_BLOCK = 64  # of images
TERMINAL = ("auto", "always", "never")
DONE = "next.done"
LABEL_FEATURES = {SUCCESS: "next.success", INTERVENTION: "intervention"}  # lerobot-eval's, and its DAgger strategy's
TASK = "task_index"
INDICES_PER_BATCH = 65536
RATE_TOLERANCE = 0.1  # part by which the rows' rate may differ from info.json's


@dataclass(frozen=True)
class LeRobotOptions:
    """What is converted, and how.

    Attributes:
        cameras: feature -> its column.
        state_columns: columns of the state -> the features that make up each, in order.
        action_keys: features that make up `action`, in order.
        encoding: of frames that come from video.
        tolerance_s: seconds between a row's time stamp and its video frame's.
        prompt: instruction of all steps; None: the dataset's tasks.
        empty_prompt: instruction of those steps whose task is empty.
        terminal: whether episodes ended by themselves: `always`, `never`, or `auto`, which is what `next.done` of the
            last step says, and no where there is no such feature.
        task_key: the column that says which task is a row's instruction.
        follow_links: read files that are links to others outside of the folder.
    """

    cameras: dict[str, str]
    state_columns: dict[str, tuple[str, ...]]
    action_keys: tuple[str, ...]
    encoding: ImageEncoding
    tolerance_s: float
    prompt: str | None
    empty_prompt: str | None
    terminal: str
    task_key: str = TASK
    follow_links: bool = False

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Features that make up the state, in order."""
        return tuple(key for keys in self.state_columns.values() for key in keys)

    def __post_init__(self) -> None:
        for flag, text in (("--prompt", self.prompt), ("--empty_prompt", self.empty_prompt)):
            if text is not None and not text.strip():
                raise DataError(f"{flag} is {text!r}; give an instruction")
        if self.prompt is not None and self.empty_prompt is not None:
            raise DataError("--prompt replaces every instruction, --empty_prompt empty ones alone; give one of them")
        if self.terminal not in TERMINAL:
            raise DataError(f"--terminal is {self.terminal!r}; wanted {', '.join(TERMINAL)}")


def label_features(dataset: LeRobotDataset) -> dict[str, str]:
    """Our column -> feature, of those of LABEL_FEATURES that a dataset has."""
    known = dataset.features
    return {name: key for name, key in LABEL_FEATURES.items() if known.get(key, {}).get("dtype") == "bool"}


def tell_left_out(dataset: LeRobotDataset, used: Iterable[str]) -> None:
    """A line in the log that names the features which nothing is made of."""
    own = {"index", "episode_index", "frame_index", "timestamp", TASK, DONE, *LABEL_FEATURES.values(), *used}
    left_out = [f"{key} ({dataset.features[key]['dtype']})" for key in dataset.features if key not in own]
    if left_out:
        logger.info("%s: left out, since nothing names them: %s", dataset.root, ", ".join(map(printable, left_out)))


def require_instructions(dataset: LeRobotDataset, episodes: Sequence[int]) -> None:
    """Raise a DataError that lists the episodes whose metadata say that they have no instruction."""
    without = [i for i in episodes if any(not (task or "").strip() for task in dataset.episodes[i].tasks or ())]
    if without:
        others = [i for i in episodes if i not in set(without)]
        leave_out = f"leave them out (--episodes {_ranges(others)}), or " if others else ""
        raise DataError(
            f"{dataset.root}: {len(without)} of {len(episodes)} episodes have no instruction (their task is empty): "
            f"{_ranges(without)}; {leave_out}give an instruction for them alone (--empty_prompt)"
        )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as --episodes takes them: `0-3 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def row_columns(dataset: LeRobotDataset, options: LeRobotOptions, cameras: Sequence[str]) -> list[str]:
    """The columns that `episode_rows` reads, those of `cameras` that are no video among them."""
    images = [key for key in cameras if not dataset.is_video(key)]
    done = [DONE] * (options.terminal == "auto" and DONE in dataset.features)
    names = ["frame_index", "timestamp", options.task_key, *options.state_keys, *options.action_keys, *images, *done]
    return list(dict.fromkeys([*names, *label_features(dataset).values()]))


def episode_rows(
    dataset: LeRobotDataset, options: LeRobotOptions, episode: EpisodeSource, rows: RowReader, cameras: Sequence[str]
) -> Iterator[tuple[Steps, np.ndarray]]:
    """The steps of one episode with their time stamps as they are stored, in blocks.

    Args:
        dataset, options, episode: what is read.
        rows: reader of the episode's data file, with `row_columns`.
        cameras: features whose frames are wanted; of those that are video the steps have none yet, and time stamps
            must ascend.

    Raises:
        DataError: rows are missing or out of order, contradict the metadata, or hold no numbers or images.
    """
    where = f"{dataset.root} episode {episode.index}"
    images = [key for key in cameras if not dataset.is_video(key)]
    has_done = options.terminal == "auto" and DONE in dataset.features
    labels = label_features(dataset)
    begin, last = 0, -np.inf
    for batch in rows.episode(episode.index):
        timestamp = row_times(dataset, batch, episode, begin)
        extra = {TIMESTAMP: timestamp.astype(np.float32)}
        if SUCCESS in labels:
            extra[SUCCESS] = np.full(batch.num_rows, rows.succeeded(episode.index))
        if INTERVENTION in labels:
            extra[INTERVENTION] = matrix(dataset, batch, labels[INTERVENTION], episode)[:, 0]
        steps = Steps(
            images={
                options.cameras[key]: embedded_frames(batch.column(key), key, f"{where} frame", begin) for key in images
            },
            state=np.concatenate([matrix(dataset, batch, key, episode) for key in options.state_keys], axis=1),
            action=np.concatenate([matrix(dataset, batch, key, episode) for key in options.action_keys], axis=1),
            prompts=(
                [options.prompt] * batch.num_rows
                if options.prompt is not None
                else task_texts(dataset, batch, episode, options.empty_prompt, options.task_key)
            ),
            extra=extra,
            terminal=bool(batch.column(DONE)[-1].as_py()) if has_done else options.terminal == "always",
        )
        if len(images) < len(cameras):
            require_ascending(timestamp, last, f"{where} frame", begin, episode)
        last = timestamp[-1]
        yield steps, timestamp
        begin += len(timestamp)


def row_times(dataset: LeRobotDataset, batch: pa.RecordBatch, episode: EpisodeSource, begin: int) -> np.ndarray:
    """The time stamps of an episode's rows from step `begin` on, as they are stored.

    Raises:
        DataError: rows are missing or out of order, or contradict the rate of info.json.
    """
    where = f"{dataset.root} episode {episode.index}"
    frames = numbers(batch, "frame_index", episode)
    wrong = np.flatnonzero(frames != np.arange(begin, begin + len(frames)))
    if len(wrong):
        raise DataError(
            f"{where}: frame_index is {frames[wrong[0]]} where {begin + wrong[0]} is due ({episode.data_file}); "
            "rows are missing or out of order, so fetch or record the dataset again"
        )
    timestamp = numbers(batch, "timestamp", episode)
    if begin == 0:
        _check_rate(dataset, timestamp, where)
    return timestamp


def require_ascending(timestamp: np.ndarray, last: float, where: str, begin: int, episode: EpisodeSource) -> None:
    """Raise a DataError where time stamps do not ascend from `last` on, as video frames need."""
    late = np.diff(timestamp, prepend=last) > 0  # false for NaN
    if not late.all():
        row = int(np.flatnonzero(~late)[0])
        raise DataError(
            f"{where} {begin + row}: timestamp {timestamp[row]} does not come after the one before, so "
            f"no video frame belongs to it ({episode.data_file}); fetch or record the dataset again"
        )


class RowReader:
    """The rows of a data file, episode by episode; a row group is read once where episodes ascend."""

    def __init__(self, path: Path, columns: Sequence[str], rows_per_block: int = ROWS_PER_BLOCK) -> None:
        """Open the file and find its episodes.

        Args:
            path: of the data file.
            columns: what is read of it.
            rows_per_block: rows that are held at once.

        Raises:
            DataError: it is damaged or lacks one of `columns`.
        """
        self._path, self._columns, self._rows_per_block = path, list(columns), rows_per_block
        self._file = open_parquet(path)
        require_columns(self._file, path, self._columns)
        index = [
            batch.column(0).cast(pa.int64(), safe=False).fill_null(-1).to_numpy(zero_copy_only=False)
            for _, batch in batches(self._file, path, ["episode_index"], INDICES_PER_BATCH)
        ]
        numbers = np.concatenate(index)
        self._succeeded = self._read_success(numbers) if LABEL_FEATURES[SUCCESS] in self._columns else {}
        starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1))
        self._spans: dict[int, list[tuple[int, int]]] = {}
        for begin, end in itertools.pairwise([*starts.tolist(), len(numbers)]):
            self._spans.setdefault(int(numbers[begin]), []).append((begin, end))
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._group_ends = list(itertools.accumulate(sizes))
        self._batches: Iterator[tuple[int, pa.RecordBatch]] = iter(())
        self._batch: pa.RecordBatch | None = None  # the one that was read last
        self._first = 0  # its first row

    def succeeded(self, index: int) -> bool:
        """Whether `next.success` is true at any step of an episode; it must be among the columns that are read."""
        return self._succeeded[index]

    def _read_success(self, numbers: np.ndarray) -> dict[int, bool]:
        parts = []
        for row, batch in batches(self._file, self._path, [LABEL_FEATURES[SUCCESS]], INDICES_PER_BATCH):
            column = batch.column(0)
            values = column.flatten() if isinstance(column, pa.ListArray | pa.FixedSizeListArray) else column
            if not pa.types.is_boolean(values.type) or len(values) != len(column) or values.null_count:
                raise DataError(
                    f"{self._path} row {row}: {LABEL_FEATURES[SUCCESS]!r} is {column.type} with "
                    f"{len(values) - values.null_count} values in {len(column)} rows; wanted true or false in every "
                    "row: fetch the dataset again"
                )
            parts.append(values.to_numpy(zero_copy_only=False))
        good = np.unique(numbers[np.concatenate(parts).astype(bool)]).tolist()
        return dict.fromkeys(np.unique(numbers).tolist(), False) | dict.fromkeys(good, True)

    def episode(self, index: int) -> Iterator[pa.RecordBatch]:
        """The rows of one episode, none where the file does not hold it; DataError where the file is damaged."""
        for begin, end in self._spans.get(index, ()):
            while begin < end:
                self._go_to(begin)
                chosen = self._batch.slice(begin - self._first, end - begin)
                yield chosen
                begin += chosen.num_rows

    def _go_to(self, row: int) -> None:
        """Read on until the batch holds a row; begin anew where that lies behind, or in another row group."""
        following = self._first + (self._batch.num_rows if self._batch is not None else 0)
        groups = (bisect.bisect_right(self._group_ends, place) for place in (following, row))
        if row < self._first or (row > following and len(set(groups)) > 1):
            self._batch = None
        while self._batch is None or row >= self._first + self._batch.num_rows:
            if self._batch is None:
                self._batches = batches(self._file, self._path, self._columns, self._rows_per_block, first_row=row)
            self._batch = None  # also where the next line raises, so that nobody goes on from there
            self._first, self._batch = next(self._batches)


def check_span(dataset: LeRobotDataset, episode: EpisodeSource, key: str, num_frames: int) -> None:
    """Compare an episode's rows with the frames of its part of a video; a line in the log where there are more frames.

    Args:
        dataset, episode, key: whose video.
        num_frames: of the file, where the whole of it is the episode's; 0 where it does not say.

    Raises:
        DataError: the part is shorter than the episode.
    """
    span = episode.videos[key]
    frames = num_frames if span.stop is None else round((span.stop - span.start) * dataset.fps)
    if span.stop is not None and frames < episode.length:
        raise DataError(
            f"{dataset.root} episode {episode.index}: {span.path} has {frames} frames ({span.start:g} to "
            f"{span.stop:g} s) for {episode.length} rows; the frames behind are another episode's: fetch the dataset "
            "again, or leave that episode out (--episodes)"
        )
    if frames > episode.length:
        logger.warning(
            "%s episode %d: %s has %d frames for %d rows: the last ones are left out",
            *(dataset.root, episode.index, span.path, frames, episode.length),
        )


def video_times(
    timestamp: np.ndarray, span: VideoSpan, tolerance: float, where: str, begin: int, fps: float
) -> list[tuple[float, float]]:
    """(seconds into the file, tolerance) of each row; float32 time stamps round, and more so the later they are.

    Args:
        timestamp: of the rows, (N,), as stored.
        span: the episode's part of the video.
        tolerance: seconds by which a frame's time may differ.
        where, begin: the episode, and its step that the first row is, for messages.
        fps: of the dataset.

    Raises:
        DataError: a time outside of the episode's part: what is around it is another's.
    """
    rounding = np.spacing(timestamp.astype(np.float32)).astype(np.float64) / 2
    seconds, tolerances = span.start + timestamp.astype(np.float64), tolerance + rounding
    stop = math.inf if span.stop is None else span.stop
    outside = np.flatnonzero(~((span.start - tolerances <= seconds) & (seconds <= stop - 0.5 / fps)))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{where} {begin + row}: its time, {seconds[row]:.4f} s into {span.path}, is outside of the episode's part "
            f"of it ({span.start:.4f} to {stop:.4f} s); fetch the dataset again"
        )
    return list(zip(seconds.tolist(), tolerances.tolist(), strict=True))


def numbers(batch: pa.RecordBatch, name: str, episode: EpisodeSource) -> np.ndarray:
    """A column of plain numbers, (rows,)."""
    column = batch.column(name)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)) or column.null_count:
        fault = f"has {column.null_count} nulls" if column.null_count else f"is {column.type}"
        raise DataError(
            f"{episode.data_file} (episode {episode.index}): {name!r} {fault}; wanted a number in every row: fetch the "
            "dataset again"
        )
    return column.to_numpy(zero_copy_only=False)


def _check_rate(dataset: LeRobotDataset, timestamp: np.ndarray, where: str) -> None:
    """Raise a DataError where an episode's first time stamps contradict the rate of info.json."""
    step = float(np.median(np.diff(timestamp.astype(np.float64)))) if len(timestamp) > 2 else float("nan")
    if step > 0 and abs(step * dataset.fps - 1) > RATE_TOLERANCE:
        raise DataError(
            f"{where}: {dataset.info_path} says {dataset.fps:g} frames per second, the rows' time stamps "
            f"{1 / step:.4g}; correct fps there, or the time stamps"
        )


def matrix(dataset: LeRobotDataset, batch: pa.RecordBatch, key: str, episode: EpisodeSource) -> np.ndarray:
    """A numeric feature as (rows, width), in the type it is stored in; more than one axis becomes one, row by row."""
    width, column = dataset.width(key), batch.column(key)
    values = column
    while isinstance(values, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):  # a shape such as [2, 3]
        values = values.flatten()
    numeric = pa.types.is_floating(values.type) or pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)
    if not numeric or len(values) != len(column) * width or values.null_count:
        raise DataError(
            f"{episode.data_file} (episode {episode.index}): {key!r} is {column.type} with "
            f"{len(values) - values.null_count} values in {len(column)} rows; {dataset.info_path} says {width} numbers "
            "a row: fetch the dataset again"
        )
    return values.to_numpy(zero_copy_only=False).reshape(len(column), width)


def task_texts(
    dataset: LeRobotDataset,
    batch: pa.RecordBatch,
    episode: EpisodeSource,
    empty_prompt: str | None,
    task_key: str = TASK,
) -> list[str]:
    """The task of each row, `empty_prompt` where it is empty.

    Raises:
        DataError: there is no such task, it contradicts meta/episodes, or it is empty and `empty_prompt` is None.
    """
    where = f"{dataset.root} episode {episode.index}"
    indices = numbers(batch, task_key, episode).tolist()
    for index in set(indices):
        if index not in dataset.tasks:
            raise DataError(
                f"{where}: {task_key} {index} is not in {dataset.tasks_path} ({len(dataset.tasks)} tasks); "
                "fetch the dataset again, or give --prompt"
            )
        task = dataset.tasks[index]
        if task_key == TASK and episode.tasks and task not in episode.tasks:
            others = ", ".join(map(repr, episode.tasks))
            raise DataError(
                f"{where}: its rows say task {index}, {task!r} in {dataset.tasks_path.name}, but meta/episodes says "
                f"{others}; one of them is wrong (a merge that did not renumber?): mend the dataset, or give --prompt"
            )
        if not (task or "").strip() and empty_prompt is None:
            raise DataError(
                f"{where}: task {index} is {'null' if task is None else repr(task)}, no instruction; leave that "
                "episode out (--episodes), or give one for such steps alone (--empty_prompt) or for all (--prompt)"
            )
    tasks = [dataset.tasks[index] or "" for index in indices]
    return [task if task.strip() else empty_prompt for task in tasks]


def embedded_frames(column: pa.Array, key: str, where: str, begin: int) -> list[bytes]:
    """Encoded frames of an image feature, untouched."""
    frames: list[bytes | None] = encoded_frames(column, key, where).to_pylist()
    for i, frame in enumerate(frames):
        if not frame or not is_image(frame):
            reason = f"begins with {frame[:4]!r}" if frame else "is not embedded"
            raise DataError(
                f"{where} {begin + i}: {key} {reason}; wanted the bytes of a JPEG or PNG image: write the dataset "
                "again with embedded images"
            )
        if frame.startswith(PNG_START) and frame[24:25] == b"\x10":
            raise DataError(
                f"{where} {begin + i}: {key} is a PNG of 16 bits a value, depth and not colour; choose another camera"
            )
    return frames

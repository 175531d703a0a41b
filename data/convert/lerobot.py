"""LeRobot datasets (v2.0, v2.1, v3.0; frames as images or as video) into the schema of docs/data_format.md.

Steps are read 64 at a time and video is decoded forward, so memory does not grow with episodes or files.
`data/convert/lerobot_metadata.py` knows the layouts; `data/convert/lerobot_export.py` is the way back.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.convert.conversion import (
    UNITS,
    ConversionSummary,
    check_names,
    convert_files,
    fingerprint,
    parse_cameras,
    parse_episodes,
    plan_files,
)
from data.convert.episode_writer import EpisodeFileWriter, ImageEncoding, OutputFile, Steps
from data.convert.foreign_sources import reading
from data.convert.lerobot_metadata import EpisodeSource, LeRobotDataset, VideoSpan
from data.convert.video import VideoReader
from data.schema import TIMESTAMP, encoded_frames
from utils.encoded_images import PNG_START, is_image
from utils.parquet_utils import DataError, batches, open_parquet, require_columns

logger = logging.getLogger(__name__)

ROWS_PER_BLOCK = 64
TERMINAL = ("auto", "always", "never")
DONE = "next.done"
INDICES_PER_BATCH = 65536
RATE_TOLERANCE = 0.1  # part by which the rows' rate may differ from info.json's


@dataclass(frozen=True)
class LeRobotOptions:
    """What is converted, and how.

    Attributes:
        cameras: feature -> its column.
        state_keys: features that make up `state`, in order.
        action_keys: features that make up `action`, in order.
        encoding: of frames that come from video.
        tolerance_s: seconds between a row's time stamp and its video frame's.
        prompt: instruction of all steps; None: the dataset's tasks.
        empty_prompt: instruction of those steps whose task is empty.
        terminal: whether episodes ended by themselves: `always`, `never`, or `auto`, which is what `next.done` of the
            last step says, and no where there is no such feature.
        follow_links: read files that are links to others outside of the folder.
    """

    cameras: dict[str, str]
    state_keys: tuple[str, ...]
    action_keys: tuple[str, ...]
    encoding: ImageEncoding
    tolerance_s: float
    prompt: str | None
    empty_prompt: str | None
    terminal: str
    follow_links: bool = False

    def __post_init__(self) -> None:
        for flag, text in (("--prompt", self.prompt), ("--empty_prompt", self.empty_prompt)):
            if text is not None and not text.strip():
                raise DataError(f"{flag} is {text!r}; give an instruction")
        if self.prompt is not None and self.empty_prompt is not None:
            raise DataError("--prompt replaces every instruction, --empty_prompt empty ones alone; give one of them")
        if self.terminal not in TERMINAL:
            raise DataError(f"--terminal is {self.terminal!r}; wanted {', '.join(TERMINAL)}")


def convert_lerobot(
    lerobot_dir: Path,
    output_dir: Path,
    cameras: Sequence[str],
    *,
    state_keys: Sequence[str] = ("observation.state",),
    action_keys: Sequence[str] = ("action",),
    episodes: Sequence[str] | None = None,
    encoding: ImageEncoding | None = None,
    tolerance_s: float = 1e-4,
    prompt: str | None = None,
    empty_prompt: str | None = None,
    terminal: str = "auto",
    num_workers: int = 1,
    overwrite: bool = False,
    follow_links: bool = False,
) -> ConversionSummary:
    """Convert a LeRobot dataset into Parquet files of our schema, one each episode (see `plan_files`).

    Args:
        lerobot_dir: the dataset's folder.
        output_dir: where the files go.
        cameras: `<feature>=<column>` for each, as in `observation.images.front=image_1`.
        episodes: numbers and ranges such as "3-7"; None: all.
        num_workers, overwrite: see `convert_files`.
        state_keys, action_keys, encoding, tolerance_s, prompt, empty_prompt, terminal, follow_links: see
            `LeRobotOptions`.

    Raises:
        DataError: a fault in the dataset or the options, naming place and remedy.
    """
    dataset = LeRobotDataset(lerobot_dir, follow_links)
    for index in dataset.empty_episodes:
        logger.warning("%s: episode %d has no steps: left out", lerobot_dir, index)
    for key in (text.partition("=")[0] for text in cameras):
        if key in dataset.features and dataset.is_camera(key) and dataset.is_depth(key):
            shape = dataset.features[key].get("shape")
            raise DataError(
                f"{dataset.info_path}: {key!r} is a depth map (shape {shape}), which is not converted; choose a camera "
                "of colour images"
            )
    options = LeRobotOptions(
        cameras=parse_cameras(cameras, dataset.cameras, str(lerobot_dir)),
        state_keys=tuple(state_keys),
        action_keys=tuple(action_keys),
        encoding=encoding or ImageEncoding(),
        tolerance_s=tolerance_s,
        prompt=prompt,
        empty_prompt=empty_prompt,
        terminal=terminal,
        follow_links=follow_links,
    )
    numeric = [key for key in dataset.features if not dataset.is_camera(key)]
    check_names((*options.state_keys, *options.action_keys), numeric, "feature", str(dataset.info_path))
    if not 0 < tolerance_s < 0.5 / dataset.fps:
        raise DataError(f"--tolerance_s is {tolerance_s}; wanted more than 0 and less than half a frame")
    chosen = parse_episodes(episodes, list(dataset.episodes), str(lerobot_dir))
    if prompt is None and empty_prompt is None:
        _require_instructions(dataset, chosen)
    files = plan_files(
        output_dir,
        chosen,
        total=len(dataset.episodes),
        lengths={index: episode.length for index, episode in dataset.episodes.items()},
        settings=_settings(dataset, options),
        sources=lambda members: dataset.sources(members, list(options.cameras)),
    )
    convert = functools.partial(_convert_file, lerobot_dir, options)
    return convert_files(files, convert, num_workers=num_workers, overwrite=overwrite)


def _settings(dataset: LeRobotDataset, options: LeRobotOptions) -> dict[str, Any]:
    """The options that files depend on."""
    from_video = any(dataset.is_video(key) for key in options.cameras)
    return {
        "dataset": dataset.digest(),
        "cameras": options.cameras,
        "state_keys": list(options.state_keys),
        "action_key": options.action_keys[0] if len(options.action_keys) == 1 else list(options.action_keys),
        "prompt": options.prompt,
        **({} if options.empty_prompt is None else {"empty_prompt": options.empty_prompt}),
        "terminal": options.terminal,
        **({**options.encoding.settings(), "tolerance_s": options.tolerance_s} if from_video else {}),
    }


def _require_instructions(dataset: LeRobotDataset, episodes: Sequence[int]) -> None:
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


@functools.lru_cache(maxsize=1)
def _open(root: Path, _digest: str, follow_links: bool) -> LeRobotDataset:
    """The dataset in the state of `_digest`: read once per process, whatever the number of its files."""
    return LeRobotDataset(root, follow_links)


def _convert_file(root: Path, options: LeRobotOptions, file: OutputFile) -> None:
    dataset = _open(root, json.dumps(file.settings["dataset"]), options.follow_links)
    readers: dict[str, VideoReader] = {}
    with EpisodeFileWriter(
        file.path,
        cameras=list(options.cameras.values()),
        state_dim=sum(dataset.width(key) for key in options.state_keys),
        per_action_dim=sum(dataset.width(key) for key in options.action_keys),
        metadata=file.metadata(
            {
                "source": root.resolve().name,
                "source_format": f"LeRobot {dataset.version}",
                "fps": dataset.fps,
                "robot_type": dataset.robot_type,
                "cameras": options.cameras,
                "state_keys": list(options.state_keys),
                "state_names": dataset.names(options.state_keys),
                "action_names": dataset.names(options.action_keys),
                "units": UNITS,
            }
        ),
        source=str(root),
    ) as writer:
        try:
            for index in file.episodes:
                episode = dataset.episodes[index]
                with reading(episode.data_file):
                    writer.write_episode(index, episode.length, _read_episode(dataset, options, episode, readers))
        finally:
            for reader in readers.values():
                reader.close()


def _read_episode(
    dataset: LeRobotDataset, options: LeRobotOptions, episode: EpisodeSource, readers: dict[str, VideoReader]
) -> Iterator[Steps]:
    """The steps of one episode; `readers` are the videos left open by the episode before."""
    where = f"{dataset.root} episode {episode.index}"
    images = [key for key in options.cameras if not dataset.is_video(key)]
    has_done = options.terminal == "auto" and DONE in dataset.features
    columns = ["frame_index", "timestamp", "task_index", *options.state_keys, *options.action_keys]
    columns += images + [DONE] * has_done
    videos = [key for key in options.cameras if dataset.is_video(key)]
    for key in videos:
        _open_video(dataset, episode, key, readers)
    begin, last = 0, -np.inf
    rows = _row_reader(episode.data_file, tuple(fingerprint(episode.data_file)), tuple(dict.fromkeys(columns)))
    for batch in rows.episode(episode.index):
        frames = _numbers(batch, "frame_index", episode)
        wrong = np.flatnonzero(frames != np.arange(begin, begin + len(frames)))
        if len(wrong):
            raise DataError(
                f"{where}: frame_index is {frames[wrong[0]]} where {begin + wrong[0]} is due ({episode.data_file}); "
                "rows are missing or out of order, so fetch or record the dataset again"
            )
        timestamp = _numbers(batch, "timestamp", episode)
        if begin == 0:
            _check_rate(dataset, timestamp, where)
        steps = Steps(
            images={},
            state=np.concatenate([_matrix(dataset, batch, key, episode) for key in options.state_keys], axis=1),
            action=np.concatenate([_matrix(dataset, batch, key, episode) for key in options.action_keys], axis=1),
            prompts=_prompts(dataset, options, batch, episode),
            extra={TIMESTAMP: timestamp.astype(np.float32)},
            terminal=bool(batch.column(DONE)[-1].as_py()) if has_done else options.terminal == "always",
        )
        late = np.diff(timestamp, prepend=last) > 0  # false for NaN
        if videos and not late.all():
            row = int(np.flatnonzero(~late)[0])
            raise DataError(
                f"{where} frame {begin + row}: timestamp {timestamp[row]} does not come after the one before, so "
                f"no video frame belongs to it ({episode.data_file}); fetch or record the dataset again"
            )
        last = timestamp[-1]
        for key, column in options.cameras.items():
            if key in images:
                steps.images[column] = _embedded(batch.column(key), key, f"{where} frame", begin)
            else:
                span = episode.videos[key]
                times = _video_times(timestamp, span.start, options.tolerance_s)
                steps.images[column] = [
                    options.encoding(_frame(readers[key], span, *time, f"{where} frame {begin + i}", dataset.fps))
                    for i, time in enumerate(times)
                ]
        yield steps
        begin += len(frames)


@functools.lru_cache(maxsize=1)
def _row_reader(path: Path, _fingerprint: tuple[int, ...], columns: tuple[str, ...]) -> RowReader:
    """The reader of a data file in a state of it; a process keeps the last one for the episodes that follow."""
    return RowReader(path, columns)


class RowReader:
    """The rows of a data file, episode by episode; a row group is read once where episodes ascend."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Open the file and find its episodes.

        Raises:
            DataError: it is damaged or lacks one of `columns`.
        """
        self._path, self._columns = path, list(columns)
        self._file = open_parquet(path)
        require_columns(self._file, path, self._columns)
        index = [
            batch.column(0).cast(pa.int64(), safe=False).fill_null(-1).to_numpy(zero_copy_only=False)
            for _, batch in batches(self._file, path, ["episode_index"], INDICES_PER_BATCH)
        ]
        numbers = np.concatenate(index)
        starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1))
        self._spans: dict[int, list[tuple[int, int]]] = {}
        for begin, end in itertools.pairwise([*starts.tolist(), len(numbers)]):
            self._spans.setdefault(int(numbers[begin]), []).append((begin, end))
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._group_ends = list(itertools.accumulate(sizes))
        self._batches: Iterator[tuple[int, pa.RecordBatch]] = iter(())
        self._batch: pa.RecordBatch | None = None  # the one that was read last
        self._first = 0  # its first row

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
                self._batches = batches(self._file, self._path, self._columns, ROWS_PER_BLOCK, first_row=row)
            self._batch = None  # also where the next line raises, so that nobody goes on from there
            self._first, self._batch = next(self._batches)


def _numbers(batch: pa.RecordBatch, name: str, episode: EpisodeSource) -> np.ndarray:
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


def _matrix(dataset: LeRobotDataset, batch: pa.RecordBatch, key: str, episode: EpisodeSource) -> np.ndarray:
    """A numeric feature as (rows, width), in the type it is stored in."""
    width, column = dataset.width(key), batch.column(key)
    is_list = isinstance(column, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray))
    values = column.flatten() if is_list else column
    numeric = pa.types.is_floating(values.type) or pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)
    if not numeric or len(values) != len(column) * width or values.null_count:
        raise DataError(
            f"{episode.data_file} (episode {episode.index}): {key!r} is {column.type} with "
            f"{len(values) - values.null_count} values in {len(column)} rows; {dataset.info_path} says {width} numbers "
            "a row: fetch the dataset again"
        )
    return values.to_numpy(zero_copy_only=False).reshape(len(column), width)


def _prompts(
    dataset: LeRobotDataset, options: LeRobotOptions, batch: pa.RecordBatch, episode: EpisodeSource
) -> list[str]:
    if options.prompt is not None:
        return [options.prompt] * batch.num_rows
    where = f"{dataset.root} episode {episode.index}"
    indices = _numbers(batch, "task_index", episode).tolist()
    for index in set(indices):
        if index not in dataset.tasks:
            raise DataError(
                f"{where}: task_index {index} is not in {dataset.tasks_path} ({len(dataset.tasks)} tasks); fetch the "
                "dataset again, or give --prompt"
            )
        task = dataset.tasks[index]
        if episode.tasks and task not in episode.tasks:
            others = ", ".join(map(repr, episode.tasks))
            raise DataError(
                f"{where}: its rows say task {index}, {task!r} in {dataset.tasks_path.name}, but meta/episodes says "
                f"{others}; one of them is wrong (a merge that did not renumber?): mend the dataset, or give --prompt"
            )
        if not (task or "").strip() and options.empty_prompt is None:
            raise DataError(
                f"{where}: task {index} is {'null' if task is None else repr(task)}, no instruction; leave that "
                "episode out (--episodes), or give one for such steps alone (--empty_prompt) or for all (--prompt)"
            )
    tasks = [dataset.tasks[index] or "" for index in indices]
    return [task if task.strip() else options.empty_prompt for task in tasks]


def _embedded(column: pa.Array, key: str, where: str, begin: int) -> list[bytes]:
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


def _open_video(dataset: LeRobotDataset, episode: EpisodeSource, key: str, readers: dict[str, VideoReader]) -> None:
    """Put a reader of the episode's video into `readers`; a reader that has the same file open stays."""
    span = episode.videos[key]
    if key not in readers or readers[key].path != span.path:
        if key in readers:
            readers.pop(key).close()
        readers[key] = VideoReader(span.path)
    frames = readers[key].num_frames if span.stop is None else round((span.stop - span.start) * dataset.fps)
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


def _frame(
    reader: VideoReader, span: VideoSpan, seconds: float, tolerance: float, where: str, fps: float
) -> np.ndarray:
    """The frame of a point in time, which must lie within the episode's span: what is around it is another's."""
    stop = math.inf if span.stop is None else span.stop
    if not span.start - tolerance <= seconds <= stop - 0.5 / fps:
        raise DataError(
            f"{where}: its time, {seconds:.4f} s into {span.path}, is outside of the episode's part of it "
            f"({span.start:.4f} to {stop:.4f} s); fetch the dataset again"
        )
    return reader.frame_at(seconds, tolerance, where)


def _video_times(timestamp: np.ndarray, start: float, tolerance: float) -> Iterator[tuple[float, float]]:
    """(seconds into the file, tolerance) of each row; float32 time stamps round, and more so the later they are."""
    rounding = np.spacing(timestamp.astype(np.float32)).astype(np.float64) / 2
    yield from zip((start + timestamp.astype(np.float64)).tolist(), (tolerance + rounding).tolist(), strict=True)

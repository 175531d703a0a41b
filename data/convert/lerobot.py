"""LeRobot datasets (v2.0, v2.1, v3.0; frames as images or as video) into the schema of docs/data_format.md.

Steps are read 64 at a time and video is decoded forward, so memory does not grow with episodes or files.
`data/convert/lerobot_metadata.py` knows the layouts; `data/convert/lerobot_export.py` is the way back.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.convert.conversion import (
    UNITS,
    ConversionSummary,
    check_names,
    convert_files,
    parse_cameras,
    parse_episodes,
    plan_files,
)
from data.convert.episode_writer import EpisodeFileWriter, ImageEncoding, OutputFile, Steps
from data.convert.foreign_sources import reading
from data.convert.lerobot_metadata import EpisodeSource, LeRobotDataset
from data.convert.video import VideoReader
from data.schema import TIMESTAMP
from utils.encoded_images import is_image
from utils.parquet_utils import DataError, open_parquet, require_columns

logger = logging.getLogger(__name__)

ROWS_PER_BLOCK = 64
TERMINAL = ("auto", "always", "never")
DONE = "next.done"


@dataclass(frozen=True)
class LeRobotOptions:
    """What is converted, and how.

    Attributes:
        cameras: feature -> image_1 or image_2.
        state_keys: features that make up `state`, in order.
        action_key: feature that is `action`.
        encoding: of frames that come from video.
        tolerance_s: seconds between a row's time stamp and its video frame's.
        prompt: instruction of all steps; None: the dataset's tasks.
        terminal: whether episodes ended by themselves: `always`, `never`, or `auto`, which is what `next.done` of the
            last step says, and no where there is no such feature.
        follow_links: read files that are links to others outside of the folder.
    """

    cameras: dict[str, str]
    state_keys: tuple[str, ...]
    action_key: str
    encoding: ImageEncoding
    tolerance_s: float
    prompt: str | None
    terminal: str
    follow_links: bool = False

    def __post_init__(self) -> None:
        if self.terminal not in TERMINAL:
            raise DataError(f"--terminal is {self.terminal!r}; wanted {', '.join(TERMINAL)}")


def convert_lerobot(
    lerobot_dir: Path,
    output_dir: Path,
    cameras: Sequence[str],
    *,
    state_keys: Sequence[str] = ("observation.state",),
    action_key: str = "action",
    episodes: Sequence[str] | None = None,
    encoding: ImageEncoding | None = None,
    tolerance_s: float = 1e-4,
    prompt: str | None = None,
    terminal: str = "auto",
    num_workers: int = 1,
    overwrite: bool = False,
    follow_links: bool = False,
) -> ConversionSummary:
    """Convert a LeRobot dataset into Parquet files of our schema, one each episode (see `plan_files`).

    Args:
        lerobot_dir: the dataset's folder.
        output_dir: where the files go.
        cameras: `<feature>=image_1` and perhaps `<feature>=image_2`.
        episodes: numbers and ranges such as "3-7"; None: all.
        num_workers, overwrite: see `convert_files`.
        state_keys, action_key, encoding, tolerance_s, prompt, terminal, follow_links: see `LeRobotOptions`.

    Raises:
        DataError: a fault in the dataset or the options, naming place and remedy.
    """
    dataset = LeRobotDataset(lerobot_dir, follow_links)
    options = LeRobotOptions(
        cameras=parse_cameras(cameras, dataset.cameras, str(lerobot_dir)),
        state_keys=tuple(state_keys),
        action_key=action_key,
        encoding=encoding or ImageEncoding(),
        tolerance_s=tolerance_s,
        prompt=prompt,
        terminal=terminal,
        follow_links=follow_links,
    )
    numeric = [key for key in dataset.features if not dataset.is_camera(key)]
    check_names((*options.state_keys, action_key), numeric, "feature", str(dataset.info_path))
    if not 0 < tolerance_s < 0.5 / dataset.fps:
        raise DataError(f"--tolerance_s is {tolerance_s}; wanted more than 0 and less than half a frame")
    files = plan_files(
        output_dir,
        parse_episodes(episodes, list(dataset.episodes), str(lerobot_dir)),
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
        "action_key": options.action_key,
        "prompt": options.prompt,
        "terminal": options.terminal,
        **({**options.encoding.settings(), "tolerance_s": options.tolerance_s} if from_video else {}),
    }


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
        per_action_dim=dataset.width(options.action_key),
        metadata=file.metadata(
            {
                "source": root.resolve().name,
                "source_format": f"LeRobot {dataset.version}",
                "fps": dataset.fps,
                "robot_type": dataset.robot_type,
                "cameras": options.cameras,
                "state_keys": list(options.state_keys),
                "state_names": dataset.names(options.state_keys),
                "action_names": dataset.names([options.action_key]),
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
    columns = ["episode_index", "frame_index", "timestamp", "task_index", *options.state_keys, options.action_key]
    columns += images + [DONE] * has_done
    videos = [key for key in options.cameras if dataset.is_video(key)]
    for key in videos:
        _open_video(dataset, episode, key, readers)
    begin, last = 0, -np.inf
    for batch in _read_rows(episode.data_file, episode.index, columns):
        frames = np.asarray(batch.column("frame_index"))
        wrong = np.flatnonzero(frames != np.arange(begin, begin + len(frames)))
        if len(wrong):
            raise DataError(
                f"{where}: frame_index is {frames[wrong[0]]} where {begin + wrong[0]} is due ({episode.data_file}); "
                "rows are missing or out of order, so fetch or record the dataset again"
            )
        timestamp = np.asarray(batch.column("timestamp"))
        steps = Steps(
            images={},
            state=np.concatenate([_matrix(dataset, batch, key, episode) for key in options.state_keys], axis=1),
            action=_matrix(dataset, batch, options.action_key, episode),
            prompts=_prompts(dataset, options, batch, where),
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
                times = _video_times(timestamp, episode.videos[key].start, options.tolerance_s)
                steps.images[column] = [
                    options.encoding(readers[key].frame_at(*time, f"{where} frame {begin + i}"))
                    for i, time in enumerate(times)
                ]
        yield steps
        begin += len(frames)


def _read_rows(path: Path, episode_index: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of one episode, skipping row groups that hold none of it."""
    with open_parquet(path) as file:
        require_columns(file, path, columns)
        groups = [i for i in range(file.num_row_groups) if _may_hold(file.metadata.row_group(i), episode_index)]
        for batch in file.iter_batches(batch_size=ROWS_PER_BLOCK, row_groups=groups, columns=columns) if groups else ():
            chosen = batch.filter(pc.equal(batch.column("episode_index"), episode_index))
            if chosen.num_rows:
                yield chosen


def _may_hold(group: pq.RowGroupMetaData, episode_index: int) -> bool:
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == "episode_index" and column.is_stats_set and column.statistics.has_min_max:
            return column.statistics.min <= episode_index <= column.statistics.max
    return True


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


def _prompts(dataset: LeRobotDataset, options: LeRobotOptions, batch: pa.RecordBatch, where: str) -> list[str]:
    if options.prompt is not None:
        return [options.prompt] * batch.num_rows
    indices = batch.column("task_index").to_pylist()
    for index in indices:
        if index not in dataset.tasks:
            raise DataError(
                f"{where}: task_index {index} is not in {dataset.tasks_path} ({len(dataset.tasks)} tasks); fetch the "
                "dataset again, or give --prompt"
            )
    return [dataset.tasks[index] for index in indices]


def _embedded(column: pa.Array, key: str, where: str, begin: int) -> list[bytes]:
    """Encoded frames of an image feature, untouched."""
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    frames: list[bytes | None] = column.to_pylist()
    for i, frame in enumerate(frames):
        if not frame or not is_image(frame):
            reason = f"begins with {frame[:4]!r}" if frame else "is not embedded"
            raise DataError(
                f"{where} {begin + i}: {key} {reason}; wanted the bytes of a JPEG or PNG image: write the dataset "
                "again with embedded images"
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
    if frames > episode.length:
        logger.warning(
            "%s episode %d: %s has %d frames for %d rows: the last ones are left out",
            *(dataset.root, episode.index, span.path, frames, episode.length),
        )


def _video_times(timestamp: np.ndarray, start: float, tolerance: float) -> Iterator[tuple[float, float]]:
    """(seconds into the file, tolerance) of each row; float32 time stamps round, and more so the later they are."""
    rounding = np.spacing(timestamp.astype(np.float32)).astype(np.float64) / 2
    yield from zip((start + timestamp.astype(np.float64)).tolist(), (tolerance + rounding).tolist(), strict=True)

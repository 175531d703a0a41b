"""LeRobot datasets (v2.0, v2.1, v3.0; frames as images or as video) into the schema of docs/data_format.md.

Steps are read 64 at a time and video is decoded forward, so memory does not grow with episodes or files.
`data/convert/lerobot_metadata.py` knows the layouts; `data/convert/lerobot_export.py` is the way back.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.convert.conversion import (
    UNITS,
    ConversionSummary,
    check_names,
    convert_files,
    fingerprint,
    parse_cameras,
    parse_episodes,
    parse_state_keys,
    plan_files,
)
from data.convert.episode_writer import EpisodeFileWriter, ImageEncoding, OutputFile, Steps
from data.convert.foreign_sources import reading
from data.convert.frames import encoded_images
from data.convert.lerobot_metadata import EpisodeSource, LeRobotDataset
from data.convert.lerobot_rows import (
    LeRobotOptions,
    RowReader,
    check_span,
    episode_rows,
    label_features,
    require_instructions,
    row_columns,
    tell_left_out,
    video_times,
)
from data.convert.mapping import Camera
from data.convert.modality import MODALITY
from data.convert.values import Place
from data.convert.video import VideoReader
from data.schema import STATE, TIMESTAMP
from utils.parquet_utils import DataError

logger = logging.getLogger(__name__)


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
        state_keys: see `parse_state_keys`.
        action_keys, encoding, tolerance_s, prompt, empty_prompt, terminal, follow_links: see `LeRobotOptions`.

    Raises:
        DataError: a fault in the dataset or the options, naming place and remedy.
    """
    dataset = LeRobotDataset(lerobot_dir, follow_links)
    if (modality := lerobot_dir / MODALITY).exists():
        raise DataError(
            f"{modality}: says which column holds the instructions and what the values are, which this command does "
            f"not read; run: python scripts/convert.py --from lerobot {lerobot_dir} --preset groot --output_dir ..."
        )
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
        state_columns=parse_state_keys(state_keys),
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
    tell_left_out(dataset, (*dataset.cameras, *options.state_keys, *options.action_keys))
    if not 0 < tolerance_s < 0.5 / dataset.fps:
        raise DataError(f"--tolerance_s is {tolerance_s}; wanted more than 0 and less than half a frame")
    chosen = parse_episodes(episodes, dataset.episodes, str(lerobot_dir))
    if prompt is None and empty_prompt is None:
        require_instructions(dataset, chosen)
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
    keys_by_column = {column: list(keys) for column, keys in options.state_columns.items()}
    from_video = any(dataset.is_video(key) for key in options.cameras)
    encodes = from_video or options.encoding.short_side is not None
    return {
        "dataset": dataset.digest(),
        "cameras": options.cameras,
        "state_keys": list(options.state_keys),
        **({} if list(options.state_columns) == [STATE] else {"state_columns": keys_by_column}),
        "action_key": options.action_keys[0] if len(options.action_keys) == 1 else list(options.action_keys),
        "prompt": options.prompt,
        **({} if options.empty_prompt is None else {"empty_prompt": options.empty_prompt}),
        "terminal": options.terminal,
        **({"labels": labels} if (labels := list(label_features(dataset))) else {}),
        **(options.encoding.settings() if encodes else {}),
        **({"tolerance_s": options.tolerance_s} if from_video else {}),
    }


@functools.lru_cache(maxsize=1)
def _open(root: Path, _digest: str, follow_links: bool) -> LeRobotDataset:
    """The dataset in the state of `_digest`: read once per process, whatever the number of its files."""
    return LeRobotDataset(root, follow_links)


def _convert_file(root: Path, options: LeRobotOptions, file: OutputFile) -> None:
    dataset = _open(root, json.dumps(file.settings["dataset"]), options.follow_links)
    readers: dict[str, VideoReader] = {}
    widths = {column: sum(map(dataset.width, keys)) for column, keys in options.state_columns.items()}
    with EpisodeFileWriter(
        file.path,
        cameras=list(options.cameras.values()),
        state_dim=widths,
        per_action_dim=sum(dataset.width(key) for key in options.action_keys),
        metadata=file.metadata(
            {
                "source": root.resolve().name,
                "source_format": f"LeRobot {dataset.version}",
                "fps": dataset.fps,
                "robot_type": dataset.robot_type,
                "cameras": options.cameras,
                "state_keys": list(options.state_keys),
                "state_columns": list(widths),
                "state_names": dataset.names(options.state_keys),
                "action_names": dataset.names(options.action_keys),
                "units": UNITS,
            }
        ),
        source=str(root),
        extra=(TIMESTAMP, *label_features(dataset)),
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
    videos = [key for key in options.cameras if dataset.is_video(key)]
    for key in videos:
        _open_video(dataset, episode, key, readers)
    columns = tuple(row_columns(dataset, options, list(options.cameras)))
    rows = _row_reader(episode.data_file, tuple(fingerprint(episode.data_file)), columns)
    begin = 0
    for steps, timestamp in episode_rows(dataset, options, episode, rows, list(options.cameras)):
        for key in videos:
            span = episode.videos[key]
            times = video_times(timestamp, span, options.tolerance_s, f"{where} frame", begin, dataset.fps)
            steps.images[options.cameras[key]] = [
                options.encoding(readers[key].frame_at(*time, f"{where} frame {begin + i}"))
                for i, time in enumerate(times)
            ]
        for key, column in options.cameras.items():
            if key not in videos and options.encoding.short_side is not None:
                place = Place(where, begin)
                steps.images[column] = encoded_images(steps.images[column], Camera(key), options.encoding, key, place)
        yield steps
        begin += len(timestamp)


@functools.lru_cache(maxsize=1)
def _row_reader(path: Path, _fingerprint: tuple[int, ...], columns: tuple[str, ...]) -> RowReader:
    """The reader of a data file in a state of it; a process keeps the last one for the episodes that follow."""
    return RowReader(path, columns)


def _open_video(dataset: LeRobotDataset, episode: EpisodeSource, key: str, readers: dict[str, VideoReader]) -> None:
    """Put a reader of the episode's video into `readers`; a reader that has the same file open stays."""
    span = episode.videos[key]
    if key not in readers or readers[key].path != span.path:
        if key in readers:
            readers.pop(key).close()
        readers[key] = VideoReader(span.path)
    check_span(dataset, episode, key, readers[key].num_frames)

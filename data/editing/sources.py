"""What is edited: Parquet files, and the episodes of LeRobot datasets that are read where they lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from data.convert.conversion import fingerprint
from data.convert.episode_writer import ImageEncoding
from data.lerobot_table import LeRobotTable
from utils.parquet_utils import batches, open_parquet
from utils.recordings import LeRobotFolder, Recording

ROWS_PER_READ = 64


def single_episodes(recordings: Sequence[Recording]) -> list[Recording]:
    """Parquet files as they are, and of a LeRobot dataset every episode by itself, so that each becomes a file.

    Raises:
        DataError: a LeRobot dataset that can't be read.
    """
    found: list[Recording] = []
    for recording in recordings:
        if isinstance(recording, LeRobotFolder):
            episodes = (str(episode.index) for episode in LeRobotTable(recording).episodes)
            alone = (dataclasses.replace(recording.mapping, episodes=(index,)) for index in episodes)
            found += [LeRobotFolder(recording.root, mapping) for mapping in alone]
        else:
            found.append(recording)
    return found


def path_of(recording: Recording) -> Path:
    """The path of a file; of an episode of a LeRobot dataset the one that a conversion of it would have."""
    if not isinstance(recording, LeRobotFolder):
        return Path(recording).resolve()
    (index,) = recording.mapping.episodes
    return recording.root.resolve() / f"episode_{int(index):06d}.parquet"


def state_of(recording: Recording) -> dict[str, list[int]]:
    """The files that are read of a recording, each with its size and the time of its last change."""
    if not isinstance(recording, LeRobotFolder):
        return {str(recording): fingerprint(Path(recording))}
    table = LeRobotTable(recording)
    files = table.dataset.sources([episode.index for episode in table.episodes], list(table.cameras.values()))
    return {f"{recording}/{name}": state for name, state in files.items()}


def schema_of(recording: Recording) -> pa.Schema:
    """The columns of a recording, cameras that are video among them."""
    if isinstance(recording, LeRobotFolder):
        return LeRobotTable(recording).schema_with_video
    with open_parquet(recording) as file:
        return file.schema_arrow


def video_cameras(recording: Recording, columns: Sequence[str]) -> list[str]:
    """Those of some columns that are cameras whose frames are video."""
    if not isinstance(recording, LeRobotFolder):
        return []
    table = LeRobotTable(recording)
    return [name for name in columns if name in table.cameras and name not in table.schema.names]


def read(
    recording: Recording, columns: Sequence[str], first_row: int, encoding: ImageEncoding | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(first row, some rows) of those of `columns` that a recording has, from `first_row` or before it on.

    Args:
        encoding: of frames that are video; None: as converters encode them.

    Raises:
        DataError: it can't be read.
    """
    if not isinstance(recording, LeRobotFolder):
        with open_parquet(recording) as file:
            present = [name for name in columns if name in file.schema_arrow.names]
            yield from batches(file, recording, present, ROWS_PER_READ, first_row=first_row)
        return
    with LeRobotTable(recording) as table:
        present = [name for name in columns if name in table.schema.names]
        encode = encoding or ImageEncoding()
        videos = {
            camera: (encode(picture) for _, pictures in table.pictures(camera, ROWS_PER_READ) for picture in pictures)
            for camera in video_cameras(recording, columns)
        }
        for row, batch in table.batches(present, ROWS_PER_READ):
            for camera, frames in videos.items():
                values = pa.array([next(frames) for _ in range(batch.num_rows)], pa.binary())
                batch = batch.append_column(camera, values)
            yield row, batch

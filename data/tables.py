"""A recording as rows of the schema of docs/data_format.md, whether it is a Parquet file or a LeRobot dataset."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import pyarrow as pa

from data.schema import camera_column, image_columns, missing_camera
from utils.parquet_utils import DataError, Source, batches, bytes_needed, open_parquet, require_columns
from utils.recordings import LeRobotFolder, Recording


class Table(Protocol):
    """What a recording offers to those who read it."""

    @property
    def path(self) -> object:
        """How messages name it."""

    @property
    def schema(self) -> pa.Schema:
        """Its columns; of cameras only those whose encoded frames are a column."""

    @property
    def num_rows(self) -> int:
        """Time steps of all its episodes."""

    @property
    def cameras(self) -> Collection[str]:
        """Names of its cameras."""

    def image_columns(self, cameras: Sequence[str], required: Sequence[str] = ()) -> dict[str, str]:
        """camera -> its column, of those cameras whose encoded frames are a column; a DataError where none of the
        cameras is there, or one of the `required` columns is not."""

    def video_cameras(self, cameras: Sequence[str]) -> dict[str, str]:
        """camera -> what it is called there, of those cameras whose frames are in video files."""

    def batches(self, columns: list[str], batch_size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(first row, at most `batch_size` rows) of some columns."""

    def bytes_needed(self, columns: Sequence[str]) -> int:
        """Stored bytes that have to be read for some columns."""

    def __enter__(self) -> Table: ...

    def __exit__(self, *exception: object) -> None: ...


class ParquetTable:
    """The rows of one Parquet file."""

    def __init__(self, path: Source, use_threads: bool = True) -> None:
        """Open the file.

        Raises:
            DataError: it can't be read, or holds no rows.
        """
        self.path, self._file, self._use_threads = path, open_parquet(path), use_threads

    def __enter__(self) -> ParquetTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def num_rows(self) -> int:
        return self._file.metadata.num_rows

    @property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

    @property
    def cameras(self) -> list[str]:
        return image_columns(self.schema)

    def image_columns(self, cameras: Sequence[str], required: Sequence[str] = ()) -> dict[str, str]:
        """camera -> its column in this file, after checking that the columns are there, and those required."""
        require_columns(self._file, self.path, required)
        present = self.schema.names
        columns = {camera: camera_column(camera, present, self.path) for camera in cameras}
        columns = {camera: column for camera, column in columns.items() if column is not None}
        if cameras and not columns:
            found = f"{missing_camera(cameras[0], present)}, and none of any other camera of the policy"
            raise DataError(f"{self.path}: {found}; name the cameras that the files have (data.cameras)")
        return columns

    def video_cameras(self, cameras: Sequence[str]) -> dict[str, str]:
        """None: a Parquet file holds no video."""
        return {}

    def batches(self, columns: list[str], batch_size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(first row, at most `batch_size` rows) of some columns; see `utils.parquet_utils.batches`."""
        return batches(self._file, self.path, columns, batch_size, use_threads=self._use_threads)

    def bytes_needed(self, columns: Sequence[str]) -> int:
        """Stored bytes of some columns, and of the footer."""
        return bytes_needed(self._file, columns)


def open_table(recording: Recording, use_threads: bool = True) -> Table:
    """The rows of a recording; a context manager.

    Args:
        recording: what to open.
        use_threads: whether columns of a Parquet file are decoded in parallel.

    Raises:
        DataError: it can't be read.
    """
    if isinstance(recording, LeRobotFolder):
        from data.lerobot_table import LeRobotTable  # imports the decoder of videos, which Parquet files do without

        return LeRobotTable(recording)
    return ParquetTable(recording, use_threads)


def cameras_of(recordings: Sequence[Recording]) -> list[str]:
    """The cameras of all recordings, each once."""
    found: dict[str, None] = {}
    for recording in recordings:
        with open_table(recording) as table:
            found |= dict.fromkeys(table.cameras)
    return list(found)

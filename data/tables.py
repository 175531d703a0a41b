"""A recording as rows of the schema of docs/data_format.md, whether it is a Parquet file or a LeRobot dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import pyarrow as pa

from data.schema import MAIN_CAMERA, REQUIRED, camera_column
from utils.parquet_utils import Source, batches, bytes_needed, open_parquet, require_columns
from utils.recordings import LeRobotFolder, Recording


class Table(Protocol):
    """What a recording offers to those who read it."""

    @property
    def num_rows(self) -> int:
        """Time steps of all its episodes."""

    def image_columns(self, cameras: Sequence[str]) -> dict[str, str]:
        """camera -> its column, of those cameras whose encoded frames are a column."""

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

    def image_columns(self, cameras: Sequence[str]) -> dict[str, str]:
        """camera -> its column in this file, after checking that the columns are there."""
        require_columns(self._file, self.path, REQUIRED)
        present = self._file.schema_arrow.names
        columns = {camera: camera_column(camera, present, self.path) for camera in (MAIN_CAMERA, *cameras)}
        return {camera: columns[camera] for camera in cameras if columns[camera] is not None}

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

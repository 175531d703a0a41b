"""The files of a LeRobot v3.0 dataset: each holds several episodes, up to a size; a thousand of them fill a folder."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.convert.video import VideoJoiner

CHUNKS_SIZE = 1000  # files per chunk folder
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
ROWS_PER_BLOCK = 64  # images held in memory at once


class DataFiles:
    """data/chunk-…/file-….parquet: one row group for each episode."""

    def __init__(self, root: Path, limit_mb: float) -> None:
        self._root, self._limit = root, limit_mb * 2**20
        self._number, self._rows = -1, 0
        self._writer: pq.ParquetWriter | None = None

    def append(self, table: pa.Table, length: int) -> tuple[int, int]:
        """Write an episode; (chunk index, file index)."""
        if self._writer is not None:
            size = self._path.stat().st_size
            if size + size / self._rows * length >= self._limit:
                self.close()
        if self._writer is None:
            self._number, self._rows = self._number + 1, 0
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(
                self._path,
                table.schema,
                compression="snappy",
                use_dictionary=True,
                write_batch_size=ROWS_PER_BLOCK,  # a page is as long as this at least: 1024 images otherwise
            )
        self._writer.write_table(table, row_group_size=length)
        self._rows += length
        return divmod(self._number, CHUNKS_SIZE)

    @property
    def _path(self) -> Path:
        chunk, file = divmod(self._number, CHUNKS_SIZE)
        return self._root / DATA_PATH.format(chunk_index=chunk, file_index=file)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class VideoFiles:
    """videos/<feature>/chunk-…/file-….mp4: the videos of several episodes, joined."""

    def __init__(self, root: Path, feature: str, fps: float, limit_mb: float) -> None:
        self._root, self._feature, self._fps, self._limit = root, feature, fps, limit_mb * 2**20
        self._number = -1
        self._joiner: VideoJoiner | None = None

    def append(self, video: Path) -> tuple[int, int, float, float]:
        """Add an episode's video and delete it; (chunk index, file index, start, stop in seconds)."""
        if self._joiner is not None and self._joiner.size + video.stat().st_size >= self._limit:
            self.close()
        if self._joiner is None:
            self._number += 1
            chunk, file = divmod(self._number, CHUNKS_SIZE)
            path = self._root / VIDEO_PATH.format(video_key=self._feature, chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._joiner = VideoJoiner(path, self._fps)
        start = self._joiner.num_frames
        self._joiner.append(video)
        video.unlink()
        return *divmod(self._number, CHUNKS_SIZE), start / self._fps, self._joiner.num_frames / self._fps

    def close(self) -> None:
        if self._joiner is not None:
            self._joiner.close()
            self._joiner = None

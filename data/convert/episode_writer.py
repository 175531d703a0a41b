"""Parquet files in the schema of docs/data_format.md, written episode by episode, whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from utils.parquet_utils import DataError

RECORD = "conversion"  # metadata key: what a file was made from and how, as JSON
ROWS_PER_GROUP = 512  # a row group ends with its episode, at so many rows, or at so many bytes of images
BYTES_PER_GROUP = 64 * 2**20


@dataclass(frozen=True)
class ImageEncoding:
    """How decoded frames are stored: `jpeg` (full colour resolution, 4:4:4) or `png` (without loss)."""

    image_format: str = "jpeg"
    jpeg_quality: int = 95  # 1 to 95; without meaning for png

    def __post_init__(self) -> None:
        if self.image_format not in ("jpeg", "png"):
            raise DataError(f"--image_format is {self.image_format!r}; wanted jpeg or png")
        if not 1 <= self.jpeg_quality <= 95:
            raise DataError(f"--jpeg_quality is {self.jpeg_quality}; wanted 1 to 95")

    def __call__(self, image: np.ndarray) -> bytes:
        """Encode uint8 (H, W, 3) RGB."""
        buffer = io.BytesIO()
        is_jpeg = self.image_format == "jpeg"
        options = {"quality": self.jpeg_quality, "subsampling": 0} if is_jpeg else {"compress_level": 1}
        Image.fromarray(image).save(buffer, self.image_format, **options)
        return buffer.getvalue()

    def settings(self) -> dict[str, Any]:
        """What the bytes depend on, for the record of a conversion."""
        quality = {"jpeg_quality": self.jpeg_quality} if self.image_format == "jpeg" else {}
        return {"image_format": self.image_format, **quality}


@dataclass(frozen=True)
class OutputFile:
    """One file that a conversion makes."""

    path: Path
    episodes: tuple[int, ...]
    rows: int
    settings: dict[str, Any]  # the same for all files of a conversion: source dataset and options
    sources: dict[str, Any]  # what this file alone is made from

    @property
    def record(self) -> dict[str, Any]:
        """What is kept in the file's metadata to recognise it."""
        return {"episodes": list(self.episodes), "settings": self.settings, "sources": self.sources}


@dataclass(frozen=True)
class Rows:
    """Consecutive steps of one episode. N steps."""

    images: dict[str, list[bytes]]  # image_1 and maybe image_2: N encoded frames each
    state: np.ndarray  # (N, state_dim)
    action: np.ndarray  # (N, per_action_dim)
    timestamp: np.ndarray  # (N,) seconds since the episode's start
    prompts: list[str]  # N
    terminal: bool = False  # whether the last of these steps ended the episode by itself; asked of the last block


class EpisodeFileWriter:
    """One Parquet file of whole episodes; a context manager that leaves either the whole file or none.

    Columns: those of the schema, episode_index and frame_index (int64), timestamp (float32, seconds since the
    episode's start). Memory is bounded by one row group, however long an episode is.
    """

    def __init__(
        self,
        file: OutputFile,
        *,
        cameras: Sequence[str],
        state_dim: int,
        per_action_dim: int,
        metadata: Mapping[str, Any],
        source: str,
    ) -> None:
        """Prepare to write `file`, as `.<name>.tmp` beside it until it is complete.

        Args:
            file: what is made; its record goes into the metadata.
            cameras: image columns.
            state_dim, per_action_dim: widths.
            metadata: goes into the file's schema, strings as they are and anything else as JSON.
            source: what the rows come from, for error messages.
        """
        self._path, self._temporary = file.path, file.path.with_name(f".{file.path.name}.tmp")
        self._source = source
        facts = {**metadata, RECORD: json.dumps(file.record, sort_keys=True)}
        self._schema = pa.schema(
            [
                *((camera, pa.binary()) for camera in cameras),
                ("state", pa.list_(pa.float32(), state_dim)),
                ("action", pa.list_(pa.float32(), per_action_dim)),
                ("is_first", pa.bool_()),
                ("is_last", pa.bool_()),
                ("is_terminal", pa.bool_()),
                ("prompt", pa.string()),
                ("episode_index", pa.int64()),
                ("frame_index", pa.int64()),
                ("timestamp", pa.float32()),
            ],
            metadata={key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()},
        )
        self._pending: list[pa.Table] = []

    def __enter__(self) -> EpisodeFileWriter:
        self._writer = pq.ParquetWriter(
            self._temporary,
            self._schema,
            compression="none",  # the images are compressed already
            use_dictionary=["prompt"],
            write_statistics=["episode_index", "frame_index"],  # not of whole images
        )
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            self._writer.close()
            if error is None:
                self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def write_episode(self, episode_index: int, length: int, blocks: Iterable[Rows]) -> None:
        """Append one episode.

        Args:
            episode_index: its number in the source.
            length: its number of steps, which the blocks must add up to.
            blocks: its steps in order.

        Raises:
            DataError: a number that is not finite, an empty prompt, another number of steps.
        """
        begin, size = 0, 0
        for rows in blocks:
            if begin + len(rows.prompts) > length:
                raise self._wrong_length(episode_index, f"more than {length}", length)
            self._check(rows, episode_index, begin)
            self._pending.append(self._table(rows, episode_index, begin, length))
            begin += len(rows.prompts)
            size += sum(len(image) for images in rows.images.values() for image in images)
            if size >= BYTES_PER_GROUP or sum(map(len, self._pending)) >= ROWS_PER_GROUP:
                self._flush()
                size = 0
        if begin != length:
            raise self._wrong_length(episode_index, str(begin), length)
        self._flush()

    def _wrong_length(self, episode_index: int, found: str, wanted: int) -> DataError:
        return DataError(
            f"{self._source} episode {episode_index}: found {found} steps, its description says {wanted}; the source "
            "is damaged or incomplete, so fetch or record it again"
        )

    def _check(self, rows: Rows, episode_index: int, begin: int) -> None:
        for name, values in (("state", rows.state), ("action", rows.action)):
            finite = np.isfinite(values)
            if not finite.all():
                row, dim = (int(index) for index in np.argwhere(~finite)[0])
                raise DataError(
                    f"{self._source} episode {episode_index} frame {begin + row}: {name}[{dim}] is "
                    f"{values[row, dim]}; every value must be a finite number, so leave that episode out (--episodes)"
                )
        for i, prompt in enumerate(rows.prompts):
            if not prompt.strip():
                raise DataError(
                    f"{self._source} episode {episode_index} frame {begin + i}: the instruction is {prompt!r}; every "
                    "step needs one, so give it with --prompt"
                )

    def _table(self, rows: Rows, episode_index: int, begin: int, length: int) -> pa.Table:
        frames = np.arange(begin, begin + len(rows.prompts))
        is_last = frames == length - 1
        columns: dict[str, pa.Array] = {camera: pa.array(images, pa.binary()) for camera, images in rows.images.items()}
        for name, values in (("state", rows.state), ("action", rows.action)):
            flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        columns |= {
            "is_first": pa.array(frames == 0),
            "is_last": pa.array(is_last),
            "is_terminal": pa.array(is_last & rows.terminal),
            "prompt": pa.array(rows.prompts, pa.string()),
            "episode_index": pa.array(np.full(len(frames), episode_index, dtype=np.int64)),
            "frame_index": pa.array(frames.astype(np.int64)),
            "timestamp": pa.array(rows.timestamp.astype(np.float32)),
        }
        return pa.table([columns[name] for name in self._schema.names], schema=self._schema)

    def _flush(self) -> None:
        if self._pending:
            table = pa.concat_tables(self._pending)
            self._writer.write_table(table, row_group_size=len(table))
            self._pending.clear()

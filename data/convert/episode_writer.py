"""Parquet files in the schema of docs/data_format.md, written episode by episode, whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.schema import ACTION, PROMPT, STATE, TIMESTAMP, written_schema
from utils.misc import writing
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
        """What the file's metadata keep, so that a later conversion recognises the file."""
        return {"episodes": list(self.episodes), "settings": self.settings, "sources": self.sources}

    def metadata(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata of the file: facts about its source, and the record."""
        return {**facts, RECORD: json.dumps(self.record, sort_keys=True)}


@dataclass(frozen=True)
class Steps:
    """Consecutive steps of one episode. N steps."""

    images: dict[str, list[bytes]]  # of each camera N encoded frames
    state: np.ndarray  # (N, state_dim), the state's columns side by side
    action: np.ndarray  # (N, per_action_dim)
    prompts: list[str]  # N
    extra: dict[str, np.ndarray] = field(default_factory=dict)  # (N,) of each optional column that the file has
    terminal: bool = False  # whether the last of these steps ended the episode by itself; only an episode's last counts


class EpisodeFileWriter:
    """One Parquet file of whole episodes; a context manager that leaves either the whole file or none.

    Memory is bounded by one row group, however long an episode is.
    """

    def __init__(
        self,
        path: Path,
        *,
        cameras: Sequence[str],
        state_dim: int | Mapping[str, int],
        per_action_dim: int,
        metadata: Mapping[str, Any],
        source: str,
        extra: Sequence[str] = (TIMESTAMP,),
    ) -> None:
        """Prepare to write `path`, as `.<name>.tmp` beside it until it is complete.

        Args:
            path: the file.
            cameras: image columns.
            state_dim, per_action_dim: widths; of a state in several columns, that of each, in the order in which
                `Steps.state` holds them.
            metadata: goes into the file's schema, strings as they are and anything else as JSON.
            source: what the steps come from, for error messages.
            extra: optional columns of `data/schema.py`, the last ones of the file.
        """
        self._path, self._temporary = path, path.with_name(f".{path.name}.tmp")
        self._source = source
        self._widths = dict(state_dim) if isinstance(state_dim, Mapping) else {STATE: state_dim}
        self._schema = written_schema(
            cameras,
            self._widths,
            per_action_dim,
            extra=extra,
            metadata={key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()},
        )
        self._pending: list[pa.Table] = []
        self._bytes = 0  # of the rows so far

    def __enter__(self) -> EpisodeFileWriter:
        with self._writing():
            self._writer = pq.ParquetWriter(
                self._temporary,
                self._schema,
                compression="none",  # the images are compressed already
                use_dictionary=[PROMPT],
                write_page_checksum=True,  # so that a reader notices what a disk or a copy changed
                write_statistics=[column.name for column in self._schema if pa.types.is_integer(column.type)],
            )
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            with self._writing() if error is None else contextlib.suppress(OSError):
                self._writer.close()
                if error is None:
                    self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        remedy = "what is complete is kept: make room, or choose another --output_dir, and start again"
        return writing(self._path, f"it needs more than {self._bytes:,} bytes; {remedy}")

    def write_episode(self, episode_index: int, length: int, blocks: Iterable[Steps]) -> None:
        """Append one episode.

        Args:
            episode_index: its number in the source.
            length: its number of steps, which the blocks must add up to.
            blocks: its steps in order.

        Raises:
            DataError: a number that is not finite (in float32), an empty prompt, another number of steps.
            WriteError: the disk is full.
        """
        begin, size = 0, 0
        for steps in blocks:
            if begin + len(steps.prompts) > length:
                raise self._wrong_length(episode_index, f"more than {length}", length)
            self._check(steps, episode_index, begin)
            self._pending.append(self._table(steps, episode_index, begin, length))
            begin += len(steps.prompts)
            size += sum(len(image) for images in steps.images.values() for image in images)
            if size >= BYTES_PER_GROUP or sum(map(len, self._pending)) >= ROWS_PER_GROUP:
                self._flush()
                size = 0
        if begin != length:
            raise self._wrong_length(episode_index, str(begin), length)
        self._flush()

    def _wrong_length(self, episode_index: int, found: str, announced: int) -> DataError:
        return DataError(
            f"{self._source} episode {episode_index}: found {found} steps, its description says {announced}; the "
            "source is damaged or incomplete, so fetch or record it again"
        )

    def _check(self, steps: Steps, episode_index: int, begin: int) -> None:
        for name, values in (*self._columns(steps).items(), (ACTION, steps.action)):
            with np.errstate(over="ignore"):
                finite = np.isfinite(values.astype(np.float32))
            if not finite.all():
                row, dim = (int(index) for index in np.argwhere(~finite)[0])
                raise DataError(
                    f"{self._source} episode {episode_index} frame {begin + row}: {name}[{dim}] is "
                    f"{values[row, dim]}; every value must be a finite number in float32, so leave that episode out "
                    "(--episodes)"
                )
        for i, prompt in enumerate(steps.prompts):
            if not prompt.strip():
                raise DataError(
                    f"{self._source} episode {episode_index} frame {begin + i}: the instruction is {prompt!r}; every "
                    "step needs one, so mend the source, or leave that episode out (--episodes)"
                )

    def _columns(self, steps: Steps) -> dict[str, np.ndarray]:
        """The state's columns."""
        ends = np.cumsum(list(self._widths.values()))
        return dict(zip(self._widths, np.split(steps.state, ends[:-1], axis=1), strict=True))

    def _table(self, steps: Steps, episode_index: int, begin: int, length: int) -> pa.Table:
        frames = np.arange(begin, begin + len(steps.prompts), dtype=np.int64)
        is_last = frames == length - 1
        columns: dict[str, Any] = {
            **steps.images,
            "is_first": frames == 0,
            "is_last": is_last,
            "is_terminal": is_last & steps.terminal,
            PROMPT: steps.prompts,
            "episode_index": np.full(len(frames), episode_index, dtype=np.int64),
            "frame_index": frames,
            **steps.extra,
        }
        arrays = {name: pa.array(values, self._schema.field(name).type) for name, values in columns.items()}
        for name, values in (*self._columns(steps).items(), (ACTION, steps.action)):
            flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        return pa.table([arrays[name] for name in self._schema.names], schema=self._schema)

    def _flush(self) -> None:
        if self._pending:
            table = pa.concat_tables(self._pending)
            self._bytes += table.nbytes
            with self._writing():
                self._writer.write_table(table, row_group_size=len(table))
            self._pending.clear()

"""Parquet files in the schema of docs/data_format.md, written episode by episode, whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.schema import ACTION, PROMPT, STATE, TIMESTAMP, written_schema
from utils.encoded_images import encoded_size
from utils.misc import writing
from utils.parquet_utils import DataError

RECORD = "conversion"  # metadata key: what a file was made from and how, as JSON
ROWS_PER_GROUP = 512  # a row group ends with its episode, at so many rows, or at so many bytes of images
BYTES_PER_GROUP = 64 * 2**20
SUBSAMPLING = {"444": 0, "420": 2}  # of a JPEG's colours, as Pillow counts them
MIN_SIDE = 16
# What Python shows of bytes, arrays and objects: text that a recorder wrote by mistake.
_NO_INSTRUCTION = re.compile(r"""\s*(\[?(np\.bytes_\()?b(['"]).*\3\)?\]?|<[\w. ]+ at 0x[0-9a-f]+>)\s*""", re.DOTALL)


@dataclass(frozen=True)
class ImageEncoding:
    """How decoded frames are stored: `jpeg` or `png` (without loss), and in what size."""

    image_format: str = "jpeg"
    jpeg_quality: int = 95  # 1 to 95; without meaning for png
    subsampling: str = "444"  # full colour resolution, or 420: half of it in both directions; without meaning for png
    short_side: int | None = None  # pixels; larger frames are scaled down to it. None: the source's size

    def __post_init__(self) -> None:
        if self.image_format not in ("jpeg", "png"):
            raise DataError(f"--image_format is {self.image_format!r}; wanted jpeg or png")
        if not 1 <= self.jpeg_quality <= 95:
            raise DataError(f"--jpeg_quality is {self.jpeg_quality}; wanted 1 to 95")
        if self.subsampling not in SUBSAMPLING:
            raise DataError(f"--subsampling is {self.subsampling!r}; wanted {' or '.join(SUBSAMPLING)}")
        if self.image_format == "png" and self.subsampling != "444":
            raise DataError("--subsampling has no meaning with --image_format png, which keeps every colour")
        if self.short_side is not None and self.short_side < MIN_SIDE:
            raise DataError(f"--short_side is {self.short_side}; wanted {MIN_SIDE} pixels or more")

    def __call__(self, image: np.ndarray) -> bytes:
        """Encode uint8 (H, W, 3) RGB, scaled down first where it is larger than `short_side`."""
        buffer = io.BytesIO()
        is_jpeg = self.image_format == "jpeg"
        options: dict[str, int] = {"compress_level": 1}
        if is_jpeg:
            options = {"quality": self.jpeg_quality, "subsampling": SUBSAMPLING[self.subsampling]}
        self._scaled(Image.fromarray(image)).save(buffer, self.image_format, **options)
        return buffer.getvalue()

    def fits(self, encoded: bytes) -> bool:
        """Whether an encoded frame may stay as it is: `short_side` does not ask for a smaller one."""
        return self.short_side is None or min(encoded_size(encoded)) <= self.short_side

    def _scaled(self, image: Image.Image) -> Image.Image:
        shorter = min(image.size)
        if self.short_side is None or shorter <= self.short_side:
            return image
        size = [round(side * self.short_side / shorter) for side in image.size]
        return image.resize(tuple(size), Image.Resampling.LANCZOS, reducing_gap=3.0)

    def settings(self) -> dict[str, Any]:
        """What the bytes depend on, for the record of a conversion."""
        settings: dict[str, Any] = {"image_format": self.image_format}
        settings |= {"jpeg_quality": self.jpeg_quality} if self.image_format == "jpeg" else {}
        settings |= {} if self.subsampling == "444" else {"subsampling": self.subsampling}
        return settings | self.size_settings()

    def size_settings(self) -> dict[str, Any]:
        """What frames depend on that are encoded already."""
        return {} if self.short_side is None else {"short_side": self.short_side}


@dataclass(frozen=True)
class OutputFile:
    """One file that a conversion makes."""

    path: Path
    episodes: tuple[int, ...]
    rows: int | None  # None: not known before they are read
    settings: dict[str, Any]  # the same for all files of a conversion: source dataset and options
    sources: dict[str, Any]  # what this file alone is made from
    places: tuple[Any, ...] = ()  # of each episode what its reader needs to find it; no part of the record

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

    Without a single step, it leaves none.

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
                if error is None and self._bytes:
                    self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        remedy = "what is complete is kept: make room, or choose another --output_dir, and start again"
        return writing(self._path, f"it needs more than {self._bytes:,} bytes; {remedy}")

    def write_episode(
        self, episode_index: int, length: int | None, blocks: Iterable[Steps], where: str | None = None
    ) -> int:
        """Append one episode, and say how many steps it has.

        Args:
            episode_index: its number in the source.
            length: its number of steps, which the blocks must add up to; None: as many as the blocks have.
            blocks: its steps in order, none of them empty.
            where: how messages name it; None: by the source and its number.

        Raises:
            DataError: a number that is not finite (in float32), an empty prompt, another number of steps.
            WriteError: the disk is full.
        """
        begin, size = 0, 0
        where = where or f"{self._source} episode {episode_index}"
        for steps, is_last in _with_last(blocks):
            end = begin + len(steps.prompts)
            if length is not None and end > length:
                raise self._wrong_length(where, f"more than {length}", length)
            self._check(steps, where, begin)
            ends = is_last if length is None else end == length
            self._pending.append(self._table(steps, episode_index, begin, ends))
            begin += len(steps.prompts)
            size += sum(len(image) for images in steps.images.values() for image in images)
            if size >= BYTES_PER_GROUP or sum(map(len, self._pending)) >= ROWS_PER_GROUP:
                self._flush()
                size = 0
        if length is not None and begin != length:
            raise self._wrong_length(where, str(begin), length)
        self._flush()
        return begin

    def _wrong_length(self, where: str, found: str, announced: int) -> DataError:
        return DataError(
            f"{where}: found {found} steps, its description says {announced}; the "
            "source is damaged or incomplete, so fetch or record it again"
        )

    def _check(self, steps: Steps, where: str, begin: int) -> None:
        for name, values in (*self._columns(steps).items(), (ACTION, steps.action)):
            with np.errstate(over="ignore"):
                finite = np.isfinite(values.astype(np.float32))
            if not finite.all():
                row, dim = (int(index) for index in np.argwhere(~finite)[0])
                raise DataError(
                    f"{where} frame {begin + row}: {name}[{dim}] is "
                    f"{values[row, dim]}; every value must be a finite number in float32, so leave that episode out "
                    "(--episodes)"
                )
        for i, prompt in enumerate(steps.prompts):
            if not prompt.strip():
                raise DataError(
                    f"{where} frame {begin + i}: the instruction is {prompt!r}; every "
                    "step needs one, so mend the source, or leave that episode out (--episodes)"
                )
            if prompt[:1] in "[bn<" and _NO_INSTRUCTION.fullmatch(prompt):
                raise DataError(
                    f"{where} frame {begin + i}: the instruction is {prompt!r}, what "
                    "Python shows of an object and no instruction; mend the source, or give one yourself"
                )

    def _columns(self, steps: Steps) -> dict[str, np.ndarray]:
        """The state's columns."""
        if len(self._widths) == 1:
            return {next(iter(self._widths)): steps.state}
        ends = np.cumsum(list(self._widths.values()))
        return dict(zip(self._widths, np.split(steps.state, ends[:-1], axis=1), strict=True))

    def _table(self, steps: Steps, episode_index: int, begin: int, ends: bool) -> pa.Table:
        frames = np.arange(begin, begin + len(steps.prompts), dtype=np.int64)
        is_last = np.zeros(len(frames), dtype=bool)
        is_last[-1] = ends
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


def _with_last(blocks: Iterable[Steps]) -> Iterator[tuple[Steps, bool]]:
    """Each block, and whether it is the last one."""
    waiting = None
    for block in blocks:
        if waiting is not None:
            yield waiting, False
        waiting = block
    if waiting is not None:
        yield waiting, True

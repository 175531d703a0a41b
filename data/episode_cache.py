"""The folder behind an `EpisodeStore`: built once from a list of recordings, under a lock, whole or not at all.

Numeric columns become contiguous arrays, encoded images an Arrow file, and videos the packets that they are made of
(`data/video_packets.py`). Every part has a checksum.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from data.schema import (
    ACTION,
    FLAGS,
    MAIN_CAMERA,
    PROMPT,
    STATE,
    VECTORS,
    encoded_frames,
    episode_starts,
    flags,
    prompts,
    require_a_frame,
    require_frames,
    vectors,
)
from data.state_columns import StateColumns
from data.tables import Table, open_table
from utils.misc import file_checksum
from utils.parquet_utils import DataError
from utils.recordings import Recording

logger = logging.getLogger(__name__)

CACHE_VERSION = 2
ROWS_PER_BATCH = 512
ARRAYS = (*VECTORS, "prompt_index", "episode_starts", "frame_checksums")
VIDEO_ROWS = "video_rows"  # int64 (cameras with video, rows): the packet of each row's frame, -1 where there is none


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paligemma_vla"


class TemporaryCaches:
    """A folder for caches that are not kept; one for all stores of a process, so that its splits share a cache."""

    _current: weakref.ref[TemporaryCaches] | None = None

    def __init__(self) -> None:
        self.pid, self.path = os.getpid(), Path(tempfile.mkdtemp(prefix="paligemma_vla_"))
        weakref.finalize(self, _remove, self.path, self.pid)

    @classmethod
    def of_this_process(cls) -> TemporaryCaches:
        """The folder that a living store holds, or else a new one."""
        current = cls._current() if cls._current is not None else None
        if current is None or current.pid != os.getpid():
            current = cls()
            cls._current = weakref.ref(current)
        return current


def _remove(folder: Path, pid: int) -> None:
    """Delete a folder in the process that made it; loader workers inherit the store, and the others still read it."""
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def build_once(files: list[Recording], spec: dict[str, Any], folder: Path) -> None:
    """Make the cache unless it is there. One process builds it; others that open the same files wait for it."""
    if (folder / "meta.json").is_file():
        return
    try:
        with locked(folder) as alone:
            if not (folder / "meta.json").is_file():
                _build(files, spec, folder, alone=alone)
    except OSError as error:  # raised by writing: a source that can't be read is a DataError
        needed = sum(size for _, size, _ in spec["files"])
        raise DataError(
            f"episode cache: {folder.parent} can't take it ({error}); it needs about {needed:,} bytes there: make "
            "room, or set data.cache_dir to another folder"
        ) from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep other processes from building or deleting a cache; gives False where the file system has no locks."""
    locks = folder.parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / folder.name, "w") as lock:
        yield _lock(lock)


def _lock(file: TextIO) -> bool:
    """Wait for the lock; False, with a warning, on a file system that has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        logger.warning(
            "episode cache: %s can't be locked (%s), so processes that start at once each build it; mount the file "
            "system with locks (-o flock), or set data.cache_dir to a local folder",
            *(file.name, error.strerror),
        )
        return False
    return True


def _build(files: list[Recording], spec: dict[str, Any], folder: Path, *, alone: bool) -> None:
    """Make the cache.

    Args:
        alone: the caller holds its lock. Without one, another process may finish first, and its cache is kept.
    """
    for leftover in folder.parent.glob(f".{folder.name}.*") if alone else ():  # a process was killed while it built
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_cache(files, spec, temporary)
        if alone or not (folder / "meta.json").is_file():
            if folder.is_dir():  # without meta.json: not a cache, or what is left of one
                shutil.rmtree(folder)
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_cache(files: list[Recording], spec: dict[str, Any], folder: Path) -> None:
    tables = [open_table(recording) for recording in files]
    state = StateColumns(dict(spec["state_columns"]), spec["state_dim"])
    required = (*state.names, ACTION, *FLAGS, PROMPT)
    columns = [table.image_columns(spec["cameras"], required) for table in tables]
    videos = [table.video_cameras(spec["cameras"]) for table in tables]
    cameras = [c for c in spec["cameras"] if any(c in of_file for of_file in (*columns, *videos))]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*VECTORS, "prompt_index", *FLAGS)}
    known_prompts: dict[str, int] = {}
    file_starts, rows, checksums = [], 0, []
    schema = pa.schema([(camera, pa.large_binary()) for camera in cameras])
    with ipc.new_file(folder / "images.arrow", schema) as writer:
        for path, table, column_of, video in zip(files, tables, columns, videos, strict=True):
            file_starts.append(rows)
            names = [*required, *dict.fromkeys(column_of.values())]
            for first_row, batch in table.batches(names, ROWS_PER_BATCH):
                parts[STATE].append(state.read(batch, path, first_row))
                _append_numbers(parts, known_prompts, batch, path, first_row, spec["per_action_dim"])
                images = [_frames(batch, column_of.get(camera), camera, path, first_row) for camera in cameras]
                if not video:
                    require_a_frame(images, spec["cameras"], path, first_row)
                writer.write_batch(pa.record_batch(images, schema=schema))
                found = [_frame_checksums(column) for column in images]
                checksums.append(np.array(found, np.uint32).reshape(len(images), batch.num_rows))
            rows += table.num_rows
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    starts = episode_starts(arrays, files, file_starts)
    arrays |= {"episode_starts": starts, "frame_checksums": np.concatenate(checksums, axis=1)}
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", arrays[name])
    meta = {"spec": spec, "prompts": list(known_prompts), "file_starts": file_starts, "cameras": cameras}
    names = list(ARRAYS)
    if any(videos):
        meta["videos"], more = _write_videos(tables, videos, file_starts, rows, folder)
        names += more
    meta["checksums"] = {f"{name}.npy": file_checksum(folder / f"{name}.npy") for name in names}
    meta["image_bytes"] = (folder / "images.arrow").stat().st_size
    meta["checksum"] = meta_checksum(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _write_videos(
    tables: Sequence[Table], videos: Sequence[dict[str, str]], file_starts: Sequence[int], rows: int, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """Copy the packets of all videos and find every row's; (what meta.json says of them, names of the arrays)."""
    from data.video_packets import INDEX, PacketWriter

    writer = PacketWriter(folder)
    cameras = list(dict.fromkeys(camera for of_file in videos for camera in of_file))
    packet_of = np.full((len(cameras), rows), -1, dtype=np.int64)
    for table, of_file, start in zip(tables, videos, file_starts, strict=True):
        for camera in of_file:
            packet_of[cameras.index(camera), start : start + table.num_rows] = table.find_packets(camera, writer)
    np.save(folder / f"{VIDEO_ROWS}.npy", packet_of)
    return {"cameras": cameras, **writer.close()}, [VIDEO_ROWS, *INDEX]


def meta_checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def frame_checksum(frame: memoryview | bytes | None) -> int:
    """CRC-32 of a frame; 0 for an absent one, and for no other."""
    return 0 if frame is None else max(1, zlib.crc32(frame))


def _frame_checksums(column: pa.Array) -> list[int]:
    buffers = (frame.as_buffer() for frame in column)
    return [frame_checksum(buffer if buffer is not None and len(buffer) else None) for buffer in buffers]


def _append_numbers(
    parts: dict[str, list[np.ndarray]],
    known_prompts: dict[str, int],
    batch: pa.RecordBatch,
    path: Recording,
    first_row: int,
    per_action_dim: int,
) -> None:
    actions = vectors(batch.column(ACTION), ACTION, per_action_dim, path, first_row, width_from="per_action_dim")
    parts[ACTION].append(actions)
    for name in FLAGS:
        parts[name].append(flags(batch.column(name), name, path, first_row))
    texts = prompts(batch.column(PROMPT), path, first_row)
    indices = [known_prompts.setdefault(text, len(known_prompts)) for text in texts]
    parts["prompt_index"].append(np.array(indices, dtype=np.int32))


def _frames(batch: pa.RecordBatch, name: str | None, camera: str, path: Recording, first_row: int) -> pa.Array:
    """One camera's encoded frames as large_binary, null where absent or video."""
    if name is None:
        return pa.nulls(batch.num_rows, pa.large_binary())
    frames = encoded_frames(batch.column(name), name, path)
    require_frames(frames, name, path, first_row, always=camera == MAIN_CAMERA)
    return frames.cast(pa.large_binary())

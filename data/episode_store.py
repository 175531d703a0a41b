"""Random access to demonstrations by (episode, step) without holding them in memory.

The first use of a set of Parquet files checks every row and writes a cache folder: numeric columns as
contiguous arrays, encoded images in an Arrow file. Both are memory-mapped, so that all loader workers and
ranks of a machine share one copy through the page cache. The folder's name is a digest of the source files
(path, size, modification time) and of what was read from them: a changed source gets a new cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from data.schema import (
    FLAGS,
    MAIN_CAMERA,
    PROMPT,
    REQUIRED,
    VECTORS,
    camera_column,
    encoded_frames,
    episode_starts,
    flags,
    prompts,
    require_frames,
    vectors,
)
from utils.parquet_utils import (
    DataError,
    Source,
    batches,
    fingerprint,
    open_parquet,
    require_columns,
    resolve_parquet_files,
)

logger = logging.getLogger(__name__)

CACHE_VERSION = 2
ROWS_PER_BATCH = 512


@dataclass(frozen=True)
class _Images:
    """Encoded frames of one camera: per Arrow batch the bytes and where each row's bytes begin."""

    starts: np.ndarray  # first row of each batch
    content: list[memoryview]
    offsets: list[np.ndarray]

    def __getitem__(self, row: int) -> memoryview | None:
        batch = int(self.starts.searchsorted(row, side="right")) - 1
        i = row - int(self.starts[batch])
        begin, end = self.offsets[batch][i], self.offsets[batch][i + 1]
        return self.content[batch][begin:end] if end > begin else None


class EpisodeStore:
    """Every time step of a list of Parquet files, addressed by a global row.

    Attributes:
        state: float32 (rows, state_dim), physical units, memory-mapped.
        action: float32 (rows, per_action_dim), physical units, memory-mapped.
        episode_starts: int64 (episodes + 1,), first row of each episode; the last entry is the row count.
        prompts: the distinct instructions; `prompt_index` int32 (rows,) points into them.
    """

    def __init__(
        self,
        files: Sequence[Source],
        *,
        state_dim: int,
        per_action_dim: int,
        cameras: Sequence[str],
        cache_dir: str | Path | None = None,
        keep_cache: bool = True,
    ) -> None:
        """Open the cache of these files, building it first where there is none.

        Args:
            files: Parquet files in order; an episode may go on from one file into the next.
            state_dim, per_action_dim: widths that the columns must have.
            cameras: names of the cameras whose frames are kept.
            cache_dir: where caches live; None: `$XDG_CACHE_HOME/paligemma_vla`.
            keep_cache: False builds into a temporary folder of this process, which goes with its last store.

        Raises:
            DataError: a file breaks the schema or is damaged (the message names file, row and remedy), or there is no
                room for the cache.
        """
        self.files = list(files)
        self.cameras = tuple(cameras)
        spec = {
            "version": CACHE_VERSION,
            "state_dim": state_dim,
            "per_action_dim": per_action_dim,
            "cameras": list(self.cameras),
            "files": [fingerprint(path) for path in self.files],
        }
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:20]
        root = Path(cache_dir) if cache_dir is not None else _default_cache_dir()
        self._temporary = None if keep_cache else _Temporary.of_this_process()
        if self._temporary is not None:
            root = self._temporary.path
        self.folder = root / digest
        _build_once(self.files, spec, self.folder)
        size = sum(path.stat().st_size for path in self.folder.iterdir())
        logger.info("episode cache: %.1f MB at %s", size / 1e6, self.folder)
        meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self.prompts: list[str] = meta["prompts"]
        self.file_starts = np.array(meta["file_starts"], dtype=np.int64)
        self.state, self.action, self.prompt_index = (
            np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))  # indexing a memmap itself is slower
            for name in ("state", "action", "prompt_index")
        )
        self.episode_starts = np.load(self.folder / "episode_starts.npy")
        self._images = {camera: _map_images(self.folder / "images.arrow", camera) for camera in meta["cameras"]}

    def __len__(self) -> int:
        return len(self.state)

    @property
    def num_episodes(self) -> int:
        return len(self.episode_starts) - 1

    def locate(self, row: int) -> tuple[int, int]:
        """(episode, step within it) of a global row."""
        episode = int(self.episode_starts.searchsorted(row, side="right")) - 1
        return episode, row - int(self.episode_starts[episode])

    def has_camera(self, camera: str) -> bool:
        """Whether any file holds frames of this camera."""
        return camera in self._images

    def image(self, camera: str, row: int) -> memoryview | None:
        """Encoded bytes of one frame, without a copy; None where the camera is absent."""
        return self._images[camera][row] if camera in self._images else None

    def prompt(self, row: int) -> str:
        """The instruction at a global row."""
        return self.prompts[self.prompt_index[row]]

    def describe(self, row: int) -> str:
        """Where a global row comes from, for messages: file, row in that file, episode and step."""
        file = int(np.searchsorted(self.file_starts, row, side="right")) - 1
        episode, step = self.locate(row)
        return f"{self.files[file]} row {row - int(self.file_starts[file])} (episode {episode}, step {step})"


def recorded_actions(
    paths: Source | Sequence[Source], key: str, instruction: str, state_dim: int, per_action_dim: int
) -> list[np.ndarray]:
    """The actions (steps, A) of every recorded episode that has this instruction.

    Args:
        paths: files, folders or globs.
        key: the flag that they come from, for errors.
        instruction, state_dim, per_action_dim: of the task.

    Raises:
        DataError: no such episode, or files that break the schema.
    """
    files = resolve_parquet_files(paths, key)
    store = EpisodeStore(files, state_dim=state_dim, per_action_dim=per_action_dim, cameras=(MAIN_CAMERA,))
    bounds = zip(store.episode_starts[:-1], store.episode_starts[1:], strict=True)
    actions = [np.array(store.action[a:b]) for a, b in bounds if store.prompt(a) == instruction]
    if not actions:
        raise DataError(f"{key}: no episode with the instruction {instruction!r} (found: {', '.join(store.prompts)})")
    return actions


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paligemma_vla"


class _Temporary:
    """A folder for caches that are not kept; one for all stores of a process, so that its splits share a cache."""

    _current: weakref.ref[_Temporary] | None = None

    def __init__(self) -> None:
        self.pid, self.path = os.getpid(), Path(tempfile.mkdtemp(prefix="paligemma_vla_"))
        weakref.finalize(self, _remove, self.path, self.pid)

    @classmethod
    def of_this_process(cls) -> _Temporary:
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


def _build_once(files: list[Source], spec: dict[str, Any], folder: Path) -> None:
    """Make the cache unless it is there. One process builds it; others that open the same files wait for it."""
    if _is_whole(folder):
        return
    try:
        locks = folder.parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / folder.name, "w") as lock:
            locked = _lock(lock)
            if not _is_whole(folder):
                _build(files, spec, folder, alone=locked)
    except OSError as error:  # raised by writing: a source that can't be read is a DataError
        needed = sum(size for _, size, _ in spec["files"])
        raise DataError(
            f"episode cache: {folder.parent} can't take it ({error}); it needs about {needed:,} bytes there: make "
            "room, or set data.cache_dir to another folder"
        ) from None


def _is_whole(folder: Path) -> bool:
    """Whether a cache is there and every file of it has the size that it was written with."""
    try:
        sizes = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["sizes"]
        if all((folder / name).stat().st_size == size for name, size in sizes.items()):
            return True
        fault = "files are cut short"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        fault = "files are missing or damaged"
    if folder.exists():
        logger.warning("episode cache: %s: %s; it is made again", folder, fault)
    return False


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


def _build(files: list[Source], spec: dict[str, Any], folder: Path, *, alone: bool) -> None:
    """Make the cache.

    Args:
        alone: the caller holds its lock. Without one, another process may finish first, and its cache is kept.
    """
    for leftover in folder.parent.glob(f".{folder.name}.*") if alone else ():  # a process was killed while it built
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    damaged = temporary.with_name(f"{temporary.name}.damaged")
    try:
        _write_cache(files, spec, temporary)
        if not _is_whole(folder):
            if folder.exists():
                os.rename(folder, damaged)
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)


def _write_cache(files: list[Source], spec: dict[str, Any], folder: Path) -> None:
    columns = [_image_columns(open_parquet(path), path, spec["cameras"]) for path in files]
    cameras = [camera for camera in spec["cameras"] if any(camera in of_file for of_file in columns)]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*VECTORS, "prompt_index", *FLAGS)}
    known_prompts: dict[str, int] = {}
    file_starts, rows = [], 0
    schema = pa.schema([(camera, pa.large_binary()) for camera in cameras])
    with ipc.new_file(folder / "images.arrow", schema) as writer:
        for path, column_of in zip(files, columns, strict=True):
            file = open_parquet(path)
            file_starts.append(rows)
            names = [*REQUIRED, *column_of.values()]
            for first_row, batch in batches(file, path, names, ROWS_PER_BATCH):
                _append_numbers(parts, known_prompts, batch, path, first_row, spec)
                images = [_frames(batch, column_of.get(camera), camera, path, first_row) for camera in cameras]
                writer.write_batch(pa.record_batch(images, schema=schema))
            rows += file.metadata.num_rows
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    starts = episode_starts(arrays, files, file_starts)
    for name in (*VECTORS, "prompt_index"):
        np.save(folder / f"{name}.npy", arrays[name])
    np.save(folder / "episode_starts.npy", starts)
    meta = {"spec": spec, "prompts": list(known_prompts), "file_starts": file_starts, "cameras": cameras}
    meta["sizes"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _image_columns(file: pq.ParquetFile, path: Source, cameras: Sequence[str]) -> dict[str, str]:
    """camera -> its column in this file, after checking that the columns are there."""
    require_columns(file, path, REQUIRED)
    columns = {camera: camera_column(camera, file.schema_arrow.names, path) for camera in (MAIN_CAMERA, *cameras)}
    return {camera: columns[camera] for camera in cameras if columns[camera] is not None}


def _append_numbers(
    parts: dict[str, list[np.ndarray]],
    known_prompts: dict[str, int],
    batch: pa.RecordBatch,
    path: Source,
    first_row: int,
    spec: dict[str, Any],
) -> None:
    for name, key in (("state", "data.state_dim"), ("action", "per_action_dim")):
        width = spec[key.removeprefix("data.")]
        parts[name].append(vectors(batch.column(name), name, width, path, first_row, width_from=key))
    for name in FLAGS:
        parts[name].append(flags(batch.column(name), name, path, first_row))
    texts = prompts(batch.column(PROMPT), path, first_row)
    indices = [known_prompts.setdefault(text, len(known_prompts)) for text in texts]
    parts["prompt_index"].append(np.array(indices, dtype=np.int32))


def _frames(batch: pa.RecordBatch, name: str | None, camera: str, path: Source, first_row: int) -> pa.Array:
    """One camera's encoded frames as large_binary, null where absent."""
    if name is None:
        return pa.nulls(batch.num_rows, pa.large_binary())
    frames = encoded_frames(batch.column(name), name, path)
    require_frames(frames, name, path, first_row, always=camera == MAIN_CAMERA)
    return frames.cast(pa.large_binary())


def _map_images(path: Path, camera: str) -> _Images:
    source = ipc.open_file(pa.memory_map(str(path)))
    starts, content, offsets, rows = [], [], [], 0
    for i in range(source.num_record_batches):
        column = source.get_batch(i).column(camera)
        _, index, data = column.buffers()
        starts.append(rows)
        offsets.append(np.frombuffer(index, dtype=np.int64)[: len(column) + 1])
        content.append(memoryview(data if data is not None else b"").cast("B"))
        rows += len(column)
    return _Images(np.array(starts), content, offsets)

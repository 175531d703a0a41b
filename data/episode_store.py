"""Random access to demonstrations by (episode, step) without holding them in memory.

The first use of a set of Parquet files checks every row and writes a cache folder: numeric columns as
contiguous arrays, encoded images in an Arrow file. Both are memory-mapped, so that all loader workers and
ranks of a machine share one copy through the page cache. The folder's name is a digest of the source files
(path, size, modification time) and of what was read from them: a changed source gets a new cache.

A cache is checked where it is used: its numbers when it is opened, each frame the first time that any process reads it
(CRC-32). One that is damaged is named in the log and built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from data.schema import (
    ACTION,
    FLAGS,
    MAIN_CAMERA,
    PROMPT,
    STATE,
    SUCCESS,
    VECTORS,
    StateColumns,
    camera_column,
    encoded_frames,
    episode_starts,
    flags,
    missing_camera,
    prompts,
    require_a_frame,
    require_frames,
    vectors,
)
from utils.misc import file_checksum
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
ROWS_PER_READ = 65536  # of one column of flags
ARRAYS = (*VECTORS, "prompt_index", "episode_starts", "frame_checksums")
# What the readers of NumPy, Arrow and JSON run into in a file that is cut or changed.
_READING_FAULTS = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, AttributeError, EOFError)


class _DamagedError(Exception):
    """A cache is not as it was written; the text says which part."""


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
        state: float32 (rows, state_dim), physical units, memory-mapped; zeros where nothing needs it and files lack it.
        state_columns: the columns that it was joined from.
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
        state_columns: Sequence[str] = (STATE,),
        needs_state: bool = True,
        cache_dir: str | Path | None = None,
        keep_cache: bool = True,
    ) -> None:
        """Open the cache of these files, building it first where there is none.

        Args:
            files: Parquet files in order; an episode may go on from one file into the next.
            state_dim, per_action_dim: widths that the columns must have.
            cameras: names of the cameras whose frames are kept. A row may lack some of them, but not all, and not
                `image_1`.
            state_columns: numeric columns that are joined into the state.
            needs_state: whether something reads the state; if not, files may lack it.
            cache_dir: where caches live; None: `$XDG_CACHE_HOME/paligemma_vla`.
            keep_cache: False builds into a temporary folder of this process, which goes with its last store.

        Raises:
            DataError: a file breaks the schema or is damaged (the message names file, row and remedy), or there is no
                room for the cache.
        """
        self.files = list(files)
        self.cameras = tuple(cameras)
        self.state_columns = StateColumns.of_files(state_columns, state_dim, self.files, needed=needs_state)
        spec = {
            "version": CACHE_VERSION,
            "state_dim": state_dim,
            "per_action_dim": per_action_dim,
            "cameras": list(self.cameras),
            "state_columns": list(self.state_columns.widths.items()),
            "files": [fingerprint(path) for path in self.files],
        }
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:20]
        root = Path(cache_dir) if cache_dir is not None else _default_cache_dir()
        self._temporary = None if keep_cache else _Temporary.of_this_process()
        if self._temporary is not None:
            root = self._temporary.path
        self.folder, self._spec = root / digest, spec
        self._open()
        size = sum(path.stat().st_size for path in self.folder.iterdir())
        logger.info("episode cache: %.1f MB at %s", size / 1e6, self.folder)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked: they map the same cache, which stays as long as this process."""
        kept = ("files", "cameras", "state_columns", "folder", "_spec")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._temporary = None
        self._open()

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
        """Encoded bytes of one frame, without a copy; None where the camera is absent.

        Raises:
            DataError: the frame is not as it was written, and the cache could not be built again.
        """
        if camera not in self._images:
            return None
        frame = self._images[camera][row]
        if not self._verified[camera][row]:
            if _frame_checksum(frame) != self._frame_checksums[camera][row]:
                self._open(damage=f"{camera} of row {row} is not as it was written")
                frame = self._images[camera][row]
                if _frame_checksum(frame) != self._frame_checksums[camera][row]:
                    raise self._beyond_repair(f"{camera} of row {row} changes while it is read")
            self._verified[camera][row] = True
        return frame

    def _open(self, damage: str | None = None) -> None:
        """Map the cache, and build it where there is none, or where it is damaged."""
        for _ in range(2):
            if damage is not None:
                logger.warning("episode cache: %s is damaged (%s): it is built again", self.folder, damage)
                self._discard()
            _build_once(self.files, self._spec, self.folder)
            try:
                self._map()
                return
            except _DamagedError as error:
                damage = str(error)
            except _READING_FAULTS as error:
                damage = f"{type(error).__name__}: {error}"
        raise self._beyond_repair(damage)

    def _beyond_repair(self, damage: str) -> DataError:
        return DataError(
            f"episode cache: {self.folder} is damaged again after it was built anew ({damage}); delete it, and look "
            "after that disk, or set data.cache_dir to another one"
        )

    def _discard(self) -> None:
        """Delete the cache that this store has mapped; another process may have replaced it by a new one already."""
        try:
            unchanged = [fingerprint(path) for path in self.files] == self._spec["files"]
        except OSError:
            unchanged = False
        if not unchanged:
            raise DataError(
                f"episode cache: {self.folder} is damaged, and the files that it was made from have changed since; "
                "start again"
            )
        with _locked(self.folder), contextlib.suppress(FileNotFoundError):
            if self.folder.stat().st_ino == self._inode:
                shutil.rmtree(self.folder)

    def _map(self) -> None:
        self._inode = self.folder.stat().st_ino
        meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("checksum") != _meta_checksum(meta):
            raise _DamagedError("meta.json is not as it was written")
        for name, checksum in meta["checksums"].items():
            if file_checksum(self.folder / name) != checksum:
                raise _DamagedError(f"{name} is not as it was written")
        if (self.folder / "images.arrow").stat().st_size != meta["image_bytes"]:
            raise _DamagedError("images.arrow is cut off")
        self.prompts: list[str] = meta["prompts"]
        self.file_starts = np.array(meta["file_starts"], dtype=np.int64)
        self.state, self.action, self.prompt_index = (
            np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))  # indexing a memmap itself is slower
            for name in (*VECTORS, "prompt_index")
        )
        self.episode_starts = np.load(self.folder / "episode_starts.npy")
        cameras, rows = meta["cameras"], len(self.state)
        self._images = {camera: _map_images(self.folder / "images.arrow", camera) for camera in cameras}
        checksums = np.asarray(np.load(self.folder / "frame_checksums.npy", mmap_mode="r"))
        self._frame_checksums = dict(zip(cameras, checksums, strict=True))
        # Shared with the loader workers that are forked from here, so that each frame is checked once for all.
        shared = np.frombuffer(mmap.mmap(-1, max(1, len(cameras) * rows)), np.bool_)
        self._verified = {camera: shared[i * rows : (i + 1) * rows] for i, camera in enumerate(cameras)}

    def prompt(self, row: int) -> str:
        """The instruction at a global row."""
        return self.prompts[self.prompt_index[row]]

    def label(self, name: str, *, otherwise: bool) -> np.ndarray:
        """One of LABELS in every row, bool (rows,), read from the files; `otherwise` in files without the column.

        Raises:
            DataError: the column is no flag, or `success` changes within an episode.
        """
        values = np.full(len(self), otherwise)
        for path, begin in zip(self.files, self.file_starts.tolist(), strict=True):
            file = open_parquet(path)
            if name not in file.schema_arrow.names:
                continue
            for row, batch in batches(file, path, [name], ROWS_PER_READ):
                values[begin + row : begin + row + batch.num_rows] = flags(batch.column(0), name, path, row)
        if name == SUCCESS:
            changes = 1 + np.flatnonzero(values[1:] != values[:-1])
            inside = np.setdiff1d(changes, self.episode_starts)
            if len(inside):
                raise DataError(
                    f"{self.describe(int(inside[0]))}: success changes within the episode; it is its outcome"
                )
        return values

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
    store = EpisodeStore(files, state_dim=state_dim, per_action_dim=per_action_dim, cameras=())
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
    if (folder / "meta.json").is_file():
        return
    try:
        with _locked(folder) as alone:
            if not (folder / "meta.json").is_file():
                _build(files, spec, folder, alone=alone)
    except OSError as error:  # raised by writing: a source that can't be read is a DataError
        needed = sum(size for _, size, _ in spec["files"])
        raise DataError(
            f"episode cache: {folder.parent} can't take it ({error}); it needs about {needed:,} bytes there: make "
            "room, or set data.cache_dir to another folder"
        ) from None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
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


def _build(files: list[Source], spec: dict[str, Any], folder: Path, *, alone: bool) -> None:
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


def _write_cache(files: list[Source], spec: dict[str, Any], folder: Path) -> None:
    state = StateColumns(dict(spec["state_columns"]), spec["state_dim"])
    required = (*state.names, ACTION, *FLAGS, PROMPT)
    columns = [_image_columns(open_parquet(path), path, spec["cameras"], required) for path in files]
    cameras = [camera for camera in spec["cameras"] if any(camera in of_file for of_file in columns)]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*VECTORS, "prompt_index", *FLAGS)}
    known_prompts: dict[str, int] = {}
    file_starts, rows, checksums = [], 0, []
    schema = pa.schema([(camera, pa.large_binary()) for camera in cameras])
    with ipc.new_file(folder / "images.arrow", schema) as writer:
        for path, column_of in zip(files, columns, strict=True):
            file = open_parquet(path)
            file_starts.append(rows)
            names = [*required, *column_of.values()]
            for first_row, batch in batches(file, path, names, ROWS_PER_BATCH):
                parts[STATE].append(state.read(batch, path, first_row))
                _append_numbers(parts, known_prompts, batch, path, first_row, spec["per_action_dim"])
                images = [_frames(batch, column_of.get(camera), camera, path, first_row) for camera in cameras]
                require_a_frame(images, spec["cameras"], path, first_row)
                writer.write_batch(pa.record_batch(images, schema=schema))
                found = [_frame_checksums(column) for column in images]
                checksums.append(np.array(found, np.uint32).reshape(len(images), batch.num_rows))
            rows += file.metadata.num_rows
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    starts = episode_starts(arrays, files, file_starts)
    arrays |= {"episode_starts": starts, "frame_checksums": np.concatenate(checksums, axis=1)}
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", arrays[name])
    meta = {"spec": spec, "prompts": list(known_prompts), "file_starts": file_starts, "cameras": cameras}
    meta["checksums"] = {f"{name}.npy": file_checksum(folder / f"{name}.npy") for name in ARRAYS}
    meta["image_bytes"] = (folder / "images.arrow").stat().st_size
    meta["checksum"] = _meta_checksum(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _meta_checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _frame_checksum(frame: memoryview | bytes | None) -> int:
    """CRC-32 of a frame; 0 for an absent one, and for no other."""
    return 0 if frame is None else max(1, zlib.crc32(frame))


def _frame_checksums(column: pa.Array) -> list[int]:
    buffers = (frame.as_buffer() for frame in column)
    return [_frame_checksum(buffer if buffer is not None and len(buffer) else None) for buffer in buffers]


def _image_columns(
    file: pq.ParquetFile, path: Source, cameras: Sequence[str], required: Sequence[str]
) -> dict[str, str]:
    """camera -> its column in this file, after checking that the columns are there, and those required."""
    require_columns(file, path, required)
    present = file.schema_arrow.names
    columns = {camera: camera_column(camera, present, path) for camera in cameras}
    columns = {camera: column for camera, column in columns.items() if column is not None}
    if cameras and not columns:
        found = f"{missing_camera(cameras[0], present)}, and none of any other camera of the policy"
        raise DataError(f"{path}: {found}; name the cameras that the files have (data.cameras)")
    return columns


def _append_numbers(
    parts: dict[str, list[np.ndarray]],
    known_prompts: dict[str, int],
    batch: pa.RecordBatch,
    path: Source,
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

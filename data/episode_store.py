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
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from utils.parquet_utils import DataError, Source, batches, fingerprint, open_parquet, require_columns, vectors

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
ROWS_PER_BATCH = 512
FLAGS = ("is_first", "is_last", "is_terminal")


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
            cameras: image columns to keep, `image_1` and perhaps `image_2`.
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
            np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))  # a plain view: memmap's own is slower
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


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paligemma_vla"


class _Temporary:
    """A folder for caches that are not kept; one for all stores of a process, so that its splits share a cache."""

    _current: weakref.ref[_Temporary] | None = None

    def __init__(self) -> None:
        self.pid, self.path = os.getpid(), Path(tempfile.mkdtemp(prefix="paligemma_vla_"))
        weakref.finalize(self, _remove_own, self.path, self.pid)

    @classmethod
    def of_this_process(cls) -> _Temporary:
        """The folder that a living store holds, or else a new one."""
        found = cls._current() if cls._current is not None else None
        if found is None or found.pid != os.getpid():
            found = cls()
            cls._current = weakref.ref(found)
        return found


def _remove_own(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # loader workers inherit the store, and must not take it from the others
        shutil.rmtree(folder, ignore_errors=True)


def _build_once(files: list[Source], spec: dict[str, Any], folder: Path) -> None:
    """Make the cache unless it is there. One process builds; others that want the same wait for it."""
    if (folder / "meta.json").is_file():
        return
    try:
        locks = folder.parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / folder.name, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "meta.json").is_file():
                _build(files, spec, folder)
    except OSError as error:  # of writing: what can't be read is a DataError
        needed = sum(size for _, size, _ in spec["files"])
        raise DataError(
            f"episode cache: {folder.parent} can't take it ({error}); it needs about {needed:,} bytes there: make "
            "room, or set data.cache_dir to another folder"
        ) from None


def _build(files: list[Source], spec: dict[str, Any], folder: Path) -> None:
    """Make the cache; the caller holds its lock."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed while it built
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_cache(files, spec, temporary)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_cache(files: list[Source], spec: dict[str, Any], folder: Path) -> None:
    columns = [_image_columns(open_parquet(path), path, spec["cameras"]) for path in files]
    cameras = [camera for camera in spec["cameras"] if any(camera in found for found in columns)]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("state", "action", "prompt_index", *FLAGS)}
    prompts: dict[str, int] = {}
    file_starts, rows = [], 0
    schema = pa.schema([(camera, pa.large_binary()) for camera in cameras])
    with ipc.new_file(folder / "images.arrow", schema) as writer:
        for path, found in zip(files, columns, strict=True):
            file = open_parquet(path)
            file_starts.append(rows)
            names = ["state", "action", "prompt", *FLAGS, *found.values()]
            for first_row, batch in batches(file, path, names, ROWS_PER_BATCH):
                _append_numbers(parts, prompts, batch, path, first_row, spec)
                images = [_frames(batch, found.get(camera), camera, path, first_row) for camera in cameras]
                writer.write_batch(pa.record_batch(images, schema=schema))
            rows += file.metadata.num_rows
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    starts = _episode_starts(arrays, files, np.array(file_starts))
    for name in ("state", "action", "prompt_index"):
        np.save(folder / f"{name}.npy", arrays[name])
    np.save(folder / "episode_starts.npy", starts)
    meta = {"spec": spec, "prompts": list(prompts), "file_starts": file_starts, "cameras": cameras}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _image_columns(file: pq.ParquetFile, path: Source, cameras: Sequence[str]) -> dict[str, str]:
    """camera -> its column in this file, after checking that the columns are there."""
    require_columns(file, path, ["state", "action", *FLAGS, "prompt"])
    present = file.schema_arrow.names
    found = {}
    for camera in cameras:
        spellings = [name for name in (camera, f"{camera}_bytes") if name in present]
        if len(spellings) == 2:
            raise DataError(f"{path}: both {camera!r} and '{camera}_bytes' are columns; keep one of them")
        if spellings:
            found[camera] = spellings[0]
    if "image_1" not in found:
        raise DataError(
            f"{path}: no column 'image_1' or 'image_1_bytes' (found: {', '.join(present)}); see docs/data_format.md"
        )
    return found


def _append_numbers(
    parts: dict[str, list[np.ndarray]],
    prompts: dict[str, int],
    batch: pa.RecordBatch,
    path: Source,
    first_row: int,
    spec: dict[str, Any],
) -> None:
    state = vectors(batch.column("state"), spec["state_dim"], path, first_row, "state|data.state_dim")
    action = vectors(batch.column("action"), spec["per_action_dim"], path, first_row, "action|per_action_dim")
    parts["state"].append(state)
    parts["action"].append(action)
    for flag in FLAGS:
        column = batch.column(flag)
        if not pa.types.is_boolean(column.type):
            raise DataError(f"{path}: column {flag!r} is {column.type}; wanted bool")
        if column.null_count:
            row = first_row + int(np.flatnonzero(np.asarray(column.is_null()))[0])
            raise DataError(f"{path} row {row}: {flag} is null; wanted true or false")
        parts[flag].append(np.asarray(column))
    column = batch.column("prompt")
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"{path}: column 'prompt' is {column.type}; wanted string")
    indices = np.empty(batch.num_rows, dtype=np.int32)
    for i, prompt in enumerate(column.to_pylist()):
        if not prompt or not prompt.strip():
            raise DataError(f"{path} row {first_row + i}: prompt is {prompt!r}; every time step needs its instruction")
        indices[i] = prompts.setdefault(prompt, len(prompts))
    parts["prompt_index"].append(indices)


def _frames(batch: pa.RecordBatch, name: str | None, camera: str, path: Source, first_row: int) -> pa.Array:
    """One camera's encoded frames as large_binary, null where absent."""
    if name is None:
        return pa.nulls(batch.num_rows, pa.large_binary())
    column = batch.column(name)
    if pa.types.is_struct(column.type):
        fields = [column.type.field(i).name for i in range(column.type.num_fields)]
        if "bytes" not in fields:
            raise DataError(f"{path}: column {name!r} is a struct of {', '.join(fields)}; wanted a field 'bytes'")
        column = column.flatten()[fields.index("bytes")]
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(f"{path}: column {name!r} is {column.type}; wanted binary (encoded JPEG or PNG)")
    if camera == "image_1":
        absent = np.flatnonzero(np.asarray(column.is_null()))
        if len(absent):
            raise DataError(f"{path} row {first_row + int(absent[0])}: {name} is null; image_1 is needed at every step")
    return column.cast(pa.large_binary())


def _episode_starts(arrays: dict[str, np.ndarray], files: list[Source], file_starts: np.ndarray) -> np.ndarray:
    """Episode boundaries from the flags, or a DataError at the first row where the flags contradict each other."""
    first, last, terminal = (arrays[flag] for flag in FLAGS)
    ends_before = np.concatenate([[True], last[:-1]])  # whether the row before ends an episode
    faults = {
        "is_first is true but the row before is not is_last": first & ~ends_before,
        "is_first is false but the row before is is_last": ~first & ends_before,
        "is_terminal is true but is_last is not": terminal & ~last,
    }
    faults = {message: np.flatnonzero(rows) for message, rows in faults.items() if rows.any()}
    if not last[-1]:
        faults["the data end here but is_last is false"] = np.array([len(last) - 1])
    if faults:
        message, rows = min(faults.items(), key=lambda item: item[1][0])
        if rows[0] == 0 and message.startswith("is_first is false"):
            message = "the data begin here but is_first is false"
        file = int(np.searchsorted(file_starts, rows[0], side="right")) - 1
        raise DataError(
            f"{files[file]} row {rows[0] - file_starts[file]}: {message}; an episode runs from is_first to is_last"
        )
    return np.concatenate([np.flatnonzero(first), [len(first)]]).astype(np.int64)


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

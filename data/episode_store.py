"""Random access to demonstrations by (episode, step) without holding them in memory.

The first use of a set of recordings checks every row and writes a cache folder (`data/episode_cache.py`): numeric
columns as contiguous arrays, encoded images in an Arrow file, videos as their packets. All are memory-mapped, so that
loader workers and ranks of a machine share one copy through the page cache. The folder's name is a digest of the source
files (path, size, modification time) and of what was read from them: a changed source gets a new cache.

A cache is checked where it is used: its numbers when it is opened, each frame the first time that any process reads it
(CRC-32). One that is damaged is named in the log and built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from data.decoding import ObservationError
from data.episode_cache import (
    CACHE_VERSION,
    VIDEO_ROWS,
    TemporaryCaches,
    build_once,
    default_cache_dir,
    frame_checksum,
    locked,
    meta_checksum,
)
from data.schema import STATE, SUCCESS, VECTORS, flags
from data.state_columns import StateColumns
from data.tables import open_table
from utils.misc import file_checksum
from utils.parquet_utils import DataError, Source
from utils.recordings import Recording, fingerprint, resolve_recordings

if TYPE_CHECKING:
    from data.video_packets import PacketReader

logger = logging.getLogger(__name__)

ROWS_PER_READ = 65536  # of one column of flags
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
    """Every time step of a list of recordings, addressed by a global row.

    Attributes:
        state: float32 (rows, state_dim), physical units, memory-mapped; zeros where nothing needs it and files lack it.
        state_columns: the columns that it was joined from.
        action: float32 (rows, per_action_dim), physical units, memory-mapped.
        episode_starts: int64 (episodes + 1,), first row of each episode; the last entry is the row count.
        prompts: the distinct instructions; `prompt_index` int32 (rows,) points into them.
    """

    def __init__(
        self,
        files: Sequence[Recording],
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
            files: Parquet files and LeRobot datasets in order; an episode may go on from one file into the next.
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
        self.state_columns = StateColumns.of_tables(
            state_columns, state_dim, map(open_table, self.files), needed=needs_state
        )
        spec = {
            "version": CACHE_VERSION,
            "state_dim": state_dim,
            "per_action_dim": per_action_dim,
            "cameras": list(self.cameras),
            "state_columns": list(self.state_columns.widths.items()),
            "files": [fingerprint(path) for path in self.files],
        }
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:20]
        root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        self._temporary = None if keep_cache else TemporaryCaches.of_this_process()
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

    def image(self, camera: str, row: int) -> memoryview | np.ndarray | None:
        """One frame: its encoded bytes, without a copy, or decoded pixels, uint8 (H, W, 3), where it is from a video.

        None where the camera is absent.

        Raises:
            DataError: the frame is not as it was written, and the cache could not be built again; its video can't be
                decoded.
        """
        return self.images(camera, range(row, row + 1))[0]

    def images(self, camera: str, rows: range) -> list[memoryview | np.ndarray | None]:
        """The frames of consecutive rows; of a video, they are decoded in one go. See `image`."""
        if camera in self._video_rows and self._video_rows[camera][rows.start] >= 0:
            return self._from_video(camera, rows)
        return [self._encoded(camera, row) for row in rows]

    def _encoded(self, camera: str, row: int) -> memoryview | None:
        if camera not in self._images:
            return None
        frame = self._images[camera][row]
        if not self._verified[camera][row]:
            if frame_checksum(frame) != self._frame_checksums[camera][row]:
                self._open(damage=f"{camera} of row {row} is not as it was written")
                frame = self._images[camera][row]
                if frame_checksum(frame) != self._frame_checksums[camera][row]:
                    raise self._beyond_repair(f"{camera} of row {row} changes while it is read")
            self._verified[camera][row] = True
        return frame

    def _from_video(self, camera: str, rows: range) -> list[np.ndarray]:
        packets = self._video_rows[camera][rows.start : rows.stop].tolist()
        for _ in range(2):
            damaged = self._packets.damaged(packets)
            if damaged is None:
                break
            self._open(damage=f"packet {damaged} of {camera} is not as it was written")
        else:
            raise self._beyond_repair(f"packet {damaged} of {camera} changes while it is read")
        try:
            return self._packets.frames(packets)
        except ObservationError as error:
            where = f"{self.describe(rows.start)}: {camera}"
            raise DataError(f"{where}: {error}; fetch that video again, or leave the episode out") from None

    def _open(self, damage: str | None = None) -> None:
        """Map the cache, and build it where there is none, or where it is damaged."""
        for _ in range(2):
            if damage is not None:
                logger.warning("episode cache: %s is damaged (%s): it is built again", self.folder, damage)
                self._discard()
            build_once(self.files, self._spec, self.folder)
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
        with locked(self.folder), contextlib.suppress(FileNotFoundError):
            if self.folder.stat().st_ino == self._inode:
                shutil.rmtree(self.folder)

    def _map(self) -> None:
        self._inode = self.folder.stat().st_ino
        meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("checksum") != meta_checksum(meta):
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
        self._map_videos(meta.get("videos"))
        # Shared with the loader workers that are forked from here, so that each frame is checked once for all.
        shared = np.frombuffer(mmap.mmap(-1, max(1, len(cameras) * rows)), np.bool_)
        self._verified = {camera: shared[i * rows : (i + 1) * rows] for i, camera in enumerate(cameras)}

    def _map_videos(self, facts: dict[str, Any] | None) -> None:
        """Map the packets; `facts` are what meta.json says of them, None where no camera is video."""
        self._packets: PacketReader | None = None
        self._video_rows: dict[str, np.ndarray] = {}
        if facts is None:
            return
        from data.video_packets import MANY_PACKETS, PacketReader  # imports the decoder, which Parquet files do without

        self._packets = PacketReader(self.folder, facts)
        rows = np.asarray(np.load(self.folder / f"{VIDEO_ROWS}.npy", mmap_mode="r"))
        self._video_rows = dict(zip(facts["cameras"], rows, strict=True))
        for camera, packets in self._video_rows.items():
            decoded = self._packets.packets_per_frame(packets[packets >= 0])
            if decoded > MANY_PACKETS:
                logger.warning(
                    "%s: %.0f packets are decoded for each frame, since key frames are far apart, so loading is slow: "
                    "convert the dataset to JPEG (scripts/convert_lerobot.py), or encode it with denser key frames",
                    *(camera, decoded),
                )

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
            with open_table(path) as table:
                if name not in table.schema.names:
                    continue
                for row, batch in table.batches([name], ROWS_PER_READ):
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
    paths: Source | Sequence[Source], key: str, instructions: Sequence[str], state_dim: int, per_action_dim: int
) -> list[np.ndarray]:
    """The actions (steps, A) of every recorded episode that has one of these instructions.

    Args:
        paths: files, folders or globs.
        key: the flag that they come from, for errors.
        instructions: of the task, in all wordings that it is recorded with.
        state_dim, per_action_dim: of the task.

    Raises:
        DataError: no such episode, or files that break the schema.
    """
    files = resolve_recordings(paths, key)
    store = EpisodeStore(files, state_dim=state_dim, per_action_dim=per_action_dim, cameras=())
    bounds = zip(store.episode_starts[:-1], store.episode_starts[1:], strict=True)
    actions = [np.array(store.action[a:b]) for a, b in bounds if store.prompt(a) in instructions]
    if not actions:
        found = ", ".join(store.prompts)
        raise DataError(f"{key}: no episode with the instruction {instructions[0]!r}, in any wording (found: {found})")
    return actions


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

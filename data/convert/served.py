"""What a policy server was shown and planned, as episodes in the schema of docs/data_format.md, one file each.

A process of its own encodes and writes, so that neither costs the server a moment:

    inference/serving/recording.py ─► pipe ─► `work`: encode, gather an episode ─► `ServedFolder.write`

A row is a request: the frames as they came, the state, the first action of the plan as `action`, the whole of it as
`plan`, and the seed of its noise. The process ends with its pipe; what it was sent until then becomes files, also where
the server was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from data.convert.episode_writer import EpisodeFileWriter, ImageEncoding, Steps
from data.decoding import array_pixels
from data.schema import NOISE_SEED, PLAN, TIMESTAMP
from utils.misc import DiskFullError, WriteError, writing
from utils.parquet_utils import DataError

SERVED = "served"  # metadata key: what was served, as JSON
REQUEST_HZ = "request_hz"  # metadata key: requests a second, the median
PREFIX = "served_"  # of the names of its files, which go on with the time
MAX_STEPS = 2000  # of a file; a longer episode goes on in another
MAX_BYTES = 64 * 2**20  # of the frames of an episode that is not a file yet
MAX_BYTES_TOGETHER = 256 * 2**20  # of those of all connections
LEFT_AFTER_S = 3600  # without a change, a file that was not finished is one that a killed process left
FULL, OLDEST = "stop", "drop_oldest"  # what happens at the limit of the folder
ROOT = Path(__file__).resolve().parents[2]


class FolderFullError(WriteError):
    """The folder has reached its limit."""


@dataclass
class ServedFolder:
    """Where episodes go.

    Attributes:
        path: the folder.
        served: what is served, JSON-able: provenance.
        encoding: of frames that came as pixels; those that came as JPEG or PNG stay as they are.
        max_bytes: of this folder's files together.
        when_full: `stop`: keep the oldest, take no more; `drop_oldest`: remove the oldest to make room, also where the
            disk itself is full.
    """

    path: Path
    served: Mapping[str, Any]
    encoding: ImageEncoding
    max_bytes: int
    when_full: str = FULL

    def prepare(self) -> None:
        """Make the folder; a WriteError where that can't be done."""
        with writing(self.path, "choose another --record"):
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".{PREFIX}probe.tmp"
            probe.write_bytes(b"")
            now = probe.stat().st_mtime  # by the clock of the folder's machine
            probe.unlink(missing_ok=True)
            for left in self.path.glob(f".{PREFIX}*.tmp"):  # other servers may be writing theirs
                with contextlib.suppress(FileNotFoundError):
                    if now - left.stat().st_mtime > LEFT_AFTER_S:
                        left.unlink()

    def files(self) -> list[Path]:
        """The episodes that were written, the oldest first."""
        return sorted(self.path.glob(f"{PREFIX}*.parquet"))

    def write(self, episode: ServedEpisode) -> None:
        """Write an episode, whole or not at all.

        Raises:
            FolderFullError: there is no room for it within `max_bytes`.
            WriteError: it can't be written.
            DataError: a number that is not finite, or an empty instruction.
        """
        self._make_room(episode.size)
        while True:
            try:
                self._write(episode)
                return
            except DiskFullError:
                sizes = self._sizes()
                free = shutil.disk_usage(self.path).free
                if self.when_full != OLDEST or not sizes or sum(sizes.values()) + free < episode.size:
                    raise
                self._remove(next(iter(sizes)))

    def _make_room(self, size: int) -> None:
        if size > self.max_bytes:
            raise FolderFullError(
                f"{self.path}: an episode has {size:,} bytes, and --record_max_mb allows {self.max_bytes:,} for all of "
                "them: it is left out; raise --record_max_mb"
            )
        sizes = self._sizes()
        while sum(sizes.values()) + size > self.max_bytes:
            if self.when_full != OLDEST:
                raise FolderFullError(
                    f"{self.path}: its episodes have {sum(sizes.values()):,} bytes, the next one {size:,}, and "
                    f"--record_max_mb allows {self.max_bytes:,}: nothing more is recorded; raise it, or let "
                    "--record_when_full drop_oldest"
                )
            oldest = next(iter(sizes))
            self._remove(oldest)
            del sizes[oldest]

    def _sizes(self) -> dict[Path, int]:
        """Bytes of each episode that was written, the oldest first."""
        sizes = {}
        with writing(self.path, "let the server read its episodes, or choose another --record"):
            for path in self.files():
                with contextlib.suppress(FileNotFoundError):  # another server removed it
                    sizes[path] = path.stat().st_size
        return sizes

    def _remove(self, oldest: Path) -> None:
        remedy = f"{oldest.name}, the oldest, can't be removed to make room: allow it, or choose another --record"
        with writing(self.path, remedy):
            oldest.unlink(missing_ok=True)

    def _write(self, episode: ServedEpisode) -> None:
        length = len(episode.prompts)
        seconds = np.array(episode.seconds)
        plans = np.stack(episode.plans).astype(np.float32)
        extra = {
            TIMESTAMP: (seconds - seconds[0]).astype(np.float32),
            PLAN: list(plans.reshape(length, -1)),
            NOISE_SEED: np.array(episode.seeds, np.int64),
        }
        steps = Steps(
            images=episode.images,
            state=np.stack(episode.states),
            action=plans[:, 0],
            prompts=episode.prompts,
            extra=extra,
        )
        hz = {} if length < 2 else {REQUEST_HZ: round(1 / max(1e-6, float(np.median(np.diff(seconds)))), 3)}
        with EpisodeFileWriter(
            self.path / f"{episode.name}.parquet",
            cameras=list(episode.images),
            state_dim=steps.state.shape[1],
            per_action_dim=plans.shape[2],
            metadata={SERVED: json.dumps(dict(self.served)), **hz},
            source=episode.name,
            extra=tuple(extra),
        ) as writer:
            writer.write_episode(0, length, [steps])


@dataclass
class ServedEpisode:
    """An episode of one connection that is not a file yet."""

    name: str
    images: dict[str, list[bytes]]
    states: list[np.ndarray] = field(default_factory=list)
    plans: list[np.ndarray] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    size: int = 0

    def add(self, images: Mapping[str, bytes], step: Mapping[str, Any]) -> None:
        """Take in a step whose frames are encoded."""
        for camera, frame in images.items():
            self.images[camera].append(frame)
            self.size += len(frame)
        self.states.append(step["state"])
        self.plans.append(step["plan"])
        self.prompts.append(step["prompt"])
        self.seeds.append(step["seed"])
        self.seconds.append(step["seconds"])
        self.size += step["state"].nbytes + 2 * step["plan"].nbytes + len(step["prompt"]) + 64


class _Desk:
    """Gathers the steps of all connections into episodes, and reports to the server what became of each."""

    def __init__(self, pipe: Connection, folder: ServedFolder) -> None:
        self.pipe, self.folder = pipe, folder
        self.episodes: dict[int, ServedEpisode] = {}
        self._number = 0

    def step(self, key: int, step: Mapping[str, Any]) -> None:
        images = {name: self._encoded(frame) for name, frame in step["images"].items()}
        if step["begins"] or (key in self.episodes and list(self.episodes[key].images) != list(images)):
            self.end(key)
        if key not in self.episodes:
            self._number += 1
            now = time.strftime("%Y%m%d-%H%M%S")
            name = f"{PREFIX}{now}_{os.getpid()}_{self._number:05d}"
            self.episodes[key] = ServedEpisode(name, {camera: [] for camera in images})
        episode = self.episodes[key]
        episode.add(images, step)
        if len(episode.prompts) >= MAX_STEPS or episode.size >= MAX_BYTES:
            self.end(key)
        elif sum(other.size for other in self.episodes.values()) > MAX_BYTES_TOGETHER:
            self.end(max(self.episodes, key=lambda other: self.episodes[other].size))

    def end(self, key: int) -> None:
        """An episode is over: it becomes a file."""
        episode = self.episodes.pop(key, None)
        if episode is None:
            return
        trouble = None
        try:
            self.folder.write(episode)
        except (WriteError, DataError, OSError) as error:  # an OSError: its temporary file can't be removed
            trouble = type(error).__name__, str(error)
        steps = len(episode.prompts)
        report = {"written": 0 if trouble else steps, "lost": steps if trouble else 0, "trouble": trouble}
        with contextlib.suppress(OSError):  # the server has gone
            self.pipe.send(report)

    def _encoded(self, frame: np.ndarray | bytes) -> bytes:
        return frame if isinstance(frame, bytes) else self.folder.encoding(array_pixels(frame))


def work(pipe: Connection, folder: ServedFolder) -> None:
    """Write what comes through a pipe until it ends.

    Args:
        pipe: gives `(key of the connection, step)`, a step None where its episode ends; takes reports: counts of steps
            `written` and `lost`, and `trouble`, (its kind, a text) or None.
        folder: where to.
    """
    desk = _Desk(pipe, folder)
    while True:
        try:
            key, step = pipe.recv()
        except (EOFError, OSError):
            break
        desk.end(key) if step is None else desk.step(key, step)
    for key in list(desk.episodes):
        desk.end(key)


def start_writer(folder: ServedFolder) -> tuple[Connection, subprocess.Popen]:
    """The process that writes, and the pipe to it; it imports neither torch nor the caller's program.

    Raises:
        WriteError: the folder can't be written to.
    """
    folder.prepare()
    ours, theirs = Pipe()
    settings = {
        **dataclasses.asdict(folder),
        "path": str(folder.path.absolute()),
        "encoding": dataclasses.asdict(folder.encoding),
    }
    program = "import sys; from data.convert.served import run; run(int(sys.argv[1]), sys.argv[2])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(theirs.fileno()), json.dumps(settings)],
        pass_fds=[theirs.fileno()],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the server, whose end ends this process
    )
    theirs.close()
    return ours, process


def run(descriptor: int, settings: str) -> None:
    """The process's main function."""
    os.nice(10)
    options = json.loads(settings)
    options |= {"path": Path(options["path"]), "encoding": ImageEncoding(**options["encoding"])}
    work(Connection(descriptor), ServedFolder(**options))

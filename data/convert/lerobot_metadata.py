"""What a LeRobot dataset's meta folder says (v2.0, v2.1, v3.0): features, tasks, and where each episode lies.

v2.x   meta/{info.json, tasks.jsonl, episodes.jsonl}; one Parquet file and one video per camera for each episode
v3.0   meta/{info.json, tasks.parquet, episodes/**.parquet}; files of many episodes, found through meta/episodes:
       an episode's rows carry its episode_index, its video frames lie from `from_timestamp` on
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data.convert.conversion import fingerprint
from data.convert.foreign_sources import MAX_STEPS, file_in, fill_template
from utils.foreign_files import ForeignFileError, parse_json
from utils.parquet_utils import DataError, batches, one_line, open_parquet

logger = logging.getLogger(__name__)

MAX_FPS = 10_000
MAX_WIDTH = 1_000_000  # values of a numeric feature
MAX_INDEX = 1_000_000_000
VERSIONS = ("v2.0", "v2.1", "v3.0")
ROWS_PER_READ = 16384  # of metadata
AGAIN = "fetch the dataset again"

Value = TypeVar("Value")


@dataclass(frozen=True)
class VideoSpan:
    """Where an episode's frames of one camera lie."""

    path: Path
    start: float  # seconds into the file
    stop: float | None  # None: the file's end


@dataclass(frozen=True)
class EpisodeSource:
    """Where one episode of a LeRobot dataset lies."""

    index: int
    length: int  # steps
    data_file: Path
    videos: dict[str, VideoSpan]  # of the features of dtype video
    tasks: tuple[str | None, ...] | None  # its instructions; None where the metadata do not say


def open_dataset(root: Path, follow_links: bool = False) -> LeRobotDataset:
    """The metadata of a dataset, as `LeRobotDataset` reads them; a process reads those in one state once.

    The rows of each episode by itself are a table of their own (`data/editing/sources.py`), and all share them.
    """
    paths = (path for path in sorted((root / "meta").rglob("*")) if path.is_file())
    return _open(root, follow_links, tuple((path, *fingerprint(path)) for path in paths))


@functools.lru_cache(maxsize=1)
def _open(root: Path, follow_links: bool, _state: tuple[tuple[Path | int, ...], ...]) -> LeRobotDataset:
    return LeRobotDataset(root, follow_links)


class LeRobotDataset:
    """The metadata of a LeRobot dataset in a local folder.

    Attributes:
        version, fps, robot_type, features: as info.json has them.
        tasks: task_index -> instruction, None where it is null.
        episodes: episode_index -> `EpisodeSource`, ascending, of those that have steps.
        empty_episodes: the others, ascending.
    """

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        """Read the metadata.

        Args:
            root: the dataset's folder.
            follow_links: read files that are links to others outside of the folder.

        Raises:
            DataError: not a LeRobot dataset, another version, metadata that are incomplete or no metadata, or that
                lead out of the folder.
        """
        self.root, self.follow_links = root, follow_links
        self.info_path = file_in(root, "meta/info.json", follow_links)
        self.info = _read_json(self.info_path)
        if not isinstance(self.info, dict):
            raise DataError(f"{self.info_path}: holds a {type(self.info).__name__}; wanted a LeRobot dataset's info")
        self.version = str(self.info.get("codebase_version"))
        if self.version not in VERSIONS:
            raise DataError(
                f"{self.info_path}: codebase_version is {self.version!r}; supported are {', '.join(VERSIONS)}: convert "
                "the dataset with lerobot's own scripts first"
            )
        self.features = _features(self.info, self.info_path)
        self.fps = _number(self.info, "fps", self.info_path)
        if not 0 < self.fps <= MAX_FPS:
            raise DataError(f"{self.info_path}: fps is {self.fps}; wanted more than 0, at most {MAX_FPS}")
        self.robot_type = _text(self.info, "robot_type", self.info_path, optional=True)
        if self.version == "v3.0":
            self.tasks_path = file_in(root, "meta/tasks.parquet", follow_links)
            found = sorted((root / "meta" / "episodes").rglob("*.parquet"))
            self.episode_paths = [file_in(root, path.relative_to(root), follow_links) for path in found]
            tasks, episodes = _tasks_v3(self.tasks_path), self._episodes_v3()
        else:
            self.tasks_path = file_in(root, "meta/tasks.jsonl", follow_links)
            self.episode_paths = [file_in(root, "meta/episodes.jsonl", follow_links)]
            tasks, episodes = _tasks_v2(self.tasks_path), self._episodes_v2()
        self.tasks = _unique(tasks, "task_index", self.tasks_path)
        episodes = _unique(((episode.index, episode) for episode in episodes), "episode_index", root / "meta")
        self.episodes = {index: episode for index, episode in sorted(episodes.items()) if episode.length}
        self.empty_episodes = sorted(episodes.keys() - self.episodes.keys())
        if not self.episodes:
            raise DataError(f"{root / 'meta'}: no episodes; record some, or fetch the dataset again")
        total = self.info.get("total_episodes")
        if total is not None and total != len(episodes):
            told = f"{self.info_path} says total_episodes {_shown(total)}, but meta/episodes lists {len(episodes)}"
            logger.warning("%s: those alone are read; fetch the dataset again if others are missing", told)
        self._require_own_frames()

    @property
    def cameras(self) -> list[str]:
        """Features that are images or video, depth maps aside."""
        return [key for key in self.features if self.is_camera(key) and not self.is_depth(key)]

    def is_depth(self, key: str) -> bool:
        """Whether a feature is a depth map: it says so, or its images have one channel."""
        feature = self.features[key]
        parts = [feature[name] for name in ("info", "video_info") if isinstance(feature.get(name), dict)]
        shape, names = feature.get("shape"), feature.get("names")
        channels = shape[-1:] if isinstance(shape, list) and len(shape) == 3 else []
        if channels and isinstance(names, list) and len(names) == 3 and str(names[0]).startswith("channel"):
            channels = shape[:1]
        says = any(part.get("is_depth_map") or part.get("video.is_depth_map") for part in parts)
        return says or channels == [1]

    def is_camera(self, key: str) -> bool:
        """Whether a feature is images or video."""
        return self.features[key]["dtype"] in ("image", "video")

    def is_video(self, key: str) -> bool:
        """Whether a feature's frames are in video files."""
        return self.features[key]["dtype"] == "video"

    def width(self, key: str) -> int:
        """Values of a numeric feature at one step, those of all its axes.

        Raises:
            DataError: its shape is none.
        """
        shape = self.features[key].get("shape")
        whole = isinstance(shape, list) and shape and all(type(size) is int and size > 0 for size in shape)
        if not whole or len(shape) > 8 or math.prod(shape) > MAX_WIDTH:
            raise DataError(f"{self.info_path}: {key!r} has shape {shape}; wanted the sizes of its axes, at least one")
        return math.prod(shape)

    def names(self, keys: Sequence[str]) -> list[str] | None:
        """What the values of some numeric features are called, one after the other; None where one does not say."""
        result: list[str] = []
        for key in keys:
            names = self.features[key].get("names")
            if isinstance(names, dict) and len(names) == 1:  # {"motors": [...]}
                names = next(iter(names.values()))
            if not isinstance(names, list) or len(names) != self.width(key):
                return None
            result += map(str, names)
        return result

    def digest(self) -> dict[str, str]:
        """What tells this state of the metadata from another one."""
        paths = {"info": [self.info_path], "tasks": [self.tasks_path], "episodes": self.episode_paths}
        digests = {
            name: hashlib.sha256(b"".join(path.read_bytes() for path in of_part)) for name, of_part in paths.items()
        }
        return {"version": self.version, **{name: digest.hexdigest()[:16] for name, digest in digests.items()}}

    def sources(self, episodes: Sequence[int], cameras: Sequence[str]) -> dict[str, list[int]]:
        """The state of each file that some episodes are made from."""
        chosen = [self.episodes[index] for index in episodes]
        files = {episode.data_file for episode in chosen}
        files |= {episode.videos[key].path for episode in chosen for key in cameras if self.is_video(key)}
        return {path.relative_to(self.root).as_posix(): fingerprint(path) for path in sorted(files)}

    def _require_own_frames(self) -> None:
        """Raise a DataError where two episodes claim the same frames of a video."""
        spans = sorted(
            (span.path, span.start, span.stop, index)
            for index, episode in self.episodes.items()
            for span in episode.videos.values()
            if span.stop is not None
        )
        for (path, _, stop, index), (other_path, start, _, other) in itertools.pairwise(spans):
            if path == other_path and start < stop - 0.5 / self.fps:
                raise DataError(
                    f"{path}: its frames from {start:g} to {stop:g} s are those of episodes {index} and {other} at "
                    f"once in meta/episodes; {AGAIN}"
                )

    def _episodes_v2(self) -> Iterator[EpisodeSource]:
        chunks_size = _whole(self.info, "chunks_size", self.info_path)
        if chunks_size < 1:
            raise DataError(f"{self.info_path}: chunks_size is {chunks_size}; wanted 1 or more")
        for place, entry in _read_jsonl(self.episode_paths[0]):
            index = _whole(entry, "episode_index", place)
            numbers = {"episode_chunk": index // chunks_size, "episode_index": index}
            videos = {
                key: VideoSpan(self._path("video_path", video_key=key, **numbers), 0.0, None)
                for key in self.features
                if self.is_video(key)
            }
            data_file = self._path("data_path", **numbers)
            yield EpisodeSource(
                index, _whole(entry, "length", place, MAX_STEPS), data_file, videos, _episode_tasks(entry, place)
            )

    def _episodes_v3(self) -> Iterator[EpisodeSource]:
        if not self.episode_paths:
            folder = self.root / "meta" / "episodes"
            raise DataError(f"{folder}: no Parquet file; the dataset is incomplete, so fetch it again")
        keys = [key for key in self.features if self.is_video(key)]
        names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        fields = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        names += [f"videos/{key}/{field}" for key in keys for field in fields]
        for path in self.episode_paths:
            for row in _read_rows(path, names, optional=["tasks"]):
                index = _whole(row, "episode_index", path)
                place = f"{path}: episode {index}"
                numbers = {name: _whole(row, f"data/{name}", place) for name in ("chunk_index", "file_index")}
                videos = {}
                for key in keys:
                    of_video = {name: _whole(row, f"videos/{key}/{name}", place) for name in fields[:2]}
                    start, stop = (_number(row, f"videos/{key}/{name}", place) for name in fields[2:])
                    videos[key] = VideoSpan(self._path("video_path", video_key=key, **of_video), start, stop)
                length, data_file = _whole(row, "length", place, MAX_STEPS), self._path("data_path", **numbers)
                yield EpisodeSource(index, length, data_file, videos, _episode_tasks(row, place))

    def _path(self, template: str, **values: Any) -> Path:
        text = _text(self.info, template, self.info_path)
        return file_in(self.root, fill_template(text, f"{self.info_path}: {template}", values), self.follow_links)


def _features(info: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    features = _entry(info, "features", path)
    if not isinstance(features, dict):
        raise DataError(f"{path}: features is {_shown(features)}; wanted an object; {AGAIN}")
    for key, feature in features.items():
        if not isinstance(feature, dict) or not isinstance(feature.get("dtype"), str):
            raise DataError(f"{path}: feature {key!r} is {_shown(feature)}; wanted an object with a dtype; {AGAIN}")
    return features


def _episode_tasks(entry: dict[str, Any], place: object) -> tuple[str | None, ...] | None:
    tasks = entry.get("tasks")
    if tasks is None:
        return None
    if not isinstance(tasks, list) or not all(task is None or isinstance(task, str) for task in tasks):
        raise DataError(f"{place}: tasks is {_shown(tasks)}; wanted a list of texts; {AGAIN}")
    return tuple(tasks)


def _tasks_v2(path: Path) -> Iterator[tuple[int, str | None]]:
    for place, entry in _read_jsonl(path):
        _entry(entry, "task", place)
        yield _whole(entry, "task_index", place), _text(entry, "task", place, optional=True)


def _tasks_v3(path: Path) -> Iterator[tuple[int, str | None]]:
    """The tasks are the index of a data frame: the column `task`, or `__index_level_0__` where it has no name."""
    texts = ["task", "__index_level_0__"]
    for number, row in enumerate(_read_rows(path, ["task_index"], optional=texts)):
        place = f"{path} row {number}"
        present = [name for name in texts if name in row]
        if not present:
            raise DataError(f"{path}: no column 'task' (found: {', '.join(row)}); {AGAIN}")
        yield _whole(row, "task_index", place), _text(row, present[0], place, optional=True)


def _unique(items: Iterable[tuple[int, Value]], key: str, path: Path) -> dict[int, Value]:
    """A dict of items whose key must not be there twice with different values."""
    result: dict[int, Value] = {}
    for index, value in items:
        if index < 0 or result.setdefault(index, value) != value:
            fault = "less than 0" if index < 0 else "there twice, with different contents"
            raise DataError(f"{path}: {key} {index} is {fault}; {AGAIN}")
    return result


def _entry(entry: dict[str, Any], key: str, place: object) -> Any:
    if key not in entry:
        raise DataError(f"{place}: the entry {key!r} is missing; {AGAIN}")
    return entry[key]


def _number(entry: dict[str, Any], key: str, place: object) -> float:
    """A finite number of an entry, else a DataError that names `place`."""
    value = _entry(entry, key, place)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{place}: {key} is {_shown(value)}; wanted a number; {AGAIN}")
    return value


def _whole(entry: dict[str, Any], key: str, place: object, most: int = MAX_INDEX) -> int:
    """A whole number of an entry, from 0 to `most`; 1.0, as pandas writes a column with gaps, is 1."""
    value = _number(entry, key, place)
    if value != int(value) or not 0 <= value <= most:
        raise DataError(f"{place}: {key} is {value}; wanted a whole number from 0 to {most:,}; {AGAIN}")
    return int(value)


def _text(entry: dict[str, Any], key: str, place: object, *, optional: bool = False) -> str | None:
    """A text of an entry; where that is `optional`, it may be absent or null."""
    value = entry.get(key) if optional else _entry(entry, key, place)
    if not isinstance(value, str) and not (optional and value is None):
        raise DataError(f"{place}: {key} is {_shown(value)}; wanted a text; {AGAIN}")
    return value


def _shown(value: Any) -> str:
    """A value as JSON would show it, cut after some characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_rows(path: Path, names: Sequence[str], optional: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a Parquet file of metadata: columns that it must have, and those of `optional` that it has."""
    with open_parquet(path) as file:
        columns = [*names, *(name for name in optional if name in file.schema_arrow.names)]
        try:
            return [row for _, batch in batches(file, path, columns, ROWS_PER_READ) for row in batch.to_pylist()]
        except (ValueError, OverflowError) as error:  # of values that Python can't hold: text that is not UTF-8, dates
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: {one_line(error)}; {AGAIN}") from None


def _read_json(path: Path) -> dict[str, Any]:
    wanted = f"wanted the folder of a LeRobot dataset ({', '.join(VERSIONS)})"
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {wanted}") from None
    except ForeignFileError as error:
        raise DataError(f"{path}: {error}; fetch that file again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: is {_shown(content)}; wanted a JSON object; fetch that file again")
    return content


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, entry) of each line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the dataset is incomplete, so fetch it again") from None
    except ValueError as error:
        raise DataError(f"{path}: not UTF-8 ({one_line(error)}); fetch that file again") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path} line {number}"
            try:
                entry = parse_json(line)
            except ForeignFileError as error:
                raise DataError(f"{place}: {error}; wanted one object a line; {AGAIN}") from None
            if not isinstance(entry, dict):
                raise DataError(f"{place}: is {_shown(entry)}; wanted one object a line; {AGAIN}")
            yield place, entry

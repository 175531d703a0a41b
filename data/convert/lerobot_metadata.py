"""What a LeRobot dataset's meta folder says (v2.0, v2.1, v3.0): features, tasks, and where each episode lies.

v2.x   meta/{info.json, tasks.jsonl, episodes.jsonl}; one Parquet file and one video per camera for each episode
v3.0   meta/{info.json, tasks.parquet, episodes/**.parquet}; files of many episodes, found through meta/episodes:
       an episode's rows carry its episode_index, its video frames lie from `from_timestamp` on
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.convert.conversion import fingerprint
from data.convert.foreign_sources import MAX_STEPS, file_in, fill_template
from utils.foreign_files import ForeignFileError, parse_json
from utils.parquet_utils import DataError, open_parquet, require_columns
from utils.text import printable

MAX_FPS = 10_000
MAX_INDEX = 1_000_000_000
VERSIONS = ("v2.0", "v2.1", "v3.0")


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


class LeRobotDataset:
    """The metadata of a LeRobot dataset in a local folder.

    Attributes:
        version, fps, robot_type, features: as info.json has them.
        tasks: task_index -> instruction.
        episodes: episode_index -> `EpisodeSource`, ascending.
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
        try:
            self.features: dict[str, dict[str, Any]] = self.info["features"]
            self._check_info()
            self.fps: float = self.info["fps"]
            self.robot_type: str | None = self.info.get("robot_type")
            if self.version == "v3.0":
                self.tasks_path = file_in(root, "meta/tasks.parquet", follow_links)
                found = sorted((root / "meta" / "episodes").rglob("*.parquet"))
                self.episode_paths = [file_in(root, path.relative_to(root), follow_links) for path in found]
                self.tasks, episodes = _tasks_v3(self.tasks_path), self._episodes_v3()
            else:
                self.tasks_path = file_in(root, "meta/tasks.jsonl", follow_links)
                self.episode_paths = [file_in(root, "meta/episodes.jsonl", follow_links)]
                self.tasks, episodes = _tasks_v2(self.tasks_path), self._episodes_v2()
            self.episodes = dict(sorted(episodes.items()))
            self._check_episodes()
        except KeyError as error:
            raise DataError(
                f"{root / 'meta'}: the entry {error} is missing; the dataset is not a whole LeRobot {self.version}, so "
                "fetch it again"
            ) from None
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{root / 'meta'}: not as LeRobot {self.version} writes it ({printable(repr(error))}); "
                "fetch the dataset again"
            ) from None
        if not self.episodes:
            raise DataError(f"{root / 'meta'}: no episodes; record some, or fetch the dataset again")

    def _check_episodes(self) -> None:
        for episode in self.episodes.values():
            if type(episode.index) is not int or not 0 <= episode.index < MAX_INDEX:
                raise DataError(
                    f"{self.root / 'meta'}: episode_index is {episode.index!r}; wanted a whole number from 0"
                )
            if type(episode.length) is not int or not 0 <= episode.length <= MAX_STEPS:
                raise DataError(f"{self.root / 'meta'}: length of episode {episode.index} is {episode.length!r}")
        for index, text in self.tasks.items():
            if not isinstance(text, str):
                raise DataError(f"{self.tasks_path}: task {index} is {printable(repr(text))}; wanted its instruction")

    def _check_info(self) -> None:
        fps, chunk = self.info["fps"], self.info.get("chunks_size", 1000)
        if type(fps) not in (int, float) or not 0 < fps <= MAX_FPS:
            raise DataError(f"{self.info_path}: fps is {printable(repr(fps))}; wanted a number from 0 to {MAX_FPS}")
        if type(chunk) is not int or chunk < 1:
            raise DataError(f"{self.info_path}: chunks_size is {printable(repr(chunk))}; wanted 1 or more")
        for name, feature in self.features.items():
            sound = isinstance(feature, dict) and isinstance(feature.get("dtype"), str)
            shape = feature.get("shape") if sound else None
            if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
                raise DataError(
                    f"{self.info_path}: feature {printable(name)!r} is {printable(repr(feature))}; wanted its dtype "
                    "and shape"
                )

    @property
    def cameras(self) -> list[str]:
        """Features that are images or video, depth maps aside."""
        return [key for key, feature in self.features.items() if self.is_camera(key) and not _is_depth(feature)]

    def is_camera(self, key: str) -> bool:
        """Whether a feature is images or video."""
        return self.features[key]["dtype"] in ("image", "video")

    def is_video(self, key: str) -> bool:
        """Whether a feature's frames are in video files."""
        return self.features[key]["dtype"] == "video"

    def width(self, key: str) -> int:
        """Values of a numeric feature at one step.

        Raises:
            DataError: it is not a vector.
        """
        shape = self.features[key]["shape"]
        if len(shape) != 1:
            raise DataError(f"{self.info_path}: {key!r} has shape {list(shape)}; wanted a vector, one number in shape")
        return int(shape[0])

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

    def _episodes_v2(self) -> dict[int, EpisodeSource]:
        episodes = {}
        for entry in _read_jsonl(self.episode_paths[0]):
            index = int(entry["episode_index"])
            numbers = {"episode_chunk": index // int(self.info["chunks_size"]), "episode_index": index}
            videos = {
                key: VideoSpan(self._path("video_path", video_key=key, **numbers), 0.0, None)
                for key in self.features
                if self.is_video(key)
            }
            episodes[index] = EpisodeSource(index, int(entry["length"]), self._path("data_path", **numbers), videos)
        return episodes

    def _episodes_v3(self) -> dict[int, EpisodeSource]:
        if not self.episode_paths:
            folder = self.root / "meta" / "episodes"
            raise DataError(f"{folder}: no Parquet file; the dataset is incomplete, so fetch it again")
        keys = [key for key in self.features if self.is_video(key)]
        names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        fields = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        names += [f"videos/{key}/{field}" for key in keys for field in fields]
        episodes = {}
        for path in self.episode_paths:
            with open_parquet(path) as file:
                require_columns(file, path, names)
                rows = file.read(columns=names).to_pylist()
            for row in rows:
                index = row["episode_index"]
                numbers = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
                videos = {}
                for key in keys:
                    chunk, number, start, stop = (row[f"videos/{key}/{field}"] for field in fields)
                    video = self._path("video_path", video_key=key, chunk_index=chunk, file_index=number)
                    videos[key] = VideoSpan(video, start, stop)
                episodes[index] = EpisodeSource(index, row["length"], self._path("data_path", **numbers), videos)
        return episodes

    def _path(self, template: str, **values: Any) -> Path:
        name = fill_template(self.info[template], f"{self.info_path}: {template}", values)
        return file_in(self.root, name, self.follow_links)


def _is_depth(feature: dict[str, Any]) -> bool:
    info = feature.get("info") or {}
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))


def _tasks_v2(path: Path) -> dict[int, str]:
    return {int(entry["task_index"]): entry["task"] for entry in _read_jsonl(path)}


def _tasks_v3(path: Path) -> dict[int, str]:
    """The tasks are the index of a data frame: the column `task`, or `__index_level_0__` where it has no name."""
    with open_parquet(path) as file:
        require_columns(file, path, ["task_index"])
        table = file.read()
    texts = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not texts:
        raise DataError(f"{path}: no column 'task' (found: {', '.join(table.column_names)}); fetch the dataset again")
    return dict(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; wanted the folder of a LeRobot dataset ({', '.join(VERSIONS)})"
        ) from None
    except ForeignFileError as error:
        raise DataError(f"{path}: {error}; fetch that file again") from None


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the dataset is incomplete, so fetch it again") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield parse_json(line)
            except ForeignFileError as error:
                raise DataError(f"{path} line {number}: {error}; fetch that file again") from None

"""LeRobot datasets (v2.0, v2.1, v3.0; frames as images or as video), with GR00T's meta/modality.json or without.

Steps are read 64 at a time and video is decoded forward, so memory does not grow with episodes or files.
`data/convert/lerobot_metadata.py` knows the layouts, `data/convert/modality.py` GR00T's names.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.convert.conversion import fingerprint
from data.convert.lerobot_metadata import EpisodeSource, LeRobotDataset
from data.convert.lerobot_rows import (
    RowReader,
    check_span,
    embedded_frames,
    label_features,
    matrix,
    require_ascending,
    row_times,
    task_texts,
    tell_left_out,
    video_times,
)
from data.convert.modality import MODALITY, Modality
from data.convert.readers.base import Block, Episode, Key, Reader
from data.convert.video import VideoReader
from utils.parquet_utils import DataError
from utils.text import printable

logger = logging.getLogger(__name__)

TASK, TIME = "task", "timestamp"  # keys of the instruction and of the seconds since the episode's start
TOLERANCE_S = 1e-4
PERSISTENT, EVENTS = "language_persistent", "language_events"  # columns of lerobot-annotate


class LeRobotReader(Reader):
    """The episodes of one dataset."""

    OPTIONS = ("tolerance_s", "modality")
    WANTED = "folder of a LeRobot dataset, the one with meta/"
    DESCRIPTION = "LeRobot"

    def __init__(self, path: Path, options: dict[str, Any], follow_links: bool = False) -> None:
        super().__init__(path, options, follow_links)
        dataset = LeRobotDataset(path, follow_links)
        self._digest = json.dumps(dataset.digest())
        self._tolerance = options.get("tolerance_s", TOLERANCE_S)
        self._empty_allowed = False
        self._cameras: list[str] = []  # features
        is_number = isinstance(self._tolerance, int | float) and not isinstance(self._tolerance, bool)
        if not (is_number and 0 < self._tolerance < 0.5 / dataset.fps):
            raise DataError(f"--tolerance_s is {self._tolerance}; wanted more than 0 and less than half a frame")
        if options.get("modality", "use") not in ("use", "ignore"):
            raise DataError(f"mapping: modality is {options['modality']!r}; wanted use or ignore")
        self._modality = Modality.read(dataset) if options.get("modality") != "ignore" else None

    @property
    def dataset(self) -> LeRobotDataset:
        """The metadata, read once per process."""
        return _open(self.path, self._digest, self.follow_links)

    def episodes(self) -> list[Episode]:
        for index in self.dataset.empty_episodes:
            logger.warning("%s: episode %d has no steps: left out", self.path, index)
        return [
            Episode(f"{self.path} episode {index}", (episode.data_file,), index, index)
            for index, episode in self.dataset.episodes.items()
        ]

    def keys(self, episode: Episode) -> dict[str, Key]:
        found = {key: _key(self.dataset, key) for key in self.dataset.features}
        found[TASK] = Key("text")
        return found | (self._modality.keys() if self._modality else {})

    def plain_key(self, key: str) -> str:
        return PERSISTENT if key.startswith(f"{PERSISTENT}:") else key

    def _feature(self, key: str) -> str:
        """The feature that a key is read from."""
        return self._modality.feature(self.plain_key(key)) if self._modality else self.plain_key(key)

    def recommended(self) -> dict[str, Any] | None:
        return self._modality.entries() if self._modality else None

    def fps(self) -> float | None:
        return self.dataset.fps

    def time_key(self) -> str | None:
        return TIME

    def facts(self, mapping: Any) -> dict[str, Any]:
        state, action = ([term.key for term in terms] for terms in (mapping.state, mapping.action))
        plain = not any(term.dims for term in (*mapping.state, *mapping.action))
        features = self.dataset.features
        return {
            "source_format": f"LeRobot {self.dataset.version}",
            "robot_type": self.dataset.robot_type,
            "state_names": self.dataset.names(state) if plain and features.keys() >= set(state) else None,
            "action_names": self.dataset.names(action) if plain and features.keys() >= set(action) else None,
        }

    def settings(self) -> dict[str, Any]:
        return {"dataset": self.dataset.digest()}

    def sources(self, episodes: Sequence[Episode]) -> dict[str, list[int]]:
        return self.dataset.sources([episode.place for episode in episodes], self._cameras)

    def derived(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        entries = {**label_features(self.dataset), **entries}
        if not entries.get("from_modality"):
            return entries
        if self._modality is None:
            raise DataError(
                f"{self.path / MODALITY}: no such file; name the features in a mapping (--inspect lists them)"
            )
        given = {name: value for name, value in entries.items() if name != "from_modality"}
        return {**self._modality.entries(), **given}

    def check_mapping(self, mapping: Any) -> None:
        self._empty_allowed = mapping.prompt.empty is not None
        if not self.dataset.cameras:
            raise DataError(
                f"{self.dataset.info_path}: the dataset has no camera, and every step of ours needs one; record it "
                "again with cameras"
            )
        if self._modality is not None:
            self._modality.require_use(mapping, TASK)
        named = [self._feature(camera.key) for camera in mapping.cameras.values()]
        for key in named:
            check_camera(self.dataset, key)
        self._cameras = [key for key in named if key in self.dataset.features]
        tell_left_out(self.dataset, map(self._feature, mapping.named_keys))

    def blocks(self, episode: Episode, keys: Sequence[str]) -> Iterator[Block]:
        dataset, source = self.dataset, self.dataset.episodes[episode.place]
        features = {key: self._feature(key) for key in keys}
        columns = {feature for feature in features.values() if feature not in (TASK, TIME)}
        videos = [key for key in columns if dataset.is_video(key)]
        needed = ["frame_index", "timestamp", *(["task_index"] if TASK in features.values() else [])]
        needed += sorted(columns - set(videos))
        rows = _row_reader(source.data_file, tuple(fingerprint(source.data_file)), tuple(dict.fromkeys(needed)))
        with contextlib.ExitStack() as stack:
            readers = {
                key: stack.enter_context(contextlib.closing(VideoReader(source.videos[key].path))) for key in videos
            }
            for key, reader in readers.items():
                check_span(dataset, source, key, reader.num_frames)
            yield from self._blocks(source, features, rows, readers)

    def _blocks(
        self, source: EpisodeSource, features: dict[str, str], rows: RowReader, readers: dict[str, VideoReader]
    ) -> Iterator[Block]:
        begin, last, where = 0, -np.inf, f"{self.path} episode {source.index} frame"
        for batch in rows.episode(source.index):
            if begin + batch.num_rows > source.length:
                raise _wrong_length(self.path, source, f"more than {source.length}")
            timestamp = row_times(self.dataset, batch, source, begin)
            if readers:
                require_ascending(timestamp, last, where, begin, source)
            last = timestamp[-1]
            block: Block = {}
            for key, feature in features.items():
                if feature in readers:
                    span = source.videos[feature]
                    times = video_times(timestamp, span, self._tolerance, where, begin, self.dataset.fps)
                    frames = [readers[feature].frame_at(*time, f"{where} {begin + i}") for i, time in enumerate(times)]
                    block[key] = np.stack(frames)
                else:
                    block[key] = self._stored(batch, key, feature, source, begin, timestamp)
            yield block
            begin += batch.num_rows
        if begin != source.length:
            raise _wrong_length(self.path, source, str(begin))

    def _stored(
        self, batch: pa.RecordBatch, key: str, feature: str, source: EpisodeSource, begin: int, timestamp: np.ndarray
    ) -> np.ndarray | list[Any]:
        """The values of a column of the data file."""
        dataset = self.dataset
        if feature == TIME:
            return timestamp
        if feature == TASK:
            empty = "" if self._empty_allowed else None
            return task_texts(dataset, batch, source, empty)
        if dataset.is_camera(feature):
            return embedded_frames(batch.column(feature), feature, f"{self.path} episode {source.index} frame", begin)
        if feature == PERSISTENT:
            return _active(batch.column(feature), key.partition(":")[2], timestamp, source)
        if dataset.features[feature]["dtype"] == "string":
            return _texts(batch.column(feature), feature, source)
        values = matrix(dataset, batch, feature, source)
        return self._modality.values(key, values, dataset, source) if self._modality else values


@functools.lru_cache(maxsize=1)
def _open(root: Path, _digest: str, follow_links: bool) -> LeRobotDataset:
    """The dataset in the state of `_digest`: read once per process, whatever the number of its files."""
    return LeRobotDataset(root, follow_links)


@functools.lru_cache(maxsize=1)
def _row_reader(path: Path, _fingerprint: tuple[int, ...], columns: tuple[str, ...]) -> RowReader:
    """The reader of a data file in a state of it; a process keeps the last one for the episodes that follow."""
    return RowReader(path, columns)


def check_camera(dataset: LeRobotDataset, key: str) -> None:
    """Raise a DataError for a depth map, which is no camera of colour images."""
    if key in dataset.features and dataset.is_camera(key) and dataset.is_depth(key):
        shape = dataset.features[key].get("shape")
        raise DataError(
            f"{dataset.info_path}: {key!r} is a depth map (shape {shape}), which is not converted; choose a camera of "
            "colour images"
        )


def _key(dataset: LeRobotDataset, name: str) -> Key:
    dtype = dataset.features[name]["dtype"]
    if dataset.is_camera(name):
        if dataset.is_depth(name):
            return Key("not read: a depth map; choose a camera of colour images")
        return Key("uint8", (0, 0, 3)) if dataset.is_video(name) else Key("image")
    if name == PERSISTENT:
        return Key("text")
    if name == EVENTS or dtype == "language":
        return Key(f"not read: language of single steps; use task, or {PERSISTENT}:<style> such as :subtask")
    if dtype == "string":
        return Key("text")
    if not dtype.startswith(("float", "int", "uint", "bool")):
        return Key(f"not read: a feature of dtype {printable(dtype, 40)}; leave it out")
    return Key(dtype, (dataset.width(name),))


def _texts(column: pa.Array, key: str, episode: EpisodeSource) -> list[str]:
    """A column of one text a step."""
    values = column.flatten() if isinstance(column, pa.ListArray | pa.FixedSizeListArray) else column
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    if not is_text or len(values) != len(column) or values.null_count:
        raise DataError(f"{episode.data_file} (episode {episode.index}): {key!r} is {column.type}; wanted a text a row")
    return values.to_pylist()


def _active(column: pa.Array, style: str, timestamp: np.ndarray, episode: EpisodeSource) -> list[str]:
    """What is said in one style at each step: the newest row of `language_persistent` that has begun by then."""
    where = f"{episode.data_file} (episode {episode.index})"
    texts = []
    for rows, now in zip(column.to_pylist(), timestamp.tolist(), strict=True):
        said = [row for row in rows or () if row.get("style") == style and row["timestamp"] <= now + TOLERANCE_S]
        if not said:
            styles = sorted({str(row.get("style")) for row in rows or ()})
            raise DataError(
                f"{where}: {PERSISTENT} says nothing in the style {style!r} at {now:g} s (found: "
                f"{', '.join(styles) or 'none'}); name another, as {PERSISTENT}:<style>, or use task"
            )
        texts.append(max(said, key=lambda row: row["timestamp"])["content"] or "")
    return texts


def _wrong_length(root: Path, episode: EpisodeSource, found: str) -> DataError:
    return DataError(
        f"{root} episode {episode.index}: found {found} steps, its description says {episode.length}; the source is "
        "damaged or incomplete, so fetch or record it again"
    )

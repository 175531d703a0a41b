"""A LeRobot dataset (v2.0, v2.1, v3.0) that is read where it lies, as rows of the schema of docs/data_format.md.

Its rows are those that scripts/convert_lerobot.py would write, with the same checks (`data/convert/lerobot_rows.py`).
Frames embedded in Parquet are columns of bytes like any camera's; those of videos are found by time stamp.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from data.convert.conversion import check_names, parse_cameras, parse_episodes, parse_state_keys
from data.convert.episode_writer import ImageEncoding, Steps
from data.convert.foreign_sources import reading
from data.convert.lerobot_metadata import EpisodeSource, open_dataset
from data.convert.lerobot_rows import (
    TASK,
    LeRobotOptions,
    RowReader,
    check_span,
    episode_rows,
    label_features,
    require_instructions,
    row_columns,
    video_times,
)
from data.convert.modality import MODALITY
from data.convert.video import VideoReader
from data.schema import ACTION, FLAGS, IMAGE, INDICES, LABELS, MAIN_CAMERA, PROMPT, TIMESTAMP
from data.video_packets import PacketWriter
from utils.parquet_utils import DataError, bytes_needed, open_parquet
from utils.recordings import LeRobotFolder

logger = logging.getLogger(__name__)

ROWS_PER_BLOCK = 8192  # of numbers
PREFIXES = ("observation.images.", "observation.")  # of features; what follows is a camera's name
CONVERT_GROOT = "python scripts/convert.py --from lerobot {root} --preset groot --output_dir demos/train"


class LeRobotTable:
    """The rows of a LeRobot dataset, episode by episode in the order of their numbers.

    Attributes:
        dataset: its metadata.
        cameras: camera -> feature.
        episodes: those that are read.
        schema: of the rows without the cameras that are video.
    """

    def __init__(self, folder: LeRobotFolder) -> None:
        """Read the metadata.

        Raises:
            DataError: no dataset, or one that contradicts itself or its mapping; the message names place and remedy.
        """
        self.folder, mapping = folder, folder.mapping
        self._require_mapping_of_groot()
        with _settings_by_name():
            self.dataset = open_dataset(folder.root, mapping.follow_links)
            self.cameras = self._cameras()
            self._options = LeRobotOptions(
                cameras={feature: camera for camera, feature in self.cameras.items()},
                state_columns=parse_state_keys(mapping.state_key),
                action_keys=mapping.action_key,
                encoding=ImageEncoding(),
                tolerance_s=mapping.tolerance_s,
                prompt=mapping.prompt,
                empty_prompt=mapping.empty_prompt,
                terminal="auto",
                task_key=mapping.task_key or TASK,
                follow_links=mapping.follow_links,
            )
            numeric = [key for key in self.dataset.features if not self.dataset.is_camera(key)]
            task = () if mapping.task_key is None else (mapping.task_key,)
            check_names(
                (*self._options.state_keys, *mapping.action_key, *task), numeric, "feature", str(self.dataset.info_path)
            )
            if mapping.tolerance_s >= 0.5 / self.dataset.fps:
                raise DataError(f"--tolerance_s is {mapping.tolerance_s}; wanted less than half a frame")
            chosen = parse_episodes(mapping.episodes or None, self.dataset.episodes, str(folder))
            if mapping.prompt is None and mapping.empty_prompt is None and mapping.task_key is None:
                require_instructions(self.dataset, chosen)
        for index in () if mapping.episodes else self.dataset.empty_episodes:
            logger.warning("%s: episode %d has no steps: left out", folder, index)
        self.episodes = [self.dataset.episodes[index] for index in chosen]
        self.starts = np.cumsum([0, *(episode.length for episode in self.episodes)])
        self.schema = self._schema()
        self._reader: RowReader | None = None  # of the file that was read last
        self._reads: tuple[object, ...] = ()  # what it was made with

    @property
    def schema_with_video(self) -> pa.Schema:
        """`schema`, and a column for each camera that is video."""
        videos = [pa.field(name, IMAGE.written) for name in self.video_cameras(list(self.cameras))]
        return pa.schema([*self.schema, *videos])

    @property
    def path(self) -> LeRobotFolder:
        return self.folder

    def __enter__(self) -> LeRobotTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader, self._reads = None, ()

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    def camera_feature(self, camera: str, wanted: Sequence[str] = ()) -> str | None:
        """The feature that holds a camera's frames; None where the dataset has no such camera.

        A dataset's only camera is `image_1` too.

        Raises:
            DataError: it is the main camera, or the dataset has none of those that are `wanted`.
        """
        if camera in self.cameras:
            return self.cameras[camera]
        if camera == MAIN_CAMERA and len(self.cameras) == 1 and not self.folder.mapping.cameras:
            return next(iter(self.cameras.values()))
        if camera == MAIN_CAMERA or not any(name in self.cameras for name in wanted):
            present = self.dataset.cameras
            example = f"{present[0]}={camera}" if present else f"FEATURE={camera}"
            raise DataError(
                f"{self.folder}: no camera is called {camera} (its features: {', '.join(present) or 'none'}); "
                f"say which one it is, as data.lerobot: {{cameras: [{example}]}}, or in the path: "
                f"{self.folder}?cameras={example}"
            )
        return None

    def image_columns(self, cameras: Sequence[str], required: Sequence[str] = ()) -> dict[str, str]:
        """camera -> its column of `schema`, of those cameras whose frames are embedded; see `Table`."""
        missing = [name for name in required if name not in self.schema.names]
        if missing:
            raise DataError(
                f"{self.folder}: no column {missing[0]!r} (found: {', '.join(self.schema.names)}); say which feature "
                f"it is, as data.lerobot: {{state_key: [observation.state, FEATURE={missing[0]}]}}"
            )
        features = self._features_of(cameras)
        return {c: self._options.cameras[key] for c, key in features.items() if not self.dataset.is_video(key)}

    def video_cameras(self, cameras: Sequence[str]) -> dict[str, str]:
        """camera -> feature, of those cameras whose frames are in video files."""
        return {c: key for c, key in self._features_of(cameras).items() if self.dataset.is_video(key)}

    def _features_of(self, cameras: Sequence[str]) -> dict[str, str]:
        features = {camera: self.camera_feature(camera, cameras) for camera in cameras}
        return {camera: key for camera, key in features.items() if key is not None}

    def batches(self, columns: Sequence[str], batch_size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(first row, at most `batch_size` rows of an episode) of some columns of `schema`.

        Raises:
            DataError: rows that contradict the metadata or each other, or files that can't be read.
        """
        images = [name for name in columns if name in self.cameras]
        for episode, start in zip(self.episodes, self.starts[:-1].tolist(), strict=True):
            step = 0
            for steps, _ in self._rows(episode, [self.cameras[name] for name in images], batch_size):
                arrays = self._arrays(columns, steps, episode, step)
                yield start + step, pa.RecordBatch.from_pydict(arrays)
                step += len(steps.prompts)

    def find_packets(self, camera: str, writer: PacketWriter) -> np.ndarray:
        """Copy the packets of a camera's videos; int64 (rows,), the packet of each row's frame.

        Raises:
            DataError: a video that can't be read, or has no frame of a row's time; see also `batches`.
        """
        found, feature = np.full(self.num_rows, -1, dtype=np.int64), self.camera_feature(camera)
        for episode, start in zip(self.episodes, self.starts[:-1].tolist(), strict=True):
            with _settings_by_name():
                frames = writer.add(episode.videos[feature].path)
                check_span(self.dataset, episode, feature, len(frames.packets))
                for step, times in self._frame_times(episode, feature):
                    packets = frames.find(times, self._place(episode), step)
                    found[start + step : start + step + len(packets)] = packets
        return found

    def pictures(self, camera: str, count: int) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(first row, at most `count` decoded frames) of a camera that is video, uint8 (H, W, 3) each, in order.

        Raises:
            DataError: a video that can't be decoded, or has no frame of a row's time; see also `batches`.
        """
        reader, feature = None, self.camera_feature(camera)
        with _settings_by_name(), contextlib.ExitStack() as stack:
            for episode, start in zip(self.episodes, self.starts[:-1].tolist(), strict=True):
                path = episode.videos[feature].path
                if reader is None or reader.path != path:
                    stack.close()
                    reader = stack.enter_context(contextlib.closing(VideoReader(path)))
                check_span(self.dataset, episode, feature, reader.num_frames)
                for step, times in self._frame_times(episode, feature):
                    for first in range(0, len(times), count):
                        begin = step + first
                        yield (
                            start + begin,
                            [
                                reader.frame_at(*time, f"{self._place(episode)} {begin + i}")
                                for i, time in enumerate(times[first : first + count])
                            ],
                        )

    def _frame_times(self, episode: EpisodeSource, feature: str) -> Iterator[tuple[int, list[tuple[float, float]]]]:
        """(first step, (seconds into the video, tolerance) of each row) of an episode, in blocks."""
        step, span, tolerance = 0, episode.videos[feature], self._options.tolerance_s
        for _, timestamp in self._rows(episode, [feature], ROWS_PER_BLOCK):
            yield step, video_times(timestamp, span, tolerance, self._place(episode), step, self.dataset.fps)
            step += len(timestamp)

    def _place(self, episode: EpisodeSource) -> str:
        """How messages name a step of an episode; its number follows."""
        return f"{self.dataset.root} episode {episode.index} frame"

    def bytes_needed(self, columns: Sequence[str]) -> int:
        """Stored bytes of the data files' columns that are read for some columns of `schema`, and of the footers."""
        features = [self.cameras[name] for name in columns if name in self.cameras]
        own, total = row_columns(self.dataset, self._options, features), 0
        for path in dict.fromkeys(episode.data_file for episode in self.episodes):
            with open_parquet(path) as file:
                total += bytes_needed(file, own)
        return total

    def _rows(
        self, episode: EpisodeSource, features: Sequence[str], batch_size: int
    ) -> Iterator[tuple[Steps, np.ndarray]]:
        """See `episode_rows`; as many as the metadata say."""
        columns = tuple(row_columns(self.dataset, self._options, features))
        wanted = (episode.data_file, columns, batch_size)
        if self._reads != wanted:
            with _settings_by_name(), reading(episode.data_file):
                self._reader, self._reads = RowReader(*wanted), wanted
        count, reader = 0, self._reader
        with _settings_by_name(), reading(episode.data_file):
            for steps, timestamp in episode_rows(self.dataset, self._options, episode, reader, features):
                count += len(timestamp)
                yield steps, timestamp
        if count != episode.length:
            raise DataError(
                f"{self.dataset.root} episode {episode.index}: {episode.data_file} has {count} rows of it, "
                f"meta/episodes says {episode.length}; fetch the dataset again"
            )

    def _arrays(
        self, columns: Sequence[str], steps: Steps, episode: EpisodeSource, begin: int
    ) -> dict[str, pa.Array | np.ndarray]:
        """Some columns of `schema` for consecutive steps of an episode, from step `begin` on."""
        step = np.arange(begin, begin + len(steps.prompts))
        is_last = step == episode.length - 1
        made = {
            "is_first": lambda: step == 0,
            "is_last": lambda: is_last,
            "is_terminal": lambda: is_last & steps.terminal,
            PROMPT: lambda: steps.prompts,
            "episode_index": lambda: np.full(len(step), episode.index, dtype=np.int64),
            "frame_index": lambda: step,
            **{name: functools.partial(steps.extra.get, name) for name in (TIMESTAMP, *LABELS)},
            ACTION: lambda: list_array(steps.action, self.schema.field(ACTION).type),
        }
        ends = np.cumsum([self.schema.field(name).type.list_size for name in self._options.state_columns])
        for name, part in zip(self._options.state_columns, np.split(steps.state, ends[:-1], axis=1), strict=True):
            made[name] = functools.partial(list_array, part, self.schema.field(name).type)
        made |= {name: functools.partial(steps.images.get, name) for name in self.cameras}
        return {name: pa.array(made[name](), self.schema.field(name).type) for name in columns}

    def _schema(self) -> pa.Schema:
        wide = {"float64", "int64", "uint64"}
        kinds, called = {}, {}
        for name, keys in {**self._options.state_columns, ACTION: self._options.action_keys}.items():
            stored = {str(self.dataset.features[key]["dtype"]) for key in keys}
            value = pa.float64() if stored & wide else pa.float32()
            kinds[name] = pa.list_(value, sum(self.dataset.width(key) for key in keys))
            called[f"{name}_names"] = json.dumps(self.dataset.names(keys))
        fields = [*kinds.items(), *((name, pa.bool_()) for name in FLAGS), (PROMPT, pa.string())]
        fields += [*((name, pa.int64()) for name in INDICES), (TIMESTAMP, pa.float32())]
        fields += [(name, pa.bool_()) for name in label_features(self.dataset)]
        images = [(camera, IMAGE.written) for camera, key in self.cameras.items() if not self.dataset.is_video(key)]
        return pa.schema([*fields, *images], metadata={"fps": f"{self.dataset.fps:g}", **called})

    def _cameras(self) -> dict[str, str]:
        """camera -> feature, as the mapping says, or else by name."""
        dataset, mapping = self.dataset, self.folder.mapping
        if not mapping.cameras:
            names = {key: _short(key) for key in dataset.cameras}
            twice = {name for name in names.values() if list(names.values()).count(name) > 1}
            return {key if name in twice else name: key for key, name in names.items()}
        for feature in (text.partition("=")[0] for text in mapping.cameras):
            if feature in dataset.features and dataset.is_camera(feature) and dataset.is_depth(feature):
                shape = dataset.features[feature].get("shape")
                raise DataError(
                    f"{dataset.info_path}: {feature!r} is a depth map (shape {shape}), which is not read; choose a "
                    "camera of colour images"
                )
        named = parse_cameras(mapping.cameras, dataset.cameras, str(self.folder))
        return {camera: feature for feature, camera in named.items()}

    def _require_mapping_of_groot(self) -> None:
        mapping, root = self.folder.mapping, self.folder.root
        if not (root / MODALITY).exists() or (mapping.cameras and (mapping.task_key or mapping.prompt)):
            return
        raise DataError(
            f"{self.folder}: {root / MODALITY} says that this is a GR00T dataset, whose instructions and slices of "
            f"state and action are not where LeRobot has them; convert it ({CONVERT_GROOT.format(root=root)}), or say "
            "what to read: data.lerobot with cameras, state_key, action_key, and task_key or prompt"
        )


def list_array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Numbers (rows, width) as a list column."""
    flat = np.ascontiguousarray(values, dtype=kind.value_type.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), kind.list_size)


def _short(feature: str) -> str:
    """The name of a camera: its feature without LeRobot's prefix."""
    for prefix in PREFIXES:
        if feature.startswith(prefix):
            return feature.removeprefix(prefix)
    return feature


@contextlib.contextmanager
def _settings_by_name() -> Iterator[None]:
    """The readers' errors name flags of the converter; here the same settings are keys of `lerobot:`."""
    try:
        yield
    except DataError as error:
        raise DataError(re.sub(r"--(\w+)", r"lerobot.\1", str(error))) from None

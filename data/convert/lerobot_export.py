"""The schema of docs/data_format.md into a LeRobot v3.0 dataset that the lerobot library reads.

Cameras, `state`, `action`, `prompt` and `is_terminal` become camera features, `observation.state`, `action`, tasks and,
where asked for, `next.done`; labels where asked for. The layout follows lerobot's own writer
(datasets/dataset_writer.py). Images go in as the bytes they are, or are encoded as video. The dataset is written beside
its place and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data.convert.conversion import run_jobs
from data.convert.episode_reader import Episode, read_episodes
from data.convert.episode_writer import RECORD
from data.convert.lerobot_files import CHUNKS_SIZE, DATA_PATH, VIDEO_PATH, DataFiles, VideoFiles
from data.convert.lerobot_images import Frames, image_blocks, measure_images
from data.convert.lerobot_rows import DONE, LABEL_FEATURES
from data.convert.lerobot_stats import Stats, image_stats, vector_stats
from data.convert.video import VideoEncoding, video_info
from data.schema import SUCCESS
from utils.misc import writing
from utils.parquet_utils import DataError, open_parquet

EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
EPISODES_PER_GROUP = 10  # row groups of meta/episodes, as lerobot buffers them
PARTS = ("meta", "data", "videos")  # of a LeRobot dataset
STATE, ACTION = "observation.state", "action"
FACTS = ("fps", "robot_type", "cameras", "state_columns", "state_names", "action_names")


@dataclass(frozen=True)
class Layout:
    """What the exported dataset looks like.

    Attributes:
        fps: frames per second; time stamps are frame_index / fps, as lerobot's recorder writes them.
        cameras: image column -> feature.
        robot_type: None where it is not known.
        state_columns: what makes up the state; `state` becomes `observation.state`, others `observation.<column>`.
        state_names, action_names: what the values of all state columns and of the action are called; None where it is
            not known.
        video: how to encode frames as video; None: the images as they are.
        next_done: whether `is_terminal` goes over as the feature `next.done`. lerobot's recorder writes none, and
            lerobot merges only datasets of equal features.
        labels: those of LABELS that go over, under lerobot's names; `next.success` is true at the last step alone, as
            nothing says when an episode succeeded.
        data_files_size_in_mb, video_files_size_in_mb: a file that would grow beyond is followed by another.
    """

    fps: float
    cameras: dict[str, str]
    robot_type: str | None = None
    state_columns: tuple[str, ...] = ("state",)
    state_names: list[str] | None = None
    action_names: list[str] | None = None
    video: VideoEncoding | None = None
    next_done: bool = False
    labels: tuple[str, ...] = ()
    data_files_size_in_mb: float = 100
    video_files_size_in_mb: float = 200


def state_feature(column: str) -> str:
    """LeRobot's name of a column of the state."""
    return STATE if column == "state" else f"observation.{column}"


def read_facts(files: Sequence[Path]) -> dict[str, Any]:
    """The FACTS in the files' metadata, as converters and scripts/record_demos.py note them, on which all files agree.

    Raises:
        DataError: they disagree on fps.
    """
    of_files = [_facts(path) for path in files]
    rates = {facts.get("fps") for facts in of_files}
    if len(rates) > 1:
        raise DataError(
            f"{files[0]} and others were recorded at {', '.join(map(str, rates))} frames per second; LeRobot has one "
            "rate for a dataset, so export them one by one"
        )
    return {key: value for key, value in of_files[0].items() if all(facts.get(key) == value for facts in of_files)}


def _facts(path: Path) -> dict[str, Any]:
    with open_parquet(path) as file:
        raw = file.schema_arrow.metadata or {}
    try:
        texts = {key.decode(): value.decode() for key, value in raw.items()}
        if RECORD not in texts:
            facts = {"fps": json.loads(texts["control_hz"])} if "control_hz" in texts else {}
        else:
            known = [key for key in FACTS if key in texts]
            facts = {key: texts[key] if key == "robot_type" else json.loads(texts[key]) for key in known}
    except ValueError as error:
        raise DataError(f"{path}: its metadata are no JSON ({error}); convert or record it again") from None
    facts = {key: value for key, value in facts.items() if value not in (None, "null")}
    kinds = {"fps": int | float, "robot_type": str, "cameras": dict}
    kinds |= {"state_columns": list, "state_names": list, "action_names": list}
    for key, value in facts.items():
        if not isinstance(value, kinds[key]):
            raise DataError(f"{path}: its metadata say {key} is {value!r}; convert or record it again")
    return facts


def export_lerobot(
    files: Sequence[Path], output_dir: Path, layout: Layout, *, num_workers: int = 1, overwrite: bool = False
) -> tuple[int, int]:
    """Write Parquet files of our schema as a LeRobot v3.0 dataset.

    Args:
        files: in order; an episode may go on from one file into the next.
        output_dir: the dataset's folder.
        layout: see `Layout`.
        num_workers: processes that read, measure and encode images; the result does not depend on it.
        overwrite: replace `meta`, `data` and `videos` of a LeRobot dataset in `output_dir`; what else is there stays.

    Returns:
        (episodes, steps).

    Raises:
        DataError: a file breaks the schema, images differ in size or are absent, or `output_dir` is in use, or holds
            the files that are read.
        WriteError: the folder can't be made or written.
    """
    _check_output_dir(output_dir, files, overwrite)
    for feature in layout.cameras.values():
        if "/" in feature or feature in (*map(state_feature, layout.state_columns), ACTION, DONE):
            raise DataError(f"--cameras: {feature!r} can't be a camera's name in LeRobot; choose another")
    episodes = read_episodes(files, layout.state_columns, layout.labels)
    with writing(output_dir, "make room, or choose another --output_dir"), _beside(output_dir) as temporary:
        root, scratch = temporary / "dataset", temporary / "scratch"
        scratch.mkdir()
        measure = functools.partial(measure_images, scratch, layout.cameras, layout.fps, layout.video)
        jobs = ((episode.index, len(episode), episode.spans) for episode in episodes)
        with _Writer(root, layout) as writer, tqdm(total=len(episodes), unit="episode", disable=None) as progress:
            for episode, frames in zip(episodes, run_jobs(measure, jobs, num_workers), strict=True):
                writer.append(episode, frames)
                progress.update()
        _put_in_place(root, output_dir, temporary / "replaced")
    return len(episodes), sum(map(len, episodes))


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        yield Path(temporary)


def _put_in_place(root: Path, output_dir: Path, replaced: Path) -> None:
    """Move the parts of a whole dataset into `output_dir`, and those that they replace away."""
    output_dir.mkdir(exist_ok=True)
    replaced.mkdir()
    for part in PARTS:
        if (output_dir / part).exists():
            (output_dir / part).rename(replaced / part)
    for part in root.iterdir():
        part.rename(output_dir / part.name)


def _check_output_dir(output_dir: Path, files: Sequence[Path], overwrite: bool) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise DataError(f"--output_dir {output_dir} is a file; choose another")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    inside = [path for path in files if output_dir.resolve() in path.resolve().parents]
    if inside:
        raise DataError(
            f"--data_path: {inside[0]} lies inside of --output_dir {output_dir}, which would be replaced; choose "
            "another --output_dir"
        )
    if not (output_dir / "meta" / "info.json").is_file():
        raise DataError(f"{output_dir} holds something else than a LeRobot dataset; choose another --output_dir")
    if not overwrite:
        raise DataError(f"{output_dir} is there already; choose another --output_dir, or replace it with --overwrite")


class _Writer:
    """Builds the dataset in a folder, episode by episode; a context manager that completes it."""

    def __init__(self, root: Path, layout: Layout) -> None:
        self._root, self._layout = root, layout
        self._tasks: dict[str, int] = {}
        self._features: dict[str, dict[str, Any]] = {}
        self._numbers: dict[str, list[np.ndarray]] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._num_sampled = self._num_rows = self._num_episodes = 0
        self._data = DataFiles(root, layout.data_files_size_in_mb)
        self._videos = {
            feature: VideoFiles(root, feature, layout.fps, layout.video_files_size_in_mb)
            for feature in (layout.cameras.values() if layout.video else ())
        }
        self._pending: list[dict[str, Any]] = []  # rows of meta/episodes
        self._episodes: pq.ParquetWriter | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._data.close()
        for video in self._videos.values():
            video.close()
        if error is None:
            self._flush_episodes()
        if self._episodes is not None:
            self._episodes.close()
        if error is None:
            self._write_metadata()

    def append(self, episode: Episode, frames: dict[str, Frames]) -> None:
        """Add an episode whose images have been measured; `frames` by feature."""
        if not self._features:
            self._features = _features(self._layout, episode, frames)
        self._check_shapes(episode, frames)
        for prompt in episode.prompts:
            self._tasks.setdefault(prompt, len(self._tasks))
        numbers = self._columns(episode)
        row: dict[str, Any] = {
            "episode_index": episode.index,
            "tasks": list(dict.fromkeys(episode.prompts)),
            "length": len(episode),
        }
        data = self._data.append(self._table(episode, numbers), len(episode))
        row |= {"data/chunk_index": data[0], "data/file_index": data[1]}
        row |= {"dataset_from_index": episode.begin, "dataset_to_index": episode.begin + len(episode)}
        for feature, video in self._videos.items():
            chunk, file, start, stop = video.append(frames[feature].video)
            row |= {f"videos/{feature}/chunk_index": chunk, f"videos/{feature}/file_index": file}
            row |= {f"videos/{feature}/from_timestamp": start, f"videos/{feature}/to_timestamp": stop}
        stats = {feature: image_stats(measured.counts, measured.num_sampled) for feature, measured in frames.items()}
        stats |= {key: vector_stats(values.reshape(len(episode), -1)) for key, values in numbers.items()}
        for key, values in stats.items():
            row |= {f"stats/{key}/{name}": value.tolist() for name, value in values.items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self._pending.append(row)
        if len(self._pending) == EPISODES_PER_GROUP:
            self._flush_episodes()
        for key, values in numbers.items():
            self._numbers.setdefault(key, []).append(values)
        for feature, measured in frames.items():
            self._counts[feature] = self._counts.get(feature, 0) + measured.counts
        self._num_sampled += next(iter(frames.values())).num_sampled
        self._num_rows += len(episode)
        self._num_episodes += 1

    def _check_shapes(self, episode: Episode, frames: dict[str, Frames]) -> None:
        for feature, measured in frames.items():
            height, width, _ = self._features[feature]["shape"]
            if measured.shape[:2] != (height, width):
                raise DataError(
                    f"{episode.spans[0].path} row {episode.spans[0].begin}: frames of {feature} are "
                    f"{measured.shape[1]}x{measured.shape[0]}, those of the first episode are {width}x{height}; "
                    "LeRobot has one size for each camera, so export these files apart"
                )

    def _columns(self, episode: Episode) -> dict[str, np.ndarray]:
        """The numeric features, in the order of info.json."""
        frames = np.arange(len(episode))
        return {
            **{state_feature(column): values for column, values in episode.states.items()},
            ACTION: episode.action,
            **({DONE: episode.is_terminal} if self._layout.next_done else {}),
            **{LABEL_FEATURES[name]: _label(name, values) for name, values in episode.labels.items()},
            "timestamp": frames / self._layout.fps,
            "frame_index": frames,
            "episode_index": np.full(len(episode), episode.index),
            "index": episode.begin + frames,
            "task_index": np.array([self._tasks[prompt] for prompt in episode.prompts]),
        }

    def _table(self, episode: Episode, numbers: dict[str, np.ndarray]) -> pa.Table:
        columns: dict[str, pa.Array | pa.ChunkedArray] = {}
        for camera, feature in self._layout.cameras.items():
            if feature not in self._videos:
                columns[feature] = pa.chunked_array(image_blocks(episode, camera))
        for key, values in numbers.items():
            kind = self._features[key]["dtype"]
            flat = pa.array(values.astype(kind).reshape(-1))
            width = self._features[key]["shape"][0]
            columns[key] = flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
        return pa.table(columns).replace_schema_metadata({"huggingface": self._huggingface()})

    def _huggingface(self) -> str:
        """The types of the columns as the datasets library notes them."""
        features: dict[str, Any] = {}
        for key, feature in self._features.items():
            value = {"dtype": feature["dtype"], "_type": "Value"}
            if feature["dtype"] == "image":
                features[key] = {"_type": "Image"}
            elif feature["dtype"] != "video":
                width = feature["shape"][0]
                features[key] = value if width == 1 else {"feature": value, "length": width, "_type": "List"}
        return json.dumps({"info": {"features": features}})

    def _flush_episodes(self) -> None:
        if not self._pending:
            return
        if self._episodes is None:
            path = self._root / EPISODES_PATH
            path.parent.mkdir(parents=True)
            schema = pa.Table.from_pylist(self._pending).schema
            self._episodes = pq.ParquetWriter(path, schema, compression="snappy", use_dictionary=True)
        self._episodes.write_table(pa.Table.from_pylist(self._pending, schema=self._episodes.schema))
        self._pending.clear()

    def _write_metadata(self) -> None:
        layout, meta = self._layout, self._root / "meta"
        for feature in self._videos:
            first = self._root / VIDEO_PATH.format(video_key=feature, chunk_index=0, file_index=0)
            self._features[feature]["info"] = video_info(first, layout.video)
        stats: dict[str, Stats] = {key: image_stats(counts, self._num_sampled) for key, counts in self._counts.items()}
        for key, parts in self._numbers.items():
            values = np.concatenate(parts)
            stats[key] = vector_stats(values.reshape(len(values), -1))
        info = {
            "codebase_version": "v3.0",
            "fps": layout.fps,
            "features": self._features,
            "total_episodes": self._num_episodes,
            "total_frames": self._num_rows,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNKS_SIZE,
            "data_files_size_in_mb": layout.data_files_size_in_mb,
            "video_files_size_in_mb": layout.video_files_size_in_mb,
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._videos else None,
            "robot_type": layout.robot_type,
            "splits": {"train": f"0:{self._num_episodes}"},
        }
        _write_json(meta / "info.json", info)
        lists = {key: {name: value.tolist() for name, value in numbers.items()} for key, numbers in stats.items()}
        _write_json(meta / "stats.json", lists)
        # object, not pandas' string type, so that every version of pandas reads the same index
        tasks = pd.DataFrame(
            {"task_index": list(self._tasks.values())}, index=pd.Index(list(self._tasks), dtype=object, name="task")
        )
        tasks.columns = tasks.columns.astype(object)
        tasks.to_parquet(meta / "tasks.parquet")


def _features(layout: Layout, episode: Episode, frames: dict[str, Frames]) -> dict[str, dict[str, Any]]:
    """The `features` of info.json."""
    features: dict[str, dict[str, Any]] = {}
    for feature, measured in frames.items():
        dtype, names = "video" if layout.video else "image", ["height", "width", "channels"]
        features[feature] = {"dtype": dtype, "shape": list(measured.shape), "names": names}
    ends = np.cumsum([values.shape[1] for values in episode.states.values()]).tolist()
    named = layout.state_names if layout.state_names and len(layout.state_names) == ends[-1] else None
    states = [
        (state_feature(column), values, named and named[end - values.shape[1] : end])
        for (column, values), end in zip(episode.states.items(), ends, strict=True)
    ]
    for key, values, names in (*states, (ACTION, episode.action, layout.action_names)):
        features[key] = {"dtype": "float32", "shape": [values.shape[1]], "names": names}
    indices = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
    flags = {DONE: "bool"} if layout.next_done else {}
    flags |= {LABEL_FEATURES[name]: "bool" for name in layout.labels}
    for key, dtype in {**flags, **indices, "task_index": "int64"}.items():
        features[key] = {"dtype": dtype, "shape": [1], "names": None}
    return features


def _label(name: str, values: np.ndarray) -> np.ndarray:
    """A label as lerobot records it; ours of an episode's outcome stands in all of its rows."""
    return values & (np.arange(len(values)) == len(values) - 1) if name == SUCCESS else values


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")

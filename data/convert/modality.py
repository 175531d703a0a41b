"""GR00T's meta/modality.json: names for slices of a LeRobot dataset's state and action, cameras, and annotations.

Source: Isaac-GR00T, getting_started/LeRobot_compatible_data_schema.md. `state.arm` and `action.arm` are values `start`
to `end` of `observation.state` and `action`; `video.ego_view` is a camera; `annotation.human.action.task_description`
is a column of numbers of tasks, which need not be those of `task_index`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.convert.conversion import check_names
from data.convert.foreign_sources import file_in
from data.convert.lerobot_metadata import EpisodeSource, LeRobotDataset
from data.convert.mapping import Mapping
from data.convert.readers.base import Key
from utils.foreign_files import ForeignFileError, read_json
from utils.parquet_utils import DataError
from utils.text import printable

MODALITY = "meta/modality.json"
VALIDITY, VALID = "validity", "valid"
_FEATURES = {"state": "observation.state", "action": "action"}


@dataclass(frozen=True)
class Modality:
    """What modality.json says, checked against the features."""

    path: str
    slices: dict[str, tuple[str, int, int]]  # state.arm -> (feature, start, end)
    cameras: dict[str, str]  # video.ego_view -> feature
    annotations: dict[str, str]  # annotation.human.validity -> feature

    @classmethod
    def read(cls, dataset: LeRobotDataset) -> Modality | None:
        """None where there is no such file.

        Raises:
            DataError: it is no JSON, or does not fit the dataset.
        """
        path = dataset.root / MODALITY
        if not path.exists():
            return None
        try:
            content = read_json(file_in(dataset.root, MODALITY, dataset.follow_links))
        except ForeignFileError as error:
            raise DataError(f"{error}; fetch the dataset again") from None
        parts = {name: _part(content, name, path) for name in ("state", "action", "video", "annotation")}
        slices = {
            f"{kind}.{name}": _slice(entry, f"{kind}.{name}", feature, dataset)
            for kind, feature in _FEATURES.items()
            for name, entry in parts[kind].items()
        }
        cameras = {
            f"video.{name}": _feature(entry, f"video.{name}", f"observation.images.{name}", dataset)
            for name, entry in parts["video"].items()
        }
        for name, feature in cameras.items():
            if not dataset.is_camera(feature):
                raise DataError(f"{path}: {name} is {feature!r}, which is no camera; correct modality.json")
        annotations = {
            f"annotation.{name}": _feature(entry, f"annotation.{name}", f"annotation.{name}", dataset)
            for name, entry in parts["annotation"].items()
        }
        return cls(str(path), slices, cameras, annotations)

    def keys(self) -> dict[str, Key]:
        """The names that a mapping may use."""
        slices = {name: Key("float32", (end - start,)) for name, (_, start, end) in self.slices.items()}
        return {**slices, **dict.fromkeys(self.cameras, Key("image")), **dict.fromkeys(self.annotations, Key("text"))}

    def feature(self, key: str) -> str:
        """The dataset's feature that a key is read from."""
        if key in self.slices:
            return self.slices[key][0]
        return self.cameras.get(key) or self.annotations.get(key) or key

    def values(
        self, key: str, values: np.ndarray, dataset: LeRobotDataset, episode: EpisodeSource
    ) -> np.ndarray | list[str]:
        """A key's part of its feature's values, (rows, width); of an annotation the texts."""
        if key in self.slices:
            _, start, end = self.slices[key]
            return values[:, start:end]
        if key not in self.annotations:
            return values
        texts = []
        for index in values[:, 0].tolist():
            text = dataset.tasks.get(int(index)) if index == int(index) else None
            if text is None:
                raise DataError(
                    f"{dataset.root} episode {episode.index}: {key} is {index}, no task of {dataset.tasks_path}; fetch "
                    "the dataset again"
                )
            texts.append(text)
        return texts

    def entries(self) -> dict[str, Any]:
        """A mapping of everything that the file names; invalid steps are left out where it says which these are."""
        named = {kind: [key for key in self.slices if key.startswith(f"{kind}.")] for kind in _FEATURES}
        entries: dict[str, Any] = {f"image_{i}": key for i, key in enumerate(self.cameras, start=1)}
        entries |= {kind: keys for kind, keys in named.items() if keys}
        texts = [key for key in self.annotations if not key.endswith(VALIDITY)]
        described = [key for key in texts if key.endswith("task_description")] or texts
        entries["prompt"] = described[0] if described else "task"
        for key in self.annotations:
            if key.endswith(VALIDITY):
                entries["keep"] = {"from": key, "equals": VALID}
        return entries

    def require_use(self, mapping: Mapping, task: str) -> None:
        """Refuse a mapping that reads past the file.

        Raises:
            DataError: none of its keys is one of modality.json, or the instruction is that of `task_index`.
        """
        ignore = "or say modality: ignore if you mean the columns as they are stored"
        if not (self.keys().keys() & set(mapping.keys)):
            raise DataError(
                f"{self.path}: names {', '.join(self.keys())}, and the mapping uses none of them; use them "
                f"(--preset groot uses all), {ignore}"
            )
        texts = [key for key in self.annotations if not key.endswith(VALIDITY)]
        if texts and mapping.prompt.kind == "key" and mapping.prompt.value == task:
            raise DataError(
                f"{self.path}: the instruction is {' or '.join(texts)}, and the mapping takes that of task_index, "
                f"which may be another text; correct prompt, {ignore}"
            )


def _part(content: Any, name: str, path: Any) -> dict[str, Any]:
    part = content.get(name, {}) if isinstance(content, dict) else None
    if not isinstance(part, dict) or not all(isinstance(entry, dict) for entry in part.values()):
        raise DataError(f"{path}: {name} is {printable(repr(part), 60)}; wanted an object of names; correct it")
    return part


def _feature(entry: dict[str, Any], name: str, default: str, dataset: LeRobotDataset) -> str:
    key = entry.get("original_key", default)
    check_names([str(key)], list(dataset.features), "feature", f"{dataset.root / MODALITY}: {name}")
    return str(key)


def _slice(entry: dict[str, Any], name: str, default: str, dataset: LeRobotDataset) -> tuple[str, int, int]:
    feature = _feature(entry, name, default, dataset)
    width, start, end = dataset.width(feature), entry.get("start"), entry.get("end")
    numbers: Sequence[Any] = (start, end)
    if not all(type(n) is int for n in numbers) or not 0 <= start < end <= width:
        raise DataError(
            f"{dataset.root / MODALITY}: {name} is {start} to {end} of {feature}, which has {width} values; correct it"
        )
    return feature, start, end

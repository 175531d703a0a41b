"""RLDS datasets (Open X-Embodiment) as TFRecord shards: one record is one episode, flattened.

    <name>/[<config>/]<version>/{features.json, dataset_info.json, <name>-<split>.tfrecord-00000-of-00004}

`steps/observation/image` holds one encoded image a step, `steps/action` the values of all steps one after the other
(tensorflow_datasets/core/example_serializer.py, google-research/rlds). float64 is stored as float32, bool as int64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.convert.conversion import check_names
from data.convert.foreign_sources import MAX_STEPS, file_in
from data.convert.readers.base import ROWS_PER_BLOCK, Block, Episode, Key, Reader, check_lengths
from data.convert.readers.tfrecord import AGAIN, Value, parse_example, read_record, record_spans
from utils.foreign_files import ForeignFileError, read_json
from utils.parquet_utils import DataError
from utils.text import printable

STEPS = "steps/"
_SHARD = re.compile(r".*-(?P<split>[^-]+)\.(?P<format>\w+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


class RldsReader(Reader):
    """The episodes of one split."""

    OPTIONS = ("split",)
    WANTED = "folder of an RLDS dataset, the one with features.json"
    DESCRIPTION = "RLDS (TFRecord)"
    WARN_OF_ZERO_ACTION = True

    def __init__(self, path: Path, options: dict[str, Any], follow_links: bool = False) -> None:
        super().__init__(_version_folder(path), options, follow_links)
        features = _read_json(file_in(self.path, "features.json", follow_links))
        self._features = dict(_leaves(features, "", self.path / "features.json"))
        if not any(name.startswith(STEPS) for name in self._features):
            raise DataError(f"{self.path / 'features.json'}: no feature 'steps'; wanted an RLDS dataset of episodes")

    def episodes(self) -> list[Episode]:
        split, shards = self._shards()
        announced = self._shard_lengths(split)
        if announced is not None and len(announced) != len(shards):
            raise DataError(
                f"{self.path / 'dataset_info.json'}: says {len(announced)} shards of split {split!r}, {len(shards)} "
                "are there; fetch the dataset again"
            )
        episodes = []
        for i, shard in enumerate(shards):
            spans = record_spans(shard)
            if announced is not None and len(spans) != announced[i]:
                raise DataError(f"{shard}: holds {len(spans)} records, dataset_info.json says {announced[i]}; {AGAIN}")
            episodes += [
                Episode(f"{shard} record {number}", (shard,), (number, *span)) for number, span in enumerate(spans)
            ]
        if not episodes:
            raise DataError(f"{self.path}: split {split!r} holds no episodes; choose another (split)")
        return episodes

    def suggested(self) -> dict[str, Any]:
        splits = {match["split"] for path in self.path.iterdir() if (match := _SHARD.fullmatch(path.name))}
        if splits:
            self.options["split"] = "train" if "train" in splits else min(splits)
        return dict(self.options)

    def keys(self, episode: Episode) -> dict[str, Key]:
        return dict(self._features)

    def blocks(self, episode: Episode, keys: Sequence[str]) -> Iterator[Block]:
        example = self._example(episode)
        values = {key: self._values(example, key, episode) for key in keys}
        lengths = {key: len(value) for key, value in values.items() if key.startswith(STEPS)}
        length = check_lengths(lengths or {"steps": 0}, episode.name)
        if length > MAX_STEPS:
            raise DataError(f"{episode.name}: has {length:,} steps; at most {MAX_STEPS:,} are read")
        for begin in range(0, length, ROWS_PER_BLOCK):
            end = min(begin + ROWS_PER_BLOCK, length)
            yield {
                key: value[begin:end] if key.startswith(STEPS) else [value[0]] * (end - begin)
                for key, value in values.items()
            }

    def values(self, episode: Episode, key: str) -> Iterator[Value]:
        """Everything under one key at once, also what an episode has one value of."""
        yield self._values(self._example(episode), key, episode)

    def attributes(self, episode: Episode) -> dict[str, Any]:
        example = self._example(episode)
        names = [name for name, key in self._features.items() if key.per_episode and name in example]
        return {name: value[0] for name in names if len(value := example[name]) == 1}

    def _example(self, episode: Episode) -> Mapping[str, Value]:
        number, offset, size = episode.place
        try:
            return parse_example(read_record(episode.files[0], offset, size, number))
        except (ValueError, UnicodeDecodeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{episode.name}: is no tf.train.Example ({error}); {AGAIN}") from None

    def _values(self, example: Mapping[str, Value], key: str, episode: Episode) -> Value:
        """The values of all steps, (steps, ...)."""
        if key not in example:
            raise DataError(f"{episode.name}: has no {key!r}, which features.json announces; {AGAIN}")
        values, shape = example[key], self._features[key].shape
        if isinstance(values, list) or not shape:
            return values
        size = math.prod(shape)
        if len(values) % size:
            raise DataError(
                f"{episode.name}: {key} has {len(values)} values, features.json says {tuple(shape)} a step; {AGAIN}"
            )
        return values.reshape(-1, *shape)

    def _shards(self) -> tuple[str, list[Path]]:
        """(split, its shards in order)."""
        found: dict[str, dict[int, Path]] = {}
        for path in sorted(self.path.iterdir()):
            match = _SHARD.fullmatch(path.name)
            if not match:
                continue
            if match["format"] != "tfrecord":
                raise DataError(
                    f"{path}: is in the format {match['format']!r}; only tfrecord is read: build the dataset again "
                    "with tensorflow_datasets' file_format=tfrecord"
                )
            shards = found.setdefault(match["split"], {})
            shards[int(match["number"])] = file_in(self.path, path.name, self.follow_links)
            if int(match["number"]) >= int(match["count"]):
                raise DataError(f"{path}: number {match['number']} of {match['count']}; rename it as it was")
            shards.setdefault(-1, path)
        if not found:
            raise DataError(f"{self.path}: no shard such as name-train.tfrecord-00000-of-00001; fetch it again")
        split = self.options.get("split") or (next(iter(found)) if len(found) == 1 else None)
        if split is None:
            raise DataError(f"{self.path}: has the splits {', '.join(found)}; say which in the mapping (split: ...)")
        check_names([split], list(found), "split", str(self.path))
        count = int(_SHARD.fullmatch(found[split].pop(-1).name)["count"])
        missing = sorted(set(range(count)) - set(found[split]))
        if missing:
            raise DataError(f"{self.path}: shard {missing[0]} of {count} of split {split!r} is missing; {AGAIN}")
        return split, [found[split][number] for number in range(count)]

    def _shard_lengths(self, split: str) -> list[int] | None:
        path = self.path / "dataset_info.json"
        if not path.is_file():
            return None
        info = _read_json(file_in(self.path, path.name, self.follow_links))
        for entry in info.get("splits", []) if isinstance(info.get("splits"), list) else []:
            if isinstance(entry, dict) and entry.get("name") == split:
                lengths = entry.get("shardLengths")
                if isinstance(lengths, list) and all(str(length).isdecimal() for length in lengths):
                    return [int(length) for length in lengths]
        return None


def _version_folder(path: Path) -> Path:
    """`path`, or the only folder below it that holds features.json."""
    if path.is_file():
        raise DataError(f"{path}: is a file; give the {RldsReader.WANTED}")
    if (path / "features.json").is_file():
        return path
    found = sorted(p.parent for pattern in ("*/", "*/*/") for p in path.glob(f"{pattern}features.json"))
    if len(found) != 1:
        names = ", ".join(folder.relative_to(path).as_posix() for folder in found) or "none below it"
        raise DataError(f"{path}: holds no features.json (found: {names}); give the {RldsReader.WANTED}")
    return found[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ForeignFileError as error:
        raise DataError(f"{error}; {AGAIN}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: is no JSON object; {AGAIN}")
    return content


def _leaves(feature: Any, name: str, path: Path, in_steps: bool = False) -> Iterator[tuple[str, Key]]:
    """(name, what it holds) of every feature that is stored, from the JSON of `FeatureConnector.to_json`."""
    if not isinstance(feature, dict):
        raise DataError(f"{path}: {name or 'the top'} is {printable(repr(feature), 60)}; wanted an object; {AGAIN}")
    once = not in_steps
    if "featuresDict" in feature:
        for part, below in feature["featuresDict"].get("features", {}).items():
            yield from _leaves(below, f"{name}/{part}" if name else part, path, in_steps)
    elif "sequence" in feature and name == "steps" and not in_steps:
        yield from _leaves(feature["sequence"].get("feature"), name, path, True)
    elif "sequence" in feature:
        yield name, Key("not read: a sequence within a step", (), once)
    elif "image" in feature:
        image = feature["image"]
        depth = image.get("dtype", "uint8") != "uint8" or _shape(image)[-1:] == (1,)
        kind = "not read: depth, no colours" if depth else image.get("encodingFormat") or "image"
        yield name, Key(kind, (), once)
    elif "text" in feature or feature.get("pythonClassName", "").endswith(".Text"):
        yield name, Key("text", (), once)
    elif "tensor" in feature:
        tensor = feature["tensor"]
        dtype, shape = tensor.get("dtype", "?"), _shape(tensor)
        if tensor.get("encoding", "none") != "none" or None in shape:
            yield name, Key("not read: a tensor of encoded bytes or of unknown shape", shape, once)
        elif dtype == "string":
            yield name, Key("text" if not shape else "not read: several texts a step", (), once)
        else:
            yield name, Key(dtype, shape, once)
    else:
        kind = feature.get("pythonClassName", "?").rpartition(".")[2]
        yield name, Key(f"not read: a feature of the kind {printable(kind, 40)}", (), once)


def _shape(feature: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The shape of a tensor; None for a dimension that is not known before."""
    dimensions = feature.get("shape", {}).get("dimensions", [])
    return tuple(int(n) if str(n).isdecimal() and 0 < int(n) < 1 << 31 else None for n in dimensions)

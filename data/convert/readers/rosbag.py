"""ROS 1 and ROS 2 recordings: bags, rosbag2 folders (sqlite3, mcap) and mcap files alone; each is one episode.

    image_1: /cam_front/image_raw/compressed            a topic of images
    state: /joint_states#position{joint_1,gripper}      a field of a topic's messages; {names} in that order
    action: /command#data
    prompt: /task
    clock: /cam_front/image_raw/compressed              whose messages are the steps; without it, the topic of image_1
    max_age_s: 1.0                                      a message that is older does not count any more

Messages are as old as their header's stamp says, or their log time where there is no header. A step takes the newest
message of each topic that is not after it; steps before the first message of any topic are left out.
"""

from __future__ import annotations

import bisect
import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.convert.conversion import check_names
from data.convert.foreign_sources import file_in, reading
from data.convert.mapping import Mapping
from data.convert.readers.base import ROWS_PER_BLOCK, Block, Episode, Key, Reader, natural_order, optional_module
from utils.parquet_utils import DataError
from utils.text import printable

SUFFIXES = (".mcap", ".bag", ".db3")
MAX_AGE_S = 1.0
COMPRESSED, RAW = "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image"
TEXT = "std_msgs/msg/String"
TIME = "#time"  # key of the steps' own time stamps
_ENCODINGS = {"rgb8": (3, 1), "bgr8": (3, -1), "rgba8": (4, 1), "bgra8": (4, -1), "8UC3": (3, -1)}  # bytes, direction
_KEY = re.compile(r"(?P<topic>[^#]+)(?:#(?P<field>[\w.]+)(?:\{(?P<names>[^{}]+)\})?)?")
_NUMBER = re.compile(r"(float|double|u?int|bool)\d*")


@dataclass(frozen=True)
class _Wanted:
    """A key of a mapping: a topic, a field of its messages, and which of the named values."""

    topic: str
    field: str | None
    names: tuple[str, ...] = ()


class RosbagReader(Reader):
    """The recordings of a folder, or one of them."""

    OPTIONS = ("clock", "max_age_s")
    WANTED = "mcap file, ROS 1 bag or rosbag2 folder, or a folder of them"
    DESCRIPTION = "ROS bag"

    def __init__(self, path: Path, options: dict[str, Any], follow_links: bool = False) -> None:
        super().__init__(path, options, follow_links)
        self._clock = options.get("clock")
        age = options.get("max_age_s", MAX_AGE_S)
        if isinstance(age, bool) or not isinstance(age, int | float) or not age > 0:
            raise DataError(f"mapping: max_age_s is {age!r}; wanted seconds, more than 0 (.inf: any age)")
        self._max_age = float(age)

    def check_mapping(self, mapping: Mapping) -> None:
        if self._clock is None:
            self._clock = next(iter(mapping.cameras.values())).key

    def time_key(self) -> str | None:
        return TIME

    def episodes(self) -> list[Episode]:
        episodes = [Episode(str(path), self._files(path), path) for path in self._bags()]
        if not episodes:
            raise DataError(f"{self.path}: holds no {', '.join(SUFFIXES)}; wanted the {self.WANTED}")
        return episodes

    def _bags(self) -> list[Path]:
        """Files, and folders with a metadata.yaml."""
        if self.path.is_file() or (self.path / "metadata.yaml").is_file():
            return [self.path]
        found = []
        for path in sorted(self.path.rglob("*"), key=lambda path: natural_order(str(path))):
            if path.name == "metadata.yaml":
                found.append(path.parent)
            elif path.suffix in SUFFIXES and path.is_file() and not (path.parent / "metadata.yaml").is_file():
                if path.suffix == ".db3":
                    raise DataError(f"{path}: its folder has no metadata.yaml; run: ros2 bag reindex {path.parent}")
                found.append(path)
        return found

    def _files(self, bag: Path) -> tuple[Path, ...]:
        files = [bag] if bag.is_file() else sorted(p for p in bag.iterdir() if p.suffix in (*SUFFIXES, ".yaml"))
        for file in files:
            file_in(self.root, file.relative_to(self.root), self.follow_links)
        return tuple(files)

    def keys(self, episode: Episode) -> dict[str, Key]:
        with self._open(episode) as bag:
            found: dict[str, Key] = {}
            for connection in sorted(bag.connections, key=lambda connection: connection.topic):
                if connection.msgcount or connection.topic not in found:
                    found |= self._topic_keys(bag, connection)
            return found

    def plain_key(self, key: str) -> str:
        return key.partition("{")[0]

    def _topic_keys(self, bag: Any, connection: Any) -> dict[str, Key]:
        topic, kind = connection.topic, connection.msgtype
        if kind in (COMPRESSED, RAW):
            return {topic: Key("image" if kind == COMPRESSED else "uint8", () if kind == COMPRESSED else (0, 0, 3))}
        if kind == TEXT:
            return {topic: Key("text")}
        if not connection.msgcount:
            return {f"{topic} (no messages)": Key("not read: a topic without messages")}
        with reading(Path(bag.paths[0])):
            _, _, raw = next(bag.messages([connection]))
            message = bag.deserialize(raw, kind)
        keys = {}
        for field, value in _fields(message, ""):
            names = getattr(message, "name", None)
            named = (
                f" of {', '.join(map(str, names))}" if isinstance(names, list) and np.size(value) == len(names) else ""
            )
            keys[f"{topic}#{field}"] = Key(f"number{named}", np.shape(value) or (1,))
        return keys or {topic: Key(f"not read: messages of the type {printable(kind, 60)}")}

    def blocks(self, episode: Episode, keys: Sequence[str]) -> Iterator[Block]:
        wanted = {key: _parse(key) for key in keys if key != TIME}
        with self._open(episode) as bag, reading(episode.files[0]):
            topics = {want.topic: None for want in wanted.values()}
            clock = _parse(self._clock).topic
            kinds = self._kinds(bag, [*topics, clock], episode)
            stamps, values = self._first_pass(bag, kinds, wanted)
            steps = self._steps(stamps, clock, kinds, episode)
            images = [topic for topic in topics if kinds[topic] in (COMPRESSED, RAW)]
            frames = self._frames(bag, images, kinds, stamps, steps)
            for begin in range(0, len(steps), ROWS_PER_BLOCK):
                rows = steps[begin : begin + ROWS_PER_BLOCK]
                block: Block = {TIME: np.array([(time - steps[0][0]) / 1e9 for time, _ in rows])}
                pictures = [next(frames) for _ in rows] if images else []
                for key, want in wanted.items():
                    if want.topic in images:
                        block[key] = _stacked([row[want.topic] for row in pictures])
                    else:
                        chosen = [values[key][found[want.topic]] for _, found in rows]
                        block[key] = chosen if isinstance(chosen[0], str) else self._matrix(chosen, key, episode)
                yield block

    def values(self, episode: Episode, key: str) -> Iterator[np.ndarray | list[Any]]:
        """Every message of a topic, also before the first frame and after the last."""
        want = _parse(key)
        with self._open(episode) as bag, reading(episode.files[0]):
            kinds = self._kinds(bag, [want.topic], episode)
            found = self._first_pass(bag, kinds, {key: want})[1][key]
        yield found if isinstance(found[0], str) else self._matrix(found, key, episode)

    def _open(self, episode: Episode) -> Any:
        return _bag(episode.place)

    def _kinds(self, bag: Any, topics: Sequence[str], episode: Episode) -> dict[str, str]:
        """topic -> message type."""
        found = {connection.topic: connection.msgtype for connection in bag.connections if connection.msgcount}
        empty = {connection.topic for connection in bag.connections} - found.keys()
        for topic in topics:
            if topic in empty:
                raise DataError(
                    f"{episode.name}: topic {topic} has no messages; record that episode again, or leave it out"
                )
        check_names(topics, list(found), "topic", episode.name)
        return {topic: found[topic] for topic in topics}

    def _first_pass(
        self, bag: Any, kinds: dict[str, str], wanted: dict[str, _Wanted]
    ) -> tuple[dict[str, tuple[list[int], list[int]]], dict[str, list[Any]]]:
        """(topic -> ascending stamps and the message that each belongs to, key -> the value of each message)."""
        stamps: dict[str, list[int]] = {topic: [] for topic in kinds}
        values: dict[str, list[Any]] = {
            key: [] for key, want in wanted.items() if kinds[want.topic] not in (COMPRESSED, RAW)
        }
        by_topic: dict[str, list[str]] = {}
        for key in values:
            by_topic.setdefault(wanted[key].topic, []).append(key)
        for connection, log_time, raw in bag.messages([c for c in bag.connections if c.topic in kinds]):
            topic = connection.topic
            if topic in by_topic:
                message = bag.deserialize(raw, connection.msgtype)
                stamp = getattr(getattr(message, "header", None), "stamp", None)
                stamps[topic].append(log_time if stamp is None else stamp.sec * 10**9 + stamp.nanosec)
                for key in by_topic[topic]:
                    values[key].append(_value(message, wanted[key], connection.msgtype, bag.paths[0]))
            else:
                stamps[topic].append(_header_stamp(bytes(raw[:16]), bag.is2))
        order = {topic: sorted(range(len(times)), key=times.__getitem__) for topic, times in stamps.items()}
        return {topic: ([stamps[topic][i] for i in order[topic]], order[topic]) for topic in stamps}, values

    def _steps(
        self, stamps: dict[str, tuple[list[int], list[int]]], clock: str, kinds: dict[str, str], episode: Episode
    ) -> list[tuple[int, dict[str, int]]]:
        """Of each step its time in ns, and of each topic the message that counts then."""
        steps: list[tuple[int, dict[str, int]]] = []
        for time in stamps[clock][0]:
            found = {}
            for topic, (times, order) in stamps.items():
                place = bisect.bisect_right(times, time) - 1
                if place < 0:
                    break  # before the first message of that topic
                age = (time - times[place]) / 1e9
                if age > self._max_age and kinds[topic] != TEXT:
                    raise DataError(
                        f"{episode.name}: {topic} stops: at step {len(steps)} its newest message is {age:.2f} s old, "
                        f"{self._max_age:g} are allowed; leave that episode out (--episodes), or raise max_age_s"
                    )
                found[topic] = order[place]
            else:
                steps.append((time, found))
        if not steps:
            raise DataError(
                f"{episode.name}: no frame of {clock} comes after the first message of every topic; no steps"
            )
        return steps

    def _frames(
        self, bag: Any, topics: list[str], kinds: dict[str, str], stamps: Any, steps: Any
    ) -> Iterator[dict[str, Any]]:
        """Of each step the image of every camera; those are held that a step still to come needs."""
        last_use: dict[tuple[str, int], int] = {}
        for number, (_, found) in enumerate(steps):
            for topic in topics:
                last_use[topic, found[topic]] = number
        counts, held, number = dict.fromkeys(topics, 0), {}, 0
        messages = bag.messages([c for c in bag.connections if c.topic in topics])
        for connection, _, raw in messages:
            place = (connection.topic, counts[connection.topic])
            counts[connection.topic] += 1
            if place in last_use:
                held[place] = _image(bag.deserialize(raw, connection.msgtype), connection, bag.paths[0])
            while number < len(steps) and all((topic, steps[number][1][topic]) in held for topic in topics):
                yield {topic: held[topic, steps[number][1][topic]] for topic in topics}
                held = {key: value for key, value in held.items() if last_use[key] > number}
                number += 1

    def _matrix(self, rows: list[np.ndarray], key: str, episode: Episode) -> np.ndarray:
        widths = {len(row) for row in rows}
        if len(widths) > 1:
            raise DataError(
                f"{episode.name}: {key} has {min(widths)} values in some messages and {max(widths)} in others"
            )
        return np.stack(rows)


@contextlib.contextmanager
def _bag(path: Path) -> Iterator[Any]:
    highlevel = optional_module("rosbags.highlevel", path)
    typesys = optional_module("rosbags.typesys", path)
    try:
        reader = highlevel.AnyReader([path], default_typestore=typesys.get_typestore(typesys.Stores.ROS2_HUMBLE))
        reader.open()
    except (highlevel.AnyReaderError, *_faults()) as error:
        raise DataError(
            f"{path}: not a readable ROS recording ({printable(error)}); record or fetch it again"
        ) from None
    try:
        formats = {getattr(c.ext, "serialization_format", "cdr") for c in reader.connections} - {"cdr", "ros1"}
        if formats:
            raise DataError(
                f"{path}: messages are in {', '.join(sorted(map(printable, formats)))}; only ROS's (cdr) are read"
            )
        yield reader
    except (highlevel.AnyReaderError, optional_module("rosbags.serde", path).SerdeError) as error:
        raise DataError(f"{path}: can't be read ({printable(error)}); the file is damaged: record it again") from None
    finally:
        reader.close()


def _faults() -> tuple[type[Exception], ...]:
    return (OSError, ValueError, KeyError, IndexError, AssertionError, TypeError, RuntimeError)


def _parse(key: str) -> _Wanted:
    match = _KEY.fullmatch(key)
    if not match:
        raise DataError(f"mapping: {key!r} is no topic; wanted /topic, /topic#field or /topic#field{{name,name}}")
    names = tuple(name.strip() for name in match["names"].split(",")) if match["names"] else ()
    return _Wanted(match["topic"], match["field"], names)


def _fields(message: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of every field of numbers."""
    for name, value in vars(message).items():
        if name.startswith("__") or name == "header":
            continue
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.size:
            yield f"{prefix}{name}", value
        elif isinstance(value, bool | int | float):
            yield f"{prefix}{name}", value
        elif hasattr(value, "__msgtype__"):
            yield from _fields(value, f"{prefix}{name}.")


def _value(message: Any, want: _Wanted, kind: str, path: Path) -> Any:
    """The text of a String, or the numbers of a field, those of `names` in their order."""
    if kind == TEXT and want.field in (None, "data"):
        return message.data
    value = message
    for name in (want.field or "data").split("."):
        value = getattr(value, name, None)
    if value is None or not isinstance(value, np.ndarray | bool | int | float):
        raise DataError(f"{path}: {want.topic} has no numbers {want.field!r} ({kind}); --inspect lists what there is")
    values = np.atleast_1d(np.asarray(value))
    if not want.names:
        return values
    found = list(getattr(message, "name", []))
    missing = [name for name in want.names if name not in found]
    if missing or len(found) != len(values):
        raise DataError(
            f"{path}: {want.topic} has no value named {missing[0] if missing else '(names and values differ)'!r} in "
            f"{want.field} (found: {', '.join(map(str, found)) or 'no names'})"
        )
    return values[[found.index(name) for name in want.names]]


def _header_stamp(raw: bytes, is2: bool) -> int:
    """The stamp of a message that begins with a header, in ns: ROS 2 behind 4 bytes of CDR, ROS 1 behind its number."""
    order = "big" if is2 and raw[1] == 0 else "little"
    return int.from_bytes(raw[4:8], order) * 10**9 + int.from_bytes(raw[8:12], order)


def _image(message: Any, connection: Any, path: Path) -> bytes | np.ndarray:
    """A compressed image's bytes, or a raw one's pixels in RGB."""
    if connection.msgtype == COMPRESSED:
        return message.data.tobytes()
    size, direction = _ENCODINGS.get(message.encoding, (0, 1))
    if not size:
        kind = printable(message.encoding, 40)
        raise DataError(f"{path}: {connection.topic} has images in {kind}; wanted {', '.join(_ENCODINGS)}")
    height, width, step = message.height, message.width, message.step
    if not height or not width or step < width * size or len(message.data) < height * step:
        raise DataError(f"{path}: {connection.topic} has an image of {len(message.data)} bytes for {height} x {width}")
    rows = message.data[: height * step].reshape(height, step)[:, : width * size]
    return np.ascontiguousarray(rows.reshape(height, width, size)[:, :, :3][..., ::direction])


def _stacked(images: list[Any]) -> np.ndarray | list[Any]:
    return images if isinstance(images[0], bytes) else np.stack(images)

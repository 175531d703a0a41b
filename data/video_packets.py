"""Frames of video at random, from packets that lie undecoded in the episode cache.

`packets.bin` holds the packets of all videos, one after the other in the order of decoding. An index says of each where
it lies, when its frame is shown, and at which packet decoding has to begin. A reader feeds a codec from there on and
takes the frame of that time, which is bit for bit the frame that decoding the whole file gives (tested for H.264, HEVC,
AV1 and VP9). Files and decoders are not kept open: there is one codec context for each kind of stream, made in the
process that uses it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import mmap
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from data.convert.video import COLOUR_TAGS, VideoReader, no_frame
from data.decoding import ObservationError
from utils.parquet_utils import DataError

logger = logging.getLogger(__name__)

CONTENT = "packets.bin"
INDEX = ("packet_offsets", "packet_starts", "packet_times", "packet_streams", "packet_checksums")
NO_TIME = np.iinfo(np.int64).min
MANY_PACKETS = 10.0  # decoded for one frame, from which frames of JPEG are the better choice
MAX_CODECS = 8  # contexts that a process keeps; more only where files differ in size or encoder


@dataclass(frozen=True)
class VideoFrames:
    """The frames of one video file in the order in which they are shown."""

    path: Path
    seconds: np.ndarray  # float64 (frames,), ascending
    packets: np.ndarray  # int64 (frames,), numbers of their packets

    def find(self, times: Iterable[tuple[float, float]], where: str, begin: int) -> np.ndarray:
        """The packets of points in time, int64 (N,).

        Args:
            times: (seconds into the file, tolerance) of each row.
            where, begin: the episode, and its step that the first row is, for messages.

        Raises:
            DataError: no frame is that near.
        """
        seconds, tolerance = np.array(list(times), dtype=np.float64).reshape(-1, 2).T
        first = self.seconds.searchsorted(seconds - tolerance)
        shown = np.append(self.seconds, np.inf)[first]
        late = np.flatnonzero(shown > seconds + tolerance)
        if len(late):
            row = int(late[0])
            following = float(shown[row]) if np.isfinite(shown[row]) else None
            place = f"{where} {begin + row}"
            raise no_frame(place, self.path, float(seconds[row]), float(tolerance[row]), following)
        return self.packets[first]


class PacketWriter:
    """Copies the packets of videos into a folder, and what a `PacketReader` needs of them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, (folder / CONTENT).open("wb")
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in INDEX[1:]}
        self._sizes: list[int] = []
        self._streams: dict[str, int] = {}  # decoder settings as JSON -> number
        self._videos: dict[Path, VideoFrames] = {}
        self._count = 0

    def add(self, path: Path) -> VideoFrames:
        """Copy the packets of a file, once.

        Raises:
            DataError: it is missing, damaged, or holds no frames of colour.
        """
        if path not in self._videos:
            self._videos[path] = self._copy(path)
        return self._videos[path]

    def _copy(self, path: Path) -> VideoFrames:
        with contextlib.closing(VideoReader(path)) as reader:
            settings = reader.decoder_settings()
        times, sizes, checksums, is_key, is_shown = [], [], [], [], []
        with contextlib.closing(VideoReader(path)) as reader:
            for packet in reader.packets():
                if packet.is_corrupt:
                    raise DataError(f"{path}: packet {len(times)} is damaged or cut short; fetch the file again")
                content = bytes(packet)
                self._file.write(content)
                times.append(NO_TIME if packet.pts is None else packet.pts)
                sizes.append(len(content))
                checksums.append(zlib.crc32(content))
                is_key.append(packet.is_keyframe)
                is_shown.append(packet.pts is not None and not packet.is_discard)
        when = np.array(times, dtype=np.int64)
        shown = np.flatnonzero(is_shown)
        shown = shown[np.argsort(when[shown], kind="stable")]
        number = self._streams.setdefault(json.dumps(settings, sort_keys=True), len(self._streams))
        streams = np.full(len(when), number, dtype=np.int32)
        starts = decoding_starts(when, is_key) + self._count
        for name, values in zip(INDEX[1:], (starts, when, streams, np.array(checksums, np.uint32)), strict=True):
            self._parts[name].append(values)
        self._sizes += sizes
        numerator, denominator = settings["time_base"]
        frames = VideoFrames(path, when[shown] * numerator / denominator, shown + self._count)
        self._count += len(when)
        return frames

    def close(self) -> dict[str, Any]:
        """Write the index; what a `PacketReader` is given besides the folder, as JSON-able values."""
        size = self._file.tell()
        self._file.close()
        arrays = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        arrays["packet_offsets"] = np.concatenate([[0], np.cumsum(self._sizes)])
        for name in INDEX:
            np.save(self._folder / f"{name}.npy", arrays[name])
        return {"bytes": size, "streams": [json.loads(text) for text in self._streams]}


def decoding_starts(times: np.ndarray, is_key: Sequence[bool]) -> np.ndarray:
    """At which packet decoding has to begin, for each packet's frame: the last key frame before that is shown no later.

    A frame that is decoded after a key frame but shown before it (a leading picture of an open group) refers to frames
    before that key frame.

    Args:
        times: int64 (N,), when the packets' frames are shown.
        is_key: (N,).

    Returns:
        int64 (N,), at most the packet itself; the first packet where there is no such key frame.
    """
    starts = np.zeros(len(times), dtype=np.int64)
    keys: list[int] = []
    for i, (time, key) in enumerate(zip(times.tolist(), is_key, strict=True)):
        if key:
            keys.append(i)
        starts[i] = next((k for k in reversed(keys) if times[k] <= time or time == NO_TIME), 0)
    return starts


class PacketReader:
    """Decodes frames of a folder that a `PacketWriter` filled; maps its packets, so that processes share them."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """
        Args:
            folder: with the packets and their index.
            facts: what the writer's `close` gave.

        Raises:
            OSError, ValueError: a file is not there, or not whole.
        """
        self._offsets, self._starts, self._times, self._streams, self._checksums = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in INDEX
        )
        with (folder / CONTENT).open("rb") as file:
            if os.fstat(file.fileno()).st_size != facts["bytes"]:
                raise ValueError(f"{CONTENT} is cut off")
            self._content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._settings = facts["streams"]
        # Shared with the loader workers that are forked from here, so that each packet is checked once for all.
        self._verified = np.frombuffer(mmap.mmap(-1, max(1, len(self._times))), np.bool_)
        self._codecs: dict[int, av.VideoCodecContext] = {}
        self._process, self._reformatter = os.getpid(), VideoReformatter()

    def packets_per_frame(self, packets: np.ndarray) -> float:
        """How many packets are decoded for one of these frames, on average."""
        return float((packets - self._starts[packets] + 1).mean()) if len(packets) else 0.0

    def damaged(self, packets: Iterable[int]) -> int | None:
        """The first packet needed for some frames that is not as it was written; each is looked at once."""
        for last in packets:
            for packet in range(int(self._starts[last]), last + 1):
                if not self._verified[packet]:
                    if zlib.crc32(self._bytes(packet)) != self._checksums[packet]:
                        return packet
                    self._verified[packet] = True
        return None

    def frames(self, packets: Sequence[int]) -> list[np.ndarray]:
        """The frames of some packets; those of one group are decoded in one go.

        Returns:
            uint8 (H, W, 3) each, RGB, as `VideoReader.frame_at` gives them.

        Raises:
            ObservationError: a packet can't be decoded.
        """
        groups: dict[int, set[int]] = defaultdict(set)
        for packet in packets:
            groups[int(self._starts[packet])].add(packet)
        found: dict[int, np.ndarray] = {}
        for start, group in groups.items():
            found |= self._decode(start, group)
        return [found[packet] for packet in packets]

    def _bytes(self, packet: int) -> memoryview:
        return self._content[self._offsets[packet] : self._offsets[packet + 1]]

    def _decode(self, start: int, wanted: set[int]) -> dict[int, np.ndarray]:
        stream = int(self._streams[start])
        codec, quarters = self._codec(stream), self._settings[stream]["quarters"]
        missing = {int(self._times[packet]): packet for packet in wanted}
        found: dict[int, np.ndarray] = {}
        try:
            for frame in self._feed(codec, start, max(wanted)):
                packet = missing.pop(frame.pts, None)
                if packet is None:
                    continue
                if frame.is_corrupt:
                    raise ObservationError("its video is damaged there")
                pixels = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                found[packet] = np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels
                if not missing:
                    return found
        except av.FFmpegError as error:
            raise ObservationError(f"its video can't be decoded there ({error.strerror})") from None
        raise ObservationError("its video can't be decoded there (no frame of that time)")

    def _feed(self, codec: av.VideoCodecContext, start: int, last: int) -> Iterable[av.VideoFrame]:
        """The frames that come out as packets go in, and those that the decoder holds back to the end."""
        for number in range(start, last + 1):
            packet = av.Packet(self._bytes(number))
            time = int(self._times[number])
            packet.pts = None if time == NO_TIME else time
            yield from codec.decode(packet)
        yield from codec.decode(None)

    def _codec(self, stream: int) -> av.VideoCodecContext:
        """A decoder at its beginning; a forked process makes its own."""
        if self._process != os.getpid():
            self._process, self._reformatter, self._codecs = os.getpid(), VideoReformatter(), {}
        codec = self._codecs.pop(stream, None)
        if codec is None:
            if len(self._codecs) >= MAX_CODECS:
                del self._codecs[next(iter(self._codecs))]
            codec = _new_codec(self._settings[stream])
        else:
            codec.flush_buffers()
        self._codecs[stream] = codec  # the last one that was used comes last
        return codec


def _new_codec(settings: dict[str, Any]) -> av.VideoCodecContext:
    codec = av.CodecContext.create(settings["codec"], "r")
    codec.extradata = base64.b64decode(settings["extradata"])
    codec.width, codec.height = settings["width"], settings["height"]
    for name in COLOUR_TAGS:
        setattr(codec, name, settings[name])
    codec.thread_count = 1
    codec.open()
    return codec

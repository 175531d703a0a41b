"""Video files as exact frames, and frames as video files, with PyAV.

Frames are found by their time stamp. A file is decoded forward; a jump backwards or far ahead goes to the key frame
before. One thread decodes and encodes, so memory does not grow with the video, and results do not depend on the
machine.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.codec
import numpy as np

from data.convert.foreign_sources import video_container
from utils.parquet_utils import DataError

ONE_FILE = {"protocol_whitelist": "file"}  # for a demuxer: no network, whatever the file says
MAX_FORWARD = 2.0  # seconds ahead that are decoded through; beyond, the reader jumps to a key frame
COLOUR_TAGS = ("colorspace", "color_range", "color_primaries", "color_trc")
ENCODERS = {"av1": "libsvtav1", "h264": "libx264"}
DEFAULT_CRF = {"av1": 30, "h264": 23}


class VideoReader:
    """Frames of one video file by time; fastest when times ascend."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            DataError: it is missing, damaged or holds no video.
        """
        self.path = path
        if not path.is_file():
            raise DataError(f"{path}: no such video file; the source is incomplete, so fetch that file again")
        try:
            self._container = av.open(f"file:{path}", format=video_container(path), options=ONE_FILE)
        except av.FFmpegError as error:
            raise DataError(f"{path}: not a readable video file ({error.strerror}); fetch it again") from None
        if not self._container.streams.video:
            self._container.close()
            raise DataError(f"{path}: holds no video stream; fetch or record it again")
        self._stream = self._container.streams.video[0]
        pixel_format = self._stream.codec_context.format
        if pixel_format is not None and len(pixel_format.components) == 1 and pixel_format.components[0].bits > 8:
            self._container.close()
            raise DataError(f"{path}: frames are {pixel_format.name}, depth and not colour; choose another camera")
        self._stream.codec_context.thread_count = 1
        self._frame: av.VideoFrame | None = None  # the first at or after `_begin`
        self._begin = float("inf")

    @property
    def num_frames(self) -> int:
        """Frames that the container announces; 0 where it does not say."""
        return self._stream.frames

    def close(self) -> None:
        """Release the file."""
        self._container.close()

    def packets(self) -> Iterator[av.Packet]:
        """Every packet in the order of decoding, not decoded; of a file of which nothing was read before.

        Raises:
            DataError: the file is damaged.
        """
        try:
            yield from (packet for packet in self._container.demux(self._stream) if packet.size)
        except av.FFmpegError as error:
            raise DataError(f"{self.path}: can't be read to its end ({error.strerror}); fetch it again") from None

    def decoder_settings(self) -> dict[str, Any]:
        """What a decoder of this file's packets is made with (see `data/video_packets.py`), as JSON-able values.

        Raises:
            DataError: no frame can be decoded, or frames are turned by something else than quarters.
        """
        try:
            frame = next(self._container.decode(self._stream), None)
        except av.FFmpegError:
            frame = None
        if frame is None:
            raise DataError(f"{self.path}: its first frame can't be decoded; the file is damaged, so fetch it again")
        codec = self._stream.codec_context
        tags = {name: int(getattr(codec, name)) for name in COLOUR_TAGS}
        return {
            "codec": codec.codec.name,
            "extradata": base64.b64encode(codec.extradata or b"").decode(),
            "width": codec.width,
            "height": codec.height,
            "time_base": [self._stream.time_base.numerator, self._stream.time_base.denominator],
            "quarters": self._quarters(frame),
            **tags,
        }

    def frame_at(self, seconds: float, tolerance: float, where: str) -> np.ndarray:
        """The frame of a point in time.

        Args:
            seconds: since the file's start.
            tolerance: seconds by which the frame's own time may differ.
            where: what the frame is for, for error messages.

        Returns:
            uint8 (H, W, 3) RGB, converted from YUV as the stream's colour tags say, and turned as its display matrix
            says, as players show it.

        Raises:
            DataError: no frame is that near, or the stream is damaged there.
        """
        try:
            frame = self._find(seconds - tolerance)
        except av.FFmpegError as error:
            raise DataError(
                f"{where}: {self.path} can't be decoded at {seconds:.4f} s ({error.strerror}); the file is damaged or "
                "cut short, so fetch it again"
            ) from None
        if frame is None or frame.time > seconds + tolerance:
            raise no_frame(where, self.path, seconds, tolerance, None if frame is None else frame.time)
        if frame.is_corrupt:
            raise DataError(f"{where}: {self.path} is damaged at {seconds:.4f} s; fetch it again")
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), self._quarters(frame)))

    def _quarters(self, frame: av.VideoFrame) -> int:
        """Quarters of a turn, against the clock, by which a frame is shown turned."""
        quarters, rest = divmod(frame.rotation, 90)
        if rest:
            raise DataError(f"{self.path}: frames are turned by {frame.rotation} degrees; wanted a multiple of 90")
        return int(quarters)

    def _find(self, begin: float) -> av.VideoFrame | None:
        """The first frame at or after `begin`; None past the end."""
        if begin < self._begin or (self._frame is not None and begin - self._frame.time > MAX_FORWARD):
            self._jump(begin)
        while self._frame is not None and self._frame.time < begin:
            self._advance()
        self._begin = begin
        return self._frame

    def _jump(self, begin: float) -> None:
        """Go to a key frame at or before `begin`, or to the first frame of all."""
        for back in (0.0, 1.0, 10.0, begin):  # a file's index may point at a key frame that is shown later
            target = max(0, int((begin - back) / self._stream.time_base))
            self._container.seek(target, stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)
            self._advance()
            if target == 0 or (self._frame is not None and self._frame.time <= begin):
                return

    def _advance(self) -> None:
        self._frame = next((frame for frame in self._frames if frame.pts is not None), None)


def no_frame(where: str, path: Path, seconds: float, tolerance: float, following: float | None) -> DataError:
    """The error for a row without a frame of its time; `following` is the time of the next frame, None past the end."""
    reason = "it ends before" if following is None else f"the next one is at {following:.4f} s"
    return DataError(
        f"{where}: {path} has no frame within {tolerance:.2g} s of {seconds:.4f} s ({reason}); the video does not fit "
        "the rows, so fetch it again, or raise --tolerance_s if its clock is only imprecise"
    )


@dataclass(frozen=True)
class VideoEncoding:
    """How frames are stored as video: codec, constant rate factor, and a key frame every second frame.

    The key frames are as dense as in lerobot's own recordings (lerobot, configs/video.py), so that single frames can
    be read at random without decoding many others. AV1's preset is 8 where lerobot takes 12, which the encoder warns
    of: measured on small moving objects, the worst frame gains 3 dB for half the speed.
    """

    codec: str  # a key of ENCODERS
    crf: int  # lower is better and larger
    gop: int = 2
    preset: int | str = 8

    @classmethod
    def choose(cls, codec: str | None, crf: int | None) -> VideoEncoding:
        """An encoder for `codec`; None: AV1, or H.264 where PyAV was built without an AV1 encoder.

        Raises:
            DataError: PyAV has no encoder for `codec`, or for either.
        """
        present = [name for name, encoder in ENCODERS.items() if _has_encoder(encoder)]
        if not present or codec not in (None, *present):
            raise DataError(
                f"this PyAV has no encoder for {codec or 'av1 or h264'} (found: {', '.join(present) or 'none'}); "
                "install the av package from PyPI"
            )
        codec = codec or present[0]
        return cls(codec, DEFAULT_CRF[codec] if crf is None else crf, preset=8 if codec == "av1" else "medium")

    def options(self) -> dict[str, str]:
        """What the encoder is given; one thread, so that results do not depend on the machine."""
        options = {"g": str(self.gop), "crf": str(self.crf), "preset": str(self.preset)}
        return options | ({"svtav1-params": "lp=1"} if self.codec == "av1" else {"bf": "0", "threads": "1"})


def _has_encoder(name: str) -> bool:
    try:
        av.codec.Codec(name, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def encode_video(path: Path, frames: Iterable[np.ndarray], fps: float, encoding: VideoEncoding) -> None:
    """Write uint8 (H, W, 3) RGB frames as an mp4 file of constant rate, yuv420p.

    Raises:
        DataError: width or height is odd, which yuv420p can't store.
    """
    os.environ.setdefault("SVT_LOG", "1")  # errors only
    with av.open(str(path), "w") as container:
        stream = container.add_stream(ENCODERS[encoding.codec], as_rate(fps), options=encoding.options())
        stream.pix_fmt = "yuv420p"
        for i, image in enumerate(frames):
            if i == 0:
                stream.height, stream.width = image.shape[:2]
                if stream.height % 2 or stream.width % 2:
                    raise DataError(
                        f"frames of {stream.width}x{stream.height} can't be stored as video, which needs even numbers; "
                        "leave out --video"
                    )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


class VideoJoiner:
    """Joins videos of the same encoding into one mp4 file without encoding them again."""

    def __init__(self, path: Path, fps: float) -> None:
        """Begin an empty file at `path`."""
        self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        self._stream: av.VideoStream | None = None
        self._rate = as_rate(fps)
        self.num_frames = 0
        self.size = 0  # bytes of the videos so far

    def append(self, path: Path) -> None:
        """Append the frames of one video."""
        with av.open(str(path)) as source:
            video = source.streams.video[0]
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(video, opaque=True)
                self._stream.time_base = video.time_base
            offset = int(self.num_frames / self._rate / video.time_base)
            for packet in source.demux(video):
                if packet.dts is None:  # the empty packet at the end
                    continue
                packet.pts += offset
                packet.dts += offset
                packet.stream = self._stream
                self._container.mux(packet)
                self.num_frames += 1
        self.size += path.stat().st_size

    def close(self) -> None:
        """Complete the file."""
        self._container.close()


def as_rate(fps: float) -> Fraction:
    """Frames per second as the fraction that containers store."""
    return Fraction(fps).limit_denominator(1001)


def video_info(path: Path, encoding: VideoEncoding) -> dict[str, Any]:
    """What LeRobot v3.0's info.json says of a video feature (lerobot, datasets/video_utils.py, get_video_info)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return {
            "video.height": stream.height,
            "video.width": stream.width,
            "video.codec": stream.codec.canonical_name,
            "video.pix_fmt": stream.pix_fmt,
            "video.fps": int(stream.base_rate),
            "video.channels": 3,
            "has_audio": bool(container.streams.audio),
            "video.g": encoding.gop,
            "video.crf": encoding.crf,
            "video.preset": encoding.preset,
            "video.fast_decode": 0,
            "video.video_backend": "pyav",
            "video.extra_options": {},
            "is_depth_map": False,
        }

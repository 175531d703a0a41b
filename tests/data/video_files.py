"""Small videos of every codec, and what decoding them from the beginning gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from data.convert.video import VideoReader

os.environ.setdefault("SVT_LOG", "1")  # errors only
SIZE, FPS = 64, 20


class Encoding(NamedTuple):
    """How to make a video: an encoder of PyAV, a container, and the encoder's options for key frames every `gop`."""

    encoder: str
    container: str
    options: str  # with {gop}


ENCODINGS = {
    "h264": Encoding("libx264", "mp4", "g={gop} bf=0"),
    "h264_b_frames": Encoding("libx264", "mp4", "g={gop} bf=3"),
    "h264_open": Encoding("libx264", "mp4", "g={gop} bf=3 x264-params=open-gop=1"),
    "hevc": Encoding("libx265", "mp4", "x265-params=log-level=none:keyint={gop}:min-keyint={gop}:open-gop=0:bframes=4"),
    "hevc_open": Encoding(
        "libx265", "mp4", "x265-params=log-level=none:keyint={gop}:min-keyint={gop}:open-gop=1:bframes=4"
    ),
    "av1": Encoding("libsvtav1", "mp4", "g={gop} preset=10 svtav1-params=lp=1"),
    "av1_open": Encoding("libsvtav1", "mkv", "g={gop} preset=8 svtav1-params=lp=1:irefresh-type=1"),
    "vp9": Encoding("libvpx-vp9", "webm", "g={gop} deadline=realtime cpu-used=8"),
    "vp9_alt_ref": Encoding("libvpx-vp9", "mp4", "g={gop} auto-alt-ref=1 lag-in-frames=16 cpu-used=5"),
}
CODECS = {"h264": "h264", "hevc": "hevc", "av1": "libdav1d", "vp9": "vp9"}  # decoders that they need


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Noise with a square that moves, so that no two frames are alike; uint8 (SIZE, SIZE, 3)."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
    result = []
    for i in range(count):
        frame = ground + rng.integers(0, 12, ground.shape, dtype=np.uint8)
        x = (i * 5) % (SIZE - 20)
        frame[10:30, x : x + 20] = (220, (i * 37) % 256, 40)
        result.append(frame)
    return result


def encode(folder: Path, name: str, gop: int, count: int = 40, **stream_settings: int) -> Path:
    """A video of `count` pictures in one of ENCODINGS."""
    encoding = ENCODINGS[name]
    path = folder / f"{name}_{gop}.{encoding.container}"
    options = dict(part.split("=", 1) for part in encoding.options.format(gop=gop).split())
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoding.encoder, FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for key, value in stream_settings.items():
            setattr(stream.codec_context, key, value)
        for picture in pictures(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def decoded(path: Path, count: int = 40) -> list[np.ndarray]:
    """Every frame, decoded one after the other, as the converter does."""
    reader = VideoReader(path)
    frames = [reader.frame_at(i / FPS, 1e-3, "frame") for i in range(count)]
    reader.close()
    return frames

"""Images of episodes on their way into a LeRobot dataset: checked, measured and perhaps encoded in one pass."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from data.convert.episode_reader import Episode, Span, read_images
from data.convert.lerobot_files import ROWS_PER_BLOCK
from data.convert.lerobot_stats import count_pixels, sampled_frames
from data.convert.video import VideoEncoding, encode_video
from data.decoding import upright
from utils.encoded_images import RECORDED_FORMATS
from utils.parquet_utils import DataError


@dataclass(frozen=True)
class Frames:
    """The images of one camera in an episode, measured in one pass."""

    shape: tuple[int, int, int]  # height, width, 3
    counts: np.ndarray  # see count_pixels
    num_sampled: int
    video: Path | None  # a temporary file; None: stays as images


def measure_images(
    scratch: Path,
    cameras: Mapping[str, str],
    fps: float,
    encoding: VideoEncoding | None,
    job: tuple[int, int, tuple[Span, ...]],
) -> dict[str, Frames]:
    """Check, measure and perhaps encode an episode's images; feature -> its images, measured.

    Args:
        scratch: folder for videos.
        cameras: image column -> feature.
        fps: frames per second of a video.
        encoding: of videos; None: the images stay as they are.
        job: the episode's number, its length, and where its rows are.

    Raises:
        DataError: an image that can't be decoded, is no RGB, or is of another size than the episode's first.
    """
    index, length, spans = job
    measured = {}
    for number, (camera, feature) in enumerate(cameras.items()):
        pixels = _Pixels(spans, camera, set(sampled_frames(length)), decode_all=encoding is not None)
        video = scratch / f"{index:06d}_{number}.mp4" if encoding else None
        if video:
            encode_video(video, pixels, fps, encoding)
        else:
            for _ in pixels:
                pass
        measured[feature] = Frames(pixels.shape, pixels.counts, len(pixels.sampled), video)
    return measured


class _Pixels:
    """Iterates over decoded frames, uint8 (H, W, 3), and measures them in passing."""

    def __init__(self, spans: Sequence[Span], camera: str, sampled: set[int], *, decode_all: bool) -> None:
        self._spans, self._camera, self._decode_all, self.sampled = spans, camera, decode_all, sampled
        self.counts = np.zeros((3, 256), np.int64)
        self.shape = (0, 0, 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        for i, data in enumerate(read_images(self._spans, self._camera)):
            where = f"{self._spans[0].path} row {self._spans[0].begin} (first of the episode) + {i}: {self._camera}"
            try:
                with Image.open(io.BytesIO(data), formats=RECORDED_FORMATS) as image:
                    turned = upright(image)
                    shape, mode = (turned.height, turned.width, 3), turned.mode
                    if mode == "RGB" and (self._decode_all or i in self.sampled):
                        pixels = np.asarray(turned)
            except OSError as error:
                raise DataError(f"{where} can't be decoded ({error}); drop or mend that episode") from None
            if mode != "RGB" or (i and shape != self.shape):
                raise DataError(
                    f"{where} is {mode} of {shape[1]}x{shape[0]}; wanted RGB of one size for all frames of a camera"
                )
            self.shape = shape
            if i in self.sampled:
                self.counts += count_pixels(pixels)
            if self._decode_all:
                yield pixels


def image_blocks(episode: Episode, camera: str) -> Iterator[pa.StructArray]:
    """One camera's frames as the datasets library embeds them: their bytes, and the name that a file would have."""
    images = enumerate(read_images(episode.spans, camera))
    while block := list(itertools.islice(images, ROWS_PER_BLOCK)):
        suffix = "png" if block[0][1].startswith(b"\x89PNG") else "jpg"
        paths = [f"frame-{i:06d}.{suffix}" for i, _ in block]
        fields = [pa.array([image for _, image in block], pa.binary()), pa.array(paths, pa.string())]
        yield pa.StructArray.from_arrays(fields, ["bytes", "path"])

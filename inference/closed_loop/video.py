"""Rollout videos: a caption under each frame, several episodes tiled, H.264 through PyAV."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAPTION_HEIGHT, CAPTION_SIZE = 34, 12  # pixels; two lines
VIDEO_FPS = 20  # at most, so that an episode of a fast simulator can be followed
MIN_HEIGHT = 240  # smaller frames are enlarged by a whole factor


def captioned(frame: np.ndarray, lines: Sequence[str], good: bool = False, alarm: bool = False) -> np.ndarray:
    """A frame, enlarged to a watchable size, above a strip with at most two lines of text.

    Args:
        frame: uint8 (H, W, 3), RGB.
        lines: text; what does not fit in the width is cut off.
        good: colours the strip green (the episode has succeeded).
        alarm: colours it amber, unless it is green (the alarm stands).

    Returns:
        uint8 (H', W', 3) with even sides, as video codecs want.
    """
    factor = -(-MIN_HEIGHT // frame.shape[0])
    large = frame.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = (side - side % 2 for side in large.shape[:2])
    colour = (24, 110, 48) if good else (150, 75, 0) if alarm else (20, 20, 20)
    canvas = Image.new("RGB", (width, height + CAPTION_HEIGHT), colour)
    canvas.paste(Image.fromarray(np.ascontiguousarray(large[:height, :width])), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for row, line in enumerate(lines[:2]):
        text, font = _in_a_font(line)
        draw.text((4, height + 2 + 15 * row), text, fill=(255, 255, 255), font=font)
    return np.asarray(canvas)


@functools.lru_cache(maxsize=16)
def _in_a_font(line: str) -> tuple[str, ImageFont.FreeTypeFont]:
    """A line and a font that has its characters, or words in their place."""
    if line.isascii():
        return line, ImageFont.load_default(CAPTION_SIZE)
    from utils.figure_text import font_beside, in_words, usual_font_file  # matplotlib, which few captions need

    font = font_beside(line)
    return in_words(line), ImageFont.truetype(usual_font_file() if font is None else font.fname, CAPTION_SIZE)


def tiled(videos: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Several videos of one frame size side by side; those that end early hold their last frame."""
    columns = int(np.ceil(np.sqrt(len(videos))))
    blank = np.zeros_like(videos[0][0])
    frames = []
    for t in range(max(map(len, videos))):
        cells = [video[min(t, len(video) - 1)] for video in videos]
        cells += [blank] * (-len(cells) % columns)
        frames.append(np.vstack([np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)]))
    return frames


def write_video(path: str | Path, frames: Sequence[np.ndarray], fps: float) -> None:
    """Write frames, uint8 (H, W, 3) with even sides, as an MP4 that browsers play.

    Falls back to MPEG-4 part 2 where PyAV was built without an H.264 encoder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=max(1, round(fps)))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_video(path: str | Path) -> list[np.ndarray]:
    """The frames of a video, uint8 (H, W, 3)."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def write_grid(path: str | Path, sources: Sequence[str | Path], fps: float) -> None:
    """Videos side by side in one; many are shrunk so that the grid stays below 2000 pixels in width."""
    videos = [read_video(source) for source in sources]
    columns = int(np.ceil(np.sqrt(len(videos))))
    shrink = max(1, -(-videos[0][0].shape[1] * columns // 2000))
    height, width = (side // shrink // 2 * 2 for side in videos[0][0].shape[:2])
    small = [[np.asarray(Image.fromarray(frame).resize((width, height))) for frame in video] for video in videos]
    write_video(path, tiled(small), fps)

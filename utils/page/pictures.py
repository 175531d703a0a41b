"""Pictures, films and videos as `data:` addresses, small enough for one page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.page.content import Film

FILM_BYTES = 9_000_000  # of all films of a page, before they become text, which adds a third
VIDEO_BYTES = 10_000_000  # of all videos of a page, likewise
SPRITE_BYTES = 400_000  # of one film at most
FRAME_BYTES = 2_500  # that a frame has to have for itself
MIN_FRAMES, MAX_FRAMES = 8, 120  # of a film
STEPS = ((160, 80), (160, 65), (128, 70), (112, 60), (96, 55), (72, 50), (48, 45))  # pixels of the longer side, quality
THUMBNAIL = 132  # pixels of the longer side


def film_frames(films: int) -> int:
    """How many frames each of so many films of a page can have."""
    return min(max(_film_bytes(films) // FRAME_BYTES, MIN_FRAMES), MAX_FRAMES)


def chosen_steps(steps: int, frames: int, also: Sequence[int] = ()) -> list[int]:
    """Steps of an episode whose frames are shown: spread evenly from the first to the last, and those of `also`."""
    even = np.linspace(0, steps - 1, min(steps, frames)).round().astype(int).tolist()
    return sorted({*even, *(step for step in also if 0 <= step < steps)})


def film(name: str, steps: Sequence[int], frames: Sequence[np.ndarray | None], films: int) -> Film | None:
    """The frames of a camera as one JPEG, as large and good as the share of one of so many `films` allows.

    Args:
        name: of the camera.
        steps: of the episode, one for each frame.
        frames: uint8 (H, W, 3), None where there is none.

    Returns:
        The film; None where there is no frame at all.
    """
    known = next((frame for frame in frames if frame is not None), None)
    if known is None:
        return None
    columns, limit = math.ceil(math.sqrt(len(frames))), _film_bytes(films)
    for side, quality in STEPS:
        scale = min(1.0, side / max(known.shape[:2]))
        height, width = (max(1, round(length * scale)) for length in known.shape[:2])
        sheet = Image.new("RGB", (columns * width, math.ceil(len(frames) / columns) * height), (128, 128, 128))
        for i, frame in enumerate(frames):
            if frame is not None:
                picture = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
                sheet.paste(picture, (i % columns * width, i // columns * height))
        encoded = _jpeg(sheet, quality)
        if len(encoded) <= limit:
            break
    missing = [i for i, frame in enumerate(frames) if frame is None]
    return Film(name, _address("image/jpeg", encoded), columns, width, height, list(steps), missing)


def thumbnail(frame: np.ndarray) -> str:
    """The address of a small JPEG of a frame, uint8 (H, W, 3)."""
    picture = Image.fromarray(frame)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return _address("image/jpeg", _jpeg(picture, 70))


def picture_file(path: Path) -> str:
    """The address of a PNG file as it is."""
    return _address("image/png", path.read_bytes())


def video_file(path: Path) -> str:
    """The address of an MP4 file as it is."""
    return _address("video/mp4", path.read_bytes())


def _film_bytes(films: int) -> int:
    return min(FILM_BYTES // max(films, 1), SPRITE_BYTES)


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=quality, optimize=True)
    return encoded.getvalue()


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"

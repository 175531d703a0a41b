"""What one encoded frame is like; decoding processes run this module, so that it imports little."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.decoding import ORIENTATION, decode_frame, is_deep
from utils.encoded_images import RECORDED_FORMATS

# what Pillow's readers raise over damaged files
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    MemoryError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
UNSEEN, ABSENT, BROKEN, DECODED = 0, 1, 2, 3  # status of a frame
FRAME = np.dtype(
    [
        ("status", "u1"),
        ("width", "i4"),
        ("height", "i4"),
        ("mode", "S8"),  # Pillow's: RGB, L, RGBA, ...
        ("format", "S8"),  # Pillow's: JPEG, PNG, ...
        ("orientation", "u1"),  # EXIF; 1 is upright, 0 not given
        ("blank", "?"),  # one colour all over
        ("level", "f4"),  # mean of the darkest and the brightest value, 0 to 255
        ("digest", "u8"),  # of the encoded bytes
    ]
)
BLANK_RANGE = 4  # largest difference within a channel of a frame of one colour, 0 to 255
SCALED_SIDE = 64  # pixels that are enough to judge a frame; the codec scales larger JPEGs down as it decodes


def examine_frames(
    frames: Sequence[bytes | np.ndarray | None], keep: Sequence[int], thumbnail_size: int
) -> tuple[np.ndarray, dict[int, str], dict[int, np.ndarray]]:
    """Decode frames, with the codecs of the training loader, and describe them.

    Args:
        frames: encoded images, or those of a video decoded, uint8 (H, W, 3); None where absent.
        keep: positions in `frames` whose pictures are kept.
        thumbnail_size: pixels of the longer side of a kept picture.

    Returns:
        A `FRAME` array (frames,), error messages of broken frames by position, and kept pictures by position,
        uint8 (H, W, 3).
    """
    facts = np.zeros(len(frames), dtype=FRAME)
    errors: dict[int, str] = {}
    pictures: dict[int, np.ndarray] = {}
    for i, frame in enumerate(frames):
        if frame is None:
            facts["status"][i] = ABSENT
            continue
        facts["digest"][i] = int.from_bytes(hashlib.blake2b(frame, digest_size=8).digest(), "little")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                picture = _examine(frame, facts[i : i + 1], thumbnail_size if i in keep else SCALED_SIDE)
        except DECODE_ERRORS as error:
            facts["status"][i] = BROKEN
            unknown = isinstance(error, UnidentifiedImageError)  # its text holds a memory address
            reason = "unknown format" if unknown else str(error) or type(error).__name__
            errors[i] = f"{len(frame)} bytes are no readable image ({reason})"
            continue
        if i in keep:
            picture.thumbnail((thumbnail_size, thumbnail_size))
            pictures[i] = np.array(picture)
    return facts, errors, pictures


def _examine(frame: bytes | np.ndarray, fact: np.ndarray, least_side: int) -> Image.Image:
    if isinstance(frame, np.ndarray):
        fact["format"], fact["mode"], (fact["height"], fact["width"]) = b"video", b"RGB", frame.shape[:2]
        return _judge(Image.fromarray(frame), fact)
    if not frame:
        raise ValueError("empty")
    with Image.open(io.BytesIO(frame), formats=RECORDED_FORMATS) as image:
        fact["format"], fact["mode"] = (image.format or "").encode(), image.mode.encode()
        fact["width"], fact["height"] = image.size
        if "exif" in image.info:
            fact["orientation"] = image.getexif().get(ORIENTATION, 0) % 256
        deep = image.convert("RGB") if is_deep(image.mode) else None  # a finding of its own
    return _judge(deep or Image.fromarray(decode_frame(frame, least_side, least_side)), fact)


def _judge(picture: Image.Image, fact: np.ndarray) -> Image.Image:
    extrema = picture.getextrema()
    fact["blank"] = all(high - low <= BLANK_RANGE for low, high in extrema)
    fact["level"] = np.mean(extrema)
    fact["status"] = DECODED
    return picture

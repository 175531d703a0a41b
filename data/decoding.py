"""From an encoded frame to pixels: training, serving and the doctor do the same to the same bytes.

Pixels are what a viewer shows: an EXIF orientation is applied, and a JPEG with extraneous bytes before a marker, as
some webcams write it, is decoded. What would be shown wrongly is refused: a frame that is cut short, and one of more
than 8 bits a value (depth), of which only white would be left.
"""

from __future__ import annotations

import io
import logging

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from utils.encoded_images import RECORDED_FORMATS

logger = logging.getLogger(__name__)

JPEG_START = b"\xff\xd8"
EXIF = b"Exif\0\0"
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
EXTRANEOUS = "extraneous bytes before marker"  # libjpeg's words
_told: set[str] = set()  # what this process has warned of


class ObservationError(ValueError):
    """A frame, state or prompt can't be used; the message says what was found and what was wanted."""


def decode_frame(
    encoded: bytes | memoryview, min_height: int, min_width: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Decode one frame.

    A JPEG larger than needed is scaled down while it is decoded, by eighths of its size.

    Args:
        encoded: of a JPEG or PNG; BMP, TIFF and WebP are read too.
        min_height, min_width: the result is not scaled below these; 0: it is not scaled.
        out: uint8 (min_height, min_width, 3), contiguous; a JPEG that comes out in that size is decoded into it.

    Returns:
        uint8 (H, W, 3) RGB, the frame whole or reduced; `out` itself where that was filled.

    Raises:
        ValueError, OSError, SyntaxError: no readable image, or one of more than 8 bits a value.
    """
    if encoded[:2] != JPEG_START or EXIF in bytes(encoded[:64]):
        return _by_pillow(encoded)
    limits = {"min_height": min_height, "min_width": min_width}
    try:
        if out is None or simplejpeg.decode_jpeg_header(encoded, **limits)[:2] != (min_height, min_width):
            return simplejpeg.decode_jpeg(encoded, "RGB", **limits)
        simplejpeg.decode_jpeg(encoded, "RGB", buffer=out, **limits)
    except ValueError as error:
        if EXTRANEOUS not in str(error):
            raise
        _warn_once("a JPEG has extraneous bytes before a marker, as some webcams write it: it is decoded as it is")
        return _by_pillow(encoded)
    return out


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB, turned as its EXIF orientation says.

    Raises:
        ValueError: more than 8 bits a value.
    """
    if is_deep(image.mode):
        raise ValueError(
            f"mode {image.mode}, more than 8 bits a value, which would be clipped to white; a camera's frames are "
            "colour images of 8 bits"
        )
    return upright(image).convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF orientation says; the same object where it says nothing."""
    if image.getexif().get(ORIENTATION, 1) <= 1:
        return image
    _warn_once("frames have an EXIF orientation: they are turned as it says")
    return ImageOps.exif_transpose(image)


def array_fault(frame: np.ndarray) -> str | None:
    """Why an array can't be a frame: what it is and what is wanted; None for one that can."""
    if frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 and frame.size:
        return None
    return f"{frame.dtype} {frame.shape}; wanted uint8 (H, W, 3), RGB"


def array_pixels(frame: np.ndarray) -> np.ndarray:
    """RGB pixels in one of the forms that libraries hand out, as uint8 (H, W, 3), contiguous.

    Args:
        frame: (H, W, 3), or (3, H, W) where W is not 3; uint8 from 0 to 255, or floats from 0 to 1.

    Raises:
        ObservationError: another shape, type or range.
    """
    if frame.ndim == 3 and frame.shape[0] == 3 and frame.shape[2] != 3:
        frame = frame.transpose(1, 2, 0)
    if frame.dtype.kind == "f" and frame.ndim == 3 and frame.shape[2] == 3 and frame.size:
        check_range(frame)
        frame = np.rint(frame * 255.0).astype(np.uint8)
    if (fault := array_fault(frame)) is not None:
        raise ObservationError(f"image: array is {fault}, or floats from 0 to 1")
    return np.ascontiguousarray(frame)


def check_range(frame: np.ndarray) -> None:
    """
    Raises:
        ObservationError: pixels that are floats, and not from 0 to 1.
    """
    low, high = frame.min(), frame.max()
    if not (low >= 0 and high <= 1):
        raise ObservationError(
            f"image: array is {frame.dtype} with values from {low:g} to {high:g}; floats are taken from 0 to 1: "
            "divide by the camera's largest value, or give uint8 for 0 to 255"
        )


def is_deep(mode: str) -> bool:
    """Whether a mode of Pillow's has more than 8 bits a value."""
    return mode.startswith(("I", "F"))


def _by_pillow(encoded: bytes | memoryview) -> np.ndarray:
    with Image.open(io.BytesIO(encoded), formats=RECORDED_FORMATS) as image:
        return np.array(upright_rgb(image))


def _warn_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        logger.warning("%s", message)

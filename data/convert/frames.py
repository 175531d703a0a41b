"""A camera's frames on their way into a column: pixels of any layout, and encoded frames that pass untouched."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from data.convert.episode_writer import ImageEncoding
from data.convert.mapping import Camera
from data.convert.readers.base import Episode, Key
from data.convert.values import Place
from data.decoding import decode_frame
from utils.encoded_images import JPEG_START, PNG_START
from utils.parquet_utils import DataError
from utils.text import printable

JPEG_END, PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
TAIL = 4096  # bytes behind a JPEG's end that some cameras write


def encoded_images(
    values: np.ndarray | list[Any], camera: Camera, encoding: ImageEncoding, column: str, where: Place
) -> list[bytes]:
    """The frames of a camera as JPEG or PNG: those that are encoded already untouched, unless pixels change.

    Args:
        values: pixels (N, H, W, 3), or (N, 3, H, W) with `layout: chw`; or N encoded frames, padded with zeros or not.
        camera: what is done to the pixels.
        encoding: of pixels.
        column, where: for messages.

    Raises:
        DataError: something else than colour images of 8 bits, or a frame that is cut short.
    """
    if isinstance(values, np.ndarray) and values.ndim >= 3:
        return [encoding(image) for image in _pixels(values, camera, column, where)]
    frames = []
    for i, value in enumerate(values):
        frame = value if isinstance(value, bytes) else np.asarray(value, dtype=np.uint8).tobytes().rstrip(b"\0")
        _check_frame(frame, column, where, i)
        if camera.changes_pixels or not encoding.fits(frame):
            frame = encoding(_changed(frame, camera, column, where, i))
        frames.append(frame)
    return frames


def _check_frame(frame: bytes, column: str, where: Place, i: int) -> None:
    if not frame.startswith((JPEG_START, PNG_START)):
        raise DataError(
            f"{where.step(i)}: {column} begins with {frame[:8]!r}; wanted the bytes of a JPEG or PNG image: correct "
            "the mapping, or record that episode again"
        )
    end = PNG_END if frame.startswith(PNG_START) else JPEG_END
    if not frame.endswith(end) and end not in frame[-TAIL:]:
        raise DataError(f"{where.step(i)}: {column} is not a whole image; record that episode again")
    if frame.startswith(PNG_START) and frame[24:25] == b"\x10":
        raise DataError(f"{where.step(i)}: {column} is a PNG of 16 bits a value, depth and not colour; choose another")


def _changed(frame: bytes, camera: Camera, column: str, where: Place, i: int) -> np.ndarray:
    try:
        pixels = decode_frame(frame, 0, 0)
    except (OSError, SyntaxError, ValueError) as error:
        kind = "JPEG" if frame.startswith(JPEG_START) else "PNG"
        raise DataError(
            f"{where.step(i)}: {column}, a {kind}, can't be decoded ({printable(error)}); record it again"
        ) from None
    return _turned(pixels[..., ::-1] if camera.channels.startswith("bgr") else pixels, camera.flip)


def _turned(pixels: np.ndarray, flip: str) -> np.ndarray:
    """(..., H, W, 3) mirrored as `flip` says."""
    rows = slice(None, None, -1 if flip in ("vertical", "both") else 1)
    columns = slice(None, None, -1 if flip in ("horizontal", "both") else 1)
    return np.ascontiguousarray(pixels[..., rows, columns, :])


def _pixels(values: np.ndarray, camera: Camera, column: str, where: Place) -> np.ndarray:
    stored, channels = values.shape[1:], len(camera.channels)
    if camera.layout == "chw" and values.ndim == 4:
        values = np.moveaxis(values, 1, -1)
    if values.ndim != 4 or values.shape[3] != channels:
        wanted = f"({channels}, height, width)" if camera.layout == "chw" else f"(height, width, {channels})"
        other = "hwc" if camera.layout == "chw" else "chw"
        fits = len(stored) == 3 and stored[2 if other == "hwc" else 0] == channels
        hint = f"; is it `layout: {other}`?" if fits else ""
        raise DataError(f"{where.step(0)}: {column} is {values.dtype} {stored}; wanted {wanted}{hint}")
    if values.dtype != np.uint8:
        values = _eight_bits(values, camera, column, where)
    elif camera.scale is not None:
        raise DataError(f"mapping: scale of {column}: its pixels are uint8 already; leave it out")
    values = values[..., :3]
    return _turned(values[..., ::-1] if camera.channels.startswith("bgr") else values, camera.flip)


def _eight_bits(values: np.ndarray, camera: Camera, column: str, where: Place) -> np.ndarray:
    if values.dtype.kind not in "fiu" or (values.dtype.kind != "f" and camera.scale is None and values.max() > 255):
        raise DataError(f"{where.step(0)}: {column} is {values.dtype} up to {values.max()}; wanted colours of 8 bits")
    if camera.scale is None and values.dtype.kind == "f" and 0 < values.max() <= 1:
        raise DataError(
            f"{where.step(0)}: {column} is {values.dtype} from {values.min():g} to {values.max():g}, where 0 to 255 "
            "was expected; say `scale: 255` if 1 is white, `scale: 1` if these frames are black"
        )
    values = values * (1.0 if camera.scale is None else camera.scale)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):
        raise DataError(
            f"{where.step(0)}: {column} has pixels from {low:g} to {high:g}; wanted 0 to 255: correct scale"
        )
    return np.rint(values).astype(np.uint8)


def check_camera(column: str, camera: Camera, key: Key, where: str) -> None:
    encoded = key.kind in ("jpeg", "png", "image")
    if not encoded and len(key.shape) != 3 and not (len(key.shape) == 1 and key.kind == "uint8"):
        raise DataError(f"{where}: {column} is made from {camera.key!r}, which is {key}; wanted images")
    if encoded and (camera.layout != "hwc" or camera.scale is not None or len(camera.channels) == 4):
        raise DataError(f"mapping: {column} comes from encoded images; layout, scale and rgba have no meaning there")


def resolved(camera: Camera, attributes: dict[str, Any], episode: Episode) -> Camera:
    """`flip: auto` as the source says: robosuite's macros_image_convention, opengl being upside down."""
    if camera.flip != "auto":
        return camera
    convention = attributes.get("macros_image_convention")
    if convention not in ("opengl", "opencv"):
        raise DataError(
            f"{episode.name}: flip is auto, but no attribute macros_image_convention says whether frames are upside "
            "down; look at them (--strip out.png), and say flip: vertical or none"
        )
    return dataclasses.replace(camera, flip="vertical" if convention == "opengl" else "none")

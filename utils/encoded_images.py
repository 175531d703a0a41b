"""What an encoded frame says of itself, read from its headers before anything is decoded.

Only JPEG and PNG are taken, told by their first bytes: an image library would open dozens of formats, some of which
decode while they are opened.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import simplejpeg

JPEG_START, PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
FORMATS = ("JPEG", "PNG")  # for PIL's `formats`
RECORDED_FORMATS = (*FORMATS, "BMP", "TIFF", "WEBP")  # of one's own recordings; a server takes the first two
MAX_SEGMENTS = 1024  # of a JPEG before its pixels, bytes that belong to none counted: a reader looks at each
MAX_SCANS = 32  # of a progressive JPEG, which takes one pass over all its pixels each; encoders make about 10
_SOME_CHUNKS, _BYTES_PER_CHUNK = 256, 1024  # a PNG may have so many chunks, and one more per so many bytes


class ImageHeaderError(ValueError):
    """Bytes that are no JPEG or PNG, or one that no encoder makes."""


def is_image(data: bytes | memoryview) -> bool:
    """Whether bytes begin as a JPEG or a PNG does."""
    return bytes(data[:3]) == JPEG_START or bytes(data[:8]) == PNG_START


def encoded_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded frame, from its headers alone.

    Raises:
        ImageHeaderError: another format, a header cut off, or one that is cheap to send and dear to decode: a JPEG of
            very many scans, a PNG of very many chunks.
    """
    if data[:3] == JPEG_START:
        _check_segments(data)
        scans = data.count(b"\xff\xda")
        if scans > MAX_SCANS:
            raise ImageHeaderError(f"a JPEG of {scans} scans; at most {MAX_SCANS} are read")
        try:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError as error:
            raise ImageHeaderError(f"a JPEG whose header can't be read: {error}") from None
    elif data[:8] == PNG_START:
        width, height = _png_size(data)
    else:
        raise ImageHeaderError("another format, or no image")
    if width < 1 or height < 1:
        raise ImageHeaderError(f"an image of {height} x {width} pixels")
    return width, height


def _check_segments(data: bytes) -> None:
    """Refuse a JPEG whose pixels begin after very many segments, or never."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        at = data.find(b"\xff", at)
        kind = data[at + 1] if 0 <= at < len(data) - 1 else 0xD9
        if kind in (0xD9, 0xDA):  # the end, or a scan
            return
        alone = kind in (0x00, 0x01, 0xFF) or 0xD0 <= kind <= 0xD8
        at += 1 if kind == 0xFF else 2 if alone else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ImageHeaderError(f"a JPEG of more than {MAX_SEGMENTS} segments before its pixels")


def _png_size(data: bytes) -> tuple[int, int]:
    kinds = list(_png_chunks(data))
    if not kinds or kinds[0] != b"IHDR" or len(data) < 33:
        raise ImageHeaderError("a PNG without its header (IHDR)")
    return struct.unpack_from(">II", data, 16)


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """The kinds of a PNG's chunks, in order."""
    limit, at = _SOME_CHUNKS + len(data) // _BYTES_PER_CHUNK, len(PNG_START)
    for _ in range(limit):
        if at + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind
        at += 12 + length
    raise ImageHeaderError(f"a PNG of more than {limit} chunks in {len(data)} bytes")

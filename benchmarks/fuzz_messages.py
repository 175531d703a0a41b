"""Messages that no robot would send: made by a grammar, or by changing bytes of good ones; a function of the seed."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import msgpack
import numpy as np
from PIL import Image

from inference.serving.wire import pack

DTYPES = ["|u1", "<f4", "<f8", "|b1", ">f8", "<i8", "|O", "<U4", "<c8", "f4,f4", "(1,1", "f4,(", "(2,)f4", "V8", "<f16"]
DTYPES += ["", "\0", "float32", "u1" * 50, "<M8[s]", "|S0", ">>f4", "f" * 10_000, "[('a','f4')]", "{'names':['a']}"]
SIZES = [0, 1, 2, 3, 4, 7, 40, 4096, 65_535, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1]
TEXTS = ["", " ", "open it", "\x1b[2J", "a\nINFO forged", "\u202e", "\0", "x" * 5000, "=cmd()", "ö", "\U0001f600" * 100]
NUMBERS = [0, 1, -1, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, float("nan"), float("inf"), -0.0, 1e308, True, None]
OTHER_FORMATS = ("GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM", "TGA", "PCX", "SGI", "DIB", "ICNS")


def good_request(rng: random.Random, state_dim: int, size: int = 40) -> dict[str, Any]:
    """An observation that a policy of one camera takes."""
    pixels = np.frombuffer(rng.randbytes(size * size * 3), np.uint8).reshape(size, size, 3)
    state = np.array([rng.uniform(-1, 1) for _ in range(state_dim)], np.float32)
    return {"observation/image": pixels, "observation/state": state, "prompt": "open it", "seed": rng.randrange(100)}


def encoded(kind: str, size: tuple[int, int] = (16, 16), **options: Any) -> bytes:
    """A small image in one of PIL's formats."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes = b"") -> bytes:
    """One chunk of a PNG file, its checksum right."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def dear_image(rng: random.Random) -> bytes:
    """An image that costs more to open or decode than to send."""
    header = struct.pack(">IIBBBBB", rng.choice([16, 30_000, 2**31 - 1]), rng.choice([16, 30_000]), 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    progressive = encoded("JPEG", (64, 64), progressive=True)
    scan = progressive.rindex(b"\xff\xda")
    return rng.choice(
        [
            lambda: start + png_chunk(b"IDAT", zlib.compress(bytes(100_000))),
            lambda: start + png_chunk(b"tEXt", b"a\0b") * 3000,
            lambda: start + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 3,
            lambda: start + png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 20))),
            lambda: start + png_chunk(b"IDAT") * 5000,
            lambda: start + png_chunk(rng.choice([b"tRNS", b"gAMA", b"pHYs", b"cHRM", b"acTL", b"fcTL"]), b"\1"),
            lambda: progressive[:scan] + progressive[scan:-2] * rng.choice([20, 200]) + b"\xff\xd9",
            lambda: progressive[:2] + rng.choice([b"\xff\xe1\0\4ab", b"\xff", b"\xff\0"]) * 3000 + progressive[2:],
            lambda: encoded(rng.choice(OTHER_FORMATS), (256, 256)),
        ]
    )()


def frame(rng: random.Random) -> Any:
    """One camera's frame, more or less."""
    if rng.random() < 0.3:
        return dear_image(rng)
    whole = encoded(rng.choice(["JPEG", "PNG"]), rng.choice([(16, 16), (1, 700), (300, 200)]))
    return rng.choice(
        [whole, mutated(rng, whole), mutated(rng, whole), np.zeros((rng.choice([0, 1, 9]), 5, 3), np.uint8)]
    )


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any value, arrays that lie about themselves among them."""
    kind = rng.randrange(12 if depth < 4 else 8)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.randbytes(rng.choice([0, 1, 8, 100]))
    if kind in (3, 4):
        return frame(rng)
    if kind in (5, 6):
        shape = [rng.choice(SIZES[:9] if rng.random() < 0.7 else SIZES) for _ in range(rng.randrange(6))]
        data = rng.randbytes(rng.choice([0, 4, 12, 4800, int(min(np.prod(shape, dtype=float), 5000))]))
        return {b"__ndarray__": True, b"data": data, b"dtype": rng.choice(DTYPES), b"shape": shape}
    if kind == 7:
        return {b"__npgeneric__": True, b"data": rng.choice(NUMBERS), b"dtype": rng.choice(DTYPES)}
    if kind == 8:
        return [value(rng, depth + 1) for _ in range(rng.choice([0, 1, 3, 200 if depth == 0 else 2]))]
    if kind == 9:
        return {rng.choice(TEXTS): value(rng, depth + 1) for _ in range(3)}
    if kind == 10:
        return msgpack.ExtType(rng.randrange(128), rng.randbytes(3))
    deep: Any = 1
    for _ in range(rng.choice([3, 31, 40, 500])):
        deep = [deep]
    return deep


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A few bytes flipped, cut, doubled, put in or set to a telling value."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at : at + rng.choice([1, 4, 100])]
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.choice([1, 4, 16]))
        elif kind == 3:
            changed[at:at] = changed[at : at + rng.choice([2, 30, 1000])]
        elif kind == 4 and changed:
            changed[at % len(changed)] = rng.choice([0, 0x7F, 0x80, 0xC1, 0xC6, 0xDB, 0xDD, 0xDF, 0xFF])
        else:
            del changed[at:]
    return bytes(changed)


def message(rng: random.Random, state_dim: int, corpus: list[bytes]) -> bytes:
    """A message; `corpus` are earlier ones that were worth changing further."""
    kind = rng.randrange(8)
    if kind == 0 or (kind < 3 and not corpus):
        return mutated(rng, pack(good_request(rng, state_dim)))
    if kind < 3:
        return mutated(rng, rng.choice(corpus))
    if kind == 3:
        return pack(value(rng))
    request = good_request(rng, state_dim)
    if kind == 4 and rng.random() < 0.1:
        request["observation/image"] = np.zeros((rng.choice([0, 3, 65, 100_000]), 1, 1, 3), np.uint8)
        return pack(request)
    if kind == 4:
        frames = [frame(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
        request[rng.choice(["observation/image", "observation/wrist_image"])] = rng.choice([frames[0], frames])
        return pack(request)
    for _ in range(rng.randint(1, 3)):
        request[rng.choice([*request, *TEXTS, "image_1", "image_2", "state"])] = value(rng)
    try:
        return pack(request)
    except ValueError:  # UnicodeEncodeError among them
        return pack(good_request(rng, state_dim))

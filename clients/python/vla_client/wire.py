"""Messages between robots and the policy server: msgpack with numpy arrays, in the encoding of openpi's client.

An array travels as `{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [..]}`, a numpy scalar as
`{b"__npgeneric__": True, b"data": value, b"dtype": ..}`. What is unpacked here comes from the network: only plain
numbers are taken, and no pickle exists anywhere. A message's headers are walked over and counted before any value of it
is made, so neither memory nor time is spent on one that is too deep, too long or cut off. Needs numpy and msgpack
alone, so that a robot can use this file without torch.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

NUMBERS = "biuf"  # numpy's kinds: bool, signed, unsigned, float
MAX_DIMENSIONS = 8
MAX_EMPTY_SIZE = 4096  # of each dimension of an array without elements, whose sizes no data bear out
MAX_ITEMS = 4096  # of one list or dict: arrays carry whatever is long
MAX_CONTAINERS = 1024  # lists and dicts of one message: an empty one is one byte on the wire and 60 in memory
MAX_VALUES = 16_384  # values of one message, each item of a list, key and value of a dict counted
MAX_DEPTH = 32  # lists and dicts within each other
MAX_QUOTED = 80  # characters of a message that an error quotes

# What an array's dtype may be called. Looked up, never parsed: numpy's parser runs into SyntaxError on some texts.
_NAMES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
DTYPES = {
    name: dtype.newbyteorder(order) if order in ("<", ">") else dtype
    for dtype in map(np.dtype, _NAMES.split())
    for order in ("", "|", "<", ">", "=")
    for name in (f"{order}{dtype.kind}{dtype.itemsize}", f"{order}{dtype.name}")
}


class WireError(ValueError):
    """A message that is not what it has to be; the text says what was found and what is wanted."""


def pack(message: Any) -> bytes:
    """A message as bytes.

    Args:
        message: nested dicts and lists of plain values, bytes, numpy arrays and numpy scalars.

    Raises:
        WireError: an array of objects, text or complex numbers, or a value that msgpack has no type for.
    """
    try:
        return msgpack.packb(message, default=_encode)
    except (TypeError, OverflowError) as error:
        raise WireError(f"can't be sent: {error}; send numbers, text, bytes and arrays of numbers") from None


def unpack(data: bytes) -> Any:
    """The message in `data`. Arrays are read-only views of it.

    Raises:
        WireError: not msgpack, cut off, nested too deeply, too many lists and dicts or too long ones, an array whose
            dtype, shape or size is not sound.
    """
    reason = _unsound(data)
    if reason is None:
        try:
            return msgpack.unpackb(data, strict_map_key=False, object_hook=_decode, ext_hook=_refuse_extension)
        except WireError:
            raise
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
            reason = str(error)[:MAX_QUOTED] or type(error).__name__
    raise WireError(f"{len(data)} bytes are no msgpack message ({reason}); pack it with msgpack")


def _unsound(data: bytes) -> str | None:
    """Why `data` can't be one message, or one within the limits; None where it can. No value is made."""
    end, at, containers, values = len(data), 0, 0, 1
    open_containers = [1]  # values still to come in each list or dict that has begun; the first is the message
    while open_containers:
        if not open_containers[-1]:
            open_containers.pop()
            continue
        open_containers[-1] -= 1
        if at >= end:
            return "it is cut off"
        kind, length_bytes, skip = _LAYOUT[data[at]]
        at += 1
        if length_bytes:
            if at + length_bytes > end:
                return "it is cut off"
            skip += int.from_bytes(data[at : at + length_bytes], "big")
            at += length_bytes
        if kind == "bytes":
            at += skip
            if at > end:
                return "it is cut off"
            continue
        if kind == "unknown":
            return "a byte of no known type"
        if skip > MAX_ITEMS:
            return f"{skip} exceeds max_{kind}_len {MAX_ITEMS}"
        containers, values = containers + 1, values + (skip if kind == "array" else 2 * skip)
        if containers > MAX_CONTAINERS:
            return f"more than {MAX_CONTAINERS} lists and dicts in a message; send arrays"
        if values > MAX_VALUES:
            return f"more than {MAX_VALUES} values in a message; send arrays"
        if len(open_containers) > MAX_DEPTH:
            return f"lists and dicts within each other more than {MAX_DEPTH} deep"
        open_containers.append(skip if kind == "array" else 2 * skip)
    return None if at == end else f"{end - at} bytes follow it"


def _layout(first: int) -> tuple[str, int, int]:
    """What a value's first byte says: its kind, the bytes of its length, and bytes or items besides that length."""
    if first < 0x80 or first >= 0xE0 or first in (0xC0, 0xC2, 0xC3):  # a small number, nil, false, true
        return "bytes", 0, 0
    if first < 0x90:
        return "map", 0, first & 0x0F
    if first < 0xA0:
        return "array", 0, first & 0x0F
    if first < 0xC0:
        return "bytes", 0, first & 0x1F
    if first == 0xC1:
        return "unknown", 0, 0
    return {
        **{0xC4 + i: ("bytes", 1 << i, 0) for i in range(3)},  # binary
        **{0xC7 + i: ("bytes", 1 << i, 1) for i in range(3)},  # extension
        **{0xCA + i: ("bytes", 0, 4 << i) for i in range(2)},  # float
        **{0xCC + i: ("bytes", 0, 1 << i) for i in range(4)},  # unsigned
        **{0xD0 + i: ("bytes", 0, 1 << i) for i in range(4)},  # signed
        **{0xD4 + i: ("bytes", 0, 1 + (1 << i)) for i in range(5)},  # extension of a fixed size
        **{0xD9 + i: ("bytes", 1 << i, 0) for i in range(3)},  # text
        **{0xDC + i: ("array", 2 << i, 0) for i in range(2)},
        **{0xDE + i: ("map", 2 << i, 0) for i in range(2)},
    }[first]


_LAYOUT = [_layout(first) for first in range(256)]


def _encode(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in NUMBERS:
            raise WireError(f"can't send an array of dtype {value.dtype}; send numbers")
        if isinstance(value, np.ndarray):
            data = {b"data": value.tobytes(), b"shape": value.shape}
            return {b"__ndarray__": True, b"dtype": value.dtype.str, **data}
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} has no msgpack type")


def _decode(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" not in found and b"__npgeneric__" not in found:
        return found
    dtype, data = dtype_of(found.get(b"dtype")), found.get(b"data")
    if b"__npgeneric__" in found:
        if not isinstance(data, (bool, int, float)):
            raise WireError(f"a number is given as {type(data).__name__}; wanted a {dtype}")
        try:
            with np.errstate(over="raise"):
                return dtype.type(data)
        except (OverflowError, ValueError, FloatingPointError):
            raise WireError(f"a number, {data}, does not fit its dtype {dtype}") from None
    return array_of(dtype, found.get(b"shape"), data)


def array_of(dtype: np.dtype, shape: Any, data: Any) -> np.ndarray:
    """A read-only array of a message's bytes.

    Raises:
        WireError: a shape that is no list of sizes, or bytes that do not fill it.
    """
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not sizes or len(shape) > MAX_DIMENSIONS:
        raise WireError(f"an array has shape {_quoted(shape)}; wanted a list of at most {MAX_DIMENSIONS} sizes")
    elements = math.prod(shape)
    if not elements and max(shape) > MAX_EMPTY_SIZE:
        raise WireError(f"an array without elements has shape {tuple(shape)}; each size is at most {MAX_EMPTY_SIZE}")
    wanted = elements * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != wanted:
        size = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"an array of shape {tuple(shape)} and dtype {dtype} has {size} of data; wanted {wanted} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def dtype_of(text: Any) -> np.dtype:
    """The dtype that a message names; a WireError where it is none of numbers."""
    dtype = DTYPES.get(text) if isinstance(text, str) else None
    if dtype is None:
        raise WireError(f"an array has dtype {_quoted(text)}; wanted numbers, such as '|u1' (uint8) or '<f4' (float32)")
    return dtype


def _quoted(value: Any) -> str:
    """A value of a message in an error, cut before it is written out."""
    if isinstance(value, (str, bytes, list)) and len(value) > MAX_QUOTED:
        return f"{value[:MAX_QUOTED]!r} ..."
    return repr(value) if not isinstance(value, dict) else "a dict"


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(f"msgpack extension type {code}; only plain values and arrays are read")

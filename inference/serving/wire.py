"""Messages between robots and the policy server: msgpack with numpy arrays, in the encoding of openpi's client.

An array travels as `{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [..]}`, a numpy scalar as
`{b"__npgeneric__": True, b"data": value, b"dtype": ..}`. What is unpacked here comes from the network: only plain
numbers are taken, every size is checked before memory is touched, and no pickle exists anywhere. Needs numpy and
msgpack alone, so that a robot can use this file without torch.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgpack
import numpy as np

NUMBERS = "biuf"  # numpy's kinds: bool, signed, unsigned, float
MAX_DIMENSIONS = 8
MAX_ITEMS = 4096  # of one list or dict: arrays carry whatever is long
MAX_CONTAINERS = 1024  # lists and dicts of one message: an empty one is one byte on the wire and 60 in memory


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
    seen = itertools.count(1)

    def counted(found: Any) -> Any:
        if next(seen) > MAX_CONTAINERS:
            raise WireError(f"more than {MAX_CONTAINERS} lists and dicts in a message; send arrays")
        return _decode(found) if isinstance(found, dict) else found

    limits = {"max_array_len": MAX_ITEMS, "max_map_len": MAX_ITEMS}
    hooks = {"object_hook": counted, "list_hook": counted, "ext_hook": _refuse_extension}
    try:
        return msgpack.unpackb(data, strict_map_key=False, **hooks, **limits)
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise WireError(f"{len(data)} bytes are no msgpack message ({reason}); pack it with msgpack") from None


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
    dtype, data = _dtype(found.get(b"dtype")), found.get(b"data")
    if b"__npgeneric__" in found:
        if not isinstance(data, (bool, int, float)):
            raise WireError(f"a number is given as {type(data).__name__}; wanted a {dtype}")
        try:
            return dtype.type(data)
        except OverflowError:
            raise WireError(f"a number, {data}, does not fit its dtype {dtype}") from None
    shape = found.get(b"shape")
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not sizes or len(shape) > MAX_DIMENSIONS:
        raise WireError(f"an array has shape {shape!r}; wanted a list of at most {MAX_DIMENSIONS} sizes")
    wanted = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != wanted:
        size = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"an array of shape {tuple(shape)} and dtype {dtype} has {size} of data; wanted {wanted} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def _dtype(text: Any) -> np.dtype:
    try:
        dtype = np.dtype(text) if isinstance(text, str) else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or dtype.kind not in NUMBERS or dtype.shape:
        raise WireError(f"an array has dtype {text!r}; wanted numbers, such as '|u1' (uint8) or '<f4' (float32)")
    return dtype


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(f"msgpack extension type {code}; only plain values and arrays are read")

"""TFRecord files and the `tf.train.Example` messages in them, without TensorFlow.

A record is `uint64 length, uint32 checksum of it, data, uint32 checksum of data`, little-endian; checksums are CRC-32C,
masked (tensorflow/core/lib/io/record_writer.h, tensorflow/core/lib/hash/crc32c.h). An Example is a protocol buffer of
a map from names to lists of bytes, float32 or int64 (tensorflow/core/example/example.proto, feature.proto).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.convert.readers.base import optional_module
from utils.parquet_utils import DataError

HEADER, FOOTER = 12, 4  # bytes around a record's data
MAX_RECORD = 1 << 32  # bytes of one record, which is read at once
AGAIN = "fetch that file again"
_MASK = 0xA282EAD8
Value = list[bytes] | np.ndarray  # of one name: texts or images; float32; int64


def record_spans(path: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of the data of each record, found by reading the headers alone.

    Raises:
        DataError: a header is damaged, or the file is cut short.
    """
    crc32c = optional_module("google_crc32c", path).value
    spans = []
    try:
        with path.open("rb", buffering=0) as file:
            size, at = os.fstat(file.fileno()).st_size, 0
            while at < size:
                header = os.pread(file.fileno(), HEADER, at)
                if len(header) < HEADER:
                    raise DataError(f"{path}: ends within the header of record {len(spans)}; {AGAIN}")
                length, checksum = struct.unpack("<QI", header)
                if _masked(crc32c(header[:8])) != checksum:
                    raise DataError(f"{path}: the header of record {len(spans)} is damaged (checksum); {AGAIN}")
                if at + HEADER + length + FOOTER > size or length > MAX_RECORD:
                    raise DataError(
                        f"{path}: record {len(spans)} has {length:,} bytes, of which {size - at - HEADER:,} are there; "
                        f"the file is cut short: {AGAIN}"
                    )
                spans.append((at + HEADER, length))
                at += HEADER + length + FOOTER
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); {AGAIN}") from None
    return spans


def read_record(path: Path, offset: int, length: int, number: int) -> memoryview:
    """The data of one record, its checksum verified.

    Raises:
        DataError: it is damaged.
    """
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), length, offset)
        while 0 < len(data) < length:  # a read returns at most 2 GiB
            more = os.pread(file.fileno(), length - len(data), offset + len(data))
            data = data + more if more else b""
        footer = os.pread(file.fileno(), FOOTER, offset + length)
    if len(data) < length or len(footer) < FOOTER:
        raise DataError(f"{path}: record {number} is cut short; {AGAIN}")
    if _masked(optional_module("google_crc32c", path).value(data)) != struct.unpack("<I", footer)[0]:
        raise DataError(f"{path}: record {number} is damaged (its checksum does not fit); {AGAIN}")
    return memoryview(data)


def parse_example(data: memoryview) -> dict[str, Value]:
    """The lists of a `tf.train.Example` by name.

    Raises:
        ValueError: something else than an Example.
    """
    features: dict[str, Value] = {}
    for number, message in _fields(data):  # Example: features = 1
        if number != 1:
            continue
        for _, entry in _fields(message):  # Features: a map of entries, key = 1 and value = 2
            parts = dict(_fields(entry))
            features[str(parts.get(1, b""), "utf-8")] = _feature(parts.get(2, memoryview(b"")))
    return features


def _feature(data: memoryview) -> Value:
    """Feature: one of bytes_list = 1, float_list = 2, int64_list = 3, each with value = 1."""
    for number, values in _fields(data):
        if number == 1:
            return [bytes(value) for _, value in _fields(values)]
        if number == 2:
            parts = [np.frombuffer(value, "<f4") for _, value in _fields(values)]
            return _one(parts, np.float32)
        if number == 3:
            return _one([_varints(value) for _, value in _fields(values)], np.int64)
    return []


def _one(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype), *parts])


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, bytes) of each field of a message. Numbers that are not packed come as the bytes they have."""
    at, size = 0, len(data)
    while at < size:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        elif kind == 0:
            length = _varint(data, at)[1] - at
        else:
            raise ValueError(f"a field of wire type {kind}")
        if at + length > size:
            raise ValueError("a field is longer than its message")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, where it ends)."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a number without an end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _varints(data: memoryview) -> np.ndarray:
    """A packed list of int64."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    if len(ends) == len(raw):  # all of one byte: flags, pixels below 128
        return raw.astype(np.int64)
    if not len(ends) or ends[-1] != len(raw) - 1:
        raise ValueError("a number without an end")
    begins = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - begins + 1
    if lengths.max() > 10:
        raise ValueError("a number of more than 64 bits")
    values = np.zeros(len(ends), dtype=np.uint64)
    for place in range(int(lengths.max())):
        rows = lengths > place
        values[rows] |= (raw[begins[rows] + place] & 0x7F).astype(np.uint64) << np.uint64(7 * place)
    return values.view(np.int64)


def _masked(checksum: int) -> int:
    return ((checksum >> 15 | checksum << 17) + _MASK) & 0xFFFFFFFF

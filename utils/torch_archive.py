"""The archives that torch.save writes, checked before torch.load reads them, so that a crafted one does no harm.

An archive is a zip file of stored records: `data.pkl`, a pickle that holds the value, and `data/0`, `data/1`, ..., the
bytes of each tensor. `torch.load(mmap=True, weights_only=True)` maps those bytes without asking whether the record is
compressed or as large as the pickle says, and lets the pickle ask for any amount of memory. Therefore the layout is
checked first, and the pickle is read once with placeholders in place of tensors: it may build plain values and tensors
and nothing else, and a tensor never has more values than its record has bytes for. Only then torch.load gets the file.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MAX_INDEX_BYTES = 64_000_000  # of data.pkl: 1,000 tensors take about 0.1 MB
MAX_DIRECTORY_BYTES = 32_000_000  # of the zip directory: a record takes about 64
MAX_DEPTH = 64  # of dicts, lists and tuples within each other
MAX_PLAIN_VALUES = 1_000_000
BLOCK = 1 << 24

_NAME = re.compile(
    r"[^/\\]{1,255}/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id"
    r"|data/\d{1,9})"
)
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What torch.save writes; no opcode that makes an instance, or looks a name up in the copy registry.
_OPCODES = """
    PROTO STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 NONE NEWTRUE NEWFALSE BININT BININT1
    BININT2 LONG1 BINFLOAT BINUNICODE BINBYTES SHORT_BINBYTES BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL REDUCE BUILD
    BINPERSID APPEND APPENDS SETITEM SETITEMS
"""
# What a pickle made of other values than torch.save's runs into, in the unpickler or in torch.
_FAULTS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class ArchiveError(ValueError):
    """A file is no archive of torch.save, or a damaged or a crafted one; the message says how."""


class UnsafeArchiveError(ArchiveError):
    """An archive's pickle asks for something other than tensors and plain values."""


@dataclass(frozen=True)
class Record:
    """Where a record's bytes lie in the file, and their CRC-32."""

    begin: int
    size: int
    checksum: int


@dataclass
class Archive:
    """A checked archive.

    Attributes:
        value: what was saved; its tensors are mapped from the file.
        records: by name without the archive's root, as in "data/0".
        index: `value` with the name of its record in place of each tensor.
    """

    path: Path
    records: dict[str, Record]
    value: Any = None
    index: Any = None

    def verify(self, leave_out: str | None = None) -> None:
        """Read records against their checksums, without keeping anything in memory.

        Args:
            leave_out: a key of `value`; records of tensors that only it holds are not read. None: all are.

        Raises:
            ArchiveError: naming the record that is damaged.
        """
        index = self.index
        if leave_out is not None and isinstance(index, dict):
            index = {key: item for key, item in index.items() if key != leave_out}
        wanted = None if leave_out is None else set(_record_names(index))
        with self.path.open("rb") as file:
            for name, record in self.records.items():
                if wanted is None or name in wanted or not name.startswith("data/"):
                    _verify(file, name, record)


def open_archive(path: Path, *, with_value: bool = True) -> Archive:
    """Check an archive's layout and its index, and load its value. Tensors are mapped and not read.

    Args:
        path: the file.
        with_value: False leaves `value` out, for a reader that only verifies.

    Raises:
        ArchiveError: not an archive, damaged, compressed, or with tensors that its bytes do not bear out.
        UnsafeArchiveError: see there.
    """
    archive = Archive(path, _records(path))
    with path.open("rb") as file:
        for name, record in archive.records.items():
            if not name.startswith("data/"):
                _verify(file, name, record)
        order = _content(file, archive.records.get("byteorder"))
        index = archive.records["data.pkl"]
        if not with_value:
            return archive
        pickled = _content(file, index)
    if order not in (b"", b"little"):
        raise ArchiveError(f"its numbers are {order[:20]!r}-endian; save it again on a little-endian machine")
    try:
        archive.index = _Index(pickled, archive.records).load()
        _check_plain(archive.index)
        archive.value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except ArchiveError:
        raise
    except _FAULTS as error:
        raise ArchiveError(f"its index can't be read ({type(error).__name__}: {str(error)[:200]})") from None
    return archive


def _records(path: Path) -> dict[str, Record]:
    """The archive's records, each whole, stored as it is, and overlapping no other."""
    size = path.stat().st_size
    with path.open("rb") as file:
        _check_directory_size(file, size)
        try:
            with zipfile.ZipFile(file) as archive:
                infos, directory = archive.infolist(), archive.start_dir
        except (
            zipfile.BadZipFile,
            EOFError,
            NotImplementedError,
            UnicodeDecodeError,
            struct.error,
            ValueError,
        ) as error:
            raise ArchiveError(f"its directory can't be read ({error})") from None
        records: dict[str, Record] = {}
        end, roots = 0, set()
        for info in sorted(infos, key=lambda info: info.header_offset):
            name = info.orig_filename
            if not _NAME.fullmatch(name):
                raise ArchiveError(f"a record is called {name[:80]!r}; wanted those of torch.save")
            root, _, name = name.partition("/")
            roots.add(root)
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
                raise ArchiveError(f"its record {name} is compressed or encrypted; only stored records are read")
            if name in records or len(roots) > 1:
                raise ArchiveError(f"its record {name} is there twice")
            begin = info.header_offset + _header_size(file, info.header_offset)
            if info.header_offset < end or begin + info.file_size > directory:
                raise ArchiveError(f"its record {name} overlaps another one, or lies outside of the file")
            end = begin + info.file_size
            records[name] = Record(begin, info.file_size, info.CRC)
    if "data.pkl" not in records or records["data.pkl"].size > MAX_INDEX_BYTES:
        raise ArchiveError(f"it has no index (data.pkl), or one of more than {MAX_INDEX_BYTES:,} bytes")
    return {name: records[name] for name in sorted(records, key=lambda name: records[name].begin)}


def _check_directory_size(file: Any, size: int) -> None:
    """Refuse a directory that would take much memory, or that does not end the file, before zipfile reads it."""
    tail_size = min(size, 98)  # the end records of torch: zip64 record, its locator, the classic one
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    if tail_size < 22 or tail[-22:-18] != b"PK\5\6" or tail[-2:] != b"\0\0":
        raise ArchiveError("it does not end as an archive does: truncated, or another kind of file")
    length = struct.unpack("<I", tail[-10:-6])[0]
    if tail_size == 98 and tail[-42:-38] == b"PK\6\7" and tail[-98:-94] == b"PK\6\6":
        length = struct.unpack("<Q", tail[-58:-50])[0]
    if length > MAX_DIRECTORY_BYTES:
        raise ArchiveError(f"its directory has {length:,} bytes; at most {MAX_DIRECTORY_BYTES:,} are read")
    file.seek(0)


def _header_size(file: Any, offset: int) -> int:
    file.seek(offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise ArchiveError("a record has no header; the file is damaged")
    return 30 + sum(struct.unpack("<HH", header[26:30]))


def _verify(file: Any, name: str, record: Record) -> None:
    file.seek(record.begin)
    left, checksum = record.size, 0
    while left:
        block = file.read(min(left, BLOCK))
        if not block:
            raise ArchiveError(f"{name} is cut off")
        checksum, left = zlib.crc32(block, checksum), left - len(block)
    if checksum != record.checksum:
        raise ArchiveError(f"bad CRC-32 for {name}")


def _content(file: Any, record: Record | None) -> bytes:
    if record is None:
        return b""
    file.seek(record.begin)
    return file.read(record.size)


@dataclass(frozen=True)
class _TensorRecord:
    """What stands for a tensor in the index: the name of its record, and the type and number of the values there."""

    name: str
    dtype: torch.dtype
    number: int


class _Index(pickle._Unpickler):  # in Python: the one in C allocates what a memo's number says
    """Plain values and placeholders of tensors; everything else is refused before it is looked up."""

    dispatch = {
        key: value
        for key, value in pickle._Unpickler.dispatch.items()
        if key in {getattr(pickle, name)[0] for name in _OPCODES.split()}
    }

    def __init__(self, pickled: bytes, records: dict[str, Record]) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self.records = records
        self.dtypes: dict[str, torch.dtype] = {}

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:
            if len(error.args) == 1 and isinstance(error.args[0], int) and error.args[0] not in self.dispatch:
                raise UnsafeArchiveError(f"opcode {bytes([error.args[0] & 255])!r}") from None
            raise

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return _ordered_dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _checked_tensor
        raise UnsafeArchiveError(f"{module[:80]!r}.{name[:80]!r}")

    def persistent_load(self, reference: Any) -> _TensorRecord:
        kind, dtype, key, _, number = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(number) is not int:
            raise ValueError("a reference to something other than a tensor's record")
        name = f"data/{key}"
        record = self.records.get(name)
        if record is None or record.size != number * dtype.itemsize:
            found = "no such record" if record is None else f"{record.size} bytes"
            raise ValueError(f"tensor {name} of {number} values: {found}")
        if self.dtypes.setdefault(name, dtype) != dtype:
            raise ValueError(f"tensor {name} is of two kinds")
        return _TensorRecord(name, dtype, number)

    def load_build(self) -> None:
        """The attributes of a state dict, and of nothing else."""
        state = self.stack.pop()
        if (
            type(self.stack[-1]) is not collections.OrderedDict
            or not isinstance(state, dict)
            or set(state) - {"_metadata"}
        ):
            raise UnsafeArchiveError("attributes of an object")
        self.stack[-1].__dict__.update(state)

    dispatch[pickle.BUILD[0]] = load_build

    def load_reduce(self) -> None:
        """A call of one of the two functions that `find_class` gives."""
        arguments = self.stack.pop()
        if not any(self.stack[-1] is function for function in (_checked_tensor, _ordered_dict)):
            raise UnsafeArchiveError("a call")
        self.stack[-1] = self.stack[-1](*arguments)

    dispatch[pickle.REDUCE[0]] = load_reduce


def _ordered_dict() -> collections.OrderedDict[Any, Any]:
    return collections.OrderedDict()


def _checked_tensor(
    record: _TensorRecord,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> _TensorRecord:
    """The arguments of torch._utils._rebuild_tensor_v2, for a tensor that has a value of its own for every place."""
    if not isinstance(record, _TensorRecord) or len(size) != len(stride):
        raise ValueError("a tensor of something other than a record, a size and a stride")
    if not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
        raise ValueError("a tensor's offset, size and stride are no whole numbers from 0")
    count = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else -1
    if count > record.number or last >= record.number:
        raise ValueError(f"a tensor of {count} values on {record.number * record.dtype.itemsize} bytes")
    return record


def _record_names(index: Any) -> Iterator[str]:
    """The records behind the tensors of an index."""
    if isinstance(index, _TensorRecord):
        yield index.name
    elif isinstance(index, dict | list | tuple):
        for item in index.values() if isinstance(index, dict) else index:
            yield from _record_names(item)


def _check_plain(value: Any) -> None:
    """Refuse values other than dicts, lists, tuples, text, bytes, numbers and tensors, and too many of them."""
    left, count = [(value, 0)], 0
    while left:
        item, depth = left.pop()
        count += 1
        if isinstance(item, dict | list | tuple):
            if depth == MAX_DEPTH or count > MAX_PLAIN_VALUES:
                raise ArchiveError(f"its values lie more than {MAX_DEPTH} deep, or are more than {MAX_PLAIN_VALUES:,}")
            keys = item if isinstance(item, dict) else ()
            if not all(type(key) in (str, int) for key in keys):
                raise ArchiveError("a dict has keys other than text and whole numbers")
            left += [(below, depth + 1) for below in (item.values() if isinstance(item, dict) else item)]
        elif item is not None and not isinstance(item, str | bytes | bool | int | float | _TensorRecord):
            raise ArchiveError(f"it holds a {type(item).__name__}")
